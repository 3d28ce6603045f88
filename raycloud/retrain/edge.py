"""Edge of block retraining: it notices drift, reports what retraining would gain, and retrains as planned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.models.weights import Weights, copy_weights, nbytes, weights_of
from raycloud.retrain.alarms import AlarmCause, DriftAlarm, ErrorReference
from raycloud.retrain.budget import budget_of
from raycloud.retrain.cost import Budget, Cost, ModelCost
from raycloud.retrain.drift import DomainSignature, DriftDetector, DriftVerdict, TapMeans, tap_means
from raycloud.retrain.estimate import estimate
from raycloud.retrain.gain import BlockGain, block_gains, blocks_together, gain_samples
from raycloud.retrain.measure import model_cost
from raycloud.retrain.parts import RetrainParts, parts_of
from raycloud.retrain.recipe import BudgetRecipe, RetrainTraining, Supervision
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import RetrainTask
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.update import BlockUpdate
from raycloud.retrain.window import WindowResult, train_window

MOST_CANDIDATES = 3
"""Largest number of changes that an edge tries."""
_HEADER, _ENTRY = 1024, 128
"""Most bytes of an update's header, and of each tensor's entry in it beside its name."""
_COSTED = 4
"""Number of samples on which costs are measured."""


@dataclass(frozen=True)
class Observation:
    """Result of serving a window of samples."""

    verdict: DriftVerdict
    signature: DomainSignature
    """Signature with the means of hidden states, which stay at the edge unless it shares them."""
    cause: AlarmCause | None
    """Why the window raises an alarm; None if it raises none."""
    error: float
    """Error of the window, or without labels the loss that needs none."""


@dataclass(frozen=True)
class DriftReport:
    """Report of a drift to the cloud: distances, gains and costs, and nothing of the samples."""

    edge: str
    version: int
    """Version of the cloud's weights that the edge has."""
    signature: DomainSignature
    gains: tuple[BlockGain, ...]
    error: float
    """Error on the current samples."""
    start_error: float
    """Error on the current samples once the head fits them, cross-validated."""
    samples: int
    """Number of samples to train on."""
    batch: int
    cost: ModelCost
    budget: Budget
    estimated: Cost
    """Cost of the head's first steps, of gains, the judgement of the result, and the new signature."""
    head_steps: int
    """Number of steps that have trained the head alone, before the planned ones."""
    reserved: Cost
    """Most that plans do not know of: source samples against forgetting, and the header of an update."""
    local_updates: int
    """Number of changes that the edge has made to the version's weights."""

    @property
    def plannable(self) -> Budget:
        """Budget of the planned steps."""
        return _without(self.budget, self.reserved)


@dataclass(frozen=True)
class WindowPlan:
    """Plan of a window that the cloud sends to an edge."""

    trained: tuple[int, ...]
    """Numbers of the blocks."""
    steps: int
    """0 for nothing at all."""
    predicted_error: float | None
    cost: Cost
    """Predicted cost of the window."""
    candidates: tuple[Mapping[str, Tensor], ...]
    """Changes that fitted domains like this one, by name of the parameter; each is tried, and the best is kept."""


@dataclass(frozen=True)
class WindowOutcome:
    """Result of a window at an edge."""

    result: WindowResult | None
    """None if the plan was empty."""
    update: BlockUpdate | None
    """Changes for the cloud; None if nothing helped."""
    recalled: int | None
    """Number of the candidate whose changes were better than none; None if none were."""
    cost: Cost
    """Metered cost of the window."""


class RetrainEdge:
    """Edge with a model, a stream of samples and a budget for each window.

    Args:
        name: name of the edge.
        model: its model, which it changes.
        fingerprint: fingerprint of the cloud's model.
        task: task of the model.
        detector: detector of drift.
        alarm: state of its alarms.
        budget: budget of a window.
        settings: settings of the training.
        supervision: ``none`` never reads labels.
        replayed: source samples against forgetting.
        share_means: True if signatures hold the means of hidden states; otherwise only distances leave the edge.
        judged: number of the last samples of a window from which drift is judged; None for all.
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
        alarm: DriftAlarm,
        budget: BudgetRecipe,
        settings: RetrainTraining,
        *,
        supervision: Supervision = "labels",
        replayed: Samples | None = None,
        share_means: bool = False,
        judged: int | None = None,
        version: int = 0,
    ) -> None:
        self.name, self.model, self.version, self.alarm = name, model.eval(), version, alarm
        self._fingerprint, self._detector = fingerprint, detector
        self._budget, self._settings, self._replayed = budget, settings, replayed
        self._loss = task.loss_of(supervision)
        self._labelled = supervision == "labels"
        # Without labels what is trained is all that can be judged.
        self._error = task.error if self._labelled else self._loss
        self._share_means, self._judged = share_means, judged
        self.changes: list[frozenset[str]] = []
        """Names of the parameters that each of its own changes since the version has changed."""
        self._head: dict[str, Tensor] = {}
        """Head that the last report has trained; empty for none."""
        self._parts: RetrainParts | None = None
        self._cost: ModelCost | None = None

    def observe(self, samples: Samples) -> Observation:
        """Serve a window of samples, and judge from its hidden states and errors whether the domain has drifted."""
        means, error = self._served(samples)
        verdict, signature = self._signed(means)
        labelled = error if self._labelled else None
        cause, self.alarm = self.alarm.after(verdict, signature, self._detector.source, labelled, len(samples))
        return Observation(verdict, signature, cause, error)

    def report(self, samples: Samples, seen: Observation, seed: int) -> DriftReport:
        """Train the head of a window and estimate the gains of its blocks, paid from its budget.

        The model does not change: :meth:`retrain` begins with the trained head.

        Args:
            samples: the window's samples.
            seen: what serving them has shown.
            seed: seed of the order of samples.
        """
        parts, cost = self._measured(samples)
        train, held_out = self._split(samples)
        # The held-out samples are judged for each of the changes that are tried first and without them, twice for the
        # result, and twice each for the cloud's weights before and after; all once more with these. The last ones give
        # the signature.
        passes = (7 + MOST_CANDIDATES) * len(held_out) + len(samples) + (self._judged or len(samples))
        forward = cost.stem_forward + cost.head_forward + sum(menu[0].forward for menu in cost.blocks)
        batch, settings = min(self._settings.batch_size, len(train)), self._settings
        budget = budget_of(self._budget, cost, batch=batch, samples=len(train))
        replayed = len(self._replayed) if self._replayed is not None and settings.replay else 0
        header = _HEADER + sum(len(name) + _ENTRY for name, _ in self.model.named_parameters())
        reserved = Cost(replayed * forward, replayed * max(cost.boundary), header)
        plannable = _without(budget, reserved)
        before = {name: one.detach().clone() for name, one in parts.head.items()}
        found = estimate(self.model, parts, train, self._loss, self._error, settings, cost, plannable, seed)
        gains, paid = self._gains(parts, cost, plannable, train)
        self._head = {name: one.detach().clone() for name, one in parts.head.items()} if found.head_steps else {}
        with torch.no_grad():
            for name, one in parts.head.items():
                one.copy_(before[name])
        # All blocks run for the source samples to calibrate the detector.
        passes += replayed
        return DriftReport(
            self.name,
            self.version,
            seen.signature if self._share_means else replace(seen.signature, means=None),
            gains,
            seen.error,
            found.error,
            len(train),
            batch,
            cost,
            budget,
            Cost(passes * forward).after(paid).after(found.cost),
            found.head_steps,
            reserved,
            len(self.changes),
        )

    def retrain(
        self, samples: Samples, report: DriftReport, plan: WindowPlan, seed: int, *, keep: bool = True
    ) -> WindowOutcome:
        """Retrain as planned; the model changes only if that helps on the held-out samples.

        Args:
            samples: the window's samples.
            report: the edge's report of them.
            plan: the cloud's answer.
            seed: seed of the order of samples.
            keep: False to restore the model in the end and send nothing.
        """
        train, held_out = self._split(samples)
        parts, _ = self._measured(samples)
        own = dict(self.model.named_parameters())
        names = {
            *(name for one in plan.candidates for name in one),
            *(name for group in parts.groups(plan.trained).values() for name in group),
        }
        before = {} if keep else {name: own[name].detach().clone() for name in names}
        recalled = self._recall(plan.candidates, held_out)
        result, deltas = None, dict[str, Tensor]()
        if plan.steps:
            late = {"head_lr": self._settings.late_head_lr} if self._head or recalled is not None else {}
            result = train_window(
                self.model,
                parts,
                plan.trained,
                train,
                held_out,
                self._loss,
                self._error,
                self._settings.model_copy(update={"head_steps": 0, **late}),
                steps=plan.steps,
                seed=seed,
                replayed=self._replayed,
                head=self._head if recalled is None else None,  # it was trained on other blocks
            )
            deltas = result.deltas
        with torch.no_grad():
            for name, tensor in before.items():
                own[name].copy_(tensor)
        update = None
        if keep and recalled is not None:  # the cloud knows these changes, and is told that they were taken
            self.changes.append(frozenset(plan.candidates[recalled]))
        if keep and result is not None and result.helped:
            sent_deltas = {name: one.cpu() for name, one in deltas.items()}
            update = BlockUpdate(self._fingerprint, self.version, len(train), sent_deltas)
            self.changes.append(frozenset(deltas))
        sent = sum(map(nbytes, plan.candidates)) + (len(update.to_bytes()) if update is not None else 0)
        done = Cost(result.flops, result.memory, sent) if result is not None else Cost(bytes=sent)
        return WindowOutcome(result, update, recalled, done.after(report.estimated))

    def answer(self, samples: Samples) -> None:
        """Take the domain of a window as the edge's own, with the weights that it has now: no further alarm for it.

        With source samples at hand, the detector is calibrated for these weights.
        """
        if self.changes and self._replayed is not None and len(self._replayed) >= 2 * (self._judged or len(samples)):
            means, _ = self._served(self._replayed)
            self._detector = DriftDetector.calibrated(means, self._judged or len(samples))
        recent = samples.select(slice(-(self._judged or len(samples)), None))
        _, signature = self._signed(self._served(recent)[0])
        usual = None
        if self._labelled and self.alarm.usual is not None:
            held_out = self._split(samples)[1]
            error = mean_error(self.model, held_out, self._error)
            # Of errors that are shares the deviation follows from the mean; else it is taken as the source's.
            deviation = max(self.alarm.usual.deviation, math.sqrt(max(error * (1 - error), 0.0)))
            usual = ErrorReference(error, deviation, len(held_out))
        self.alarm = self.alarm.answered(signature, usual)

    def load(self, weights: Weights, version: int, detector: DriftDetector | None = None) -> None:
        """Take the cloud's weights of a version; those that it does not name stay.

        Args:
            weights: parameters by name.
            version: their version.
            detector: detector for the new weights; None for the former one.

        Raises:
            ModelError: the model has no such parameters.
        """
        own = weights_of(self.model)
        copy_weights({name: own[name] for name in weights if name in own}, weights)
        self.changes = []
        self.version, self._detector = version, detector or self._detector

    def consider(self, weights: Weights, version: int, detector: DriftDetector, samples: Samples) -> bool:
        """Take the cloud's weights of a version unless its own are better on the held-out samples of a window.

        Args:
            weights: parameters that changed since the edge's version, by name.
            version: their version.
            detector: detector for these weights.
            samples: samples of the window.

        Returns:
            True if the edge has the version now.
        """
        own = weights_of(self.model)
        kept = {name: own[name].clone() for name in weights if name in own}
        former, held_out = (self.version, self._detector, self.changes), self._split(samples)[1]
        before = mean_error(self.model, held_out, self._error)
        self.load(weights, version, detector)
        if mean_error(self.model, held_out, self._error) <= before:
            return True
        copy_weights({name: own[name] for name in kept}, kept)
        self.version, self._detector, self.changes = former
        return False

    def error(self, samples: Samples) -> float:
        """Error of samples, or without labels the loss that needs none."""
        return mean_error(self.model, samples, self._error)

    def _gains(
        self, parts: RetrainParts, cost: ModelCost, budget: Budget, samples: Samples
    ) -> tuple[tuple[BlockGain, ...], Cost]:
        """Gains of the blocks, as many at a time as the memory allows, and their cost; zeros if it allows none."""
        some = samples.select(slice(0, gain_samples(cost, budget, len(samples))))
        together = blocks_together(cost, budget, len(some))
        if not together:
            return (BlockGain(0.0, 0.0, 0.0),) * len(cost.blocks), Cost()
        gains = block_gains(self.model, parts, some, self._loss, together=together)
        return gains.blocks, Cost(gains.flops, gains.memory)

    def _served(self, samples: Samples) -> tuple[TapMeans, float]:
        """Mean hidden states of samples, and their mean error."""
        total, count = 0.0, 0

        def judge(logits: Tensor, labels: Tensor) -> None:
            nonlocal total, count
            found = self._error(logits, labels)
            total, count = total + float(found.sum), count + found.count

        means = tap_means(self.model, samples, self._settings.batch_size, judge)
        return means, total / max(count, 1)

    def _signed(self, means: TapMeans) -> tuple[DriftVerdict, DomainSignature]:
        """Verdict on the last samples and their signature, with means behind each block."""
        recent = [one[-(self._judged or len(one)) :] for one in means]
        verdict = self._detector.judge(recent)
        return verdict, DomainSignature(verdict.distances, tuple(one.mean(0) for one in recent[1:]))

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

    def _recall(self, candidates: Sequence[Mapping[str, Tensor]], held_out: Samples) -> int | None:
        """Add the changes that help most, and return their number; None if all are worse than the present weights."""
        if not candidates:
            return None
        own = dict(self.model.named_parameters())
        before = {name: own[name].detach().clone() for one in candidates for name in one}
        best, chosen = mean_error(self.model, held_out, self._error), None
        for number, deltas in enumerate(candidates[:MOST_CANDIDATES]):
            self._add(before, deltas)
            if (error := mean_error(self.model, held_out, self._error)) < best:
                best, chosen = error, number
        self._add(before, {} if chosen is None else candidates[chosen])
        return chosen

    def _add(self, before: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> None:
        """Set parameters to former values with changes."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in before.items():
                own[name].copy_(tensor)
            for name, delta in deltas.items():
                own[name].add_(delta.to(own[name]))


def _without(budget: Budget, reserved: Cost) -> Budget:
    """Budget without what is reserved."""
    return Budget(*(max(0.0, getattr(budget, name) - getattr(reserved, name)) for name in ("flops", "memory", "bytes")))
