"""The Pareto front: what nothing else is at least as good as in every respect and better in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raycloud.search.space import Direction


def dominates(one: Sequence[float], other: Sequence[float], directions: Sequence[Direction]) -> bool:
    """Whether ``one`` is nowhere worse than ``other`` and better somewhere."""
    signed = [
        (a, b) if direction == "min" else (-a, -b) for a, b, direction in zip(one, other, directions, strict=True)
    ]
    return all(a <= b for a, b in signed) and any(a < b for a, b in signed)


def front(points: Mapping[str, Sequence[float]], directions: Sequence[Direction]) -> list[str]:
    """The names of the points that no other dominates, in the given order; equal points are all there.

    Args:
        points: a number for each direction, by name.
        directions: which way is better.
    """
    return [
        name
        for name, point in points.items()
        if not any(dominates(other, point, directions) for other in points.values())
    ]
