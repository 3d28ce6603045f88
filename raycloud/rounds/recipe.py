"""Settings of rounds that several recipes offer, readable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

AggregatorName = Literal["mean", "trimmed_mean", "median"]
"""``mean`` weights edges by their samples or tokens. ``trimmed_mean`` drops the lowest and highest fifth of each
number, from five edges on, and ``median`` takes the middle; both resist a few wrong edges and do not count samples."""

KeptVersions = Annotated[int, Field(ge=3)]
"""Number of versions that a history keeps: at least 3, since a run that meets damage may go back by two rounds."""
