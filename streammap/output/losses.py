"""What rounding to a narrower dtype lost: told in reports and records, refused where asked."""

from collections.abc import Mapping

from streammap.common.losses import NOTHING, Losses
from streammap.errors import OutputError, some
from streammap.planning.plan import Plan


def total(lost: Mapping[str, Losses]) -> Losses:
    """All together."""
    whole = NOTHING
    for one in lost.values():
        whole = whole.plus(one)
    return whole


def words(lost: Mapping[str, Losses]) -> str:
    """How many numbers of how many tensors, and which tensors lost most."""
    keys = sorted(lost, key=lambda key: (-sum(lost[key]), key))
    tensors = "1 tensor" if len(keys) == 1 else f"{len(keys)} tensors"
    whole = total(lost)
    return f"rounding loses {sum(whole)} numbers of {tensors} ({some(keys)}): {whole}"


def notes(lost: Mapping[str, Losses]) -> tuple[str, ...]:
    """The same as notes: none where nothing was lost."""
    return (words(lost),) if lost else ()


def check(plan: Plan, lost: Mapping[str, Losses]) -> None:
    """Refuse losses, where the plan is strict.

    Raises:
        OutputError: a number overflowed, or vanished.
    """
    if plan.strict and lost:
        raise OutputError(
            f"--strict: {words(lost)}",
            hint="give these tensors a wider dtype (--dtype KEY=float32,...), or leave --strict "
            "out: the same command goes on from here",
        )


def as_json(lost: Losses) -> dict[str, object]:
    """What a record has of a tensor; empty where nothing was lost."""
    return {name: n for name, n in lost._asdict().items() if n}


def of_record(content: Mapping[str, object]) -> dict[str, Losses]:
    """Key -> what was lost, by the record of a result."""
    tensors = content.get("tensors")
    found: dict[str, Losses] = {}
    for key, entry in tensors.items() if isinstance(tensors, Mapping) else ():
        if isinstance(entry, Mapping):
            counts = [n for name in Losses._fields if isinstance(n := entry.get(name, 0), int)]
            if any(counts) and len(counts) == len(Losses._fields):
                found[key] = Losses(*counts)
    return found
