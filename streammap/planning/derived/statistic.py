"""What all numbers of a tensor decide together: norms, dot products, thresholds.

It is found out when it is first asked for, just before the tensor is computed, so that the second
reading often finds the bytes in the system's cache; and so that a run that goes on after a kill
does it only for tensors that it still has to write. Blocks are fixed, and their results are added
up in order: the same bits whoever computes which, in however many threads.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, final

from streammap.planning.graph import FormReader

BLOCK, _LARGEST = 2**14, 2**17
"""Numbers of a block: so few that they stay in a processor's cache, so many that calls of kernels
do not count."""
_BLOCK_NBYTES = 9 * 2**18
"""Four threads have room for a block each in a run of 32 MiB."""
N_AHEAD = 8
"""Blocks whose results may wait for an earlier one, at most."""
B = TypeVar("B")
R = TypeVar("R")
_beginning = threading.Lock()


def block_of(each_nbytes: int) -> int:
    """Numbers of a block that each take so many bytes while they are computed with.

    A power of two, whatever the memory of a run: sums are added up block by block.
    """
    n = BLOCK
    while n < _LARGEST and 2 * n * each_nbytes <= _BLOCK_NBYTES:
        n *= 2
    return n


@final
class Statistic(Generic[B, R]):
    """Computed once, by the threads that ask for it."""

    def __init__(
        self,
        n_elements: int,
        of_block: Callable[[int, int, FormReader], B],
        add: Callable[[B, B], B],
        finish: Callable[[B, FormReader], R],
        *,
        in_order: bool = True,
        lasts: bool = True,
        block: int = BLOCK,
    ) -> None:
        """Compute nothing yet.

        Args:
            of_block: (first element, number of elements, reader) -> a block's result.
            add: (sum so far, a block's result) -> their sum; it may write to the first.
            finish: (sum of all, reader) -> the statistic.
            in_order: False where any order gives the same bits, as with counts: no block waits.
            lasts: False where the result is too large to be kept for each tensor of a model: it
                goes when all threads read something else, and may have to be found out again.
            block: Numbers of a block.
        """
        self._n_elements, self._of_block = n_elements, of_block
        self._add, self._finish, self._in_order = add, finish, in_order
        self._lasts, self._block = lasts, block
        self._round: _Round[B] | None = None
        self._found: Callable[[], _Held[R] | None] = _nothing

    def __getstate__(self) -> tuple[object, ...]:
        given = self._n_elements, self._of_block, self._add, self._finish
        return *given, self._in_order, self._lasts, self._block

    def __setstate__(self, state: tuple[int, Any, Any, Any, bool, bool, int]) -> None:
        n, of_block, add, finish, in_order, lasts, block = state
        self.__init__(n, of_block, add, finish, in_order=in_order, lasts=lasts, block=block)

    def get(self, read: FormReader) -> R:
        """The result; threads that ask at once share the work.

        Raises:
            CheckpointError: a source can't be read; a later call tries again.
        """
        while (held := self._found()) is None:
            current = self._current()
            number = None if current is None else current.take()
            if current is None or number is None:
                continue
            try:
                if number == current.n_blocks:
                    held = _Held(self._finish(current.total, read))
                    with _beginning:
                        self._found = partial(_itself, held) if self._lasts else weakref.ref(held)
                        self._round = None
                    current.end()
                    break
                start = number * self._block
                n = min(self._block, self._n_elements - start)
                current.give(number, self._of_block(start, n, read))
            except BaseException:
                current.give_up(number)
                raise
        if not self._lasts:
            read.kept[self] = held
        return held.value

    def _current(self) -> "_Round[B] | None":
        """The round that is under way; None where it has ended meanwhile."""
        with _beginning:
            if self._round is None and self._found() is None:
                self._round = _Round(-(-self._n_elements // self._block), self._add, self._in_order)
            return self._round


@final
class _Held(Generic[R]):
    """A result that can be referred to weakly."""

    def __init__(self, value: R) -> None:
        self.value = value


def _nothing() -> None:
    return None


def _itself(held: _Held[R]) -> _Held[R]:
    return held


@final
class _Round(Generic[B]):
    """Who computes which block: of a statistic that is being found out."""

    def __init__(self, n_blocks: int, add: Callable[[B, B], B], in_order: bool) -> None:
        self.n_blocks, self._add, self._in_order = n_blocks, add, in_order
        self._changed = threading.Condition()
        self._next, self._n_added = 0, 0
        self._again: list[int] = []
        """Blocks that failed."""
        self._waiting: dict[int, B] = {}
        self._sum: list[B] = []
        self._is_over = False

    @property
    def total(self) -> B:
        """The sum of all blocks."""
        return self._sum[0]

    def take(self) -> int | None:
        """A block to compute, or n_blocks to finish; None when another thread has finished."""
        with self._changed:
            while not self._is_over:
                if self._again:
                    return self._again.pop()
                ahead = self._next - self._n_added
                if self._next < self.n_blocks and (not self._in_order or ahead < N_AHEAD):
                    self._next += 1
                    return self._next - 1
                if self._next == self._n_added == self.n_blocks:
                    self._next += 1
                    return self.n_blocks
                self._changed.wait()
            return None

    def give(self, number: int, block: B) -> None:
        """Add the result of a block, when its turn comes."""
        with self._changed:
            self._waiting[number] = block
            while self._waiting:
                first = self._n_added if self._in_order else number
                if first not in self._waiting:
                    break
                found = self._waiting.pop(first)
                self._sum = [self._add(self._sum[0], found) if self._sum else found]
                self._n_added += 1
            self._changed.notify_all()

    def give_up(self, number: int) -> None:
        """Leave a block to whoever asks next."""
        with self._changed:
            self._again.append(number)
            self._changed.notify_all()

    def end(self) -> None:
        """Let go of all who wait."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
