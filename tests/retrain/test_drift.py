"""Drift: distances without bias, few false alarms, alarms that end, and signatures that are recognised."""

from __future__ import annotations

import pytest
import torch

from raycloud.errors import ModelError
from raycloud.models.chain import block_list_of
from raycloud.retrain.drift import DomainSignature, DriftDetector, TapStatistics, drift_distances, tapped
from tests.models.blocks import KNOWN, inputs_of

TAPS = (16, 16, 32)
"""Width of the hidden states at each tap; stages differ."""


def normal(count: int, seed: int, shift: float = 0.0, at: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(count, width, generator=generator) for width in TAPS]
    return [one + shift if at is None or at == index else one for index, one in enumerate(found)]


def test_without_drift_the_distance_of_small_windows_has_no_bias() -> None:
    source = TapStatistics.of(normal(200_000, 0))
    for window in (8, 32, 128):
        drawn = torch.stack([drift_distances(normal(window, 1 + seed), source) for seed in range(300)])
        # Without the correction it would be above 1 / window. The variance of the logarithms is left.
        assert drawn.mean().abs() < 0.5 / window


def test_a_shift_adds_its_square_in_standard_deviations() -> None:
    source = TapStatistics.of(normal(200_000, 0))
    found = drift_distances(normal(100_000, 1, shift=0.5), source)
    assert torch.allclose(found, torch.full((3,), 0.25), atol=0.01)


def test_false_alarms_are_rare_and_a_drift_at_one_tap_is_found() -> None:
    detector = DriftDetector.calibrated(normal(4000, 0), 64)
    alarms = [detector.judge(normal(64, 100 + seed)).drifted for seed in range(1000)]
    assert sum(alarms) <= 30
    alarms = [detector.judge(normal(64, 2000 + seed, 0.4, at=1)).drifted for seed in range(50)]
    assert sum(alarms) >= 48


def test_few_clean_samples_make_no_false_alarms() -> None:
    alarms = 0
    for seed in range(20):
        detector = DriftDetector.calibrated(normal(160, 5000 + seed), 64, draws=200)
        alarms += sum(detector.judge(normal(64, 100 * seed + one)).drifted for one in range(10))
    assert alarms <= 8  # 4 % of 200


def test_a_domain_that_comes_back_is_nearer_than_another() -> None:
    source = TapStatistics.of(normal(5000, 0))

    def signature(shift: float, seed: int, means: bool) -> DomainSignature:
        taps = normal(64, seed, shift)
        held = tuple(one.mean(0) for one in taps[1:]) if means else None
        return DomainSignature(drift_distances(taps, source), held)

    for means in (False, True):
        first, again, other = signature(1.0, 1, means), signature(1.0, 2, means), signature(-2.0, 3, means)
        assert first.distance(again, source) < 0.5 * first.distance(other, source)
    # Only means tell two domains of equal distance apart.
    left, right = signature(1.0, 1, True), signature(-1.0, 2, True)
    assert left.distance(right, source) > 1.0
    assert signature(1.0, 1, False).distance(signature(-1.0, 2, False), source) < 0.5


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "swin"])
def test_taps_are_the_means_of_hidden_states_of_the_running_model(name: str) -> None:
    model = KNOWN[name].model()
    inputs = inputs_of(model)
    blocks = block_list_of(model).blocks.values()
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).hidden_states
        hooks = [len(block._forward_hooks) for block in blocks]  # the library's, which it needs for hidden states
        with tapped(block_list_of(model).blocks) as taps:
            model(**{key: one[:2] for key, one in inputs.items()})
            model(**{key: one[2:] for key, one in inputs.items()})
        found = taps.take()
    assert len(found) == len(block_list_of(model).blocks) + 1
    assert torch.allclose(found[0].double(), wanted[0].mean(1), atol=1e-5)
    assert [len(block._forward_hooks) for block in blocks] == hooks


def test_padding_does_not_count() -> None:
    model = KNOWN["bert"].model()
    ids = inputs_of(model)["input_ids"]
    valid = torch.ones_like(ids).bool()
    valid[:, 8:] = False
    held = [valid]
    with torch.no_grad(), tapped(block_list_of(model).blocks, held) as taps:
        model(input_ids=ids, attention_mask=valid.long())
        padded = taps.take()
        held[0] = valid[:, :8]
        model(input_ids=ids[:, :8])
        short = taps.take()
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(padded, short, strict=True))


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ModelError, match="120 clean samples are given; allowed: at least two windows of 64"):
        DriftDetector.calibrated(normal(120, 0), 64)
    detector = DriftDetector.calibrated(normal(400, 0), 64)
    broken = normal(64, 2)
    broken[1][3, 4] = torch.nan
    with pytest.raises(ModelError, match="the hidden states of a window are not all finite"):
        detector.judge(broken)
