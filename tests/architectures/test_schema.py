"""Architecture specs: TOML -> rules, and checkpoints read by them."""

import itertools
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import pytest

from streammap.architectures import axis_sizes as sizes
from streammap.architectures import expression, registry, resolving
from streammap.architectures.key_pattern import KeyPattern
from streammap.architectures.model import Model
from streammap.architectures.schema import Architecture, TensorRule
from streammap.errors import ArchitectureError, CheckpointError, StreammapError
from streammap.io.dtypes import TensorSpec

Shapes = dict[str, tuple[int, ...]]

LINEAR = "{0}.weight {1},{2}\n{0}.bias {1}"
NORM = "{0}.weight {1}\n{0}.bias {1}"
OLD_NORM = "{0}.gamma {1}\n{0}.beta {1}"

BERT = """
bert.embeddings.position_ids 1,512
bert.embeddings.word_embeddings.weight 30522,768
bert.embeddings.position_embeddings.weight 512,768
bert.embeddings.token_type_embeddings.weight 2,768
bert.embeddings.LayerNorm.gamma 768
bert.embeddings.LayerNorm.beta 768
bert.encoder.layer.#.attention.self.query.weight 768,768
bert.encoder.layer.#.attention.self.query.bias 768
bert.encoder.layer.#.attention.self.key.weight 768,768
bert.encoder.layer.#.attention.self.key.bias 768
bert.encoder.layer.#.attention.self.value.weight 768,768
bert.encoder.layer.#.attention.self.value.bias 768
bert.encoder.layer.#.attention.output.dense.weight 768,768
bert.encoder.layer.#.attention.output.dense.bias 768
bert.encoder.layer.#.attention.output.LayerNorm.gamma 768
bert.encoder.layer.#.attention.output.LayerNorm.beta 768
bert.encoder.layer.#.intermediate.dense.weight 3072,768
bert.encoder.layer.#.intermediate.dense.bias 3072
bert.encoder.layer.#.output.dense.weight 768,3072
bert.encoder.layer.#.output.dense.bias 768
bert.encoder.layer.#.output.LayerNorm.gamma 768
bert.encoder.layer.#.output.LayerNorm.beta 768
bert.pooler.dense.weight 768,768
bert.pooler.dense.bias 768
cls.predictions.bias 30522
cls.predictions.transform.dense.weight 768,768
cls.predictions.transform.dense.bias 768
cls.predictions.transform.LayerNorm.gamma 768
cls.predictions.transform.LayerNorm.beta 768
cls.predictions.decoder.weight 30522,768
cls.seq_relationship.weight 2,768
cls.seq_relationship.bias 2
"""
"""bert-base-uncased as it is on the Hub since 2018."""

GPT2 = """
wte.weight 50257,768
wpe.weight 1024,768
h.#.ln_1.weight 768
h.#.ln_1.bias 768
h.#.attn.bias 1,1,1024,1024
h.#.attn.c_attn.weight 768,2304
h.#.attn.c_attn.bias 2304
h.#.attn.c_proj.weight 768,768
h.#.attn.c_proj.bias 768
h.#.ln_2.weight 768
h.#.ln_2.bias 768
h.#.mlp.c_fc.weight 768,3072
h.#.mlp.c_fc.bias 3072
h.#.mlp.c_proj.weight 3072,768
h.#.mlp.c_proj.bias 768
ln_f.weight 768
ln_f.bias 768
"""
"""gpt2 as it is on the Hub: without a prefix, with masks, without the tied head."""

GPT2_DISTIL = GPT2.replace("attn.bias 1,1,1024,1024", "attn.masked_bias ")

VIT = """
vit.embeddings.cls_token 1,1,768
vit.embeddings.position_embeddings 1,197,768
vit.embeddings.patch_embeddings.projection.weight 768,3,16,16
vit.embeddings.patch_embeddings.projection.bias 768
vit.encoder.layer.#.attention.attention.query.weight 768,768
vit.encoder.layer.#.attention.attention.query.bias 768
vit.encoder.layer.#.attention.attention.key.weight 768,768
vit.encoder.layer.#.attention.attention.key.bias 768
vit.encoder.layer.#.attention.attention.value.weight 768,768
vit.encoder.layer.#.attention.attention.value.bias 768
vit.encoder.layer.#.attention.output.dense.weight 768,768
vit.encoder.layer.#.attention.output.dense.bias 768
vit.encoder.layer.#.intermediate.dense.weight 3072,768
vit.encoder.layer.#.intermediate.dense.bias 3072
vit.encoder.layer.#.output.dense.weight 768,3072
vit.encoder.layer.#.output.dense.bias 768
vit.encoder.layer.#.layernorm_before.weight 768
vit.encoder.layer.#.layernorm_before.bias 768
vit.encoder.layer.#.layernorm_after.weight 768
vit.encoder.layer.#.layernorm_after.bias 768
vit.layernorm.weight 768
vit.layernorm.bias 768
classifier.weight 1000,768
classifier.bias 1000
"""
"""google/vit-base-patch16-224."""

DEIT = (
    VIT.replace("vit.", "deit.")
    .replace("1,197,768", "1,198,768")
    .replace("classifier", "cls_classifier")
    + """
deit.embeddings.distillation_token 1,1,768
distillation_classifier.weight 1000,768
distillation_classifier.bias 1000
"""
)
"""facebook/deit-base-distilled-patch16-224."""

TIMM = """
cls_token 1,1,384
pos_embed 1,198,384
dist_token 1,1,384
patch_embed.proj.weight 384,3,16,16
patch_embed.proj.bias 384
blocks.#.norm1.weight 384
blocks.#.norm1.bias 384
blocks.#.attn.qkv.weight 1152,384
blocks.#.attn.qkv.bias 1152
blocks.#.attn.proj.weight 384,384
blocks.#.attn.proj.bias 384
blocks.#.norm2.weight 384
blocks.#.norm2.bias 384
blocks.#.mlp.fc1.weight 1536,384
blocks.#.mlp.fc1.bias 1536
blocks.#.mlp.fc2.weight 384,1536
blocks.#.mlp.fc2.bias 384
norm.weight 384
norm.bias 384
head.weight 1000,384
head.bias 1000
head_dist.weight 1000,384
head_dist.bias 1000
"""
"""deit_small_distilled_patch16_224 of timm, whose .pth has no config."""

BERT_CONFIG = {
    "architectures": ["BertForPreTraining"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
GPT2_CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
VIT_CONFIG = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
CASES: dict[str, tuple[str, str, Mapping[str, object] | None]] = {
    "bert": ("bert", BERT, BERT_CONFIG),
    "gpt2": ("gpt2", GPT2, GPT2_CONFIG),
    "distilgpt2": ("gpt2", GPT2_DISTIL, GPT2_CONFIG),
    "vit": ("vit", VIT, VIT_CONFIG),
    "deit": ("vit", DEIT, {**VIT_CONFIG, "model_type": "deit"}),
    "timm": ("timm_vit", TIMM, None),
}

MINIMAL = """
schema = 1
model_types = ["toy"]
[axes]
embed = "dim"
layer = "depth"
[axis_kind]
layer = "depth"
[modules]
"h.{layer}.up" = "linear embed -> embed"
"""


def _shapes(text: str, *, n_layers: int = 12) -> Shapes:
    """Key -> shape; a line with "#" stands for one key a layer."""
    found: Shapes = {}
    for line in filter(None, text.splitlines()):
        key, _, sizes = line.partition(" ")
        shape = tuple(int(size) for size in sizes.split(",") if size)
        for i in range(n_layers if "#" in key else 1):
            found[key.replace("#", str(i))] = shape
    return found


def _resolve(
    shapes: Shapes, config: Mapping[str, object] | None, *, name: str | None = None
) -> Model:
    specs = {key: TensorSpec("F32", shape) for key, shape in shapes.items()}
    return resolving.resolve(specs, config, name=name)


def _bert(**config: object) -> Model:
    return _resolve(_shapes(BERT), {**BERT_CONFIG, **config})


def _samples(pattern: KeyPattern) -> Iterator[str]:
    """Keys that a pattern stands for, one for each choice of its alternatives."""
    text = re.sub(r"\(\?P<i\d+>[^)]*\)|\(\?P=i\d+\)", "3", pattern.regex.pattern)
    return _expanded(text.replace(".*", "x"))


def _expanded(regex: str) -> Iterator[str]:
    found = re.search(r"\((?:\?:)?([^()]*)\)", regex)
    if found is None:
        yield regex.replace("\\", "")
        return
    for choice in found[1].split("|"):
        yield from _expanded(regex[: found.start()] + choice + regex[found.end() :])


def _matching(spec: Architecture, key: str) -> list[TensorRule]:
    """The rules that count for a key: own ones before those of the spec that is extended."""
    found = [rule for rule in spec.rules if rule.pattern.match(key) is not None]
    lowest = min((rule.generation for rule in found), default=0)
    return [rule for rule in found if rule.generation == lowest]


def _configs(name: str) -> list[Mapping[str, object]]:
    """No config, and those of the spec's tiny models."""
    tiny_models = registry.tiny_models(name)
    return [{}, *({"model_type": model.model_type, **model.config} for model in tiny_models)]


every_spec = pytest.mark.parametrize("name", registry.names())


# The shipped specs.


def test_these_specs_are_shipped() -> None:
    assert set(registry.names()) >= {"bert", "gpt2", "llama", "llava", "timm_vit", "vit"}


@every_spec
def test_a_shipped_spec_loads(name: str) -> None:
    for config in _configs(name):
        spec = registry.load(name, config)
        assert spec.name == name
        assert spec.rules
        assert spec.required
        assert spec.depth_axes
        assert all(spec.axes[axis].kind == "depth" for axis in spec.depth_axes)
        assert set(spec.depth) <= set(spec.depth_axes)
    for model_type in spec.model_types:
        found = registry.for_model_type(model_type, {})
        assert found is not None
        assert found.name == name


def test_each_model_type_is_served_by_one_spec() -> None:
    served = [t for name in registry.names() for t in registry.load(name).model_types]
    assert len(served) == len(set(served))
    assert registry.model_types() == {
        model_type: name
        for name in registry.names()
        for model_type in registry.load(name).model_types
    }


@every_spec
def test_each_rule_of_a_shipped_spec_has_keys_of_its_own(name: str) -> None:
    """Each rule matches keys (so it can be reached), and no other rule matches these."""
    for config in _configs(name):
        spec = registry.load(name, config)
        for rule in spec.rules:
            keys = list(_samples(rule.pattern))
            assert keys
            for key in keys:
                assert rule.pattern.match(key) is not None, key
                found = _matching(spec, key)
                # Several rules of one text differ in the layers that they are for, or in layout.
                assert len({(r.pattern.text, r.kind) for r in found}) == 1, key
                assert len({(r.when, r.dims) for r in found}) == len(found), key
                assert rule in found or found[0].generation < rule.generation


@every_spec
def test_what_a_shipped_spec_requires_is_what_its_rules_know(name: str) -> None:
    for config in _configs(name):
        spec = registry.load(name, config)
        patterns = [*spec.required, *spec.detect]
        for head in spec.heads:
            patterns += [*head.embed, *head.head]
        for pattern in patterns:
            for key in _samples(pattern):
                assert _matching(spec, key), key


@every_spec
def test_a_shipped_spec_names_only_its_axes_and_uses_each(name: str) -> None:
    for config in _configs(name):
        spec = registry.load(name, config)
        expressions = [
            *(dim.expression for rule in spec.rules for dim in rule.dims),
            *(count for rule in spec.rules for count in rule.pattern.counts.values()),
            *spec.aliases.values(),
            *(side for _, left, right in spec.constraints for side in (left, right)),
            *(s for axis in spec.axes.values() for s in axis.sources if not isinstance(s, str)),
            *spec.config.values(),
            *(factor.expression for _, factor in spec.forward_scale),
            *(head.scale.expression for head in spec.heads if head.scale is not None),
        ]
        used = {n for tree in expressions if tree is not None for n in expression.names(tree)}
        known = set(spec.axes) | set(spec.aliases)
        assert used <= known
        indices = {index for rule in spec.rules for index in rule.pattern.indices}
        counted = {index for rule in spec.rules for index in rule.pattern.counts}
        assert indices - counted <= set(spec.axes)
        assert set(spec.experts) | set(spec.caveats) <= known
        assert {axis for axes in spec.spaces.values() for axis in axes} <= set(spec.axes)


@pytest.mark.parametrize("case", CASES)
def test_each_key_of_a_real_checkpoint_matches_one_rule(case: str) -> None:
    name, text, config = CASES[case]
    shapes = _shapes(text)
    for key in shapes:
        assert len(_matching(registry.load(name, config or {}), key)) == 1, key
    found = _resolve(shapes, config)
    assert found.architecture.name == name
    assert found.n_layers == 12
    keys = {key for family in found.families for key in family.members.values()}
    assert keys == set(shapes)
    for family in found.families:
        assert len(family.members) == (12 if family.indices else 1)
        assert all(family.key(values) == key for values, key in family.members.items())


def test_the_sizes_of_real_checkpoints_are_found() -> None:
    assert _bert().sizes == {
        "embed": 768,
        "heads": 12,
        "head_dim": 64,
        "mlp": 3072,
        "vocab": 30522,
        "pos": 512,
        "types": 2,
        "layer": 12,
    }
    found = _resolve(_shapes(GPT2), GPT2_CONFIG).sizes
    assert (found["mlp"], found["pos"], found["vocab"]) == (3072, 1024, 50257)
    found = _resolve(_shapes(TIMM), None).sizes
    assert found == {
        "embed": 384,
        "heads": 6,
        "head_dim": 64,
        "mlp": 1536,
        "channels": 3,
        "layer": 12,
    }


def test_heads_of_a_timm_file_can_be_told() -> None:
    found = _resolve(_shapes(TIMM), {"model_args": {"num_heads": 12}})
    assert (found.sizes["heads"], found.sizes["head_dim"]) == (12, 32)


def test_a_tied_head_is_found() -> None:
    """A copy of the tied tensor in the file is the tied tensor still."""
    shapes = _shapes(BERT)
    assert _resolve(shapes, BERT_CONFIG).tied
    assert not _resolve(shapes, {**BERT_CONFIG, "tie_word_embeddings": False}).tied
    del shapes["cls.predictions.decoder.weight"]
    assert _resolve(shapes, BERT_CONFIG).tied
    for key in [key for key in shapes if key.startswith("cls.")]:
        del shapes[key]
    assert not _resolve(shapes, BERT_CONFIG).tied
    gpt2 = _shapes(GPT2)
    assert _resolve(gpt2, GPT2_CONFIG).tied
    assert not _resolve(gpt2, {**GPT2_CONFIG, "architectures": ["GPT2ForTokenClassification"]}).tied


def test_a_head_that_config_json_unties_and_no_tensor_holds_is_refused() -> None:
    shapes = _shapes(BERT)
    del shapes["cls.predictions.decoder.weight"]
    untied = {**BERT_CONFIG, "tie_word_embeddings": False}
    with pytest.raises(
        CheckpointError, match=r"decoder\.weight: missing.*tie_word_embeddings false"
    ):
        _resolve(shapes, untied)
    # The encoder alone has no head, whatever config.json says of one.
    encoder = {key: x for key, x in shapes.items() if not key.startswith("cls.")}
    assert not _resolve(encoder, {**untied, "architectures": ["BertModel"]}).tied
    gpt2 = {**GPT2_CONFIG, "tie_word_embeddings": False}
    assert not _resolve(_shapes(GPT2), {**gpt2, "architectures": ["GPT2Model"]}).tied


@pytest.mark.parametrize("n", [1, 2, 101])
def test_layers_of_any_number_are_read(n: int) -> None:
    found = _resolve(_shapes(GPT2, n_layers=n), {**GPT2_CONFIG, "n_layer": n})
    assert found.n_layers == n


# Checkpoints that are refused.


def test_a_surplus_key_is_refused_with_the_nearest_patterns() -> None:
    shapes = {**_shapes(BERT), "bert.encoder.layer.3.attention.self.quary.weight": (768, 768)}
    expected = (
        r"self\.quary\.weight: no rule of bert\.toml knows this tensor \(1 such: .*\); "
        r"nearest are .*attention\.self\.\{p:query\|key\}\.weight and "
    )
    with pytest.raises(CheckpointError, match=expected):
        _resolve(shapes, BERT_CONFIG)


def test_many_surplus_keys_are_counted() -> None:
    shapes = {**_shapes(GPT2), **{f"h.{i}.adapter.down": (1,) for i in range(12)}}
    with pytest.raises(CheckpointError, match=r"h\.0\.adapter\.down: .*\(12 such: .* and 9 more\)"):
        _resolve(shapes, GPT2_CONFIG)


@pytest.mark.parametrize(
    "key", ["\n", "", "{layer}", "h.01.ln_1.weight", "h.99999999999.ln_1.weight"]
)
def test_an_odd_key_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=r"no rule of gpt2.toml knows this tensor"):
        _resolve({**_shapes(GPT2), key: (768,)}, GPT2_CONFIG)


@pytest.mark.parametrize("case", CASES)
def test_any_tensor_that_one_layer_lacks_is_missed(case: str) -> None:
    _, text, config = CASES[case]
    shapes = _shapes(text, n_layers=3)
    if config is not None:
        n = "n_layer" if "n_layer" in config else "num_hidden_layers"
        config = {**config, n: 3}
    dropped = {
        key
        for family in _resolve(shapes, config).families
        if family.rule.kind == "drop"
        for key in family.members.values()
    }
    for key in [key for key in shapes if ".1." in key and key not in dropped]:
        rest = {k: shape for k, shape in shapes.items() if k != key}
        expected = rf"missing \(1 tensors: {re.escape(key)}\)|tensors are of later ones"
        with pytest.raises(CheckpointError, match=expected):
            _resolve(rest, config)


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_that_all_layers_lack_is_missed(case: str) -> None:
    _, text, config = CASES[case]
    lines = list(filter(None, text.splitlines()))
    for line in lines:
        key, _, sizes = line.partition(" ")
        if "#" in key and key.endswith(".weight") and "," in sizes:
            rest = "\n".join(other for other in lines if other != line)
            with pytest.raises((CheckpointError, ArchitectureError)):
                _resolve(_shapes(rest), config)


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight"),
        ("gpt2", "wte.weight"),
        ("gpt2", "wpe.weight"),
        ("gpt2", "ln_f.weight"),
        ("vit", "vit.embeddings.patch_embeddings.projection.weight"),
        ("vit", "vit.embeddings.position_embeddings"),
    ],
)
def test_a_required_tensor_is_missed(case: str, key: str) -> None:
    _, text, config = CASES[case]
    shapes = _shapes(text)
    del shapes[key]
    name = key.rpartition(".")[0].split(".")[-1]
    with pytest.raises(CheckpointError, match=rf"{name}.*: missing \(1 tensors"):
        _resolve(shapes, config)


def test_a_timm_file_without_its_patches_is_no_timm_file() -> None:
    shapes = _shapes(TIMM)
    del shapes["patch_embed.proj.weight"]
    with pytest.raises(ArchitectureError, match="do not tell the architecture"):
        _resolve(shapes, None)
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.weight: expected in this"):
        _resolve(shapes, None, name="timm_vit")


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        (
            "bert.encoder.layer.7.intermediate.dense.weight",
            (768, 3072),
            r"dense\.weight: shape \[768, 3072\] is not \(mlp, embed\) = \[3072, 768\]",
        ),
        ("bert.pooler.dense.bias", (767,), r"shape \[767\] is not \(embed\) = \[768\]"),
        ("cls.seq_relationship.weight", (2, 7), r"shape \[2, 7\] is not \(_, embed\) = \[_, 768\]"),
        ("bert.pooler.dense.bias", (768, 1), r"pooler\.dense\.bias: 2 dimensions, expected 1"),
        ("bert.pooler.dense.bias", (), r"pooler\.dense\.bias: 0 dimensions, expected 1 \(embed\)"),
        ("bert.encoder.layer.7.output.dense.bias", (768, 1), r"layer\.7.*shape \[768, 1\] is not"),
        ("bert.encoder.layer.0.output.dense.bias", (768, 1), r"2 dimensions, expected 1|shape"),
    ],
)
def test_a_wrong_shape_is_refused_with_both(
    key: str, shape: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        _resolve({**_shapes(BERT), key: shape}, BERT_CONFIG)


def test_a_patch_projection_may_have_any_window() -> None:
    key = "vit.embeddings.patch_embeddings.projection.weight"
    _resolve({**_shapes(VIT), key: (768, 3, 2, 14, 14)}, VIT_CONFIG)
    with pytest.raises(CheckpointError, match=r"shape \[768, 4, 16, 16\] is not"):
        _resolve({**_shapes(VIT), key: (768, 4, 16, 16)}, VIT_CONFIG)
    with pytest.raises(CheckpointError, match="1 dimensions, expected 3"):
        _resolve({**_shapes(VIT), key: (768,)}, VIT_CONFIG)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", 512, "512 does not divide by 12"),
        ("hidden_size", 1536, r"\[30522, 768\] is not \(vocab, embed\) = \[30522, 1536\]"),
        ("vocab_size", 100, r"\[30522, 768\] is not \(vocab, embed\) = \[100, 768\]"),
        ("num_hidden_layers", 6, r"config\.json says 6 layers \(0 to 5\); 96 tensors are of later"),
        ("num_hidden_layers", 13, r"layer\.12\..*: missing \(16 tensors: .* and 13 more\)"),
        ("intermediate_size", None, r"no intermediate_size, which bert.* needs"),
        ("hidden_size", None, "config.json: no hidden_size, which is the size of embed"),
        ("num_attention_heads", 10, "768 does not divide by 10"),
        ("hidden_size", "768", "config.json: hidden_size is '768', expected a size"),
        ("hidden_size", 768.0, "hidden_size is 768.0, expected a size"),
        ("hidden_size", True, "hidden_size is True, expected a size"),
        ("hidden_size", 0, r"\[30522, 768\] is not \(vocab, embed\) = \[30522, 0\]"),
        ("hidden_size", -768, "hidden_size is -768, expected a size"),
        ("hidden_size", 2**41, "expected a size"),
        ("hidden_size", [768], "expected a size"),
    ],
)
def test_a_config_of_another_checkpoint_is_refused(
    field: str, value: object, expected: str
) -> None:
    with pytest.raises((CheckpointError, ArchitectureError), match=expected):
        _bert(**{field: value})


def test_a_config_that_says_too_many_layers_is_refused_fast() -> None:
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"missing|layers"):
        _bert(num_hidden_layers=200_000)
    assert time.perf_counter() - started < 1


def test_an_unknown_model_type_is_refused() -> None:
    with pytest.raises(
        ArchitectureError, match=r"no architecture spec serves model_type 'lama'\n.*spec infer"
    ):
        _bert(model_type="lama")
    with pytest.raises(
        ArchitectureError, match=r"no architecture spec serves model_type \"\['bert'"
    ):
        _bert(model_type=["bert"])


def test_a_spec_can_be_named() -> None:
    assert (
        _resolve(_shapes(BERT), {**BERT_CONFIG, "model_type": "mine"}, name="bert").n_layers == 12
    )
    with pytest.raises(
        ArchitectureError, match=r"no architecture 'brt'\n.*there are .*bert, .*gpt2"
    ):
        _resolve(_shapes(BERT), BERT_CONFIG, name="brt")


def test_keys_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"there is no config\.json, and the keys \(a\) do"):
        _resolve({"a": (1,)}, None)
    with pytest.raises(ArchitectureError, match=r"config\.json has no model_type, and the keys"):
        _resolve({"a": (1,)}, {})


def test_sizes_of_a_target_config_alone() -> None:
    spec = registry.load("bert")
    assert sizes.of_config(spec, BERT_CONFIG)["embed"] == 768
    assert sizes.of_config(spec, {"num_hidden_layers": 3}) == {"layer": 3, "pos": 512, "types": 2}
    with pytest.raises(
        CheckpointError, match=r"target config.json: model_type 'gpt2', expected bert"
    ):
        sizes.of_config(spec, GPT2_CONFIG)


# Spec files.


def test_a_minimal_spec_is_read() -> None:
    spec = registry.parse(MINIMAL, name="toy")
    assert spec.model_types == ("toy",)
    assert [rule.pattern.text for rule in spec.rules] == [
        "h.{layer}.up.weight",
        "h.{layer}.up.bias",
    ]
    weight, bias = spec.rules
    assert [(dim.text, dim.role) for dim in weight.dims] == [("embed", "out"), ("embed", "in")]
    assert [(dim.text, dim.role) for dim in bias.dims] == [("embed", "out")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("linear a -> b", {".weight": ["b:out", "a:in"], ".bias": ["b:out"]}),
        ("conv1d a -> b", {".weight": ["a:in", "b:out"], ".bias": ["b:out"]}),
        ("conv a -> b", {".weight": ["b:out", "a:in", "...:keep"], ".bias": ["b:out"]}),
        ("linear a -> _", {".weight": ["_:keep", "a:in"], ".bias": ["_:keep"]}),
        ("embedding n -> a", {".weight": ["n:keep", "a:out"]}),
        ("norm a", {f".{end}": ["a:out"] for end in ("weight", "bias", "gamma", "beta")}),
    ],
)
def test_a_module_stands_for_these_tensors(words: str, expected: dict[str, list[str]]) -> None:
    text = MINIMAL.replace("[axis_kind]", 'a = "a"\nb = "b"\nn = "n"\n[axis_kind]')
    spec = registry.parse(f'{text}"x" = "{words}"', name="toy")
    found = {
        rule.pattern.text[1:]: [f"{dim.text}:{dim.role}" for dim in rule.dims]
        for rule in spec.rules[2:]
    }
    assert found == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schema = ", r"toy\.toml: "),
        ("", r"toy\.toml: schema is None, expected 1"),
        ("schema = 2", "schema is 2, expected 1"),
        ("schema = '1'", "schema is '1', expected 1"),
        (f"surprise = 1\n{MINIMAL}", "unknown entry 'surprise'"),
        (f"{MINIMAL}[tensor]\n", "unknown entry 'tensor'"),
        ("schema = 1\nmodel_types = ['a']\n", "expected axes, which name the sizes of a model"),
        (MINIMAL.replace('model_types = ["toy"]', ""), "model_types: no entry, expected one"),
        (MINIMAL.replace('["toy"]', "[1]"), "model_types: expected a string, found 1"),
        (MINIMAL.replace('["toy"]', '"toy"'), "model_types: expected a list, found 'toy'"),
        (
            MINIMAL.replace('layer = "depth"\n[mod', 'layer = "deep"\n[mod'),
            "'deep' is not one of width, depth, frozen, group, expert",
        ),
        (MINIMAL.replace('layer = "depth"\n[mod', "layer = 1\n[mod"), "1 is not one of width, d"),
        (MINIMAL.replace('"dim"', "7"), r"axes\.embed: expected a list, found 7"),
        (MINIMAL.replace('"dim"', '"=2*"'), "a name or number is missing"),
        (MINIMAL.replace("linear", "lineal"), "is not a module such as 'linear embed -> mlp'"),
        (MINIMAL.replace(" -> embed", ""), "is not a module such as"),
        (MINIMAL.replace("-> embed", "-> em bed"), "'bed' is out of place"),
        (MINIMAL.replace('"linear embed -> embed"', "3"), "expected a string, found 3"),
        (MINIMAL.replace("{layer}", "{layer"), "unbalanced braces"),
        (f'{MINIMAL}[tensors]\n"x" = "embed:inn"', "a role is out, in or keep, not 'inn'"),
        (f'{MINIMAL}[tensors]\n"x" = "embed,,embed"', "a name or number is missing"),
        (f'{MINIMAL}[tensors]\n"x" = ["embed"]', "expected a string"),
        (f"{MINIMAL}[buffers]\nkeys = 7", r"buffers\.keys: expected a list, found 7"),
        (f"{MINIMAL}[constraints]\nrules = ['a = b']", "expected 'a == b'"),
        (f"{MINIMAL}[alias]\nq = 3", "expected a string"),
        (f"{MINIMAL}[vars]\nq = 'x'", r"vars\.q: expected a list, found 'x'"),
        (f"{MINIMAL}[head]\nnorm = 7", r"head\.norm: expected a list, found 7"),
        (f"{MINIMAL}[head]\nembed = [1]", r"head\.embed: expected a string, found 1"),
        (f"tensors = 3\n{MINIMAL}", "tensors: expected a table, found 3"),
    ],
    ids=itertools.count(),
)
def test_a_wrong_spec_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ArchitectureError, match=expected):
        registry.parse(text, name="toy")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace("[axis_kind]", '[axis_kind]\nemb = "frozen"'),
        f"{MINIMAL}[buffers]\nkey = ['x']",
        f"{MINIMAL}[required]\nkees = ['x']",
        f"{MINIMAL}[constraints]\nrule = ['a == b']",
        f"{MINIMAL}[head]\nnorm = 'n'\nembed = 'e'\nhead = 'h'\nreader = ['r']",
    ],
    ids=["axis_kind", "buffers", "required", "constraints", "head"],
)
def test_a_misspelt_entry_is_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match=r"toy\.toml"):
        registry.parse(text, name="toy")


def _toy(text: str, shapes: Shapes, config: Mapping[str, object] = MappingProxyType({})) -> Model:
    """A checkpoint read by a spec that is not shipped."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "toy.toml"
        path.write_text(text)
        return _resolve(shapes, {"dim": 4, "depth": 1, **config}, name=str(path))


def test_a_key_that_two_rules_match_is_refused() -> None:
    text = f'{MINIMAL}[tensors]\n"h.*" = "..."'
    expected = r"toy\.toml: h\.0\.up\.weight matches h\.\{layer\}\.up\.weight and h\.\*"
    with pytest.raises(ArchitectureError, match=expected):
        _toy(text, {"h.0.up.weight": (4, 4)})


def test_an_axis_defined_by_itself_is_refused() -> None:
    text = MINIMAL.replace("[axis_kind]", 'a = "=2*b"\nb = "=a/2"\n[axis_kind]')
    with pytest.raises(ArchitectureError, match=r"toy\.toml: a is defined by itself"):
        _toy(text, {"h.0.up.weight": (4, 4)})


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace("-> embed", "-> mlp"),
        MINIMAL.replace("[axis_kind]", 'a = "=2*b"\n[axis_kind]'),
        MINIMAL.replace("[axis_kind]", 'a = "=volume(h)"\n[axis_kind]'),
        MINIMAL.replace("[axis_kind]", 'a = "=shape(h)"\n[axis_kind]'),
        MINIMAL.replace("[axis_kind]", 'a = "=shape(h.0.up.weight, x)"\n[axis_kind]'),
        f'{MINIMAL}[constraints]\nrules = ["embed == nothing"]',
        MINIMAL.replace("-> embed", "-> q") + '[alias]\nq = "nothing"',
        f'{MINIMAL}[written.nothing]\nfield = "embed"',
        f"{MINIMAL}[written.embed]\nfield = 3",
    ],
    ids=itertools.count(),
)
def test_a_spec_that_names_what_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(StreammapError, match=r"toy|nothing|mlp|function"):
        _toy(text, {"h.0.up.weight": (4, 4), "h.0.up.bias": (4,)})
