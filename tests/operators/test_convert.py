"""Other dtypes: rounded once and exactly, told in config.json, with what is lost counted."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.errors import OutputError, PlanError
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=2)
HALVES = {torch.bfloat16: (7, -126, 127), torch.float16: (10, -14, 15)}
"""Dtype -> bits of a fraction, least and largest exponent."""


def nearest(value: float, dtype: torch.dtype) -> float:
    """The nearest number of a dtype, ties to even, in exact arithmetic."""
    if value == 0 or not math.isfinite(value):
        return value
    bits, least, largest = HALVES[dtype]
    unit = Fraction(2) ** (max(math.frexp(abs(value))[1] - 1, least) - bits)
    near = round(Fraction(abs(value)) / unit) * unit  # Fraction rounds ties to even
    return math.copysign(math.inf if near >= Fraction(2) ** (largest + 1) else near, value)


def hard(dtype: torch.dtype, n: int = 1500) -> Tensor:
    """Float64 numbers near the middle of two numbers of a dtype, and of all sizes."""
    source = torch.Generator().manual_seed(3)
    bits = HALVES[dtype][0]
    x = torch.randn(n, generator=source, dtype=torch.float64).to(dtype).double()
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=1e-3))) - bits - 1)
    off = torch.tensor([0.0, 2.0**-30, -(2.0**-30)]).repeat(n // 3).double()
    sizes = torch.exp2(torch.rand(n, generator=source, dtype=torch.float64) * 320 - 160)
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, 65519.99, 65520.0, 1e-300])
    return torch.cat([x + step * (1 + off), sizes, -sizes, odd.double()])


@pytest.mark.parametrize("dtype", list(HALVES))
def test_float64_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    x = hard(dtype)
    source = tiny.write(tmp_path / "in", {"x": x}, None)
    streammap.convert(source, tmp_path / "out", dtype=dtype)
    found = tiny.written(tmp_path / "out")["x"].double()
    expected = torch.tensor([nearest(v, dtype) for v in x.tolist()], dtype=torch.float64)
    is_nan = x.isnan()
    assert torch.equal(found.isnan(), is_nan)
    tiny.assert_same({"x": found[~is_nan]}, {"x": expected[~is_nan]})
    assert not torch.equal(x.to(dtype)[~is_nan].double(), expected[~is_nan])  # torch rounds twice


@pytest.mark.parametrize("n_threads", [1, 3])
def test_losses_are_counted(tmp_path: Path, n_threads: int) -> None:
    source = torch.Generator().manual_seed(1)
    x = torch.exp2(torch.rand(300, 1000, generator=source) * 70 - 35)
    x[7, 7], x[8, 8], x[9, 9] = math.inf, math.nan, 0.0
    state = {"x": x, "fine": torch.randn(99), "n": torch.arange(5)}
    report = streammap.convert(
        tiny.write(tmp_path / "in", state, None), tmp_path / "out", dtype="fp16", threads=n_threads
    )
    out = tiny.written(tmp_path / "out")
    tiny.assert_same(out, {"x": x.half(), "fine": state["fine"].half(), "n": state["n"]})
    overflowed = int((out["x"].isinf() & x.isfinite()).sum())
    vanished = int(((out["x"] == 0) & (x != 0)).sum())
    assert (report.n_overflowed, report.n_vanished) == (overflowed, vanished)
    assert min(overflowed, vanished) > 1000
    told = f"rounding loses {overflowed + vanished} numbers of 1 tensor (x): {overflowed} overflow "
    assert told + f"to infinity and {vanished} vanish to 0" in report.notes
    record = json.loads((tmp_path / "out" / "streammap.json").read_text())
    entry = record["tensors"]["x"]
    assert (entry["overflowed"], entry["vanished"]) == (overflowed, vanished)
    assert record["tensors"]["fine"].keys() == {"file", "crc32"}
    assert report.promise == "approximate"


def test_strict_refuses_losses_and_the_same_command_goes_on_without_it(tmp_path: Path) -> None:
    state = {"x": torch.tensor([1.0, 1e30, 1e-30]), "y": torch.ones(3)}
    source, out = tiny.write(tmp_path / "in", state, None), tmp_path / "out"
    for _ in range(2):  # the second time by the journal
        result = run("convert", source, out, "--dtype", "float16", "--strict")
        assert result.exit_code == 1
        assert "--strict: rounding loses 2 numbers of 1 tensor (x): 1 overflow" in result.stderr
        assert "kept: 2 of 2 tensors" in result.stderr
        assert [path.name for path in out.iterdir()] == [".streammap-run"]
        journal = (out / ".streammap-run" / "journal.jsonl").read_text()
        assert ' 1 1"' in journal
    told = ok("convert", source, out, "--dtype", "float16")
    assert "resumed    2 tensors" in told
    assert "note       rounding loses 2 numbers of 1 tensor (x)" in told
    tiny.assert_same(tiny.written(out), {key: x.half() for key, x in state.items()})
    wide = tmp_path / "wide"
    ok("convert", source, wide, "--dtype", "x=float32,float16", "--strict")
    assert tiny.written(wide)["x"].dtype == torch.float32


def test_dtypes_by_key_and_in_config(tmp_path: Path) -> None:
    config = {
        **tiny.bert_config(SIZES),
        "dtype": "float32",
        "text_config": {"torch_dtype": "torch.float32"},
    }
    state = tiny.bert(SIZES) | {"ids": torch.arange(3), "flag": torch.tensor([True])}
    source = tiny.write(tmp_path / "in", state, config)
    out = tmp_path / "out"
    rules = "LayerNorm=float32,*.bias=fp16,bf16"
    ok("convert", source, out, "--dtype", rules)
    expected = {
        key: x
        if "LayerNorm" in key or not x.is_floating_point()
        else x.to(torch.float16 if key.endswith(".bias") else torch.bfloat16)
        for key, x in state.items()
    }
    tiny.assert_same(tiny.written(out), expected)
    written = json.loads((out / "config.json").read_text())
    assert written == {
        **config,
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "torch.bfloat16"},
    }
    table = {"LayerNorm": "float32", "*.bias": torch.float16, "*": "bfloat16"}
    tiny.assert_same(dict(streammap.open(source).convert(dtype=table).tensors()), expected)
    for wrong, why in (
        ("lstm=bf16", "no key has 'lstm' in it"),
        ("bf16,fp16", "dtype: BF16, F16 for all other tensors, expected one"),
        ("float8_e4m3fn", "'float8_e4m3fn' is no dtype that weights can be rounded to"),
        ("x=", "'' is no dtype"),
    ):
        result = run("convert", source, tmp_path / "new", "--dtype", wrong)
        assert result.exit_code == 1, wrong
        assert why in result.stderr
        assert not (tmp_path / "new").exists()


def test_wider_dtypes_keep_every_bit_and_back(tmp_path: Path) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    halves = {"b": bits.view(torch.bfloat16).clone(), "h": bits.view(torch.float16).clone()}
    eighths = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    state = {key: x[x.isfinite()] for key, x in halves.items()} | {"f8": eighths.clone()}
    source = tiny.write(tmp_path / "in", state, None)
    report = streammap.convert(source, tmp_path / "wide", dtype="float32", strict=True)
    assert report.promise == "bit-exact"
    wide = tiny.written(tmp_path / "wide")
    tiny.assert_same(wide, {key: x.float() for key, x in state.items()})
    back = streammap.open(tmp_path / "wide").convert(dtype={"b": "bf16", "h": "fp16"}, strict=True)
    back.save(tmp_path / "back")
    found = tiny.written(tmp_path / "back")
    tiny.assert_same({k: found[k] for k in "bh"}, {k: state[k] for k in "bh"})


def test_every_operator_takes_a_dtype(tmp_path: Path) -> None:
    state = {key: x.double() for key, x in tiny.bert(SIZES).items()}
    source = tiny.write(tmp_path / "in", state, tiny.bert_config(SIZES))
    small = dict(streammap.open(source).coalesce(width=2).tensors())
    expected = {
        key: torch.tensor([nearest(v, torch.bfloat16) for v in x.reshape(-1).tolist()])
        .view(x.shape)
        .to(torch.bfloat16)
        for key, x in small.items()
    }
    ok("coalesce", source, tmp_path / "a", "--width", 2, "--dtype", "bf16", "--strict")
    streammap.coalesce(source, tmp_path / "b", width=2, dtype=torch.bfloat16)
    for name in "ab":
        tiny.assert_same(tiny.written(tmp_path / name), expected)
    request = json.loads((tmp_path / "a" / "streammap.json").read_text())["request"]
    assert (request["operator"], request["source"]["operator"]) == ("convert", "coalesce")
    ok("apply", tmp_path / "a", tmp_path / "again")
    tiny.assert_same(tiny.written(tmp_path / "again"), expected)
    assert ok("verify", tmp_path / "a", "--recompute", "100", "--no-class-check")
    planned = ok("plan", "permute", source, "--dtype", "float16")
    assert "convert: rounded to the nearest" in planned
    wide = ok("apply", tmp_path / "a", tmp_path / "wide", "--dtype", "float32")
    assert "guarantee" in wide


def test_a_narrow_blend_tells_what_it_loses(tmp_path: Path) -> None:
    one = tiny.write(tmp_path / "one", {"x": torch.full((5,), 1e30)}, None)
    other = tiny.write(tmp_path / "other", {"x": torch.ones(5, dtype=torch.float16)}, None)
    report = streammap.interpolate(one, other, tmp_path / "out", alpha=0.5)
    assert report.n_overflowed == 5
    with pytest.raises(OutputError, match="--strict: rounding loses 5 numbers"):
        streammap.interpolate(one, other, tmp_path / "new", alpha=0.5, strict=True)


def test_a_request_by_hand(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "in", {"x": torch.randn(7)}, None)
    opened = {"operator": "open", "path": str(source)}
    call = {"operator": "convert", "dtype": "bfloat16", "source": opened}
    assert streammap.open_request(call).read("x").dtype == torch.bfloat16
    for wrong in (7, ["bf16"], {"x": 3}, "," * 9):
        with pytest.raises(PlanError, match=r"dtype: .* is no dtype|for all other tensors"):
            streammap.open_request({**call, "dtype": wrong})
