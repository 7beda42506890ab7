"""What the small models of bench.vcycle and bench.align learn: the text of Python's library."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CONTEXT, BATCH = 128, 16
N_HELD_OUT = 24
_MAX_NBYTES = 6_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes as tokens."""

    seen: Tensor
    held_out: Tensor
    """[batches, batch, context]"""

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Pieces of the text that is trained on, without end. Shapes: [batch, context]."""
        _, batch, context = self.held_out.shape
        draw = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.seen) - context, (batch,), generator=draw)
            yield torch.stack([self.seen[at : at + context] for at in starts.tolist()])


def text(context: int = CONTEXT, batch: int = BATCH) -> Text:
    """The standard library's modules, one after the other; the last part is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"\n".join(file.read_bytes() for file in files)[:_MAX_NBYTES]
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    n = N_HELD_OUT * batch * context
    return Text(tokens[:-n], tokens[-n:].view(N_HELD_OUT, batch, context))
