"""Comparisons of methods, by hand, and the digits scenario."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from raycloud.benchmarks.retrain import ABLATIONS, OURS, RIVALS, RetrainRow, comparisons
from raycloud.benchmarks.retrain_prior import RegimeDrift, best_run, fit_power_law
from raycloud.data.image_shifts import DIGITS_SHIFTS, SIMULATED_SHIFTS, blurred, moved, occluded, rotated
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.simulation import sets_of_blocks


def rows(seed: int, domain: str, accuracies: dict[str, float]) -> list[RetrainRow]:
    row = RetrainRow("digits", "A", seed, domain, "", 0.0, 0.9, 0.5, 1.0, 3, (0,), False)
    known = dict.fromkeys((*RIVALS, *ABLATIONS), 0.0) | accuracies
    return [dataclasses.replace(row, method=name, figure=value) for name, value in known.items()]


def test_the_best_rival_of_a_seed_is_chosen_on_the_other_seeds() -> None:
    """On seed 0 the head is the best rival and on seed 1 the last block, so each is compared with the other's."""
    first = rows(0, "blur", {"head_only": 0.8, "last_block": 0.5, OURS: 0.7})
    second = rows(1, "blur", {"head_only": 0.4, "last_block": 0.6, OURS: 0.7})
    found = comparisons([*first, *second], 100)
    assert found["ours_minus_best_rival"]["difference"] == pytest.approx(100 * ((0.7 - 0.5) + (0.7 - 0.4)) / 2)
    assert found["ours_minus_head_only"]["difference"] == pytest.approx(10)
    assert found["ours_minus_head_only"]["standard_error"] == pytest.approx(20)
    assert found["regret"] == pytest.approx(5)
    assert found["over_budget"] == 0
    better = [dataclasses.replace(row, figure=0.9) if row.method == "greedy" else row for row in (*first, *second)]
    assert comparisons(better, 100)["ours_minus_greedy"]["difference"] == pytest.approx(-20)
    assert comparisons(better, 100)["ours_minus_best_rival"] == found["ours_minus_best_rival"]  # no rival
    texts_only = [row for row in (*first, *second) if row.method != "tlm"]
    assert set(found) - set(comparisons(texts_only, 100)) == {"ours_minus_tlm"}
    first[0] = dataclasses.replace(first[0], over_budget=True)
    assert comparisons([*first, *second], 100)["over_budget"] == 1


def test_less_is_better_for_bits() -> None:
    first = rows(
        0,
        "code",
        {"head_only": 2.0, "last_block": 1.5, OURS: 1.2}
        | {name: 3.0 for name in (*RIVALS, *ABLATIONS) if name not in ("head_only", "last_block")},
    )
    found = comparisons([*first, *[dataclasses.replace(row, domain="upper") for row in first]], -1)
    assert found["ours_minus_best_rival"]["difference"] == pytest.approx(-0.3)
    assert found["ours_minus_head_only"]["difference"] == pytest.approx(-0.8)
    assert found["regret"] == 0


def test_shifts_do_what_their_names_say() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 1, 2] = 1.0
    classes, generator = torch.tensor([9]), torch.Generator().manual_seed(0)
    shifted = {name: shift(image, classes, generator) for name, shift in DIGITS_SHIFTS.items()}
    assert torch.equal(shifted["invert"][0], 1 - image)
    assert shifted["relabel"][1].tolist() == [2] and torch.equal(shifted["relabel"][0], image)
    assert moved(image)[0, 1, 4] == 1 and moved(image).sum() == 1
    assert shifted["flip"][0][0, 1, 5] == 1 and shifted["rot90"][0][0, 5, 1] == 1
    assert blurred(image).sum() == pytest.approx(1.0, abs=0.06) and blurred(image).argmax() == image.argmax()
    assert torch.allclose(rotated(image, 90).sum(), image.sum(), atol=1e-4)
    assert occluded(torch.ones(1, 8, 8)).sum() == 48
    assert shifted["permute"][0].sum() == 1 and not torch.equal(shifted["permute"][0], image)


def test_no_domain_of_the_benchmark_is_among_the_simulated_ones() -> None:
    """The cloud learns from other shifts than those that it is compared on."""
    images = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 3, 7, 9])

    def results(shifts):  # type: ignore[no-untyped-def]
        made = [shift(images, classes, torch.Generator().manual_seed(1)) for shift in shifts]
        return [torch.cat([one.flatten(), other.float()]) for one, other in made]

    simulated = results([shift for kind in SIMULATED_SHIFTS.values() for shift in kind.values()])
    for ours in results(DIGITS_SHIFTS.values()):
        assert min(float((ours - other).abs().max()) for other in simulated) > 0.1


def test_pilots_of_simulated_drifts_choose_the_run_and_tell_the_power_law() -> None:
    assert sets_of_blocks(6) == [(), (0,), (3,), (5,), (0, 5), (0, 1), (4, 5), (0, 1, 2), (3, 4, 5), tuple(range(6))]
    assert sets_of_blocks(2) == [(), (0,), (1,), (0, 1)]
    errors = {(0, 1): (0.3, 0.3), (4, 5): (0.1, 0.6), (0, 1, 2): (0.25, 0.3), (0,): (0.1, 0.1), (0, 5): (0.1, 0.1)}
    drifts = [
        RegimeDrift(
            regime,
            SimulatedDrift(
                "blur",
                0.8,
                (1.0,) * 6,
                (1.0,) * 6,
                tuple(Pilot(blocks, 40, 100, error[index]) for blocks, error in errors.items()),
            ),
        )
        for index, regime in enumerate("AA")
    ]
    assert best_run(drifts, "A") == (0, 1, 2)
    law = fit_power_law(drifts).scaled(0.8)
    assert law.start_error == 0.8
    assert law.error({0: 1.0}, 40, 100) == pytest.approx(0.15, abs=0.1)
    assert law.error({0: 1.0}, 40, 100) < law.error({4: 1.0}, 40, 100)
