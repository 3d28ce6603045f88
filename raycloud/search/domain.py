"""Domains from which values are sampled."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raycloud.recipe import Recipe

_DIGITS = 3
"""Significant digits of sampled floats: people read recipes, and no optimum is more precise."""

Scalar = bool | int | float | str


class Choice(Recipe):
    """Categorical domain: one of some values, without an order."""

    kind: Literal["choice"] = "choice"
    values: list[Scalar] = Field(min_length=1)

    def contains(self, value: Any) -> bool:
        """Return True if the value can be drawn."""
        return any(value == one and type(value) is type(one) for one in self.values)

    def ends(self) -> list[Scalar]:
        """Return the values with which to test whether recipes are valid."""
        return self.values

    def plain(self, value: Any) -> Scalar:
        """Return a drawn value in the form that a recipe needs."""
        return value


class Range(Recipe):
    """Number between two others, both included; an integer if both of them are integers."""

    kind: Literal["range"] = "range"
    low: int | float
    high: int | float
    step: int = Field(1, gt=0)
    """Step between neighbouring integers."""
    log: bool = False
    """Draw uniformly in the logarithm."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high}; allowed: low < high")
        if self.log and not self.low > 0:
            raise ValueError(f"low={self.low} with log; allowed: above 0")
        if self.step > 1 and (not self.whole or self.log):
            raise ValueError(f"step={self.step}; allowed: only with integers, and without log")
        if self.whole and (self.high - self.low) % self.step:
            raise ValueError(f"step={self.step} does not lead from {self.low} to {self.high}")
        return self

    @property
    def whole(self) -> bool:
        """True if the domain has integers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def contains(self, value: Any) -> bool:
        """Return True if the value can be drawn."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return not self.whole or (isinstance(value, int) and (value - self.low) % self.step == 0)

    def ends(self) -> list[Scalar]:
        """Return the values with which to test whether recipes are valid."""
        return [self.low, self.high]

    def plain(self, value: Any) -> Scalar:
        """Return a drawn value for a recipe: an integer, or a float of three digits clamped to the range."""
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), float(self.low)), float(self.high))


Domain = Choice | Range
Point = dict[str, Scalar]
"""Values by key, one for every sampled key."""
