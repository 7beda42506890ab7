"""The matrices of an npz file: each stays where it lies in it, unless it is packed."""

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from streammap.common import optional
from streammap.errors import SchemeError
from streammap.io.dtypes import FROM_TORCH
from streammap.io.storage.local import LocalFile
from streammap.planning.dense.matrix import Matrix, Transposed
from streammap.planning.dense.stored import Spool, Stored

_MAX_ENTRIES = 100_000
_MAX_UNPACKED = 8 * 2**30
_PIECE_NBYTES = 2**20


def matrices(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Matrix | None]]:
    """Name, dtype and shape of each array; and the array, if it is a matrix of floats.

    Raises:
        SchemeError: no npz, or too large for one.
        OSError: it can't be read.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > _MAX_ENTRIES:
                raise SchemeError(f"{path.name}: {len(members)} entries, at most {_MAX_ENTRIES}")
            stat = path.stat()
            kept = LocalFile(path, stat.st_size, stat.st_mtime_ns)
            for member in members:
                start = _start(file, member)
                with archive.open(member) as opened:
                    yield _array(kept, member, opened, start)
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise SchemeError(
            f"{path.name}: not an npz of matrices: {error}", hint="numpy.savez writes one"
        ) from error


def _array(
    kept: LocalFile, member: zipfile.ZipInfo, opened: IO[bytes], start: int
) -> tuple[str, str, tuple[int, ...], Matrix | None]:
    """One array of the file `kept`.

    Args:
        start: Where the entry's bytes begin, if they are not packed.
    """
    numpy = optional.library("numpy")
    name = member.filename.removesuffix(".npy")
    shape, by_columns, dtype = _header(numpy, opened)
    if len(shape) != 2 or dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        return name, str(dtype), shape, None
    size = (shape[1], shape[0]) if by_columns else (shape[0], shape[1])
    nbytes = size[0] * size[1] * dtype.itemsize
    at, native = opened.tell(), dtype.newbyteorder("=")
    if at + nbytes != member.file_size:
        raise ValueError(f"{name[:80]}: {member.file_size} bytes for {shape}")
    packed = None
    if member.compress_type != zipfile.ZIP_STORED or not dtype.isnative:
        packed = _unpacked(kept.path, member)
    for piece in _pieces(opened, nbytes):  # to the end: its checksum is there
        if packed is not None:
            packed.append(numpy.frombuffer(piece, dtype).astype(native).tobytes())
    file, first = (kept, start + at) if packed is None else (packed, 0)
    found = Stored(file, first, size, FROM_TORCH[native.name])
    return name, str(dtype), shape, Transposed(found) if by_columns else found


def _header(numpy: Any, file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether columns lie together, and dtype."""
    version = numpy.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of version {version}")
    read = f"read_array_header_{version[0]}_0"
    shape, by_columns, dtype = getattr(numpy.lib.format, read)(file)
    return tuple(map(int, shape)), bool(by_columns), dtype


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind a header of its own."""
    at = file.tell()
    file.seek(member.header_offset + 26)
    n_name, n_extra = struct.unpack("<HH", file.read(4))
    file.seek(at)
    return int(member.header_offset + 30 + n_name + n_extra)


def _unpacked(path: Path, member: zipfile.ZipInfo) -> Spool:
    if member.file_size > _MAX_UNPACKED:
        raise SchemeError(
            f"{path.name}: {member.filename[:80]} is packed and has {member.file_size} bytes, at "
            f"most {_MAX_UNPACKED} are unpacked",
            hint="save it with numpy.savez, or as safetensors",
        )
    return Spool()


def _pieces(file: IO[bytes], nbytes: int) -> Iterator[bytes]:
    for start in range(0, nbytes, _PIECE_NBYTES):
        n = min(_PIECE_NBYTES, nbytes - start)
        piece = file.read(n)
        while len(piece) < n:
            more = file.read(n - len(piece))
            if not more:
                raise EOFError("an array ends early")
            piece += more
        yield piece
    if file.read(1):
        raise ValueError("an array is longer than its header says")
