"""Aggregators that recipes offer, readable without torch."""

from __future__ import annotations

from typing import Literal

AggregatorName = Literal["mean", "trimmed_mean", "median"]
"""``mean`` weights edges by their samples or tokens. ``trimmed_mean`` drops the lowest and highest fifth of each
number, from five edges on, and ``median`` takes the middle; both resist a few wrong edges and do not count samples."""
