"""The format of spec files: extends, include, conditions, and tables by axis."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from streammap.architectures import config_fields, registry, resolving
from streammap.architectures.expression import Name, Number, Operation
from streammap.architectures.key_pattern import first_match
from streammap.architectures.model import Model
from streammap.architectures.schema import Architecture, LayerRule, Numbered, TensorRule
from streammap.errors import ArchitectureError, CheckpointError, PlanError
from streammap.io.dtypes import TensorSpec

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, object]

BASE = """
schema = 1
model_types = ["base"]
[vars]
L = ["h.{layer}."]
[axes]
embed = "dim"
mlp = ["ffn", "=4*embed"]
layer = "depth"
[axis_kind]
layer = "depth"
[alias]
pair = "2*mlp"
[modules]
"{L}up" = "linear embed -> mlp"
"{L}down" = "linear mlp -> embed"
"{L}norm" = "norm embed"
[buffers]
keys = ["{L}mask"]
[required]
keys = ["{L}up.weight"]
[norm]
kind = "rms"
eps = ["eps"]
[head]
norm = "{L}norm"
tied = false
[depth.layer]
lists = ["types"]
tail = "extra"
[caveat]
mlp = "base says so"
[proof]
config = {dim = 4}
[[proof.models]]
name = "base"
class = "Base"
"""
CHILD = """
schema = 1
model_types = ["child"]
extends = "base"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of specs, with base.toml in it."""
    monkeypatch.setenv(registry.FOLDER, str(tmp_path))
    (tmp_path / "base.toml").write_text(BASE)
    _forget()
    return tmp_path


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Folders are read once in a process; these tests write to theirs."""
    yield
    _forget()


def _forget() -> None:
    for cached in (registry._texts, registry._read, registry._merged_in):
        cached.cache_clear()


def child(folder: Path, text: str, config: Mapping[str, object] | None = None) -> Architecture:
    (folder / "child.toml").write_text(CHILD + text)
    _forget()
    return registry.load("child", config or {})


def parsed(text: str, config: Mapping[str, object] | None = None) -> Architecture:
    return registry.parse(text, name="toy", config=config or {})


def resolved(name: str, shapes: Shapes, config: Config) -> Model:
    specs = {key: TensorSpec("F32", shape) for key, shape in shapes.items()}
    return resolving.resolve(specs, config, name=name)


def rules(spec: Architecture, key: str) -> list[tuple[int, str]]:
    """Generation and dimensions of each rule that a key matches."""
    return [
        (rule.generation, ", ".join(dim.text for dim in rule.dims))
        for rule in spec.rules
        if rule.pattern.match(key) is not None
    ]


# extends.


def test_a_child_has_what_its_parent_has(folder: Path) -> None:
    base, spec = registry.load("base"), child(folder, "")
    assert spec.name == "child"
    assert spec.model_types == ("child",)
    assert spec.axes == base.axes
    assert spec.aliases == base.aliases
    assert spec.depth == base.depth
    assert spec.caveats == base.caveats
    assert [(r.pattern.text, r.generation) for r in spec.rules] == [
        (r.pattern.text, r.generation + 1) for r in base.rules
    ]
    assert [p.text for p in spec.required] == ["{L}up.weight"]


def test_tables_are_merged_by_entry(folder: Path) -> None:
    spec = child(
        folder,
        """
[vars]
L = ["blocks.{layer}."]
[axes]
mlp = "width"
[axis_kind]
embed = "frozen"
[alias]
other = "3*mlp"
[norm]
offset = 1.0
[caveat]
embed = "child says so"
[depth.layer]
lists = ["kinds"]
""",
    )
    assert spec.axes["mlp"].sources == ("width",)
    assert spec.axes["embed"].kind == "frozen"
    assert set(spec.aliases) == {"pair", "other"}
    assert spec.caveats == {"mlp": "base says so", "embed": "child says so"}
    assert (spec.depth["layer"].lists, spec.depth["layer"].tail) == (("kinds",), "extra")
    assert rules(spec, "h.0.up.weight") == []
    (norm,) = {r.norm for r in spec.rules if r.norm is not None}
    assert (norm.kind, norm.offset, norm.eps) == ("rms", 1.0, ("eps",))


def test_lists_of_keys_are_inherited_or_replaced(folder: Path) -> None:
    spec = child(folder, '[required]\nkeys = ["{L}down.weight"]\n[buffers]\nkeys = ["rope"]')
    assert [p.text for p in spec.required] == ["{L}down.weight"]
    assert {r.pattern.text for r in spec.rules if r.kind == "buffer"} == {"{L}mask", "rope"}


def test_models_to_prove_are_not_inherited(folder: Path) -> None:
    child(folder, "")
    assert len(registry.tiny_models("base")) == 1
    assert registry.tiny_models("child") == ()


def test_the_rules_of_the_nearer_generation_count(folder: Path) -> None:
    child(folder, '[modules]\n"{L}up" = "conv1d embed -> mlp"')
    (folder / "grandchild.toml").write_text(
        'schema = 1\nmodel_types = ["x"]\nextends = "child"\n'
        '[tensors]\n"{L}{w:up|down}.weight" = "mlp:out, embed:in"\n'
    )
    _forget()
    spec = registry.load("grandchild")
    assert rules(spec, "h.0.up.weight") == [(1, "embed, mlp"), (2, "mlp, embed"), (0, "mlp, embed")]
    assert rules(spec, "h.0.down.weight") == [(2, "embed, mlp"), (0, "mlp, embed")]
    shapes = {"h.0.up.weight": (12, 4), "h.0.down.weight": (12, 4), "h.0.up.bias": (12,)}
    found = resolved("grandchild", shapes, {"dim": 4, "depth": 1, "ffn": 12})
    dims = {f.name: f.rule.generation for f in found.families}
    assert dims == {"h.{layer}.up.weight": 0, "h.{layer}.down.weight": 0, "h.{layer}.up.bias": 1}


def test_specs_that_extend_one_another_are_refused(folder: Path) -> None:
    (folder / "a.toml").write_text('schema = 1\nmodel_types = ["a"]\nextends = "b"\n')
    (folder / "b.toml").write_text('schema = 1\nmodel_types = ["b"]\nextends = "a"\n')
    _forget()
    with pytest.raises(ArchitectureError, match="more than 8 specs extend one another"):
        registry.load("a")


def test_a_parent_that_is_not_there_is_refused(folder: Path) -> None:
    (folder / "a.toml").write_text('schema = 1\nmodel_types = ["a"]\nextends = "nobody"\n')
    _forget()
    with pytest.raises(ArchitectureError, match=r"no architecture 'nobody'\n.*there are .*base"):
        registry.load("a")


# Where specs are.


def test_a_users_folder_is_found_by_model_type_and_by_keys(folder: Path) -> None:
    assert "base" in registry.names()
    assert registry.model_types()["base"] == "base"
    found = registry.for_model_type("base", {})
    assert found is not None
    assert found.name == "base"
    (folder / "told.toml").write_text(
        BASE.replace('["base"]', '["told"]\ndetect = ["h.{layer}.odd.weight", "{e:emb|wte}"]')
    )
    _forget()
    by_keys = registry.for_keys(["x", "h.3.odd.weight", "wte"], {})
    assert by_keys is not None
    assert by_keys.name == "told"
    assert registry.for_keys(["h.3.odd.weight"], {}) is None


def test_a_users_spec_counts_before_a_shipped_one_of_its_name(folder: Path) -> None:
    (folder / "llama.toml").write_text(BASE.replace('"base"', '"llama"'))
    _forget()
    assert set(registry.load("llama").axes) == {"embed", "mlp", "layer"}
    found = registry.for_model_type("llama", {})
    assert found is not None
    assert set(found.axes) == {"embed", "mlp", "layer"}


@pytest.mark.parametrize("name", ["aa_mine", "zz_mine"])
def test_a_users_spec_counts_before_a_shipped_one_of_its_model_type(
    folder: Path, name: str
) -> None:
    (folder / f"{name}.toml").write_text(BASE.replace('"base"', '"llama"'))
    _forget()
    found = registry.for_model_type("llama", {})
    assert found is not None
    assert found.name == name
    assert registry.model_types()["llama"] == name


def test_a_file_is_a_spec_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\nmodel_types = ["mine"]\nextends = "llama"\n')
    spec = registry.load(str(path))
    assert spec.name == "mine"
    assert spec.axes == registry.load("llama").axes
    with pytest.raises(ArchitectureError, match=r"nowhere\.toml: .*No such file.*\n  hint: check"):
        registry.load(str(tmp_path / "nowhere.toml"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArchitectureError, match=r"mine\.toml"):
        registry.load(str(path))


# Conditions.

CONFIG: Config = {
    "flag": True,
    "off": False,
    "none": None,
    "zero": 0,
    "n": 3,
    "m": 3,
    "k": 4,
    "word": "silu",
    "text": {"on": 1},
    "list": ["a", "b"],
}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("flag", True),
        ("off", False),
        ("none", False),
        ("zero", False),
        ("absent", False),
        ("n", True),
        ("text.on", True),
        ("text.off", False),
        ("list.-1", True),
        ("n == 3", True),
        ("n == 4", False),
        ("n==3", True),
        ("n == m", True),
        ("n == k", False),
        ("word == silu", True),
        ("word == gelu", False),
        ("flag == true", True),
        ("off == false", True),
        ("flag == false", False),
        ("none == null", True),
        ("absent == null", True),
        ("absent == 3", False),
        ("list.0 == a", True),
        ("text.on == 1", True),
        ("n != 3", False),
        ("n != 4", True),
        ("n != m", False),
        ("n != k", True),
        ("word != gelu", True),
        ("absent != 3", True),
        ("absent != null", False),
    ],
)
def test_a_condition_holds_for_a_config(condition: str, *, holds: bool) -> None:
    assert config_fields.holds(condition, CONFIG) is holds


@pytest.mark.parametrize("condition", ["", "a b", "n > 3", "not flag", "n = 3", "f(x)"])
def test_a_condition_of_another_form_is_refused(condition: str) -> None:
    with pytest.raises(ArchitectureError, match=r"condition '.*': expected 'field', or 'field =="):
        config_fields.holds(condition, CONFIG)


CONDITIONAL = BASE.replace(
    'mlp = ["ffn", "=4*embed"]',
    'mlp = {gated = "=3*embed", "kind == wide" = "=8*embed", default = "ffn"}',
)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"ffn": 7}, 7),
        ({"ffn": 7, "gated": False}, 7),
        ({"ffn": 7, "gated": True}, 12),
        ({"kind": "wide"}, 32),
        ({"kind": "wide", "gated": 1}, 12),
    ],
)
def test_the_first_condition_that_holds_counts(config: Config, size: int) -> None:
    shapes = {"h.0.up.weight": (size, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda _, config: parsed(CONDITIONAL, config))
        assert resolved("toy", shapes, {"dim": 4, "depth": 1, **config}).sizes["mlp"] == size


def test_without_a_condition_that_holds_or_a_default_a_value_is_refused() -> None:
    text = CONDITIONAL.replace(', default = "ffn"', "")
    expected = r"toy\.toml: axes\.mlp: no condition holds, and there is no default"
    with pytest.raises(ArchitectureError, match=expected):
        parsed(text)


def test_conditions_stand_in_other_tables_too() -> None:
    text = BASE.replace('kind = "rms"', 'kind = {layernorm = "layer", default = "rms"}')
    text = text.replace("tied = false", "tied = {shared = true, default = false}")
    text = text.replace('pair = "2*mlp"', 'pair = {gated = "2*mlp", default = "mlp"}')
    text = text.replace('mlp = "base says so"', 'mlp = {rough = "it is", default = ""}')
    plain = parsed(text)
    other = parsed(text, {"layernorm": True, "shared": True, "gated": True, "rough": True})
    for spec, kind, tied in ((plain, "rms", False), (other, "layer", True)):
        assert {r.norm.kind for r in spec.rules if r.norm is not None} == {kind}
        assert spec.heads[0].tied is tied
    assert plain.aliases["pair"] == Name("mlp")
    assert other.aliases["pair"] == Operation("*", Number(2), Name("mlp"))
    assert (plain.caveats, other.caveats) == ({}, {"mlp": "it is"})


def test_some_norms_are_of_the_other_kind_or_stand_behind_the_addition() -> None:
    text = BASE.replace(
        '"{L}norm" = "norm embed"', '"{L}norm" = "norm embed"\n"last" = "norm embed"'
    )
    text = text.replace('kind = "rms"', 'kind = "rms"\nother = ["last"]\nposts = ["{L}norm"]')
    norms = {rule.pattern.text: rule.norm for rule in parsed(text).rules if rule.norm is not None}
    found = {name: (norm.kind, norm.post) for name, norm in norms.items() if "weight" in name}
    assert found == {"{L}norm.weight": ("rms", True), "last.weight": ("layer", False)}


LAYERS = BASE.replace(
    '"{L}down" = "linear mlp -> embed"',
    '"{L}down" = {"types[layer] == wide" = "linear pair -> embed", flat = "linear embed -> embed",'
    ' default = "linear mlp -> embed"}',
)


def test_a_condition_may_look_at_the_layer_of_a_key() -> None:
    spec = parsed(LAYERS)
    found = [r for r in spec.rules if r.pattern.match("h.0.down.weight") is not None]
    assert [(r.dims[1].text, [(c.value, c.negated) for c in r.when]) for r in found] == [
        ("pair", [("wide", False)]),
        ("mlp", [("wide", True)]),
    ]
    flat = parsed(LAYERS, {"flat": 1}).rules
    found = [r for r in flat if r.pattern.match("h.0.down.weight") is not None]
    assert [r.dims[1].text for r in found] == ["pair", "embed"]


def test_each_layer_takes_the_rule_of_its_kind() -> None:
    shapes = {f"h.{i}.up.weight": (8, 4) for i in range(3)}
    shapes |= {"h.0.down.weight": (4, 8), "h.1.down.weight": (4, 16), "h.2.down.weight": (4, 8)}
    config: Config = {"dim": 4, "depth": 3, "ffn": 8, "types": ["a", "wide", "a"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda _, config: parsed(LAYERS, config))
        found = resolved("toy", shapes, config)
        down = {f.dims[1].text: f.members for f in found.families if ".down" in f.name}
        assert {k: set(v) for k, v in down.items()} == {"mlp": {(0,), (2,)}, "pair": {(1,)}}
        with pytest.raises(CheckpointError, match=r"h\.1\.down\.weight: shape \[4, 16\] is not"):
            resolved("toy", shapes, {**config, "types": ["a", "a", "a"]})


# include.

OUTER = """
schema = 1
model_types = ["outer"]
[axes]
proj = "proj_dim"
[[include]]
spec = "base"
as = "text"
config = "text_config"
prefix = ["lm.", "model.lm."]
[[include]]
spec = "base"
as = "vision"
config = "vision_config"
prefix = ["tower."]
[modules]
"bridge" = "linear vision.embed -> text.embed"
"""
OUTER_CONFIG: Config = {
    "proj_dim": 5,
    "text_config": {"dim": 4, "depth": 2, "ffn": 6},
    "vision_config": {"dim": 3, "depth": 1},
}


def layer_of(prefix: str, i: int, embed: int, mlp: int) -> Shapes:
    at = f"{prefix}h.{i}."
    return {f"{at}up.weight": (mlp, embed), f"{at}down.weight": (embed, mlp)}


def outer(folder: Path, text: str = OUTER, config: Config | None = None) -> Architecture:
    (folder / "outer.toml").write_text(text)
    _forget()
    return registry.load("outer", OUTER_CONFIG if config is None else config)


def test_an_included_spec_has_a_scope_a_prefix_and_a_place_in_config(folder: Path) -> None:
    spec = outer(folder)
    own = ("embed", "mlp", "layer")
    assert set(spec.axes) == {"proj", *(f"text.{a}" for a in own), *(f"vision.{a}" for a in own)}
    assert spec.axes["text.embed"].sources == ("text_config.dim",)
    assert spec.axes["vision.mlp"].sources[0] == "vision_config.ffn"
    assert spec.axes["vision.mlp"].sources[1] == Operation("*", Number(4), Name("vision.embed"))
    assert spec.depth_axes == ("text.layer", "vision.layer")
    assert spec.depth["text.layer"].lists == ("text_config.types",)
    assert spec.depth["text.layer"].tail == "text_config.extra"
    assert spec.caveats == {"text.mlp": "base says so", "vision.mlp": "base says so"}
    assert spec.spaces["hidden"] == ("text.embed", "vision.embed")
    assert [head.path for head in spec.heads] == ["text_config.", "vision_config."]
    assert {r.norm.eps for r in spec.rules if r.norm is not None} == {
        ("text_config.eps",),
        ("vision_config.eps",),
    }


@pytest.mark.parametrize("prefix", ["lm.", "model.lm."])
def test_keys_of_an_included_spec_are_found_under_each_prefix(folder: Path, prefix: str) -> None:
    outer(folder)
    shapes = {
        **layer_of(prefix, 0, 4, 6),
        **layer_of(prefix, 1, 4, 6),
        **layer_of("tower.", 0, 3, 12),
        "bridge.weight": (4, 3),
    }
    found = resolved("outer", shapes, OUTER_CONFIG)
    assert found.sizes == {
        "proj": 5,
        "text.embed": 4,
        "text.mlp": 6,
        "text.layer": 2,
        "vision.embed": 3,
        "vision.mlp": 12,
        "vision.layer": 1,
    }
    assert found.n_layers == 2
    with pytest.raises(CheckpointError, match=r"h\.0\.odd: no rule of outer\.toml knows"):
        resolved("outer", {**shapes, "tower.h.0.odd": (1,)}, OUTER_CONFIG)
    with pytest.raises(CheckpointError, match=r"bridge\.weight: shape \[3, 4\] is not"):
        resolved("outer", {**shapes, "bridge.weight": (3, 4)}, OUTER_CONFIG)


def test_fields_of_an_included_spec_may_stand_at_the_top(folder: Path) -> None:
    """Older checkpoints have no text_config."""
    config: Config = {"proj_dim": 5, "dim": 4, "depth": 1, "vision_config": {"dim": 3, "depth": 1}}
    spec = outer(folder, config=config)
    assert spec.axes["text.embed"].sources == ("dim",)
    assert spec.axes["vision.embed"].sources == ("vision_config.dim",)
    assert spec.depth["text.layer"].lists == ("types",)
    shapes = {**layer_of("lm.", 0, 4, 16), **layer_of("tower.", 0, 3, 12)}
    assert resolved("outer", shapes, config).sizes["text.mlp"] == 16


BY_TYPE = """
schema = 1
model_types = ["wrapper"]
[[include]]
as = "text"
config = "text_config"
model_type = "llama"
prefix = ["language_model."]
[head]
of = "text"
tied = false
classes = ["Wrapper"]
"""


@pytest.mark.parametrize(
    ("text_config", "field"),
    [({}, "intermediate_size"), ({"model_type": "gpt2"}, "n_inner")],
)
def test_a_part_is_of_the_spec_that_serves_its_model_type(text_config: Config, field: str) -> None:
    spec = parsed(BY_TYPE, {"text_config": text_config})
    assert spec.axes["text.mlp"].fields == (f"text_config.{field}",)


def test_a_part_that_no_spec_serves_is_named() -> None:
    told = r"no architecture spec serves text_config\.model_type 'unheard_of'"
    with pytest.raises(ArchitectureError, match=told):
        parsed(BY_TYPE, {"text_config": {"model_type": "unheard_of"}})


def test_the_head_of_a_part_is_the_whole_models() -> None:
    (head,) = parsed(BY_TYPE, {"text_config": {"model_type": "gemma2"}}).heads
    assert (head.tied, head.classes, head.path) == (False, ("Wrapper",), "")
    assert first_match(head.head, "language_model.lm_head.weight") is not None
    assert first_match(head.embed, "language_model.model.embed_tokens.weight") is not None


@pytest.mark.parametrize(
    ("shape", "dims"), [((3, 8, 5), "e, mlp, embed"), ((3, 5, 8), "e, embed, mlp")]
)
def test_the_layout_that_fits_is_taken(folder: Path, shape: tuple[int, ...], dims: str) -> None:
    (family,) = _stacked(folder, shape, n_embed=5).families
    assert ", ".join(dim.text for dim in family.dims) == dims


def test_layouts_that_both_fit_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"shape \[3, 8, 8\] is \(e, mlp, embed\) or"):
        _stacked(folder, (3, 8, 8), n_embed=8)


def _stacked(folder: Path, shape: tuple[int, ...], *, n_embed: int) -> Model:
    (folder / "stacked.toml").write_text(
        'schema = 1\nmodel_types = ["stacked"]\n[axes]\nembed = "dim"\nmlp = "ffn"\ne = "n"\n'
        'layer = "depth"\n[axis_kind]\nlayer = "depth"\n[tensors]\n'
        '"w.{layer}" = "e, mlp:out, embed:in | e, embed:in, mlp:out"\n'
    )
    _forget()
    return resolved("stacked", {"w.0": shape}, {"dim": n_embed, "ffn": 8, "n": 3, "depth": 1})


def test_the_conditions_of_an_included_spec_look_at_its_own_config(folder: Path) -> None:
    (folder / "base.toml").write_text(LAYERS)
    inner = {"dim": 4, "depth": 1, "flat": True}
    spec = outer(folder, config={**OUTER_CONFIG, "text_config": inner})

    def reads(key: str) -> list[str]:
        return [r.dims[1].text for r in spec.rules if r.pattern.match(key) is not None]

    assert reads("lm.h.0.down.weight") == ["pair", "embed"]
    assert reads("tower.h.0.down.weight") == ["pair", "mlp"]
    conditions = {c.field: c.axis for rule in spec.rules for c in rule.when}
    assert conditions == {
        "text_config.types": "text.layer",
        "vision_config.types": "vision.layer",
    }


def test_two_axes_may_be_one(folder: Path) -> None:
    text = OUTER + '[same_axis]\n"vision.mlp" = "text.embed"\n'
    config: Config = {
        "proj_dim": 5,
        "text_config": {"dim": 4, "depth": 1},
        "vision_config": {"dim": 3, "depth": 1, "ffn": 4},
    }
    spec = outer(folder, text, config)
    assert "vision.mlp" not in spec.axes
    up = next(r for r in spec.rules if r.pattern.match("tower.h.0.up.weight") is not None)
    assert [dim.expression for dim in up.dims] == [Name("text.embed"), Name("vision.embed")]
    # Its field is written with the axis that stands for it.
    assert spec.config == {"vision_config.ffn": Name("text.embed")}
    assert spec.spaces["mlp"] == ("text.mlp", "text.embed")
    shapes = {**layer_of("lm.", 0, 4, 16), **layer_of("tower.", 0, 3, 4)}
    assert resolved("outer", shapes, config).sizes["text.embed"] == 4


# Indices, spaces, depth.


def test_the_last_layers_norm_may_be_the_heads() -> None:
    text = BASE.replace(
        'norm = "{L}norm"\n', 'norm = "h.{layer=last}.norm"\nembed = "wte"\nhead = "lm_head"\n'
    ).replace("tied = false", "tied = true")
    text = text.replace("[buffers]", '"wte" = "embedding n -> embed"\n[buffers]')
    text = text.replace('"wte" =', '"w" =') + '[tensors]\nwte = "_, embed:out"\n'
    text = text.replace('"w" = "embedding n -> embed"\n', "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda _, config: parsed(text, config))
        shapes: dict[str, tuple[int, ...]] = {"wte": (9, 4)}
        for i in range(2):
            shapes |= {**layer_of("", i, 4, 8), f"h.{i}.norm.weight": (4,)}
        (tied,) = resolved("toy", shapes, {"dim": 4, "depth": 2, "ffn": 8}).tied_heads
    assert not tied.feeds("h.0.norm.weight", {"layer": 1})
    assert tied.feeds("h.1.norm.weight", {"layer": 1})
    assert tied.feeds("h.3.norm.weight", {"layer": 3})
    assert tied.is_embedding("wte")


def test_an_index_may_count_something_of_its_own() -> None:
    text = BASE + '[tensors]\n"{L}q.{head@2*mlp}.weight" = "embed:out"\n'
    shapes = {**layer_of("", 0, 4, 3), **{f"h.0.q.{i}.weight": (4,) for i in range(6)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda _, config: parsed(text, config))
        found = resolved("toy", shapes, {"dim": 4, "depth": 1, "ffn": 3})
    family = next(f for f in found.families if "{head}" in f.name)
    assert family.indices == ("layer", "head")
    assert found.size(family.index_expression("head")) == 6
    assert family.index_expression("layer") == Name("layer")


def test_vars_may_hold_different_indices() -> None:
    text = BASE.replace('L = ["h.{layer}."]', 'L = ["h.{layer}.", "enc.{layer}.sub."]')
    spec = parsed(text.replace('"{L}norm" =', '"{L}norm{n:|_2}" ='))
    assert first_match(spec.required, "enc.3.sub.up.weight") == {"layer": 3}
    assert rules(spec, "enc.3.sub.norm_2.weight") == [(0, "embed")]
    odd = parsed(BASE.replace('["h.{layer}."]', '["h.{layer}.", "tied."]'))
    found: list[TensorRule] = [
        r for r in odd.rules if r.pattern.match("tied.up.weight") is not None
    ]
    assert [r.pattern.indices for r in found] == [()]


def test_spaces_are_named_or_the_axes_of_their_names() -> None:
    assert parsed(BASE).spaces == {"hidden": ("embed",), "mlp": ("mlp",)}
    text = BASE + '[spaces]\nmlp = ["mlp", "nothing"]\nheads = ["embed"]\nhidden = []\n'
    assert parsed(text).spaces == {"mlp": ("mlp",), "heads": ("embed",)}


def test_a_depth_table_says_what_config_says_of_layers() -> None:
    text = BASE.replace(
        'lists = ["types"]',
        'lists = ["types"]\nindex_lists = ["a"]\nprefix_counts = ["b"]\nlast_index = ["c"]\n'
        'periods = [["d", "-1"], [["e", 8], 4]]\ntables = ["f"]\npatterns = ["g"]\n'
        'first = true\ndelete = ["h"]\nmarks = ["m"]\nruns = ["r", 12]',
    )
    (depth,) = parsed(text).depth.values()
    assert (depth.index_lists, depth.last_index) == (("a",), ("c",))
    assert depth.prefix_counts == (("b",),)
    assert depth.periods == ((("d",), (-1,)), (("e", 8), (4,)))
    assert (depth.tables, depth.patterns, depth.marks) == (("f",), ("g",), ("m",))
    assert (depth.first, depth.delete, depth.tail) == (True, ("h",), "extra")
    assert depth.runs == ("r", 12)


DERIVED = """[[depth.layer.derived]]
list = "types"
when = ["model_type == other", "window"]
every = ["pattern", 4]
offset = -1
yes = {"window == absent" = "full", "window == null" = "none", default = "slides"}
no = 1
"""


@pytest.mark.parametrize(
    ("config", "when", "yes"),
    [
        ({}, False, "full"),
        ({"model_type": "other"}, True, "full"),
        ({"window": None}, False, "none"),
        ({"window": 8}, True, "slides"),
    ],
)
def test_a_rule_for_a_missing_list_depends_on_config(config: Config, when: bool, yes: str) -> None:
    (depth,) = parsed(BASE + DERIVED, config).depth.values()
    rule = LayerRule("types", when, ("pattern", 4), (-1,), yes=yes, no=1)
    assert depth.derived == (rule,)


def test_numbered_layers_have_a_reason() -> None:
    text = '[numbered.layer]\nfirst = {scaled = ["n", 3], default = 0}\nwhy = "it is scaled"\n'
    assert parsed(BASE + text).numbered == {"layer": Numbered((0,), "it is scaled")}
    scaled = parsed(BASE + text, {"scaled": True}).numbered["layer"]
    assert scaled.first == ("n", 3)


def test_a_size_of_nothing_is_a_size() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load", lambda _, config: parsed(BASE, config))
        shapes = {"h.0.up.weight": (0, 4)}
        assert resolved("toy", shapes, {"dim": 4, "depth": 1, "ffn": 0}).sizes["mlp"] == 0


# Refusals.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[surprise]\n", r"unknown entry 'surprise'\n  hint: known: vars, axes, .*extends"),
        ("[axis_kind2]\n", "unknown entry 'axis_kind2'"),
        ("[drop]\nkey = []", r"drop: unknown entry 'key'\n  hint: known: keys"),
        ("[spaces]\nlayers = []", "spaces: 'layers' is not one of hidden, heads, kv_heads, mlp, e"),
        ("[rope]\nbase = 1", r"rope: unknown entry 'base'\n  hint: known: theta, layout"),
        (
            "[rope]\ntheta = ['t']\nlayout = 'x'",
            r"rope\.layout: 'x' is not one of half, interleaved",
        ),
        ("[experts]\ntop = 1", r"experts: unknown entry 'top'\n  hint: known: top_k, g"),
        ("[depth.other]\nlist = []", r"depth\.other: unknown entry 'list'\n  hint: known: lis"),
        ("[depth.other]\nlists = 3", r"depth\.other\.lists: expected a list, found 3"),
        ("[depth.other]\nruns = 1.5", r"depth\.other\.runs: expected a whole number.*1\.5"),
        ("[[depth.other.derived]]\nyes = 1", r"depth\.other\.derived\.list: no entry"),
        ("[numbered.layer]\nfirst = 1", r"numbered\.layer\.why: no entry"),
        ("[depth.other]\nperiods = 3", r"depth\.other\.periods: expected a list, found 3"),
        ("[[include]]\nspec = 'llama'\nas = 'x'\nat = 'y'", r"include: unknown entry 'at'\n"),
        ("[[include]]\nas = 'x'", "include x: expected spec, or model_type"),
        (
            "[[include]]\nas = 'x'\nmodel_type = 'none'",
            "no architecture spec serves model_type 'none'",
        ),
        ("[[include]]\nspec = 'llama'", r"include\.as: no entry"),
        ("[[include]]\nspec = 'nobody'\nas = 'x'", "no architecture 'nobody'"),
        ("[include]\nspec = 'llama'", "include: expected a list"),
        ("[same_axis]\nx = 3", r"same_axis\.x: expected a string, found 3"),
        ("[forward_scale]\nx = 'embed**y'", r"forward_scale\.x: 'y' is not an exponent"),
        ("[config]\nx = 'embed+'", r"expression 'embed\+': a name or number is missing"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_table_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ArchitectureError, match=rf"toy\.toml: {expected}"):
        parsed(BASE + text)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('kind = "rms"', 'kind = "batch"', r"norm\.kind: 'batch' is not one of rms, layer"),
        ('kind = "rms"', "offset = '1'", r"norm\.offset: expected a number, found '1'"),
        ('kind = "rms"', "gain = 1", r"norm: unknown entry 'gain'\n  hint: known: kind, off"),
        ("tied = false", "tie = false", r"head: unknown entry 'tie'\n  hint: known: norm, emb"),
        ('tail = "extra"', "tails = ''", r"depth\.layer: unknown entry 'tails'\n  hint: known"),
        (
            'layer = "depth"\n[al',
            'lair = "depth"\n[al',
            "axis_kind: unknown axis 'lair'\n  hint: known: embed, mlp, layer",
        ),
        ('"linear embed -> mlp"', '{"a b" = "norm embed"}', "condition 'a b': expected 'field'"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_entry_is_refused(before: str, after: str, expected: str) -> None:
    assert before in BASE
    with pytest.raises(ArchitectureError, match=rf"toy\.toml: {expected}"):
        parsed(BASE.replace(before, after))


# Fields of config.json.


def test_a_path_reaches_inside_tables_and_lists() -> None:
    config: Config = {"a": {"x": {"b": 1}, "y": {"b": 2}}, "l": [1, 2, 3], "n": None}
    for path, value in (
        ("a.x.b", 1),
        ("a.*.b", 1),
        ("a.*.c", None),
        ("l.-1", 3),
        ("l.0", 1),
        ("l.3", None),
        ("l.*", 1),
        ("l.x", None),
        ("n.x", None),
        ("b", None),
    ):
        assert config_fields.field_value(config, path) == value, path
    config_fields.set_field(config, "a.*.b", 7)
    config_fields.set_field(config, "l.-1", 9)
    config["e"] = [4, 4]
    config_fields.set_field(config, "e.*", 8)
    config_fields.set_field(config, "new.inner", 5)
    config_fields.delete_field(config, "n")
    config_fields.delete_field(config, "a.x.b")
    assert config == {
        "a": {"x": {}, "y": {"b": 7}},
        "l": [1, 2, 9],
        "e": [8, 8],
        "new": {"inner": 5},
    }
    with pytest.raises(PlanError, match=r"config\.json has no list sizes, of which item 2 "):
        config_fields.set_field({}, "sizes.2", 5)
    with pytest.raises(PlanError, match=r"config\.json: new is 3, expected a table"):
        config_fields.set_field({"new": 3}, "new.inner", 5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, ""),
        ({"n_group": 1, "top": 2, "tied": True, "act": "gelu"}, ""),
        ({"top": 8}, ""),
        ({"n_group": 4}, "the spec was tested with n_group 1, config.json has 4"),
        ({"top": 1}, "the spec was tested with top 2, config.json has 1"),
        ({"tied": False}, "the spec was tested with tied True, config.json has False"),
        ({"act": "relu"}, "the spec was tested with act gelu, config.json has relu"),
    ],
)
def test_a_spec_promises_nothing_with_other_switches_than_it_was_tested_with(
    config: dict[str, object], told: str
) -> None:
    facts = '\n[proved]\nn_group = 1\ntop = 2\ntied = true\nact = "gelu"\n'
    spec = registry.parse(BASE + facts, name="mine", config=config)
    found = set(spec.caveats.values()) - {"base says so"}
    assert found == ({told} if told else set())
    assert not told or spec.caveats.keys() == spec.axes.keys()


def test_what_a_whole_says_of_a_parts_layers_is_added_to_what_the_part_says() -> None:
    (model, *_) = registry.tiny_models("qianfan")
    depth = registry.load("qianfan", {"model_type": "qianfan_ocr", **model.config}).depth
    assert depth["vision.layer"].states == (("vision_feature_layer", -1),)
    assert "vision_config.out_indices" in depth["vision.layer"].delete
