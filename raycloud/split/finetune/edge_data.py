"""Texts of one edge: the schedule of its steps, its calibration texts, and the evaluation on its held-out texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from raycloud.data.batches import Batch
from raycloud.models.loading import load_config, load_tokenizer, pick_device, resolve
from raycloud.split.finetune.assembly import check_lengths, plan_of
from raycloud.split.finetune.edge_trainer import EdgeTrainer, TrainableParts
from raycloud.split.finetune.examples import (
    batch_schedule,
    bos_of,
    calibration_batches,
    evaluate,
    load_examples,
    max_batch_tokens,
)
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.traffic import bottleneck_traffic
from raycloud.training.lora import experts_left_out


class EdgeData:
    """Texts of an edge, tokenized for its model.

    Args:
        recipe: recipe of this edge alone.
        notify: called with one line before each download or conversion, with the counts of rows, and for experts that
            get no adapters.

    Raises:
        RaycloudError: model or data are unavailable or do not fit the recipe.
    """

    def __init__(self, recipe: SplitTuneRecipe, notify: Callable[[str], None] = lambda line: None) -> None:
        self.recipe, self.device = recipe, pick_device(recipe.device)
        where = resolve(recipe.model, notify)
        config = load_config(where)
        check_lengths(recipe, config)
        self.plan, self.width = plan_of(recipe, config), int(config.hidden_size)
        if recipe.lora is not None and (left_out := experts_left_out(config, recipe.lora)):
            notify(f"warning: {left_out}")
        self.tokenizer = load_tokenizer(where)
        self._bos = bos_of(recipe, self.tokenizer)
        self._texts, self.held_out, self.classes = load_examples(recipe, self.tokenizer, notify)
        self.schedule = batch_schedule(self._texts, recipe)

    def facts(self) -> dict[str, Any]:
        """Numbers of its texts, and whether they begin with BOS."""
        return {
            "bos": self._bos,
            "rows": dict(self._texts.rows),
            "train_texts": len(self._texts.samples),
            "held_out_texts": len(self.held_out.samples),
        }

    def batches(self, step: int) -> list[Batch]:
        """Micro-batches of a step, on the edge's device."""
        return [batch.to(self.device) for batch in self.schedule.batches(step)]

    def calibration(self) -> list[Batch]:
        """Calibration texts for the bottlenecks, on the edge's device."""
        most = self.recipe.training.batch_size
        return [batch.to(self.device) for batch in calibration_batches(self._texts, most=most)]

    def max_batch_tokens(self, steps: int) -> int:
        """Number of tokens of the largest batch of ``steps`` steps and of the evaluation."""
        return max_batch_tokens(self.schedule, steps, self.held_out, self.recipe)

    def evaluate(self, edge: EdgeTrainer, on_progress: Callable[[int], None] = lambda texts: None) -> dict[str, float]:
        """Compute the task's metrics over the held-out texts; call ``on_progress`` with the number of texts done."""
        return evaluate(lambda batch: edge.predict(batch.to(self.device)), self.held_out, self.recipe, on_progress)

    def traffic(self, edge: EdgeTrainer, steps: int, trainable: TrainableParts | None = None) -> Counter[str]:
        """Bytes of ``steps`` steps by kind of message; ``trainable`` if other parts than the edge's are trained."""
        sizes: Counter[str] = Counter()
        for step in range(steps):
            sizes += edge.traffic(step, self.schedule.lengths(step), trainable)
        return sizes

    def bottleneck_traffic(self, edge: EdgeTrainer) -> Counter[str]:
        """Bytes of both bottlenecks before the first step, over a link."""
        lengths = [batch.valid.sum(dim=1).tolist() for batch in self.calibration()]
        uplink, downlink = (cut.kind == "low_rank" for cut in (self.recipe.uplink, self.recipe.downlink))
        return bottleneck_traffic(lengths, edge.wire_formats, self.width, uplink=uplink, downlink=downlink)
