"""Training loop that every job uses: :class:`Trainer`, whose :meth:`Trainer.step` is one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from raycloud.errors import TrainingError
from raycloud.training.precision import autocast_to
from raycloud.training.recipe import TrainingRecipe
from raycloud.training.schedule import lr_factor
from raycloud.training.seeding import seeded


class MicroBatch(Protocol):
    """Part of an optimiser step's batch: any object that knows its number of labelled tokens."""

    @property
    def targets(self) -> int:
        """Number of labelled positions."""
        ...


@dataclass(frozen=True)
class Loss:
    """Sum of a loss over ``count`` tokens, and the sums of its unweighted terms over the same tokens."""

    sum: Tensor
    count: int
    terms: Mapping[str, Tensor]
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the terms that make up ``sum``; a term without a weight is reported only and is not part of it."""


@dataclass(frozen=True)
class Step:
    """Result of one optimiser step; losses are means over its tokens."""

    step: int
    loss: float
    terms: dict[str, float]
    """Mean of each term, unweighted."""
    weighted: dict[str, float]
    """Mean of each term that is part of the loss, multiplied by its weight."""
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool


@dataclass
class LossSums:
    """Losses of a step, summed over its micro-batches."""

    tokens: int
    """Number of labelled tokens in all micro-batches of the step, also those not added yet."""
    total: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Add the loss of one micro-batch."""
        self.total += float(loss.sum.detach())
        for name, value in loss.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + float(value.detach())
        self.weights |= loss.weights


Batch = TypeVar("Batch", bound=MicroBatch)


class Trainer:
    """Optimiser of modules in named groups, each with its own learning rate.

    The loss of a step is the sum over all its tokens divided by their number; the split into micro-batches does not
    change it. Dropout
    draws from a generator seeded by (seed, step, micro-batch), so the weights after a step are a function of the
    state before it, also in a resumed run. A step whose gradients are not finite is skipped and counted.

    Args:
        groups: modules by group name; parameters that several modules share are taken once.
        recipe: settings of the optimiser and the schedule.
        total_steps: number of steps after which the schedule ends.
        seed: seed of the dropout masks.
        lr: peak learning rates by group name, for groups that do not use the recipe's.
        autocast: dtype of the computation; None uses the parameters' own.
    """

    MAX_SKIPPED = 5
    """Number of consecutive skipped steps at which training fails."""

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
        """Run one optimiser step over micro-batches.

        Raises:
            TrainingError: the gradients were not finite ``MAX_SKIPPED`` times in a row, or no token is labelled.
        """
        sums = self.begin(batches)
        for micro, batch in enumerate(batches):
            with seeded({}, self.seed, self.step_index, micro), autocast_to(self.autocast, self.device):
                loss = loss_of(batch)
            (loss.sum / sums.tokens).backward()
            sums.add(loss)
        return self.finish(sums, self.gradient_norm())

    def begin(self, batches: Sequence[Batch]) -> LossSums:
        """Clear gradients left by an interrupted step, and return the :class:`LossSums` to add the losses to.

        Callers that compute gradients in another way than :meth:`step` use this, for example one that holds only a part
        of a model.

        Raises:
            TrainingError: no token is labelled.
        """
        tokens = sum(batch.targets for batch in batches)
        if tokens == 0:
            raise TrainingError(f"step {self.step_index}: no labelled token in its {len(batches)} micro-batches")
        self.optimizer.zero_grad(set_to_none=True)
        return LossSums(tokens)

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients of this trainer's parameters, taken as one vector."""
        found = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(found))

    def finish(self, sums: LossSums, norm: float) -> Step:
        """Make the step from the present gradients.

        Args:
            sums: result of :meth:`begin`, with all losses added.
            norm: gradient norm of the whole model, used for clipping; larger than :meth:`gradient_norm` if other
                processes hold some of the parameters.

        Raises:
            TrainingError: the norm was not finite ``MAX_SKIPPED`` times in a row.
        """
        done, lr = self.step_index, self.lr
        skipped = not self.apply(norm)
        means = {name: value / sums.tokens for name, value in sums.terms.items()}
        weighted = {name: weight * means[name] for name, weight in sums.weights.items()}
        return Step(done, sums.total / sums.tokens, means, weighted, norm, lr, sums.tokens, skipped)

    def apply(self, norm: float) -> bool:
        """Clip the gradients and update the parameters, unless the norm is not finite.

        Args:
            norm: see :meth:`finish`.

        Returns:
            True if the parameters were changed.

        Raises:
            TrainingError: the norm was not finite ``MAX_SKIPPED`` times in a row.
        """
        sound = math.isfinite(norm)
        if sound:
            self._skipped_in_a_row = 0
            exact = torch.tensor(norm, dtype=torch.float64)
            nn.utils.clip_grads_with_norm_(list(self._named.values()), self.recipe.max_grad_norm, exact)
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
        """Continue at another step number: the schedule follows it, the optimiser's moments are kept."""
        self.optimizer.zero_grad(set_to_none=True)
        self._skipped_in_a_row = 0
        self.step_index = step

    @property
    def lr(self) -> float:
        """Learning rate of the next step, for groups without a rate of their own."""
        return self.recipe.lr * self._factor

    @property
    def _factor(self) -> float:
        recipe = self.recipe
        return lr_factor(self.step_index, self.total_steps, recipe.warmup_steps, recipe.schedule, recipe.lr_floor)

    def state(self) -> dict[str, Tensor]:
        """State that the next step depends on, without the weights, as plain tensors (for safetensors)."""
        state = {"step": torch.tensor(self.step_index)}
        for name, parameter in self._named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = value
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a result of :meth:`state`.

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
                raise TrainingError(f"the saved optimiser state has '{name}', which this model does not have")
            # The fused optimiser needs its step count on the parameter's device, too.
            self.optimizer.state[parameter][key] = value.clone().to(parameter.device)
