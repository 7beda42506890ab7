"""Names and roles for what probing found: config fields become axes, keys become patterns.

`hidden_size` is called embed, `model.layers.7.mlp.experts.3.w1.weight` becomes
`model.layers.{layer}.mlp.experts.{expert}.w1.weight`, and the module behind a key tells which of
its dimensions makes its axis and which one reads it. The names are those of the shipped specs.
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from streammap.architectures import config_fields
from streammap.architectures.key_pattern import INDEX
from streammap.tools.spec_infer import solve
from streammap.tools.spec_infer.amendments import Amendments, Order
from streammap.tools.spec_infer.module_roles import ModelStructure, ModulePart
from streammap.tools.spec_infer.probe import Workbench, template
from streammap.tools.spec_infer.solve import Explained, Monomial, Polynomial, Solution

_NAMES = (
    (r"hidden_size|d_model|n_embd|embed_dim|dim|hidden_states_size", "embed"),
    (r"(num_)?(attention_)?heads|n_heads?|num_heads", "heads"),
    (r".*(kv_heads?|key_value_heads|heads?_kv)", "kv_heads"),
    (r"head_dim|d_kv|attention_head_size|head_size", "head_dim"),
    (r"intermediate_size|d_ff|ffn_dim|n_inner|ffn_hidden_size|hidden_dim", "mlp"),
    (r"moe_intermediate_size|expert_ffn_hidden_size", "moe_mlp"),
    (r"shared_expert_intermediate_size", "shared_mlp"),
    (r"vocab_size", "vocab"),
    (r"max_position_embeddings|n_positions|n_ctx", "pos"),
    (r"type_vocab_size", "types"),
    (r"num_channels|in_channels", "channels"),
    (r"(num_)?(hidden_)?layers|n_layers?|depth|num_hidden_groups", "layer"),
    (r"(moe_)?n(um)?_(local_|routed_)?experts", "expert"),
    (r"embedding_size|word_embed_proj_dim", "emb_in"),
    (r"num_labels", "labels"),
)
HEAD_SIZE = re.compile(r"head_dim$|^d_kv$|head_size$|rotary|rope")
"""Fields that hold the size of a head."""
_RATIO = re.compile(r"ratio|mult|expan|factor|merge")
_FROZEN = re.compile(
    r"ratio|mult|expan|factor|head_dim$|^d_kv$|head_size$|rotary|rope|n(um)?_shared"
    r"|vocab|position|channels|labels|n_?groups$|input_dim$|mel_bins$|input_feat"
)
_DOWN = re.compile(r"down|w2|output_linear|(^|[._])wo($|[._])|fc2|c_proj")


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """All tensors of one key pattern and one meaning."""

    pattern: str
    part: ModulePart
    dims: Explained
    roles: tuple[str, ...]
    condition: str | None


class AxisNaming:
    """What a model's tensors are, in the words of a spec."""

    def __init__(self, bench: Workbench, anatomy: ModelStructure, solution: Solution) -> None:
        """Name the axes, and group the tensors."""
        self.bench, self.anatomy, self.solution = bench, anatomy, solution
        self.known = Amendments()
        self.fields = {field.name: field for field in bench.numbers()}
        self.unresolved: list[str] = []
        self.dims = dict(solution.dims) | {k: solution.dims[v] for k, v in anatomy.tied.items()}
        self.indices = {k: count for k, count in solution.counts.items() if any(count)}
        self.names = self._named()
        self.tensors = tuple(self._grouped())
        self.kinds = self._axis_kinds()

    def amended(self, known: Amendments) -> "AxisNaming":
        """The same, with what proofs have shown."""
        other = copy.copy(self)
        other.known = known
        other.kinds = {n: "frozen" if n in known.frozen else kind for n, kind in self.kinds.items()}
        return other

    def unexplained(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What no field explains, and what depends on fields that are never resized."""
        wrong, kept = [*self.unresolved], list[str]()
        for (key, i), fields in self.solution.unresolved.items():
            line = f"{key} dimension {i}: moves with {', '.join(fields)}, as no product of them"
            kinds = {self.kinds.get(self.names.get(f, ""), "frozen") for f in fields}
            (kept if kinds == {"frozen"} else wrong).append(line)
        return tuple(wrong), tuple(kept)

    def residual(self) -> str:
        """The field that most norms have: the width between layers."""
        widths = Counter(
            single[0]
            for key, dims in self.solution.dims.items()
            if (part := self.anatomy.parts.get(key))
            and part.kind == "norm"
            and (single := solve.sole(dims[-1] if dims else None))
        )
        return widths.most_common(1)[0][0] if widths else ""

    def residuals(self) -> set[str]:
        """The axes between the layers of each stack: what most norms there have."""
        norms: dict[str, Counter[str]] = defaultdict(Counter)
        for tensors in self.tensors:
            single = solve.sole(tensors.dims[-1] if tensors.dims else None)
            if tensors.part.kind != "norm" or single is None:
                continue
            is_head = single[0] in self.solution.head_sizes or HEAD_SIZE.search(single[0])
            if not is_head and not is_heads(single[0]):
                stack, index, _ = tensors.pattern.partition("}")
                norms[stack if index else ""][self.names[single[0]]] += 1
        return {counts.most_common(1)[0][0] for counts in norms.values()}

    def pattern(self, key: str) -> str:
        """The pattern of a key."""
        text, last = "", 0
        for number in INDEX.finditer(key):
            count = self.indices.get(template(key[: number.start()]))
            text += key[last : number.start()]
            text += number[0] if count is None else f"{{{self._index(count)}}}"
            last = number.end()
        return text + key[last:]

    def expression(
        self, polynomial: Polynomial | None, *, fused: bool = False, linear: bool = False
    ) -> str:
        """A dimension in the words of a spec, "_" where it keeps any size.

        Args:
            polynomial: What it is.
            fused: Whether it is named as one of fused queries, keys and values.
            linear: Whether it is one of a linear.
        """
        if polynomial is None or not any(polynomial) or _is_odd(polynomial):
            return "_"
        orders = self._orders(polynomial)
        terms = sorted(polynomial.items(), key=lambda item: self._term_rank(item[0]))
        terms = terms[::-1] if "turned" in orders else terms
        by_head = linear and "by_head" in orders
        per_head = (fused or "per_head" in orders) and "whole" not in orders
        if (per_head or by_head) and (text := self._per_head(polynomial, by_head=by_head)):
            return text
        shared = set.intersection(*(set(m) for m, _ in terms)) if len(terms) > 1 else set()
        shared = {pair for pair in shared if self._rank(pair[0]) < 3}
        if shared and (by_head or len(self.solution.groups) == 0):
            front = self._product(tuple(shared), 1)
            inner = [self._product(tuple(p for p in m if p not in shared), f) for m, f in terms]
            return f"{front}*({'+'.join(inner)})"
        return "+".join(self._product(m, f) for m, f in terms)

    def aliases(self) -> dict[str, str]:
        """Text -> name: q and kv, where there is one kind of attention."""
        present = [
            n for n in self.names.values() if n in ("heads", "head_dim", "kv_heads", "q_group")
        ]
        if not {"heads", "head_dim"} <= set(present):
            return {}
        if {"kv_heads", "q_group"} <= set(present):
            return {"kv_heads*q_group*head_dim": "q", "kv_heads*head_dim": "kv"}
        return {"heads*head_dim": "q"}

    def in_stack(self, key: str) -> bool:
        """Whether a key is one of a layer."""
        return any(f"{{{n}}}" in self.pattern(key) for n, k in self.kinds.items() if k == "depth")

    def is_in(self, axis: str, path: str) -> bool:
        """Whether a module is one of the layers that an axis counts."""
        return f"{{{axis}}}" in self.pattern(self.anatomy.keys.get(path, ""))

    def ends_in_norm(self, axis: str) -> bool:
        """Whether the last module of such a layer is a norm, as the class lists them."""
        inside = [k for k in self.anatomy.keys.values() if f"{{{axis}}}" in self.pattern(k)]
        return bool(inside) and self.anatomy.parts[inside[-1]].kind == "norm"

    def leaves(self, scope: str) -> Mapping[str, object]:
        """The fields of one part of the configuration."""
        inside = config_fields.field_value(self.bench.fields, scope) if scope else self.bench.fields
        return inside if isinstance(inside, dict) else {}

    def text_of(self, tensors: NamedTensors, i: int) -> str:
        """One dimension of tensors as a spec has it."""
        fused = "query_key_value" in tensors.part.path
        return self.expression(tensors.dims[i], fused=fused, linear=tensors.part.kind == "linear")

    def _used(self) -> list[str]:
        symbols: dict[str, None] = {}
        for count in self.indices.values():
            symbols |= dict.fromkeys(s for m in count for s, _ in m)
        for dims in self.solution.dims.values():
            for polynomial in dims:
                if polynomial is not None and not _is_odd(polynomial):
                    symbols |= dict.fromkeys(s for m in polynomial for s, _ in m)
        for symbol, pair in {**self.solution.head_sizes, **self.solution.groups}.items():
            if symbol in symbols:
                symbols |= dict.fromkeys(pair)
        order = list(self.fields)
        return sorted(symbols, key=lambda s: (order.index(s) if s in order else len(order), s))

    def _named(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for symbol in self._used():
            if symbol in self.solution.head_sizes:
                heads = self.solution.head_sizes[symbol][1]
                name = _with_prefix(heads, "head_dim")
            elif symbol in self.solution.groups:
                heads = self.solution.groups[symbol][0]
                plain = plain_name(heads)
                name = _with_prefix(heads, "q_group" if plain == "heads" else f"{plain}_group")
            else:
                name = _with_prefix(symbol, plain_name(symbol))
            if name in names.values():
                name = re.sub(r"\W+", "_", symbol)
            while name in names.values():
                name += "_"
            names[symbol] = name
        return names

    def _grouped(self) -> Iterator[NamedTensors]:
        """One entry for each pattern, or for each of its meanings where a list of layers tells."""
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key, dims in self.dims.items():
            found[self.pattern(key)][repr(dims)].append(key)
        for pattern, meanings in found.items():
            groups = list(meanings.values())
            if len(groups) == 1:
                yield self._meaning(pattern, groups[0][0], None)
                continue
            conditions = self._conditions(pattern, groups)
            if conditions is None:
                self.unresolved.append(f"{pattern}: differs from layer to layer")
                yield self._meaning(pattern, groups[0][0], None, others=groups[1:])
                continue
            for keys, condition in zip(groups, conditions, strict=True):
                yield self._meaning(pattern, keys[0], condition)

    def _meaning(
        self, pattern: str, key: str, condition: str | None, others: Sequence[Sequence[str]] = ()
    ) -> NamedTensors:
        dims = list(self.dims[key])
        for keys in others:
            for i, polynomial in enumerate(self.dims[keys[0]][: len(dims)]):
                if polynomial != dims[i]:
                    dims[i] = None
        path, _, parameter = key.rpartition(".")
        part = self.anatomy.parts.get(key, ModulePart("other", path, parameter))
        return NamedTensors(pattern, part, tuple(dims), self._roles(part, dims), condition)

    def _index(self, count: Polynomial) -> str:
        single = solve.sole(count)
        if single is not None and single[1] == 1 and not is_heads(single[0]):
            return self.names[single[0]]
        return f"index@{self.expression(count)}"

    def _conditions(self, pattern: str, groups: Sequence[Sequence[str]]) -> list[str] | None:
        """A condition ("layer_types[layer] == full") for each group of keys, or None."""
        for count in self.indices.values():
            single = solve.sole(count)
            if single is None or f"{{{self.names[single[0]]}}}" not in pattern:
                continue
            at = re.compile(
                re.escape(pattern)
                .replace(re.escape(f"{{{self.names[single[0]]}}}"), r"(\d+)", 1)
                .replace(r"\{", "{")
            )
            at = re.compile(re.sub(r"\{[^{}]*\}", r"\\d+", at.pattern))
            field = self.fields[single[0]]
            for leaf, entries in self.bench.lists(field.scope).items():
                if len(entries) != field.value:
                    continue
                values = [
                    {str(entries[int(m[1])]) for key in keys if (m := at.match(key))}
                    for keys in groups
                ]
                if all(len(t) == 1 for t in values) and len(set().union(*values)) == len(groups):
                    name = f"{field.scope}.{leaf}".lstrip(".")
                    return [f"{name}[{self.names[single[0]]}] == {t.pop()}" for t in values]
        return None

    def _roles(self, part: ModulePart, dims: Sequence[Polynomial | None]) -> tuple[str, ...]:
        rank, rest = len(dims), [""] * max(0, len(dims) - 2)
        if part.kind == "stack":
            return self._stack_roles(part, dims)
        if part.kind == "embedding" and rank == 2:
            return ("", "out")
        if rank == 2 and part.kind == "other" and "proj" in part.parameter:
            return ("in", "out")  # A parameter that is multiplied from the right: x @ w.
        if rank < 2 or part.kind in ("other", "norm", "embedding", "buffer"):
            return ("out",) * rank
        return ("in", "out", *rest) if part.kind == "conv1d" else ("out", "in", *rest)

    def _stack_roles(self, part: ModulePart, dims: Sequence[Polynomial | None]) -> tuple[str, ...]:
        # A stack is stored either way round: what reads the hidden size stands in its name.
        first = [""] * (len(dims) - 2) if len(dims) > 1 else []
        if len(dims) == 1 or "bias" in part.parameter:
            return (*[""] * (len(dims) - 1), "out")
        width = self.residual()
        makes_hidden = bool(_DOWN.search(f"{part.path}.{part.parameter}".lower()))
        last = [solve.sole(dim) == (width, 1) for dim in dims[-2:]]
        if last[0] == last[1]:
            return (*first, "out", "in")
        return (*first, *("out" if is_hidden == makes_hidden else "in" for is_hidden in last))

    def _axis_kinds(self) -> dict[str, str]:
        seen: dict[str, set[str]] = defaultdict(set)
        powers: set[str] = set()
        for tensors in self.tensors:
            for polynomial, role in zip(tensors.dims, tensors.roles, strict=True):
                for symbol, exponent in (pair for m in polynomial or () for pair in m):
                    seen[symbol].add(role)
                    powers |= {symbol} if exponent != 1 else set()
        counted = {
            single[0] for c in self.indices.values() if (single := solve.sole(c)) is not None
        }
        kinds = {}
        for symbol, name in self.names.items():
            leaf = symbol.rpartition(".")[2]
            width = {"out", "in"} <= seen[symbol]
            if symbol in self.solution.groups:
                kinds[name] = "group"
            elif "expert" in leaf and (symbol in counted or "" in seen[symbol] or name == "expert"):
                kinds[name] = "expert"
            elif symbol in counted and not is_heads(symbol):
                kinds[name] = "depth"
            elif (
                symbol in self.solution.head_sizes
                or symbol in powers
                or _FROZEN.search(leaf)
                or not (width or self._fits_head(symbol))
            ):
                kinds[name] = "frozen"
            else:
                kinds[name] = "width"
        return kinds

    def shared(self) -> set[str]:
        """What several heads share: kv heads, and sets of B and C."""
        return {shared for _, shared in self.solution.groups.values()}

    def _fits_head(self, symbol: str) -> bool:
        pairs = [*self.solution.head_sizes.values(), *self.solution.groups.values()]
        return any(symbol in pair for pair in pairs)

    def _orders(self, polynomial: Polynomial) -> set[Order]:
        """What is known of how the units of a dimension lie."""
        symbols = {s for monomial in polynomial for s, _ in monomial}
        symbols |= {f for s in symbols for f in self.solution.groups.get(s, ())}
        axes = {self.names[s] for s in symbols if s in self.names}
        return {self.known.orders[axis] for axis in axes if axis in self.known.orders}

    def _per_head(self, polynomial: Polynomial, *, by_head: bool) -> str | None:
        """q, k, v of one head after the other."""
        terms = {self._product(m, 1): f for m, f in polynomial.items()}
        if terms == {"q": 1, "kv": 2} and self.solution.groups:
            return "kv_heads*(q_group+2)*head_dim"
        ((monomial, factor), *more) = polynomial.items()
        names = [self.names[s] for s, _ in sorted(monomial, key=lambda p: (self._rank(p[0]), p[0]))]
        has_heads = any(is_heads(s) for s, _ in monomial)
        if not has_heads:  # Of a constant there is no name.
            return None
        inside = names[-1].endswith("head_dim") or (by_head and len(names) > 1)
        if more or factor == 1 or not inside:
            return None
        return "*".join([*names[:-1], str(factor), names[-1]])

    def _product(self, monomial: Monomial, factor: int) -> str:
        in_turns = "interleaved" in self._orders({monomial: factor})
        symbols = sorted(monomial, key=lambda p: (self._rank(p[0], in_turns=in_turns), p[0]))
        text = "*".join(self.names[s] for s, e in symbols for _ in range(e))
        text = self.aliases().get(text, text)
        words = [str(factor)] * (factor != 1 or not text) + [text] * bool(text)
        return "*".join(reversed(words) if in_turns else words)

    def _rank(self, symbol: str, *, in_turns: bool = False) -> int:
        """Slowest first: layers, heads, their groups, sizes, head sizes."""
        leaf = symbol.rpartition(".")[2]
        if symbol in self.solution.groups:
            return 2
        if symbol in self.solution.head_sizes or HEAD_SIZE.search(leaf):
            return 6
        if re.search(r"layer|depth", leaf):
            return 0
        if is_heads(symbol) or symbol in self.shared():
            return 1
        is_ratio = _RATIO.search(leaf) or "shared" in leaf
        # Unfolded images have the places of a channel together, where others have its channels.
        return 4 if not is_ratio else 5 if in_turns else 3

    def _term_rank(self, monomial: Monomial) -> tuple[bool, bool, bool, int, int]:
        text = "".join(s for s, _ in monomial)
        # Linear attention has fewer heads of queries and keys than of values, which come last.
        pairs = [self.solution.groups[s] for s, _ in monomial if s in self.solution.groups]
        of_values = any("key_heads" in kv.rpartition(".")[2] for _, kv in pairs)
        # Mamba makes gate and input, then B and C, then a time step for each head.
        counts = all(self._rank(s) in (1, 2) for s, _ in monomial)
        last = 2 if counts and monomial else 1 if "state" in text else 0
        return (not monomial, "rope" in text, of_values, last, -len(monomial))


def plain_name(field: str) -> str:
    """What an axis of this field is called, apart from where the field stands."""
    leaf = re.sub(r"(^|_)(encoder|decoder)_", r"\1", field.rpartition(".")[2])
    for pattern, name in _NAMES:
        if re.fullmatch(pattern, leaf):
            return name
    return re.sub(r"\W+", "_", leaf)


def _with_prefix(field: str, name: str) -> str:
    scope, _, leaf = field.rpartition(".")
    if re.search(r"(^|\.)\d+$", scope):
        return f"g_{name}"
    before = re.sub(r"\W+", "_", scope.replace("_config", ""))
    side = "dec" if "decoder_" in leaf else "enc" if "encoder_" in leaf else ""
    return "_".join(filter(None, (before, side, name)))


def is_heads(symbol: str) -> bool:
    """Whether a field counts heads."""
    leaf = symbol.rpartition(".")[2]
    return "head" in leaf and not re.search(r"dim|size|/", leaf)


def _is_odd(polynomial: Polynomial) -> bool:
    """With a quotient that is no head size: no axis, a size that is kept."""
    return any(exponent < 0 for monomial in polynomial for _, exponent in monomial)
