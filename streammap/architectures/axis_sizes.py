"""Sizes of a model's axes, read from config.json and, where a spec says so, from the tensors."""

import contextlib
import itertools
from collections.abc import Callable, Mapping

from streammap.architectures import expression as expressions
from streammap.architectures import key_pattern
from streammap.architectures.classes import defaults
from streammap.architectures.config_fields import field_value
from streammap.architectures.expression import Expression, InexactDivisionError
from streammap.architectures.limits import MAX_LAYERS, MAX_SIZE
from streammap.architectures.schema import Architecture, Axis
from streammap.errors import ArchitectureError, CheckpointError, some
from streammap.io.dtypes import TensorSpec

_MAX_WORD = 80


def read(
    spec: Architecture, config: Mapping[str, object], specs: Mapping[str, TensorSpec]
) -> dict[str, int]:
    """Axis -> size, for each axis that config.json or the tensors give.

    Raises:
        CheckpointError: a size that is missing or invalid, or breaks a constraint of the spec.
    """
    sizes = _Sizes(spec, config, specs).all()
    for name in spec.depth_axes:
        if sizes.get(name, 0) > MAX_LAYERS:
            raise CheckpointError(
                f"config.json: {name} is {sizes[name]}, at most {MAX_LAYERS} layers are read",
                hint="is this config.json the checkpoint's own?",
            )
    _check_constraints(spec, str(config.get("model_type", spec.name))[:_MAX_WORD], sizes)
    return sizes


def of_config(spec: Architecture, config: Mapping[str, object]) -> dict[str, int]:
    """Axis sizes as far as a config.json alone gives them.

    Raises:
        CheckpointError: a field that is not a size, or another architecture.
    """
    sizes: dict[str, int] = {}
    model_type = config.get("model_type")
    if model_type is not None and model_type not in spec.model_types:
        raise CheckpointError(
            f"target config.json: model_type {model_type!r}, expected {some(spec.model_types)}",
            hint="give the config.json of a model of the same architecture",
        )
    known = _Sizes(spec, config, {})
    for name in spec.axes:
        with contextlib.suppress(CheckpointError):
            sizes[name] = known.size(name)
    return sizes


def axis_origin(axis: Axis, config: Mapping[str, object]) -> str | Expression | None:
    """Which of an axis' sources gives its size.

    The first that is there. A field that is not there (null is) means what the model's class has
    for it, unless the tensors themselves say the size.
    """
    fields = list(itertools.takewhile(lambda source: isinstance(source, str), axis.sources))
    for field in fields:
        if isinstance(field, str) and field_value(config, field) is not None:
            return field
    rest = next((source for source in axis.sources if not isinstance(source, str)), None)
    if rest is None or not expressions.is_measured(rest):
        for field in fields:
            if isinstance(field, str) and defaults.size(config, field) is not None:
                return field
    return rest


def evaluate_axis(
    spec: Architecture,
    expression: Expression,
    sizes: Mapping[str, int],
    specs: Mapping[str, TensorSpec],
) -> int:
    """The value of an axis' "=expression" for given sizes and tensors."""

    def value_of(name: str) -> int:
        if name in spec.aliases:
            return evaluate_axis(spec, spec.aliases[name], sizes, specs)
        if name not in sizes:
            raise ArchitectureError(f"{spec.name}.toml: no axis {name!r}")
        return sizes[name]

    return expressions.evaluate(
        expression, value_of, lambda f, a: _called(f, a, value_of, specs, {})
    )


class _Sizes:
    """Axis sizes from config.json, each worked out when another one asks for it."""

    def __init__(
        self, spec: Architecture, config: Mapping[str, object], specs: Mapping[str, TensorSpec]
    ) -> None:
        self._spec, self._config, self._specs = spec, config, specs
        self._known: dict[str, int] = {}
        self._open: set[str] = set()

    def all(self) -> dict[str, int]:
        for name in self._spec.axes:
            if axis_origin(self._spec.axes[name], self._config) is not None:
                self.size(name)
        for name in self._spec.depth_axes:
            self.size(name)
        return self._known

    def size(self, name: str) -> int:
        if name in self._known:
            return self._known[name]
        if name in self._spec.aliases:
            return self._evaluate(self._spec.aliases[name])
        if name not in self._spec.axes:
            raise ArchitectureError(f"{self._spec.name}.toml: no axis {name!r}")
        if name in self._open:
            raise ArchitectureError(f"{self._spec.name}.toml: {name} is defined by itself")
        axis = self._spec.axes[name]
        origin = axis_origin(axis, self._config)
        if origin is None:
            raise CheckpointError(
                f"config.json: no {' or '.join(axis.fields)}, which is the size of {name}",
                hint="give the checkpoint's own config.json with --config",
            )
        self._open.add(name)
        try:
            if isinstance(origin, str):
                self._known[name] = self._told(origin)
            else:
                self._known[name] = self._evaluate(origin)
        except InexactDivisionError as error:
            raise CheckpointError(
                f"config.json: {name} is not a whole number: {error.message}",
                hint="is this config.json the checkpoint's own?",
            ) from error
        finally:
            self._open.remove(name)
        return self._known[name]

    def _told(self, field: str) -> int:
        there = field_value(self._config, field)
        return _size(defaults.size(self._config, field) if there is None else there, field)

    def _evaluate(self, expression: Expression) -> int:
        return expressions.evaluate(
            expression, self.size, lambda f, a: _called(f, a, self.size, self._specs, self._config)
        )


def _called(
    function: str,
    arguments: tuple[str, ...],
    value_of: Callable[[str], int],
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, object],
) -> int:
    if function == "entries":
        listed = field_value(config, arguments[0]) or defaults.value(config, arguments[0])
        return len(listed) if isinstance(listed, list) else 1
    if function == "shape":
        if len(arguments) != 2 or not arguments[1].isdecimal():
            raise ArchitectureError(
                f"function shape({', '.join(arguments)}): expected a key and a number"
            )
        pattern, dim = arguments
        compiled = key_pattern.compile_patterns(pattern, {})
        found = (key for key in specs if key_pattern.first_match(compiled, key) is not None)
        key = next(found, None)
        if key is None or int(dim) >= len(specs[key].shape):
            raise CheckpointError(f"{pattern}: expected in this architecture, not there")
        return specs[key].shape[int(dim)]
    if function == "count":
        compiled = key_pattern.compile_patterns(arguments[0], {})
        n_matches = sum(key_pattern.first_match(compiled, key) is not None for key in specs)
        if not n_matches:
            raise CheckpointError(f"{arguments[0]}: expected in this architecture, not there")
        return n_matches
    if function == "swiglu8" and len(arguments) == 2:
        # DINOv2's gated MLP: two thirds of the plain one's size, rounded up to a multiple of 8.
        return (value_of(arguments[0]) * value_of(arguments[1]) * 2 // 3 + 7) // 8 * 8
    raise ArchitectureError(
        f"no function {function!r}", hint="there are shape, count, entries and swiglu8"
    )


def _size(value: object, field: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise CheckpointError(
            f"config.json: {field} is {value!r}, expected a size",
            hint="is this config.json the checkpoint's own?",
        )
    return value


def _check_constraints(spec: Architecture, model: str, sizes: Mapping[str, int]) -> None:
    for text, left, right in spec.constraints:
        try:
            a, b = evaluate_axis(spec, left, sizes, {}), evaluate_axis(spec, right, sizes, {})
        except InexactDivisionError as error:
            raise CheckpointError(
                f"{model}: {text} does not hold: {error.message}",
                hint="is this config.json the checkpoint's own?",
            ) from error
        if a != b:
            given = ", ".join(f"{name}={size}" for name, size in sizes.items() if name in text)
            raise CheckpointError(
                f"{model}: {text} does not hold: {a} is not {b} ({given})",
                hint="is this config.json the checkpoint's own?",
            )
