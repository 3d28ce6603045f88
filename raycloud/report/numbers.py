"""Formatting of numbers for tables and plots: bytes, and numbers that may not be finite, which files store as null."""

from __future__ import annotations

import math


def shown(value: float | None, how: str) -> str:
    """Format a number for a table, such as with ``.2f``; ``not finite`` if it is missing or diverged."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, how)


def plotted(value: float | None) -> float:
    """Return a number for a plot; NaN, which is not drawn, if it is missing or diverged."""
    return value if value is not None and math.isfinite(value) else math.nan


def kilobytes(size: float) -> str:
    """Format bytes as kilobytes for a table, without the unit."""
    return f"{size / 1e3:,.1f}"
