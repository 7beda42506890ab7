"""The parameters of a result in the order of its optimizer, by the order that the source's have.

A module gives its parameters module by module, in the order in which these were made; layers of a
kind have theirs in the same order. So the source's order tells the result's, whatever the number of
layers and experts.
"""

from collections.abc import Iterable, Mapping, Sequence

from streammap.architectures import key_pattern
from streammap.io.optimizer.state import Group


def grouped(groups: Sequence[Group], source_of: Mapping[str, str]) -> tuple[Group, ...]:
    """The groups of a result.

    Args:
        groups: The source's.
        source_of: Parameter of the result -> the source's whose state it has.
    """
    order = in_order([name for group in groups for name in group.names], source_of)
    group_of = {name: i for i, group in enumerate(groups) for name in group.names}
    members: list[list[str]] = [[] for _ in groups]
    for name in order:
        members[group_of[source_of[name]]].append(name)
    return tuple(
        Group(tuple(names), group.options) for names, group in zip(members, groups, strict=True)
    )


def in_order(before: Sequence[str], names: Iterable[str]) -> list[str]:
    """Names in the order of a module's parameters.

    Args:
        before: Parameters of another module of the class, in order within each group.
        names: Those of this module.
    """
    rank: dict[str, int] = {}
    for name in before:
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            rank.setdefault(key_pattern.INDEX.sub("*", ".".join(parts[:n])), len(rank))

    def place(name: str) -> list[tuple[int, int]]:
        parts = name.split(".")
        found = []
        for n, part in enumerate(parts, 1):
            shape = key_pattern.INDEX.sub("*", ".".join(parts[:n]))
            # Numbers count by themselves: layer 10 comes after layer 9.
            found.append((rank.get(shape, len(rank)), int(part) if part.isdecimal() else 0))
        return found

    return sorted(names, key=place)
