"""A file mapped into memory, for kernels that read it where it lies.

Pages of a mapping count as resident memory, so that they are given back after use. A page that
can't be had, because the file was cut short or the disk fails, makes the system send SIGBUS, which
by default ends the process without a word. Here the rest of the mapping reads as zeros from then
on, and `MappedPart.check` tells.
"""

import ctypes
import mmap
import platform
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import to_torch

if TYPE_CHECKING:
    from torch import Tensor

FILE_SYSTEMS = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x794C7630: "overlay",
    0x01021994: "tmpfs",
    0xF2F52010: "f2fs",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb",
    0x65735546: "fuse",
    0x0BD00BD0: "lustre",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x2FC12FC1: "zfs",
}
"""What Linux calls file systems, and people do."""
LOCAL = frozenset({"ext4", "xfs", "btrfs", "overlay", "tmpfs", "f2fs"})
"""Those whose pages are this machine's own: nobody elsewhere cuts a file short, and no page waits
for a network while a kernel stands still."""
_AROUND = 2**16
"""Around a page that is used, Linux maps others that are in its cache: so many bytes, aligned."""
_MACHINES = ("x86_64", "aarch64")
_ANONYMOUS_HERE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
_SIGBUS, _SA_SIGINFO, _ADDRESS_AT = 7, 4, 16


@final
class _Extent:
    """Where a mapping is."""

    __slots__ = ("end", "is_broken", "start")

    def __init__(self, start: int, nbytes: int) -> None:
        self.start = start
        self.end = start + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.is_broken = False
        """Whether a page of it could not be had."""


@final
class FileMapping:
    """A whole file, mapped for reading.

    It is shared and read-only: a private writable mapping counts against the overcommit limit, so
    that a file larger than memory may be refused.
    """

    def __init__(self, descriptor: int) -> None:
        """Map it.

        Raises:
            OSError, ValueError: it can't be mapped.
        """
        self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        self._view = memoryview(self._map)
        self._extent = _Extent(_address(self._map), len(self._map))
        if is_guarded():
            _guard()
            _extents[self._extent.start] = self._extent
            # With the mapping itself: parts of it may live longer than this object.
            weakref.finalize(self._map, _extents.pop, self._extent.start, None)
        if "torch" in sys.modules:
            _silence_torch()

    def part(self, start: int, end: int, check_file: Callable[[], None]) -> "MappedPart":
        """Bytes `start` to `end`.

        Args:
            check_file: Raises if the file was written to.
        """
        return MappedPart(self, start, end, self._view[start:end], check_file)

    @property
    def is_broken(self) -> bool:
        """Whether some of it could not be read, and reads as zeros."""
        return self._extent.is_broken

    def tensor(self) -> "Tensor":
        """The whole file as a uint8 tensor. Do not write to it."""
        import torch

        _silence_torch()
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self, start: int = 0, end: int | None = None) -> None:
        """Give pages back; they are read again when needed."""
        first = start // _AROUND * _AROUND
        last = len(self._map) if end is None else min(-(-end // _AROUND) * _AROUND, len(self._map))
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


@final
class MappedPart:
    """Bytes of a file, where they lie."""

    __slots__ = ("_check_file", "_end", "_mapping", "_start", "view")

    def __init__(
        self,
        mapping: FileMapping,
        start: int,
        end: int,
        view: memoryview,
        check_file: Callable[[], None],
    ) -> None:
        self._mapping, self._start, self._end = mapping, start, end
        self._check_file = check_file
        self.view = view
        """The bytes. What is made of them counts once `check` was called."""

    def typed(self, dtype: str) -> "Tensor":
        """All of it as a one-dimensional tensor. Do not write to it."""
        import torch

        return torch.frombuffer(self.view, dtype=to_torch(dtype))

    def check(self) -> None:
        """Make sure that what was read since are the file's bytes.

        Raises:
            CheckpointError: the file was written to, or can't be read.
        """
        self._check_file()

    def release(self) -> None:
        """Give its pages back."""
        self._mapping.release(self._start, self._end)


@cache
def is_guarded() -> bool:
    """Whether a page that can't be had ends in an error here, and not the process."""
    is_known = sys.platform == "linux" and platform.machine() in _MACHINES
    return is_known and sys.maxsize > 2**32


def file_system(descriptor: int) -> str:
    """What an open file's file system is called; "unknown" where it can't be told."""
    if not is_guarded():
        return "unknown"
    found = (ctypes.c_long * 64)()
    if _libc().fstatfs(descriptor, ctypes.byref(found)):
        return "unknown"
    return FILE_SYSTEMS.get(found[0] & 0xFFFFFFFF, "unknown")


_extents: dict[int, _Extent] = {}
"""Address -> the mapping there."""


class _SigAction(ctypes.Structure):
    """struct sigaction of Linux' C libraries."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_earlier = _SigAction()
"""What was to be done about SIGBUS before."""


def _on_bus_error(_signal: int, info: int, _context: int) -> None:
    """Let the rest of the mapping be zeros.

    The signal comes in the thread that reads, at the instruction that does, with no lock of Python
    or of the C library held: kernels, checksums and writes take bytes from memory and put them
    there. So this may run Python; then the instruction is done again.
    """
    address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
    for extent in list(_extents.values()):
        if extent.start <= address < extent.end:
            page = address // mmap.PAGESIZE * mmap.PAGESIZE
            zeros = _libc().mmap(page, extent.end - page, mmap.PROT_READ, _ANONYMOUS_HERE, -1, 0)
            if zeros == page:
                extent.is_broken = True
                return
    _libc().sigaction(_SIGBUS, ctypes.byref(_earlier), None)  # not ours: it comes again


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_on_bus_error)


@cache
def _guard() -> None:
    """Handle SIGBUS, from now on."""
    action = _SigAction(handler=ctypes.cast(_HANDLER, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    _libc().sigaction(_SIGBUS, ctypes.byref(action), ctypes.byref(_earlier))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    return libc


def _address(whole: mmap.mmap) -> int:
    """Where a mapping begins in memory."""
    buffer = ctypes.create_string_buffer(256)  # more than a Py_buffer, which begins with it
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(whole), buffer, 0)
    try:
        return ctypes.c_uint64.from_buffer(buffer).value
    finally:
        ctypes.pythonapi.PyBuffer_Release(buffer)


@cache
def _silence_torch() -> None:
    """Let torch say once, unheard, that it can't protect read-only memory from writes."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        torch.frombuffer(b"\0", dtype=torch.uint8)
