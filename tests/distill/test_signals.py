"""Signals of a teacher: exactness of every kind, keys, top-k with a tail, and unbiased draws."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.objectives import DIVERGENCES
from raycloud.distill.objectives.forward_kl import ForwardKL, forward_kl
from raycloud.distill.signals import (
    FrozenHead,
    Signal,
    SignalKind,
    SignalRecipe,
    Targets,
    compute_signal,
    frozen_head,
    sample_keys,
    signal_key,
)
from raycloud.distill.signals.encoding import decode_ids, decode_values, encode_ids, encode_values
from raycloud.distill.signals.sampled import RAGGED_FIELDS, decode_draws, draw, draw_offsets, encode_draws, tokens_at
from raycloud.distill.signals.top_k import keep_top_k, top_k_log_p
from raycloud.errors import RecipeError
from raycloud.link.codecs.quantised import Int8
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
    signal = compute_signal(teacher, "t", batch, recipe, [temperature], chunk=4)
    assert signal.count == batch.targets
    head = frozen_head(teacher, "float32") if kind == "hidden" else None
    expected = reference(teacher, batch, temperature)
    whole = signal.targets(slice(0, signal.count), temperature, head)
    assert torch.allclose(whole.log_p, expected, atol=1e-5)
    some = signal.targets(slice(3, 7), temperature, head)
    assert torch.allclose(some.log_p, expected[3:7], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(temperature: float, teacher: Segment, batch: Batch) -> None:
    signal = compute_signal(teacher, "t", batch, SignalRecipe(kind="topk", codec="float32", k=10), [1.0, 2.0])
    aim = signal.targets(slice(0, signal.count), temperature, None)
    expected = reference(teacher, batch, temperature)
    assert torch.allclose(aim.log_p[:, :-1], expected.topk(10).values, atol=1e-5)
    assert torch.allclose(aim.log_p.logsumexp(-1), torch.zeros(signal.count), atol=1e-5)
    assert signal.nbytes == signal.count * (10 * 4 + 10 * 1 + 2 * 4)  # 97 tokens: an id is one byte
    # The student over the same support: kept ids exactly, everything else in one bucket; a lower bound of the true KL.
    z = torch.randn(signal.count, expected.shape[1], generator=torch.Generator().manual_seed(0))
    log_q = (z / temperature).log_softmax(-1)
    over_support = aim.log_q(z, temperature)
    assert torch.allclose(over_support[:, :-1], log_q.gather(-1, aim.ids), atol=1e-5)
    assert torch.allclose(over_support.logsumexp(-1), torch.zeros(signal.count), atol=1e-5)
    assert (forward_kl(aim.log_p, over_support) <= forward_kl(expected, log_q) + 1e-5).all()


def test_top_k_of_everything_is_exact(teacher: Segment, batch: Batch) -> None:
    signal = compute_signal(teacher, "t", batch, SignalRecipe(kind="topk", codec="float32", k=10_000), [1.0])
    aim = signal.targets(slice(0, signal.count), 1.0, None)
    assert torch.allclose(aim.log_p[:, :-1], reference(teacher, batch, 1.0).gather(-1, aim.ids), atol=1e-5)
    assert (aim.log_p[:, -1] <= math.log(1.1e-6)).all()


def test_coded_signals_are_near(teacher: Segment, batch: Batch) -> None:
    exact = reference(teacher, batch, 1.0)
    for kind in ("hidden", "logits"):
        signal = compute_signal(teacher, "t", batch, SignalRecipe(kind=kind), [1.0])
        head = frozen_head(teacher, "bfloat16").to(torch.device("cpu"), torch.float32)
        coded = signal.targets(slice(0, signal.count), 1.0, head).log_p
        assert float(forward_kl(exact, coded).mean()) <= 1e-3
    assert compute_signal(teacher, "t", batch, SignalRecipe(), [1.0]).nbytes == batch.targets * 32 * 2


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
        ("t", Batch(batch.ids.flip(0), batch.valid.flip(0), batch.labels.flip(0)), recipe, [1.0]),
    ]
    assert len({signal_key(*variant) for variant in variants}) == len(variants)
    assert signal_key("t", batch, recipe, [2.0, 1.0]) == signal_key("t", batch, recipe, [1.0, 2.0])


def test_missing_parts_are_said(teacher: Segment, batch: Batch) -> None:
    hidden = compute_signal(teacher, "t", batch, SignalRecipe(), [1.0])
    with pytest.raises(ValueError, match="needs the teacher's head"):
        hidden.targets(slice(0, 1), 1.0, None)
    topk = compute_signal(teacher, "t", batch, SignalRecipe(kind="topk", k=3), [1.0])
    with pytest.raises(ValueError, match=r"has temperatures \(1.0,\), not 2.0"):
        topk.targets(slice(0, 1), 2.0, None)
    assert FrozenHead(torch.zeros(4, 3)).nbytes == 48
    assert Signal("k", "logits", "float32", {"rows": torch.zeros(2, 8, dtype=torch.uint8)}).nbytes == 16


def whole(signal: Signal, temperature: float = 1.0) -> Targets:
    return signal.targets(slice(0, signal.count), temperature, None)


def student_logits(count: int) -> torch.Tensor:
    z = 2 * torch.randn(count, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z.requires_grad_()


def estimate(aim: Targets, z: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute forward KL of each token, and the gradient of its sum in the student's logits."""
    values = ForwardKL(temperature=temperature).per_token(z, torch.zeros(len(z)), lambda _: aim)
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["sampled", "hybrid"])
def test_drawn_targets_are_right_on_average(kind: str, temperature: float, teacher: Segment, batch: Batch) -> None:
    recipe = SignalRecipe(kind=kind, codec="float32", k=5, draws=7)
    expected = reference(teacher, batch, temperature).double()
    z = student_logits(len(expected))
    q = (z.detach() / temperature).softmax(-1)
    dense_value = (expected.exp() * (expected - q.log())).sum(-1)
    dense = (q - expected.exp()) / temperature
    repeats = 150
    found = [
        estimate(whole(compute_signal(teacher, f"t{n}", batch, recipe, [1.0, 2.0]), temperature), z, temperature)
        for n in range(repeats)
    ]
    for drawn, exact in zip(map(torch.stack, zip(*found, strict=True)), (dense_value, dense), strict=True):
        chance = float((drawn.var(dim=0).sum() / repeats).sqrt())
        assert float((drawn[0] - exact).norm()) > 4 * chance  # one draw alone is noisy
        assert float((drawn.mean(dim=0) - exact).norm()) < 1.4 * chance


def test_draws_keep_to_their_share_and_never_leave_the_support() -> None:
    generator = torch.Generator().manual_seed(1)
    mass = torch.rand(200, 31, generator=generator) ** 4
    mass[:, ::3] = 0
    mass[:, 30] = 0
    offset = torch.rand(200, generator=generator, dtype=torch.float64)
    offset[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    drawn = draw(mass, 20, offset)
    counts = torch.zeros(200, 31).scatter_add_(1, drawn, torch.ones(200, 20))
    share = 20 * mass / mass.sum(-1, keepdim=True)
    assert (counts <= share.ceil() + 1e-4).all() and (counts >= share.floor() - 1e-4).all()
    assert (counts[mass == 0] == 0).all() and (counts.sum(-1) == 20).all()
    assert (draw(torch.zeros(1, 4), 3, offset[:1]) < 4).all()  # no mass at all: some id, and its weight is 0


def test_recorded_draws_come_back(teacher: Segment) -> None:
    draws = torch.tensor([[[0, 0, 0, 0], [1, 1, 2, 96]], [[3, 4, 5, 6], [96, 96, 96, 96]]])
    said = encode_draws(draws, 97)
    assert {name: tensor.dtype for name, tensor in said.items()} == dict.fromkeys(said, torch.uint8)
    assert said["drawn"].tolist() == [[1, 3], [4, 1]]
    ids, share = decode_draws(said, 1)
    assert ids.tolist() == [[1, 2, 96, 0], [96, 0, 0, 0]]
    assert share.tolist() == [[0.5, 0.25, 0.25, 0], [1, 0, 0, 0]]
    backwards = decode_draws(tokens_at(said, torch.tensor([1, 0, 1])), 0)[1]
    assert backwards.tolist() == [[0.25] * 4, [1, 0, 0, 0], [0.25] * 4]
    assert encode_draws(draws[:0], 97)["drawn_ids"].shape == (0, 1)


def test_random_numbers_are_those_of_the_sample_and_even() -> None:
    keys = ["0123456789abcdef" * 4, "fedcba9876543210" * 4]
    both = draw_offsets(keys, [3, 2000], 2)
    assert torch.equal(both[3:], draw_offsets(keys[1:], [2000], 2)) and torch.equal(
        both[:3], draw_offsets(keys[:1], [3], 2)
    )
    assert both.min() >= 0 and both.max() < 1
    assert both[3:].mean() == pytest.approx(0.5, abs=0.02) and both[3:].std() == pytest.approx(12**-0.5, abs=0.02)


@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_a_tokens_signal_does_not_depend_on_its_batch(kind: SignalKind, teacher: Segment, batch: Batch) -> None:
    recipe = SignalRecipe(kind=kind, codec="float32", k=5, draws=7)
    together = compute_signal(teacher, "t", batch, recipe, [1.0, 2.0], chunk=6)
    other = collate([SAMPLES[2], Sample(tuple(range(40)), 3), SAMPLES[0]], pad=1)
    elsewhere = compute_signal(teacher, "t", other, recipe, [1.0, 2.0])
    assert sample_keys("t", batch, recipe, [1.0])[0] == sample_keys("t", other, recipe, [1.0])[2]
    targets = [sample.targets for sample in SAMPLES]
    for here, there in (
        (slice(0, targets[0]), slice(elsewhere.count - targets[0], elsewhere.count)),
        (slice(together.count - targets[2], together.count), slice(0, targets[2])),
    ):
        mine, theirs = tokens_at(together.payload, here), tokens_at(elsewhere.payload, there)
        for name in mine:
            if name == "rows":
                mine[name], theirs[name] = (decode_values(one[name], "float32") for one in (mine, theirs))
            exact = not mine[name].dtype.is_floating_point  # ids and counts
            assert torch.allclose(mine[name], theirs[name], rtol=0, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_some_tokens_in_any_order(kind: SignalKind, teacher: Segment, batch: Batch) -> None:
    signal = compute_signal(teacher, "t", batch, SignalRecipe(kind=kind, k=5, draws=7), [1.0, 2.0], chunk=6)
    assert signal.count == batch.targets
    head = frozen_head(teacher, "float32") if kind == "hidden" else None
    which = torch.tensor([4, 0, 11, 4])
    everything = signal.targets(slice(None), 2.0, head)
    some = signal.targets(which, 2.0, head)
    width = some.log_p.shape[1]  # draws are filled up to the longest of those at hand
    assert torch.allclose(some.log_p, everything.log_p[which, :width], atol=1e-5)
    assert some.kind == everything.kind == kind
    if some.ids is not None and everything.ids is not None:
        assert torch.equal(some.ids, everything.ids[which, : some.ids.shape[1]])


def test_sorted_values_and_scalars(teacher: Segment, batch: Batch) -> None:
    expected = reference(teacher, batch, 2.0)
    ranked = compute_signal(teacher, "t", batch, SignalRecipe(kind="sorted", codec="float32", k=10), [2.0])
    aim = whole(ranked, 2.0)
    assert torch.allclose(aim.log_p[:, :-1], expected.topk(10).values, atol=1e-5)
    assert torch.allclose(aim.log_p.exp().sum(-1), torch.ones(ranked.count), atol=1e-5)
    assert aim.ids is None and ranked.nbytes == ranked.count * (10 * 4 + 4)
    z = student_logits(ranked.count).detach()
    assert torch.allclose(aim.log_q(z, 2.0)[:, :-1], (z / 2).log_softmax(-1).topk(10).values)
    actual = whole(compute_signal(teacher, "t", batch, SignalRecipe(kind="scalars"), [1.0, 2.0]), 2.0)
    labels = batch.labels[batch.labels != IGNORE]
    assert torch.allclose(actual.log_p, expected.gather(-1, labels[:, None]), atol=1e-5)
    with pytest.raises(ValueError, match="not a distribution"):
        actual.log_q(z, 2.0)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["sampled", "hybrid", "sorted", "scalars"])
def test_divergences_refuse_what_does_not_tell_enough(name: str, kind: str, teacher: Segment, batch: Batch) -> None:
    signal = compute_signal(teacher, "t", batch, SignalRecipe(kind=kind, k=5, draws=7), [1.0])
    objective, z = DIVERGENCES[name](), student_logits(signal.count)
    if name == "forward_kl" and kind in ("sampled", "hybrid"):
        assert torch.isfinite(objective.per_token(z, batch.labels, lambda tau: whole(signal, tau))).all()
        return
    allowed = "hidden, logits, topk" + (", hybrid, sampled" if name == "forward_kl" else "")
    with pytest.raises(ValueError, match=f"^objective '{name}' cannot be taken .* kind '{kind}'; allowed: {allowed}$"):
        objective.per_token(z, batch.labels, lambda tau: whole(signal, tau))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_both_masses_are_exact_near_nought_and_near_one(scale: float) -> None:
    u = scale * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    said, ids, _ = keep_top_k(u.float(), 4, "float32", [1.0])
    found = top_k_log_p(said["rows"], said["tail"][:, 0], "float32", 1.0).double().exp()
    p = u.softmax(-1)
    tail = p.scatter(-1, ids, 0.0).sum(-1)
    assert torch.allclose(found[:, :-1], p.gather(-1, ids), rtol=1e-4, atol=0)
    assert torch.allclose(found[:, -1], tail.clamp_min(1e-7), rtol=1e-4, atol=1e-12)


def test_coded_probabilities_fill_their_mass() -> None:
    u = (
        3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)) + 200
    )  # far from 0: relative to the largest
    said, ids, others = keep_top_k(u, 64, "bfloat16", [1.0, 2.0])
    assert torch.isinf(others.gather(-1, ids)).all() and torch.isinf(others).sum() == 50 * 64
    found = top_k_log_p(said["rows"], said["tail"][:, 1], "bfloat16", 2.0).exp()
    p = (u.double() / 2).softmax(-1)
    assert torch.allclose(found.sum(-1), torch.ones(50), atol=1e-6)
    assert torch.allclose(found[:, -1].double(), p.scatter(-1, ids, 0.0).sum(-1), rtol=1e-4)
    assert torch.allclose(found[:, :-1].double(), p.gather(-1, ids), rtol=0.02)


def test_logits_are_relative_to_the_largest(teacher: Segment, batch: Batch) -> None:
    signal = compute_signal(teacher, "t", batch, SignalRecipe(kind="logits", codec="bfloat16"), [1.0])
    assert (signal.values().amax(-1) == 0).all()


@pytest.mark.parametrize("width", [32, 31, 576])
def test_int8_hidden_states_survive_outlying_coordinates(width: int) -> None:
    hidden = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    hidden[:, 3] *= 60
    coded = encode_values(hidden, "int8")
    assert coded.shape == (40, width + 2) and coded.dtype == torch.uint8
    plain = Int8(width, width)
    lost = (decode_values(coded, "int8") - hidden).norm()
    assert lost < 0.7 * (plain.decode(plain.encode(hidden)) - hidden).norm()
    assert lost < 0.02 * hidden.norm()


def test_int8_signals_are_near(teacher: Segment, batch: Batch) -> None:
    signal = compute_signal(teacher, "t", batch, SignalRecipe(codec="int8"), [1.0])
    head = frozen_head(teacher, "int8")
    assert head.weight.dtype == torch.bfloat16 and signal.nbytes == batch.targets * (32 + 2)
    found = signal.targets(slice(None), 1.0, head.to(torch.device("cpu"), torch.float32)).log_p
    assert float(forward_kl(reference(teacher, batch, 1.0), found).mean()) <= 1e-3
    with pytest.raises(RecipeError, match="codec is 'int8' with kind 'topk'; allowed: float32, bfloat16, float16"):
        SignalRecipe.parse({"kind": "topk", "codec": "int8"})
    with pytest.raises(ValueError, match="a signal of kind topk holds no vectors"):
        compute_signal(teacher, "t", batch, SignalRecipe(kind="topk"), [1.0]).values()


@pytest.mark.parametrize(("vocab_size", "size"), [(2, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (151_936, 3)])
def test_ids_take_as_many_bytes_as_they_need(vocab_size: int, size: int) -> None:
    ids = torch.tensor([[0, 1], [vocab_size // 2, vocab_size - 1]])
    assert encode_ids(ids, vocab_size).shape == (2, 2, size)
    assert torch.equal(decode_ids(encode_ids(ids, vocab_size)), ids)


@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_a_batch_without_labels_has_an_empty_signal(kind: SignalKind, teacher: Segment) -> None:
    silent = collate([Sample((3, 4, 5), 3)], pad=0)
    signal = compute_signal(teacher, "t", silent, SignalRecipe(kind=kind), [1.0])
    assert signal.count == 0 and signal.nbytes == 0
    assert set(RAGGED_FIELDS) <= set(signal.payload) or kind not in ("sampled", "hybrid")
