"""Alarms of drift at an edge: one for each domain that it comes to, and none while it stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from raycloud.retrain.drift import DomainSignature, DriftVerdict, TapStatistics

AlarmCause = Literal["hidden_states", "errors", "schedule"]
_SLACK, _LIMIT = 0.5, 4.0
"""Slack and limit of the cumulative sum of errors, in standard deviations of a window's mean error."""


@dataclass(frozen=True)
class ErrorReference:
    """Error that an edge's model usually has."""

    mean: float
    deviation: float
    """Standard deviation of the error of one sample."""
    samples: int
    """Number of samples that the mean is of."""

    def surplus(self, error: float, samples: int) -> float:
        """Difference of a mean over so many samples from this one, in standard deviations of it."""
        spread = self.deviation * math.sqrt(1 / samples + 1 / self.samples)
        return (error - self.mean) / max(spread, 1e-6)


@dataclass(frozen=True)
class DriftAlarm:
    """State of the alarms of an edge between its windows.

    A window raises an alarm if its hidden states are no longer those of the domain that the edge was last retrained
    for: at first those of the source. With labels, a cumulative sum of errors above the usual ones does so, too
    (CUSUM, Page 1954), because a change of the labels' meaning shows in no hidden state.

    Args:
        radius: largest distance of two signatures of one domain.
        cool_down: number of windows after an answered alarm without another.
        every: number of windows after which there is an alarm even without a drift; None for never.
    """

    radius: float
    cool_down: int = 0
    every: int | None = None
    home: DomainSignature | None = None
    """Signature of the domain that the edge was last retrained for; None for the source."""
    usual: ErrorReference | None = None
    """Errors in this domain; None without labels."""
    excess: float = 0.0
    """Cumulative sum of errors."""
    since: int | None = None
    """Number of windows since the last alarm was answered; None before the first."""

    def after(
        self,
        verdict: DriftVerdict,
        signature: DomainSignature,
        source: TapStatistics,
        error: float | None = None,
        samples: int = 1,
    ) -> tuple[AlarmCause | None, DriftAlarm]:
        """Return why a window raises an alarm, None if it does not, and the next state.

        Args:
            verdict: verdict of the detector on the window.
            signature: signature of the window, with means.
            source: statistics of the source, for the present weights.
            error: mean error of the window; None without labels.
            samples: number of samples of the window.
        """
        since = None if self.since is None else self.since + 1
        excess = self.excess
        if self.usual is not None and error is not None:
            excess = max(0.0, excess + self.usual.surplus(error, samples) - _SLACK)
        state = replace(self, excess=excess, since=since)
        if since is not None and since <= self.cool_down:
            return None, state
        moved = verdict.drifted if self.home is None else signature.distance(self.home, source) > self.radius
        cause: AlarmCause | None = None
        if moved:
            cause = "hidden_states"
        elif excess > _LIMIT:
            cause = "errors"
        elif self.every is not None and (since is None or since >= self.every):
            cause = "schedule"
        return cause, state

    def answered(self, home: DomainSignature, usual: ErrorReference | None) -> DriftAlarm:
        """State after an alarm has been answered, by a retraining or by the decision against one.

        Args:
            home: signature of the domain under the weights that the edge has now, with means.
            usual: errors in the domain with these weights; None without labels.
        """
        return replace(self, home=home, usual=usual, excess=0.0, since=0)
