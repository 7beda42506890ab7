"""Random requests on random variants of the tiny models: each promise is held against outputs.

A seed draws a model, switches of its config (biases, ties, clips, norms that are left out, top_k,
lists that transformers derives), and a request. What is refused needs a hint; what is promised must
hold in strict float64, and so must the way back. STREAMMAP_REQUESTS says how many seeds are drawn,
STREAMMAP_FIRST_REQUEST the first of them.
"""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import StreammapError
from streammap.planning.by_layer import layered
from streammap.tools.spec_proof import comparison, tiny_models
from tests.support import truth
from tests.support.truth import Bench, Outputs

transformers = pytest.importorskip("transformers")

N_REQUESTS = int(os.environ.get("STREAMMAP_REQUESTS", "60"))
FIRST = int(os.environ.get("STREAMMAP_FIRST_REQUEST", "0"))
ALLOWED = {"bit-exact": 0.0, "exact": comparison.TOLERANCE, "exact up to eps": 1e-2}
SWITCHES: Mapping[str, tuple[object, ...]] = {
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "qkv_bias": (True, False),
    "mlp_bias": (True, False),
    "use_bias": (True, False),
    "use_qkv_bias": (True, False),
    "bias": (True, False),
    "lm_head_bias": (True, False),
    "norm_bias": (True, False),
    "clip_qkv": (None, 0.4),
    "_remove_final_layer_norm": (True, False),
    "do_layer_norm_before": (True, False),
    "layer_norm_elementwise_affine": (True, False),
    "enable_bias": (True, False),
    "norm_topk_prob": (True, False),
    "num_experts_per_tok": (1, 2, 3),
    "moe_topk": (1, 2),
    "use_qk_norm": (True, False),
    "qk_layernorm": (True, False),
    "parallel_attn": (True, False),
    "use_parallel_residual": (True, False),
    "scale_attn_by_inverse_layer_idx": (True, False),
    "scale_embedding": (True, False),
    "attn_logit_softcapping": (None, 5.0),
    "final_logit_softcapping": (None, 5.0),
    "use_sliding_window": (True, False),
    "sliding_window": (4, 8),
    "layer_types": (None,),
    "rms_norm_eps": (1e-6, 1e-4),
    "layer_norm_eps": (1e-5, 1e-4),
    "residual_multiplier": (1.0, 0.3),
    "logits_scaling": (1.0, 4.0),
    "apply_residual_connection_post_layernorm": (True, False),
    "apply_layernorm": (True, False),
    "decoder_sparse_step": (1, 2),
    "num_key_value_heads": (1, 3, 6),
    "head_dim": (6, 10),
}
LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type", "moe_layers")
"""Per-layer lists that transformers derives where config.json lacks them."""
MODELS = tuple(
    (arch, model)
    for arch in registry.names()
    for model in registry.tiny_models(arch)
    if not model.class_name.startswith("timm:") and not model.shapes_only
)


@dataclass(frozen=True, slots=True)
class Case:
    """What a seed has drawn."""

    seed: int
    arch: str
    model: TinyModel
    switches: Mapping[str, object]
    without: tuple[str, ...]
    """Lists that config.json lacks."""
    folder: Path
    expected: Outputs

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.model.name} {self.switches} without {self.without}"


def fields_of(model: TinyModel) -> set[str]:
    """The fields that a model's config class has."""
    kind = getattr(transformers, model.class_name).config_class
    return set(kind(**model.config).to_dict())


def drawn(seed: int, folder: Path) -> Case | None:
    """A variant of a model; None where transformers makes or runs none."""
    rng = random.Random(seed)
    arch, model = rng.choice(MODELS)
    known = sorted(SWITCHES.keys() & (fields_of(model) | model.config.keys()))
    names = rng.sample(known, min(len(known), rng.choice((0, 1, 1, 2, 3))))
    switches = {name: rng.choice(SWITCHES[name]) for name in names}
    variant = replace(model, config={**model.config, **switches})
    try:
        tiny_models.build(variant, folder, seed=seed)
        expected = tiny_models.outputs(folder, variant)
        without = tuple(name for name in LISTS if rng.random() < 0.5 and lacks(folder, name))
        if without and truth.difference(tiny_models.outputs(folder, variant), expected):
            return None  # The list said something else than what is derived.
    except Exception:  # Whatever the model's own code says to sizes that don't fit.
        return None
    if not all(bool(x.isfinite().all()) for x in expected.values()):
        return None
    return Case(seed, arch, variant, switches, without, folder, expected)


def lacks(folder: Path, name: str) -> bool:
    """Take a list out of config.json; whether it was there."""
    config = json.loads((folder / "config.json").read_text())
    if config.pop(name, None) is None:
        return False
    (folder / "config.json").write_text(json.dumps(config))
    return True


def request(rng: random.Random, lazy: LazyCheckpoint) -> dict[str, Any]:
    """Options of a growth."""
    sizes, spec = lazy.sizes, lazy.plan.model.architecture
    if rng.random() < 0.2:
        options: dict[str, Any] = {"width": rng.choice((2, 3))}
    else:
        asked: dict[str, Any] = {}
        axes = [
            name
            for name, size in sizes.items()
            if size and spec.axes[name].kind in ("width", "expert", "depth")
        ]
        for name in rng.sample(axes, min(len(axes), rng.choice((1, 1, 2, 3)))):
            asked[name] = resized(rng, sizes[name], spec.axes[name].kind)
        options = {"axes": asked}
        if any(spec.axes[name].kind == "depth" for name in asked) and rng.random() < 0.8:
            options["new_layers"] = "zero"
        if any(spec.axes[name].kind == "expert" for name in asked) and rng.random() < 0.5:
            options["top_k"] = rng.choice(("keep", "scale", 1, 2, 4))
    if rng.random() < 0.3:
        options["grouping"] = "adjacent"
    if lazy.plan.model.tied and rng.random() < 0.3:
        options["untie"] = True
    if spec.rope and rng.random() < 0.3:
        options["head_dim"] = sizes[next(iter(spec.rope))] * rng.choice((2, 3)) // 2 * 2
    return options


def resized(rng: random.Random, n: int, kind: str) -> Any:
    """A factor, a size, or groups."""
    way = rng.choice(("factor", "size", "size", "groups"))
    if way == "factor":
        return {"factor": 2, "grouping": rng.choice(("stacked", "adjacent"))}
    if way == "size":
        return f"={n + rng.choice((1, 2, n // 2, n // 3, n))}"
    groups: list[list[int]] = [[i] for i in range(n)]
    for extra in range(n, n + rng.randint(1, n)):
        rng.choice(groups).append(extra)
    if kind == "depth" or rng.random() < 0.5:
        return groups
    weights = [[rng.choice((1, 2, 3)) for _ in group] for group in groups]
    return {
        "groups": [
            {"members": group, "weights": shares}
            for group, shares in zip(groups, weights, strict=True)
        ]
    }


def request_by_layer(rng: random.Random, lazy: LazyCheckpoint) -> dict[str, Any]:
    """Options of a growth of one axis or two by maps of their own in each layer."""
    model = lazy.plan.model
    places = {
        axis: found.layers
        for axis, size in lazy.sizes.items()
        if size and model.architecture.axes[axis].kind in ("width", "expert")
        if (found := layered.lies(model, axis)).layers and found.shared is None
    }
    asked: dict[str, Any] = {}
    for axis in rng.sample(sorted(places), min(len(places), rng.choice((1, 1, 2)))):
        n = lazy.sizes[axis]
        n_new = 2 * n if rng.random() < 0.7 else n + rng.randint(1, n)
        asked[axis] = {
            f"{depth}.{number}": one_layer(rng, n, n_new) for depth, number in places[axis]
        }
    options: dict[str, Any] = {"axes": asked}
    if rng.random() < 0.3:
        depth = rng.choice(model.architecture.depth_axes)
        options["axes"] = {**asked, depth: 2}
        options["new_layers"] = "zero"
    if any(model.architecture.axes[axis].kind == "expert" for axis in asked):
        options["top_k"] = rng.choice(("keep", "scale", 2))
    return options


def one_layer(rng: random.Random, n: int, n_new: int) -> Any:
    """The request of one layer: units in any order, even shares or weights; or twice as many."""
    if n_new == 2 * n and rng.random() < 0.3:
        return {"factor": 2, "grouping": rng.choice(("stacked", "adjacent"))}
    units = rng.sample(range(n_new), n_new)
    groups = [[unit] for unit in units[:n]]
    for unit in units[n:]:
        rng.choice(groups).append(unit)
    if rng.random() < 0.6:
        return groups
    shares = [[rng.choice((1, 2, 3)) for _ in group] for group in groups]
    return {
        "groups": [
            {"members": group, "weights": own} for group, own in zip(groups, shares, strict=True)
        ]
    }


Request = Callable[[random.Random, LazyCheckpoint], dict[str, Any]]


def broken(case: Case, bench: Bench, counts: Counter[str], drawn_by: Request) -> Iterator[str]:
    """What does not hold of a request."""
    rng = random.Random(case.seed)
    options: dict[str, Any] = {}
    try:
        source = streammap.open(case.folder)
        options = drawn_by(rng, source)
        lazy = source.decoalesce(**options)
        promise = lazy.promise[0]
        grown = bench.saved(lazy)
    except StreammapError as refusal:
        counts["refused"] += 1
        if not refusal.hint:
            yield f"{case} {options}: {refusal}: no hint"
        return
    counts[promise] += 1
    allowed = ALLOWED.get(promise)
    if allowed is None:
        return
    error = difference(tiny_models.outputs(grown, case.model), case.expected)
    if error is None:
        counts["not compared"] += 1
        return
    if error > allowed:
        yield f"{case} {options}: {error:.1e}, promised {lazy.promise}"
    back = streammap.open(grown)
    if not back.plan.levels or options.get("untie"):
        return
    counts["ways back"] += 1
    smaller = back.coalesce().save(grown.with_name("back"), overwrite=True, fsync=False)
    error = difference(tiny_models.outputs(Path(smaller.output), case.model), case.expected)
    if error is None or error > comparison.TOLERANCE:
        yield f"{case} {options}: the way back is {error} off"


def difference(found: Outputs, expected: Outputs) -> float | None:
    """The error of logits; None where a width of hidden states was resized."""
    if any(found[name].shape != x.shape for name, x in expected.items()):
        return None
    return truth.difference(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("drawn_by", [request, request_by_layer])
def test_random_requests_keep_their_promises(scratch: Path, drawn_by: Request) -> None:
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for seed in range(FIRST, FIRST + N_REQUESTS):
        case = drawn(seed, scratch / f"source-{seed}")
        if case is None:
            counts["not made"] += 1
            continue
        try:
            failures += broken(case, Bench(scratch), counts, drawn_by)
        except Exception as error:
            failures.append(f"{case}: {type(error).__name__} {error}")
    sys.stdout.write(f"{N_REQUESTS} requests: {dict(counts)}, broken: {len(failures)}\n")
    assert not failures, "\n".join(failures)
