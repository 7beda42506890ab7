"""Which process writes which shard."""

from collections.abc import Sequence


def assign_shards(sizes: Sequence[int], world_size: int) -> tuple[int, ...]:
    """The rank that writes each shard: neighbours go together, since they read the same files.

    Shards lie side by side on a line as long as all of them; the line is cut in equal parts, and a
    shard belongs to the part that its middle is in. No rank gets more than an equal part and the
    largest shard. If only one shard has anything to write, it is rank 0's.

    Args:
        sizes: Bytes of each shard that are still to be written.
    """
    total, before = sum(sizes), 0
    if max(sizes, default=0) == total:
        return (0,) * len(sizes)
    owners = []
    for nbytes in sizes:
        middle = 2 * before + nbytes  # twice, to stay whole
        owners.append(min(world_size * middle // (2 * total), world_size - 1))
        before += nbytes
    return tuple(owners)
