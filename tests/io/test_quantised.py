"""Quantised checkpoints, through commands and calls: as if they were stored in bfloat16."""

import json
import shutil
import uuid
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import streammap
from streammap.errors import CheckpointError
from streammap.testing import faults
from tests.support import quantised, tiny
from tests.support.quantised import Quantised
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=4, layers=4, head_dim=3, mlp_per_head=5)
BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
FIELD = "quantization_config"
MEAN, WIDE = (0.3, -0.6, 0.9), "embeddings=float32,pooler=float32,bfloat16"


def is_linear(key: str) -> bool:
    return key.startswith("encoder") and key.endswith(".weight") and "Norm" not in key


def fp8(*, seed: int = 0, scale_dtype: torch.dtype = torch.float32) -> Quantised:
    state = tiny.bert(SIZES, seed=seed)
    return quantised.fp8_blocks(state, is_linear, size=8, scale_dtype=scale_dtype)


def pair(folder: Path, made: Quantised, table: object = BLOCKS, *, n_shards: int = 3) -> Path:
    """folder/in, quantised, and folder/plain, what it means."""
    folder.mkdir(exist_ok=True)
    # A class of its own is not asked: importing transformers takes longer than all of this.
    own = {"auto_map": {"AutoModel": "own.Model"}}
    config = {**tiny.bert_config(SIZES), "torch_dtype": "bfloat16", **own}
    tiny.write(folder / "plain", made.meant, config)
    tiny.write(folder / "in", made.stored, {**config, FIELD: table}, n_shards=n_shards)
    return folder


@pytest.fixture
def both(tmp_path: Path) -> Path:
    return pair(tmp_path / "both", fp8())


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_it_is_what_its_codes_and_scales_mean(tmp_path: Path, scale: torch.dtype) -> None:
    made = fp8(scale_dtype=scale)
    if scale == torch.float8_e8m0fnu:  # the safetensors library of tests can't write it
        made.stored = {
            key: x.view(torch.uint8) if x.dtype == scale else x for key, x in made.stored.items()
        }
    folder = pair(tmp_path / "both", made)
    tiny.assert_same(tiny.opened(folder / "in"), made.meant)
    key = next(key for key in made.stored if key.endswith("_scale_inv")).removesuffix("_scale_inv")
    lazy = streammap.open(folder / "in")
    part = lazy.read(key, region=(slice(1, 6), slice(3, 9)))
    assert tiny.bits(part) == tiny.bits(made.meant[key][1:6, 3:9])


def test_saved_it_is_a_plain_checkpoint(both: Path) -> None:
    report = streammap.open(both / "in").save(both / "out")
    tiny.assert_same(tiny.written(both / "out"), tiny.written(both / "plain"))
    config = json.loads((both / "out" / "config.json").read_text())
    assert FIELD not in config
    assert config["torch_dtype"] == "bfloat16"
    assert any("24 tensors are quantised (fp8 blocks of 8 x 8), read as bfloat16" in n
               for n in report.notes)  # fmt: skip
    ok("verify", both / "out", "--recompute", 20)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("options", [{"width": 2, "depth": 2}, {"layers": [[0], [1], [3]]}])
def test_operators_make_of_it_what_they_make_of_plain_weights(
    both: Path, options: dict[str, object], threads: int
) -> None:
    for name in ("in", "plain"):
        made = streammap.open(both / name).coalesce(**options)  # type: ignore[arg-type]
        made.save(both / f"{name}-out", threads=threads, memory="32MiB")
    tiny.assert_same(tiny.written(both / "in-out"), tiny.written(both / "plain-out"))
    ok("verify", both / "in-out", "--recompute", 20)


def test_commands_read_it_too(both: Path) -> None:
    told = ok("plan", "coalesce", both / "in", "--width", 2)
    assert "24 tensors are quantised (fp8 blocks of 8 x 8), read as bfloat16" in told
    assert "quantization_config (fp8) is left out" in told
    ok("coalesce", both / "in", both / "a", "--width", 2)
    ok("coalesce", both / "plain", both / "b", "--width", 2)
    tiny.assert_same(tiny.written(both / "a"), tiny.written(both / "b"))
    assert run("diff", both / "in", both / "plain").exit_code == 0
    assert "BF16" in ok("inspect", both / "in")
    ok("inspect", both / "in", "--health")
    assert run("verify", both / "in").exit_code == 0


def test_it_is_blended_and_put_into_a_module(both: Path) -> None:
    other = pair(both / "other", fp8(seed=1))
    for name in ("in", "plain"):
        lazy = streammap.open(both / name).interpolate(other / name, alpha=0.25)
        lazy.save(both / f"{name}-mean")
    tiny.assert_same(tiny.written(both / "in-mean"), tiny.written(both / "plain-mean"))
    key = "encoder.layer.0.intermediate.dense"
    module = torch.nn.Linear(SIZES.embed, SIZES.mlp, dtype=torch.bfloat16)
    state = {f"{key}.weight": module.weight, f"{key}.bias": module.bias}

    class Holder(torch.nn.Module):
        pass

    holder: torch.nn.Module = Holder()
    inner = holder
    for name in key.split(".")[:-1]:
        inner.add_module(name, Holder())
        inner = inner.get_submodule(name)
    inner.add_module(key.rpartition(".")[2], module)
    streammap.load_into(holder, both / "in", strict=False)
    plain = tiny.written(both / "plain")
    assert all(tiny.bits(x) == tiny.bits(plain[k]) for k, x in state.items())


def test_a_killed_run_goes_on(both: Path) -> None:
    def save() -> streammap.Report:
        lazy = streammap.open(both / "in").coalesce(width=2)
        return lazy.save(both / "out", max_shard_size=800, threads=1)

    with faults.counted() as count:
        save()
    whole = tiny.tree(both / "out")
    n_resumed = 0
    for n in (count.count // 3, count.count // 2, count.count * 2 // 3):
        shutil.rmtree(both / "out")
        assert faults.killed(save, n)
        n_resumed += save().n_resumed > 0
        assert tiny.tree(both / "out") == whole
    assert n_resumed


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantization_config_goes_wherever_it_stands(tmp_path: Path, *, nested: bool) -> None:
    made = fp8()
    folder = pair(tmp_path / "both", made, None)
    config = {**tiny.bert_config(SIZES)}
    config |= {"text_config": {FIELD: BLOCKS, "x": 1}} if nested else {FIELD: BLOCKS}
    (folder / "in" / "config.json").write_text(json.dumps(config))
    (folder / "in" / "hf_quant_config.json").write_text("{}")
    streammap.open(folder / "in").coalesce(width=2).save(folder / "out")
    assert FIELD not in (folder / "out" / "config.json").read_text()
    assert not (folder / "out" / "hf_quant_config.json").exists()


def test_codes_of_nan_stay_nan(tmp_path: Path) -> None:
    made = fp8()
    key = next(key for key in made.meant if is_linear(key))
    made.stored[key].view(torch.uint8)[0, :2] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    folder = pair(tmp_path / "both", made)
    found = streammap.open(folder / "in").read(key)
    assert found[0, :2].isnan().all()
    assert int(found.isnan().sum()) == 2


def test_a_missing_scale_is_told_before_anything_is_written(both: Path) -> None:
    state = {f"{k}_packed": x.view(torch.uint8) for k, x in fp8().stored.items() if is_linear(k)}
    tiny.write(both / "broken", state, {**tiny.bert_config(SIZES), FIELD: BLOCKS})
    result = run("coalesce", both / "broken", both / "out", "--width", 2)
    assert result.exit_code == 1
    assert "weight_scale is missing" in result.stderr
    assert not (both / "out").exists()
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        streammap.open(both / "broken")


# Tensors that stay as they are stored.


def test_copies_keep_codes_and_scales_byte_for_byte(both: Path) -> None:
    config = json.loads((both / "in" / "config.json").read_text())
    streammap.open(both / "in").keep_quantised().save(both / "out")
    ok("keep-quantised", both / "in", both / "typed")
    for name in ("out", "typed"):
        tiny.assert_same(tiny.written(both / name), tiny.written(both / "in"))
        assert json.loads((both / name / "config.json").read_text()) == config
        ok("verify", both / name, "--recompute", 20)


def test_layers_that_are_dropped_or_repeated_keep_theirs(tmp_path: Path) -> None:
    made = fp8()
    stem = "encoder.layer.{}.attention.self.{}"
    for i in range(SIZES.layers):
        made.stored[stem.format(i, "key.input_scale")] = torch.full((1,), float(i))
        made.stored[stem.format(i, "k_scale")] = torch.full((1,), 10.0 + i)
    listed = ["pooler", "encoder.layer.3.output.dense", "encoder.layer.2.output.dense"]
    folder = pair(tmp_path / "both", made, {**BLOCKS, "modules_to_not_convert": listed})
    kept = [0, 3]
    chosen = json.dumps([[i] for i in kept])
    ok("coalesce", folder / "in", folder / "out", "--layers", chosen, "--keep-quantised")
    found = tiny.written(folder / "out")
    at = "encoder.layer."
    expected = {key: x for key, x in made.stored.items() if not key.startswith(at)}
    for new, old in enumerate(kept):
        for key, x in made.stored.items():
            if key.startswith(f"{at}{old}."):
                expected[key.replace(f"{at}{old}.", f"{at}{new}.")] = x
    tiny.assert_same(found, expected)
    table = json.loads((folder / "out" / "config.json").read_text())[FIELD]
    assert table["modules_to_not_convert"] == ["pooler", "encoder.layer.1.output.dense"]
    ok("verify", folder / "out", "--recompute", 20)
    streammap.coalesce(folder / "in", folder / "again", layers=[[0], [3]], keep_quantised=True)
    tiny.assert_same(tiny.written(folder / "again"), found)


def test_what_is_computed_is_not_kept(both: Path) -> None:
    result = run("coalesce", both / "in", both / "out", "--width", 2, "--keep-quantised")
    assert result.exit_code == 1
    assert "is computed from" in result.stderr
    assert "hint: leave keep-quantised out" in result.stderr
    assert not (both / "out").exists()
    kept = streammap.open(both / "in").keep_quantised()
    with pytest.raises(CheckpointError, match="quantised") as told:
        kept.coalesce(width=2)
    assert told.value.hint is not None
    assert "--keep-quantised" in told.value.hint


def test_plain_weights_are_kept_too(both: Path) -> None:
    streammap.open(both / "plain").keep_quantised().save(both / "out")
    tiny.assert_same(tiny.written(both / "out"), tiny.written(both / "plain"))


def test_a_mean_beside_codes_that_are_kept_is_rounded_once(tmp_path: Path) -> None:
    sources = [pair(tmp_path / str(i), fp8(seed=i)) / "in" for i in range(3)]
    # The first one's codes and nothing of the others', and a mean of all other tensors.
    shares = [[{"filter": "encoder", "value": float(i == 0)}, w] for i, w in enumerate(MEAN)]
    mean = streammap.blend(*sources, weights=shares, method="linear", dtype=WIDE)
    mean.save(tmp_path / "plain")
    mean.keep_quantised().save(tmp_path / "kept")
    plain, kept = tiny.written(tmp_path / "plain"), tiny.written(tmp_path / "kept")
    apart = [key for key in plain if not key.startswith("encoder")]
    assert apart
    tiny.assert_same({key: kept[key] for key in apart}, {key: plain[key] for key in apart})


# Elsewhere.


def upload(folder: Path) -> str:
    url = f"memory://{uuid.uuid4().hex}"
    disk = MemoryFileSystem()
    for file in folder.iterdir():
        disk.pipe(f"{url}/{file.name}", file.read_bytes())
    return url


def test_it_is_read_over_a_network_with_scales_in_other_shards(both: Path) -> None:
    index = json.loads((both / "in" / tiny.INDEX).read_text())["weight_map"]
    apart = [key for key in index if index.get(key) != index.get(f"{key}_scale_inv", index[key])]
    assert apart
    streammap.open(upload(both / "in")).coalesce(width=2).save(both / "far")
    streammap.open(both / "in").coalesce(width=2).save(both / "near")
    tiny.assert_same(tiny.written(both / "far"), tiny.written(both / "near"))


def test_what_is_transposed_is_not_read_over_a_network(tmp_path: Path) -> None:
    made = quantised.awq("a.weight", 48, 96, 32)
    tiny.write(tmp_path / "in", made.stored, {FIELD: {"quant_method": "awq"}})
    tiny.assert_same(tiny.opened(tmp_path / "in"), made.meant)
    with pytest.raises(CheckpointError, match=r"a\.qweight: AWQ of 4 bits is stored transposed"):
        streammap.open(upload(tmp_path / "in"))


INTS = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}


def packed(folder: Path, shape: torch.Tensor) -> torch.Tensor:
    """A checkpoint of 4-bit integers whose rows of 60 are filled up to 8 words; the integers."""
    numbers = torch.randint(-8, 8, (12, 60), generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.pad(numbers + 8, (0, 4))
    stored = {
        "p.weight_packed": quantised.words(whole.view(12, 8, 8), 4),
        "p.weight_scale": torch.ones(12, 2).bfloat16(),
        "p.weight_shape": shape,
    }
    tiny.write(folder, stored, {"model_type": "mine", FIELD: INTS})
    return numbers


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_of_packed_integers_end_where_their_shape_says(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    numbers = packed(tmp_path / "in", torch.tensor([12, 60], dtype=dtype))
    ok("convert", tmp_path / "in", tmp_path / "out", "--dtype", "float32", "--no-fsync")
    assert torch.equal(tiny.written(tmp_path / "out")["p.weight"], numbers.float())
    part = streammap.open(tmp_path / "in").read("p.weight", region=(slice(3, 7), slice(29, 60)))
    assert torch.equal(part, numbers[3:7, 29:].bfloat16())
    ok("keep-quantised", tmp_path / "in", tmp_path / "kept", "--no-fsync")
    tiny.assert_same(tiny.written(tmp_path / "kept"), tiny.written(tmp_path / "in"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (torch.tensor([12, 56]), r"codes for \[12, 64\], and its shape says \[12, 56\]"),
        (torch.tensor([12, 65]), r"its shape says \[12, 65\]"),
        (torch.tensor([-12, 60]), r"its shape says \[-12, 60\]"),
        (torch.tensor([60]), r"its shape says \[60\]"),
        (torch.zeros(0, dtype=torch.int64), r"its shape says \[\]"),
        (torch.tensor(60), "weight_shape: I64 .*, expected the sizes"),
        (torch.tensor([12.0, 60.0]), "weight_shape: F32"),
        (torch.zeros(10**5, dtype=torch.int64), "weight_shape: I64 "),
    ],
)
def test_shapes_that_packed_integers_do_not_have_are_refused(
    tmp_path: Path, shape: torch.Tensor, message: str
) -> None:
    packed(tmp_path / "in", shape)
    with pytest.raises(CheckpointError, match=message):
        streammap.open(tmp_path / "in")
