"""Files mapped into memory: a part at a time, for kernels that read it where it lies, or whole.

Pages of a mapping count as resident memory. Around a page that is used Linux maps others, up to
2 MiB of them, but never beyond the mapping: so a part is mapped by itself, and takes what it is.

A page that can't be had, because the file was cut short or the disk fails, makes the system send
SIGBUS, which by default ends the process without a word. Here the mapping reads as zeros from then
on, and `check` tells.
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

from streammap.errors import CheckpointError
from streammap.io.dtypes import DTYPE_BITS, to_torch

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
MIN_NBYTES = 2**20
"""Smaller parts are read: mapping one takes as long as copying it."""
_HUGE = 2**21
"""Pages that lie alike within so many bytes of a file and of memory are mapped many at a time."""
_MACHINES = ("x86_64", "aarch64")
_FIXED, _NORESERVE = 0x10, 0x4000
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED | _NORESERVE
_SIGBUS, _SA_SIGINFO, _ADDRESS_AT = 7, 4, 16


@final
class _Extent:
    """Where a mapping is."""

    __slots__ = ("end", "is_broken", "start")

    def __init__(self, whole: mmap.mmap) -> None:
        self.start = _address(whole)
        self.end = self.start + -(-len(whole) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.is_broken = False
        """Whether a page of it could not be had."""
        if is_guarded():
            _guard()
            _extents[self.start] = self
            weakref.finalize(whole, _extents.pop, self.start, None)


@final
class MappedPart:
    """Addresses that parts of files are mapped to, one at a time. For one thread."""

    def __init__(self, nbytes: int) -> None:
        """Take addresses for parts of up to `nbytes`; no memory."""
        self._map = mmap.mmap(-1, nbytes + 2 * _HUGE + 2 * mmap.PAGESIZE)
        self._view = memoryview(self._map)
        self._extent = _Extent(self._map)
        self._used = (0, 0)
        """First byte of what is mapped, and how many."""
        self._at = (0, 0)
        """Where the part begins and ends, counted from the first address."""
        self._check: Callable[[], None] | None = None
        self._name = ""

    @property
    def is_open(self) -> bool:
        """Whether a part is mapped."""
        return self._check is not None

    @property
    def view(self) -> memoryview:
        """The part's bytes. What is made of them counts once `check` was called."""
        return self._view[slice(*self._at)]

    def typed(self, dtype: str) -> "Tensor":
        """The part as a one-dimensional tensor. Do not write to it."""
        import torch

        start, end = self._at
        count = (end - start) * 8 // DTYPE_BITS[dtype]
        return torch.frombuffer(self._map, dtype=to_torch(dtype), offset=start, count=count)

    def open(
        self, name: str, descriptor: int, start: int, end: int, check: Callable[[], None]
    ) -> None:
        """Map bytes `start` to `end` of a file.

        Args:
            name: How messages name it.
            descriptor: The file.
            start: The first byte.
            end: One past the last.
            check: Raises if the file was written to.

        Raises:
            OSError: they can't be mapped.
        """
        self.close()
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        base = self._extent.start
        first = -(-base // _HUGE) * _HUGE + page % _HUGE
        nbytes = -(-(end - page) // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_SHARED | _FIXED
        if _libc().mmap(first, nbytes, mmap.PROT_READ, flags, descriptor, page) != first:
            raise OSError(ctypes.get_errno(), "can't be mapped")
        self._used = first, nbytes
        self._at = first - base + start - page, first - base + end - page
        self._name, self._check, self._extent.is_broken = name, check, False

    def check(self) -> None:
        """Make sure that what was read since are the file's bytes.

        Raises:
            CheckpointError: the file was written to, or can't be read.
        """
        if self._check is not None:
            self._check()
            if self._extent.is_broken:
                raise CheckpointError(
                    f"{self._name}: can't be read through a mapping",
                    hint="check the disk, or use --reader pread",
                )

    def close(self) -> None:
        """Give the part's pages back."""
        if self._check is not None:
            first, nbytes = self._used
            _libc().mmap(first, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, _NOTHING, -1, 0)
            self._check = None


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
        self._extent = _Extent(self._map)

    @property
    def is_broken(self) -> bool:
        """Whether some of it could not be read, and reads as zeros."""
        return self._extent.is_broken

    def tensor(self) -> "Tensor":
        """The whole file as a uint8 tensor. Do not write to it."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self) -> None:
        """Give pages back; they are read again when needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


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
            zeros = _libc().mmap(page, extent.end - page, mmap.PROT_READ, _NOTHING, -1, 0)
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
