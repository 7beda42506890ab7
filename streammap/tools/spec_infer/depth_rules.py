"""[depth] of an inferred spec: what config.json says of single layers, and what of it is derived.

Which layers have which tensors is known from the probed model. Lists, leading layers and periods
are written where they tell these layers apart, so that every kind of layer has an explanation; a
list that the class makes itself gets the rule by which it does, found from other depths.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from streammap.architectures.key_pattern import INDEX
from streammap.tools.spec_infer import probe
from streammap.tools.spec_infer.config_changes import joined
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.probe import Field
from streammap.tools.spec_infer.words import INDEX_LIST, toml_value
from streammap.tools.spec_infer.write_rules import SpecRules

_DEPTHS = (12, 13, 7)
"""Layers of the models whose lists show the rule that makes them."""
_EVERY = range(2, 9)
_PERIOD = re.compile(r"step|period|interval|every|freq|pattern|_n_layers")
_PREFIX = re.compile(r"^(?!.*(step|period|interval|every|freq)).*(layer|dense|first)")
_OFFSETS = (-1, 0)
_STATE = re.compile(r"([a-z]+)_(?:feature|select)_layers?")
"""Which hidden states of a part are read: vision_feature_layer."""

_BY_NUMBER = "layers of a tiny model that got another number changed its function"

_Word = Mapping[str, object]
_Period = tuple[tuple[str, int], int]
"""A field with its value, and the offset."""
_Turn = tuple[int, int]
"""A number of layers, and the offset."""


class DepthRules:
    """What config.json says of the layers of a model's stacks."""

    def __init__(self, naming: AxisNaming, text: SpecRules) -> None:
        """For the stacks of `naming`; patterns are written as `text` does."""
        self._m, self._text = naming, text

    def tables(self) -> Iterator[str]:
        """One for each stack, and what is derived of it."""
        for symbol, name in self._m.names.items():
            if self._m.kinds[name] == "depth":
                field = self._m.fields[symbol]
                known = self._m.known
                words = self._words(field, name)
                if words:
                    yield _table(f"[depth.{name}]", words)
                if name in known.numbered:
                    words = {"first": known.numbered[name], "why": _BY_NUMBER}
                    yield _table(f"[numbered.{name}]", words)
                for full in self._full_lists(field) if known.derives else ():
                    if rule := self._derived(field, full):
                        yield _table(f"[[depth.{name}.derived]]", rule)

    def _words(self, field: Field, name: str) -> _Word:
        scope, leaves = field.scope, self._m.leaves(field.scope)
        lists = self._m.bench.lists(scope)
        some = [k for k, v in lists.items() if self._is_index_list(k, v, field)]
        marks = [k for k in some if self._m.bench.is_counted(joined(scope, k))]
        some = [k for k in some if k not in marks]
        pairs = [(k, k.replace("period", "offset")) for k in leaves if k.endswith("_period")]
        prefixes = list(self._end_counts(field, name))
        suffixes = [k for k in self._end_counts(field, name, trailing=True) if k not in prefixes]
        told: list[Sequence[object]] = [
            *(list(map(json.dumps, lists[k])) for k in self._full_lists(field)),
            *([i in lists[k] for i in range(field.value)] for k in some),
            *([i < int(str(leaves[k])) for i in range(field.value)] for k in prefixes),
            *(
                [i < field.value - int(str(leaves[k])) for i in range(field.value)]
                for k in suffixes
            ),
        ]
        kinds = list(self._layers_of(name).values())
        first: dict[str, object] = {}
        periods: list[_Period | _Turn] = []
        offsets = [[joined(scope, k) for k in pair] for pair in pairs if pair[1] in leaves]
        if not offsets:
            stepped = list(self._stepped(field, name, kinds, told))
            told += [[(i - o) % p[1] == 0 for i in range(field.value)] for p, o in stepped]
            turns = [] if told else list(self._turns(field, name, kinds))
            told += [[i % n == o for i in range(field.value)] for n, o in turns]
            periods = [*stepped, *turns]
            with_first = [*told, [i == 0 for i in range(field.value)]]
            if _n_told(kinds, with_first, field.value) > _n_told(kinds, told, field.value):
                first = {"first": True}
        named = {
            "lists": self._full_lists(field),
            "index_lists": some,
            "marks": marks,
            "prefix_counts": prefixes,
            "suffix_counts": suffixes,
            "delete": self._rebuilt(),
            "last_index": [k for k in leaves if k.endswith("layer_end_index")],
        }
        words: dict[str, object] = {k: [joined(scope, n) for n in v] for k, v in named.items() if v}
        words |= {"periods": offsets or periods} if offsets or periods else {}
        words |= {"tail": "num_nextn_predict_layers"} if _TAIL in leaves else {}
        ones = [self._text.written(k) for k in self._m.known.ones if f"{{{name}}}" in k]
        words |= {"ones": ones} if ones else {}
        words |= {"states": states} if (states := self._states(field)) else {}
        return words | first

    def _full_lists(self, field: Field) -> list[str]:
        lists = self._m.bench.lists(field.scope)
        full = [k for k, v in lists.items() if len(v) == field.value and k not in probe.REBUILT]
        # Rows and columns of an image are two numbers, whatever the number of layers.
        numbers = [k for k in full if all(type(n) is int for n in lists[k])]
        if numbers and self._m.bench.is_built({field.name: field.value + 1}):
            return [k for k in full if k not in numbers]
        return full

    def _is_index_list(self, leaf: str, entries: Sequence[object], field: Field) -> bool:
        numbers = all(type(e) is int and e < field.value for e in entries)
        return numbers and leaf not in self._full_lists(field) and bool(INDEX_LIST.search(leaf))

    def _states(self, field: Field) -> list[list[object]]:
        """Fields of the whole model that say which layer's output of one part is read."""
        found: list[list[object]] = []
        for leaf, value in self._m.leaves("").items():
            read = _STATE.fullmatch(leaf)
            if read and read[1] in field.scope and value is not None:
                found.append([leaf, value] if type(value) is int else [leaf])
        return found

    def _rebuilt(self) -> list[str]:
        finished = self._m.bench.finished
        return [k for k in probe.REBUILT if isinstance(finished.get(k), (list, str))]

    def _stepped(
        self, field: Field, name: str, kinds: Sequence[set[int]], told: Sequence[Sequence[object]]
    ) -> Iterator[_Period]:
        """Fields that make every n-th layer one of another kind."""
        known, layers, bench = list(told), range(field.value), self._m.bench
        for other in bench.numbers():
            if other.scope != field.scope or not _PERIOD.search(other.leaf):
                continue
            for offset in _OFFSETS:
                more = [*known, [(i - offset) % other.value == 0 for i in layers]]
                better = _n_told(kinds, more, field.value) > _n_told(kinds, known, field.value)
                if better and self._moves(other, name):
                    yield (other.name, other.value), offset
                    known = more
                    break

    def _turns(self, field: Field, name: str, kinds: Sequence[set[int]]) -> Iterator[_Turn]:
        """Every n-th layer of another kind, in a model that has no field for it or a short list."""
        if _n_told(kinds, (), field.value) == len(kinds):
            return
        n_layers = max(_DEPTHS)
        deep = self._m.bench.snapshot({field.name: n_layers})
        deeper = list(self._layers_of(name, () if deep is None else deep.shapes).values())
        for every in _EVERY:
            for offset in range(every):
                told = [[i % every == offset for i in range(n_layers)]]
                if deeper and _n_told(deeper, told, n_layers) == len(deeper):
                    yield every, offset
                    return

    def _moves(self, other: Field, name: str) -> bool:
        """Whether a field says which tensors the layers of a stack have."""
        changed = self._m.bench.snapshot({other.name: other.value + 1})
        keys = () if changed is None else changed.shapes.keys() ^ self._m.bench.base().shapes.keys()
        return any(f"{{{name}}}" in self._m.pattern(key) for key in keys)

    def _layers_of(self, name: str, keys: Iterable[str] = ()) -> dict[str, set[int]]:
        """Pattern -> the layers that have it; of other keys than the model's, if given."""
        layers: dict[str, set[int]] = defaultdict(set)
        for key in keys or self._m.solution.dims:
            pattern = self._m.pattern(key)
            start, index, _ = pattern.partition(f"{{{name}}}")
            if index:
                number = list(INDEX.finditer(key))[
                    len(re.findall(r"\{|(?<![^.])\d+(?![^.])", start))
                ]
                layers[pattern].add(int(number[0]))
        return layers

    def _end_counts(self, field: Field, name: str, *, trailing: bool = False) -> Iterator[str]:
        """Fields that say how many leading, or trailing, layers are of another kind."""
        layers = list(self._layers_of(name).values())
        for other in self._m.fields.values():
            if other.scope == field.scope and 0 < other.value < field.value:
                more = self._m.bench.snapshot({other.name: other.value + 1})
                same = more is not None and more.shapes.keys() == self._m.bench.base().shapes.keys()
                named = _PREFIX.search(other.leaf)
                end = field.value - other.value if trailing else other.value
                if named and not same and set(range(end)) in layers:
                    yield other.leaf

    def _derived(self, field: Field, leaf: str) -> _Word:
        """How the class makes a list that is not there; {} where by no simple rule."""
        name = joined(field.scope, leaf)
        made = {n: self._m.bench.made_list(name, {field.name: n}) for n in _DEPTHS}
        if any(entries is None or len(entries) != n for n, entries in made.items()):
            return {}
        word: _Word = {"list": name, "when": [f"model_type == {self._m.bench.model_type}"]}
        lists = {n: list(map(json.dumps, entries or ())) for n, entries in made.items()}
        kinds = sorted({entry for entries in lists.values() for entry in entries})
        if len(kinds) == 1:
            return {**word, "yes": json.loads(kinds[0])}
        for yes, no in (kinds, kinds[::-1]) if len(kinds) == 2 else ():
            for every, offset in ((n, o) for n in _EVERY for o in _OFFSETS):
                rule = [
                    [yes if (i - offset) % every == 0 else no for i in range(n)] for n in _DEPTHS
                ]
                if rule == list(lists.values()):
                    values = {"yes": json.loads(yes), "no": json.loads(no)}
                    return {
                        **word,
                        "every": self._every(field, name, every),
                        "offset": offset,
                        **values,
                    }
        return {}

    def _every(self, field: Field, name: str, every: int) -> object:
        """The field that holds a period, with its value; or the value alone."""
        for other in self._m.bench.numbers():
            if other.scope == field.scope and other.value == every and other != field:
                changes = {field.name: _DEPTHS[0], other.name: every + 1}
                made = self._m.bench.made_list(name, changes)
                if made != self._m.bench.made_list(name, {field.name: _DEPTHS[0]}):
                    return [other.name, every]
        return every


_TAIL = "num_nextn_predict_layers"


def _n_told(kinds: Sequence[set[int]], told: Sequence[Sequence[object]], n_layers: int) -> int:
    """How many sets of layers are told by facts of single layers."""
    alike: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for i in range(n_layers):
        alike[tuple(fact[i] for fact in told)].add(i)
    return sum(
        all(same <= layers or same.isdisjoint(layers) for same in alike.values())
        for layers in kinds
    )


def _table(head: str, words: _Word) -> str:
    return "\n".join([head, *(f"{k} = {toml_value(v)}" for k, v in words.items())]) + "\n"
