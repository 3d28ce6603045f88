"""Formatting of numbers that may not be finite, which files store as null, for tables and plots."""

from __future__ import annotations

import math


def shown(value: float | None, how: str) -> str:
    """Format a number for a table, such as with ``.2f``; ``not finite`` if it is missing or diverged."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, how)


def plotted(value: float | None) -> float:
    """Return a number for a plot; NaN, which is not drawn, if it is missing or diverged."""
    return value if value is not None and math.isfinite(value) else math.nan
