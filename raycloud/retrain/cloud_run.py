"""Cloud of a job of retraining: it makes the source model, serves edges with versions, and keeps them on disk."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from raycloud.checksums import verify_file
from raycloud.durable import write_atomically, write_folder
from raycloud.errors import ChecksumError, ModelError
from raycloud.models.chain import block_list_of
from raycloud.models.configuration import load_config, quiet_transformers
from raycloud.models.loading import load_tokenizer, pick_device
from raycloud.models.weights import Weights, fingerprint, load_weights, nbytes, weights_of
from raycloud.results import RECIPE
from raycloud.retrain.alarms import ErrorReference
from raycloud.retrain.budget import budget_of
from raycloud.retrain.cloud import MOST_STEPS, PlanPrior, RetrainCloud, retrainable
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.domains import DomainMemory, StoredDomain
from raycloud.retrain.drift import DomainSignature, DriftDetector
from raycloud.retrain.edge import DriftReport, RetrainEdge, WindowPlan
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.measure import model_cost
from raycloud.retrain.messages import parse_message
from raycloud.retrain.parts import parts_of
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.retrain.simulation import simulated_drift
from raycloud.retrain.source import (
    auto_class_of,
    calibrated_detector,
    error_reference,
    is_images,
    source_model,
    source_parts,
    train_source,
)
from raycloud.retrain.tasks import TASKS
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.update import BlockUpdate
from raycloud.rounds.machine import ClosedRound, Refusal
from raycloud.rounds.service import DeviceMember
from raycloud.rounds.versions import VERSIONS, VersionStore
from raycloud.training.lora import save_model

_LOG = logging.getLogger(__name__)
_REPLAYED = 256
"""Largest number of source samples that edges get against forgetting."""
_MODEL, _PRIOR = "model", "prior.json"
_DRIFTS = TypeAdapter(list[SimulatedDrift])
DOMAINS = "domains"
"""Folder of a result directory with the domains that were met."""


@dataclass(frozen=True)
class CloudFacts:
    """Facts of the source model."""

    parameters: int
    blocks: tuple[str, ...]
    """Paths of the blocks."""
    source_error: float
    """Error on the test of the source domain, of the version that the run begins with."""
    rounds: int
    """Number of rounds that are over."""


class CloudRun:
    """Cloud of a job.

    Args:
        recipe: recipe of the job.
        folder: result directory, with the versions; what is there is continued.
        notify: called with one line about what happens.
    """

    def __init__(self, recipe: RetrainRecipe, folder: Path, notify: Callable[[str], None] = lambda line: None) -> None:
        self._recipe, self._folder, self._notify = recipe, folder, notify
        self._parts = source_parts(recipe, notify=notify)
        self._task = TASKS[recipe.task]
        self._model = source_model(self._parts, recipe, pick_device(recipe.device))
        self._store = VersionStore(folder / VERSIONS)
        rounds = 0
        if self._store.current < 0:
            if recipe.source.steps:
                self._train()
            self._store.add(self._weights(), version=0, note="source model")
        else:
            load_weights(self._model, {**weights_of(self._model), **self._store.weights(self._store.current)})
            rounds = self._store.record(self._store.current).round or 0
        self._evaluate()
        source = self._store.weights(0)
        self._cloud = RetrainCloud(
            retrainable(self._weights()),
            fingerprint(source),
            list(block_list_of(self._model).blocks),
            self._prior(),
            DomainMemory(self._detector.source, recipe.drift.radius, self._known_domains()),
            source=source,
            version=rounds,
            least_gain=recipe.least_gain,
        )

    def facts(self) -> CloudFacts:
        """Return the facts of the model."""
        blocks = tuple(block_list_of(self._model).blocks)
        return CloudFacts(self._model.num_parameters(), blocks, self._source_error, self._cloud.version)

    def deployment(self, version: int | None, changed: Iterable[str] = ()) -> Deployment:
        """Return the current state for an edge.

        Args:
            version: version that the edge has; None for a new edge, which gets all weights.
            changed: names of the parameters that the edge has changed itself since then.
        """
        whole = self._cloud.weights
        weights = whole
        if version is not None:
            names = {*self._cloud.changed_since(version), *changed}
            weights = {name: one for name, one in whole.items() if name in names}
        replayed = self._clean.at_most(_REPLAYED) if self._recipe.training.replay else None
        return Deployment(self._cloud.version, self._cloud.fingerprint, weights, self._detector, self._usual, replayed)

    def plan(self, report: DriftReport) -> WindowPlan:
        """Plan a window of an edge."""
        return self._cloud.plan(report)

    def open(self, number: int, edges: Sequence[str]) -> None:
        """Open a round for edges; its number is larger than that of every version."""
        rounds = self._recipe.rounds
        self._cloud.open(edges, time.monotonic() + rounds.deadline_s, min(rounds.quorum, len(edges)), number)

    def accept(self, edge: str, number: int, update: BlockUpdate, signature: DomainSignature) -> Refusal | None:
        """Accept an edge's update of a round, or return why it is refused."""
        return self._cloud.accept(edge, number, update, signature)

    def settle(self, edge: str, recalled: int | None) -> None:
        """Take note of which candidate of its plan an edge has taken, before its update is accepted."""
        self._cloud.settle(edge, recalled)

    def remove(self, edge: str) -> None:
        """Stop waiting for an edge in the open round."""
        self._cloud.remove(edge)

    def close(self) -> tuple[ClosedRound, float] | None:
        """Merge the round if nobody is awaited or its deadline has passed; return it with the error of the source."""
        samples = self._cloud.samples
        closed = self._cloud.close(time.monotonic())
        if closed is None:
            return None
        if closed.result == "new_version":
            load_weights(self._model, {**weights_of(self._model), **self._cloud.weights})
            self._evaluate()
            self._store.add(
                self._weights(),
                round=closed.number,
                members=closed.members,
                samples=samples,
                figures={"source_error": self._source_error},
            )
            for number, domain in enumerate(self._cloud.domains):
                write_atomically(self._folder / DOMAINS / f"{number}.safetensors", save(domain.tensors()))
        return closed, self._source_error

    def device_members(self, run: str) -> dict[str, DeviceMember]:
        """Describe the job for each of its devices.

        Args:
            run: id of the run, which devices keep their state under.
        """
        recipe, files = self._recipe, dict[str, bytes]()
        if self._parts.tokenizer is not None:
            with tempfile.TemporaryDirectory() as folder:
                self._parts.tokenizer.save_pretrained(folder)
                files = {f"tokenizer/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}
        return {
            edge.name: DeviceMember(
                recipe=recipe.for_device(edge).model_dump_json(),
                config=self._parts.config.to_json_string(use_diff=False),
                weights_bytes=nbytes(self._cloud.weights),
                facts={"run": run, "classes": json.dumps(self._parts.classes)},
                blobs=files,
                most_samples=recipe.samples,
                parse_report=parse_message,
            )
            for edge in recipe.devices
        }

    def save(self) -> None:
        """Write the model of the current version, which ``transformers`` loads."""
        write_folder(self._folder / _MODEL, lambda to: save_model(self._model, self._parts.tokenizer, to))

    def _train(self) -> None:
        recipe = self._recipe
        samples = self._parts.data.samples(recipe.data.source_domain, "source").to(self._model.device)

        def told(step: Any) -> None:
            if (step.step + 1) % 100 == 0:
                self._notify(f"source model: step {step.step + 1}/{recipe.source.steps}, loss {step.loss:.3f}")

        train_source(self._model, recipe, samples, told)

    def _evaluate(self) -> None:
        """Measure the source domain with the present weights."""
        recipe, device = self._recipe, self._model.device
        clean = self._parts.data.samples(recipe.data.source_domain, "clean").to(device)
        self._clean = clean
        self._detector: DriftDetector = calibrated_detector(self._model, clean, recipe)
        self._usual: ErrorReference = error_reference(self._model, clean, self._task.error)
        test = self._parts.data.samples(recipe.data.source_domain, "test")
        test = test.at_most(recipe.test_samples).to(device)
        self._source_error = mean_error(self._model, test, self._task.error)

    def _prior(self) -> PlanPrior | None:
        """Prior of the recipe's domains, from the file of an earlier process or by training copies of the source."""
        recipe, path = self._recipe, self._folder / _PRIOR
        if not recipe.prior.domains:
            return None
        if not path.is_file():
            drifts = []
            for number, domain in enumerate(recipe.prior.domains, 1):
                drifts.append(self._simulated(domain))
                self._notify(f"prior: {number} of {len(recipe.prior.domains)} domains")
            write_atomically(path, _DRIFTS.dump_json(drifts), checksum=True)
        verify_file(path)
        return PlanPrior.of(_DRIFTS.validate_json(path.read_bytes()))

    def _simulated(self, domain: str) -> SimulatedDrift:
        """Train sets of blocks of a copy of the source model on a domain."""
        recipe, task = self._recipe, self._task
        model = copy.deepcopy(self._model)
        count = recipe.samples - round(RetrainEdge.HELD_OUT * recipe.samples)
        window = self._parts.data.samples(domain, "window").at_most(count).to(model.device)
        test = self._parts.data.samples(domain, "test").at_most(recipe.test_samples).to(model.device)
        loss = task.loss_of(recipe.supervision)
        some = window.select(slice(0, 4))
        cost = model_cost(model, parts_of(model, some.inputs), some, loss)
        budget = budget_of(recipe.budget, cost, batch=recipe.training.batch_size, samples=len(window))
        return simulated_drift(
            domain,
            model,
            window,
            test,
            loss,
            task.error,
            recipe.training,
            cost,
            budget,
            most_steps=MOST_STEPS,
            seed=recipe.seed,
        )

    def _known_domains(self) -> list[StoredDomain]:
        """Domains that were met: those on disk, or at first the source, to which edges may come back."""
        found = _domains_in(self._folder / DOMAINS)
        return found or [StoredDomain(DomainSignature(torch.zeros_like(self._detector.centre)), {})]

    def _weights(self) -> dict[str, Tensor]:
        return {name: one.cpu() for name, one in weights_of(self._model).items() if one.is_floating_point()}


def restore_model(results: Path, name: str, weights: Weights) -> None:
    """Write the model of a finished run again, from the weights of one of its versions.

    Args:
        results: result directory.
        name: name of the history; a run has one, without a name.
        weights: weights of the version.

    Raises:
        ModelError: the model's folder is missing or cannot be read.
    """
    folder = results / _MODEL
    if not folder.is_dir():
        raise ModelError(f"'{folder}' is missing, whose configuration every version has")
    recipe = RetrainRecipe.load(results / RECIPE)
    config = load_config(str(folder))
    tokenizer = None if is_images(recipe) else load_tokenizer(str(folder))
    with quiet_transformers():
        model = auto_class_of(recipe).from_config(config, dtype=torch.float32)
    load_weights(model, {**weights_of(model), **weights})
    write_folder(folder, lambda to: save_model(model, tokenizer, to))


def _domains_in(folder: Path) -> list[StoredDomain]:
    """Domains that an earlier process of the job has met.

    Raises:
        ChecksumError: a file is damaged.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors"), key=lambda one: int(one.stem)):
        try:
            found.append(StoredDomain.from_tensors(load_file(path)))
        except (SafetensorError, KeyError) as error:
            raise ChecksumError(f"'{path}' is damaged: {str(error).splitlines()[0]}") from None
    return found
