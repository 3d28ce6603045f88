"""Device in a distillation: it trains a student on its own texts, with signals of the job's teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save
from transformers import PretrainedConfig

from raycloud.distill.learner import Heartbeat, StudentLearner
from raycloud.distill.recipe import DistillEdgeRecipe, DistillRecipe
from raycloud.distill.round_report import RoundReport
from raycloud.distill.student import build_student
from raycloud.durable import remove, write_atomically, write_folder
from raycloud.edge.learn_session import JobSession, Pulse, read_json, read_tensors
from raycloud.edge.learn_teacher import LinkTeacher
from raycloud.edge.learn_terms import distill_demands
from raycloud.errors import LinkError, LinkSetupError, TrainingError
from raycloud.models.configuration import CONFIG, load_config
from raycloud.models.loading import load_tokenizer
from raycloud.models.weights import Weights
from raycloud.origin import cores
from raycloud.rounds.service.messages import Blob, ContributionReply, RoundGrant, TaskReply
from raycloud.training.lora import save_model

_TOKENIZER_FILE = re.compile(r"\w[\w-]*(\.[\w-]+)*\.(json|txt|model|jinja)")


class DistillDevice:
    """Device in a distillation, from the cloud's grant to the last round.

    Args:
        session: session in the job.

    Raises:
        RecipeError: the job asks for more than is allowed; nothing has been downloaded.
        LinkError: the cloud cannot be reached in time, or does not say what it must.
        DataError: the data cannot be read.
    """

    def __init__(self, session: JobSession) -> None:
        self._session, granted, options = session, session.granted, session.options
        self._client, self._notify, self._folder = session.client, session.notify, session.folder
        self._job, self._name = session.job, granted.device
        self._recipe, self._edge = self._read_recipe(granted)
        self._config = self._read_config(granted)
        demands = distill_demands(self._job, granted, self._recipe, self._edge, self._config)
        demands.check(options.allowed, self._notify)
        self._once_bytes = demands.once_bytes
        """Bytes that may still come down once, beside those of a round."""
        self._rounds: list[dict[str, Any]] = []
        self._student: Path | None = None
        tokenizer = session.files("tokenizer", _TOKENIZER_FILE)
        own = session.files("student_tokenizer", _TOKENIZER_FILE)
        self._recipe, self._edge = _with_tokenizer(self._recipe, self._edge, own)
        if tokenizer is None:
            raise LinkSetupError(f"the cloud sent no tokenizer for job '{self._job}'")
        self._tokenizer, self._own = load_tokenizer(str(tokenizer)), None if own is None else load_tokenizer(str(own))
        frozen = granted.blobs.get("frozen")
        self._frozen: Weights = {} if frozen is None else read_tensors(session.blob(frozen, "frozen.safetensors"))
        self._teacher = LinkTeacher(
            granted.facts.get("teacher", ""),
            self._tokenizer,
            self._recipe,
            self._frozen,
            session.channels("signals"),
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
        data = recipe.data.model_copy(update={"source": self._session.options.data})
        teacher = recipe.teacher.model_copy(update={"signals": None})
        return recipe.model_copy(update={"data": data, "device": "auto", "teacher": teacher}), edge

    def _read_config(self, granted: RoundGrant) -> PretrainedConfig:
        folder = self._folder / "config"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, granted.config)
        return load_config(str(folder))

    # -- rounds

    def _round(self, number: int, start: Blob) -> None:
        self._session.count_bytes(self._once_bytes)
        outbox = self._folder / "outbox"
        about = {"round": number, "weights": start.digest}
        kept = read_json(outbox / "about.json")
        if {key: kept.get(key) for key in about} != about:
            try:
                weights = read_tensors(self._session.blob(start, "weights.safetensors"))
            except LinkError as error:
                self._notify(f"round {number + 1}: {error}")
                return
            if not self._trained(number, start, weights, outbox, about):
                return
            kept = read_json(outbox / "about.json")
        report, tensors = (outbox / "report.json").read_bytes(), (outbox / "weights.safetensors").read_bytes()
        self._session.check_bytes(f"round {number + 1}", len(report) + len(tensors))
        reply = self._client.push(number, start.digest, int(kept["samples"]), report, tensors)
        self._once_bytes = 0  # the teacher's tables have come with the first round
        self._note(number, kept, reply)
        if not reply.accepted:
            remove(outbox)

    def _trained(self, number: int, start: Blob, weights: Weights, outbox: Path, about: dict[str, Any]) -> bool:
        """Train a round and keep the contribution in the outbox; return whether there is one."""
        name = f"round {number + 1}/{self._recipe.rounds.count}"
        with Pulse(self._client, number, start.digest) as pulse:

            def on_heartbeat(heartbeat: Heartbeat) -> None:
                pulse.latest = heartbeat
                self._session.check_bytes(f"round {number + 1}")
                note = f"loss {heartbeat.loss:.3f}  {heartbeat.tokens_per_second:.0f} tokens/s"
                self._session.on_progress(name, heartbeat.step, self._recipe.rounds.steps, note)

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
        weights = read_tensors(self._session.blob(task.weights, "weights.safetensors"))
        student = self._recipe.cohort_of(self._edge).student
        model = build_student(self._config, weights, self._frozen, student, torch.device("cpu"))
        self._student = self._session.options.folder / "student"
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
