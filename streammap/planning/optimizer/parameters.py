"""The parameters of a result in the order of its optimizer, by the order that the source's have.

A module gives its parameters module by module, in the order in which these were made. Inside of a
layer the order is that of the source's layer that it was made of; layers and experts are counted.
"""

from collections.abc import Mapping, Sequence

from streammap.io.optimizer.state import Group


def grouped(groups: Sequence[Group], source_of: Mapping[str, str]) -> tuple[Group, ...]:
    """The groups of a result.

    Args:
        groups: The source's.
        source_of: Parameter of the result -> the source's whose state it has.
    """
    group_of = {name: i for i, group in enumerate(groups) for name in group.names}
    members: list[dict[str, str]] = [{} for _ in groups]
    for name, source in source_of.items():
        members[group_of[source]][name] = source
    return tuple(
        Group(tuple(in_order(group.names, own)), group.options)
        for group, own in zip(groups, members, strict=True)
    )


def in_order(before: Sequence[str], source_of: Mapping[str, str]) -> list[str]:
    """Parameters in the order of their module.

    Args:
        before: The source's, in its order.
        source_of: Parameter of the result -> the source's that it was made of.
    """
    first: dict[str, int] = {}
    for at, name in enumerate(before):
        for path in _paths(name):
            first.setdefault(path, at)

    def place(name: str) -> list[int]:
        parts, paths = name.split("."), _paths(source_of[name])
        return [
            int(part) if part.isdecimal() else first[path]
            for part, path in zip(parts, paths, strict=True)
        ]

    return sorted(source_of, key=place)


def _paths(name: str) -> list[str]:
    """A parameter's name, and those of all modules around it, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
