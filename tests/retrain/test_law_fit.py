"""Fits of laws to noisy pilots."""

from __future__ import annotations

import random

import numpy as np
import pytest

from raycloud.errors import TrainingError
from raycloud.retrain.law import Law
from raycloud.retrain.law_fit import fit, mean_miss, regret
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.rival_laws import PowerLaw
from tests.retrain.laws import BLOCKS, SETS, TRUE, pilots


def test_fits_predict_block_sets_that_were_held_out() -> None:
    """Of the sheet's §10.3, on curves of the law with noise: error, regret of the choice, and the rivals' regret."""
    missed, constant, regrets, at_random, powers = [], [], [], [], []
    for seed in range(12):
        source = random.Random(seed)
        truth = TRUE.with_logs(TRUE.logs() + np.asarray([source.gauss(0, 0.4) for _ in TRUE.logs()]))
        sets = source.sample(SETS, len(SETS))
        seen, held_out = sets[:11], sets[11:]
        measured = pilots(truth, seen, 0.02, seed)
        law = fit(measured, Law.neutral(truth.start_error, BLOCKS, 40, 100))
        power = fit(measured, PowerLaw.neutral(truth.start_error, BLOCKS, 40))
        unseen = pilots(truth, held_out, 0.0, seed)
        missed.append(mean_miss(law, unseen))
        mean = float(np.mean([one.error for one in measured]))
        constant.append(float(np.mean([abs(one.error - mean) for one in unseen])))
        # Choices of held-out sets at equal FLOPs: the nearer to the head the lowest block, the more steps.
        for budget in (30, 90, 360):
            candidates = []
            for blocks in held_out:
                cost = BLOCKS - min(blocks, default=BLOCKS) + 0.5 * len(blocks) + 0.5
                steps = min(200, round(budget / cost))
                error = truth.error(dict.fromkeys(blocks, 1.0), steps, 100)
                candidates.append(Pilot(blocks, steps, 100, error))
            regrets.append(regret(law, candidates))
            powers.append(regret(power, candidates))
            lowest = min(one.error for one in candidates)
            at_random.append(float(np.mean([one.error for one in candidates])) - lowest)
    assert np.mean(missed) <= 0.04 and np.mean(missed) <= 0.6 * np.mean(constant)
    assert np.mean(regrets) <= 0.5 * np.mean(at_random)
    assert np.mean(regrets) <= np.mean(powers)


def test_samples_are_fitted_only_where_pilots_have_two_sizes() -> None:
    prior = Law.neutral(0.75, BLOCKS, 40, 100)
    one_size = fit(pilots(TRUE, SETS, 0.01, 1), prior)
    assert one_size.nu == pytest.approx(prior.nu) and one_size.gamma == pytest.approx(prior.gamma)
    singles = [(block,) for block in (0, 5)]
    two_sizes = fit(pilots(TRUE, SETS, 0.01, 1) + pilots(TRUE, singles, 0.01, 1, samples=(15, 30)), prior)
    assert two_sizes.nu[1:5] == pytest.approx(prior.nu[1:5])
    assert two_sizes.nu[0] > prior.nu[0] and two_sizes.nu[5] < prior.nu[5]


def test_what_pilots_do_not_tell_stays_the_priors() -> None:
    prior = TRUE
    law = fit(pilots(TRUE, [(0,), (1,)], 0.05, 2), prior)
    assert law.omega[2:] == pytest.approx(prior.omega[2:]) and law.tau[2:] == pytest.approx(prior.tau[2:])
    assert fit([], prior) is prior


@pytest.mark.parametrize("kind", [Law, PowerLaw])
@pytest.mark.parametrize(
    ("start_error", "errors"),
    [
        (0.5, (0.9, 0.7, 40.0)),  # all got worse
        (0.5, (0.0, 0.0, 0.0)),  # below any floor
        (0.0, (0.0, 0.1, 0.2)),  # nothing to gain
        (7.5, (0.0, 1e300, 7.5)),
        (1e-300, (0.0, 1e-300, 1.0)),
    ],
)
def test_pilots_out_of_the_laws_range_leave_numbers(
    kind: type[Law] | type[PowerLaw], start_error: float, errors: tuple[float, ...]
) -> None:
    if kind is Law:
        prior: Law | PowerLaw = Law.neutral(start_error, 3, 40, 100)
    else:
        prior = PowerLaw.neutral(start_error, 3, 40)
    law = fit([Pilot((block,), 20, 50, error) for block, error in enumerate(errors)], prior)  # type: ignore[type-var]
    assert np.isfinite(law.logs()).all()
    predicted = [law.error({block: 1.0}, 20, 50) for block in range(3)]
    assert all(law.floor <= one <= start_error for one in predicted)
    if errors[0] > start_error > 1e-9:
        assert predicted[0] > prior.error({0: 1.0}, 20, 50)


def test_wrong_numbers_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match="blocks of a pilot must be below 6"):
        fit([Pilot((6,), 10, 10, 0.5)], TRUE)
