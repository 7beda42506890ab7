"""What 113 tiny checkpoints' dimensions are, and what becomes of them; neither weights nor models.

data/labels.json was made once from checkpoints that transformers 5.23 and timm wrote. Its labels
are older than the specs, and were proved by random permutations of one axis after the other. One
checkpoint a line:

    {"name": "llama", "dtype": "F32", "config": {...},
     "tensors": {"model.layers.{layer}.mlp.down_proj.weight": ["embed:out, mlp:in", "48x92 0-4"]}}

A tensor has a label for each dimension (null for a buffer), then, for each of its shapes, the
layers and other indices that have it, a word for each index of the key. "-" is a scalar's shape.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.expression import Expression, Name, Number, Operation, parse_expression
from streammap.architectures.layer_kinds import LayerKind
from streammap.architectures.model import Family, Model
from streammap.architectures.schema import DimSpec
from streammap.errors import SchemeError
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.formats.safetensors_header import Slot
from streammap.planning import plan

Layout = tuple[tuple["str | Layout", ...], ...]
"""A sum of ordered products: of axes, and of sums that don't come first. 2*x is x + x."""

MODEL_TYPES = """
albert apertus arcee bart beit bert biogpt bloom camembert clip clip_vision_model codegen cohere
cohere2 deberta deberta-v2 deepseek_v2 deepseek_v3 deit dinov2 dinov3_vit distilbert dots1 electra
ernie4_5 ernie4_5_moe esm eurobert exaone4 falcon falcon_mamba gemma gemma2 gemma3 gemma3_text
gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe
granitemoeshared helium hubert hunyuan_v1_dense hunyuan_v1_moe jamba lfm2 llama llama4_text llava
m2m_100 mamba mamba2 marian mbart megatron-bert minimax ministral ministral3 mistral mixtral
modernbert mpnet mpt mt5 nemotron nomic_bert olmo olmo2 olmo3 olmoe opt pegasus persimmon phi phi3
phimoe qwen2 qwen2_5_vl qwen2_5_vl_vision qwen2_moe qwen2_vl qwen2_vl_vision qwen3 qwen3_5_moe_text
qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_vision roberta roberta-prelayernorm seed_oss
siglip siglip_vision_model smollm3 stablelm starcoder2 t5 timm:vision_transformer umt5 vit vit_mae
wav2vec2 whisper xglm xlm-roberta
"""
UNPROVED = {
    "blip_2_qformer",
    "exaone4_5_vision",
    "got_ocr2_vision",
    "hunyuan_vl_vision",
    "idefics2_vision",
    "instructblip_qformer",
    "instructblipvideo_qformer",
    "kimi_k25_vision",
    "kosmos_2_text_model",
    "minimax_m3_vl_vision",
    "ovis2_vision_model",
    "pp_chart2table_vision",
    "pix2struct_text_model",
    "qwen2_5_omni_audio_encoder",
    "qwen2_5_omni_vision_encoder",
    "qwen2_5_vl_vision",
    "qwen2_vl_vision",
    "t5_gemma_module",
}
"""Served, without a tiny model of their own: the models that include them have one."""

RENAMED = {
    # "hd" is head_dim everywhere else.
    "enc_hd": "enc_head_dim",
    "dec_hd": "dec_head_dim",
    "t_hd": "t_head_dim",
    "v_hd": "v_head_dim",
    # vit_mae's decoder is named as the decoders of bart and t5 are.
    "dembed": "dec_embed",
    "dheads": "dec_heads",
    "dhd": "dec_head_dim",
    "dmlp": "dec_mlp",
    # One axis inside and outside the image encoder, [same_axis].
    "vision.text_embed": "text.embed",
}
"""Axis in the labels -> the same axis in the specs."""

IMPROVED: tuple[tuple[str, str, str], ...] = (
    # These have no embedding size of their own: what the labels call another axis is the width.
    *(
        (spec, "emb_in:out", "embed:out")
        for spec in (
            "bert",
            "deberta",
            "distilbert",
            "esm",
            "megatron_bert",
            "mpnet",
            "roberta",
            "roberta_prelayernorm",
        )
    ),
    ("biogpt", "proj:out", "embed:out"),
    ("opt", "proj:out", "embed:out"),
    # The features of several layers may stand side by side.
    ("llava", "vision.embed:in", "features*vision.embed:in"),
    # Image features are as wide as the image encoder, and nothing projects them.
    ("siglip", "joint:out", "v_embed:out"),
    # "_" is any size; who makes it doesn't matter, as it never changes.
    *(
        (spec, "_:out", "_")
        for spec in (
            "beit",
            "bert",
            "dinov2",
            "electra",
            "qwen3_5",
            "qwen3_next",
            "qwen_moe",
            "timm_vit",
            "vit",
            "vit_mae",
        )
    ),
    ("qwen_vl", "_:in", "_"),
    # Every query head has its key and value: there is no group of query heads.
    ("bloom", "kv_heads*(q_group+2)*head_dim:out", "heads*3*head_dim:out"),
    ("bloom", "kv_heads*q_group*head_dim:in", "heads*head_dim:in"),
    # A rank's heads are a group, so that heads are resized in all four ranks alike.
    ("codegen", "4*3*hpm*head_dim:out", "ranks*3*rank_heads*head_dim:out"),
    ("codegen", "4*hpm*head_dim:in", "ranks*rank_heads*head_dim:in"),
    # Layers of full attention have a head size, and maybe key heads, of their own.
    ("gemma4", "head_dim:out", "g_head_dim:out"),
    ("gemma4", "kv_heads*head_dim:out", "g_kv_heads*g_head_dim:out"),
    ("gemma4", "kv_heads*q_group*head_dim:in", "g_kv_heads*g_group*g_head_dim:in"),
    ("gemma4", "kv_heads*q_group*head_dim:out", "g_kv_heads*g_group*g_head_dim:out"),
    # transformers gives experts and the shared expert intermediate_size, whatever config.json says.
    ("hunyuan_v1_moe", "moe_mlp:in", "mlp:in"),
    ("hunyuan_v1_moe", "moe_mlp:out", "mlp:out"),
    ("hunyuan_v1_moe", "shared_mlp:in", "mlp:in"),
    ("hunyuan_v1_moe", "shared_mlp:out", "mlp:out"),
    # Heads lie in groups that share B and C (one group in this checkpoint).
    ("mamba2", "heads:out", "groups*h_group:out"),
    ("mamba2", "heads*head_dim:in", "groups*h_group*head_dim:in"),
    ("mamba2", "heads*head_dim:out", "groups*h_group*head_dim:out"),
    ("mamba2", "heads*head_dim+2*groups*state:out", "groups*h_group*head_dim+2*groups*state:out"),
    (
        "mamba2",
        "2*heads*head_dim+2*groups*state+heads:out",
        "2*groups*h_group*head_dim+2*groups*state+groups*h_group:out",
    ),
    # It is added to the decoder's outputs, and its vocabulary may be of another size.
    ("marian", "vocab", "dec_vocab"),
    # merge x merge neighbours, one after the other: each of them is resized as the width is.
    ("qwen_vl", "vision.merged:in", "vision.merge*vision.merge*vision.embed:in"),
    ("qwen_vl", "vision.merged:out", "vision.merge*vision.merge*vision.embed:out"),
)
"""Spec, label, and what the spec says in its place."""

NOT_HALVED = {"siglip": r"5 heads \(t_heads\) do not divide into groups of 2"}
"""Checkpoint -> why it can't have half the width."""

COUNTS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "decoder_num_hidden_layers",
    "num_hidden_groups",
    "depth",
}
LISTS = {"layer_types", "no_rope_layers", "attention_layers"}
STAGES: dict[str, object] = {"out_features": None, "out_indices": None, "stage_names": None}
FEWER_LAYERS: Mapping[str, Mapping[str, object]] = {
    **dict.fromkeys(("beit", "dinov2", "dinov2_giant", "dinov3_vit"), STAGES),
    # Layers 0 and 1 are dense. The further layer that config.json tells of isn't in the file.
    "deepseek_v3": {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "glm4_moe": {"num_nextn_predict_layers": 0},
    "ernie4_5_moe": {"moe_layer_end_index": 2},
    "gemma4_text": {"per_layer_config.5.head_dim": None, "per_layer_config.3.head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # The lists say what these periods do not.
    "exaone4": {"sliding_window_pattern": None},
    "smollm3": {"no_rope_layer_interval": None},
    "llama4_text": {
        "moe_layers": [1, 2],
        "interleave_moe_layer_step": None,
        "no_rope_layer_interval": None,
    },
    # The features come out of the layer that is the last of those that stay.
    "llava": {"vision_feature_layer": -1},
    # Its groups are run twice each.
    "albert": {"num_hidden_layers": 2},
}
"""What else config.json says after half of the layers of each kind are left out."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One tensor of a checkpoint."""

    spec: TensorSpec
    labels: tuple[str, ...] | None
    """One a dimension, None for a buffer."""
    indices: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Case:
    """One checkpoint."""

    config: Mapping[str, object]
    tensors: Mapping[str, Labelled]

    @property
    def arch(self) -> str | None:
        """The spec to name: timm's files have no model_type."""
        return None if "model_type" in self.config else "timm_vit"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: tensor.spec for key, tensor in self.tensors.items()}


@cache
def cases() -> Mapping[str, Case]:
    text = (Path(__file__).parents[1] / "data" / "labels.json").read_text(encoding="utf-8")
    return {
        entry["name"]: Case(
            entry["config"],
            {
                key: tensor
                for name, (labels, *shapes) in entry["tensors"].items()
                for key, tensor in _tensors(name, labels, shapes, entry["dtype"])
            },
        )
        for entry in json.loads(text)
    }


@cache
def lazy(name: str) -> LazyCheckpoint:
    """A checkpoint without files: it can be planned with, not read."""
    case = cases()[name]
    slots = {key: Slot(key, spec, 0) for key, spec in case.specs.items()}
    source = Checkpoint(Path(name), (), slots, {}, case.config)
    return LazyCheckpoint(plan.from_checkpoint(source, (), architecture=case.arch))


def resolved(name: str) -> Model:
    return lazy(name).plan.model


def _tensors(
    name: str, labels: str | None, shapes: Sequence[str], dtype: str
) -> Iterator[tuple[str, Labelled]]:
    indices = re.findall(r"\{([^}]*)\}", name)
    told = None if labels is None else tuple(labels.split(", ")) if labels else ()
    for text in shapes:
        shape, *ranges = text.split()
        spec = TensorSpec(dtype, () if shape == "-" else tuple(map(int, shape.split("x"))))
        for values in itertools.product(*map(_range, ranges)):
            found = dict(zip(indices, values, strict=True))
            key = name
            for index, value in found.items():
                key = key.replace(f"{{{index}}}", str(value))
            yield key, Labelled(spec, told, found)


def _range(text: str) -> Iterator[int]:
    """The numbers of "0-2,4"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def layout(tree: Expression, alias: Callable[[str], Expression | None]) -> Layout:
    """An expression without aliases, brackets and factors that come first."""
    match tree:
        case Name(name):
            stands_for = alias(name)
            return ((name,),) if stands_for is None else layout(stands_for, alias)
        case Number(value):
            return ((),) * value
        case Operation("+", left, right):
            return layout(left, alias) + layout(right, alias)
        case Operation("*", left, right):
            rest = layout(right, alias)
            # (a+b)*c is a*c + b*c one after the other; c*(a+b) lies differently, and stays.
            inner = rest[0] if len(rest) == 1 else (rest,)
            return tuple(
                part
                for first in layout(left, alias)
                for part in ((first + inner,) if first else rest)
            )
    raise AssertionError(f"{tree} is no layout")


def laid_out(label: str, renamed: Mapping[str, str]) -> tuple[Layout | None, str]:
    """What a label says: layout ("_" has none) and role."""
    text, _, role = label.partition(":")
    if text == "_":
        return None, role or "keep"
    names = {old: Name(new) for old, new in renamed.items()}
    return layout(parse_expression(text), names.get), role or "keep"


def wrong(name: str, used: set[tuple[str, str, str]]) -> Iterator[str]:
    """Where the spec says something else of a checkpoint than its labels.

    Args:
        used: Takes those of IMPROVED that apply.
    """
    found, tensors = resolved(name), cases()[name].tensors
    spec = found.architecture
    improved = {
        (laid_out(old, RENAMED), laid_out(new, {})): (spec.name, old, new)
        for arch, old, new in IMPROVED
        if arch == spec.name
    }
    for family in found.families:
        for values, key in family.members.items():
            labels = tensors[key].labels
            if (labels is None) != (family.rule.kind in ("buffer", "drop")) and labels != ():
                yield f"{key}: {family.rule.kind}, labelled {labels}"
            for dim, label in zip(family.dims, labels or (), strict=labels is not None):
                told = _told(dim, found)
                if told == laid_out(label, RENAMED):
                    continue
                entry = improved.get((laid_out(label, RENAMED), told))
                if entry is None:
                    yield f"{key}: {dim.text}:{dim.role}, labelled {label}"
                else:
                    used.add(entry)
            yield from _wrong_sizes(found, family, key, tensors[key].spec.shape)
            if dict(_axes(found, zip(family.indices, values, strict=True))) != dict(
                _axes(found, tensors[key].indices.items())
            ):
                yield f"{key}: {family.name}, labelled {tensors[key].indices}"


def _told(dim: DimSpec, found: Model) -> tuple[Layout | None, str]:
    if dim.expression is None:
        return None, dim.role
    return layout(dim.expression, found.architecture.aliases.get), dim.role


def _wrong_sizes(found: Model, family: Family, key: str, shape: tuple[int, ...]) -> Iterator[str]:
    for n, dim in zip(shape, family.dims, strict=True):
        if dim.expression is not None and found.size(dim.expression) != n:
            yield f"{key}: {dim.text} = {found.size(dim.expression)}, its shape says {n}"


def _axes(found: Model, indices: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The indices that count axes; how the others are called doesn't matter."""
    return ((name, n) for name, n in indices if name in found.architecture.axes)


each_case = pytest.mark.parametrize("name", cases())


@each_case
def test_each_dimension_is_what_its_label_says(name: str) -> None:
    found = resolved(name)
    keys = [key for family in found.families for key in family.members.values()]
    assert sorted(keys) == sorted(cases()[name].tensors)
    assert list(wrong(name, set())) == []


def test_each_improvement_is_one() -> None:
    used: set[tuple[str, str, str]] = set()
    for name in cases():
        assert not list(wrong(name, used))
    assert used == set(IMPROVED)
    labels = {
        label
        for case in cases().values()
        for tensor in case.tensors.values()
        for label in tensor.labels or ()
    }
    words = {word for label in labels for word in re.findall(r"[\w.]+", label)}
    assert set(RENAMED) <= words
    axes = {axis for name in cases() for axis in resolved(name).architecture.axes}
    assert set(RENAMED.values()) <= axes


def test_a_wrong_label_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def relabelled(old: str, new: str) -> list[str]:
        case = cases()["llama"]
        tensors = {
            key: replace(tensor, labels=tuple(new if x == old else x for x in tensor.labels or ()))
            for key, tensor in case.tensors.items()
        }
        monkeypatch.setattr(f"{__name__}.cases", lambda: {"llama": replace(case, tensors=tensors)})
        found = list(wrong("llama", set()))
        monkeypatch.undo()
        return found

    assert relabelled("mlp:in", "mlp:in") == []
    for old, new in (
        ("mlp:in", "mlp:out"),
        ("embed:in", "embed"),
        ("embed:out", "heads*head_dim:out"),
        ("kv_heads*head_dim:out", "head_dim*kv_heads:out"),
    ):
        assert relabelled(old, new), new


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2*a", "a+a", True),
        ("(a+b)*c", "a*c+b*c", True),
        ("a*(b+2)*c", "a*(b+1+1)*c", True),
        ("(2*a)*b", "2*(a*b)", True),
        ("a*2", "2*a", False),
        ("a*b", "b*a", False),
        ("a*(b+c)", "a*b+a*c", False),
        ("a+b", "b+a", False),
    ],
)
def test_layouts_are_the_same_where_they_lie_alike(one: str, other: str, same: bool) -> None:
    found = [layout(parse_expression(text), lambda _: None) for text in (one, other)]
    assert (found[0] == found[1]) is same


# The catalogue.


def test_each_model_type_of_the_drafts_is_served() -> None:
    assert not set(MODEL_TYPES.split()) - set(registry.model_types())
    labelled = {
        str(case.config.get("model_type", "timm:vision_transformer")) for case in cases().values()
    }
    assert labelled <= set(MODEL_TYPES.split())
    assert len(cases()) == 113
    assert len(labelled) == 104


def test_each_model_type_has_a_tiny_model() -> None:
    proved = {m.model_type for name in registry.names() for m in registry.tiny_models(name)}
    assert set(registry.model_types()) - proved == UNPROVED


# Requests.


def leaves(config: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for field, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{field}.")
        else:
            yield path + field, value


def changes(before: LazyCheckpoint, after: LazyCheckpoint) -> dict[str, tuple[object, object]]:
    """Field of config.json -> its value before and after, where they differ."""
    assert before.config is not None
    assert after.config is not None
    old, new = dict(leaves(before.config)), dict(leaves(after.config))
    return {
        field: (old.get(field), new.get(field))
        for field in old | new
        if old.get(field) != new.get(field)
    }


def said_once_changed(lazy: LazyCheckpoint) -> set[str]:
    """Fields that a config.json need not have, and that say a size once it changes."""
    written = lazy.plan.model.architecture.written.values()
    return {field for fields in written for field in fields}


def check_widths(small: LazyCheckpoint, large: LazyCheckpoint) -> None:
    """All widths of `large` are twice those of `small`, and all else is the same."""
    for field, (value, other) in changes(small, large).items():
        if None in (value, other) and field in said_once_changed(small):
            continue
        assert isinstance(value, int), field
        assert isinstance(other, int), field
        assert other == 2 * value, field
    found = small.plan.model
    assert _family_names(found) == _family_names(large.plan.model)
    spec = found.architecture
    for axis, n in found.sizes.items():
        if spec.axes[axis].kind in ("depth", "frozen", "expert"):
            assert large.sizes[axis] == n, axis
        elif any(axis in spec.spaces.get(space, ()) for space in ("hidden", "heads", "mlp")):
            assert large.sizes[axis] == 2 * n, axis
        elif axis in spec.spaces.get("kv_heads", ()):
            # Where they are too few to be halved, there are half as many queries for each.
            assert large.sizes[axis] in (n, 2 * n), axis


def _family_names(found: Model) -> set[str]:
    return {family.name for family in found.families if family.rule.kind != "drop"}


@each_case
def test_twice_the_width_and_back_is_the_source(name: str) -> None:
    source = lazy(name)
    grown = source.decoalesce(width=2)
    check_widths(source, grown)
    merged = grown.coalesce()
    assert merged.plan.specs == source.plan.specs
    assert set(changes(source, merged)) <= said_once_changed(source)


@each_case
def test_half_the_width(name: str) -> None:
    source = lazy(name)
    if name in NOT_HALVED:
        with pytest.raises(SchemeError, match=NOT_HALVED[name]):
            source.coalesce(width=2)
        return
    check_widths(source.coalesce(width=2), source)


@each_case
def test_half_of_the_layers_of_each_kind(name: str) -> None:
    source = lazy(name)
    found = source.plan.model
    kept = {axis: _half(found.kinds(axis)) for axis in found.architecture.depth_axes}
    result = source.coalesce(axes={axis: [[i] for i in some] for axis, some in kept.items()})
    assert {axis: result.sizes[axis] for axis in kept} == {a: len(i) for a, i in kept.items()}
    assert result.plan.specs == _with_layers(found, source.plan.specs, kept)
    told: dict[str, object] = {}
    for field, (old, new) in changes(source, result).items():
        last = field.rpartition(".")[2]
        if field in FEWER_LAYERS.get(name, {}):
            told[field] = new
        elif last in COUNTS:
            assert new in [len(some) for some in kept.values()], field
        elif last in LISTS:
            assert isinstance(old, list), field
            assert any(new == [old[i] for i in s] for s in kept.values() if max(s) < len(old)), (
                field
            )
        else:
            told[field] = new
    assert told == FEWER_LAYERS.get(name, {})


def _half(kinds: Sequence[LayerKind]) -> list[int]:
    """The first half of the layers of each kind."""
    return [i for i, kind in enumerate(kinds) if 2 * kinds[:i].count(kind) < kinds.count(kind)]


def _with_layers(
    found: Model, specs: Mapping[str, TensorSpec], kept: Mapping[str, Sequence[int]]
) -> dict[str, TensorSpec]:
    """The tensors of the layers that are kept, counted anew, and of no layer."""
    resized = replace(found, sizes={**found.sizes, **{a: len(some) for a, some in kept.items()}})
    expected: dict[str, TensorSpec] = {}
    for family in found.families:
        for values, key in family.members.items():
            at = dict(zip(family.indices, values, strict=True))
            if any(axis in at and at[axis] not in some for axis, some in kept.items()):
                continue
            for axis in kept.keys() & at.keys():
                at[axis] = kept[axis].index(at[axis])
            shape = (
                n if dim.expression is None else resized.size(dim.expression)
                for n, dim in zip(specs[key].shape, family.dims, strict=True)
            )
            new = family.key(tuple(at[index] for index in family.indices))
            expected[new] = TensorSpec(specs[key].dtype, tuple(shape))
    return expected
