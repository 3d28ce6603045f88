"""Laws of retraining: monotone curves, fits to noisy pilots, priors from gradients, and what rivals cannot say."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import TrainingError
from raycloud.retrain.cost import Budget, ModelCost, WidthCost
from raycloud.retrain.law import (
    Law,
    Pilot,
    PilotTable,
    PowerLaw,
    Score,
    SimulatedDrift,
    fit,
    fit_prior,
    leave_one_kind_out,
    mean_miss,
    regret,
)
from raycloud.retrain.planner import plan

BLOCKS = 6
# Early blocks have the higher ceilings, late blocks come near theirs with fewer steps and samples.
TRUE = Law(
    0.75,
    0.1,
    head_omega=0.4,
    head_tau=20.0,
    omega=(1.8, 1.2, 1.0, 0.9, 0.9, 0.7),
    tau=(150.0, 90.0, 60.0, 40.0, 25.0, 12.0),
    nu=(150.0, 100.0, 80.0, 50.0, 40.0, 25.0),
    gamma=0.5,
)
SETS: list[tuple[int, ...]] = [
    *[(block,) for block in range(BLOCKS)],
    *[(0, 5), (4, 5), (0, 1), (2, 3), (1, 4), (0, 1, 2), (3, 4, 5), (1, 3, 5), (0, 2, 4)],
    *[tuple(range(BLOCKS)), (0, 3), (2, 5), ()],
]

positive = st.floats(0.01, 100)


@st.composite
def laws(draw: st.DrawFn) -> Law:
    start = draw(st.floats(0, 8))
    blocks = draw(st.integers(1, 5))
    numbers = [tuple(draw(positive) for _ in range(blocks)) for _ in range(3)]
    floor = start * draw(st.floats(0, 1))
    return Law(start, floor, draw(positive), draw(positive), *numbers, gamma=draw(st.floats(0, 3)))


def trained(source: random.Random, law: Law) -> dict[int, float]:
    blocks = source.sample(range(len(law.omega)), source.randint(0, len(law.omega)))
    return {block: source.choice([0.25, 0.5, 0.75, 1.0]) for block in blocks}


@settings(deadline=None)
@given(law=laws(), seed=st.integers(0, 1000), steps=st.integers(0, 500), samples=st.integers(1, 500))
def test_the_error_falls_with_steps_samples_widths_and_blocks(law: Law, seed: int, steps: int, samples: int) -> None:
    source = random.Random(seed)
    chosen = trained(source, law)
    error = law.error(chosen, steps, samples)
    assert law.floor <= error <= law.start_error
    assert law.error(chosen, steps + 7, samples) <= error
    assert law.error(chosen, steps, samples + 7) <= error
    for block in range(len(law.omega)):
        wider = min(1.0, chosen.get(block, 0.25) + 0.25)
        assert law.error({**chosen, block: wider}, steps, samples) <= error + 1e-12
    assert law.error(chosen, 0, samples) == law.start_error


def test_the_law_is_the_formula() -> None:
    value = 1.8 * 0.25**0.5 * (1 - math.exp(-60 / 150)) * (1 - math.exp(-100 / 150))
    value += 0.7 * (1 - math.exp(-60 / 12)) * (1 - math.exp(-100 / 25))
    value += 0.4 * (1 - math.exp(-60 / 20))
    assert TRUE.error({0: 0.25, 5: 1.0}, 60, 100) == pytest.approx(0.1 + 0.65 * math.exp(-value))
    table = TRUE.value(np.arange(BLOCKS)[:, None], 1.0, np.asarray([[10, 60]]), 100)
    assert table.shape == (BLOCKS, 2)
    assert table[5, 1] == pytest.approx(0.7 * (1 - math.exp(-5)) * (1 - math.exp(-4)))


def pilots(
    law: Law, sets: list[tuple[int, ...]], noise: float, seed: int, samples: tuple[int, ...] = (100,)
) -> list[Pilot]:
    source = random.Random(seed)
    return [
        Pilot(
            blocks, steps, size, max(0.0, law.error(dict.fromkeys(blocks, 1.0), steps, size) + source.gauss(0, noise))
        )
        for blocks in sets
        for steps in (10, 20, 40)
        for size in samples
    ]


@pytest.mark.parametrize("law", [TRUE, PowerLaw(0.75, 0.1, 0.4, (0.5, 0.4, 0.3, 0.3, 0.2, 0.2), 0.6, 40.0, 0.5)])
def test_derivatives_are_those_of_the_values(law: Law | PowerLaw) -> None:
    source = random.Random(3)
    some = [
        Pilot(tuple(chosen), source.randint(1, 90), source.randint(1, 200), 0.5, tuple(chosen.values()))
        for chosen in (trained(source, TRUE) for _ in range(12))
    ]
    table = PilotTable.of(some, BLOCKS)
    logs = law.logs()
    values, slopes = law.exponents(logs, table)
    for pilot, value in zip(some, values, strict=True):
        left = law.floor + (law.start_error - law.floor) * math.exp(-value)
        assert left == pytest.approx(law.error(pilot.trained, pilot.steps, pilot.samples))
    for index in range(len(logs)):
        if isinstance(law, PowerLaw) and index == len(logs) - 1:
            continue  # the unit of steps is not fitted
        step = np.zeros(len(logs))
        step[index] = 1e-6
        numeric = (law.exponents(logs + step, table)[0] - law.exponents(logs - step, table)[0]) / 2e-6
        assert slopes[:, index] == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    assert law.with_logs(logs).logs() == pytest.approx(logs)


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


def crossing(law: Law | PowerLaw) -> tuple[bool, bool]:
    """Whether block 0 is worth more than 5 at equal FLOPs, with few and with many: 5 gets 4 times the steps."""
    return tuple(  # type: ignore[return-value]
        float(law.value(0, 1.0, steps, 300)) > float(law.value(5, 1.0, 4 * steps, 300)) for steps in (10, 300)
    )


@settings(max_examples=50, deadline=None)
@given(values=st.lists(positive, min_size=6, max_size=6), beta=st.floats(0.05, 2))
def test_no_power_law_lets_late_blocks_win_with_few_steps_and_early_ones_with_many(
    values: list[float], beta: float
) -> None:
    few, many = crossing(PowerLaw(1.0, 0.1, 0.3, tuple(values), beta, 40.0))
    assert few == many


def test_the_saturating_law_finds_that_crossing_and_the_power_law_does_not() -> None:
    assert crossing(TRUE) == (False, True)
    source = random.Random(4)
    measured = [
        Pilot(blocks, steps, 300, max(0.0, TRUE.error(dict.fromkeys(blocks, 1.0), steps, 300) + source.gauss(0, 0.01)))
        for blocks in SETS
        for steps in (10, 40, 120, 300, 1200)
    ]
    law = fit(measured, Law.neutral(0.75, BLOCKS, 100, 300), noise=0.015)
    power = fit(measured, PowerLaw.neutral(0.75, BLOCKS, 100), noise=0.015)
    assert crossing(law) == (False, True)
    assert len(set(crossing(power))) == 1
    assert mean_miss(law, measured) < mean_miss(power, measured)


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


def test_laws_and_scores_plan() -> None:
    block = WidthCost(1.0, 1, 1, 1, 1, 2, 1, 2, 0, 1)
    model = ModelCost(((block,),) * BLOCKS, 0, 0.1, 0.2, 0, 0, 0, (0.0,) * (BLOCKS + 1))
    few, many = (
        plan(model, Budget(flops=flops), TRUE, steps_grid=(5, 10, 20, 40, 80, 160, 320), batch=32, samples=100).trained
        for flops in (6_000, 300_000)
    )
    assert few and min(few) > min(many) == 0
    scored = plan(model, Budget(flops=45), Score((9, 1, 1, 1, 1, 1)), steps_grid=(3,), batch=1, samples=1)
    assert 0 in scored.trained and scored.predicted_error is None


def test_wrong_numbers_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match="error of a pilot must be finite and 0 or more, got nan"):
        Pilot((0,), 10, 10, math.nan)
    with pytest.raises(TrainingError, match="widths of a pilot must be above 0 and at most 1, one per block"):
        Pilot((0,), 10, 10, 0.5, (0.0,))
    with pytest.raises(TrainingError, match=r"blocks of a pilot must be different and 0 or more, got \(1, 1\)"):
        Pilot((1, 1), 10, 10, 0.5)
    with pytest.raises(TrainingError, match="start_error must be finite and at least floor"):
        Law(0.5, 0.6, 1, 1, (1.0,), (1.0,), (1.0,))
    with pytest.raises(TrainingError, match="tau must be finite and above 0, got inf"):
        Law(0.5, 0.1, 1, 1, (1.0,), (math.inf,), (1.0,))
    with pytest.raises(TrainingError, match="omega, tau and nu must have one number per block, got 1, 2 and 1"):
        Law(0.5, 0.1, 1, 1, (1.0,), (1.0, 1.0), (1.0,))
    with pytest.raises(TrainingError, match="blocks of a pilot must be below 6"):
        fit([Pilot((6,), 10, 10, 0.5)], TRUE)
    with pytest.raises(TrainingError, match="snr must be finite and 0 or more, got nan"):
        fit_prior(drifts(0, 7)).law([1.0] * 6, [math.nan] * 6, 0.5)
    with pytest.raises(TrainingError, match="magnitude and snr must be 6 numbers each, got 5 and 6"):
        fit_prior(drifts(0, 7)).law([1.0] * 5, [1.0] * 6, 0.5)
    with pytest.raises(TrainingError, match="simulated drifts must have pilots"):
        fit_prior([])
    with pytest.raises(TrainingError, match="drifts must be of 2 or more kinds"):
        leave_one_kind_out(drifts(0, 1))
    with pytest.raises(TrainingError, match="scores must be finite and 0 or more"):
        Score((1.0, -1.0))


def test_the_law_loads_without_torch() -> None:
    program = "import sys, raycloud.retrain.law\nassert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
