"""Methods of the benchmark of block retraining: rivals and ours, by the same loop and within the same budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from raycloud.models.roles import roles_of
from raycloud.retrain.cost import BlockChoice, Budget, Cost, ModelCost, training_cost
from raycloud.retrain.drawn import DrawnBlockTrainer
from raycloud.retrain.meter import measured
from raycloud.retrain.parts import RetrainParts, parts_of
from raycloud.retrain.plans import Terms, affordable_steps, head_phase, training_choices
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import RetrainTask
from raycloud.retrain.trainer import BlockTrainer, Retrained, mean_error
from raycloud.retrain.window import retrain_blocks
from raycloud.training.lora import lora_config
from raycloud.training.recipe import LoraRecipe
from raycloud.training.seeding import derive_seed

LORA_RANK = 4
LORA_LR = 1e-2

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class MethodCase:
    """One window to retrain in, with its budget."""

    model: Callable[[], PreTrainedModel]
    """Function that returns a copy of the source model."""
    domain: str
    window: Samples
    test: Samples
    task: RetrainTask
    cost: ModelCost
    budget: Budget
    settings: RetrainTraining
    """Settings of the training. Of the rivals block and head begin together."""
    most_steps: int
    seed: int
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Result of a function that is called once for a key: methods that do the same share it."""
        if key not in self._known:
            self._known[key] = make()
        return cast(_Made, self._known[key])

    @property
    def plain(self) -> RetrainTraining:
        """Settings without steps for the head alone."""
        return self.settings.model_copy(update={"head_steps": 0})


@dataclass(frozen=True)
class MethodResult:
    """Model that a method has trained, and what the edge paid."""

    model: PreTrainedModel
    flops: float
    """Metered operations, of everything that the edge paid."""
    memory: float
    bytes: float
    steps: int
    blocks: tuple[int, ...]

    def over(self, budget: Budget) -> bool:
        """Tell whether the metered cost is above the budget."""
        return not Cost(self.flops, self.memory, self.bytes).within(budget)


Method = Callable[[MethodCase], MethodResult]


def blocks(*numbers: int, head_first: bool = False) -> Method:
    """Train some blocks, and the head with them; without numbers the head alone. -1 is the last block."""

    def method(task: MethodCase) -> MethodResult:
        return trained(task, [number % len(task.cost.blocks) for number in numbers], head_first=head_first)

    return method


def all_blocks(task: MethodCase) -> MethodResult:
    """Train everything but the stem."""
    return blocks(*range(len(task.cost.blocks)))(task)


def random_block(task: MethodCase) -> MethodResult:
    """Train one block that is drawn for the window."""
    random = np.random.default_rng(derive_seed(task.seed, task.domain))
    return blocks(int(random.integers(len(task.cost.blocks))))(task)


def lora(task: MethodCase) -> MethodResult:
    """Train low-rank adapters of the queries and values of all blocks, and the head."""
    return _train_adapters(task, task.window, 0)


def hard_samples(task: MethodCase) -> MethodResult:
    """Train low-rank adapters on the samples of the highest perplexity (TLM, Hu et al. 2025, arXiv 2505.20633).

    The published threshold is a perplexity of large models' tokens; here the harder half is kept. What it takes to tell
    them is paid.
    """
    model = task.model()
    with measured(model) as cost, torch.no_grad():
        losses = [mean_error(model, one, task.task.loss) for one in task.window.batches(1)]
    hardest = torch.tensor(losses).argsort(descending=True)[: -(-len(losses) // 2)]
    return _train_adapters(task, task.window.select(hardest.sort().values), cost.flops)


def _train_adapters(task: MethodCase, samples: Samples, spent: int) -> MethodResult:
    """Train adapters and head on samples, after so many operations."""
    model, parts = copied(task)
    head = dict(parts.head)
    recipe = LoraRecipe(
        r=LORA_RANK, alpha=2 * LORA_RANK, dropout=0.0, target_modules=_names_of_queries_and_values(model, parts)
    )
    config = lora_config(model, parts.blocks, recipe, ())
    assert config is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        adapted = cast(PreTrainedModel, inject_adapter_in_model(config, model))
    adapters = {name: one for name, one in adapted.named_parameters() if "lora_" in name}
    groups = {"head": head, "blocks": adapters}
    settings = task.plain.model_copy(update={"lr": LORA_LR})

    def train(one: PreTrainedModel, groups: Mapping[str, Mapping[str, nn.Parameter]], steps: int) -> Retrained:
        return BlockTrainer(one, groups, samples, task.task.loss, settings, start=0, steps=steps, seed=task.seed).run()

    before = {name: one.detach().clone() for group in groups.values() for name, one in group.items()}
    each = train(adapted, groups, 1).flops
    steps = min(task.most_steps, int((task.budget.flops - spent) // each))
    if steps < 1:
        return untrained(task)
    for group in groups.values():
        for name, one in group.items():
            one.data.copy_(before[name])
    done = train(adapted, groups, steps)
    sent = 4 * sum(one.numel() for group in groups.values() for one in group.values())
    return MethodResult(adapted, spent + done.flops, done.memory, sent, steps, tuple(range(len(parts.blocks))))


def drawn(temperature: float | None) -> Method:
    """Train one block at a time, drawn anew every few steps; see :class:`DrawnBlockTrainer`."""

    def method(task: MethodCase) -> MethodResult:
        def train(steps: int) -> tuple[PreTrainedModel, Retrained]:
            model, parts = copied(task)
            arguments = (model, parts, task.window, task.task.loss, task.plain)
            trainer = DrawnBlockTrainer(*arguments, temperature=temperature, steps=steps, seed=task.seed)
            return model, trainer.run()

        total = len(task.cost.blocks)
        chosen = [BlockChoice(1.0, index == total // 2) for index in range(total)]
        batch, window = task.settings.batch_size, len(task.window)
        mean = training_cost(task.cost, chosen, steps=1, batch=batch, samples=window, cached=False).flops
        # What a step costs depends on the drawn block, so the number of steps is found by trying.
        steps = min(task.most_steps, int(1.1 * task.budget.flops / mean))
        model, done = train(steps)
        while done.flops > task.budget.flops:
            steps = min(steps - 1, int(steps * task.budget.flops / done.flops))
            model, done = train(steps)
        sent = task.cost.fixed_bytes + sum(menu[0].up for menu in task.cost.blocks)
        return MethodResult(model, done.flops, done.memory, sent, steps, tuple(range(total)))

    return method


def untrained(task: MethodCase) -> MethodResult:
    """Keep the source model."""
    return MethodResult(task.model(), 0, 0, 0, 0, ())


def copied(task: MethodCase) -> tuple[PreTrainedModel, RetrainParts]:
    """Copy of the source model, and its parts."""
    model = task.model()
    return model, parts_of(model, task.window.select(slice(0, 2)).inputs)


def _names_of_queries_and_values(model: PreTrainedModel, parts: RetrainParts) -> list[str]:
    """Last parts of the names of the maps of queries and values."""
    found = roles_of(model, parts.blocks).values()
    paths = {path for one in found for role in ("query", "value") for path in one.paths(role)}
    return sorted({path.rpartition(".")[2] for path in paths})


def trained(
    task: MethodCase, numbers: Sequence[int], *, head_first: bool = False, spent: Cost | None = None
) -> MethodResult:
    """Train blocks for as many steps as what is left of the budget allows."""
    settings, before = task.plain, spent or Cost()
    if numbers and head_first:
        settings, before = _head_phase(task)
    terms = Terms(batch=settings.batch_size, samples=len(task.window), spent=before)
    choices = training_choices(task.cost, numbers)
    steps = affordable_steps(task.cost, choices, task.budget, most=task.most_steps, **terms)
    if not steps:
        return untrained(task)

    def train() -> MethodResult:
        model, parts = copied(task)
        phases = retrain_blocks(
            model, parts, numbers, task.window, task.task.loss, settings, steps=steps, seed=task.seed
        )
        sent = task.cost.fixed_bytes + sum(task.cost.blocks[index][0].up for index in numbers)
        flops, memory = sum(one.flops for one in phases), max(one.memory for one in phases)
        return MethodResult(model, flops, memory, sent, steps, tuple(sorted(numbers)))

    done, paid = task.once((settings.head_steps, frozenset(numbers), steps), train), spent or Cost()
    return replace(done, flops=paid.flops + done.flops, memory=max(paid.memory, done.memory))


def _head_phase(task: MethodCase) -> tuple[RetrainTraining, Cost]:
    """Settings with the steps that train the head alone within their share of the budget, and the cost of these."""
    given = task.settings
    steps, cost = head_phase(
        task.cost,
        task.budget,
        most=given.head_steps,
        share=given.head_share,
        batch=given.batch_size,
        samples=len(task.window),
    )
    return given.model_copy(update={"head_steps": steps}), cost
