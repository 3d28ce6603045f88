"""Split fine-tuning as a run: recipe to result directory, both sides in this process."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from raycloud.data.batches import SampleOrder
from raycloud.link.meter import Meter
from raycloud.models.loading import load, quiet_transformers
from raycloud.report.console import bars, console
from raycloud.report.teacher import print_table
from raycloud.results import Mode, ResultDir, resumable, write_atomically, write_folder
from raycloud.split.finetune.assembly import assemble
from raycloud.split.finetune.crossing import crossing, per_cut
from raycloud.split.finetune.edge import Cloud, EdgeSide, Learning, LocalCloud
from raycloud.split.finetune.examples import Examples, examples_of, judge, order_of
from raycloud.split.finetune.loop import train
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.state import Checkpoints
from raycloud.training.loop import Step
from raycloud.training.lora import merge

_CALIBRATE = 256
_LEARNING = {
    "all": Learning(),
    "last+middle": Learning(ahead=False),
    "last": Learning(ahead=False, cloud=False),
}


def run(recipe: SplitTuneRecipe, mode: Mode = "new") -> dict[str, Any]:
    """Fine-tune and leave ``recipe.yaml``, ``metrics.jsonl``, ``summary.json`` and what was learned behind.

    That is ``model/``, which ``transformers`` loads, and ``edge.safetensors``: the edge's ends of both codes and the
    head. The published cut alters the model it trains, so that it leaves no ``model/``.

    Returns:
        The summary: the task's metrics, bytes of a step at each cut and in all, and where the seconds went.

    Raises:
        RaycloudError: model, data or result directory cannot be had, or training cannot go on.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with resumable(recipe.output), ResultDir.open(recipe.output, recipe, mode) as results:
        return _run(recipe, results)


def _run(recipe: SplitTuneRecipe, results: ResultDir) -> dict[str, Any]:
    pretrained = load(recipe.model, device=recipe.device, dtype="float32", notify=console.print)
    texts, held_out, classes = examples_of(recipe, pretrained.tokenizer, console.print)
    order, device = order_of(texts, recipe), pretrained.model.device
    accumulate = recipe.training.accumulate
    steps = max(1, recipe.epochs * order.steps_per_epoch // accumulate)
    meter = Meter()
    calibration = [texts.batch(range(at, len(texts.samples), _CALIBRATE)) for at in range(8)]
    edge = assemble(
        pretrained.model,
        recipe,
        [batch.to(device) for batch in calibration],
        classes=classes,
        total_steps=steps,
        meter=meter,
        kept=Checkpoints(results.path / "checkpoints" / "cloud"),
    )
    _print_bytes(edge, texts, order, accumulate)
    before = judge(lambda batch: edge.predict(batch.to(device)), held_out, recipe)
    local = edge.cloud
    assert isinstance(local, LocalCloud)
    meter.payload.clear()
    seconds = _train(recipe, results, edge, local, texts, order, steps)
    crossed = Counter(meter.payload)
    after = judge(lambda batch: edge.predict(batch.to(device)), held_out, recipe)
    first, second, total = per_cut(crossed)
    made = max(1, edge.trainer.step_index - seconds.begun)
    summary = {
        "run": results.run_id,
        "steps": steps,
        "train_texts": len(texts.samples),
        "held_out_texts": len(held_out.samples),
        **{f"{name}_before": value for name, value in before.items()},
        **after,
        "first_cut_bytes_per_step": first / made,
        "second_cut_bytes_per_step": second / made,
        "bytes_per_step": total / made,
        "seconds_per_step": seconds.taken / made,
        "edge_seconds_per_step": edge.clock.edge / made,
        "cloud_seconds_per_step": edge.clock.cloud / made,
    }
    if recipe.cut.kind != "sft":  # which alters the model itself

        def fill(folder: Path) -> None:
            with quiet_transformers():
                merge(pretrained.model).save_pretrained(folder)
                pretrained.tokenizer.save_pretrained(folder)

        write_folder(results.path / "model", fill)
    ends = {
        f"{name}.{key}": tensor.contiguous()
        for name in ("encoder", "decoder", "head")
        for key, tensor in edge.modules[name].state_dict().items()
    }
    write_atomically(results.path / "edge.safetensors", save(ends))
    results.write_summary(summary)
    _print_summary(summary, before, after)
    console.print(f"results: {results.path}")
    return summary


class _Taken:
    """How long the steps took, and with which of them this process began."""

    def __init__(self, begun: int, taken: float) -> None:
        self.begun, self.taken = begun, taken


def _train(
    recipe: SplitTuneRecipe,
    results: ResultDir,
    edge: EdgeSide,
    local: LocalCloud,
    texts: Examples,
    order: SampleOrder,
    steps: int,
) -> _Taken:
    device, accumulate = edge.trainer.device, recipe.training.accumulate
    kept, theirs = Checkpoints(results.path / "checkpoints" / "edge"), local.kept
    begun = max(kept.steps(), default=0)
    results.keep_metrics(lambda record: record["step"] < begun)

    def cloud_at(step: int | None) -> Cloud:
        if step is not None and theirs is not None:
            local.side.load(step, theirs.load(step))
        return local

    started = time.perf_counter()
    with bars(steps) as shown:

        def told(step: Step) -> None:
            results.log(
                {
                    "step": step.step,
                    "loss": step.loss,
                    "grad_norm": step.grad_norm,
                    "lr": step.lr,
                    "skipped": step.skipped,
                }
            )
            shown.move("steps", step.step + 1, f"loss {step.loss:.3f}")

        train(
            edge,
            lambda step: [
                texts.batch(order.indices(step * accumulate + micro)).to(device) for micro in range(accumulate)
            ],
            steps=steps,
            every=recipe.checkpoint_every,
            kept=kept,
            cloud_at=cloud_at,
            told=told,
        )
    return _Taken(begun, time.perf_counter() - started)


def _print_bytes(edge: EdgeSide, texts: Examples, order: SampleOrder, accumulate: int) -> None:
    """What a step will send, for each choice of what learns."""
    lengths, some = texts.lengths, min(order.steps_per_epoch // accumulate, 50) or 1
    rows = []
    for name, learning in _LEARNING.items():
        sizes: Counter[str] = Counter()
        for step in range(some):
            micros = [[lengths[at] for at in order.indices(step * accumulate + micro)] for micro in range(accumulate)]
            sizes += crossing(step, micros, edge.packings, edge.back, learning)
        rows.append([name, *(f"{size / some / 1e3:,.1f}" for size in per_cut(sizes))])
    print_table(["learning; kB of a step", "first cut", "second cut", "in all"], rows)


def _print_summary(summary: dict[str, Any], before: dict[str, float], after: dict[str, float]) -> None:
    rows = [[name, f"{before[name]:.4g}", f"{after[name]:.4g}"] for name in after]
    rows += [
        [name.replace("_", " "), "", f"{summary[name]:,.4g}"]
        for name in (
            "steps",
            "first_cut_bytes_per_step",
            "second_cut_bytes_per_step",
            "bytes_per_step",
            "seconds_per_step",
            "edge_seconds_per_step",
            "cloud_seconds_per_step",
        )
    ]
    print_table(["", "before", "after"], rows)
