"""Split fine-tuning of MiniLM on sentences with sentiment: accuracy against what crosses, beside the published cut.

All train on the same 2,000 sentences of movie reviews, two epochs, one schedule, the same heads and orders of samples.
The edge runs the first 1, 3 or 5 of six blocks; what comes back is one row a sentence in float32.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from raycloud.benchmarks.measure import show
from raycloud.data.batches import Batch, SampleOrder
from raycloud.data.labelled import LabelledText, collate_labelled, encode_labelled
from raycloud.data.reviews import reviews
from raycloud.evaluation.labels import paired_standard_error
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.weights import load_weights, weights_of
from raycloud.report.console import bars, console
from raycloud.split.finetune.assembly import assemble, task_of
from raycloud.split.finetune.crossing import crossing, fitting, per_cut
from raycloud.split.finetune.front import Front, Learning
from raycloud.split.finetune.numbers import Packing, Packings
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.tasks import pooled
from raycloud.training.draws import drawing
from raycloud.training.loop import Loss, Trainer

MODEL, DOMAIN, CLASSES = "builtin:minilm-l6", "movie", ["negative", "positive"]
TRAIN, TEST, EPOCHS, MAX_LENGTH = 2000, 4000, 2, 64
SPLITS, SEEDS = (1, 3, 5), (10, 20, 30)
CUTS: dict[str, dict[str, Any]] = {
    "published, 32 bytes": {"kind": "sft", "rank": 8, "form": "float32"},
    "published, 128 bytes": {"kind": "sft", "rank": 32, "form": "float32"},
    "ours, 16 bytes": {"kind": "narrow", "rank": 14, "form": "int8"},
    "ours, 36 bytes": {"kind": "narrow", "rank": 34, "form": "int8"},
    "ours, 72 bytes": {"kind": "narrow", "rank": 70, "form": "int8"},
}
PLAIN = {"kind": "plain", "form": "float32"}
_EVALUATE = 64
_CALIBRATE = 16


class Sentences:
    """The sentences as tokens: the same for all."""

    def __init__(self, pretrained: Any) -> None:
        rows = [
            row for row in reviews(console.print).to_pylist() if row["domain"] == DOMAIN and row["label"] in CLASSES
        ]
        # By content: the file is in an order of its own, and equal sentences must not part.
        texts = sorted({row["text"]: row for row in rows}.items(), key=lambda it: _digest(it[0]))
        samples = encode_labelled(
            [row for _, row in texts],
            pretrained.tokenizer,
            text="text",
            pair=None,
            label="label",
            classes=CLASSES,
            max_length=MAX_LENGTH,
        )
        self.pad = int(pretrained.tokenizer.pad_token_id)
        self.train, test = samples[:TRAIN], samples[TRAIN : TRAIN + TEST]
        self.test = sorted(test, key=lambda sample: len(sample.ids))
        self.true = np.array([sample.label for sample in self.test])

    def batch(self, samples: Sequence[LabelledText]) -> Batch:
        """Of these."""
        return collate_labelled(samples, self.pad)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def recipe_of(split: int, cut: Mapping[str, Any], seed: int) -> SplitTuneRecipe:
    """One run."""
    return SplitTuneRecipe.parse({"model": MODEL, "seed": seed, "split": split, "cut": dict(cut), "epochs": EPOCHS})


class Unsplit:
    """The whole model in one piece, with the same head, loss, trainer and masks."""

    def __init__(self, model: PreTrainedModel, recipe: SplitTuneRecipe, total_steps: int) -> None:
        self.model = Segment(model)
        self.task = task_of(recipe, self.model, len(CLASSES))
        groups: dict[str, nn.Module] = {"model": self.model, "head": self.task.head}
        self.trainer = Trainer(groups, recipe.training, total_steps=total_steps, seed=recipe.seed)
        self._parts = {f"block {place}": block for place, block in enumerate(self.model.blocks)}
        self._parts["head"] = self.task.head

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimiser step; of one batch."""
        self.model.train()
        self.task.head.train()
        self.trainer.step(batches, self._loss)

    @torch.no_grad()
    def predict(self, batch: Batch) -> torch.Tensor:
        """The head's outputs, dropout off."""
        self.model.eval()
        self.task.head.eval()
        return self._outputs(batch)

    def _loss(self, batch: Batch) -> Loss:
        with drawing(self._parts, self.trainer.seed, self.trainer.step_index, 0):
            return self.task.loss(self._outputs(batch), batch)

    def _outputs(self, batch: Batch) -> torch.Tensor:
        rows = self.model.rows(batch.ids, valid=batch.valid, types=batch.types)
        if self.task.pooling != "rows":
            rows = pooled(rows, batch.valid, self.task.pooling)
        return self.task.outputs(rows, batch)


def hits(
    sentences: Sentences,
    recipe: SplitTuneRecipe,
    build: Callable[[int], Unsplit | Front],
    told: Callable[[float], None],
) -> tuple[np.ndarray, Unsplit | Front, SampleOrder]:
    """Train, and say which test sentences are then got right (n,); ``told`` hears what share of the steps is done."""
    order = SampleOrder([len(one.ids) for one in sentences.train], recipe.training.batch_size, recipe.seed)
    total = order.steps_per_epoch * recipe.epochs
    learner = build(total)
    for step in range(total):
        learner.step([sentences.batch([sentences.train[place] for place in order.indices(step)])])
        told((step + 1) / total)
    guesses = [
        learner.predict(sentences.batch(sentences.test[at : at + _EVALUATE])).argmax(dim=-1).numpy()
        for at in range(0, len(sentences.test), _EVALUATE)
    ]
    return np.concatenate(guesses) == sentences.true, learner, order


def bytes_of(sentences: Sentences, packings: Packings, order: SampleOrder, codes: Counter[str]) -> Counter[str]:
    """What a whole training run sends, by kind of message, with those that bring its codes."""
    lengths = [len(one.ids) for one in sentences.train]
    sizes = Counter(codes)
    for step in range(order.steps_per_epoch * EPOCHS):
        sizes += crossing(step, [[lengths[place] for place in order.indices(step)]], packings, "mean", Learning())
    return sizes


def run(as_json: bool = False, quick: bool = False) -> dict[str, Any]:
    """Print the table and return the figures; ``quick`` is one split and one seed."""
    splits, seeds = ((3,), SEEDS[:1]) if quick else (SPLITS, SEEDS)
    pretrained = load(MODEL, device="cpu", dtype="float32", notify=console.print)
    sentences = Sentences(pretrained)
    fresh = {name: tensor.clone() for name, tensor in weights_of(pretrained.model).items()}
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    crossed: dict[tuple[str, int], Counter[str]] = {}
    runs = [("unsplit", 0, PLAIN)] + [(name, split, cut) for split in splits for name, cut in CUTS.items()]
    total = len(runs) * len(seeds)
    with bars(100) as shown:
        for seed in seeds:
            for name, split, cut in runs:
                recipe = recipe_of(split or 1, cut, seed)

                def build(steps: int, name: str = name, recipe: SplitTuneRecipe = recipe) -> Unsplit | Front:
                    # Every learner begins with the pretrained weights, in modules of its own.
                    model = type(pretrained.model)(pretrained.model.config)
                    load_weights(model, fresh)
                    if name == "unsplit":
                        return Unsplit(model, recipe, steps)
                    some = [sentences.batch(sentences.train[at::100]) for at in range(_CALIBRATE)]
                    return assemble(model, recipe, some, classes=len(CLASSES), total_steps=steps)

                done = sum(map(len, found.values()))
                title = f"{name}, seed {seed}" if name == "unsplit" else f"{name}, split {split}, seed {seed}"
                right, learner, order = hits(
                    sentences,
                    recipe,
                    build,
                    lambda share, done=done, title=title: shown.move(  # type: ignore[misc]
                        "percent of all runs", round(100 * (done + share) / total), title
                    ),
                )
                found.setdefault((name, split), []).append(right)
                if isinstance(learner, Front):
                    width = int(pretrained.model.config.hidden_size)
                    codes = fitting([], learner.packings, width, first=cut["kind"] == "narrow", second=False)
                    crossed[name, split] = bytes_of(sentences, learner.packings, order, codes)
                    whole_rows = Packing("float32", width)
                    crossed["plain", 0] = bytes_of(sentences, Packings(whole_rows, whole_rows), order, Counter())
    return _tell(found, crossed, sentences, splits, seeds, as_json)


def _tell(
    found: Mapping[tuple[str, int], list[np.ndarray]],
    crossed: Mapping[tuple[str, int], Counter[str]],
    sentences: Sentences,
    splits: Sequence[int],
    seeds: Sequence[int],
    as_json: bool,
) -> dict[str, Any]:
    whole = np.stack(found["unsplit", 0])
    rows, table = [], []
    for (name, split), each in found.items():
        right = np.stack(each)
        first, second, total = per_cut(crossed.get((name, split), Counter()))
        apart, error = 100 * (right.mean() - whole.mean()), 100 * paired_standard_error(right, whole)
        rows.append(
            {
                "cut": name,
                "split": split or None,
                "accuracy": 100 * float(right.mean()),
                "points_from_unsplit": float(apart),
                "paired_standard_error": error,
                "first_cut_bytes": first,
                "second_cut_bytes": second,
                "total_bytes": total,
            }
        )
        table.append(
            [
                name,
                str(split or ""),
                f"{100 * right.mean():.2f}",
                f"{apart:+.2f} ± {error:.2f}" if split else "",
                *(f"{size / 1e6:,.2f}" if split else "" for size in (first, second, total)),
            ]
        )
    accuracy = {where: 100 * float(np.stack(each).mean()) for where, each in found.items()}
    deep = [split for split in splits if split != 1]
    result = {
        "rows": rows,
        "test_sentences": len(sentences.true),
        "seeds": len(seeds),
        "byte_ratio_36": min(
            per_cut(crossed["plain", 0])[0] / per_cut(crossed["ours, 36 bytes", split])[0] for split in splits
        ),
        "worst_drop_36": max(accuracy["unsplit", 0] - accuracy["ours, 36 bytes", split] for split in deep),
        "worst_gain_36": min(
            accuracy["ours, 36 bytes", split] - accuracy["published, 32 bytes", split] for split in splits
        ),
    }
    at_36 = (
        f"at 36 bytes: byte ratio {result['byte_ratio_36']:.1f}, worst drop {result['worst_drop_36']:+.2f} points, "
        f"worst gain {result['worst_gain_36']:+.2f} points"
    )
    title = f"MiniLM, {len(sentences.true):,} test sentences, {len(seeds)} seeds; MB of a whole training run; {at_36}"
    header = ["cut", "split", "accuracy, %", "points, paired", "first cut", "second cut", "in all"]
    show(title, header, table, result, as_json)
    return result
