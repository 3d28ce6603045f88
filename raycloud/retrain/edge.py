"""Edge of block retraining: it notices drift, reports what retraining would gain, and retrains as planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.models.block_trace import without_cache
from raycloud.models.chain import block_list_of
from raycloud.models.weights import Weights
from raycloud.retrain.cost import Budget, Cost, ModelCost
from raycloud.retrain.drift import DomainSignature, DriftDetector, DriftState, DriftVerdict, tapped
from raycloud.retrain.gain import BlockGain, block_gains
from raycloud.retrain.measure import model_cost
from raycloud.retrain.parts import RetrainParts, parts_of
from raycloud.retrain.plans import head_phase
from raycloud.retrain.recipe import RetrainTraining, Supervision
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import RetrainTask
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.update import BlockUpdate
from raycloud.retrain.window import WindowResult, train_window

_COSTED = 4
"""Number of samples on which costs are measured."""


@dataclass(frozen=True)
class DriftReport:
    """Report of a drift to the cloud: distances, gains and costs, and nothing of the samples."""

    edge: str
    version: int
    """Version of the cloud's weights that the edge has."""
    signature: DomainSignature
    gains: tuple[BlockGain, ...]
    start_error: float
    """Error on the current samples."""
    samples: int
    """Number of samples to train on."""
    batch: int
    cost: ModelCost
    budget: Budget
    estimated: Cost
    """Cost of statistics, gains and the judgement of the result."""
    head: Cost
    """Cost of the steps that train the head alone, before the planned ones."""
    head_steps: int
    """Number of these steps."""

    @property
    def spent(self) -> Cost:
        """Cost of the window beside the planned steps."""
        return self.head.after(self.estimated)


@dataclass(frozen=True)
class WindowPlan:
    """Plan of a window that the cloud sends to an edge."""

    trained: tuple[int, ...]
    """Numbers of the blocks."""
    steps: int
    """0 for nothing at all."""
    predicted_error: float | None
    deltas: Mapping[str, Tensor]
    """Changes that fitted the domain when it was met before, by name of the parameter; they are tried first."""


@dataclass(frozen=True)
class WindowOutcome:
    """Result of a window at an edge."""

    result: WindowResult | None
    """None if the plan was empty."""
    update: BlockUpdate | None
    """Changes for the cloud; None if retraining did not help."""
    recalled: bool
    """True if the changes of a domain that was met before were better than none."""
    cost: Cost
    """Metered cost of the window."""


class RetrainEdge:
    """Edge with a model, a stream of samples and a budget for each window.

    Args:
        name: name of the edge.
        model: its model, which it changes.
        fingerprint: fingerprint of the model's configuration.
        task: task of the model.
        detector: detector of drift.
        budget: budget of a window.
        settings: settings of the training.
        supervision: ``none`` never reads labels.
        replayed: source samples against forgetting.
        share_means: True if signatures hold the means of hidden states; otherwise only distances leave the edge.
        version: version of the cloud's weights that the model has.
    """

    HELD_OUT = 0.2
    """Share of a window's samples on which the result is judged."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        fingerprint: str,
        task: RetrainTask,
        detector: DriftDetector,
        budget: Budget,
        settings: RetrainTraining,
        *,
        supervision: Supervision = "labels",
        replayed: Samples | None = None,
        share_means: bool = False,
        version: int = 0,
    ) -> None:
        self.name, self.model, self.version = name, model.eval(), version
        self._fingerprint, self._detector = fingerprint, detector
        self._budget, self._settings, self._replayed = budget, settings, replayed
        self._loss = task.loss_of(supervision)
        # Without labels what is trained is all that can be judged.
        self._error = task.error if supervision == "labels" else self._loss
        self._share_means, self._state = share_means, DriftState()
        self._parts: RetrainParts | None = None
        self._cost: ModelCost | None = None

    def observe(self, samples: Samples) -> tuple[DriftVerdict, DomainSignature]:
        """Serve a window of samples, and judge from its hidden states whether the domain has drifted."""
        valid: list[Tensor | None] = [None]
        with torch.no_grad(), tapped(block_list_of(self.model).blocks, valid) as taps:
            for batch in samples.batches(self._settings.batch_size):
                mask = batch.inputs.get("attention_mask")
                valid[0] = None if mask is None else mask.bool()
                self.model(**batch.inputs, **without_cache(self.model))
        means = taps.take()
        verdict, self._state = self._detector.judge(means, self._state)
        held = tuple(one.mean(0) for one in means[1:]) if self._share_means else None
        return verdict, DomainSignature(verdict.distances, held)

    def report(self, samples: Samples, signature: DomainSignature) -> DriftReport:
        """Estimate the gains of a window of samples, paid from its budget."""
        parts, cost = self._measured(samples)
        train = self._split(samples)[0]
        gains = block_gains(self.model, parts, train, self._loss)
        error = mean_error(self.model, samples, self._error)
        # Served once, for the error once, and the held-out samples twice more to judge the result.
        passes = 2 * len(samples) + 2 * (len(samples) - len(train))
        forward = cost.stem_forward + cost.head_forward + sum(menu[0].forward for menu in cost.blocks)
        batch, settings = min(self._settings.batch_size, len(train)), self._settings
        steps, head = head_phase(
            cost,
            self._budget,
            most=settings.head_steps,
            share=settings.head_share,
            batch=batch,
            samples=len(train),
        )
        return DriftReport(
            self.name,
            self.version,
            signature,
            gains.blocks,
            error,
            len(train),
            batch,
            cost,
            self._budget,
            Cost(gains.flops + passes * forward, gains.memory),
            head,
            steps,
        )

    def retrain(self, samples: Samples, report: DriftReport, plan: WindowPlan, seed: int) -> WindowOutcome:
        """Retrain as planned; the model changes only if that helps on the held-out samples.

        Args:
            samples: the window's samples.
            report: the edge's report of them.
            plan: the cloud's answer.
            seed: seed of the order of samples.
        """
        train, held_out = self._split(samples)
        recalled = bool(plan.deltas) and self._recall(plan.deltas, held_out)
        if not plan.steps:
            return WindowOutcome(None, None, recalled, report.estimated)
        parts, _ = self._measured(samples)
        result = train_window(
            self.model,
            parts,
            plan.trained,
            train,
            held_out,
            self._loss,
            self._error,
            self._settings.model_copy(update={"head_steps": report.head_steps}),
            steps=plan.steps,
            seed=seed,
            replayed=self._replayed,
        )
        update = None
        if result.helped:
            update = BlockUpdate(self._fingerprint, self.version, len(train), result.deltas)
        sent = len(update.to_bytes()) if update is not None else 0
        cost = Cost(result.flops, result.memory, sent).after(report.estimated)
        return WindowOutcome(result, update, recalled, cost)

    def load(self, weights: Weights, version: int) -> None:
        """Take the cloud's weights of a version; those that it does not name stay."""
        with torch.no_grad():
            own = dict(self.model.named_parameters())
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        self.version = version

    def _measured(self, samples: Samples) -> tuple[RetrainParts, ModelCost]:
        """Parts of the model and their costs, found with the first samples."""
        if self._parts is None or self._cost is None:
            some = samples.select(slice(0, _COSTED))
            self._parts = parts_of(self.model, some.inputs)
            self._cost = model_cost(self.model, self._parts, some, self._loss)
        return self._parts, self._cost

    def _split(self, samples: Samples) -> tuple[Samples, Samples]:
        """Samples to train on and held-out ones; which ones is a function of their number alone."""
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(len(samples)))
        held = max(1, round(self.HELD_OUT * len(samples)))
        return samples.select(order[held:]), samples.select(order[:held])

    def _recall(self, deltas: Mapping[str, Tensor], held_out: Samples) -> bool:
        """Add the changes of a domain that was met before; undo them if they do not help."""
        own = dict(self.model.named_parameters())
        before = {name: own[name].detach().clone() for name in deltas}
        error = mean_error(self.model, held_out, self._error)
        with torch.no_grad():
            for name, delta in deltas.items():
                own[name].add_(delta.to(own[name]))
        if mean_error(self.model, held_out, self._error) < error:
            return True
        with torch.no_grad():
            for name, tensor in before.items():
                own[name].copy_(tensor)
        return False
