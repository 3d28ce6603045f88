"""Device in a split fine-tuning: it trains the edge's part of the job's model with the cloud's blocks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save

from raycloud.distill.learner import Heartbeat
from raycloud.durable import remove, write_atomically
from raycloud.edge.learn_session import JobSession, Pulse
from raycloud.edge.learn_terms import split_tune_demands
from raycloud.errors import LinkSetupError
from raycloud.models.configuration import CONFIG, load_config
from raycloud.origin import cores
from raycloud.results import read_records
from raycloud.rounds.service.messages import Blob
from raycloud.split.finetune.group_member import MemberRun
from raycloud.split.finetune.metrics_log import Record
from raycloud.split.finetune.phase_report import MAX_RECORDS, PHASES, PhaseReport
from raycloud.split.finetune.recipe import SplitTuneRecipe

_PART_FILE = re.compile(r"\w[\w-]*(\.[\w-]+)*\.(json|txt|model|jinja|safetensors)")


class SplitTuneDevice:
    """Device in a split fine-tuning, from the cloud's grant to the last phase.

    A phase is an evaluation before training, or a training with the evaluation after it. Its report is kept until the
    cloud has accepted it, so that a phase is never trained twice.

    Args:
        session: session in the job.

    Raises:
        RecipeError: the job asks for more than is allowed; nothing has been downloaded.
        LinkError: the cloud cannot be reached in time, or does not say what it must.
        DataError: the data cannot be read.
    """

    def __init__(self, session: JobSession) -> None:
        self._session, granted, options = session, session.granted, session.options
        recipe = self._read_recipe()
        folder = session.folder / "config"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, granted.config)
        demands = split_tune_demands(session.job, granted, recipe, load_config(str(folder)))
        demands.check(options.allowed, session.notify)
        part = session.files("model", _PART_FILE)
        if part is None:
            raise LinkSetupError(f"the cloud sent no part of the model for job '{session.job}'")
        torch.set_num_threads(options.threads or cores())
        self._run = MemberRun(
            recipe.model_copy(update={"model": str(part)}),
            granted.device,
            session.folder / "edge",
            session.channels("split-tune"),
            run=session.run,
            group=session.run,
            notify=session.notify,
        )
        self._texts = int(self._run.facts()["train_texts"])
        self._phases: dict[str, dict[str, float]] = {}
        self._rounds: list[dict[str, Any]] = []

    def run(self) -> None:
        """Run every phase that the cloud asks for."""
        client = self._session.client
        self._session.notify(f"taking part as '{self._run.name}' with {self._texts} texts")
        while True:
            task = client.task(self._texts)
            if task.state == "finished":
                return
            if task.state == "train" and task.weights is not None and task.round < len(PHASES):
                self._phase(task.round, task.weights)

    def close(self) -> None:
        """Do nothing: a phase ends its own session."""

    def summary(self) -> dict[str, Any]:
        """Return what was done, as plain JSON."""
        together = self._session.folder / "edge" / "together.safetensors"
        return {
            "job": self._session.job,
            "device": self._run.name,
            "phases": self._phases,
            "rounds": self._rounds,
            "counted": sum(one["counted"] for one in self._rounds),
            "weights": str(together) if together.is_file() else None,
        }

    def _read_recipe(self) -> SplitTuneRecipe:
        session = self._session
        try:
            recipe = SplitTuneRecipe.model_validate_json(session.granted.recipe)
        except ValidationError as error:
            first = str(error).splitlines()[0]
            raise LinkSetupError(f"the recipe of job '{session.job}' cannot be used here: {first}") from None
        if session.granted.device not in [edge.name for edge in recipe.edges]:
            raise LinkSetupError(f"the recipe of job '{session.job}' lacks this device")
        data = recipe.data.model_copy(update={"source": session.options.data, "validation": None})
        return recipe.model_copy(update={"data": data, "device": "auto", "network": None})

    def _phase(self, number: int, start: Blob) -> None:
        """Run a phase, or take the report of one that was run before; send it until the cloud accepts it."""
        what, session = PHASES[number], self._session
        kept = session.folder / f"{what}.json"
        if not kept.is_file():
            write_atomically(kept, self._trained(number, start).pack())
        content = kept.read_bytes()
        reply = session.client.push(number, start.digest, self._texts, content, save({}))
        if not reply.accepted:
            session.notify(f"{what}: refused: {reply.detail}")
            if reply.reason == "unreadable":
                remove(kept)
            return
        report = PhaseReport.model_validate_json(content)
        self._phases[what] = dict(report.metrics)
        self._rounds += [record.model_dump() for record in report.records if record.kind == "round"]
        session.notify(f"{what}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items()))
        self._run.forget(what)

    def _trained(self, number: int, start: Blob) -> PhaseReport:
        what, session = PHASES[number], self._session
        written = session.folder / f"{what}.jsonl"
        session.count_bytes()
        # A killed process leaves the records of the steps that its last checkpoint has, and perhaps half a line.
        write_atomically(written, "".join(json.dumps(record) + "\n" for record in read_records(written)))
        with (
            written.open("a", encoding="utf-8", buffering=1) as log,
            Pulse(session.client, number, start.digest) as pulse,
        ):

            def on_record(record: Record) -> None:
                log.write(json.dumps(record) + "\n")
                if record["kind"] == "round":
                    session.count_bytes()
                    return
                session.check_bytes(f"a round of {what}")
                pulse.latest = Heartbeat(number, record["step"] + 1, record["loss"], 0.0, os.getpid())
                session.on_progress(what, record["step"] + 1, self._run.steps, f"loss {record['loss']:.3f}")

            if what == "before":
                session.notify("evaluating before training")
                return PhaseReport.model_validate({"metrics": self._run.before(), "facts": self._run.facts()})
            found = self._run.alone(on_record) if what == "alone" else self._run.together(on_record)
        return PhaseReport.model_validate({"metrics": found, "records": _read_records(written)})


def _read_records(path: Path) -> list[Record]:
    """Read the last record of each step and round: some are repeated after a lost session. Long phases are thinned."""
    steps, rounds = dict[int, Record](), dict[int, Record]()
    for record in read_records(path):
        if record["kind"] == "step":
            steps[record["step"]] = record
        else:
            rounds[record["round"]] = record
    every = 1 + len(steps) // max(1, MAX_RECORDS - len(rounds))
    return [*list(steps.values())[::every], *rounds.values()]
