"""Shapes of packed integers: rows are filled up to whole words, and `weight_shape` says their end.

a.weight_packed [96, 8] int32, a.weight_shape = [96, 60]     60 columns of 4 bits, 4 to spare
"""

from collections.abc import Mapping
from dataclasses import replace

from streammap.errors import CheckpointError
from streammap.io.codecs.coded import Coded
from streammap.io.codecs.matrices import Codes
from streammap.io.dtypes import TensorSpec
from streammap.io.tensor_readers import TensorReader

_PACKED = ".weight_packed"
_NBYTES = {"I32": 4, "I64": 8}
_MOST_DIMENSIONS = 8


def read(specs: Mapping[str, TensorSpec], reader: TensorReader) -> dict[str, tuple[int, ...]]:
    """Name of a packed tensor -> its shape.

    Tensors whose codes have one shape have one shape: a few numbers are read for each of these, and
    not for each of the many experts of a model that may lie on another machine.

    Raises:
        CheckpointError: what should be a shape is none.
    """
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    made = {}
    for key, spec in specs.items():
        name = key.removesuffix("_packed")
        if not key.endswith(_PACKED) or spec.dtype != "I32" or f"{name}_shape" not in specs:
            continue
        if spec.shape not in found:
            found[spec.shape] = _numbers(f"{name}_shape", specs[f"{name}_shape"], reader)
        made[name] = found[spec.shape]
    return made


def _numbers(key: str, spec: TensorSpec, reader: TensorReader) -> tuple[int, ...]:
    item = _NBYTES.get(spec.dtype)
    if item is None or len(spec.shape) != 1 or spec.shape[0] > _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{key}: {spec.dtype} {list(spec.shape)}, expected the sizes of a tensor, I64",
            hint="download the checkpoint again, or ask who made it",
        )
    content = bytearray(item * spec.shape[0])
    if content:
        reader.read_into(key, 0, memoryview(content))
    return tuple(
        int.from_bytes(content[at : at + item], "little", signed=True)
        for at in range(0, len(content), item)
    )


def cut(coded: Coded, shape: tuple[int, ...]) -> Coded:
    """Packed integers without what fills up their rows.

    Raises:
        CheckpointError: other rows, or not as many words.
    """
    codes, whole = coded.codes, coded.spec.shape
    assert isinstance(codes, Codes)
    a_word = 32 // codes.bits
    fits = len(shape) > 1 and whole[-1] - a_word < shape[-1] <= whole[-1]
    if not fits or shape[:-1] != whole[-len(shape) : -1]:  # of a stack, perhaps of one matrix
        raise CheckpointError(
            f"{codes.key}: codes for {list(whole)}, and its shape says {list(shape)}",
            hint="download the checkpoint again, or ask who made it",
        )
    columns = shape[-1]
    return replace(
        coded,
        spec=TensorSpec(coded.spec.dtype, (*whole[:-1], columns)),
        n_columns=columns,
        codes=replace(codes, n_columns=columns),
    )
