"""Split fine-tuning as a run: recipe to result directory, with the cloud's side in this process or over a link."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.errors import RecipeError
from raycloud.link.channel import Channel
from raycloud.models.loading import load, load_config, load_tokenizer, pick_device, resolve
from raycloud.report.console import bars, console
from raycloud.report.split_tune import print_summary, write_page
from raycloud.report.teacher import print_table
from raycloud.results import Mode, ResultDir, resumable, write_atomically, write_folder
from raycloud.split.finetune.assembly import assemble, check_lengths, ends_of, learning_of, plan_of
from raycloud.split.finetune.crossing import fitting, per_cut, per_direction
from raycloud.split.finetune.edge import LocalCloud
from raycloud.split.finetune.examples import calibration, examples_of, judge, lessons_of, most_tokens
from raycloud.split.finetune.front import Clock, Cloud, Front, Learning
from raycloud.split.finetune.labelled import WARNING
from raycloud.split.finetune.loop import keep, lasting, train
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.remote import RemoteCloud
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.finetune.whole import save_model
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet
from raycloud.training.loop import Step

_BEFORE = -1
"""The step of the record of what the model could before the first one."""

Connect = Callable[[str], Channel]
"""Opens a channel to the cloud for a session's id."""


def run(recipe: SplitTuneRecipe, mode: Mode = "new", connect: Connect | None = None) -> dict[str, Any]:
    """Fine-tune and leave ``recipe.yaml``, ``metrics.jsonl``, ``summary.json`` and what was learned behind.

    That is ``report.html``, ``edge.safetensors``, all that the edge has learned, and, where both sides are in this
    process, ``model/``, which ``transformers`` loads. The published cut alters the model it trains and leaves none.

    Args:
        recipe: what to do.
        mode: ``new``, ``resume`` or ``overwrite``.
        connect: where the cloud's side is; in this process if None.

    Returns:
        The summary: the task's metrics, bytes of a step at each cut and in all, bytes that bring the codes where they
        belong, and where the seconds went.

    Raises:
        RaycloudError: model, data, cloud or result directory cannot be had, or training cannot go on.
    """
    if recipe.edges:
        raise RecipeError("edges: several, and this is one edge's run; allowed: an empty list")
    if recipe.network is not None and connect is None:
        raise RecipeError(
            "network is given and the cloud's side is in this process; allowed: null, or a cloud elsewhere"
        )
    if recipe.labels == "cloud":
        console.print(f"warning: {WARNING}", style="yellow")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with resumable(recipe.output), ResultDir.open(recipe.output, recipe, mode) as results:
        return _Run(recipe, results, connect).run()


@dataclass
class _Run:
    recipe: SplitTuneRecipe
    results: ResultDir
    connect: Connect | None

    def run(self) -> dict[str, Any]:
        recipe, results = self.recipe, self.results
        if (done := results.summary()) is not None:
            console.print(f"'{results.path}' is complete")
            return done
        where, self.device = resolve(recipe.model, console.print), pick_device(recipe.device)
        check_lengths(recipe, load_config(where))
        self.tokenizer = load_tokenizer(where)
        self.texts, self.held_out, classes = examples_of(recipe, self.tokenizer, console.print)
        self.lessons = lessons_of(self.texts, recipe)
        steps = max(1, recipe.epochs * self.lessons.order.steps_per_epoch // recipe.training.accumulate)
        kept = Checkpoints(results.path / "checkpoints" / "edge")
        latest = max(kept.steps(), default=None)
        edge, model, cloud_at = (self._local if self.connect is None else self._remote)(classes, steps, latest)
        self._print_bytes(edge)
        begun = latest or 0
        results.keep_metrics(lambda record: record["step"] < begun)
        if not results.metrics():
            if latest is None:
                keep(edge, kept)
            else:
                edge.load(kept.load(latest))
            found = lasting(lambda: self._judged(edge), edge, kept, cloud_at)
            results.log({"step": _BEFORE, **found})
        before = {name: value for name, value in results.metrics()[0].items() if name != "step"}
        started, edge.clock = time.perf_counter(), Clock()
        try:
            self._train(edge, kept, cloud_at, steps)
            taken = time.perf_counter() - started
            clock = replace(edge.clock)
            after = lasting(lambda: self._judged(edge), edge, kept, cloud_at)
        finally:
            edge.cloud.close()
        made = max(1, steps - begun)
        crossed = self._crossed(edge, edge.learning, steps)
        first, second, total = (size / steps for size in per_cut(crossed))
        up, down = (size / steps for size in per_direction(crossed))
        summary: dict[str, Any] = {
            "run": results.run_id,
            "steps": steps,
            "train_texts": len(self.texts.samples),
            "held_out_texts": len(self.held_out.samples),
            **{f"{name}_before": value for name, value in before.items()},
            **after,
            "first_cut_bytes_per_step": first,
            "second_cut_bytes_per_step": second,
            "bytes_per_step": total,
            "bytes_up_per_step": up,
            "bytes_down_per_step": down,
            "bytes_of_codes": self._fitted(edge).total(),
            "seconds_per_step": taken / made,
            "edge_seconds_per_step": clock.edge / made,
            "cloud_seconds_per_step": clock.cloud / made,
            "waiting_seconds_per_step": clock.waiting / made,
        }
        if recipe.network is not None:
            summary["link_seconds_per_step"] = recipe.network.network().seconds(max(per_direction(crossed))) / steps
        write_atomically(results.path / "edge.safetensors", save(edge.learnt()))
        if model is not None and recipe.cut.kind != "sft":
            write_folder(results.path / "model", lambda folder: save_model(model, self.tokenizer, folder))
        results.write_summary(summary)
        shutil.rmtree(results.path / "checkpoints", ignore_errors=True)
        print_summary(summary)
        write_page(results.path, summary, results.metrics(), recipe.dump())
        console.print(f"results: {results.path}")
        return summary

    def _calibration(self) -> list[Batch]:
        most = self.recipe.training.batch_size
        return [batch.to(self.device) for batch in calibration(self.texts, most=most)]

    def _local(
        self, classes: int, steps: int, latest: int | None
    ) -> tuple[Front, PreTrainedModel | None, Callable[[int], Cloud]]:
        pretrained = load(self.recipe.model, device=self.recipe.device, dtype="float32", notify=console.print)
        theirs = Checkpoints(self.results.path / "checkpoints" / "cloud")
        edge = assemble(
            pretrained.model, self.recipe, self._calibration(), classes=classes, total_steps=steps, kept=theirs
        )
        local = edge.cloud
        assert isinstance(local, LocalCloud)

        def cloud_at(step: int) -> Cloud:
            local.side.load(step, theirs.load(step))
            return local

        if latest is not None:
            cloud_at(latest)
        return edge, pretrained.model, cloud_at

    def _remote(
        self, classes: int, steps: int, latest: int | None
    ) -> tuple[Front, PreTrainedModel | None, Callable[[int], Cloud]]:
        recipe, connect = self.recipe, self.connect
        assert connect is not None
        plans = PlanSet.of(plan_of(recipe, load_config(resolve(recipe.model, console.print))))
        part = load_edge(
            recipe.model, plans, device=recipe.device, dtype="float32", training=True, pooler=recipe.first_rows
        )
        fitted_to = self._calibration()
        ends = ends_of(recipe, part.first, part.last, fitted_to, classes=classes, total_steps=steps, pooler=part.pooler)
        ends.check_frames(most_tokens(self.lessons, steps, self.held_out, recipe), fitted_to)
        begin = ends.begin(part.fingerprint, self.results.run_id)

        def cloud_at(step: int | None) -> Cloud:
            return RemoteCloud(connect, begin.model_copy(update={"restore": step}), ends.code.decoder)

        edge = ends.edge(cloud_at(latest), recipe.depth)
        if latest is None:
            edge.fit(fitted_to)
        return edge, None, cloud_at

    def _judged(self, edge: Front) -> dict[str, float]:
        with bars(len(self.held_out.samples)) as shown:
            return judge(
                lambda batch: edge.predict(batch.to(self.device)),
                self.held_out,
                self.recipe,
                lambda texts: shown.move("held-out texts", texts),
            )

    def _train(self, edge: Front, kept: Checkpoints, cloud_at: Callable[[int], Cloud], steps: int) -> None:
        logged = {record["step"] for record in self.results.metrics()}
        with bars(steps) as shown:

            def told(step: Step) -> None:
                record = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
                if step.step not in logged:  # a step is made again where the cloud lost it
                    self.results.log({**record, "skipped": step.skipped})
                    logged.add(step.step)
                shown.move("steps", step.step + 1, f"loss {step.loss:.3f}")

            train(
                edge,
                lambda step: [batch.to(self.device) for batch in self.lessons.batches(step)],
                steps=steps,
                every=self.recipe.checkpoint_every,
                kept=kept,
                cloud_at=cloud_at,
                told=told,
            )

    def _crossed(self, edge: Front, learning: Learning, steps: int) -> Counter[str]:
        """What so many steps send, by kind of message."""
        sizes: Counter[str] = Counter()
        for step in range(steps):
            sizes += edge.crossing(step, self.lessons.lengths(step), learning)
        return sizes

    def _fitted(self, edge: Front) -> Counter[str]:
        """What both codes take before the first step, over a link."""
        lengths = [batch.valid.sum(dim=1).tolist() for batch in self._calibration()]
        width = int(edge.first.config.hidden_size)
        cuts = {name: cut.kind == "narrow" for name, cut in (("first", self.recipe.cut), ("second", self.recipe.back))}
        return fitting(lengths, edge.packings, width, **cuts)

    def _print_bytes(self, edge: Front) -> None:
        """What a step will send, for each choice of what learns."""
        some = max(1, min(self.lessons.order.steps_per_epoch // self.recipe.training.accumulate, 50))
        choices = {
            name: learning_of(self.recipe.model_copy(update={"learning": name}))
            for name in ("all", "last+middle", "last")
            if name == self.recipe.learning or self.recipe.labels == "edge"
        }
        choices[self.recipe.learning] = edge.learning  # there may be less that learns than was asked for
        rows = [
            [name, *(f"{size / some / 1e3:,.1f}" for size in per_cut(self._crossed(edge, learning, some)))]
            for name, learning in choices.items()
        ]
        print_table(["learning; kB of a step", "first cut", "second cut", "in all"], rows)
        if codes := self._fitted(edge).total():
            console.print(f"codes, once: {codes / 1e3:,.1f} kB")
