"""YAML from files that may be hostile: plain values only, no aliases, no duplicate keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammap.errors import CheckpointError
from streammap.io import safe_open

if TYPE_CHECKING:
    import yaml

_MAX_NBYTES = 2**18
_HINT = "expected a recipe in YAML"


def read(path: Path) -> object:
    """The value of a YAML file.

    Raises:
        CheckpointError: it can't be read, is no YAML, or is more than plain values.
    """
    return parse(safe_open.content(path, limit=_MAX_NBYTES), str(path))


def parse(content: bytes, where: str) -> object:
    """The value of a YAML text.

    Args:
        where: The file's name, for messages.

    Raises:
        CheckpointError: it is no YAML, or more than plain values.
    """
    import yaml

    try:
        value: object = yaml.load(content.decode("utf-8", "replace"), _loader(yaml))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or "not YAML"
        raise CheckpointError(f"{where}{line}: {problem}", hint=_HINT) from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deeply", hint=_HINT) from error
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
        # A date that is none, a number of thousands of digits, a list as a key.
        raise CheckpointError(f"{where}: {error}", hint=_HINT) from error
    return value


def _loader(yaml: Any) -> "type[yaml.SafeLoader]":
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Plain values only."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            """A node; an alias would let a short text stand for a huge value."""
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.composer.ComposerError(
                    None,
                    None,
                    f"an alias (*{event.anchor}), expected it written out",
                    event.start_mark,
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """A table whose keys are all different."""
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{str(key)[:60]!r} twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    return Loader
