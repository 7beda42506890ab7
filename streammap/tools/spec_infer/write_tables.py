"""What an inferred spec says beyond tensors: norm, head, experts, depth, config."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from streammap.tools.spec_infer import config_changes
from streammap.tools.spec_infer.depth_rules import DepthRules
from streammap.tools.spec_infer.naming import AxisNaming, plain_name
from streammap.tools.spec_infer.words import grows_with_experts, toml_key, toml_value
from streammap.tools.spec_infer.write_rules import SpecRules

_MLPS = ("mlp", "moe_mlp", "shared_mlp")
_TIES = "tie_word_embeddings"
_GROUPS = re.compile(r"groups?$")
"""Fields that grow with the experts and count groups of them."""


class SpecTables:
    """What a spec says beyond its tensors."""

    def __init__(self, naming: AxisNaming, text: SpecRules) -> None:
        """Write patterns as `text` does."""
        self._m, self._text = naming, text

    def text(self) -> str:
        """All tables."""
        parts = [
            self._spaces(),
            self._norm(),
            self._head(),
            self._experts(),
            *DepthRules(self._m, self._text).tables(),
            self._config(),
            *self._shown(),
        ]
        return "\n".join(part for part in parts if part)

    def _spaces(self) -> str:
        """What --hidden and the like mean where a model has several: one for each of its parts."""
        fields = (symbol for symbol in self._m.names if symbol in self._m.fields)
        plain = {self._m.names[symbol]: plain_name(symbol) for symbol in fields}
        widths = dict.fromkeys(n for n in plain if n in self._m.residuals())
        spaces = {
            "hidden": [*widths],
            "heads": [n for n, word in plain.items() if word == "heads"],
            "kv_heads": [n for n, word in plain.items() if word == "kv_heads"],
            "mlp": [n for n, word in plain.items() if word in _MLPS and n not in widths],
            "experts": [n for n, kind in self._m.kinds.items() if kind == "expert"],
        }
        usual = {"hidden": ["embed"], "experts": ["expert"]}
        lines = [
            f"{space} = {toml_value(names)}"
            for space, names in spaces.items()
            if names and names != usual.get(space, [space])
        ]
        return "\n".join(["[spaces]", *lines, ""]) if lines else ""

    def _norm(self) -> str:
        norms = self._m.anatomy.norms
        if not norms:
            return ""
        # Norms without an offset can be named, those with one can't.
        some = [n for n in norms if n.offset] or norms
        (kind, offset), _ = Counter((n.kind, n.offset) for n in some).most_common(1)[0]
        other = self._norms(n.path for n in norms if n.offset != offset)
        mixed = self._norms(n.path for n in norms if n.kind != kind)
        posts = self._norms(
            n.path
            for n in norms
            if any(self._m.is_in(axis, n.path) for axis in self._m.known.posts)
        )
        scopes = [*{f.scope for f in self._m.fields.values()} | {""}]
        eps = sorted(
            f"{scope}.{leaf}".lstrip(".")
            for scope in scopes
            for leaf, value in self._m.leaves(scope).items()
            if isinstance(value, float) and re.search(r"eps(ilon)?$", leaf)
        )
        lines = ["[norm]", f'kind = "{kind}"']
        lines += [f"other = {toml_value(mixed)}"] if mixed else []
        lines += [f"offset = {offset}"] if offset else []
        lines += [f"plain = {toml_value(other)}"] if other and offset else []
        lines += [f"eps = {toml_value(eps)}"] if eps else []
        last = self._last_norm(self._m.anatomy.base)
        post = last is not None and kind == "layer" and self._m.in_stack(last)
        if post if self._m.known.post is None else self._m.known.post:
            lines.append("post = true")
        lines += [f"posts = {toml_value(posts)}"] if posts else []
        return "\n".join(lines) + "\n"

    def _norms(self, paths: Iterable[str]) -> list[str]:
        """Norms as [norm] names them."""
        keys = filter(None, map(self._m.anatomy.keys.get, paths))
        patterns = {self._text.written(self._m.pattern(key)) for key in keys}
        return sorted(pattern.removesuffix(".weight") for pattern in patterns)

    def _last_norm(self, inside: str) -> str | None:
        """Key of the last norm of a part of the model: its own, or one of its last layer."""
        paths = [
            n.path
            for n in self._m.anatomy.norms
            if (not inside or n.path.startswith(f"{inside}."))
            and n.path in self._m.anatomy.keys
            and not re.search(r"(^|_)emb[^.]*$|embeddings\.", n.path)
            and not re.search(r"(q|k|query|key)_(layer)?norm", n.path)
        ]
        keys = [self._m.anatomy.keys[path] for path in paths]
        after = [key for key in keys if not self._m.in_stack(key)]
        return next(reversed(after or keys), None)

    def _head(self) -> str:
        anatomy = self._m.anatomy
        embed, head = anatomy.input_embedding, anatomy.output_embedding
        if embed is None or head is None:
            return ""
        # Of two text models in one, the embeddings are those that the head is tied to.
        named = (anatomy.tied.get(f"{head}.weight"), anatomy.keys.get(embed))
        table = next(filter(None, (*named, anatomy.tied.get(f"{embed}.weight"))), None)
        if table is None:
            return ""
        embed = anatomy.parts[table].path
        width = self._m.solution.dims[table][-1]
        own = [
            n.path
            for n in anatomy.norms
            if anatomy.base and not n.path.startswith(f"{anatomy.base}.")
        ]
        norm = anatomy.keys.get(own[-1]) if own else self._last_norm(anatomy.decoder)
        # Of a model in parts, the text model's own: a projector of images may stand behind it.
        beside = self._last_norm(embed.rpartition(".")[0])
        if beside is not None and ("embeddings." in beside or own):
            beside = None
        if beside is not None and self._m.solution.dims[beside][-1] == width:
            norm = beside if embed.startswith(f"{anatomy.decoder}.") else norm
        norm = self._m.known.head_norm or norm
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
            f"embed = {toml_value(self._text.written(self._m.pattern(table)))}",
            f"head = {toml_value(self._text.written(anatomy.keys.get(head, f'{head}.weight')))}",
            f"classes = [{toml_value(self._m.bench.class_name)}]",
        ]
        if not self._m.bench.flag(_TIES):
            lines.insert(4, "tied = false")
        part = self._tied_by()
        lines += [f"tied_by = {toml_value(part)}"] if part else []
        if copies := self._copies(f"{head}.weight", config_changes.joined(part, _TIES)):
            lines.append(f"copies = {toml_value(copies)}")
        if scale := self._m.known.head_scale:
            lines.append(f"scale = {toml_value(scale)}")
        return "\n".join(lines) + "\n"

    def _tied_by(self) -> str:
        """The part of config.json that unties the head, where the whole model's does not."""
        bench = self._m.bench

        def unties(name: str) -> bool:
            other = bench.snapshot({name: False})
            return other is not None and other.shapes.keys() != bench.base().shapes.keys()

        named = [name for name, _ in config_changes.leaves(bench.fields) if name.endswith(_TIES)]
        if not self._m.anatomy.tied or unties(_TIES):
            return ""
        return next((n.rpartition(".")[0] for n in named if unties(n)), "")

    def _copies(self, head: str, flag: str) -> dict[str, str]:
        """Keys besides the head's that are looked for once it is untied -> what they hold."""
        untied = self._m.bench.snapshot({flag: False})
        there = {} if untied is None else untied.shapes
        return {k: v for k, v in self._m.anatomy.tied.items() if k in there and k != head}

    def _experts(self) -> str:
        if "expert" not in self._m.kinds.values():
            return ""
        counts = [f.value for s, f in self._m.fields.items() if self._kind(s) == "expert"]
        fields = [
            name
            for name, field in self._m.fields.items()
            if grows_with_experts(field.leaf, field.value, max(counts, default=0))
        ]
        groups = [name for name in fields if _GROUPS.search(name)]
        top_k = [name for name in fields if name not in groups]
        known, axes = self._m.known, [n for n, k in self._m.kinds.items() if k == "expert"]
        why = next((known.inexact[axis] for axis in axes if axis in known.inexact), "")
        lines = ["[experts]"] if fields or known.gates or why else []
        lines += [f"gates = {toml_value(known.gates)}"] if known.gates else []
        lines += [f"inexact = {toml_value(why)}"] if why else []
        lines += [f"top_k = {toml_value(top_k)}"] if top_k and not known.single else []
        lines += [f"multiply = {toml_value(groups)}"] if groups else []
        lines += [f'groups = "{n}"' for n in groups if "top" not in n.rpartition(".")[2]]
        return "\n".join([*lines, ""])

    def _kind(self, symbol: str) -> str:
        return self._m.kinds.get(self._m.names.get(symbol, ""), "")

    def _shown(self) -> Iterator[str]:
        """What proofs have shown."""
        known = self._m.known
        tables = {
            "forward_scale": known.scale,
            "caveat": {**known.caveats, **known.frozen, **known.inexact},
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
