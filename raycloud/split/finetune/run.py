"""Run of split fine-tuning: recipe to result directory, with the cloud's side in this process or over a link."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.durable import write_atomically, write_folder
from raycloud.errors import RecipeError
from raycloud.link.channel import Channel
from raycloud.models.loading import load, load_config, load_tokenizer, pick_device, resolve
from raycloud.report.console import console, print_and_log, progress_bars
from raycloud.report.split_tune import print_summary, write_page
from raycloud.report.table import print_table
from raycloud.results import Mode, ResultDir, record_inputs, resumable
from raycloud.split.finetune.assembly import build_edge_setup, build_local_edge, check_lengths, plan_of, trainable_parts
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.client import RemoteCloudClient
from raycloud.split.finetune.edge import LocalCloudClient
from raycloud.split.finetune.edge_trainer import CloudClient, EdgeTrainer, StepTimes, TrainableParts
from raycloud.split.finetune.examples import (
    batch_schedule,
    bos_of,
    calibration_batches,
    evaluate,
    load_examples,
    max_batch_tokens,
)
from raycloud.split.finetune.label_sharing import WARNING
from raycloud.split.finetune.loop import last_common_checkpoint, retry_from_checkpoint, save_checkpoint, train
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.traffic import bottleneck_traffic, bytes_by_cut, bytes_by_direction
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet
from raycloud.training.loop import Step
from raycloud.training.lora import save_model

_LOG = logging.getLogger(__name__)
_BEFORE = -1
"""Step number of the record with the metrics before the first step."""

Connect = Callable[[str], Channel]
"""Function that opens a channel to the cloud for a session's id."""


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
        where, self.device = resolve(recipe.model, console.print), pick_device(recipe.device)
        check_lengths(recipe, load_config(where))
        self.tokenizer = load_tokenizer(where)
        bos = bos_of(recipe, self.tokenizer)
        self.texts, self.held_out, classes = load_examples(recipe, self.tokenizer, partial(print_and_log, _LOG))
        self.schedule = batch_schedule(self.texts, recipe)
        steps = max(
            1, recipe.epochs * self.schedule.order.steps_per_epoch // recipe.training.gradient_accumulation_steps
        )
        kept = CheckpointStore(results.path / "checkpoints" / "edge")
        edge, model, cloud_at = (self._local if self.connect is None else self._remote)(classes, steps, kept)
        latest = max(kept.steps(), default=None)
        self._print_bytes(edge)
        begun = latest or 0
        results.filter_metrics(lambda record: record["step"] < begun)
        if not results.metrics():
            if latest is None:
                save_checkpoint(edge, kept)
            else:
                edge.load(kept.load(latest))
            found = retry_from_checkpoint(lambda: self._evaluate(edge), edge, kept, cloud_at)
            results.log({"step": _BEFORE, **found})
        before = {name: value for name, value in results.metrics()[0].items() if name != "step"}
        started, edge.clock = time.perf_counter(), StepTimes()
        try:
            self._train(edge, kept, cloud_at, steps)
            taken = time.perf_counter() - started
            clock = replace(edge.clock)
            after = retry_from_checkpoint(lambda: self._evaluate(edge), edge, kept, cloud_at)
        finally:
            edge.cloud.close()
        made = max(1, steps - begun)
        traffic = self._traffic(edge, edge.trainable, steps)
        first, second, total = (size / steps for size in bytes_by_cut(traffic))
        up, down = (size / steps for size in bytes_by_direction(traffic))
        summary: dict[str, Any] = {
            "run": results.run_id,
            "bos": bos,
            "steps": steps,
            "rows": dict(self.texts.rows),
            "train_texts": len(self.texts.samples),
            "held_out_texts": len(self.held_out.samples),
            **{f"{name}_before": value for name, value in before.items()},
            **after,
            "first_cut_bytes_per_step": first,
            "second_cut_bytes_per_step": second,
            "bytes_per_step": total,
            "bytes_up_per_step": up,
            "bytes_down_per_step": down,
            "bytes_of_codes": self._bottleneck_traffic(edge).total(),
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
        if model is not None and recipe.uplink.kind != "sft":
            write_folder(results.path / "model", lambda folder: save_model(model, self.tokenizer, folder))
        results.write_summary(summary)
        shutil.rmtree(results.path / "checkpoints", ignore_errors=True)
        print_summary(summary)
        write_page(results.path, summary, results.metrics(), recipe.dump())
        console.print(f"results: {results.path}")
        return summary

    def _calibration(self) -> list[Batch]:
        most = self.recipe.training.batch_size
        return [batch.to(self.device) for batch in calibration_batches(self.texts, most=most)]

    def _local(
        self, classes: int, steps: int, kept: CheckpointStore
    ) -> tuple[EdgeTrainer, PreTrainedModel | None, Callable[[int], CloudClient]]:
        pretrained = load(self.recipe.model, device=self.recipe.device, dtype="float32", notify=console.print)
        theirs = CheckpointStore(self.results.path / "checkpoints" / "cloud")
        edge = build_local_edge(
            pretrained.model, self.recipe, self._calibration(), classes=classes, total_steps=steps, kept=theirs
        )
        local = edge.cloud
        assert isinstance(local, LocalCloudClient)

        def cloud_at(step: int) -> CloudClient:
            local.trainer.load(step, theirs.load(step))
            return local

        last_common_checkpoint(kept, cloud_at)
        return edge, pretrained.model, cloud_at

    def _remote(
        self, classes: int, steps: int, kept: CheckpointStore
    ) -> tuple[EdgeTrainer, PreTrainedModel | None, Callable[[int], CloudClient]]:
        recipe, connect = self.recipe, self.connect
        assert connect is not None
        plans = PlanSet.of(plan_of(recipe, load_config(resolve(recipe.model, console.print))))
        part = load_edge(
            recipe.model, plans, device=recipe.device, dtype="float32", training=True, pooler=recipe.uses_pooler
        )
        fitted_to = self._calibration()
        setup = build_edge_setup(
            recipe, part.first, part.last, fitted_to, classes=classes, total_steps=steps, pooler=part.pooler
        )
        setup.check_batch_size(max_batch_tokens(self.schedule, steps, self.held_out, recipe), fitted_to)
        begin = setup.begin(part.fingerprint, self.results.run_id)

        def cloud_at(step: int | None) -> CloudClient:
            return RemoteCloudClient(
                connect, begin.model_copy(update={"restore": step}), setup.uplink_bottleneck.decoder
            )

        found = last_common_checkpoint(kept, cloud_at)
        edge = setup.edge(cloud_at(None) if found is None else found[1], recipe.max_in_flight)
        if found is None:
            edge.fit(fitted_to)
        return edge, None, cloud_at

    def _evaluate(self, edge: EdgeTrainer) -> dict[str, float]:
        with progress_bars(len(self.held_out.samples)) as shown:
            return evaluate(
                lambda batch: edge.predict(batch.to(self.device)),
                self.held_out,
                self.recipe,
                lambda texts: shown.move("held-out texts", texts),
            )

    def _train(
        self, edge: EdgeTrainer, kept: CheckpointStore, cloud_at: Callable[[int], CloudClient], steps: int
    ) -> None:
        logged = {record["step"] for record in self.results.metrics()}
        with progress_bars(steps) as shown:

            def on_step(step: Step) -> None:
                record = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
                if step.step not in logged:  # a step is repeated if the cloud lost it
                    self.results.log({**record, "skipped": step.skipped})
                    logged.add(step.step)
                shown.move("steps", step.step + 1, f"loss {step.loss:.3f}")

            train(
                edge,
                lambda step: [batch.to(self.device) for batch in self.schedule.batches(step)],
                steps=steps,
                every=self.recipe.checkpoint_every,
                kept=kept,
                cloud_at=cloud_at,
                on_step=on_step,
            )

    def _traffic(self, edge: EdgeTrainer, trainable: TrainableParts, steps: int) -> Counter[str]:
        """Bytes of ``steps`` steps, by kind of message."""
        sizes: Counter[str] = Counter()
        for step in range(steps):
            sizes += edge.traffic(step, self.schedule.lengths(step), trainable)
        return sizes

    def _bottleneck_traffic(self, edge: EdgeTrainer) -> Counter[str]:
        """Bytes of both bottlenecks before the first step, over a link."""
        lengths = [batch.valid.sum(dim=1).tolist() for batch in self._calibration()]
        width = int(edge.first.config.hidden_size)
        cuts = {
            name: cut.kind == "low_rank"
            for name, cut in (("uplink", self.recipe.uplink), ("downlink", self.recipe.downlink))
        }
        return bottleneck_traffic(lengths, edge.wire_formats, width, **cuts)

    def _print_bytes(self, edge: EdgeTrainer) -> None:
        """Print the bytes of a step for each choice of the trained parts."""
        some = max(1, min(self.schedule.order.steps_per_epoch // self.recipe.training.gradient_accumulation_steps, 50))
        choices = {
            name: trainable_parts(self.recipe.model_copy(update={"trainable": name}))
            for name in ("all", "last+middle", "last")
            if name == self.recipe.trainable or self.recipe.labels == "edge"
        }
        choices[self.recipe.trainable] = edge.trainable  # fewer parts may be trained than requested
        rows = [
            [name, *(f"{size / some / 1e3:,.1f}" for size in bytes_by_cut(self._traffic(edge, learning, some)))]
            for name, learning in choices.items()
        ]
        print_table(["trainable; kB of a step", "first cut", "second cut", "in all"], rows)
        if codes := self._bottleneck_traffic(edge).total():
            console.print(f"bottlenecks, once: {codes / 1e3:,.1f} kB")
