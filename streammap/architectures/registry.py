"""The known specs: those shipped, and those of the folder in STREAMMAP_ARCHITECTURES."""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from streammap.architectures import parser
from streammap.architectures.decode import Tables
from streammap.architectures.key_pattern import first_match
from streammap.architectures.schema import Architecture, TinyModel
from streammap.errors import ArchitectureError

FOLDER = "STREAMMAP_ARCHITECTURES"
"""Environment variable: a folder with further specs."""
_NO_CONFIG: dict[str, object] = {}


def names() -> tuple[str, ...]:
    """The specs, by name."""
    return tuple(sorted(_texts(_folder())))


def is_shipped(name: str) -> bool:
    """Whether a spec, by name or by its file, is one of this project's: none of a user's own."""
    own = Path(_folder() or os.devnull) / f"{name}.toml"
    return not name.endswith(".toml") and not own.is_file()


def load(name: str, config: Mapping[str, object] = _NO_CONFIG) -> Architecture:
    """A spec by name, or by its file (*.toml), as it stands for a config.json.

    Raises:
        ArchitectureError: no such spec, or its file is wrong.
    """
    own_name, tables = _tables_of(name)
    return parser.build(own_name, tables, config, _SPECS)


def tiny_models(name: str) -> tuple[TinyModel, ...]:
    """The tiny models under a spec's [proof].

    Raises:
        ArchitectureError: no such spec, or its [proof] is wrong.
    """
    return parser.tiny_models(*_tables_of(name))


def parse(text: str, *, name: str, config: Mapping[str, object] = _NO_CONFIG) -> Architecture:
    """Read a spec from TOML.

    Raises:
        ArchitectureError: naming the spec and the entry.
    """
    return parser.build(name, _parsed(text, name), config, _SPECS)


def model_types() -> dict[str, str]:
    """model_type -> name of the spec that serves it."""
    served_by: dict[str, str] = {}
    for name in _texts(_folder()):
        listed = _tables(name).get("model_types", [])
        for model_type in listed if isinstance(listed, list) else []:
            served_by.setdefault(str(model_type), name)
    return served_by


def for_model_type(model_type: str, config: Mapping[str, object]) -> Architecture | None:
    """The spec that serves a config.json with this model_type."""
    name = _serving(model_type)
    return None if name is None else load(name, config)


def for_keys(keys: Iterable[str], config: Mapping[str, object]) -> Architecture | None:
    """The spec whose `detect` keys are all there."""
    all_keys = tuple(keys)
    for name, text in _texts(_folder()).items():
        if "\ndetect" not in text:
            continue
        architecture = load(name, config)
        patterns = architecture.detect
        if patterns and all(
            any(first_match((p,), key) is not None for key in all_keys) for p in patterns
        ):
            return architecture
    return None


def _serving(model_type: str) -> str | None:
    """The name of the spec that serves a model_type."""
    quoted = f'"{model_type}"'
    for name, text in _texts(_folder()).items():
        # Reading TOML is slow; most files do not even hold the word.
        if quoted in text:
            listed = _tables(name).get("model_types", [])
            if isinstance(listed, list) and model_type in listed:
                return name
    return None


def _tables_serving(model_type: str) -> Tables | None:
    name = _serving(model_type)
    return None if name is None else _merged(name)


def _tables_of(name: str) -> tuple[str, Tables]:
    """The name and the merged tables of a spec that is given by name or by its file."""
    if not name.endswith(".toml"):
        return name, _merged(name)
    path = Path(name)
    try:
        with path.open(encoding="utf-8") as file:  # one more letter shows that it is too long
            text = file.read(parser.MAX_LETTERS + 1)
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"{path}: {error}", hint="check the path") from error
    return path.stem, _parsed(text, path.stem)


def _parsed(text: str, name: str) -> Tables:
    return parser.merged(parser.read(text, name=name), _tables)


def _folder() -> str:
    return os.environ.get(FOLDER, "")


@cache
def _texts(folder: str) -> Mapping[str, str]:
    """Name -> TOML; a user's own file counts before a shipped one of its name."""
    shipped = resources.files("streammap") / "architectures" / "specs"
    texts = {f.name[:-5]: f.read_text() for f in shipped.iterdir() if f.name.endswith(".toml")}
    if folder:
        try:
            own = {
                p.stem: p.read_text(encoding="utf-8") for p in sorted(Path(folder).glob("*.toml"))
            }
        except (OSError, UnicodeDecodeError) as error:
            raise ArchitectureError(f"{folder}: {error}", hint=f"check {FOLDER}") from error
        return {**own, **{name: text for name, text in texts.items() if name not in own}}
    return texts


def _tables(name: str) -> Tables:
    return _read(_folder(), name)


@cache
def _read(folder: str, name: str) -> Tables:
    texts = _texts(folder)
    if name not in texts:
        import difflib  # most calls have no use for it

        near = difflib.get_close_matches(name, texts, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ArchitectureError(
            f"no architecture {name!r}", hint=f"{meant}there are {', '.join(sorted(texts))}"
        )
    return parser.read(texts[name], name=name)


def _merged(name: str) -> Tables:
    return _merged_in(_folder(), name)


@cache
def _merged_in(folder: str, name: str) -> Tables:
    return parser.merged(_read(folder, name), lambda above: _read(folder, above))


_SPECS = parser.Specs(_merged, _tables_serving)
