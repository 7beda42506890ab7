"""Learned maps against einsum in float64: LiGO's widths and layer weights, rotations, signs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammap
from streammap.architectures.schema import TinyModel
from streammap.errors import SchemeError
from streammap.tools.spec_proof import tiny_models
from tests.support import tiny
from tests.support.tiny import State
from tests.support.typed import ok, run

F64 = torch.float64
SIZES = tiny.Sizes(heads=2, layers=3, head_dim=3, vocab=5)
NEW = tiny.Sizes(heads=3, layers=5, head_dim=3, vocab=5)
QUICK = ("--no-fsync", "--class-check", "never")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def saved(path: Path, maps: Mapping[str, Tensor]) -> Path:
    if path.suffix == ".npz":
        numpy = pytest.importorskip("numpy")
        numpy.savez(path, **{name: x.numpy() for name, x in maps.items()})
    else:
        save_file({name: x.contiguous() for name, x in maps.items()}, path)
    return path


def double(state: State) -> State:
    return {key: x.to(F64) for key, x in state.items()}


def refused(*arguments: object) -> str:
    """What a command that must fail says."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    return result.output


LIGO = {
    "hidden.matrix": random(NEW.embed, SIZES.embed, seed=1),
    "hidden.reader": random(SIZES.embed, NEW.embed, seed=2),
    "qk.matrix": random(NEW.embed, SIZES.embed, seed=3),
    "v.matrix": random(NEW.embed, SIZES.embed, seed=4),
    "mlp.matrix": random(NEW.mlp, SIZES.mlp, seed=5),
    "layer.matrix": random(NEW.layers, SIZES.layers, seed=6),
    "layer.query.matrix": random(NEW.layers, SIZES.layers, seed=7),
    "layer.*output.dense*.matrix": random(NEW.layers, SIZES.layers, seed=8),
}


def ligo(state: State) -> State:
    """LiGO by hand: W' = P_out (sum of w_j W_j) C_in, arXiv:2303.00980."""
    p, c = LIGO["hidden.matrix"], LIGO["hidden.reader"]
    qk, v, mlp = LIGO["qk.matrix"], LIGO["v.matrix"], LIGO["mlp.matrix"]

    def sides(key: str) -> tuple[Tensor | None, Tensor | None]:
        """The map of rows, and of columns [old, new]."""
        if "embeddings" in key and not key.startswith("embeddings.LayerNorm"):
            return None, p.T
        if "query" in key or "key" in key:
            return qk, c
        if "value" in key:
            return v, c
        if "attention.output.dense" in key:
            return p, v.T
        if "intermediate" in key:
            return mlp, c
        if "output.dense" in key:
            return p, mlp.T
        return p, c

    def mapped(key: str, x: Tensor) -> Tensor:
        rows, columns = sides(key)
        if x.dim() == 1:
            return x if rows is None else torch.einsum("ij,j->i", rows, x)
        x = x if rows is None else torch.einsum("ij,jk->ik", rows, x)
        return x if columns is None else torch.einsum("ik,kl->il", x, columns)

    made = {}
    for key, x in state.items():
        if not key.startswith("encoder.layer."):
            made[key] = mapped(key, x)
    for name in (key.split(".", 3)[3] for key in state if key.startswith("encoder.layer.0.")):
        stack = torch.stack([state[f"encoder.layer.{j}.{name}"] for j in range(SIZES.layers)])
        own = "layer.matrix"
        own = "layer.query.matrix" if "query" in name else own
        own = "layer.*output.dense*.matrix" if "output.dense" in name else own
        for i in range(NEW.layers):
            key = f"encoder.layer.{i}.{name}"
            made[key] = mapped(key, torch.einsum("j,j...->...", LIGO[own][i], stack))
    return made


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_ligo_is_einsum_in_float64(ending: str, tmp_path: Path) -> None:
    state = double(tiny.bert(SIZES))
    source = tiny.write(tmp_path / "small", state, tiny.bert_config(SIZES))
    file = saved(tmp_path / f"ligo.{ending}", LIGO)
    lazy = streammap.open(source).remap(maps=file)
    assert lazy.promise[0] == "approximate"
    lazy.save(tmp_path / "python", fsync=False, class_check="never")
    ok("remap", source, tmp_path / "cli", "--maps", file, *QUICK)
    expected = ligo(state)
    for folder in ("python", "cli"):
        found = tiny.written(tmp_path / folder)
        assert found.keys() == expected.keys()
        for key, x in expected.items():
            torch.testing.assert_close(found[key], x, rtol=1e-12, atol=1e-12)
    config = json.loads((tmp_path / "cli" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (NEW.embed, NEW.layers)
    assert (config["num_attention_heads"], config["intermediate_size"]) == (NEW.heads, NEW.mlp)
    file.unlink()  # the record holds the maps
    ok("apply", tmp_path / "cli", tmp_path / "again", *QUICK)
    # Matrix products add in an order of their own.
    for key, x in tiny.written(tmp_path / "cli").items():
        torch.testing.assert_close(tiny.written(tmp_path / "again")[key], x, rtol=1e-12, atol=1e-12)


def test_matrices_of_each_layer_are_einsum_in_float64(tmp_path: Path) -> None:
    state = double(tiny.bert(SIZES))
    source = tiny.write(tmp_path / "small", state, tiny.bert_config(SIZES))
    p = [random(9, SIZES.mlp, seed=20 + i) for i in range(SIZES.layers)]
    c = [random(SIZES.mlp, 9, seed=30 + i) for i in range(SIZES.layers)]
    maps = {f"mlp@{i}.matrix": p[i] for i in range(SIZES.layers)}
    maps |= {f"mlp@{i}.reader": c[i] for i in (0, 2)}  # layer 1 is read by P transposed
    file = saved(tmp_path / "maps.npz", maps)
    expected = dict(state)
    for i in range(SIZES.layers):
        at = f"encoder.layer.{i}."
        rows, bias = (state[f"{at}intermediate.dense.{part}"] for part in ("weight", "bias"))
        expected[f"{at}intermediate.dense.weight"] = torch.einsum("ij,jk->ik", p[i], rows)
        expected[f"{at}intermediate.dense.bias"] = torch.einsum("ij,j->i", p[i], bias)
        reader = p[i].T if i == 1 else c[i]
        read = state[f"{at}output.dense.weight"]
        expected[f"{at}output.dense.weight"] = torch.einsum("ik,kl->il", read, reader)
    lazy = streammap.open(source).remap(maps=file)
    assert lazy.promise[0] == "approximate"
    lazy.save(tmp_path / "python", fsync=False, class_check="never")
    ok("remap", source, tmp_path / "cli", "--maps", file, *QUICK)
    for folder in ("python", "cli"):
        found = tiny.written(tmp_path / folder)
        assert found.keys() == expected.keys()
        for key, x in expected.items():
            torch.testing.assert_close(found[key], x, rtol=1e-12, atol=1e-12)


def test_a_template_has_the_names_and_shapes_of_a_model(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "small", double(tiny.bert(SIZES)), tiny.bert_config(SIZES))
    plain = tmp_path / "plain.safetensors"
    assert f"embed.matrix  [{SIZES.embed}, {SIZES.embed}]" in ok("maps", "template", source, plain)
    same = streammap.open(source).remap(maps=plain)
    assert same.promise[0] in ("bit-exact", "exact")
    tiny.assert_same({key: same.read(key) for key in same.keys()}, tiny.written(source))  # noqa: SIM118
    file = tmp_path / "filled.safetensors"
    wanted = ("--size", "mlp=10", "--size", "layer=5")
    ok("maps", "template", source, file, *wanted)
    made = load_file(file)
    assert {name: list(x.shape) for name, x in made.items()} == {
        "mlp.matrix": [10, SIZES.mlp],
        "layer.matrix": [5, SIZES.layers],
    }
    for x in made.values():
        assert torch.equal(x, torch.eye(*x.shape))
    said = ok("maps", "check", file, source)
    assert f"mlp  {SIZES.mlp} -> 10" in said
    about = json.loads(ok("maps", "check", file, source, "--json"))
    assert about["guarantee"] == streammap.open(source).remap(maps=file).promise[0]
    assert about["maps"]["layer"][:2] == [SIZES.layers, 5]
    assert about["axes"].keys() >= {"mlp", "layer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "hidden"), "--size hidden: expected AXIS=N"),
        (("--size", "hidden=0"), "expected AXIS=N"),
        (("--size", "vocab=9"), "has no axis 'vocab' that can be mapped"),
        (("--size", "width=9"), "has no axis 'width' that can be mapped"),
    ],
)
def test_templates_that_fit_no_model_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    source = tiny.write(tmp_path / "small", tiny.bert(SIZES), tiny.bert_config(SIZES))
    file = tmp_path / "maps.safetensors"
    said = refused("maps", "template", source, file, *arguments)
    assert message in said
    assert "hint" in said
    assert not file.exists()


def test_a_template_replaces_no_file(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "small", tiny.bert(SIZES), tiny.bert_config(SIZES))
    file = tiny.file(tmp_path / "maps.safetensors", b"mine")
    assert "is there already" in refused("maps", "template", source, file)
    assert file.read_bytes() == b"mine"
    assert "expected a name ending in .safetensors" in refused(
        "maps", "template", source, tmp_path / "maps.npz"
    )
    assert "hint" in refused("maps", "check", file, source)


REFUSED: tuple[tuple[dict[str, Tensor], str], ...] = (
    ({"hidden": random(9, 6)}, "'hidden' is no name of a map, expected NAME.matrix or NAME.reader"),
    ({"hidden.matrx": random(9, 6)}, "'hidden.matrx' is no name of a map"),
    ({"width.matrix": random(9, 6)}, "bert has no axis 'width' that can be mapped"),
    ({"vocab.matrix": random(9, 5)}, "no axis 'vocab' that can be mapped"),
    ({"hidden.matrix": random(6, 9)}, r"shape \[6, 9\], expected \[new, 6\]: the model has 6"),
    (
        {"hidden.matrix": random(9, 6), "hidden.reader": random(9, 6)},
        r"hidden.reader: shape \[9, 6\], expected \[6, 9\] \(old, new\)",
    ),
    ({"hidden.reader": random(9, 6)}, "hidden.reader: no hidden.matrix beside it"),
    ({"hidden.matrix": random(9, 6)[0]}, r"float64 of shape \[6\], expected a matrix"),
    ({"mlp.matrix": torch.ones(4, 6, dtype=torch.int64)}, "int64 of shape"),
    ({"mlp.matrix": torch.full((6, 6), torch.nan)}, "mlp.matrix has numbers that are infinite or"),
    ({"layer.matrix": random(4, 4)}, r"shape \[4, 4\], expected \[new, 3\]: the model has 3 layer"),
    (
        {"layer.matrix": random(4, 3), "layer.query.matrix": random(5, 3)},
        "layer.query.matrix makes 5 layers",
    ),
    ({"layer.query.matrix": random(4, 3)}, "no weights of layers for"),
    (
        {"layer.matrix": random(4, 3), "layer.qery.matrix": random(4, 3)},
        "no key of a layer has 'qe",
    ),
    ({"mlp@7.matrix": random(6, 6)}, "of maps for each layer there is none for layer 0"),
    ({"mlp@0.matrix": random(6, 6), "mlp.matrix": random(6, 6)}, "one map for all layers, and"),
    ({}, "no maps in it"),
)


@pytest.mark.parametrize(("maps", "match"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_refused_names_the_map(maps: dict[str, Tensor], match: str, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "small", tiny.bert(SIZES), tiny.bert_config(SIZES))
    with pytest.raises(SchemeError, match=match) as refusal:
        streammap.open(source).remap(maps=saved(tmp_path / "maps.safetensors", maps))
    assert refusal.value.hint


@pytest.mark.parametrize("name", ["maps.npz", "maps.safetensors"])
def test_a_file_of_anything_else_is_refused(name: str, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "small", tiny.bert(SIZES), tiny.bert_config(SIZES))
    with pytest.raises(SchemeError):
        streammap.open(source).remap(maps=tmp_path / "nowhere" / name)
    with pytest.raises(SchemeError):
        streammap.open(source).remap(maps=tiny.file(tmp_path / name, b"PK\x03\x04 nothing" * 9))


def llama(layers: int, seed: int, gains: str) -> tuple[State, dict[str, Any]]:
    e, m, vocab = 8, 12, 7
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, e),
        "model.norm.weight": (e,),
        "lm_head.weight": (vocab, e),
    }
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (e, e) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (m, e) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (e, m)}
        shapes |= {f"{at}{n}_layernorm.weight": (e,) for n in ("input", "post_attention")}
    state = double(tiny.random(shapes, seed=seed))
    if gains == "ones":
        state |= {k: torch.ones_like(x) for k, x in state.items() if x.dim() == 1}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": e,
        "intermediate_size": m,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return state, config


def rotated(state: State, q: Tensor, gain: Tensor) -> State:
    """One Q for all layers by hand: embeddings E Q^T, writers Q W, readers W Q^T."""
    made = {}
    for key, x in state.items():
        if x.dim() == 1:
            made[key] = gain @ x
        elif "o_proj" in key or "down_proj" in key:
            made[key] = torch.einsum("ij,jk->ik", q, x)
        else:
            made[key] = torch.einsum("ij,kj->ik", x, q)
    return made


ROTATION = torch.linalg.qr(random(8, 8, seed=9)).Q
SIGNED = torch.diag(torch.tensor([1, -1, 1, 1, -1, -1, 1, -1], dtype=F64))[[3, 0, 7, 1, 2, 6, 5, 4]]


@pytest.mark.parametrize(("q", "gains"), [(ROTATION, "ones"), (SIGNED, "any")])
def test_a_rotation_keeps_the_function(q: Tensor, gains: str, tmp_path: Path) -> None:
    state, config = llama(2, 3, gains)
    source = tiny.write(tmp_path / "llama", state, config)
    lazy = streammap.open(source).remap(maps=saved(tmp_path / "q.npz", {"embed.matrix": q}))
    assert lazy.promise[0] == "exact", lazy.promise
    lazy.save(tmp_path / "out", fsync=False, class_check="never")
    found, expected = (
        tiny.written(tmp_path / "out"),
        rotated(state, q, q.abs() if gains == "any" else torch.eye(8, dtype=F64)),
    )
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=1e-12, atol=1e-12)


def test_promises_are_computed(tmp_path: Path) -> None:
    ones, config = llama(1, 3, "ones")
    folded = streammap.open(tiny.write(tmp_path / "ones", ones, config))
    gains = streammap.open(tiny.write(tmp_path / "gains", llama(1, 3, "any")[0], config))

    def promise(lazy: streammap.LazyCheckpoint, **maps: Tensor) -> Any:
        named = {name.replace("_", "."): x for name, x in maps.items()}
        return lazy.remap(maps=saved(tmp_path / "maps.safetensors", named)).promise

    assert "fold them into what reads it (--fold-gains)" in promise(gains, embed_matrix=ROTATION)[1]
    assert "C P differs from I by" in promise(folded, embed_matrix=ROTATION * 1.01)[1]
    wide = torch.cat([torch.eye(8, dtype=F64), random(2, 8)])
    reader = torch.eye(8, 10, dtype=F64)
    assert (
        "P is no rotation under an RMS norm"
        in promise(folded, embed_matrix=wide, embed_reader=reader)[1]
    )
    copies = torch.eye(12, dtype=F64)[[*range(12), 0, 1]]
    shares = torch.linalg.pinv(copies)
    assert promise(gains, mlp_matrix=copies, mlp_reader=shares)[0] == "exact"
    turned = torch.linalg.qr(random(12, 12)).Q
    assert "is not linear" in promise(gains, mlp_matrix=turned)[1]


LLAMA = TinyModel(
    "llama",
    "LlamaForCausalLM",
    {
        "vocab_size": 31,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    },
)


@pytest.mark.slow
@pytest.mark.parametrize(("q", "gains"), [(ROTATION, "ones"), (SIGNED, "any")])
@pytest.mark.parametrize("tied", [False, True])
def test_rotated_models_compute_the_same(tied: bool, q: Tensor, gains: str, tmp_path: Path) -> None:
    model = replace(LLAMA, config={**LLAMA.config, "tie_word_embeddings": tied})
    source = tmp_path / "llama"
    tiny_models.build(model, source)
    if gains == "ones":
        state = tiny.written(source)
        state |= {key: torch.ones_like(x) for key, x in state.items() if x.dim() == 1}
        save_file(state, source / "model.safetensors")
    lazy = streammap.open(source).remap(maps=saved(tmp_path / "q.npz", {"hidden.matrix": q}))
    assert lazy.promise[0] == "exact"
    lazy.save(tmp_path / "out", fsync=False)
    found = tiny_models.outputs(tmp_path / "out", model)
    expected = tiny_models.outputs(source, model)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-10, atol=1e-10)
