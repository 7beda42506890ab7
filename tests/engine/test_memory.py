"""Peak resident memory (VmHWM, mapped pages included), each run in a process of its own."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap.engine import memory
from streammap.errors import OutputError
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.optimizer.state import Form, Group, key_of
from streammap.output.forms import optimizer_files
from streammap.planning.optimizer.state import OptimizerState
from streammap.testing.hubserver import HubServer

_RUN = """
import json, os, sys, time, torch
import streammap
from streammap.engine import memory
from streammap.output.run import peak_nbytes
before = peak_nbytes()
folder, what, options, slow = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
if slow:
    write = os.pwrite
    os.pwrite = lambda *args: (time.sleep(float(slow)), write(*args))[1]
big = streammap.open(folder)
lazy = {
    "copy": lambda: big,
    "coalesce": lambda: big.coalesce(width=2, depth=2),
    "decoalesce": lambda: big.decoalesce(width=2),
    "noise": lambda: big.decoalesce(width=2, noise=10.0),
    "three": lambda: big.decoalesce(mlp=3, noise=10.0),
    "parts": lambda: big.decoalesce(width=2, split=0.7),
    "layers": lambda: big.decoalesce(layers=min(4, 10_000 // big.sizes["layer"])),
    "orders": lambda: big.permute(each_layer=True, only=("mlp",)),
    "fill": lambda: big.decoalesce(hidden="to:%d" % (big.sizes["embed"] * 3 // 2)),
    "interpolate": lambda: big.interpolate(big.coalesce(width=2).decoalesce(), alpha=0.5),
    "cast": lambda: big.convert(dtype="float16"),
    "tokens": lambda: big.convert(vocab_multiple=64, vocab_rows="normal"),
    "optimizer": lambda: big.coalesce(width=2, depth=2).carry_optimizer(),
    "blend": lambda: big.blend(*(streammap.open(folder) for _ in range(9))),
    "align": lambda: big.blend(streammap.open(folder), align=True),
}[what]()
report = lazy.save(folder + "-" + what, fsync=False, overwrite=True, **options)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes, report.peak_nbytes]))
"""
MIB = 2**20
OPERATIONS = ("copy", "coalesce", "decoalesce", "layers", "fill", "interpolate")


def write_gpt2(
    folder: Path, *, vocab: int, layers: int = 4, dtype: str = "F32", embed: int = 512
) -> int:
    """A sparse GPT-2 (its bytes are zeros, and take no disk); gives its size in bytes."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, embed), "wpe.weight": (64, embed)}
    for i in range(layers):
        for name, n_in, n_out in (
            ("attn.c_attn", embed, 3 * embed),
            ("attn.c_proj", embed, embed),
            ("mlp.c_fc", embed, 4 * embed),
            ("mlp.c_proj", 4 * embed, embed),
        ):
            shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{i}.{name}.bias"] = (n_out,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (embed,), f"h.{i}.{norm}.bias": (embed,)}
    shapes |= {"ln_f.weight": (embed,), "ln_f.bias": (embed,)}
    specs = [(key, TensorSpec(dtype, shape)) for key, shape in shapes.items()]
    head = safetensors_header.encode(specs, {"format": "pt"})
    folder.mkdir()
    size = len(head) + sum(spec.nbytes for _, spec in specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(size)
    config = {
        "model_type": "gpt2",
        "n_embd": embed,
        "n_head": 8,
        "n_layer": layers,
        "n_positions": 64,
        "vocab_size": vocab,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def run(folder: Path, what: str, *, slow: str = "", **options: object) -> tuple[int, int, int]:
    """Bytes that opening, planning and the run added to a process with torch imported, what the
    plan said it would at most, and the process' peak.
    """
    said = subprocess.run(
        [sys.executable, "-c", _RUN, str(folder), what, json.dumps(options), slow],
        check=False,
        capture_output=True,
        text=True,
    )
    if said.returncode:
        raise RuntimeError(said.stderr)
    shutil.rmtree(f"{folder}-{what}")
    added, planned, peak = json.loads(said.stdout)
    return added, planned, peak


@pytest.mark.parametrize("what", OPERATIONS)
@pytest.mark.parametrize(("memory", "most"), [("256MiB", 72), ("32MiB", 32)])
def test_a_run_stays_in_its_budget(tmp_path: Path, what: str, memory: str, most: int) -> None:
    size = write_gpt2(tmp_path / "big", vocab=150_000, dtype="BF16")
    assert size > 2 * most * MIB
    added, planned, _ = run(tmp_path / "big", what, memory=memory)
    assert added <= planned
    assert added < most * MIB
    assert planned <= 256 * MIB if memory == "256MiB" else 32 * MIB


def write_state(folder: Path) -> int:
    """An optimizer's state of zeros beside a model, sparse as that; gives its size in bytes."""
    entries, specs = {}, {}
    weights = streammap.open(folder).plan.specs
    for name, spec in weights.items():
        for what in ("exp_avg", "exp_avg_sq"):
            key = key_of(name, what)
            entries[key], specs[key] = (name, what), TensorSpec("F32", spec.shape)
    state = OptimizerState(entries, (Group(tuple(weights)),), Form("torch"), {})
    shard = optimizer_files.arrange(state, specs)
    assert shard.around is not None
    with (folder / shard.name).open("wb") as file:
        file.truncate(shard.nbytes)
        for offset, content in shard.around():
            file.seek(offset)
            file.write(content)
    return shard.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "most"), [("256MiB", 72), ("32MiB", 32)])
def test_an_optimizer_stays_in_the_budget(tmp_path: Path, memory: str, most: int) -> None:
    write_gpt2(tmp_path / "big", vocab=100_000, dtype="BF16")
    assert write_state(tmp_path / "big") > 4 * most * MIB
    added, planned, _ = run(tmp_path / "big", "optimizer", memory=memory)
    assert added <= planned
    assert added < most * MIB


def write_quantised(folder: Path, kind: str, *, layers: int = 6) -> int:
    """Zeros as codes and scales; gives the bytes of what they mean."""
    specs: list[tuple[str, TensorSpec]] = []
    table: dict[str, object] = {"quant_method": kind}
    for i in range(layers):
        at = f"layers.{i}.down_proj"
        if kind == "fp8":
            specs += [(f"{at}.weight_scale_inv", TensorSpec("F32", (32, 64)))]
            specs += [(f"{at}.weight", TensorSpec("F8_E4M3", (4096, 8192)))]
        elif kind == "mxfp4":
            specs += [(f"{at}_blocks", TensorSpec("U8", (4, 5760, 45, 16)))]
            specs += [(f"{at}_scales", TensorSpec("U8", (4, 5760, 45)))]
        else:
            specs += [(f"{at}.qweight", TensorSpec("I32", (512, 8192)))]
            specs += [(f"{at}.qzeros", TensorSpec("I32", (32, 1024)))]
            specs += [(f"{at}.scales", TensorSpec("F16", (32, 8192)))]
            specs += [(f"{at}.g_idx", TensorSpec("I32", (4096,)))]
    specs.sort(key=lambda one: -DTYPE_BITS[one[1].dtype])
    head = safetensors_header.encode(specs, {"format": "pt"})
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for _, spec in specs))
    (folder / "config.json").write_text(json.dumps({"quantization_config": table}))
    return streammap.open(folder).plan.nbytes


@pytest.mark.parametrize(
    ("kind", "memory", "threads"),
    [
        ("fp8", "32MiB", 2),
        pytest.param("mxfp4", "64MiB", 8, marks=pytest.mark.slow),
        pytest.param("gptq", "40MiB", 4, marks=pytest.mark.slow),
    ],
)
def test_decoding_stays_in_the_budget(tmp_path: Path, kind: str, memory: str, threads: int) -> None:
    size = write_quantised(tmp_path / "big", kind, layers=2 if kind == "mxfp4" else 4)
    assert size > 120 * MIB
    added, planned, _ = run(tmp_path / "big", "copy", memory=memory, threads=threads)
    assert added <= planned <= int(memory.removesuffix("MiB")) * MIB


def test_a_blend_of_ten_stays_in_32_mib(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=50_000, dtype="BF16")
    added, planned, _ = run(tmp_path / "big", "blend", memory="32MiB")
    assert added <= planned <= 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("embed", [64, 640])
def test_aligning_takes_what_the_plan_says(tmp_path: Path, embed: int) -> None:
    """With embed 640, 2560 neurons: 50 MiB of similarities."""
    pytest.importorskip("scipy.optimize")
    write_gpt2(tmp_path / "big", vocab=30_000, layers=2, embed=embed)
    with pytest.raises(RuntimeError, match="aligning takes at least") as refused:
        run(tmp_path / "big", "align", memory="80MiB")
    least = least_of(refused.value)
    said = json.loads(_planned(tmp_path / "big"))
    added, _, _ = run(tmp_path / "big", "align", memory=least)
    assert added <= said <= int(least.removesuffix("MiB")) * MIB


def _planned(folder: Path) -> str:
    """Bytes that a plan says aligning takes."""
    big = streammap.open(folder)
    return str(big.blend(streammap.open(folder), align=True).summary(memory="1GiB").peak_nbytes)


@pytest.mark.slow
def test_a_blend_of_ten_of_12_004_tensors_is_counted(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "many", vocab=64, layers=1000, embed=16)
    check_many(tmp_path / "many", "blend", "64MiB")


def least_of(error: object) -> str:
    """The memory that a refusal names: what to pass instead."""
    found = re.search(r"pass --memory (\d+MiB), or more", str(error))
    assert found is not None, error
    return found[1]


def check_many(folder: Path, what: str, memory: str) -> None:
    """A run of many small tensors stays in its budget; or is refused, and stays in the least."""
    try:
        added, planned, _ = run(folder, what, memory=memory)
    except RuntimeError as refused:
        memory = least_of(refused)
        added, planned, _ = run(folder, what, memory=memory)
    assert added <= planned <= int(memory.removesuffix("MiB")) * MIB


@pytest.mark.parametrize("what", OPERATIONS)
def test_many_tensors_stay_in_the_budget_or_are_refused_with_what_is_enough(
    tmp_path: Path, what: str
) -> None:
    write_gpt2(tmp_path / "many", vocab=64, layers=1000, embed=16)  # 12,004 tensors
    check_many(tmp_path / "many", what, "24MiB")


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("cast", {"format": "torch", "memory": "32MiB"}),
        pytest.param("cast", {"memory": "256MiB"}, marks=pytest.mark.slow),
        pytest.param("tokens", {"memory": "48MiB"}, marks=pytest.mark.slow),
    ],
)
def test_a_conversion_stays_in_its_budget(
    tmp_path: Path, what: str, options: dict[str, Any]
) -> None:
    size = write_gpt2(tmp_path / "big", vocab=12_001, dtype="F64" if what == "cast" else "BF16")
    assert size > 20 * MIB
    added, planned, _ = run(tmp_path / "big", what, **options)
    assert added <= planned <= int(str(options["memory"]).removesuffix("MiB")) * MIB


@pytest.mark.parametrize(
    ("what", "memory"),
    [
        ("noise", "48MiB"),
        pytest.param("noise", "256MiB", marks=pytest.mark.slow),
        pytest.param("three", "48MiB", marks=pytest.mark.slow),
        pytest.param("parts", "48MiB", marks=pytest.mark.slow),
    ],
)
def test_copies_that_are_told_apart_stay_in_the_budget(
    tmp_path: Path, what: str, memory: str
) -> None:
    write_gpt2(tmp_path / "big", vocab=4000, dtype="BF16")
    added, planned, _ = run(tmp_path / "big", what, memory=memory)
    assert added <= planned <= int(memory.removesuffix("MiB")) * MIB


@pytest.mark.slow
@pytest.mark.parametrize("what", ["noise", "three", "parts"])
def test_many_tensors_whose_copies_are_told_apart_are_counted(tmp_path: Path, what: str) -> None:
    write_gpt2(tmp_path / "many", vocab=64, layers=1000, embed=16)
    check_many(tmp_path / "many", what, "64MiB")


@pytest.mark.slow
def test_many_tensors_of_a_torch_file_stay_in_the_budget(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "many", vocab=64, layers=1000, embed=16)
    added, planned, _ = run(tmp_path / "many", "cast", memory="64MiB", format="torch")
    assert added <= planned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "memory"), [*((w, "64MiB") for w in OPERATIONS), ("interpolate", "128MiB")]
)
def test_45_004_tensors_stay_in_64_mib_or_are_refused(
    tmp_path: Path, what: str, memory: str
) -> None:
    write_gpt2(tmp_path / "many", vocab=64, layers=3750, embed=16)
    check_many(tmp_path / "many", what, memory)


@pytest.mark.slow
def test_another_order_in_each_layer_takes_no_more_for_more_layers(tmp_path: Path) -> None:
    """The maps themselves are 8 bytes a unit and layer; what a run makes of them is not kept."""
    found = []
    for layers in (4, 16):
        write_gpt2(tmp_path / f"{layers}", vocab=64, layers=layers, embed=2048, dtype="BF16")
        added, planned, _ = run(tmp_path / f"{layers}", "orders")
        assert added <= planned
        found.append(added)
    assert found[1] < found[0] + 24 * MIB


_READ = """
import json, sys, torch
import streammap
from streammap.engine import memory
from streammap.output.run import peak_nbytes
before = peak_nbytes()
folder, what, memory, threads = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
options = {"memory": memory, "threads": threads}
if what == "diff":
    streammap.diff(folder, folder + "-copy", **options)
elif what == "verify":
    streammap.verify(folder + "-copy", class_check=False, recompute=10, **options)
else:
    streammap.open(folder).health(**options)
print(peak_nbytes() - before)
"""


@pytest.mark.parametrize("threads", [None, 2])
@pytest.mark.parametrize("what", ["diff", "verify", "health"])
def test_the_least_memory_of_reading_is_enough(
    tmp_path: Path, what: str, threads: int | None
) -> None:
    big = tmp_path / "big"
    write_gpt2(big, vocab=50_000, dtype="BF16")
    streammap.open(big).save(tmp_path / "big-copy", fsync=False)

    def read(memory: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", _READ, str(big), what, memory, json.dumps(threads)]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    refused = read("1MiB")
    assert refused.returncode
    least = least_of(refused.stderr)
    enough = read(least)
    assert not enough.returncode, enough.stderr
    assert int(enough.stdout) <= int(least.removesuffix("MiB")) * MIB


def test_mapped_pages_count_too(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=100_000)
    added, planned, _ = run(tmp_path / "big", "coalesce", reader="mmap")
    assert added <= planned
    assert added < 64 * MIB


def test_a_slow_disk_takes_no_memory(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=20_000)
    quick, _, _ = run(tmp_path / "big", "decoalesce")
    slow, _, _ = run(tmp_path / "big", "decoalesce", slow="0.01")
    assert abs(slow - quick) < 2 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("what", OPERATIONS)
def test_ten_times_the_model_takes_the_same(tmp_path: Path, what: str) -> None:
    """One tensor of it, and its shard, are ten times as large as well: 0.1 and 1 GB."""
    peaks = []
    for vocab in (100_000, 1_000_000):
        size = write_gpt2(tmp_path / f"{vocab}", vocab=vocab, dtype="BF16")
        added, planned, peak = run(tmp_path / f"{vocab}", what)
        assert added <= planned
        assert added < min(72 * MIB, size)
        peaks.append(peak)
    assert abs(peaks[1] - peaks[0]) < 0.05 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "memory"), [(True, "256MiB"), (True, "80MiB"), (False, "256MiB")]
)
def test_a_model_of_the_hub_stays_in_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, memory: str
) -> None:
    """The client and what is fetched ahead count too."""
    write_gpt2(tmp_path / "big", vocab=100_000)
    code = _RUN.replace("streammap.open(folder)", f"streammap.open('org/big', stream={stream})")
    with HubServer() as hub:
        hub.add("org/big", tmp_path / "big")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        command = [str(tmp_path / "big"), "coalesce", json.dumps({"memory": memory}), ""]
        said = subprocess.run(
            [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
        )
    added, planned, _ = json.loads(said.stdout)
    assert added <= planned, f"{added / MIB:.1f} MiB, planned {planned / MIB:.1f}"


def test_the_default_grows_where_the_least_is_more(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=64, layers=1)
    form = streammap.open(tmp_path / "big").plan.targets["wte.weight"]
    few, many = [form] * 1000, [form] * 300_000
    assert memory.fit(few, budget=None, n_workers=2).peak_nbytes <= memory.DEFAULT_NBYTES
    room = memory.fit(many, budget=None, n_workers=2)
    assert room.tensors_nbytes > memory.DEFAULT_NBYTES
    assert room.tile_nbytes == memory.MAX_TILE_NBYTES
    with pytest.raises(OutputError, match="memory 256 MiB: this run takes at least") as refused:
        memory.fit(many, budget=memory.DEFAULT_NBYTES, n_workers=2)
    needed = re.search(r"--memory (\d+)MiB", str(refused.value))
    assert needed is not None
    memory.fit(many, budget=int(needed[1]) * MIB, n_workers=2)
