"""Device in a job of block retraining: it serves its windows, and retrains the blocks that the cloud plans."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from raycloud.distill.learner import Heartbeat
from raycloud.durable import write_atomically, write_folder
from raycloud.edge.learn_session import JobSession, Pulse, read_tensors
from raycloud.edge.learn_terms import retrain_demands
from raycloud.errors import LinkSetupError, TrainingError
from raycloud.models.configuration import CONFIG, load_config
from raycloud.models.loading import load_tokenizer
from raycloud.origin import cores
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.edge_run import EdgeRun
from raycloud.retrain.messages import (
    ObservedMessage,
    ObservedRecord,
    ReportMessage,
    RetrainedMessage,
    RetrainedRecord,
    plan_of_tensors,
)
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.rounds.service.messages import Blob
from raycloud.training.lora import save_model

_TOKENIZER_FILE = re.compile(r"\w[\w-]*(\.[\w-]+)*\.(json|txt|model|jinja)")


class RetrainDevice:
    """Device in a job of block retraining, from the cloud's grant to the last window.

    A window has two tasks: the even ones serve it with the cloud's current state, the odd ones retrain as planned.

    Args:
        session: session in the job.

    Raises:
        RecipeError: the job asks for more than is allowed; nothing has been downloaded.
        LinkError: the cloud cannot be reached in time, or does not say what it must.
    """

    def __init__(self, session: JobSession) -> None:
        self._session, granted, options = session, session.granted, session.options
        recipe = self._read_recipe()
        folder = session.folder / "config"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, granted.config)
        retrain_demands(session.job, granted, recipe, load_config(str(folder))).check(options.allowed, session.notify)
        model = session.files("tokenizer", _TOKENIZER_FILE) or folder
        torch.set_num_threads(options.threads or cores())
        self._recipe = recipe.model_copy(
            update={
                "model": str(model),
                "tokenizer": None,
                "device": "auto",
                "data": recipe.data.model_copy(update={"source": options.data, "classes": self._classes()}),
            }
        )
        self._run: EdgeRun | None = None
        self._windows: list[dict[str, Any]] = []
        self._model: Path | None = None
        self._published: tuple[int, int] | None = None
        """Version, and number of own changes, of the model that was written last."""
        self._tokenizer = None if model == folder else load_tokenizer(str(model))

    def run(self) -> None:
        """Serve every window that the cloud asks for."""
        client, edge = self._session.client, self._recipe.edges[0]
        self._session.notify(f"taking part as '{edge.name}', {len(edge.windows)} windows")
        while True:
            task = client.task(self._recipe.samples)
            if task.state == "finished":
                return
            if task.state == "train" and task.weights is not None:
                self._answer(task.round, task.weights)

    def close(self) -> None:
        """Do nothing: there is no session but that of the rounds."""

    def summary(self) -> dict[str, Any]:
        """Return what was done, as plain JSON."""
        return {
            "job": self._session.job,
            "device": self._session.granted.device,
            "windows": self._windows,
            "version": None if self._run is None else self._run.version,
            "model": None if self._model is None else str(self._model),
        }

    def _read_recipe(self) -> RetrainRecipe:
        session = self._session
        try:
            recipe = RetrainRecipe.model_validate_json(session.granted.recipe)
        except ValidationError as error:
            first = str(error).splitlines()[0]
            raise LinkSetupError(f"the recipe of job '{session.job}' cannot be used here: {first}") from None
        if [edge.name for edge in recipe.edges] != [session.granted.device]:
            raise LinkSetupError(f"the recipe of job '{session.job}' lacks this device")
        return recipe

    def _classes(self) -> list[Any] | None:
        try:
            classes = json.loads(self._session.granted.facts["classes"])
        except (KeyError, ValueError):
            classes = None
        if not isinstance(classes, list):
            raise LinkSetupError(f"the cloud does not name the classes of job '{self._session.job}'")
        return classes or None

    def _answer(self, number: int, blob: Blob) -> None:
        """Do one task and send its result."""
        session, client = self._session, self._session.client
        session.count_bytes()
        raw = client.pull(blob)
        if raw is None:  # the cloud has gone on
            return
        with Pulse(client, number, blob.digest) as pulse:
            pulse.latest = Heartbeat(number, 1, 0.0, 0.0, os.getpid())
            try:
                content, tensors, samples = self._done(number, read_tensors(raw))
            except TrainingError as error:
                client.give_up(number, blob.digest, str(error))
                session.notify(f"window {number // 2 + 1}: {error}")
                return
        packed = save({name: one.contiguous() for name, one in tensors.items()})
        session.check_bytes(f"window {number // 2 + 1}", len(packed))
        reply = client.push(number, blob.digest, samples, content, packed)
        if not reply.accepted:
            session.notify(f"window {number // 2 + 1}: refused: {reply.detail}")
        if self._run is not None:
            self._publish(self._run)

    def _done(self, number: int, tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, Tensor], int]:
        """Result of a task: report, tensors and number of samples."""
        edge, window = self._recipe.edges[0], number // 2
        if number % 2 == 0:
            state = Deployment.from_tensors(tensors)
            if self._run is None:
                self._run = EdgeRun(self._recipe, edge, state, self._session.notify)
            else:
                self._run.adopt(state)
            seen = self._run.observe(window, state)
            report = None if seen.report is None else ReportMessage.of(seen.report)
            record = ObservedRecord.model_validate(seen.record)
            self._windows.append(dict(seen.record))
            alarm = record.cause or "no alarm"
            self._session.notify(f"window {window + 1}: {record.domain}, drift {record.score:.1f}, {alarm}")
            return ObservedMessage(record=record, report=report).pack(), {}, self._recipe.samples
        if self._run is None:
            raise TrainingError("this process has not served the window that the cloud planned")
        done = self._run.retrain(plan_of_tensors(tensors))
        self._windows[-1] |= done.record
        trained = RetrainedRecord.model_validate(done.record)
        helped = "not trained" if trained.helped is None else "helped" if trained.helped else "did not help"
        self._session.notify(f"window {window + 1}: blocks {trained.trained}, {trained.steps} steps, {helped}")
        update = done.update
        message = RetrainedMessage(
            record=trained,
            recalled=done.recalled,
            version=self._run.version,
            fingerprint="none" if update is None else update.model,
        )
        deltas = {} if update is None else dict(update.deltas)
        return message.pack(), deltas, self._recipe.samples

    def _publish(self, run: EdgeRun) -> None:
        """Write the device's model if it has changed; ``raycloud edge serve --watch`` then answers with it."""
        state = run.version, run.updates
        if state == self._published:
            return

        self._model = self._session.options.folder / "model"
        write_folder(self._model, lambda to: save_model(run.model, self._tokenizer, to))
        self._published = state
