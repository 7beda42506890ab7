"""Git LFS pointers: what a clone without git-lfs has in the place of large files.

version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""

from streammap.errors import CheckpointError
from streammap.io.storage.base import Storage, read_bytes

MAX_NBYTES = 1024
"""Of a pointer, by its specification."""
_START = b"version https://git-lfs.github.com/spec/"


def is_one(content: bytes) -> bool:
    """Whether a file's content is a pointer."""
    return len(content) < MAX_NBYTES and content.startswith(_START)


def refuse(content: bytes, where: str) -> None:
    """Refuse a pointer.

    Args:
        where: What messages call the file.

    Raises:
        CheckpointError: it is one.
    """
    if is_one(content):
        raise CheckpointError(
            f"{where}: a Git LFS pointer, expected the file that it stands for",
            hint="fetch it: git lfs install, then git lfs pull in that folder",
        )


def refuse_file(storage: Storage, name: str) -> None:
    """Refuse a file of a storage that is a pointer; of a large one nothing is read.

    Raises:
        CheckpointError: it is one, or it can't be read.
    """
    nbytes = storage.stat(name).nbytes
    if len(_START) <= nbytes < MAX_NBYTES:
        opened = storage.peek(name)
        try:
            refuse(bytes(read_bytes(opened, 0, nbytes)), storage.where(name))
        finally:
            opened.close()
