"""Training loop against plain PyTorch, and exact resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from raycloud.errors import TrainingError
from raycloud.training.loop import Loss, Trainer
from raycloud.training.recipe import TrainingRecipe
from raycloud.training.schedule import lr_factor

RECIPE = TrainingRecipe(lr=1e-2, warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5, lr_floor=0.1)
STEPS = 12


@dataclass
class Pairs:
    x: Tensor
    y: Tensor

    @property
    def targets(self) -> int:
        return len(self.y)


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 4)).double()


def batches(step: int, sizes: tuple[int, ...] = (5, 3)) -> list[Pairs]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (sum(sizes),), generator=generator)
    return [Pairs(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]


def loss_of(model: nn.Module) -> Callable[[Pairs], Loss]:
    def loss(batch: Pairs) -> Loss:
        total = nn.functional.cross_entropy(model(batch.x), batch.y, reduction="sum")
        return Loss(total, len(batch.y), {"cross_entropy": total})

    return loss


def trained(model: nn.Module, steps: range, state: dict[str, Tensor] | None = None) -> Trainer:
    trainer = Trainer({"model": model}, RECIPE, total_steps=STEPS, seed=1)
    if state is not None:
        trainer.load_state(state)
    for step in steps:
        trainer.step(batches(step), loss_of(model))
    return trainer


def test_equals_plain_pytorch_with_clipping_accumulation_and_decay() -> None:
    ours, plain = network(), network()
    decayed = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    for step in range(STEPS):
        joined = batches(step, (8,))[0]
        loss = nn.functional.cross_entropy(plain(joined.x), joined.y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, STEPS, 3, "cosine", 0.1)
        optimizer.step()
    trained(ours, range(STEPS))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert (a - b).norm() / b.norm() <= 1e-9


def test_a_resumed_run_is_bit_equal_with_dropout() -> None:
    whole, first = network(0.5), network(0.5)
    trained(whole, range(STEPS))
    state = load(save(trained(first, range(5)).state()))
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    again = network(0.5)
    again.load_state_dict(weights)
    torch.manual_seed(999)  # the ambient generator plays no part
    trained(again, range(5, STEPS), state)
    for a, b in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dropout_is_on_and_leaves_the_ambient_generator_alone() -> None:
    model = network(0.5)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    step = trained(model, range(1))
    assert torch.equal(torch.rand(3), expected)
    assert step.step_index == 1
    kept = network(0.0)
    trained(kept, range(1))
    assert not torch.equal(kept[0].weight, model[0].weight)


def test_groups_have_their_own_rates_and_shared_parameters_count_once() -> None:
    model = network()
    head = model[3]
    trainer = Trainer({"body": model, "head": head}, RECIPE, total_steps=STEPS, seed=0, lr={"body": 1e-3})
    peaks = {group["peak_lr"] for group in trainer.optimizer.param_groups}
    assert peaks == {1e-3}
    assert sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_frozen_parameters_stay_as_they_are() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    trained(model, range(3))
    assert torch.equal(model[0].weight, before)


def test_non_finite_gradients_are_skipped_counted_and_in_the_end_refused() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    trainer = Trainer({"model": model}, RECIPE, total_steps=STEPS, seed=0)

    def broken(batch: Pairs) -> Loss:
        loss = loss_of(model)(batch)
        return Loss(loss.sum * float("nan"), loss.count, loss.terms)

    step = trainer.step(batches(0), broken)
    assert step.skipped
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not trainer.step(batches(1), loss_of(model)).skipped
    for _ in range(4):
        trainer.step(batches(0), broken)
    with pytest.raises(TrainingError, match="not finite in 5 steps"):
        trainer.step(batches(0), broken)


def test_a_step_without_labels_is_refused() -> None:
    model = network()
    trainer = Trainer({"model": model}, RECIPE, total_steps=STEPS, seed=0)
    with pytest.raises(TrainingError, match="no labelled token"):
        trainer.step([Pairs(torch.zeros(0, 6), torch.zeros(0))], loss_of(model))


def test_the_state_of_another_model_is_refused() -> None:
    state = trained(network(), range(1)).state()
    other = nn.Linear(6, 4).double()
    with pytest.raises(TrainingError, match="which this model does not have"):
        Trainer({"model": other}, RECIPE, total_steps=STEPS, seed=0).load_state(state)


def test_schedules() -> None:
    assert [lr_factor(s, 10, 2, "constant") for s in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert lr_factor(10, 10, 2, "cosine", 0.1) == pytest.approx(0.1)
    assert lr_factor(6, 10, 2, "cosine") == pytest.approx(0.5)
    assert lr_factor(6, 10, 2, "linear") == pytest.approx(0.5)
    assert lr_factor(99, 10, 0, "linear", 0.2) == pytest.approx(0.2)


def test_a_step_tells_its_terms_as_they_are_and_weighted() -> None:
    model = network()

    def loss(batch: Pairs) -> Loss:
        plain = loss_of(model)(batch)
        return Loss(0.3 * plain.sum, plain.count, {**plain.terms, "part": plain.sum}, {"cross_entropy": 0.3})

    step = Trainer({"model": model}, RECIPE, total_steps=STEPS, seed=1).step(batches(0), loss)
    assert step.weighted == {"cross_entropy": pytest.approx(0.3 * step.terms["cross_entropy"])}
    assert step.loss == pytest.approx(step.weighted["cross_entropy"])
