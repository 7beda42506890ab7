"""Numbers that a narrower dtype can't hold."""

from typing import NamedTuple


class Losses(NamedTuple):
    """How many numbers became others than their nearest kin when they were rounded."""

    overflowed: int = 0
    """Finite ones that became infinite."""
    vanished: int = 0
    """Ones that became 0."""

    def plus(self, other: "Losses") -> "Losses":
        """Both together."""
        return Losses(self.overflowed + other.overflowed, self.vanished + other.vanished)

    def __str__(self) -> str:
        counts = ((self.overflowed, "overflow to infinity"), (self.vanished, "vanish to 0"))
        return " and ".join(f"{n} {what}" for n, what in counts if n)


NOTHING = Losses()
