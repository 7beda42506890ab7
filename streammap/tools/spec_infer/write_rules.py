"""The text of an inferred spec: axes, modules and tensors, in the format of the README there."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from streammap.tools.spec_infer import probe, solve
from streammap.tools.spec_infer.naming import AxisNaming, NamedTensors
from streammap.tools.spec_infer.probe import template
from streammap.tools.spec_infer.words import toml_value

_LARGE = 32
"""A dimension of this size should have a reason."""


class SpecRules:
    """The first tables of a spec, and how they write patterns."""

    def __init__(self, naming: AxisNaming) -> None:
        """Find the beginnings that many keys share."""
        self._m = naming
        self._base = self._prefix()

    def rules(self) -> str:
        """Everything up to the rules of the tensors."""
        return "\n".join([self._top(), self._axes(), self._rules()])

    def _top(self) -> str:
        version = probe.transformers_version()
        lines = [
            f"# Inferred from {self._m.bench.class_name} of transformers {version} by its shapes.",
            "# They show sizes, but neither the order inside a dimension nor factors of the",
            "# forward pass: `streammap spec verify` finds what is wrong here.",
            "schema = 1",
            f"model_types = [{toml_value(self._m.bench.model_type)}]",
        ]
        lines += ["", "[vars]"] if self._base or self._stacks() else []
        lines += [f"base = {toml_value([self._base, ''])}"] if self._base else []
        lines += [f"{name} = {toml_value([start])}" for start, name in self._stacks().items()]
        return "\n".join(lines) + "\n"

    def _axes(self) -> str:
        lines = ["[axes]"]
        for symbol, name in self._m.names.items():
            sources = self._sources(symbol)
            lines.append(f"{name} = {toml_value(sources if len(sources) > 1 else sources[0])}")
        lines += ["", "[axis_kind]"]
        lines += [f'{name} = "{kind}"' for name, kind in self._m.kinds.items() if kind != "width"]
        rules = [
            f"{self._m.names[hidden]} == {self._m.names[heads]}*{self._m.names[symbol]}"
            for symbol, (hidden, heads) in self._m.solution.head_sizes.items()
            if symbol in self._m.names
        ]
        if aliases := self._m.aliases():
            lines += ["", "[alias]", *(f'{k} = "{v}"' for v, k in aliases.items())]
        if rules:
            lines += ["", "[constraints]", f"rules = {toml_value(rules)}"]
        return "\n".join(lines) + "\n"

    def _sources(self, symbol: str) -> list[str]:
        """Where config.json has the axis, and what its absence means."""
        for table in (self._m.solution.head_sizes, self._m.solution.groups):
            if symbol in table:
                above, below = table[symbol]
                return [f"={self._m.names[above]}/{self._m.names[below]}"]
        leaf = symbol.rpartition(".")[2]
        first = re.sub(r"\.\d+\.", ".*.", symbol)
        absent = self._absent(symbol)
        if absent is None or (
            leaf == first
            and absent[0] == "number"
            and self._m.kinds[self._m.names[symbol]] != "frozen"
        ):
            return [first]
        return [first, f"={absent[1]}"]

    def _absent(self, symbol: str) -> tuple[str, str] | None:
        bench, value = self._m.bench, self._m.bench.default(symbol, {})
        scope = symbol.rpartition(".")[0]
        others = [
            s
            for s, name in self._m.names.items()
            if s in self._m.fields
            and s != symbol
            and s.rpartition(".")[0] == scope
            and self._m.kinds[name] != "depth"
        ]
        read = bench.default
        if value is None:
            where = next(
                (
                    (key, i)
                    for key, dims in self._m.solution.dims.items()
                    for i, p in enumerate(dims)
                    if solve.sole(p) == (symbol, 1)
                ),
                None,
            )
            if where is None:
                return None
            key, at = where

            def read(field: str, changes: Mapping[str, object]) -> int | None:
                snapshot = bench.snapshot({**changes, field: None})
                shape = () if snapshot is None else snapshot.shapes.get(key, ())
                return shape[at] if at < len(shape) else None

            value = read(symbol, {})
        if value is None or value <= 0:
            return None
        moved = {}
        for other in others:
            changed = read(symbol, {other: 2 * self._m.fields[other].value})
            if changed is not None and changed != value:
                moved[other] = Fraction(changed, value)
        up = [f for f, ratio in moved.items() if ratio == 2]
        down = [f for f, ratio in moved.items() if ratio == Fraction(1, 2)]
        if not moved:
            return "number", str(value)
        if len(up) != 1 or len(up) + len(down) != len(moved):
            return None
        size = Fraction(self._m.fields[up[0]].value)
        for field in down:
            size /= self._m.fields[field].value
        factor = value / size
        text = "/".join([self._m.names[up[0]], *(self._m.names[f] for f in down)])
        if factor.denominator != 1:
            return None
        return "formula", text if factor == 1 else f"{factor}*{text}"

    def _rules(self) -> str:
        modules: dict[str, list[NamedTensors]] = defaultdict(list)
        for tensors in self._m.tensors:
            modules[re.sub(r"\.(weight|bias)$", "", tensors.pattern)].append(tensors)
        buffers: list[str] = []
        lines: dict[str, dict[str, dict[str | None, str]]] = {"modules": {}, "tensors": {}}
        for module, members in modules.items():
            if all(map(self._is_constant, members)):
                buffers += [self.written(tensors.pattern) for tensors in members]
                continue
            words = self._module(members)
            if words is not None:
                lines["modules"][self.written(module)] = words
                continue
            for tensors in members:
                entry = lines["tensors"].setdefault(self.written(tensors.pattern), {})
                entry[tensors.condition] = self._entries(tensors)
        text = []
        for table, entries in lines.items():
            if entries:
                text.append(f"[{table}]")
                text += [self._line(pattern, words) for pattern, words in entries.items()]
                text.append("")
        if buffers:
            text += ["[buffers]", f"keys = {toml_value(buffers)}", ""]
        return "\n".join(text)

    def _is_constant(self, tensors: NamedTensors) -> bool:
        """Whether it is a buffer that no resizing changes."""
        symbols = [s for p in tensors.dims for m in p or () for s, _ in m]
        kinds = {self._m.kinds.get(self._m.names.get(s, ""), "frozen") for s in symbols}
        return tensors.part.kind == "buffer" and kinds <= {"frozen"}

    def _line(self, pattern: str, words: Mapping[str | None, str]) -> str:
        if None in words or len(words) == 1:
            value = toml_value(next(iter(words.values())))
        else:
            *some, last = words.items()
            value = toml_value({**{str(c): w for c, w in some}, "default": last[1]})
        guess = any(re.search(r"\+|\b[2-9]\b", word) for word in words.values())
        return f"{toml_value(pattern)} = {value}" + "   # the order is a guess" * guess

    def _module(self, members: Sequence[NamedTensors]) -> dict[str | None, str] | None:
        """What [modules] says of a module, by condition; None where it has no word for it."""
        by_condition: dict[str | None, str] = {}
        for tensors in members:
            if tensors.pattern.endswith(".weight"):
                words = self._module_words(tensors)
                if words is None:
                    return None
                by_condition[tensors.condition] = words
        for tensors in members:
            weight = by_condition.get(tensors.condition)
            if weight is None or not tensors.pattern.endswith((".weight", ".bias")):
                return None
            if tensors.pattern.endswith(".bias"):
                makes = re.split(r" -> | ", weight)[-1]
                if len(tensors.dims) != 1 or self._m.text_of(tensors, 0) != makes:
                    return None
        return by_condition or None

    def _module_words(self, tensors: NamedTensors) -> str | None:
        kind, rank = tensors.part.kind, len(tensors.dims)
        one = [self._m.text_of(tensors, i) for i in range(rank)]
        if kind == "norm" and rank == 1:
            return f"norm {one[0]}"
        if kind == "conv1d" and rank == 2:
            return f"conv1d {one[0]} -> {one[1]}"
        if kind == "embedding" and rank == 2:
            return f"embedding {one[0]} -> {one[1]}"
        if kind == "conv" and rank > 2 and set(one[2:]) == {"_"}:
            return f"conv {one[1]} -> {one[0]}"
        if kind in ("linear", "stack") and rank == 2 and tensors.roles == ("out", "in"):
            return f"linear {one[1]} -> {one[0]}"
        return None

    def _entries(self, tensors: NamedTensors) -> str:
        words = []
        for i, (polynomial, role) in enumerate(zip(tensors.dims, tensors.roles, strict=True)):
            text = self._m.text_of(tensors, i)
            named = {
                self._m.kinds[self._m.names[s]]
                for m in polynomial or ()
                for s, _ in m
                if s in self._m.names
            }
            resized = bool(named & {"width", "group", "expert"})
            loose = text == "_" or (tensors.part.kind in ("other", "buffer") and not resized)
            words.append(text if loose or not role else f"{text}:{role}")
        return ", ".join(words)

    def constants(self) -> Iterator[str]:
        """Large dimensions that no field moves."""
        seen = set()
        for key, dims in self._m.solution.dims.items():
            shape = self._m.bench.base().shapes[key]
            for i, polynomial in enumerate(dims):
                if polynomial is not None and not any(polynomial) and shape[i] >= _LARGE:
                    if (template(key), i) not in seen:
                        yield f"{template(key)} dimension {i}: {shape[i]} whatever the fields are"
                    seen.add((template(key), i))

    def _prefix(self) -> str:
        """The base model's name, where keys begin with it."""
        prefix = self._m.anatomy.base.partition(".")[0]
        return (
            f"{prefix}."
            if prefix and any(key.startswith(f"{prefix}.") for key in self._m.solution.dims)
            else ""
        )

    def _stacks(self) -> dict[str, str]:
        """Beginning of a layer's keys -> its variable."""
        variables: dict[str, str] = {}
        for tensors in self._m.tensors:
            for name, kind in self._m.kinds.items():
                start, index, _ = tensors.pattern.partition(f"{{{name}}}.")
                if kind == "depth" and index:
                    variables[self.based(start) + index] = ""
        depths = [name for name, kind in self._m.kinds.items() if kind == "depth"]
        short: dict[str, str] = {}
        for start in variables:
            name = next(n for n in depths if f"{{{n}}}." in start)
            variable = "L" if len(depths) == 1 else name.removesuffix("_layer").upper()
            while variable in short.values() or variable in self._m.names.values():
                variable += "2"
            short[start] = variable
        return short

    def based(self, pattern: str) -> str:
        """A pattern, with the variable for the base model."""
        if self._base and pattern.startswith(self._base):
            return "{base}" + pattern.removeprefix(self._base)
        return pattern

    def written(self, pattern: str) -> str:
        """A pattern, with variables for what many begin with."""
        pattern = self.based(pattern)
        for start, name in self._stacks().items():
            if pattern.startswith(start):
                return f"{{{name}}}" + pattern.removeprefix(start)
        return pattern
