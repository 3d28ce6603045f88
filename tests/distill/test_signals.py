"""What a teacher says: exactness of every kind, keys, and top-k with a tail."""

from __future__ import annotations

import math

import pytest
import torch

from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.signals import FrozenHead, Signal, SignalRecipe, frozen_head, observe, signal_key
from raycloud.models.segments import Segment
from tests.models.families import tiny

SAMPLES = [Sample(tuple(range(5, 25)), 6), Sample(tuple(range(30, 41)), 0), Sample((3, 4, 5), 2)]


@pytest.fixture(scope="module")
def teacher() -> Segment:
    return Segment(tiny("gemma3-untied", dtype=torch.float32))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate(SAMPLES, pad=0)


def reference(teacher: Segment, batch: Batch, temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = torch.cat([teacher(torch.tensor([s.ids]))[0, max(s.prompt, 1) - 1 : -1] for s in SAMPLES])
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_hidden_and_logits_are_exact(kind: str, temperature: float, teacher: Segment, batch: Batch) -> None:
    recipe = SignalRecipe(kind=kind, codec="float32")
    signal = observe(teacher, "t", batch, recipe, [temperature], chunk=4)
    assert signal.count == batch.targets
    head = frozen_head(teacher, "float32") if kind == "hidden" else None
    expected = reference(teacher, batch, temperature)
    whole = signal.targets(slice(0, signal.count), temperature, head)
    assert torch.allclose(whole.log_p, expected, atol=1e-5)
    some = signal.targets(slice(3, 7), temperature, head)
    assert torch.allclose(some.log_p, expected[3:7], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(temperature: float, teacher: Segment, batch: Batch) -> None:
    signal = observe(teacher, "t", batch, SignalRecipe(kind="topk", codec="float32", k=10), [1.0, 2.0])
    aim = signal.targets(slice(0, signal.count), temperature, None)
    expected = reference(teacher, batch, temperature)
    assert torch.allclose(aim.log_p[:, :-1], expected.topk(10).values, atol=1e-5)
    assert torch.allclose(aim.log_p.logsumexp(-1), torch.zeros(signal.count), atol=1e-5)
    assert signal.nbytes == signal.count * (10 * 4 + 10 * 4 + 2 * 4)
    # The student over the same support: kept ids exactly, everything else in one bucket; a lower bound of the true KL.
    z = torch.randn(signal.count, expected.shape[1], generator=torch.Generator().manual_seed(0))
    log_q = (z / temperature).log_softmax(-1)
    over_support = aim.log_q(z, temperature)
    assert torch.allclose(over_support[:, :-1], log_q.gather(-1, aim.ids), atol=1e-5)
    assert torch.allclose(over_support.logsumexp(-1), torch.zeros(signal.count), atol=1e-5)
    assert (forward_kl(aim.log_p, over_support) <= forward_kl(expected, log_q) + 1e-5).all()


def test_top_k_of_everything_is_exact(teacher: Segment, batch: Batch) -> None:
    signal = observe(teacher, "t", batch, SignalRecipe(kind="topk", codec="float32", k=10_000), [1.0])
    aim = signal.targets(slice(0, signal.count), 1.0, None)
    assert torch.allclose(aim.log_p[:, :-1], reference(teacher, batch, 1.0).gather(-1, aim.ids), atol=1e-5)
    assert (aim.log_p[:, -1] <= math.log(1.1e-6)).all()


def test_coded_signals_are_near(teacher: Segment, batch: Batch) -> None:
    exact = reference(teacher, batch, 1.0)
    for kind in ("hidden", "logits"):
        signal = observe(teacher, "t", batch, SignalRecipe(kind=kind), [1.0])
        head = frozen_head(teacher, "bfloat16").to(torch.device("cpu"), torch.float32)
        coded = signal.targets(slice(0, signal.count), 1.0, head).log_p
        assert float(forward_kl(exact, coded).mean()) <= 1e-3
    assert observe(teacher, "t", batch, SignalRecipe(), [1.0]).nbytes == batch.targets * 32 * 2


def test_keys_tell_apart_whatever_makes_a_signal_invalid(batch: Batch) -> None:
    recipe = SignalRecipe()
    other_ids, other_labels = batch.ids.clone(), batch.labels.clone()
    other_ids[0, 0] += 1
    other_labels[0, 7] = IGNORE
    variants = [
        ("t", batch, recipe, [1.0]),
        ("u", batch, recipe, [1.0]),
        ("t", Batch(other_ids, batch.valid, batch.labels), recipe, [1.0]),
        ("t", Batch(batch.ids, batch.valid, other_labels), recipe, [1.0]),
        ("t", batch, SignalRecipe(kind="topk"), [1.0]),
        ("t", batch, recipe, [2.0]),
    ]
    assert len({signal_key(*variant) for variant in variants}) == len(variants)
    assert signal_key("t", batch, recipe, [2.0, 1.0]) == signal_key("t", batch, recipe, [1.0, 2.0])


def test_missing_parts_are_said(teacher: Segment, batch: Batch) -> None:
    hidden = observe(teacher, "t", batch, SignalRecipe(), [1.0])
    with pytest.raises(ValueError, match="needs the teacher's head"):
        hidden.targets(slice(0, 1), 1.0, None)
    topk = observe(teacher, "t", batch, SignalRecipe(kind="topk", k=3), [1.0])
    with pytest.raises(ValueError, match=r"has temperatures \(1.0,\), not 2.0"):
        topk.targets(slice(0, 1), 2.0, None)
    assert FrozenHead(torch.zeros(4, 3)).nbytes == 48
    assert Signal("k", "logits", "float32", {"rows": torch.zeros(2, 8, dtype=torch.uint8)}).nbytes == 16
