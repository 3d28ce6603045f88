"""Priors from gradients, and what pilots add to them."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest

from raycloud.errors import TrainingError
from raycloud.retrain.law import Law
from raycloud.retrain.law_fit import fit, mean_miss
from raycloud.retrain.law_prior import SimulatedDrift, fit_prior, leave_one_kind_out, mean_misses
from raycloud.retrain.pilots import Pilot
from tests.retrain.laws import BLOCKS, SETS, TRUE, pilots

KINDS = ["invert", "noise", "blur", "shift"]


def drifts(seed: int, count: int = 20, hidden: float = 0.0) -> list[SimulatedDrift]:
    """Drifts whose ceilings follow magnitudes, and whose steps and samples follow signal-to-noise ratios.

    Ceilings differ beside by a factor that gradients do not tell, with logarithms of deviation ``hidden``.
    """
    source = random.Random(seed)
    made = []
    for index in range(count):
        lift = [source.gauss(0, 0.8) for _ in range(BLOCKS)]
        clear = [source.gauss(0, 0.8) for _ in range(BLOCKS)]
        start = source.uniform(0.5, 0.9)
        law = Law(
            start,
            start * 0.15,
            0.4,
            20.0,
            tuple(
                omega * math.exp(0.8 * one + source.gauss(0, hidden))
                for omega, one in zip(TRUE.omega, lift, strict=True)
            ),
            tuple(tau * math.exp(-0.6 * one) for tau, one in zip(TRUE.tau, clear, strict=True)),
            TRUE.nu,
            0.5,
        )
        magnitude = tuple(math.exp(one) * (BLOCKS - block) for block, one in enumerate(lift))
        snr = tuple(0.3 * math.exp(one) for one in clear)
        sets = source.sample(SETS, 8)
        made.append(
            SimulatedDrift(
                KINDS[index % len(KINDS)],
                start,
                magnitude,
                snr,
                tuple(pilots(law, sets, 0.02, seed + index, (40, 100))),
            )
        )
    return made


def test_the_prior_learns_from_gradients_and_holds_for_kinds_of_drift_that_it_never_saw() -> None:
    simulated, fresh = drifts(0), drifts(500, 14)
    prior = fit_prior(simulated)
    assert 0.5 < prior.rho < 1.1 and 0.3 < prior.tau_power < 1.0
    by_kind = leave_one_kind_out(simulated)
    assert set(by_kind) == set(KINDS)
    assert np.mean(list(by_kind.values())) < 0.04
    known = [mean_miss(prior.law(one.magnitude, one.snr, one.start_error), one.pilots) for one in fresh]
    blind = [mean_miss(prior.law(prior.magnitude, prior.snr, one.start_error), one.pilots) for one in fresh]
    assert np.mean(known) < 0.8 * np.mean(blind)


def test_pilots_tell_what_gradients_do_not() -> None:
    prior = fit_prior(drifts(0))
    guessed, fitted = [], []
    for one in drifts(500, 14, hidden=0.6):
        law = prior.law(one.magnitude, one.snr, one.start_error)
        sets = list(dict.fromkeys(pilot.blocks for pilot in one.pilots))
        seen = [pilot for pilot in one.pilots if pilot.blocks in sets[:5]]
        unseen = [pilot for pilot in one.pilots if pilot.blocks in sets[5:]]
        guessed.append(mean_miss(law, unseen))
        fitted.append(mean_miss(fit(seen, law, spread=0.6), unseen))
    assert np.mean(fitted) < 0.9 * np.mean(guessed)


def test_a_prior_of_gradients_beyond_all_seen_stays_finite() -> None:
    prior = fit_prior(drifts(0, 7))
    law = prior.law([0.0, 1e300, 1.0, 1e-300, 5.0, 2.0], [0.0, 1e300, 1.0, 1e-300, 5.0, 2.0], 0.8)
    assert np.isfinite(law.logs()).all() and 0 < law.error({0: 1.0, 1: 1.0}, 40, 100) < 0.8


def test_wrong_numbers_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match="snr must be finite and 0 or more, got nan"):
        fit_prior(drifts(0, 7)).law([1.0] * 6, [math.nan] * 6, 0.5)
    with pytest.raises(TrainingError, match="magnitude and snr must be 6 numbers each, got 5 and 6"):
        fit_prior(drifts(0, 7)).law([1.0] * 5, [1.0] * 6, 0.5)
    with pytest.raises(TrainingError, match="simulated drifts must have pilots"):
        fit_prior([])
    with pytest.raises(TrainingError, match="drifts must be of 2 or more kinds"):
        leave_one_kind_out(drifts(0, 1))


def test_a_prior_without_gradients_is_the_same_law_for_all_drifts() -> None:
    prior = fit_prior(drifts(0, 8), gradients=False)
    one, other = drifts(7, 2)
    assert prior.law(one.magnitude, one.snr, 0.6) == prior.law(other.magnitude, other.snr, 0.6)
    assert prior.law(one.magnitude, one.snr, 0.6).logs() == pytest.approx(prior.typical_law(0.6).logs())
    assert (prior.rho, prior.tau_power, prior.nu_power) == (0, 0, 0)
    assert 0 < prior.typical.beta < 1


def test_mean_misses_are_of_each_set_of_blocks() -> None:
    def law(start: float) -> Law:
        return dataclasses.replace(TRUE, start_error=start)

    expected = [law(0.5).error({0: 1.0}, 30, 100), law(0.7).error({0: 1.0}, 30, 100), law(0.7).error({}, 30, 100)]
    gains = TRUE.omega, TRUE.omega
    first = SimulatedDrift("blur", 0.5, *gains, (Pilot((0,), 30, 100, expected[0] + 0.02),))
    second = SimulatedDrift(
        "shift", 0.7, *gains, (Pilot((0,), 30, 100, expected[1] + 0.04), Pilot((), 30, 100, expected[2] - 0.01))
    )
    assert mean_misses(law, [first, second]) == pytest.approx({(0,): 0.03, (): -0.01})
