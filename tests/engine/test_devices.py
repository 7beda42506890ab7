"""Where a run computes, and that it gives the same numbers there."""

from pathlib import Path

import pytest
import torch

import streammap
from streammap.api import LazyCheckpoint
from streammap.engine import devices
from streammap.engine.devices import DeviceChoice, Matrices
from streammap.errors import OutputError
from streammap.io.buffers import Buffer
from streammap.output import run as executor
from streammap.planning import graph, maps
from streammap.planning.dense import matrix
from streammap.planning.maps import DenseMap
from tests.engine.test_evaluate import Held
from tests.support import tiny
from tests.support.typed import ok, run

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device")
OPERATIONS = ("coalesce", "decoalesce", "fill", "blend")


@pytest.fixture
def big(tmp_path: Path) -> LazyCheckpoint:
    sizes = tiny.Sizes(heads=4, layers=4)
    tiny.write(tmp_path / "big", tiny.bert(sizes), tiny.bert_config(sizes))
    return streammap.open(tmp_path / "big")


def made(big: LazyCheckpoint, what: str) -> LazyCheckpoint:
    match what:
        case "coalesce":
            return big.coalesce(width=2, depth=2)
        case "decoalesce":
            return big.decoalesce(width=2, depth=2)
        case "fill":
            return big.decoalesce(hidden=f"={big.sizes['embed'] + 16}")
    return big.coalesce(width=2).decoalesce().interpolate(big, alpha=0.25)


def dense(n: int, columns: int) -> graph.LinearForm:
    form = Held().load(torch.randn(n, columns))
    return graph.map_dims(form, [DenseMap(matrix.Held(torch.randn(n, n))), None])


def test_copies_and_sums_stay_on_the_processor() -> None:
    form = graph.map_dims(Held().load(torch.randn(4, 6)), [maps.merging([[0, 2], [1, 3]], 4), None])
    choice = devices.choose([form], "auto")
    assert choice == DeviceChoice("cpu", "copies and sums: I/O-bound, a GPU would not help")
    assert devices.choose([form], "cpu").device == "cpu"


def test_the_work_of_products_is_counted() -> None:
    assert devices.flop([dense(8, 5)]) == 2 * 8 * 8 * 5
    assert devices.choose([dense(8, 5)], "auto").reason.startswith("few matrix products")


def test_large_products_go_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_WORTH_FLOP", 600.0)
    for n, wanted in ((0, "cpu"), (1, "cuda:0")):
        monkeypatch.setattr(devices, "_n_gpus", lambda n=n: n)
        choice = devices.choose([dense(8, 5)], "auto")
        assert choice.device == wanted
        assert "TFLOP of matrix products" in choice.reason


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, big: LazyCheckpoint, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_n_gpus", lambda: 1)
    assert devices.choose([], "cuda") == DeviceChoice("cuda:0", "as asked for")
    with pytest.raises(OutputError, match=r"device cuda:1: torch .* finds 1 GPUs"):
        big.coalesce(width=2).save(tmp_path / "out", device="cuda:1")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(devices, "_n_gpus", lambda: 0)
    said = run("plan", "coalesce", big.plan.sources[0].path, "--width", 2, "--device", "cuda")
    assert said.exit_code == 1
    assert "finds 0 GPUs" in said.output
    assert "pass --device cpu" in said.output


def test_the_plan_says_where_and_why(big: LazyCheckpoint) -> None:
    path = big.plan.sources[0].path
    said = ok("plan", "coalesce", path, "--width", 2, "--threads", 3)
    assert "device     cpu, 3 threads: copies and sums: I/O-bound, a GPU would not help" in said


@pytest.mark.parametrize("what", OPERATIONS)
def test_buffers_of_a_device_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, big: LazyCheckpoint, tmp_path: Path, what: str
) -> None:
    """The device is the processor here: uploads and downloads are copies, kernels are the same."""
    made(big, what).save(tmp_path / "plain")
    monkeypatch.setattr(
        executor, "device", lambda plan, engine, ranks: DeviceChoice("device", "a test")
    )
    begun = Matrices.__init__
    monkeypatch.setattr(Matrices, "__init__", lambda self, device: begun(self, "cpu"))
    done: list[int] = []
    download = devices.DeviceSide.download

    def counted(self: devices.DeviceSide, host: Buffer, nbytes: int) -> None:
        done.append(nbytes)
        download(self, host, nbytes)

    monkeypatch.setattr(devices.DeviceSide, "download", counted)
    made(big, what).save(tmp_path / "there")
    name = "model.safetensors"
    assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert done


@needs_gpu
@pytest.mark.parametrize("what", ["coalesce", "decoalesce", "blend"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_bits(tmp_path: Path, what: str, dtype: torch.dtype) -> None:
    sizes = tiny.Sizes(heads=4, layers=4)
    state = {key: x.to(dtype) for key, x in tiny.bert(sizes).items()}
    big = streammap.open(tiny.write(tmp_path / "big", state, tiny.bert_config(sizes)))
    for device in ("cpu", "cuda"):
        made(big, what).save(tmp_path / device, device=device)
    name = "model.safetensors"
    assert (tmp_path / "cuda" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()


@needs_gpu
def test_a_gpu_multiplies_to_rounding(big: LazyCheckpoint, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        made(big, "fill").save(tmp_path / device, device=device)
    found, wanted = tiny.written(tmp_path / "cuda"), tiny.written(tmp_path / "cpu")
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)
