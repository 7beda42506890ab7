"""A checkpoint with quantised tensors, as one of plain tensors."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from streammap.errors import CheckpointError
from streammap.io.checkpoint import Checkpoint
from streammap.io.codecs import formats, packed_shape, quantization_config
from streammap.io.codecs.coded import Coded
from streammap.io.codecs.quantization_config import QuantizationConfig
from streammap.io.codecs.reader import DecodedTensors
from streammap.io.formats.safetensors_header import Slot

_WORDS = {"BF16": "bfloat16", "F16": "float16"}


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised tensors decoded as they are read; a note tells of them.

    Its config.json stays. One without quantised tensors, or whose format is not read, is itself.

    Raises:
        CheckpointError: codes without their scales, of shapes that don't fit, or that would be
            read over a network many times.
    """
    specs = {key: slot.spec for key, slot in checkpoint.slots.items()}
    table = quantization_config.find(checkpoint.config or {})
    # Floats of 8 bits that are no model's are data, and stay what they are.
    is_model = checkpoint.config is not None
    shapes = packed_shape.read(specs, checkpoint.reader)
    found = formats.find(specs, QuantizationConfig(table or {}), shapes, casts=is_model)
    if not found.coded:
        return checkpoint
    if checkpoint.is_streamed:
        _check_streamed(checkpoint, found)
    of_codes = {coded.codes.key: key for key, coded in found.coded.items()}
    slots: dict[str, Slot] = {}
    file_of: dict[str, str] = {}
    for stored, slot in checkpoint.slots.items():
        key = of_codes.get(stored)
        if key is None and stored in found.absorbed:
            continue
        # A decoded tensor lies nowhere as it is: it stands where its codes do.
        slots[key or stored] = slot if key is None else Slot(key, found.coded[key].spec, slot.start)
        if stored in checkpoint.file_of:
            file_of[key or stored] = checkpoint.file_of[stored]
    return replace(
        checkpoint,
        slots=slots,
        file_of=file_of,
        reader=DecodedTensors(checkpoint.reader, found.coded),
        notes=(*checkpoint.notes, *_notes(found.coded.values())),
        stored=checkpoint,
        parts_of={key: coded.stored for key, coded in found.coded.items()},
    )


def _notes(coded: Iterable[Coded]) -> list[str]:
    """How many tensors of which format there are."""
    counts = Counter((each.format, each.spec.dtype) for each in coded)
    return [
        f"{n} {'tensor is' if n == 1 else 'tensors are'} quantised ({name}), "
        f"read as {_WORDS[dtype]}"
        for (name, dtype), n in counts.items()
    ]


def _check_streamed(checkpoint: Checkpoint, found: formats.Decoded) -> None:
    """Refuse what is transposed: each part of it is spread over all of its codes."""
    for coded in found.coded.values():
        if coded.is_transposed:
            raise CheckpointError(
                f"{checkpoint.label}: {coded.codes.key}: {coded.format} is stored transposed, "
                "which can't be read over a network",
                hint="use it without --stream, or download it first",
            )
