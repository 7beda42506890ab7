"""mergekit's recipes (its 0.1.5): a YAML file that names models, a method and its parameters.

    merge_method: linear                         merge_method: passthrough
    models:                                      slices:
      - model: org/one                             - sources:
        parameters: {weight: 0.7}                      - {model: big, layer_range: [0, 24]}
      - model: ./two                               - sources:
        parameters: {weight: [0.1, 0.5]}               - {model: big, layer_range: [8, 32]}
    dtype: bfloat16

It becomes a blend: its methods, filters and lists over depth mean here what they mean there. What
is not known is refused by name before any model is opened. Nothing is read here but the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from streammap.architectures.limits import MAX_LAYERS
from streammap.common.kinds import shown
from streammap.errors import PlanError, some
from streammap.operators.blend import Blend
from streammap.operators.recipes import yaml_file
from streammap.planning.merging import settings
from streammap.planning.merging.merge import CONFIG_DTYPES, PROMOTED
from streammap.planning.merging.methods import registry
from streammap.planning.merging.settings import Setting

SUFFIXES = (".yml", ".yaml")
_KNOWN = (
    *("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype"),
    *("modules", "tokenizer", "tokenizer_source", "chat_template"),
)
_REFUSED = {
    "modules": "parts of several models are not put together",
    "chat_template": "the tokenizer's files are copied as they are",
}
_JOINING = ("tokens", "pad_to_multiple_of")
_ELSEWHERE = (
    *("density", "weight", "normalize", "rescale", "lambda", "epsilon", "gamma", "t", "scale"),
    *("int8_mask", "nuslerp_flatten", "nuslerp_row_wise", "max_iter", "tol", "eps", "filter_wise"),
    *("select_topk",),
)
"""Parameters of mergekit's methods: those of another method do nothing there, and nothing here."""
_DEFAULTS = {"linear": {"normalize": True}}
"""Where mergekit's default is another one."""
_DTYPES = {name: dtype for dtype, name in CONFIG_DTYPES.items()}


@final
@dataclass(frozen=True, slots=True)
class Opened:
    """What a recipe asks for."""

    models: tuple[str, ...]
    """Paths and names of the Hub: the source, then the others."""
    base: str | None
    options: Mapping[str, Any]
    """Of the blend, but its inputs."""

    def operator(self, others: Sequence[Any], base: Any) -> Blend:
        """The blend, given its further inputs.

        Raises:
            PlanError: a value that makes no sense.
        """
        return Blend(others=tuple(others), base=base, **self.options)


def is_recipe(source: object) -> bool:
    """Whether a source is the file of a recipe, by its name."""
    return isinstance(source, str | Path) and str(source).lower().endswith(SUFFIXES)


def read(path: Path) -> Opened:
    """A recipe from a file.

    Raises:
        CheckpointError: it can't be read, or is no YAML.
        PlanError: it asks for what is not known.
    """
    return parse(yaml_file.read(path), str(path))


def parse(content: object, where: str) -> Opened:
    """A recipe from its value.

    Args:
        where: The file's name, for messages.

    Raises:
        PlanError: it asks for what is not known.
    """
    return _Reader(where).recipe(content)


@final
class _Reader:
    def __init__(self, where: str) -> None:
        self._where = where
        self._models: list[str] = []

    def recipe(self, content: object) -> Opened:
        table = self._table(content, "the recipe", _KNOWN)
        for name, why in _REFUSED.items():
            if table.get(name) is not None:
                raise self._error(f"{name} is not done here: {why}", "leave it out")
        method = table.get("merge_method")
        if method not in registry.names():
            raise self._error(
                f"merge_method {str(method)[:40]!r} is not done here",
                f"done are {', '.join(registry.names())}",
            )
        assert isinstance(method, str)
        takes_base = registry.load(method).takes_base
        base = None
        if table.get("base_model") is not None:
            base = self._model(table["base_model"], "base_model")
        given = [name for name in ("models", "slices") if table.get(name)]
        if len(given) != 1:
            raise self._error(f"{' and '.join(given) or 'no models'}", "give models or slices")
        if base is not None and not takes_base:
            self._number(base)  # first: it gives names, config.json and files
        shared = {**_DEFAULTS.get(method, {}), **self._parameters(table, "parameters", method)}
        options: dict[str, Any] = {"method": method}
        if given == ["models"]:
            each = self._listed(table["models"], method, base if takes_base else None)
            if base is not None and not takes_base and len(each) < len(self._models):
                each = [{}, *each]  # mergekit adds a base to the models
            options["each"] = each
        else:
            options["slices"] = self._slices(table["slices"], method, base if takes_base else None)
        if shared:
            options["parameters"] = shared
        options["as_dtype"] = self._dtype(table)
        if self._names_tokenizer(table):
            options["same_tokenizer"] = True
        return self._opened(options, base if takes_base else None)

    def _opened(self, options: dict[str, Any], base: str | None) -> Opened:
        if not self._models:
            raise self._error("no model but the base", "give further models")
        if base is not None:
            # The base stands behind the others.
            for one in options.get("slices", ()):
                for span in one["sources"]:
                    if span["source"] is None:
                        span["source"] = len(self._models)
        return Opened(tuple(self._models), base, options)

    def _listed(self, models: object, method: str, base: str | None) -> list[dict[str, object]]:
        """The parameters of each model; of a base among them there are none."""
        each: dict[int, dict[str, object]] = {}
        for i, one in enumerate(self._list(models, "models")):
            name = f"models[{i}]"
            table = self._table(one, name, ("model", "parameters"))
            model = self._model(table.get("model"), f"{name}.model")
            parameters = self._parameters(table, f"{name}.parameters", method)
            if model == base:
                continue
            number = self._number(model)
            if number in each:
                raise self._error(f"{name}: {model} is listed twice", "list it once")
            each[number] = parameters
        return [each.get(number, {}) for number in sorted({*each, *range(len(self._models))})]

    def _slices(self, slices: object, method: str, base: str | None) -> list[dict[str, Any]]:
        made = []
        for i, one in enumerate(self._list(slices, "slices")):
            name = f"slices[{i}]"
            known = ("sources", "parameters", "base_model", "residual_weight")
            table = self._table(one, name, known)
            for word in ("base_model", "residual_weight"):
                if table.get(word) is not None:
                    raise self._error(f"{name}.{word} is not done here", "leave it out")
            made.append(
                {
                    "sources": [
                        self._span(source, f"{name}.sources[{j}]", method, base)
                        for j, source in enumerate(self._list(table.get("sources"), name))
                    ],
                    "parameters": self._parameters(table, f"{name}.parameters", method),
                }
            )
        return made

    def _span(self, value: object, name: str, method: str, base: str | None) -> dict[str, Any]:
        table = self._table(value, name, ("model", "layer_range", "parameters"))
        model = self._model(table.get("model"), f"{name}.model")
        return {
            "source": None if model == base else self._number(model),
            "layers": self._layers(table.get("layer_range"), f"{name}.layer_range"),
            "parameters": self._parameters(table, f"{name}.parameters", method),
        }

    def _layers(self, value: object, name: str) -> list[int]:
        """The first layer, and one past the last."""
        match value:
            case [int(first), int(end)] if 0 <= first < end <= MAX_LAYERS:
                return [first, end]
        raise self._error(
            f"{name} is {shown(value)}, expected the first layer and one past the last",
            "write layer_range: [0, 24]",
        )

    def _parameters(self, table: Mapping[str, object], name: str, method: str) -> dict[str, object]:
        """Those that the method has; those of other methods are left out."""
        given = table.get("parameters")
        known = registry.load(method).parameters
        content = {} if given is None else self._table(given, name, (*known, *_ELSEWHERE))
        return {
            key: self._setting(value, f"{name}.{key}")
            for key, value in content.items()
            if key in known
        }

    def _setting(self, value: object, name: str) -> Setting:
        """A number by place, whose errors name its place in the file."""
        number = float(value) if isinstance(value, bool) else value
        return settings.parse(number, what=f"{self._where}: {name}")

    def _model(self, value: object, name: str) -> str:
        """A model's path or name; with its revision as the Hub spells it, and its adapter."""
        if isinstance(value, Mapping):
            table = self._table(
                value, name, ("model", "lora", "override_architecture", "path", "revision")
            )
            if table.get("override_architecture") is not None:
                raise self._error(f"{name}.override_architecture is not done here", "leave it out")
            if "model" in table:
                model, adapter = self._model(table["model"], name), table.get("lora")
                return model if adapter is None else f"{model}+{self._model(adapter, name)}"
            path, revision = table.get("path"), table.get("revision")
            value = path if revision is None else f"{path}@{revision}"
        if not isinstance(value, str) or not value or "\0" in value:
            raise self._error(f"{name} is {str(value)[:40]!r}, expected a model", "name a folder")
        return value

    def _number(self, model: str) -> int:
        """The number of a model; equal names are one."""
        if model not in self._models:
            self._models.append(model)
        return self._models.index(model)

    def _dtype(self, table: Mapping[str, object]) -> str:
        """The dtype of the result: what is computed is rounded once, to out_dtype."""
        for name in ("dtype", "out_dtype"):
            value = table.get(name)
            if value is not None and str(value).removeprefix("torch.") not in _DTYPES:
                raise self._error(
                    f"{name} is {str(value)[:40]!r}", f"expected {', '.join(_DTYPES)}"
                )
        value = table.get("out_dtype") or table.get("dtype")
        return PROMOTED if value is None else _DTYPES[str(value).removeprefix("torch.")]

    def _names_tokenizer(self, table: Mapping[str, object]) -> bool:
        """Whether a tokenizer is named: of equal ones each is the union, the base's, a model's."""
        source = table.get("tokenizer_source")
        if table.get("tokenizer") is not None:
            inner = self._table(table["tokenizer"], "tokenizer", ("source", *_JOINING))
            for name in _JOINING:
                if inner.get(name):
                    raise self._error(
                        f"tokenizer.{name} is not done here: vocabularies are not joined",
                        "leave it out",
                    )
            source = inner.get("source", "union")
        if source is None:
            return False
        if source not in ("base", "union"):
            self._model(source, "tokenizer_source")
        return True

    def _table(self, value: object, name: str, known: Sequence[str]) -> Mapping[str, object]:
        if not isinstance(value, Mapping):
            raise self._error(f"{name} is {str(value)[:40]!r}", f"expected {some(known, limit=9)}")
        unknown = [str(key)[:40] for key in value if key not in known]
        if unknown:
            raise self._error(
                f"{name} has {some(unknown)}, which is not known here",
                f"known are {', '.join(known)}",
            )
        return cast("Mapping[str, object]", value)

    def _list(self, value: object, name: str) -> Sequence[object]:
        if not isinstance(value, list) or not value:
            raise self._error(f"{name} is {str(value)[:40]!r}, expected a list", "see the recipe")
        return value

    def _error(self, problem: str, hint: str) -> PlanError:
        return PlanError(f"{self._where}: {problem}", hint=hint)
