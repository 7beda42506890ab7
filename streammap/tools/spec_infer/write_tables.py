"""What an inferred spec says beyond tensors: norm, head, experts, depth, config."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from streammap.architectures.key_pattern import INDEX
from streammap.tools.spec_infer import probe
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.write_rules import SpecRules, toml_key, toml_value

PER_TOKEN = re.compile(r"experts_per_tok|top_k$|topk$|top_k_experts|n_group$|topk_group$")
"""Fields that must grow with the number of experts."""
_GROUPS = re.compile(r"group$")
"""Those of them that count groups."""
INDEX_LIST = re.compile(r"layers$|layers?_ids$|indexes$|indices$|idx$")
"""Lists of layer numbers."""


class SpecTables:
    """What a spec says beyond its tensors."""

    def __init__(self, naming: AxisNaming, text: SpecRules) -> None:
        """Write patterns as `text` does."""
        self._m, self._text = naming, text

    def text(self) -> str:
        """All tables."""
        parts = [
            self._norm(),
            self._head(),
            self._experts(),
            *self._depth(),
            self._config(),
            *self._shown(),
        ]
        return "\n".join(part for part in parts if part)

    def _norm(self) -> str:
        norms = self._m.anatomy.norms
        if not norms:
            return ""
        (kind, offset), _ = Counter((n.kind, n.offset) for n in norms).most_common(1)[0]
        other = sorted(
            {
                self._text.written(self._m.pattern(key)).removesuffix(".weight")
                for n in norms
                if n.offset != offset and (key := self._m.anatomy.keys.get(n.path))
            }
        )
        mixed = sorted({n.kind for n in norms} - {kind})
        scopes = [*{f.scope for f in self._m.fields.values()} | {""}]
        eps = sorted(
            f"{scope}.{leaf}".lstrip(".")
            for scope in scopes
            for leaf, value in self._m.leaves(scope).items()
            if isinstance(value, float) and re.search(r"eps(ilon)?$", leaf)
        )
        lines = ["[norm]", f'kind = "{kind}"' + (f"   # and {mixed[0]}" if mixed else "")]
        lines += [f"offset = {offset}"] if offset else []
        lines += [f"plain = {toml_value(other)}"] if other and offset else []
        lines += [f"eps = {toml_value(eps)}"] if eps else []
        last = self._last_norm(self._m.anatomy.base)
        post = last is not None and kind == "layer" and self._m.in_stack(last)
        if post if self._m.known.post is None else self._m.known.post:
            lines.append("post = true")
        return "\n".join(lines) + "\n"

    def _last_norm(self, inside: str) -> str | None:
        """Key of the last norm of a part of the model: its own, or one of its last layer."""
        paths = [
            n.path
            for n in self._m.anatomy.norms
            if (not inside or n.path.startswith(f"{inside}."))
            and n.path in self._m.anatomy.keys
            and "embed" not in n.path.rpartition(".")[2]
            and not re.search(r"(q|k|query|key)_(layer)?norm", n.path)
        ]
        keys = [self._m.anatomy.keys[path] for path in paths]
        after = [key for key in keys if not self._m.in_stack(key) and "embeddings." not in key]
        return next(reversed(after or keys), None)

    def _head(self) -> str:
        anatomy = self._m.anatomy
        embed, head = anatomy.input_embedding, anatomy.output_embedding
        if embed is None or head is None or embed not in anatomy.keys:
            return ""
        width = self._m.solution.dims[anatomy.keys[embed]][-1]
        own = [
            n.path
            for n in anatomy.norms
            if anatomy.base and not n.path.startswith(f"{anatomy.base}.")
        ]
        norm = anatomy.keys.get(own[-1]) if own else self._last_norm(anatomy.decoder)
        if norm is None or self._m.solution.dims[norm][-1] != width:
            # A linear between the two: OPT-350m's project_out.
            norm = next(
                (
                    key
                    for path, key in anatomy.keys.items()
                    if anatomy.parts[key].kind == "linear"
                    and path not in (embed, head)
                    and self._m.solution.dims[key][0] == width
                    and not self._m.in_stack(key)
                ),
                None,
            )
        if norm is None:
            return "# No norm before the head was found: [head] is missing.\n"
        pattern = self._text.written(self._m.pattern(norm)).removesuffix(".weight")
        if self._m.in_stack(norm):
            pattern = self._m.pattern(norm).removesuffix(".weight")
            for name in (n for n, kind in self._m.kinds.items() if kind == "depth"):
                pattern = pattern.replace(f"{{{name}}}", f"{{{name}=last}}")
            pattern = self._text.based(pattern)
        lines = [
            "[head]",
            f"norm = {toml_value(pattern)}",
            f"embed = {toml_value(self._text.written(self._m.pattern(anatomy.keys[embed])))}",
            f"head = {toml_value(self._text.written(anatomy.keys.get(head, f'{head}.weight')))}",
            f"classes = [{toml_value(self._m.bench.class_name)}]",
        ]
        if not self._m.bench.flag("tie_word_embeddings"):
            lines.insert(4, "tied = false")
        if copies := self._copies(f"{head}.weight"):
            lines.append(f"copies = {toml_value(copies)}")
        if scale := self._m.known.head_scale:
            lines.append(f"scale = {toml_value(scale)}")
        return "\n".join(lines) + "\n"

    def _copies(self, head: str) -> dict[str, str]:
        """Keys besides the head's that are looked for once it is untied -> what they hold."""
        untied = self._m.bench.snapshot({"tie_word_embeddings": False})
        there = {} if untied is None else untied.shapes
        return {k: v for k, v in self._m.anatomy.tied.items() if k in there and k != head}

    def _experts(self) -> str:
        if "expert" not in self._m.kinds.values():
            return ""
        fields = [n for n in self._m.fields if PER_TOKEN.search(n.rpartition(".")[2])]
        groups = [name for name in fields if _GROUPS.search(name)]
        top_k = [name for name in fields if name not in groups]
        known, axes = self._m.known, [n for n, k in self._m.kinds.items() if k == "expert"]
        why = next((known.inexact[axis] for axis in axes if axis in known.inexact), "")
        lines = ["[experts]"] if fields or known.gates or why else []
        lines += [f"gates = {toml_value(known.gates)}"] if known.gates else []
        lines += [f"inexact = {toml_value(why)}"] if why else []
        lines += [f"top_k = {toml_value(top_k)}"] if top_k else []
        lines += [f"multiply = {toml_value(groups)}"] if groups else []
        lines += [f'groups = "{n}"' for n in fields if n.rpartition(".")[2] == "n_group"]
        return "\n".join([*lines, ""])

    def _depth(self) -> Iterator[str]:
        for symbol, name in self._m.names.items():
            if self._m.kinds[name] != "depth":
                continue
            field = self._m.fields[symbol]
            lists = self._m.bench.lists(field.scope)
            full = [k for k, v in lists.items() if len(v) == field.value]
            some = [k for k in lists if k not in full and INDEX_LIST.search(k)]
            some = [k for k in some if all(type(e) is int for e in lists[k])]
            entries = {
                "lists": full,
                "index_lists": some,
                "prefix_counts": list(self._prefix_counts(field, name)),
                "delete": [
                    k
                    for k in probe.REBUILT
                    if isinstance(self._m.bench.finished.get(k), (list, str))
                ],
            }
            scope = f"{field.scope}." if field.scope else ""
            lines = [
                f"{k} = {toml_value([scope + leaf for leaf in v])}" for k, v in entries.items() if v
            ]
            leaves = self._m.leaves(field.scope)
            pairs = [(k, k.replace("period", "offset")) for k in leaves if k.endswith("_period")]
            periods = [[scope + k for k in pair] for pair in pairs if pair[1] in leaves]
            lines += [f"periods = {toml_value(periods)}"] if periods else []
            ends = [scope + k for k in leaves if k.endswith("layer_end_index")]
            lines += [f"last_index = {toml_value(ends)}"] if ends else []
            if "num_nextn_predict_layers" in leaves:
                lines.append('tail = "num_nextn_predict_layers"')
            is_told = full or periods or entries["prefix_counts"] or any(lists[k] for k in some)
            if not is_told and self._first_is_odd(name):
                lines.append("first = true")
            if lines:
                yield "\n".join([f"[depth.{name}]", *lines]) + "\n"

    def _layers_of(self, name: str) -> dict[str, set[int]]:
        """Pattern -> the layers that have it."""
        layers: dict[str, set[int]] = defaultdict(set)
        for key in self._m.solution.dims:
            pattern = self._m.pattern(key)
            start, index, _ = pattern.partition(f"{{{name}}}")
            if index:
                number = list(INDEX.finditer(key))[
                    len(re.findall(r"\{|(?<![^.])\d+(?![^.])", start))
                ]
                layers[pattern].add(int(number[0]))
        return layers

    def _prefix_counts(self, field: probe.Field, name: str) -> Iterator[str]:
        layers = self._layers_of(name)
        for other in self._m.fields.values():
            if other.scope == field.scope and 0 < other.value < field.value:
                more = self._m.bench.snapshot({other.name: other.value + 1})
                same = more is not None and more.shapes.keys() == self._m.bench.base().shapes.keys()
                named = re.search(r"layer|dense|first", other.leaf)
                if named and not same and set(range(other.value)) in layers.values():
                    yield other.leaf

    def _first_is_odd(self, name: str) -> bool:
        layers = list(self._layers_of(name).values())
        every: set[int] = set().union(*layers) if layers else set()
        return (
            len(every) > 1
            and any(n != every for n in layers)
            and all(n in (every, {0}, every - {0}) for n in layers)
        )

    def _shown(self) -> Iterator[str]:
        """What proofs have shown."""
        known = self._m.known
        tables = {
            "forward_scale": known.scale,
            "caveat": {**known.frozen, **known.inexact},
            "unsigned": known.unsigned,
        }
        for name, entries in tables.items():
            if entries:
                lines = [f"{toml_key(k)} = {toml_value(v)}" for k, v in entries.items()]
                yield "\n".join([f"[{name}]", *lines, ""])

    def _config(self) -> str:
        lines = [
            f"{toml_key(heads)} = {toml_value(f'{self._m.names[kv]}*{self._m.names[symbol]}')}"
            for symbol, (heads, kv) in self._m.solution.groups.items()
            if symbol in self._m.names
        ]
        twin = next((s for s, n in self._m.names.items() if n == "heads"), None)
        count = None if twin is None else self._m.fields[twin].value
        # A head count that makes no dimension must go with the one that does.
        lines += [
            f'{toml_key(field.name)} = "heads"'
            for field in self._m.fields.values()
            if field.leaf == "num_key_value_heads"
            and field.name not in self._m.names
            and field.value == count
        ]
        lines += [
            f"{toml_key(a)} = {toml_value(self._m.names[b])}"
            for a, b in self._m.solution.same.items()
        ]
        return "\n".join(["[config]", *lines]) + "\n" if lines else ""
