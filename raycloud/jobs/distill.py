"""Distillation job: a teacher in the cloud, students at the edges, rounds of averaging, an evaluation."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.cluster.checkpoint import DistillCheckpoint, StudentCheckpoint
from raycloud.cluster.cloud_teacher import CloudTeacher, InitialStudent, ModelEvaluation, TeacherInfo
from raycloud.cluster.device_rounds import DeviceStudent, StudentForm, job_name, start_device_rounds
from raycloud.cluster.edge_student import EdgeStudent
from raycloud.cluster.metrics import RunMetrics
from raycloud.cluster.rounds import RoundOutcome, StudentHandle, run_round
from raycloud.cluster.run_log import RunLog
from raycloud.data.checks import check_eos, check_positions
from raycloud.data.prompts import bounds_of, check_rows, prompt_and_response
from raycloud.data.sources import SplitRows, limit_rows, load_split_rows
from raycloud.data.splits import select, shard
from raycloud.distill.evaluation import ALL, CompletionComparison
from raycloud.distill.learner import Heartbeat, StudentUpdate
from raycloud.distill.recipe import Cohort, DistillRecipe, StudentRecipe, bundles
from raycloud.distill.student import (
    check_blocks,
    check_objective,
    check_vocabulary,
    differing_tokenizer,
    named_blocks,
)
from raycloud.distill.versions import StudentHistory, cohort_folder, write_student
from raycloud.durable import check_folder, write_atomically
from raycloud.errors import ClusterError, DataError, ModelError
from raycloud.evaluation.questions import build_questions
from raycloud.jobs.distill_summary import summarise
from raycloud.jobs.runner import Summary, actor_options, check_same_inputs, cluster_run, finished_summary, get_result
from raycloud.models.loading import check_model, load_tokenizer, resolve
from raycloud.models.surgery.extraction import check_extraction
from raycloud.models.verdict import structure_of
from raycloud.models.weights import Weights, nbytes
from raycloud.report.bos import format_bos
from raycloud.report.console import ProgressBars, console, print_and_log, progress_bars, timed
from raycloud.report.distill import print_summary, write_page
from raycloud.report.tensorboard import tensorboard_events
from raycloud.results import RECIPE, Mode, ResultDir, plain_json, record_inputs
from raycloud.rounds.machine import Gate, RoundMachine
from raycloud.training.lora import check_targets, experts_left_out

_LOG = logging.getLogger(__name__)


def run(recipe: DistillRecipe, mode: Mode = "new") -> Summary:
    """Run a distillation and write its result directory.

    Args:
        recipe: recipe of the distillation.
        mode: ``new``, ``resume`` (from the last complete round) or ``overwrite``.

    Returns:
        The headline numbers, as in ``summary.json``.

    Raises:
        RaycloudError: an error that the user can fix, raised before anything is written where possible.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    if (done := finished_summary(recipe, recipe.output, mode)) is not None:
        return done
    inputs = check_same_inputs(recipe.data, recipe.output, mode)
    parts, tokenizer = check(recipe)
    console.print(format_bos(_bos(recipe, tokenizer)))
    with cluster_run(recipe, recipe.output, mode, bundles(recipe)) as (results, log):
        record_inputs(results.path, inputs)
        print_and_log(_LOG, parts.message(recipe.data))
        return _DistillRun(_with_absolute_paths(recipe), results, log, parts.counts).whole()


def check(recipe: DistillRecipe) -> tuple[SplitRows, PreTrainedTokenizerBase]:
    """Fetch the built-in models and data of a recipe and check it; needs no cluster and writes no results.

    Returns:
        Rows of the recipe's data, and the teacher's tokenizer.

    Raises:
        RaycloudError: the recipe, its models or its data are invalid.
    """
    if recipe.teacher.signals is not None:
        check_folder(Path(recipe.teacher.signals))
    where = resolve(recipe.teacher.model, console.print)
    config = check_model(where)
    if not structure_of(config).causal:
        raise ModelError(f"teacher.model '{recipe.teacher.model}' is an encoder; allowed: causal language models")
    tokenizer = load_tokenizer(where)
    check_eos("teacher.model", recipe.teacher.model, tokenizer)
    check_positions("data.max_length", recipe.data.max_length, config)
    parts = load_split_rows(recipe.data, recipe.evaluation.split, console.print)
    parts = parts.trained(limit_rows(parts.train, recipe.data.limit))
    rows, held_out, by = parts.train, parts.held_out, recipe.evaluation.by
    check_rows(rows, recipe.data.format)
    check_rows(held_out, recipe.data.format)
    for cohort in recipe.cohorts:
        own = _check_student(cohort, config, tokenizer, recipe.data.max_length)
        for one in (tokenizer, own or tokenizer):
            prompt_and_response(rows[0], recipe.data.format, one)
    _bos(recipe, tokenizer)
    for edge in recipe.edges:
        if edge.device:
            continue
        shard(select(rows, edge.where), edge.part, edge.of)
    if by is not None and by not in held_out[0]:
        raise DataError(f"evaluation.by: no column '{by}'; allowed: null, {', '.join(held_out[0])}")
    if recipe.evaluation.answers:
        build_questions(
            held_out, tokenizer, recipe.data.format, max_prompt_length=recipe.data.max_prompt_length, limit=1
        )
    return parts, tokenizer


def _bos(recipe: DistillRecipe, teacher: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return, for the teacher and each cohort, whether its texts begin with BOS, and why."""
    owners = {"teacher": teacher}
    owners |= {cohort.name: differing_tokenizer(cohort.student, teacher) or teacher for cohort in recipe.cohorts}
    return {name: bounds_of(one, recipe.data.format, recipe.data.bos).bos for name, one in owners.items()}


def _check_student(
    cohort: Cohort, teacher: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreTrainedTokenizerBase | None:
    """Check a cohort's model, adapters and objective against the teacher; return its own tokenizer if it has one."""
    student = cohort.student
    own = differing_tokenizer(student, tokenizer)
    config = teacher
    if student.model is not None:
        config = check_model(resolve(student.model, console.print))
        if not structure_of(config).causal:
            raise ModelError(f"student.model '{student.model}' is an encoder; allowed: causal language models")
        check_positions("data.max_length", max_length, config)
        if own is not None:
            check_eos("student.model", student.model, own)
        if own is None:
            check_vocabulary(config, teacher)
    total = config.get_text_config().num_hidden_layers
    check_blocks(student, total)
    if student.blocks is not None and (blocks := named_blocks(student, total)) is not None:
        check_extraction(config, blocks)
    if student.lora is not None:
        check_targets(config, student.lora)
        if left_out := experts_left_out(config, student.lora):
            print_and_log(_LOG, f"warning: {left_out}", logging.WARNING)
    check_objective(cohort.objective, own is not None)
    return own


def _with_absolute_paths(recipe: DistillRecipe) -> DistillRecipe:
    """Return the recipe with absolute paths, since actors do not run in the driver's directory."""

    def absolute(source: str | None) -> str | None:
        path = Path(source).expanduser() if source else None
        return str(path.absolute()) if path and path.exists() else source

    def student(one: StudentRecipe) -> StudentRecipe:
        return one.model_copy(update={"model": absolute(one.model)})

    signals = recipe.teacher.signals and str(Path(recipe.teacher.signals).expanduser().absolute())
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update={"model": absolute(recipe.teacher.model), "signals": signals}),
            "student": student(recipe.student),
            "data": recipe.data.model_copy(
                update={"source": absolute(recipe.data.source), "validation": absolute(recipe.data.validation)}
            ),
            "edges": [
                edge.model_copy(update={"student": edge.student and student(edge.student)}) for edge in recipe.edges
            ],
        }
    )


class _DistillRun:
    """State of one run of the job: its actors, its checkpoint and its counters."""

    def __init__(self, recipe: DistillRecipe, results: ResultDir, log: RunLog, rows: dict[str, int]) -> None:
        self.recipe, self.results, self.log, self.rows = recipe, results, log, rows
        self.state = results.path / "state"
        self.begun = time.monotonic()
        self.round_id = 0
        self.histories = {cohort.name: StudentHistory(recipe, cohort, results.path) for cohort in recipe.cohorts}
        self.devices: Any = None
        """Actor of the devices, if the recipe has some."""

    def whole(self) -> Summary:
        """Run the job from the state of its result directory to the end."""
        latest = DistillCheckpoint.latest(self.state)  # before the slow start of the teacher: it may be damaged
        with timed("teacher ready"):
            self._start_teacher()
        checkpoint = latest or self._first_checkpoint()
        self._start_histories(checkpoint)
        self.metrics = RunMetrics(self.recipe.job, self.results.run_id)
        self.results.filter_metrics(lambda record: record["round"] < checkpoint.rounds)
        with tensorboard_events(self.results.path) as add:
            self.results.follow(add)
            return self._finish(self._evaluated(self._trained(checkpoint)))

    def _trained(self, checkpoint: DistillCheckpoint) -> DistillCheckpoint:
        """Run the remaining rounds and return the last checkpoint."""
        if checkpoint.rounds == self.recipe.rounds.count:
            return checkpoint
        if self.recipe.teacher.signals is not None:
            self._keep_signals()
        members = self._start_students(checkpoint)
        rounds = {
            cohort: RoundMachine(student.weights, checkpoint.rounds - 1)
            for cohort, student in checkpoint.students.items()
        }
        while checkpoint.rounds < self.recipe.rounds.count:
            checkpoint = self._next(checkpoint, members, rounds)
        if self.devices is not None:
            final = ray.put({name: dict(student.weights) for name, student in checkpoint.students.items()})
            get_result(self.devices.finish.remote(final), "actor of the devices")
        return checkpoint

    def _start_teacher(self) -> None:
        options = actor_options(self.recipe.teacher.placement, "cloud")
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **options)(CloudTeacher)
        # Students look the replicas up by name: a handle in their constructor's arguments would tie restarts to it.
        run = uuid.uuid4().hex[:8]
        self.names = [f"teacher-{run}-{index}" for index in range(self.recipe.teacher.replicas)]
        self.replicas = [
            actor.options(name=name).remote(self.recipe, self.log.of(f"teacher {index}"))
            for index, name in enumerate(self.names)
        ]
        ready: list[TeacherInfo] = get_result([replica.prepare.remote() for replica in self.replicas], "teacher")
        self.teacher = ready[0]

    def _keep_signals(self) -> None:
        """Compute all signals that the students will request, once, and store them on disk."""
        with progress_bars(100) as progress:
            for ref in self.replicas[0].fill_signals_dir.remote():
                done, total = get_result(ref, "teacher")
                progress.move("signals kept, %", 100 * done // max(1, total), f"{done} of {total} samples")

    def _first_checkpoint(self) -> DistillCheckpoint:
        students, found = {}, {}
        for cohort in self.recipe.cohorts:
            name = f" '{cohort.name}'" if len(self.recipe.cohorts) > 1 else ""
            with timed(f"student{name} {'cut from the teacher' if cohort.student.model is None else 'loaded'}"):
                start: InitialStudent = get_result(self.replicas[0].start.remote(cohort.name), "teacher")
            with timed(f"teacher and student{name} evaluated"):
                teacher: ModelEvaluation = get_result(self.replicas[0].evaluate_teacher.remote(cohort.name), "teacher")
                before = self._findings(cohort.name, start.config, start.weights)
            students[cohort.name] = StudentCheckpoint(start.config, start.weights)
            found[cohort.name] = {"blocks": start.blocks, "tokens": 0, "teacher": _plain(teacher)}
            found[cohort.name] |= {"before": _plain(before)}
        facts: dict[str, Any] = {"students": found, "wire": {}, "tokens": 0, "diagnostics": {}}
        facts["seconds"] = self._elapsed()
        checkpoint = DistillCheckpoint(0, students, facts)
        checkpoint.save(self.state)
        return checkpoint

    def _start_histories(self, checkpoint: DistillCheckpoint) -> None:
        """Begin the history of every cohort, or go back to the version of the checkpoint."""
        for cohort in self.recipe.cohorts:
            history = self.histories[cohort.name]
            if not history.resume(checkpoint.rounds):
                before = checkpoint.facts["students"][cohort.name]["before"]
                perplexity = before["scores"][ALL]["perplexity"] if checkpoint.rounds == 0 else None
                history.start(checkpoint.students[cohort.name].weights, self._frozen(cohort), perplexity)

    def _frozen(self, cohort: Cohort) -> Weights:
        """Return the weights beneath a cohort's adapters; empty without adapters."""
        found: Weights = get_result(self.replicas[0].frozen.remote(cohort.name), "teacher")
        return found

    def _elapsed(self) -> float:
        """Return the seconds since the last call."""
        now = time.monotonic()
        passed, self.begun = now - self.begun, now
        return passed

    def _findings(
        self, cohort: str, config: PretrainedConfig, weights: Weights, *, answer: bool = True
    ) -> ModelEvaluation:
        found: ModelEvaluation = get_result(
            self.replicas[0].scores.remote(cohort, config, ray.put(dict(weights)), answer=answer), "teacher"
        )
        return found

    def _start_students(self, checkpoint: DistillCheckpoint) -> list[StudentHandle]:
        # The control concurrency group answers while a round is being trained.
        student: Any = ray.remote(concurrency_groups={"control": 1})(EdgeStudent)  # type: ignore[call-overload]
        folder, members = self.state / "students", []
        if self.recipe.devices:
            forms = {name: StudentForm(one.config, nbytes(one.weights)) for name, one in checkpoint.students.items()}
            self.devices = start_device_rounds(
                self.recipe, forms, self.names, self.results.run_id, self.log.of("devices")
            )
            get_result(self.devices.ready.remote(), "actor of the devices")
            console.print(
                f"devices take part by: raycloud edge learn --job {job_name(self.recipe.output)} --cloud wss://…/v1/rounds"
            )
        for index, edge in enumerate(self.recipe.edges):
            cohort = self.recipe.cohort_of(edge)
            if edge.device:
                # Nobody knows when a device will come: it is awaited like one that has been there.
                members.append(StudentHandle(edge.name, cohort.name, DeviceStudent(self.devices, edge.name), met=True))
                continue
            options = {"max_restarts": -1, **actor_options(cohort.student.placement, "edge")}
            config = checkpoint.students[cohort.name].config
            actor = student.options(**options).remote(
                index, self.recipe, config, self.names, folder, self.log.of(f"student {edge.name}")
            )
            members.append(StudentHandle(edge.name, cohort.name, actor))
        return members

    def _next(
        self, checkpoint: DistillCheckpoint, members: list[StudentHandle], rounds: dict[str, RoundMachine]
    ) -> DistillCheckpoint:
        """Run one more round; repeat it, at most ``rounds.empty`` times in total, while no student answers.

        Raises:
            ClusterError: no student answered in any attempt.
        """
        recipe, index = self.recipe.rounds, checkpoint.rounds
        for _ in range(recipe.empty):
            with progress_bars(recipe.steps) as progress:

                def move(name: str, step: int, note: str, progress: ProgressBars = progress) -> None:
                    progress.move(f"round {index + 1}/{recipe.count} {name}", step, note)

                def on_progress(heartbeats: dict[str, Heartbeat], move: Callable[[str, int, str], None] = move) -> None:
                    for name, one in heartbeats.items():
                        self.metrics.student(name, one.loss, one.tokens_per_second)
                        move(name, one.step, f"loss {one.loss:.3f}  {one.tokens_per_second:.0f} tokens/s")

                for member in members:
                    move(member.name, 0, "begins")

                self.round_id += 1
                done = run_round(self.round_id, index, members, rounds, recipe, on_progress, self._gates(checkpoint))
            self._log(done)
            if done.answers:
                break
        else:
            attempts = f"{recipe.empty} attempts at round {index + 1}"
            raise ClusterError(f"no student answered in {attempts}: {done.missed[-1].detail}")
        facts, cohort_of = checkpoint.facts, {member.name: member.cohort for member in members}
        for answer in done.answers:
            facts["tokens"] += answer.tokens
            facts["students"][cohort_of[answer.name]]["tokens"] += answer.tokens
            for kind, size in answer.meter.payload.items():
                facts["wire"][kind] = facts["wire"].get(kind, 0) + size
        last = index + 1 == recipe.count
        students = {
            cohort: StudentCheckpoint(
                student.config,
                rounds[cohort].weights,
                {one.name: one.weights for one in done.answers if last and cohort_of[one.name] == cohort},
            )
            for cohort, student in checkpoint.students.items()
        }
        for cohort in students:
            if rounds[cohort].version == index:
                self._add_version(
                    cohort, rounds[cohort], [one for one in done.answers if cohort_of[one.name] == cohort]
                )
        self._log_diagnostics(done, facts["diagnostics"])
        self.metrics.rounds(index + 1)
        return self._saved(DistillCheckpoint(index + 1, students, facts))

    def _add_version(self, cohort: str, machine: RoundMachine, answers: list[StudentUpdate]) -> None:
        """Add the weights that a round made to the history; a resumed run does a round again that has no checkpoint."""
        tokens = {one.name: one.tokens for one in answers}
        loss = sum(step.loss * step.tokens for one in answers for step in one.steps) / sum(tokens.values())
        perplexity = None if machine.figure is None else -machine.figure
        self.histories[cohort].add(machine.weights, machine.version + 1, tokens, loss=loss, perplexity=perplexity)

    def _gates(self, checkpoint: DistillCheckpoint) -> dict[str, Gate]:
        """Return the gate of each cohort: the perplexity on all held-out text, negated; empty without gates."""
        if self.recipe.rounds.gate == "none":
            return {}

        def figure(cohort: str, config: PretrainedConfig, weights: Weights) -> float:
            found = self._findings(cohort, config, weights, answer=False)
            return -found.evaluation.scores[ALL].perplexity

        return {cohort: partial(figure, cohort, student.config) for cohort, student in checkpoint.students.items()}

    def _saved(self, checkpoint: DistillCheckpoint) -> DistillCheckpoint:
        """Add the elapsed time to the checkpoint, save it and return it."""
        checkpoint.facts["seconds"] += self._elapsed()
        checkpoint.save(self.state)
        return checkpoint

    def _log(self, done: RoundOutcome) -> None:
        for answer in done.answers:
            for step in answer.steps:
                self.results.log_metrics({"kind": "step", "round": done.index, "student": answer.name, **asdict(step)})
        for missed in done.missed:
            self.results.log_metrics({"kind": "missed", "round": done.index, "student": missed.name, "why": missed.why})
            said = f"round {done.index + 1}: went on without '{missed.name}' ({missed.why}: {missed.detail})"
            print_and_log(_LOG, said, logging.WARNING)
        for cohort in done.gate_refused:
            self.results.log_metrics({"kind": "gate_refused", "round": done.index, "cohort": cohort})
            said = f"round {done.index + 1}: '{cohort}' keeps its former weights, whose held-out perplexity is lower"
            print_and_log(_LOG, said, logging.WARNING)
        tokens = sum(answer.tokens for answer in done.answers)
        if tokens:
            loss = sum(step.loss * step.tokens for answer in done.answers for step in answer.steps) / tokens
            students = [answer.name for answer in done.answers]
            speeds = {answer.name: answer.tokens / answer.seconds for answer in done.answers}
            record = {"students": students, "loss": loss, "tokens": tokens, "seconds": done.seconds}
            record["tokens_per_second"] = speeds
            self.results.log_metrics({"kind": "round", "round": done.index, **record})
            print_and_log(
                _LOG,
                f"round {done.index + 1}/{self.recipe.rounds.count}: loss {loss:.3f}, {tokens} tokens "
                f"in {done.seconds:.0f} s, averaged {' and '.join(students)}",
            )

    def _log_diagnostics(self, done: RoundOutcome, known: dict[str, Any]) -> None:
        """Log the diagnostics that the students measured; print each warning when it occurs for the first time."""
        for answer in done.answers:
            before = known.get(answer.name, {})
            whose = {"kind": "diagnostics", "round": done.index, "student": answer.name}
            if not before:
                self.results.log_metrics({**whose, "data": asdict(answer.diagnostics.data)})
            for step in answer.diagnostics.steps:
                self.results.log_metrics({**whose, **asdict(step)})
            known[answer.name] = answer.diagnostics.after(before)
            for about, sentence in answer.diagnostics.warnings.items():
                if about not in before.get("warnings", {}):
                    print_and_log(_LOG, f"warning: {answer.name}: {sentence}", logging.WARNING)

    def _evaluated(self, checkpoint: DistillCheckpoint) -> DistillCheckpoint:
        """Return the checkpoint with every cohort's scores; cohorts that have scores already are not repeated."""
        for cohort in self.recipe.cohorts:
            student, facts = checkpoint.students[cohort.name], checkpoint.facts["students"][cohort.name]
            if "after" not in facts:
                facts |= self._scores(cohort, student)
                checkpoint.students[cohort.name] = StudentCheckpoint(student.config, student.weights)
                self._saved(checkpoint)
        return checkpoint

    def _scores(self, cohort: Cohort, student: StudentCheckpoint) -> dict[str, Any]:
        """Return the scores of the averaged student, and of every student before the last averaging."""
        name, config = cohort.name, student.config
        with timed("students evaluated" if len(self.recipe.cohorts) == 1 else f"student '{name}' evaluated"):
            after = self._findings(name, config, student.weights)
            # A single student is its own average.
            singles = {
                edge: after if len(student.singles) == 1 else self._findings(name, config, weights, answer=False)
                for edge, weights in student.singles.items()
            }
            compared: CompletionComparison = get_result(
                self.replicas[0].compare.remote(name, config, ray.put(dict(student.weights))), "teacher"
            )
        return {
            "after": _plain(after),
            "texts": [asdict(text) for text in after.evaluation.texts],
            "singles": {single: _plain(one)["scores"] for single, one in singles.items()},
            "comparison": asdict(compared),
        }

    def _finish(self, checkpoint: DistillCheckpoint) -> Summary:
        parameters, lines = {}, []
        for cohort in self.recipe.cohorts:
            name, student = cohort.name, checkpoint.students[cohort.name]
            parameters[name] = self._save(cohort, student)
            texts = checkpoint.facts["students"][name].pop("texts")
            lines += [plain_json({"student": name, **text}) + "\n" for text in texts]
        write_atomically(self.results.path / "held_out.jsonl", "".join(lines))
        checkpoint.facts["seconds"] += self._elapsed()
        objectives = {cohort.name: cohort.objective for cohort in self.recipe.cohorts}
        summary = summarise(self.results.run_id, checkpoint, self.teacher.parameters, parameters, objectives)
        summary |= {"rows": self.rows, "bos": _bos(self.recipe, self.teacher.tokenizer)}
        summary["missed"] = Counter(one["why"] for one in self.results.metrics() if one["kind"] == "missed")
        # The recipe as given, not with the actors' absolute paths, so that a page rendered again is the same.
        recipe = (self.results.path / RECIPE).read_text(encoding="utf-8")
        write_page(self.results.path, summary, self.results.metrics(), recipe)
        self.results.write_summary(summary)
        shutil.rmtree(self.state)
        print_summary(summary)
        console.print(f"results: {self.results.path}")
        return summary

    def _save(self, cohort: Cohort, student: StudentCheckpoint) -> int:
        """Write a student as a model for ``transformers``, and its adapters separately; return its parameter count."""
        tokenizer = differing_tokenizer(cohort.student, self.teacher.tokenizer) or self.teacher.tokenizer
        name, frozen = cohort_folder(self.recipe, cohort), self._frozen(cohort)
        return write_student(
            self.results.path, name, cohort.student, student.config, student.weights, frozen, tokenizer
        )


def _plain(found: ModelEvaluation) -> dict[str, Any]:
    scores = {group: asdict(score) for group, score in found.evaluation.scores.items()}
    return {"scores": scores, "rouge_l": found.rouge_l}
