"""Whether the parts of a quantised tensor are stored as its format reads them."""

from collections.abc import Mapping

from streammap.errors import CheckpointError
from streammap.io.codecs.coded import Coded
from streammap.io.codecs.matrices import Matrix, Numbers
from streammap.io.dtypes import TensorSpec

_HINT = "download the checkpoint again: a shard may be incomplete"


def check_parts(coded: Coded, specs: Mapping[str, TensorSpec]) -> None:
    """Hold scales and zero points to be one of each for each block, stored as they are read.

    Raises:
        CheckpointError: naming the one that is not.
    """
    for part, dtype in (
        (coded.scales, _dtype_of(coded.scales)),
        (coded.zeros, _dtype_of(coded.zeros)),
        (coded.factor, _dtype_of(coded.factor)),
        (coded.divisor, _dtype_of(coded.divisor)),
        (coded.groups, "I32"),
    ):
        if part is not None and specs[part.key].dtype != dtype:
            raise CheckpointError(
                f"{part.key}: dtype {specs[part.key].dtype}, expected {dtype}", hint=_HINT
            )
    for one in (coded.factor, coded.divisor):
        if one is not None and specs[one.key].n_elements != 1:
            raise CheckpointError(
                f"{one.key}: shape {list(specs[one.key].shape)}, expected one number", hint=_HINT
            )
    if coded.scales is None or coded.zeros is None:
        return
    scales, zeros = specs[coded.scales.key], specs[coded.zeros.key]
    n_columns = coded.scales.n_columns
    n_rows = scales.n_elements // max(1, n_columns)
    needed = coded.zeros.stretch((0, n_rows))[1]
    if coded.zeros.n_columns != n_columns or zeros.nbytes != needed:
        raise CheckpointError(
            f"{coded.zeros.key}: zero points {list(zeros.shape)} ({zeros.dtype}) for scales "
            f"{list(scales.shape)}, expected one for each scale",
            hint=_HINT,
        )


def _dtype_of(part: Matrix | None) -> str:
    """The dtype that a matrix is stored in."""
    return part.dtype if isinstance(part, Numbers) else "I32"
