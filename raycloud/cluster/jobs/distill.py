"""The distillation job: a teacher in the cloud, students at the edges, rounds of averaging, an examination."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.cluster.checkpoint import Checkpoint, Snapshot
from raycloud.cluster.cloud_teacher import CloudTeacher, Findings, Start, TeacherFacts
from raycloud.cluster.edge_student import Answer, Beat, EdgeStudent
from raycloud.cluster.jobs.frame import Result, answered, finished, on_cluster, placed
from raycloud.cluster.metrics import RunMetrics
from raycloud.cluster.rounds import Member, Round, run_round
from raycloud.cluster.run_log import RunLog
from raycloud.data.prompts import example
from raycloud.data.sources import load_rows, training_rows
from raycloud.data.splits import select, shard
from raycloud.distill.examination import ALL, Comparison, gap_closed
from raycloud.distill.recipe import Cohort, DistillRecipe, StudentRecipe
from raycloud.distill.student import check_blocks, check_objective, check_vocabulary, own_tokenizer, student_from
from raycloud.errors import ClusterError, DataError, ModelError
from raycloud.evaluation.questions import ask
from raycloud.models.anatomy import anatomy_of
from raycloud.models.loading import load_config, load_tokenizer, quiet_transformers, resolve
from raycloud.models.weights import Weights
from raycloud.report.console import Bars, bars, console, tell, working
from raycloud.report.distillation import print_summary, write_page
from raycloud.report.events import event_files
from raycloud.results import RECIPE, Mode, ResultDir, write_atomically, write_folder
from raycloud.training.lora import check_targets, merge, save_adapter

_LOG = logging.getLogger(__name__)


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
    with on_cluster(recipe, mode) as (results, log):
        return _Run(_with_absolute_paths(recipe), results, log).whole()


def _preflight(recipe: DistillRecipe) -> None:
    """Fetch what is built in, and find what is wrong with the recipe while nothing is written yet."""
    where = resolve(recipe.teacher.model, console.print)
    config = load_config(where)
    if not anatomy_of(config).causal:
        raise ModelError(f"teacher.model '{recipe.teacher.model}' is an encoder; allowed: causal language models")
    tokenizer = load_tokenizer(where)
    rows = training_rows(recipe.data, console.print)
    for cohort in recipe.cohorts:
        own = _check_student(cohort, config, tokenizer)
        for one in (tokenizer, own or tokenizer):
            example(rows[0], recipe.data.format, one)
    for edge in recipe.edges:
        shard(select(rows, edge.where), edge.part, edge.of)
    held_out, by = load_rows(recipe.data.source, recipe.evaluation.split), recipe.evaluation.by
    if by is not None and by not in held_out[0]:
        raise DataError(f"evaluation.by: no column '{by}'; allowed: null, {', '.join(held_out[0])}")
    if recipe.evaluation.answers:
        ask(held_out, tokenizer, recipe.data.format, max_prompt=recipe.data.max_prompt, limit=1)


def _check_student(
    cohort: Cohort, teacher: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """Whether a cohort can learn from the teacher as it means to; its own tokenizer, if it has one."""
    student = cohort.student
    own = own_tokenizer(student, tokenizer)
    config = teacher
    if student.model is not None:
        config = load_config(resolve(student.model, console.print))
        if not anatomy_of(config).causal:
            raise ModelError(f"student.model '{student.model}' is an encoder; allowed: causal language models")
        if own is None:
            check_vocabulary(config, teacher)
    check_blocks(student, config.get_text_config().num_hidden_layers)
    if student.lora is not None:
        check_targets(config, student.lora)
    check_objective(cohort.objective, own is not None)
    return own


def _with_absolute_paths(recipe: DistillRecipe) -> DistillRecipe:
    """Actors do not run in the driver's directory."""

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
            "data": recipe.data.model_copy(update={"source": absolute(recipe.data.source)}),
            "edges": [
                edge.model_copy(update={"student": edge.student and student(edge.student)}) for edge in recipe.edges
            ],
        }
    )


class _Run:
    """One run of the job: its actors, its checkpoint, and what it has counted so far."""

    def __init__(self, recipe: DistillRecipe, results: ResultDir, log: RunLog) -> None:
        self.recipe, self.results, self.log = recipe, results, log
        self.state = results.path / "state"
        self.begun = time.monotonic()
        self.round_id = 0

    def whole(self) -> Result:
        """From wherever the directory stands to its end."""
        if (done := finished(self.results)) is not None:
            return done
        with working("teacher ready"):
            self._start_teacher()
        checkpoint = Checkpoint.latest(self.state) or self._first_checkpoint()
        self.metrics = RunMetrics(self.recipe.job, self.results.run_id)
        self.results.keep_metrics(lambda record: record["round"] < checkpoint.rounds)
        with event_files(self.results.path) as add:
            self.results.follow(add)
            return self._finish(self._trained(checkpoint))

    def _trained(self, checkpoint: Checkpoint) -> Checkpoint:
        """All rounds that are left."""
        if checkpoint.rounds < self.recipe.rounds.count and self.recipe.teacher.signals is not None:
            self._keep_signals()
        members = self._start_students(checkpoint)
        while checkpoint.rounds < self.recipe.rounds.count:
            checkpoint = self._next(checkpoint, members)
        return checkpoint

    def _start_teacher(self) -> None:
        place = placed(self.recipe.teacher.placement, "cloud")
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **place)(CloudTeacher)
        # Students find the replicas by name: a handle among their own constructor's arguments would tie restarts to it.
        run = uuid.uuid4().hex[:8]
        self.names = [f"teacher-{run}-{index}" for index in range(self.recipe.teacher.replicas)]
        self.replicas = [
            actor.options(name=name).remote(self.recipe, self.log.of(f"teacher {index}"))
            for index, name in enumerate(self.names)
        ]
        ready: list[TeacherFacts] = answered([replica.prepare.remote() for replica in self.replicas], "teacher")
        self.teacher = ready[0]

    def _keep_signals(self) -> None:
        """Have the teacher say once, and on disk, all that the students will ask."""
        with bars(100) as progress:
            for ref in self.replicas[0].keep_signals.remote():
                done, total = answered(ref, "teacher")
                progress.move("signals kept, %", 100 * done // max(1, total), f"{done} of {total} samples")

    def _first_checkpoint(self) -> Checkpoint:
        students, found = {}, {}
        for cohort in self.recipe.cohorts:
            name = f" '{cohort.name}'" if len(self.recipe.cohorts) > 1 else ""
            with working(f"student{name} {'cut from the teacher' if cohort.student.model is None else 'loaded'}"):
                start: Start = answered(self.replicas[0].start.remote(cohort.name), "teacher")
            with working(f"teacher and student{name} examined"):
                teacher: Findings = answered(self.replicas[0].teacher_scores.remote(cohort.name), "teacher")
                before = self._findings(cohort.name, start.config, start.weights)
            students[cohort.name] = Snapshot(start.config, start.weights)
            found[cohort.name] = {"blocks": start.blocks, "tokens": 0, "teacher": _plain(teacher)}
            found[cohort.name] |= {"before": _plain(before)}
        facts: dict[str, Any] = {"students": found, "wire": {}, "tokens": 0, "health": {}}
        facts["seconds"] = self._elapsed()
        checkpoint = Checkpoint(0, students, facts)
        checkpoint.save(self.state)
        return checkpoint

    def _elapsed(self) -> float:
        """Seconds since this was last asked."""
        now = time.monotonic()
        passed, self.begun = now - self.begun, now
        return passed

    def _findings(self, cohort: str, config: PretrainedConfig, weights: Weights, *, answer: bool = True) -> Findings:
        found: Findings = answered(
            self.replicas[0].scores.remote(cohort, config, ray.put(dict(weights)), answer=answer), "teacher"
        )
        return found

    def _start_students(self, checkpoint: Checkpoint) -> list[Member]:
        # The control group answers while a round is being trained.
        student: Any = ray.remote(concurrency_groups={"control": 1})(EdgeStudent)  # type: ignore[call-overload]
        folder, members = self.state / "students", []
        for index, edge in enumerate(self.recipe.edges):
            cohort = self.recipe.cohort_of(edge)
            options = {"max_restarts": -1, **placed(cohort.student.placement, "edge")}
            config = checkpoint.students[cohort.name].config
            actor = student.options(**options).remote(
                index, self.recipe, config, self.names, folder, self.log.of(f"student {edge.name}")
            )
            members.append(Member(edge.name, cohort.name, actor))
        return members

    def _next(self, checkpoint: Checkpoint, members: list[Member]) -> Checkpoint:
        """One round more; rounds that nobody answers are tried again."""
        recipe, index = self.recipe.rounds, checkpoint.rounds
        for _ in range(recipe.empty):
            with bars(recipe.steps) as progress:

                def move(name: str, step: int, note: str, progress: Bars = progress) -> None:
                    progress.move(f"round {index + 1}/{recipe.count} {name}", step, note)

                def watch(beats: dict[str, Beat], move: Callable[[str, int, str], None] = move) -> None:
                    for name, beat in beats.items():
                        self.metrics.student(name, beat.loss, beat.tokens_per_second)
                        move(name, beat.step, f"loss {beat.loss:.3f}  {beat.tokens_per_second:.0f} tokens/s")

                for member in members:
                    move(member.name, 0, "begins")

                self.round_id += 1
                weights = {cohort: student.weights for cohort, student in checkpoint.students.items()}
                done = run_round(self.round_id, index, members, weights, recipe, watch)
            self._log(done)
            if done.answers:
                break
        else:
            raise ClusterError(f"no student answered in {recipe.empty} rounds in a row: {done.missed[-1].detail}")
        facts, cohort_of = checkpoint.facts, {member.name: member.cohort for member in members}
        for answer in done.answers:
            facts["tokens"] += answer.tokens
            facts["students"][cohort_of[answer.name]]["tokens"] += answer.tokens
            for kind, size in answer.meter.payload.items():
                facts["wire"][kind] = facts["wire"].get(kind, 0) + size
        # A cohort that nobody answered for stays as it was.
        students = {
            cohort: Snapshot(student.config, done.weights.get(cohort, student.weights))
            for cohort, student in checkpoint.students.items()
        }
        self._log_health(done, facts["health"])
        if index + 1 == recipe.count:
            for cohort in self.recipe.cohorts:
                answers = [answer for answer in done.answers if answer.name in cohort.edges]
                facts["students"][cohort.name] |= self._examine_last(cohort, students[cohort.name], answers)
        self.metrics.rounds(index + 1)
        facts["seconds"] += self._elapsed()
        following = Checkpoint(index + 1, students, facts)
        following.save(self.state)
        return following

    def _log(self, done: Round) -> None:
        for answer in done.answers:
            for step in answer.steps:
                self.results.log({"kind": "step", "round": done.index, "student": answer.name, **asdict(step)})
        for missed in done.missed:
            self.results.log({"kind": "missed", "round": done.index, "student": missed.name, "why": missed.why})
            said = f"round {done.index + 1}: went on without '{missed.name}' ({missed.why}: {missed.detail})"
            tell(_LOG, said, logging.WARNING)
        tokens = sum(answer.tokens for answer in done.answers)
        if tokens:
            loss = sum(step.loss * step.tokens for answer in done.answers for step in answer.steps) / tokens
            students = [answer.name for answer in done.answers]
            speeds = {answer.name: answer.tokens / answer.seconds for answer in done.answers}
            record = {"students": students, "loss": loss, "tokens": tokens, "seconds": done.seconds}
            record["tokens_per_second"] = speeds
            self.results.log({"kind": "round", "round": done.index, **record})
            tell(
                _LOG,
                f"round {done.index + 1}/{self.recipe.rounds.count}: loss {loss:.3f}, {tokens} tokens "
                f"in {done.seconds:.0f} s, averaged {' and '.join(students)}",
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
                    tell(_LOG, f"warning: {answer.name}: {sentence}", logging.WARNING)

    def _examine_last(self, cohort: Cohort, student: Snapshot, answers: Sequence[Answer]) -> dict[str, Any]:
        """The averaged student, and beside it every student as it was before the last average."""
        name, config = cohort.name, student.config
        with working("students examined" if len(self.recipe.cohorts) == 1 else f"student '{name}' examined"):
            after = self._findings(name, config, student.weights)
            # One alone is its own average.
            singles = {
                answer.name: after if len(answers) == 1 else self._findings(name, config, answer.weights, answer=False)
                for answer in answers
            }
            compared: Comparison = answered(
                self.replicas[0].compare.remote(name, config, ray.put(dict(student.weights))), "teacher"
            )
        return {
            "after": _plain(after),
            "texts": [asdict(text) for text in after.examined.texts],
            "singles": {single: _plain(one)["scores"] for single, one in singles.items()},
            "comparison": asdict(compared),
        }

    def _finish(self, checkpoint: Checkpoint) -> Result:
        alone = len(self.recipe.cohorts) == 1
        parameters, lines = {}, []
        for cohort in self.recipe.cohorts:
            name, student = cohort.name, checkpoint.students[cohort.name]
            parameters[name] = self._save(cohort, student, "" if alone else name)
            texts = checkpoint.facts["students"][name].pop("texts")
            lines += [json.dumps({"student": name, **text}) + "\n" for text in texts]
        write_atomically(self.results.path / "held_out.jsonl", "".join(lines))
        checkpoint.facts["seconds"] += self._elapsed()
        summary = summarise(self.results.run_id, checkpoint, self.teacher.parameters, parameters)
        # As it was given, not as the actors have it: the page says the same when it is rendered again.
        recipe = (self.results.path / RECIPE).read_text(encoding="utf-8")
        write_page(self.results.path, summary, self.results.metrics(), recipe)
        self.results.write_summary(summary)
        shutil.rmtree(self.state)
        print_summary(summary)
        console.print(f"results: {self.results.path}")
        return Result(self.results.path, summary)

    def _save(self, cohort: Cohort, student: Snapshot, name: str) -> int:
        """Write a student as a model that ``transformers`` loads, and its adapters by themselves; its parameters."""
        frozen: Weights = answered(self.replicas[0].frozen.remote(cohort.name), "teacher")
        model = student_from(student.config, student.weights, frozen, cohort.student, torch.device("cpu"))
        tokenizer = own_tokenizer(cohort.student, self.teacher.tokenizer) or self.teacher.tokenizer
        if cohort.student.lora is not None:  # before they are merged
            folder = self.results.path / (f"adapters/{name}" if name else "adapter")
            write_folder(folder, lambda to: save_adapter(model, to, cohort.student.model))

        def fill(to: Path) -> None:
            with quiet_transformers():
                merge(model).save_pretrained(to)
                tokenizer.save_pretrained(to)

        write_folder(self.results.path / (f"students/{name}" if name else "student"), fill)
        return model.num_parameters()


def _plain(found: Findings) -> dict[str, Any]:
    scores = {group: asdict(score) for group, score in found.examined.scores.items()}
    return {"scores": scores, "rouge_l": found.rouge_l}


def summarise(
    run_id: str, checkpoint: Checkpoint, teacher_parameters: int, parameters: dict[str, int]
) -> dict[str, Any]:
    """The headline numbers of a finished run, from its facts.

    Those of each cohort stand under ``students`` by name, those of the first one also at the top.
    """
    facts = checkpoint.facts
    students = {
        name: {**_headlines(found), "student_params": parameters[name]} for name, found in facts["students"].items()
    }
    wire = facts["wire"]
    return {
        "run": run_id,
        **next(iter(students.values())),
        "teacher_params": teacher_parameters,
        # What grows with the text: ids up and signals down. Weights and the head cross once a round and once a run.
        "wire_bytes_per_token": (wire.get("ids", 0) + wire.get("signals", 0)) / facts["tokens"],
        "wire_bytes": wire,
        "trained_tokens": facts["tokens"],
        "rounds": checkpoint.rounds,
        "seconds": facts["seconds"],
        "health": {
            name: {**known, "warnings": list(known["warnings"].values())} for name, known in facts["health"].items()
        },
        "students": students,
    }


def _headlines(found: dict[str, Any]) -> dict[str, Any]:
    """Of one cohort."""
    teacher, before, after = (found[when]["scores"] for when in ("teacher", "before", "after"))
    groups = {
        group: {
            "teacher_ppl": teacher[group]["perplexity"],
            "student_ppl_before": before[group]["perplexity"],
            "student_ppl_after": after[group]["perplexity"],
            "agreement_before": before[group]["agreement"],
            "agreement_after": after[group]["agreement"],
            "kl_before": before[group]["kl"],
            "kl_after": after[group]["kl"],
            "gap_closed": gap_closed(
                before[group]["perplexity"], after[group]["perplexity"], teacher[group]["perplexity"]
            ),
            "tokens": after[group]["tokens"],
            "single_ppl": {name: scores[group]["perplexity"] for name, scores in found["singles"].items()},
        }
        for group in teacher
    }
    comparison = found["comparison"]
    return {
        **groups.pop(ALL),
        "teacher_rouge_l": found["teacher"]["rouge_l"],
        "rouge_l_before": found["before"]["rouge_l"],
        "rouge_l_after": found["after"]["rouge_l"],
        "student_blocks": found["blocks"],
        "student_tokens": found["tokens"],
        "teacher_tok_s": comparison["teacher_tok_s"],
        "student_tok_s": comparison["student_tok_s"],
        "groups": groups,
        "completions": [
            {"prompt": prompt, "teacher": teacher_text, "student": student_text}
            for prompt, teacher_text, student_text in zip(
                comparison["prompts"], comparison["teacher"], comparison["student"], strict=True
            )
        ],
    }
