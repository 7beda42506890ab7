"""Where kernels run: on the processor, or on a GPU where that gains more than it costs.

Copies and sums run at the speed of memory on any processor, and files are slower than that: such a
run is I/O-bound, and a GPU would not help. Matrix products (dense maps) are another matter. On a
GPU each worker has its own stream, so that the copies of one overlap with the products of another.
"""

import math
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from streammap.common.ranges import Range
from streammap.engine.memory import Limits
from streammap.errors import OutputError
from streammap.io.buffers import Buffer
from streammap.planning.dense.matrix import Matrix
from streammap.planning.graph import LinearForm
from streammap.planning.maps import DenseMap

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WORTH_FLOP = 2e11
"""Products that take a processor seconds; so does starting a GPU."""
_PART_OF_DEVICE = 8
_MAX_HELD_NBYTES = 2 * 2**30
"""Source bytes that a worker keeps on a device."""


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Where a run computes."""

    device: str
    """"cpu" or "cuda:N"."""
    reason: str


def flop(forms: Iterable[LinearForm]) -> float:
    """Operations of all matrix products."""
    total = 0.0
    for form in forms:
        for term in form.terms:
            n_elements = math.prod(term.blend[0][1].spec.shape)
            total += sum(2.0 * m.n_out * n_elements for m in term.maps if isinstance(m, DenseMap))
    return total


def choose(forms: Iterable[LinearForm], wanted: str, *, local_rank: int = 0) -> DeviceChoice:
    """The device of a run.

    Args:
        wanted: "auto", "cpu", "cuda" or "cuda:N".
        local_rank: Of the processes of this machine, which take its GPUs in turn.

    Raises:
        OutputError: a GPU that torch does not find.
    """
    if wanted == "cpu":
        return DeviceChoice("cpu", "as asked for")
    if wanted == "auto":
        work = flop(forms)
        if work < _WORTH_FLOP:
            what = "few matrix products" if work else "copies and sums"
            return DeviceChoice("cpu", f"{what}: I/O-bound, a GPU would not help")
        reason = f"{work / 1e12:.1f} TFLOP of matrix products"
        n = _n_gpus()
        return (
            DeviceChoice(f"cuda:{local_rank % n}", reason)
            if n
            else DeviceChoice("cpu", f"{reason}, and no GPU")
        )
    n = _n_gpus()
    number = local_rank % max(n, 1) if wanted == "cuda" else int(wanted.partition(":")[2])
    if number >= n:
        import torch

        raise OutputError(
            f"device {wanted}: torch {torch.__version__} finds {n} GPUs",
            hint="pass --device cpu, or install a torch with CUDA",
        )
    return DeviceChoice(f"cuda:{number}", "as asked for")


def _n_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@final
class DeviceBuffer:
    """Bytes on a device."""

    def __init__(self, nbytes: int, device: "torch.device") -> None:
        """Room for `nbytes`."""
        import torch

        self._bytes = torch.empty(-(-nbytes // 16) * 16, dtype=torch.uint8, device=device)

    def typed(self, dtype: str) -> "Tensor":
        """All of it as a tensor of one dimension."""
        from streammap.io.dtypes import to_torch

        return self._bytes.view(to_torch(dtype))


@final
class Matrices:
    """Blocks of dense maps on a device, each once for all workers as long as there is room."""

    def __init__(self, device: str) -> None:
        """None yet."""
        self.device = device
        self._held: dict[object, tuple[Matrix, Tensor]] = {}
        """With the matrix, so that no other one gets its id."""
        self._nbytes = 0
        self._lock = threading.Lock()

    def part(self, m: DenseMap, rows: Range, columns: Range, dtype: "torch.dtype") -> "Tensor":
        """Rows and columns of a map."""
        key = id(m.matrix), rows, columns, dtype
        with self._lock:
            if key in self._held:
                return self._held[key][1]
            part = m.matrix.read(rows, columns).to(self.device, dtype, copy=True)
            if self._nbytes + part.nbytes <= self._room():
                self._held[key] = m.matrix, part
                self._nbytes += part.nbytes
            return part

    def _room(self) -> int:
        import torch

        device = torch.device(self.device)
        if device.type != "cuda":
            return _MAX_HELD_NBYTES
        free, _ = torch.cuda.mem_get_info(device)
        return (free + self._nbytes) // 2


@final
class DeviceSide:
    """A worker's buffers on a device, and its stream."""

    def __init__(self, limits: Limits, matrices: Matrices) -> None:
        """Buffers for tiles within `limits`, on the device of `matrices`."""
        import torch

        self._device = torch.device(matrices.device)
        is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]
        self.matrices = matrices
        self.work = DeviceBuffer(limits.work_nbytes, self._device)
        self.out = DeviceBuffer(limits.out_nbytes, self._device)
        self._held: dict[object, DeviceBuffer] = {}
        self._nbytes = 0
        self._room = _MAX_HELD_NBYTES
        if is_cuda:
            free, _ = torch.cuda.mem_get_info(self._device)
            self._room = min(self._room, free // _PART_OF_DEVICE)
        self._pinned: list[int] = []

    def pin(self, host: Buffer) -> None:
        """Let the device copy from and to `host` by itself; where it refuses, copies are slower."""
        if self._stream is None:
            return
        import torch

        pinned = host.typed("U8")
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(pinned.data_ptr(), pinned.numel(), 0)
        if int(status) == 0:
            self._pinned.append(pinned.data_ptr())

    def stream(self) -> AbstractContextManager[object]:
        """Work in here goes to the worker's own stream."""
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def held(self, key: object) -> DeviceBuffer | None:
        """What was uploaded for `key`, if it is still there."""
        return self._held.get(key)

    def upload(self, key: object, host: Buffer, nbytes: int) -> DeviceBuffer:
        """Copy to the device, and keep it there as long as there is room."""
        if self._nbytes + nbytes > self._room:
            self._held.clear()
            self._nbytes = 0
        made = self._held[key] = DeviceBuffer(nbytes, self._device)
        self._nbytes += nbytes
        made.typed("U8")[:nbytes].copy_(host.typed("U8")[:nbytes], non_blocking=True)
        return made

    def download(self, host: Buffer, nbytes: int) -> None:
        """Copy the result to `host`, and wait until all is done."""
        host.typed("U8")[:nbytes].copy_(self.out.typed("U8")[:nbytes], non_blocking=True)
        self.wait()

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Give everything back."""
        self.wait()
        self._held.clear()
        if self._pinned:
            import torch

            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            for pointer in self._pinned:
                runtime.cudaHostUnregister(pointer)
            self._pinned.clear()
