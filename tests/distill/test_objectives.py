"""Every divergence against a float64 formula, autograd, and its properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import Objective, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES, CrossEntropy
from raycloud.distill.objectives.adaptive_kl import head_mask
from raycloud.distill.signals import Signal
from raycloud.link.codecs.floats import CODECS
from tests.distill.formulas import adaptive, kl, mixture

V, D, N = 61, 24, 37


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "js_divergence": lambda p, q: mixture(p, q, 0.5),
    "skewed_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skewed_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
    "adaptive_kl": adaptive,
}
BOUNDS = {"js_divergence": math.log(2), "skewed_forward_kl": -math.log(0.1), "skewed_reverse_kl": -math.log(0.1)}


def student(n: int = N, dtype: torch.dtype = torch.float64) -> StudentOutput:
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(D, V, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator))
        head.bias.copy_(torch.randn(V, generator=generator))
    hidden = torch.randn(n, D, generator=generator).to(dtype).requires_grad_()
    return StudentOutput(hidden, torch.randint(0, V, (n,), generator=generator), head)


def said(u: Tensor) -> TeacherOutput:
    return TeacherOutput(Signal("key", "logits", "float32", {"rows": CODECS["float32"].encode(u)}))


def teacher_logits(n: int = N) -> Tensor:
    return (3 * torch.randn(n, V, generator=torch.Generator().manual_seed(4))).float()


def gradients(output: StudentOutput, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [output.hidden, output.head.weight, output.head.bias]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_the_formula(name: str, temperature: float) -> None:
    output, u = student(), teacher_logits()
    objective = DIVERGENCES[name](temperature=temperature)
    ours = weighted_sum([(0.7, objective), (0.3, CrossEntropy())], output, said(u), chunk=8)
    z = output.head(output.hidden)
    values = FORMULAS[name]((u.double() / temperature).softmax(-1), (z / temperature).softmax(-1))
    entropy = nn.functional.cross_entropy(z, output.labels, reduction="sum")
    reference = 0.7 * values.sum() + 0.3 * entropy
    assert float(ours.sum.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    assert float(ours.terms[name]) == pytest.approx(float(values.sum().detach()), rel=1e-6)
    assert float(ours.terms["cross_entropy"]) == pytest.approx(float(entropy.detach()), rel=1e-6)
    for a, b in zip(gradients(output, ours.sum), gradients(output, reference), strict=True):
        assert (a - b).norm() / b.norm() <= 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_chunk_size_and_the_order_of_tokens_change_nothing(name: str) -> None:
    output, u = student(), teacher_logits()
    whole = weighted_sum([(1.0, DIVERGENCES[name]())], output, said(u), chunk=N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    shuffled = StudentOutput(output.hidden[order], output.labels[order], output.head)
    chunked = weighted_sum([(1.0, DIVERGENCES[name]())], shuffled, said(u[order]), chunk=5)
    assert float(whole.sum.detach()) == pytest.approx(float(chunked.sum.detach()), rel=1e-9)
    for a, b in zip(gradients(output, whole.sum), gradients(output, chunked.sum), strict=True):
        assert (a - b).norm() / b.norm() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_at_the_extremes(name: str, dtype: torch.dtype) -> None:
    objective: Divergence = DIVERGENCES[name]()
    flat, peaked, opposite = torch.zeros(1, V), torch.full((1, V), -1e4), torch.full((1, V), -1e4)
    peaked[0, 3], opposite[0, 5] = 1e4, 1e4
    one_hot = torch.full((1, V), float("-inf"))
    one_hot[0, 3] = 0.0
    for teacher in (flat, peaked, opposite, one_hot):
        for z in (flat, peaked, opposite):
            head = nn.Linear(V, V, bias=False).to(dtype)
            with torch.no_grad():
                head.weight.copy_(torch.eye(V))
            hidden = z.to(dtype).requires_grad_()
            signal = said(teacher)
            loss = weighted_sum([(1.0, objective)], StudentOutput(hidden, torch.tensor([0]), head), signal)
            (gradient,) = torch.autograd.grad(loss.sum, hidden)
            assert torch.isfinite(loss.sum) and torch.isfinite(gradient).all()
            if name in BOUNDS:
                assert float(loss.sum.detach()) <= BOUNDS[name] * (1 + 1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_to_learn_from_an_identical_teacher(name: str) -> None:
    output = student()
    same = output.head(output.hidden).detach().float()
    loss = weighted_sum([(1.0, DIVERGENCES[name]())], output, said(same))
    assert abs(float(loss.sum.detach())) <= 1e-5
    assert gradients(output, loss.sum)[0].abs().max() <= 1e-5


def test_a_frozen_head_gets_no_gradient_and_a_pass_without_gradients_works() -> None:
    output, u = student(), teacher_logits()
    output.head.requires_grad_(False)
    weighted_sum([(1.0, DIVERGENCES["forward_kl"]())], output, said(u)).sum.backward()
    assert output.hidden.grad is not None and output.head.weight.grad is None
    with torch.no_grad():
        assert not weighted_sum([(1.0, CrossEntropy())], output).sum.requires_grad


def test_soft_capped_logits_have_the_capped_gradient() -> None:
    output = student()
    capped = StudentOutput(output.hidden, output.labels, output.head, softcap=5.0)
    ours = weighted_sum([(1.0, CrossEntropy())], capped)
    z = torch.tanh(output.head(output.hidden) / 5.0) * 5.0
    reference = nn.functional.cross_entropy(z, output.labels, reduction="sum")
    for a, b in zip(gradients(output, ours.sum), gradients(output, reference), strict=True):
        assert (a - b).norm() / b.norm() <= 1e-6


def test_tau2_scale_multiplies_by_the_squared_temperature() -> None:
    output, u = student(), teacher_logits()
    plain, scaled = (
        weighted_sum([(1.0, DIVERGENCES["forward_kl"](temperature=3.0, tau2_scale=on))], output, said(u))
        for on in (False, True)
    )
    assert float(scaled.sum.detach()) == pytest.approx(9 * float(plain.sum.detach()), rel=1e-6)


def test_a_signal_for_other_tokens_is_refused() -> None:
    objectives: list[tuple[float, Objective]] = [(1.0, DIVERGENCES["forward_kl"]())]
    with pytest.raises(ValueError, match="holds 36 tokens, the batch has 37"):
        weighted_sum(objectives, student(), said(teacher_logits(36)))
    with pytest.raises(ValueError, match="needs a teacher's signal"):
        weighted_sum(objectives, student())


def test_the_published_tail_of_adaptive_kl_is_what_our_head_leaves() -> None:
    """The tail is the longest run of unlikely tokens with a mass of at most alpha."""
    p = teacher_logits(9).softmax(-1)
    ordered = p.sort(descending=False)
    tail = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ordered.indices, ordered.values.cumsum(-1) <= 0.3)
    assert torch.equal(head_mask(p, 0.7), ~tail)


def test_the_sum_is_that_of_the_terms_with_their_weights() -> None:
    loss = weighted_sum([(0.7, DIVERGENCES["forward_kl"]()), (0.3, CrossEntropy())], student(), said(teacher_logits()))
    assert loss.weights == {"forward_kl": 0.7, "cross_entropy": 0.3}
    total = sum(weight * float(loss.terms[name]) for name, weight in loss.weights.items())
    assert total == pytest.approx(float(loss.sum.detach()))
