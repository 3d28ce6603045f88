"""Run of split fine-tuning: recipe to result directory, with the cloud's side in this process or over a link."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import save

from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.durable import write_atomically, write_folder
from raycloud.errors import RecipeError
from raycloud.report.console import console, print_and_log, progress_bars
from raycloud.report.numbers import kilobytes
from raycloud.report.split_tune import print_summary, write_page
from raycloud.report.table import print_table
from raycloud.results import Mode, ResultDir, record_inputs, resumable
from raycloud.split.finetune.assembly import trainable_parts
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.edge_data import EdgeData
from raycloud.split.finetune.edge_trainer import EdgeTrainer, StepTimes
from raycloud.split.finetune.label_sharing import WARNING
from raycloud.split.finetune.metrics_log import step_record
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.recovery import retry_from_checkpoint, save_checkpoint, train
from raycloud.split.finetune.sides import Connect, Sides, local_sides, remote_sides
from raycloud.split.finetune.traffic import bytes_by_cut, bytes_by_direction
from raycloud.training.loop import Step
from raycloud.training.lora import save_model

_LOG = logging.getLogger(__name__)
_BEFORE = -1
"""Step number of the record with the metrics before the first step."""


def run(recipe: SplitTuneRecipe, mode: Mode = "new", connect: Connect | None = None) -> dict[str, Any]:
    """Fine-tune and write ``recipe.yaml``, ``metrics.jsonl``, ``summary.json``, ``report.html`` and trained weights.

    The weights are ``edge.safetensors`` with those of the edge and, if both sides are in this process, ``model/``,
    which ``transformers`` loads. The published cut (``sft``) changes the model's structure and writes no ``model/``.

    Args:
        recipe: recipe of the run.
        mode: ``new``, ``resume`` or ``overwrite``.
        connect: opens a channel to the cloud; None for a cloud in this process.

    Returns:
        Summary: the task's metrics, bytes of a step at each cut and in total, bytes to exchange the bottlenecks, and
        seconds by side.

    Raises:
        RaycloudError: model, data, cloud or result directory is unavailable, or training cannot continue.
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
        record_inputs(results.path, fingerprints(data_sources(recipe.data)))
        return _SplitTuneRun(recipe, results, connect).run()


@dataclass
class _SplitTuneRun:
    recipe: SplitTuneRecipe
    results: ResultDir
    connect: Connect | None

    def run(self) -> dict[str, Any]:
        recipe, results = self.recipe, self.results
        if (done := results.summary()) is not None:
            console.print(f"'{results.path}' is complete")
            return done
        data = EdgeData(recipe, partial(print_and_log, _LOG))
        steps = max(
            1, recipe.epochs * data.schedule.order.steps_per_epoch // recipe.training.gradient_accumulation_steps
        )
        checkpoints = results.path / "checkpoints"
        kept = CheckpointStore(checkpoints / "edge")
        if self.connect is None:
            sides = local_sides(data, steps, checkpoints / "cloud", console.print)
        else:
            sides = remote_sides(data, steps, results.run_id, self.connect)
        edge = sides.start(kept)
        latest = max(kept.steps(), default=None)
        self._print_bytes(data, edge)
        begun = latest or 0
        results.filter_metrics(lambda record: record["step"] < begun)
        if not results.metrics():
            if latest is None:
                save_checkpoint(edge, kept)
            else:
                edge.load(kept.load(latest))
            found = retry_from_checkpoint(lambda: _evaluate(data, edge), edge, kept, sides.cloud_at)
            results.log_metrics({"step": _BEFORE, **found})
        before = {name: value for name, value in results.metrics()[0].items() if name != "step"}
        started, edge.clock = time.perf_counter(), StepTimes()
        try:
            self._train(sides, edge, kept, steps)
            taken = time.perf_counter() - started
            clock = replace(edge.clock)
            after = retry_from_checkpoint(lambda: _evaluate(data, edge), edge, kept, sides.cloud_at)
        finally:
            edge.cloud.close()
        made = max(1, steps - begun)
        traffic = data.traffic(edge, steps)
        first, second, total = (size / steps for size in bytes_by_cut(traffic))
        up, down = (size / steps for size in bytes_by_direction(traffic))
        summary: dict[str, Any] = {
            "run": results.run_id,
            "steps": steps,
            **data.facts(),
            **{f"{name}_before": value for name, value in before.items()},
            **after,
            "first_cut_bytes_per_step": first,
            "second_cut_bytes_per_step": second,
            "bytes_per_step": total,
            "bytes_up_per_step": up,
            "bytes_down_per_step": down,
            "bottleneck_bytes": data.bottleneck_traffic(edge).total(),
            "seconds_per_step": taken / made,
            "edge_seconds_per_step": clock.edge / made,
            "cloud_seconds_per_step": clock.cloud / made,
            "waiting_seconds_per_step": clock.waiting / made,
        }
        if recipe.network is not None:
            summary["link_seconds_per_step"] = (
                recipe.network.network().seconds(max(bytes_by_direction(traffic))) / steps
            )
        write_atomically(results.path / "edge.safetensors", save(edge.trained_weights()), checksum=True)
        if (model := sides.model) is not None and recipe.uplink.kind != "sft":
            write_folder(results.path / "model", lambda folder: save_model(model, data.tokenizer, folder))
        results.write_summary(summary)
        shutil.rmtree(checkpoints, ignore_errors=True)
        print_summary(summary)
        write_page(results.path, summary, results.metrics(), recipe.dump())
        console.print(f"results: {results.path}")
        return summary

    def _train(self, sides: Sides, edge: EdgeTrainer, kept: CheckpointStore, steps: int) -> None:
        logged = {record["step"] for record in self.results.metrics()}
        with progress_bars(steps) as shown:

            def on_step(step: Step) -> None:
                if step.step not in logged:  # a step is repeated if the cloud lost it
                    self.results.log_metrics(step_record(step))
                    logged.add(step.step)
                shown.move("steps", step.step + 1, f"loss {step.loss:.3f}")

            train(
                edge,
                sides.data.batches,
                steps=steps,
                every=self.recipe.checkpoint_every,
                kept=kept,
                cloud_at=sides.cloud_at,
                on_step=on_step,
            )

    def _print_bytes(self, data: EdgeData, edge: EdgeTrainer) -> None:
        """Print the bytes of a step for each choice of the trained parts."""
        some = max(1, min(data.schedule.order.steps_per_epoch // self.recipe.training.gradient_accumulation_steps, 50))
        choices = {
            name: trainable_parts(self.recipe.model_copy(update={"trainable": name}))
            for name in ("all", "last+middle", "last")
            if name == self.recipe.trainable or self.recipe.labels == "edge"
        }
        choices[self.recipe.trainable] = edge.trainable  # fewer parts may be trained than requested
        rows = [
            [name, *(kilobytes(size / some) for size in bytes_by_cut(data.traffic(edge, some, learning)))]
            for name, learning in choices.items()
        ]
        print_table(["trainable; kB of a step", "first cut", "second cut", "in all"], rows)
        if codes := data.bottleneck_traffic(edge).total():
            console.print(f"bottlenecks, once: {kilobytes(codes)} kB")


def _evaluate(data: EdgeData, edge: EdgeTrainer) -> dict[str, float]:
    with progress_bars(len(data.held_out.samples)) as shown:
        return data.evaluate(edge, lambda texts: shown.move("held-out texts", texts))
