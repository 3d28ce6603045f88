"""The training loop that every capability uses: one :class:`Trainer`, one :meth:`Trainer.step` an optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.errors import TrainingError
from raycloud.recipe import Recipe
from raycloud.training.draws import drawing
from raycloud.training.precision import computing_in
from raycloud.training.schedule import Schedule, lr_factor


class TrainingRecipe(Recipe):
    """How to optimise."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    lr_floor: float = Field(0.0, ge=0, le=1)
    """Where the schedule ends, as a share of the peak."""
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    """Applied to matrices; biases and norms are left out."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    batch_size: int = Field(32, gt=0)
    """Samples in a micro-batch."""
    accumulate: int = Field(1, gt=0)
    """Micro-batches in an optimiser step."""
    gradient_checkpointing: bool = False


class MicroBatch(Protocol):
    """What a step is made of: anything that knows how many tokens it teaches."""

    @property
    def targets(self) -> int:
        """Labelled positions."""
        ...


@dataclass(frozen=True)
class Loss:
    """The sum of a loss over ``count`` tokens, and its raw terms likewise as sums."""

    sum: Tensor
    count: int
    terms: Mapping[str, Tensor]
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the terms that ``sum`` is the weighted sum of; others only tell what those are made of."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step did; losses are means over its tokens."""

    step: int
    loss: float
    terms: dict[str, float]
    """As they are."""
    weighted: dict[str, float]
    """Those that the loss is the sum of, with their weights."""
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool


@dataclass
class Sums:
    """The losses of a step, added up over its micro-batches."""

    tokens: int
    """Of all micro-batches, those to come as well."""
    total: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Add a micro-batch's."""
        self.total += float(loss.sum.detach())
        for name, value in loss.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + float(value.detach())
        self.weights |= loss.weights


Batch = TypeVar("Batch", bound=MicroBatch)


class Trainer:
    """Optimises modules in named groups, each with its own learning rate.

    A step's loss is the sum over all its tokens divided by their number, however they fall into micro-batches. Dropout
    draws from a generator seeded by (seed, step, micro-batch), so the weights after a step are a function of the
    state before it, also in a resumed run. A step whose gradients are not finite is skipped and counted.

    Args:
        groups: modules by group name; parameters that several modules share are taken once.
        recipe: how to optimise.
        total_steps: where the schedule ends.
        seed: of the dropout.
        lr: peak learning rates of groups that do not use the recipe's.
        autocast: the type to compute in where it is not the parameters' own.
    """

    MAX_SKIPPED = 5
    """Steps in a row that may be skipped before training is given up."""

    def __init__(
        self,
        groups: Mapping[str, nn.Module],
        recipe: TrainingRecipe,
        *,
        total_steps: int,
        seed: int,
        lr: Mapping[str, float] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.recipe, self.total_steps, self.seed = recipe, total_steps, seed
        self.autocast = autocast
        self.step_index = 0
        self._skipped_in_a_row = 0
        self._named: dict[str, nn.Parameter] = {}
        self.optimizer = torch.optim.AdamW(
            list(self._parameter_groups(groups, lr or {})), lr=recipe.lr, betas=recipe.betas, fused=True
        )
        self.device = next(iter(self._named.values())).device

    def _parameter_groups(self, groups: Mapping[str, nn.Module], lr: Mapping[str, float]) -> Iterable[dict]:
        seen: set[int] = set()
        for group, module in groups.items():
            matrices: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                self._named[f"{group}.{name}"] = parameter
                (matrices if parameter.ndim > 1 else others).append(parameter)
            peak = lr.get(group, self.recipe.lr)
            for parameters, decay in ((matrices, self.recipe.weight_decay), (others, 0.0)):
                if parameters:
                    yield {"params": parameters, "weight_decay": decay, "peak_lr": peak}

    def step(self, batches: Sequence[Batch], loss_of: Callable[[Batch], Loss]) -> Step:
        """One optimiser step over micro-batches.

        Raises:
            TrainingError: the gradients were not finite ``MAX_SKIPPED`` times in a row, or no token is labelled.
        """
        sums = self.begin(batches)
        for micro, batch in enumerate(batches):
            with drawing({}, self.seed, self.step_index, micro), computing_in(self.autocast, self.device):
                loss = loss_of(batch)
            (loss.sum / sums.tokens).backward()
            sums.add(loss)
        return self.finish(sums, self.gradient_norm())

    def begin(self, batches: Sequence[Batch]) -> Sums:
        """Forget the gradients of a step that was broken off; what the micro-batches' losses are to be added to.

        For those who compute gradients in another way than :meth:`step`, as does whoever holds only a part of a model.

        Raises:
            TrainingError: no token is labelled.
        """
        tokens = sum(batch.targets for batch in batches)
        if tokens == 0:
            raise TrainingError(f"step {self.step_index}: no labelled token in its {len(batches)} micro-batches")
        self.optimizer.zero_grad(set_to_none=True)
        return Sums(tokens)

    def gradient_norm(self) -> float:
        """Of all gradients of this trainer's parameters, taken as one vector."""
        found = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(found))

    def finish(self, sums: Sums, norm: float) -> Step:
        """Make the step from the gradients that are there.

        Args:
            sums: what :meth:`begin` gave, with all losses.
            norm: of the gradients of the whole model, by which they are clipped; larger than :meth:`gradient_norm`
                where others hold some of them.

        Raises:
            TrainingError: the norm was not finite ``MAX_SKIPPED`` times in a row.
        """
        done, lr = self.step_index, self.lr
        skipped = not self.apply(norm)
        means = {name: value / sums.tokens for name, value in sums.terms.items()}
        weighted = {name: weight * means[name] for name, weight in sums.weights.items()}
        return Step(done, sums.total / sums.tokens, means, weighted, norm, lr, sums.tokens, skipped)

    def apply(self, norm: float) -> bool:
        """Clip the gradients and change the parameters by them, unless the norm is not finite.

        Args:
            norm: see :meth:`finish`.

        Returns:
            Whether the parameters were changed.

        Raises:
            TrainingError: the norm was not finite ``MAX_SKIPPED`` times in a row.
        """
        sound = math.isfinite(norm)
        if sound:
            self._skipped_in_a_row = 0
            exact = torch.tensor(norm, dtype=torch.float64)
            nn.utils.clip_grads_with_norm_(list(self._named.values()), self.recipe.clip, exact)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self._factor
            self.optimizer.step()
        else:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= self.MAX_SKIPPED:
                raise TrainingError(
                    f"gradients were not finite in {self.MAX_SKIPPED} steps up to step {self.step_index}"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.step_index += 1
        return sound

    def jump(self, step: int) -> None:
        """Go on with another step: the schedule is where that one is, and the moments stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        self._skipped_in_a_row = 0
        self.step_index = step

    @property
    def lr(self) -> float:
        """Of the next step, for groups without a rate of their own."""
        return self.recipe.lr * self._factor

    @property
    def _factor(self) -> float:
        recipe = self.recipe
        return lr_factor(self.step_index, self.total_steps, recipe.warmup_steps, recipe.schedule, recipe.lr_floor)

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights that the next step depends on, as plain tensors (for safetensors)."""
        state = {"step": torch.tensor(self.step_index)}
        for name, parameter in self._named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = value
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            TrainingError: the state belongs to other parameters.
        """
        self.step_index = int(state["step"])
        self.optimizer.state.clear()
        for full, value in state.items():
            key, separator, name = full.partition("/")
            if not separator:
                continue
            parameter = self._named.get(name)
            if parameter is None or (value.ndim > 0 and value.shape != parameter.shape):
                raise TrainingError(f"the saved optimiser state has '{name}', which this model has not")
            # The fused optimiser wants its step count, too, where the parameter is.
            self.optimizer.state[parameter][key] = value.clone().to(parameter.device)
