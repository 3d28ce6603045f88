"""What a sampled value is drawn from."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from raycloud.recipe import Recipe

_DIGITS = 3
"""Of sampled floats: a recipe is read by people, and no optimum is sharper."""

Scalar = bool | int | float | str


class Choice(Recipe):
    """One of some values, none of them nearer to one than to another."""

    kind: Literal["choice"] = "choice"
    values: list[Scalar] = Field(min_length=1)

    def contains(self, value: Any) -> bool:
        """Whether it could have been drawn."""
        return any(value == one and type(value) is type(one) for one in self.values)

    def ends(self) -> list[Scalar]:
        """Values to try whether recipes are valid with."""
        return self.values

    def plain(self, value: Any) -> Scalar:
        """A drawn value as it goes into a recipe."""
        return value


class Range(Recipe):
    """A number between two others, either included: a whole one if both of them are."""

    kind: Literal["range"] = "range"
    low: int | float
    high: int | float
    step: int = Field(1, gt=0)
    """Between neighbouring whole numbers."""
    log: bool = False
    """Draw evenly in the logarithm."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high}; allowed: low < high")
        if self.log and not self.low > 0:
            raise ValueError(f"low={self.low} with log; allowed: above 0")
        if self.step > 1 and (not self.whole or self.log):
            raise ValueError(f"step={self.step}; allowed with whole numbers that are not drawn in the logarithm")
        if self.whole and (self.high - self.low) % self.step:
            raise ValueError(f"step={self.step} does not lead from {self.low} to {self.high}")
        return self

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def contains(self, value: Any) -> bool:
        """Whether it could have been drawn."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return not self.whole or (isinstance(value, int) and (value - self.low) % self.step == 0)

    def ends(self) -> list[Scalar]:
        """Values to try whether recipes are valid with."""
        return [self.low, self.high]

    def plain(self, value: Any) -> Scalar:
        """A drawn value as it goes into a recipe: whole, or of three digits and still between the ends."""
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), float(self.low)), float(self.high))


Domain = Choice | Range
Point = dict[str, Scalar]
"""A value for every key that is sampled."""
