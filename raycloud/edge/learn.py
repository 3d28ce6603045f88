"""A device without Ray takes part in a distillation: it brings its data, and gets all else from the cloud."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PretrainedConfig

from raycloud.data.sources import path_of
from raycloud.distill.learner import Heartbeat, StudentLearner
from raycloud.distill.recipe import DistillEdgeRecipe, DistillRecipe
from raycloud.distill.round_report import RoundReport
from raycloud.distill.student import build_student
from raycloud.durable import check_folder, remove, write_atomically, write_folder
from raycloud.edge.learn_teacher import LinkTeacher
from raycloud.edge.learn_terms import Allowance, JobDemands
from raycloud.errors import LinkError, LinkSetupError, RecipeError, TrainingError
from raycloud.link.channel import Channel, MeteredChannel
from raycloud.link.meter import Meter
from raycloud.link.retry_notices import with_retry_notices
from raycloud.link.websocket import JOB_HEADER, SESSION_HEADER, WebSocketChannel, check_cloud
from raycloud.models.configuration import CONFIG, load_config
from raycloud.models.loading import load_tokenizer
from raycloud.models.weights import Weights
from raycloud.origin import cores
from raycloud.rounds.service import RoundClient
from raycloud.rounds.service.messages import Blob, ContributionReply, RoundGrant, TaskReply
from raycloud.training.lora import save_model

_LOG = logging.getLogger(__name__)
_FILE = re.compile(r"(tokenizer|student_tokenizer)/\w[\w-]*(\.[\w-]+)*\.(json|txt|model|jinja)")
_RUN = re.compile(r"\w{1,64}")
_PULSE_S = 0.5

Connect = Callable[[str, str], Channel]
"""Function that opens a channel of a service (``rounds`` or ``signals``) for a session."""


@dataclass(frozen=True)
class JobEndpoint:
    """Address of a job on the cloud."""

    url: str
    """Address of the cloud, ``wss://host[:port]/v1/rounds``."""
    job: str
    token: str | None = None
    certificates: str | None = None
    """File of certificates to trust instead of the system's."""

    def __post_init__(self) -> None:
        check_cloud(self.url, self.certificates)

    def connect(self, service: str, session: str) -> Channel:
        """Open a channel of a session."""
        url = self.url if service == "rounds" else f"{self.url.rstrip('/')}/{service}"
        headers = {SESSION_HEADER: session, JOB_HEADER: self.job}
        return WebSocketChannel(url, token=self.token, headers=headers, certificates=self.certificates)


@dataclass(frozen=True)
class LearnOptions:
    """Options of a device."""

    data: str
    """Source of the device's texts."""
    folder: Path
    """Folder for the state; the same command goes on from it."""
    device: str | None = None
    """Name of the device's edge in the job's recipe; None for the only one."""
    allowed: Allowance = field(default_factory=Allowance)
    threads: int = 0
    """CPU threads; 0 for all cores."""
    patience_s: float = 300.0
    """Longest time in seconds without an answer of the cloud."""


def learn(
    job: str,
    connect: Connect,
    options: LearnOptions,
    *,
    notify: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, int, str], None] = lambda what, done, total, note: None,
) -> dict[str, Any]:
    """Take part in a job until its last round; killed at any time, the same call goes on.

    Args:
        job: name of the job.
        connect: opens channels to the cloud.
        options: options of the device.
        notify: called with one line about what happens.
        on_progress: called with a name, the number of steps done and in all, and a note.

    Returns:
        Summary as plain JSON.

    Raises:
        RecipeError: the job asks for more than is allowed; nothing has been downloaded.
        LinkError: the cloud cannot be reached in time, or refuses.
        DataError: the data cannot be read.
    """
    path_of(options.data)
    check_folder(options.folder)
    begun, meter = time.monotonic(), Meter()

    def metered(service: str, session: str) -> Channel:
        return MeteredChannel(connect(service, session), meter)

    opening = with_retry_notices(partial(metered, "rounds"), notify)
    client = RoundClient(opening, options.device, patience_s=options.patience_s)
    try:
        device = _JobDevice(job, client, partial(metered, "signals"), meter, options, notify, on_progress)
        try:
            device.run()
        finally:
            device.close()
    finally:
        client.close()
    return device.summary() | {
        "bytes_up": meter.payload["up"],
        "bytes_down": meter.payload["down"],
        "seconds": time.monotonic() - begun,
    }


class _Pulse:
    """Heartbeats to the cloud while a round is trained; they tell whether the round is still the current one."""

    def __init__(self, client: RoundClient, number: int, weights: str) -> None:
        self._client, self._number, self._weights = client, number, weights
        self.latest = Heartbeat(number, 0, 0.0, 0.0, os.getpid())
        self.outdated = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def __enter__(self) -> _Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_PULSE_S) and not self.outdated.is_set():
            now = self.latest
            try:
                current = self._client.heartbeat(
                    self._number, self._weights, now.step, now.loss, now.tokens_per_second, now.pid
                )
            except LinkSetupError:  # the job is over, or another process took this one's place
                current = False
            except LinkError as error:
                _LOG.warning("no heartbeat: %s", error)
                continue
            if not current:
                self.outdated.set()


class _JobDevice:
    """Device in a job, from the cloud's grant to the last round."""

    def __init__(
        self,
        job: str,
        client: RoundClient,
        connect_signals: Callable[[str], Channel],
        meter: Meter,
        options: LearnOptions,
        notify: Callable[[str], None],
        on_progress: Callable[[str, int, int, str], None],
    ) -> None:
        self._client, self._options, self._notify, self._on_progress = client, options, notify, on_progress
        self._meter, self._counted_from = meter, 0
        granted = client.granted
        self._job, self._name, run = job, granted.device, granted.facts.get("run", "")
        if not _RUN.fullmatch(run):
            raise LinkSetupError(f"the cloud does not name the run of job '{job}'")
        self._folder = options.folder / run
        self._recipe, self._edge = self._read_recipe(granted)
        self._config = self._read_config(granted)
        demands = JobDemands.of(job, granted, self._recipe, self._edge, self._config)
        demands.check(options.allowed, notify)
        self._once_bytes = demands.once_bytes
        """Bytes that may still come down once, beside those of a round."""
        self._rounds: list[dict[str, Any]] = []
        self._student: Path | None = None
        tokenizer = self._files(granted, "tokenizer")
        own = self._files(granted, "student_tokenizer")
        self._recipe, self._edge = _with_tokenizer(self._recipe, self._edge, own)
        if tokenizer is None:
            raise LinkSetupError(f"the cloud sent no tokenizer for job '{job}'")
        self._tokenizer, self._own = load_tokenizer(str(tokenizer)), None if own is None else load_tokenizer(str(own))
        frozen = granted.blobs.get("frozen")
        self._frozen: Weights = {} if frozen is None else _tensors(self._blob(frozen, "frozen.safetensors"))
        self._teacher = LinkTeacher(
            granted.facts.get("teacher", ""),
            self._tokenizer,
            self._recipe,
            self._frozen,
            connect_signals,
            options.patience_s,
        )
        self._learner = StudentLearner(
            self._recipe,
            self._edge,
            self._config,
            self._teacher,
            self._folder / "optimizer",
            threads=options.threads or cores(),
        )

    def run(self) -> None:
        """Train in every round that the cloud asks for."""
        self._notify(f"taking part as '{self._name}' with {self._learner.samples} samples")
        while True:
            task = self._client.task(self._learner.samples)
            if task.state == "finished":
                self._finish(task)
                return
            if task.state == "train" and task.weights is not None:
                self._round(task.round, task.weights)

    def close(self) -> None:
        """End the session with the teacher."""
        self._teacher.close()

    def summary(self) -> dict[str, Any]:
        """Return what was done, as plain JSON."""
        accepted = [one for one in self._rounds if one["accepted"]]
        return {
            "job": self._job,
            "device": self._name,
            "rounds": self._rounds,
            "accepted": len(accepted),
            "tokens": sum(one["tokens"] for one in accepted),
            "student": None if self._student is None else str(self._student),
        }

    # -- what the job is

    def _read_recipe(self, granted: RoundGrant) -> tuple[DistillRecipe, DistillEdgeRecipe]:
        try:
            recipe = DistillRecipe.model_validate_json(granted.recipe)
            edge = next(edge for edge in recipe.edges if edge.name == granted.device)
        except (ValidationError, StopIteration) as error:
            first = str(error).splitlines()[0] if str(error) else "it lacks this device"
            raise LinkSetupError(f"the recipe of job '{self._job}' cannot be used here: {first}") from None
        data = recipe.data.model_copy(update={"source": self._options.data})
        teacher = recipe.teacher.model_copy(update={"signals": None})
        return recipe.model_copy(update={"data": data, "device": "auto", "teacher": teacher}), edge

    def _read_config(self, granted: RoundGrant) -> PretrainedConfig:
        folder = self._folder / "config"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, granted.config)
        return load_config(str(folder))

    def _files(self, granted: RoundGrant, kind: str) -> Path | None:
        """Download the files of a tokenizer; None if the job has none of this kind."""
        blobs = {name: blob for name, blob in granted.blobs.items() if name.startswith(f"{kind}/")}
        if any(_FILE.fullmatch(name) is None for name in blobs):
            raise LinkSetupError(f"the cloud names an odd file: {', '.join(blobs)}")
        if not blobs:
            return None
        for name, blob in blobs.items():
            self._blob(blob, name)
        write_atomically(self._folder / kind / CONFIG, granted.config)  # a folder of a model has one
        return self._folder / kind

    def _blob(self, blob: Blob, name: str) -> bytes:
        """Return bytes that are kept in the folder, or pull them.

        Raises:
            LinkError: the cloud does not have them.
        """
        path = self._folder / name
        if path.is_file() and path.stat().st_size == blob.nbytes:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == blob.digest:
                return content
        pulled = self._client.pull(blob)
        if pulled is None:
            raise LinkError(f"the cloud does not have '{name}' any longer")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, pulled)
        return pulled

    # -- rounds

    def _round(self, number: int, start: Blob) -> None:
        self._counted_from, outbox = self._meter.total, self._folder / "outbox"
        about = {"round": number, "weights": start.digest}
        kept = _read_json(outbox / "about.json")
        if {key: kept.get(key) for key in about} != about:
            try:
                weights = _tensors(self._blob(start, "weights.safetensors"))
            except LinkError as error:
                self._notify(f"round {number + 1}: {error}")
                return
            if not self._trained(number, start, weights, outbox, about):
                return
            kept = _read_json(outbox / "about.json")
        report, tensors = (outbox / "report.json").read_bytes(), (outbox / "weights.safetensors").read_bytes()
        self._check_bytes(number, len(report) + len(tensors))
        reply = self._client.push(number, start.digest, int(kept["samples"]), report, tensors)
        self._once_bytes = 0  # the teacher's tables have come with the first round
        self._note(number, kept, reply)
        if not reply.accepted:
            remove(outbox)

    def _check_bytes(self, number: int, next_bytes: int = 0) -> None:
        """Refuse to go on with a round that takes more bytes than are allowed, ``next_bytes`` of them next.

        Raises:
            RecipeError: more has crossed the link than the job said, or is about to.
        """
        allowed, taken = self._options.allowed.max_bytes, self._meter.total - self._counted_from + next_bytes
        if allowed is not None and taken > allowed + self._once_bytes:
            raise RecipeError(
                f"round {number + 1} of job '{self._job}' takes {taken / 1e6:,.1f} MB; "
                f"--max-bytes allows {allowed / 1e6:,.1f} MB"
            )

    def _trained(self, number: int, start: Blob, weights: Weights, outbox: Path, about: dict[str, Any]) -> bool:
        """Train a round and keep the contribution in the outbox; return whether there is one."""
        name = f"round {number + 1}/{self._recipe.rounds.count}"
        with _Pulse(self._client, number, start.digest) as pulse:

            def on_heartbeat(heartbeat: Heartbeat) -> None:
                pulse.latest = heartbeat
                self._check_bytes(number)
                note = f"loss {heartbeat.loss:.3f}  {heartbeat.tokens_per_second:.0f} tokens/s"
                self._on_progress(name, heartbeat.step, self._recipe.rounds.steps, note)

            try:
                update = self._learner.train(number, weights, on_heartbeat, pulse.outdated.is_set)
            except TrainingError as error:
                self._client.give_up(number, start.digest, str(error))
                self._notify(f"{name}: {error}")
                return False
        if update is None:
            self._notify(f"{name}: over before it was trained")
            return False
        report = RoundReport.of(update).pack()
        tensors = save({key: tensor.contiguous() for key, tensor in update.weights.items()})
        loss = update.steps[-1].loss if update.steps else float("nan")
        known = {**about, "samples": update.tokens, "loss": loss, "seconds": update.seconds}

        def fill(to: Path) -> None:
            (to / "report.json").write_bytes(report)
            (to / "weights.safetensors").write_bytes(tensors)
            (to / "about.json").write_text(json.dumps(known), encoding="utf-8")

        write_folder(outbox, fill)
        return True

    def _note(self, number: int, kept: dict[str, Any], reply: ContributionReply) -> None:
        said = "accepted" if reply.accepted else f"refused: {reply.detail}"
        self._notify(f"round {number + 1}/{self._recipe.rounds.count}: {said}, loss {kept['loss']:.3f}")
        self._rounds.append(
            {
                "round": number,
                "accepted": reply.accepted,
                "reason": reply.reason,
                "tokens": int(kept["samples"]),
                "loss": kept["loss"],
                "seconds": kept["seconds"],
            }
        )

    def _finish(self, task: TaskReply) -> None:
        """Save the final student."""
        if task.weights is None:
            return
        weights = _tensors(self._blob(task.weights, "weights.safetensors"))
        student = self._recipe.cohort_of(self._edge).student
        model = build_student(self._config, weights, self._frozen, student, torch.device("cpu"))
        self._student = self._options.folder / "student"
        write_folder(self._student, lambda to: save_model(model, self._own or self._tokenizer, to))


def _with_tokenizer(
    recipe: DistillRecipe, edge: DistillEdgeRecipe, folder: Path | None
) -> tuple[DistillRecipe, DistillEdgeRecipe]:
    """Recipe whose student for an edge has its tokenizer in a folder, or the teacher's: paths of the cloud mean nothing
    here, and only the tokenizer is read."""
    cohort = recipe.cohort_of(edge)
    student = cohort.student.model_copy(update={"model": None if folder is None else str(folder)})
    own = edge.model_copy(update={"student": student})
    edges = [own if one.name == edge.name else one for one in recipe.edges]
    return recipe.model_copy(update={"edges": edges}), own


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise LinkError(f"the cloud's weights cannot be read: {str(error).splitlines()[0]}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
