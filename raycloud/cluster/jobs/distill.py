"""The distillation job: a teacher in the cloud, students at the edges, rounds of averaging, an examination."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from transformers import PretrainedConfig

from raycloud.cluster.checkpoint import Checkpoint
from raycloud.cluster.cloud_teacher import CloudTeacher, Start, TeacherFacts
from raycloud.cluster.edge_student import Beat, EdgeStudent
from raycloud.cluster.rounds import Member, Round, run_round
from raycloud.cluster.runtime import joined, stoppable
from raycloud.data.prompts import example
from raycloud.data.sources import load_rows
from raycloud.data.splits import select, shard
from raycloud.distill.examination import ALL, Comparison, Score, gap_closed
from raycloud.distill.recipe import DistillRecipe, Placement
from raycloud.distill.student import check_blocks, check_objective, check_vocabulary, own_tokenizer
from raycloud.errors import ClusterError, DataError, Interrupted, ModelError, RaycloudError
from raycloud.models.anatomy import anatomy_of
from raycloud.models.loading import load_config, load_tokenizer, quiet_transformers, resolve
from raycloud.models.weights import Weights, build
from raycloud.report.console import Bars, bars, console, working
from raycloud.report.distillation import print_summary, write_page
from raycloud.results import RECIPE, Mode, ResultDir, write_folder

_ANSWER_S = 3600.0
"""The longest one answer of the teacher may take: loading it, cutting a student, an examination."""


@dataclass(frozen=True)
class Result:
    """Where a run left what it made, and its headline numbers."""

    path: Path
    summary: dict[str, Any]


def run(recipe: DistillRecipe, mode: Mode = "new") -> Result:
    """Distil as the recipe says and leave a result directory behind.

    Args:
        recipe: what to do.
        mode: ``new``, ``resume`` (from the last complete round) or ``overwrite``.

    Raises:
        RaycloudError: whatever the user can mend, before anything is written where possible.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    ResultDir.check(recipe.output, recipe, mode)
    _preflight(recipe)
    places = [recipe.teacher.placement] * recipe.teacher.replicas + [recipe.student.placement] * len(recipe.edges)
    needs = {"cloud": float(recipe.teacher.replicas), "edge": float(len(recipe.edges))}
    shares = {"CPU": sum(place.num_cpus for place in places), "GPU": sum(place.num_gpus for place in places)}
    try:
        with joined(needs, shares), stoppable(), ResultDir.open(recipe.output, recipe, mode) as results:
            return _Run(_with_absolute_paths(recipe), results).whole()
    except KeyboardInterrupt:
        if (Path(recipe.output).expanduser() / RECIPE).is_file():
            raise Interrupted(f"stopped; go on with: --resume (results so far: {recipe.output})") from None
        raise Interrupted("stopped before there was anything to keep") from None
    except RayTaskError as error:
        if isinstance(error.cause, RaycloudError):
            raise error.cause from None
        raise


def _preflight(recipe: DistillRecipe) -> None:
    """Fetch what is built in, and find what is wrong with the recipe while nothing is written yet."""
    where = resolve(recipe.teacher.model, console.print)
    config = load_config(where)
    if not anatomy_of(config).causal:
        raise ModelError(f"teacher.model '{recipe.teacher.model}' is an encoder; allowed: causal language models")
    tokenizer = load_tokenizer(where)
    own = own_tokenizer(recipe.student, tokenizer)
    if recipe.student.model is None:
        check_blocks(recipe.student, config.num_hidden_layers)
    else:
        student = load_config(resolve(recipe.student.model, console.print))
        if not anatomy_of(student).causal:
            raise ModelError(f"student.model '{recipe.student.model}' is an encoder; allowed: causal language models")
        if own is None:
            check_vocabulary(student, config)
    check_objective(recipe.objective, own is not None)
    rows = load_rows(recipe.data.source, "train", console.print)
    for one in (tokenizer, own or tokenizer):
        example(rows[0], recipe.data.format, one)
    for edge in recipe.edges:
        shard(select(rows, edge.where), edge.part, edge.of)
    held_out, by = load_rows(recipe.data.source, recipe.evaluation.split), recipe.evaluation.by
    if by is not None and by not in held_out[0]:
        raise DataError(f"evaluation.by: no column '{by}'; allowed: null, {', '.join(held_out[0])}")


def _with_absolute_paths(recipe: DistillRecipe) -> DistillRecipe:
    """Actors do not run in the driver's directory."""

    def absolute(source: str | None) -> str | None:
        path = Path(source).expanduser() if source else None
        return str(path.absolute()) if path and path.exists() else source

    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"model": absolute(recipe.teacher.model)}),
            "student": recipe.student.model_copy(update={"model": absolute(recipe.student.model)}),
            "data": recipe.data.model_copy(update={"source": absolute(recipe.data.source)}),
        }
    )


class _Run:
    """One run of the job: its actors, its checkpoint, and what it has counted so far."""

    def __init__(self, recipe: DistillRecipe, results: ResultDir) -> None:
        self.recipe, self.results = recipe, results
        self.state = results.path / "state"
        self.begun = time.monotonic()
        self.round_id = 0

    def whole(self) -> Result:
        """From wherever the directory stands to its end."""
        done = self.results.path / "summary.json"
        if done.is_file():
            console.print(f"'{self.results.path}' is complete")
            return Result(self.results.path, json.loads(done.read_text()))
        with working("teacher ready"):
            self._start_teacher()
        checkpoint = Checkpoint.latest(self.state) or self._first_checkpoint()
        self.results.keep_metrics(lambda record: record["round"] < checkpoint.rounds)
        members = self._start_students(checkpoint.config)
        while checkpoint.rounds < self.recipe.rounds.count:
            checkpoint = self._next(checkpoint, members)
        return self._finish(checkpoint)

    def _start_teacher(self) -> None:
        place = _place(self.recipe.teacher.placement, "cloud")
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **place)(CloudTeacher)
        # Students find the replicas by name: a handle among their own constructor's arguments would tie restarts to it.
        run = uuid.uuid4().hex[:8]
        self.names = [f"teacher-{run}-{index}" for index in range(self.recipe.teacher.replicas)]
        self.replicas = [actor.options(name=name).remote(self.recipe) for name in self.names]
        ready: list[TeacherFacts] = self._ask([replica.prepare.remote() for replica in self.replicas])
        self.teacher = ready[0]

    def _ask(self, refs: Any) -> Any:
        try:
            return ray.get(refs, timeout=_ANSWER_S)
        except RayTaskError:
            raise
        except RayError as error:
            raise ClusterError(f"the teacher does not answer: {str(error).splitlines()[0]}") from error

    def _first_checkpoint(self) -> Checkpoint:
        with working("student cut from the teacher" if self.recipe.student.model is None else "student loaded"):
            start: Start = self._ask(self.replicas[0].start.remote())
        with working("teacher and student examined"):
            teacher = self._ask(self.replicas[0].teacher_scores.remote())
            before = self._scores(start.config, start.weights)
        facts: dict[str, Any] = {"blocks": start.blocks, "teacher": _plain(teacher), "before": _plain(before)}
        facts |= {"wire": {}, "tokens": 0, "health": {}, "seconds": self._elapsed()}
        checkpoint = Checkpoint(0, start.config, start.weights, facts)
        checkpoint.save(self.state)
        return checkpoint

    def _elapsed(self) -> float:
        """Seconds since this was last asked."""
        now = time.monotonic()
        passed, self.begun = now - self.begun, now
        return passed

    def _scores(self, config: PretrainedConfig, weights: Weights) -> dict[str, Score]:
        scores: dict[str, Score] = self._ask(self.replicas[0].scores.remote(config, ray.put(dict(weights))))
        return scores

    def _start_students(self, config: PretrainedConfig) -> list[Member]:
        # The control group answers while a round is being trained.
        student: Any = ray.remote(concurrency_groups={"control": 1})(EdgeStudent)  # type: ignore[call-overload]
        options = {"max_restarts": -1, **_place(self.recipe.student.placement, "edge")}
        folder = self.state / "students"
        return [
            Member(
                edge.name,
                student.options(**options).remote(index, self.recipe, config, self.names, folder),
            )
            for index, edge in enumerate(self.recipe.edges)
        ]

    def _next(self, checkpoint: Checkpoint, members: list[Member]) -> Checkpoint:
        """One round more; rounds that nobody answers are tried again."""
        recipe, index = self.recipe.rounds, checkpoint.rounds
        for _ in range(recipe.empty):
            with bars(recipe.steps) as progress:

                def move(name: str, step: int, note: str, progress: Bars = progress) -> None:
                    progress.move(f"round {index + 1}/{recipe.count} {name}", step, note)

                def watch(beats: dict[str, Beat], move: Callable[[str, int, str], None] = move) -> None:
                    for name, beat in beats.items():
                        move(name, beat.step, f"loss {beat.loss:.3f}  {beat.tokens_per_second:.0f} tokens/s")

                for member in members:
                    move(member.name, 0, "begins")

                self.round_id += 1
                done = run_round(self.round_id, index, members, checkpoint.weights, recipe, watch)
            self._log(done)
            if done.answers:
                break
        else:
            raise ClusterError(f"no student answered in {recipe.empty} rounds in a row: {done.missed[-1].detail}")
        facts = checkpoint.facts
        for answer in done.answers:
            facts["tokens"] += answer.tokens
            for kind, size in answer.meter.payload.items():
                facts["wire"][kind] = facts["wire"].get(kind, 0) + size
        self._log_health(done, facts["health"])
        if index + 1 == recipe.count:
            facts |= self._examine_last(checkpoint.config, done)
        facts["seconds"] += self._elapsed()
        following = Checkpoint(index + 1, checkpoint.config, done.weights, facts)
        following.save(self.state)
        return following

    def _log(self, done: Round) -> None:
        for answer in done.answers:
            for step in answer.steps:
                self.results.log({"kind": "step", "round": done.index, "student": answer.name, **asdict(step)})
        for missed in done.missed:
            self.results.log({"kind": "missed", "round": done.index, "student": missed.name, "why": missed.why})
            console.print(f"round {done.index + 1}: went on without '{missed.name}' ({missed.why}: {missed.detail})")
        tokens = sum(answer.tokens for answer in done.answers)
        if tokens:
            loss = sum(step.loss * step.tokens for answer in done.answers for step in answer.steps) / tokens
            students = [answer.name for answer in done.answers]
            record = {"students": students, "loss": loss, "tokens": tokens, "seconds": done.seconds}
            self.results.log({"kind": "round", "round": done.index, **record})
            console.print(
                f"round {done.index + 1}/{self.recipe.rounds.count}: loss {loss:.3f}, {tokens} tokens "
                f"in {done.seconds:.0f} s, averaged {' and '.join(students)}"
            )

    def _log_health(self, done: Round, known: dict[str, Any]) -> None:
        """Log what the students measured, and say what is wrong when it is first seen."""
        for answer in done.answers:
            before = known.get(answer.name, {})
            whose = {"kind": "health", "round": done.index, "student": answer.name}
            if not before:
                self.results.log({**whose, "data": asdict(answer.health.data)})
            for step in answer.health.steps:
                self.results.log({**whose, **asdict(step)})
            known[answer.name] = answer.health.after(before)
            for about, sentence in answer.health.warnings.items():
                if about not in before.get("warnings", {}):
                    console.print(f"warning: {answer.name}: {sentence}", style="yellow")

    def _examine_last(self, config: PretrainedConfig, done: Round) -> dict[str, Any]:
        """The averaged student, and beside it every student as it was before the last average."""
        with working("students examined"):
            singles = {answer.name: _plain(self._scores(config, answer.weights)) for answer in done.answers}
            after = _plain(self._scores(config, done.weights))
            comparison: Comparison = self._ask(self.replicas[0].compare.remote(config, ray.put(done.weights)))
        return {"after": after, "singles": singles, "comparison": asdict(comparison)}

    def _finish(self, checkpoint: Checkpoint) -> Result:
        model = build(checkpoint.config, checkpoint.weights, device=torch.device("cpu"), dtype=torch.float32)

        def fill(to: Path) -> None:
            with quiet_transformers():
                model.save_pretrained(to)
                (own_tokenizer(self.recipe.student, self.teacher.tokenizer) or self.teacher.tokenizer).save_pretrained(
                    to
                )

        write_folder(self.results.path / "student", fill)
        checkpoint.facts["seconds"] += self._elapsed()
        summary = summarise(checkpoint, self.teacher.parameters, model.num_parameters())
        write_page(self.results.path, summary, self.results.metrics(), self.recipe.dump())
        self.results.write_summary(summary)
        shutil.rmtree(self.state)
        print_summary(summary)
        console.print(f"results: {self.results.path}")
        return Result(self.results.path, summary)


def _place(placement: Placement, tier: str) -> dict[str, Any]:
    return {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus, "resources": {tier: 1}}


def _plain(scores: dict[str, Score]) -> dict[str, dict[str, float]]:
    return {group: asdict(score) for group, score in scores.items()}


def summarise(checkpoint: Checkpoint, teacher_parameters: int, student_parameters: int) -> dict[str, Any]:
    """The headline numbers of a finished run, from its facts."""
    facts = checkpoint.facts
    teacher, before, after, wire = facts["teacher"], facts["before"], facts["after"], facts["wire"]
    groups = {
        group: {
            "teacher_ppl": teacher[group]["perplexity"],
            "student_ppl_before": before[group]["perplexity"],
            "student_ppl_after": after[group]["perplexity"],
            "agreement_before": before[group]["agreement"],
            "agreement_after": after[group]["agreement"],
            "gap_closed": gap_closed(
                before[group]["perplexity"], after[group]["perplexity"], teacher[group]["perplexity"]
            ),
            "tokens": after[group]["tokens"],
            "single_ppl": {name: scores[group]["perplexity"] for name, scores in facts["singles"].items()},
        }
        for group in teacher
    }
    comparison = facts["comparison"]
    return {
        **groups.pop(ALL),
        "teacher_params": teacher_parameters,
        "student_params": student_parameters,
        "student_blocks": facts["blocks"],
        "teacher_tok_s": comparison["teacher_tok_s"],
        "student_tok_s": comparison["student_tok_s"],
        # What grows with the text: ids up and signals down. Weights and the head cross once a round and once a run.
        "wire_bytes_per_token": (wire.get("ids", 0) + wire.get("signals", 0)) / facts["tokens"],
        "wire_bytes": wire,
        "trained_tokens": facts["tokens"],
        "rounds": checkpoint.rounds,
        "seconds": facts["seconds"],
        "health": {
            name: {**known, "warnings": list(known["warnings"].values())} for name, known in facts["health"].items()
        },
        "groups": groups,
        "completions": [
            {"prompt": prompt, "teacher": teacher_text, "student": student_text}
            for prompt, teacher_text, student_text in zip(
                comparison["prompts"], comparison["teacher"], comparison["student"], strict=True
            )
        ],
    }
