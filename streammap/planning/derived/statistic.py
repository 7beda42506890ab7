"""What all numbers of a tensor decide together: norms, dot products, thresholds.

It is found out when it is first asked for, just before the tensor is computed, so that the second
reading often finds the bytes in the system's cache; and so that a run that goes on after a kill
does it only for tensors that it still has to write. Blocks are fixed, and their results are put
together in order: the same bits whoever computes which, in however many threads.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, final

from streammap.planning.graph import FormReader

BLOCK = 2**16
"""Numbers of a block."""
B = TypeVar("B")
R = TypeVar("R")


@final
class Statistic(Generic[B, R]):
    """Computed once, by the threads that ask for it."""

    def __init__(
        self,
        n_elements: int,
        of_block: Callable[[int, int, FormReader], B],
        combine: Callable[[Sequence[B]], R],
    ) -> None:
        """Compute nothing yet.

        Args:
            of_block: (first element, number of elements, reader) -> a block's result.
            combine: Takes the results of all blocks, in order.
        """
        self._n_elements, self._of_block, self._combine = n_elements, of_block, combine
        self._start_over()

    def _start_over(self) -> None:
        n = -(-self._n_elements // BLOCK)
        self._changed = threading.Condition()
        self._left = list(range(n - 1, -1, -1))
        self._blocks: dict[int, B] = {}
        self._found: list[R] = []

    def __getstate__(self) -> tuple[object, ...]:
        return self._n_elements, self._of_block, self._combine

    def __setstate__(self, state: tuple[int, object, object]) -> None:
        self._n_elements, self._of_block, self._combine = state  # type: ignore[assignment]
        self._start_over()

    def get(self, read: FormReader) -> R:
        """The result; threads that ask at once share the work.

        Raises:
            CheckpointError: a source can't be read; a later call tries again.
        """
        while True:
            with self._changed:
                if self._found:
                    return self._found[0]
                if not self._left:
                    if len(self._blocks) == -(-self._n_elements // BLOCK):
                        ordered = [self._blocks[i] for i in sorted(self._blocks)]
                        self._found, self._blocks = [self._combine(ordered)], {}
                        self._changed.notify_all()
                        continue
                    self._changed.wait()
                    continue
                number = self._left.pop()
            start = number * BLOCK
            try:
                block = self._of_block(start, min(BLOCK, self._n_elements - start), read)
            except BaseException:
                with self._changed:
                    self._left.append(number)
                    self._changed.notify_all()
                raise
            with self._changed:
                self._blocks[number] = block
                self._changed.notify_all()
