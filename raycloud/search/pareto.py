"""Pareto front: the points that no other point dominates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raycloud.search.space import Direction


def dominates(one: Sequence[float], other: Sequence[float], directions: Sequence[Direction]) -> bool:
    """Return True if ``one`` is at least as good as ``other`` in every direction and better in one."""
    signed = [
        (a, b) if direction == "min" else (-a, -b) for a, b, direction in zip(one, other, directions, strict=True)
    ]
    return all(a <= b for a, b in signed) and any(a < b for a, b in signed)


def pareto_front(points: Mapping[str, Sequence[float]], directions: Sequence[Direction]) -> list[str]:
    """Return the names of the points on the Pareto front, in the given order; equal points are all on it.

    A point with a number that is not finite is not on the front and dominates no point.

    Args:
        points: numbers by name, one for each direction.
        directions: direction of each number, "min" or "max".
    """
    finite = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    return [
        name
        for name, point in finite.items()
        if not any(dominates(other, point, directions) for other in finite.values())
    ]
