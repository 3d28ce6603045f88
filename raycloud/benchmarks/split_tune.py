"""Split fine-tuning of MiniLM for sentiment: accuracy against bytes on the link, compared with the published cut.

All runs train on the same 2,000 sentences of movie reviews for two epochs, with the same schedule, heads and orders of
samples. The edge runs the first 1, 3 or 5 of six blocks. The cloud returns one hidden state per sentence in float32.
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

from raycloud.benchmarks.measure import Measured
from raycloud.data.batches import Batch, SampleOrder
from raycloud.data.labelled import LabelledText, collate_labelled, encode_labelled
from raycloud.data.reviews import reviews
from raycloud.evaluation.classification import paired_standard_error
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.weights import load_weights, weights_of
from raycloud.report.console import console, progress_bars
from raycloud.split.finetune.assembly import task_of
from raycloud.split.finetune.edge_trainer import EdgeTrainer, TrainableParts
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.sides import build_local_edge
from raycloud.split.finetune.tasks import pooled
from raycloud.split.finetune.traffic import bottleneck_traffic, bytes_by_cut, step_traffic
from raycloud.split.finetune.wire_format import WireFormat, WireFormats
from raycloud.training.loop import Loss, Trainer
from raycloud.training.seeding import seeded

MODEL, DOMAIN, CLASSES = "builtin:minilm-l6", "movie", ["negative", "positive"]
TRAIN, TEST, EPOCHS, MAX_LENGTH = 2000, 4000, 2, 64
SPLITS, SEEDS = (1, 3, 5), (10, 20, 30)
CUTS: dict[str, dict[str, Any]] = {
    "published, 32 bytes": {"kind": "sft", "rank": 8, "dtype": "float32"},
    "published, 128 bytes": {"kind": "sft", "rank": 32, "dtype": "float32"},
    "ours, 16 bytes": {"kind": "low_rank", "rank": 14, "dtype": "int8"},
    "ours, 36 bytes": {"kind": "low_rank", "rank": 34, "dtype": "int8"},
    "ours, 72 bytes": {"kind": "low_rank", "rank": 70, "dtype": "int8"},
}
PLAIN = {"kind": "plain", "dtype": "float32"}
_EVALUATE = 64
_CALIBRATE = 16
QUICK = {"splits": (3,), "seeds": SEEDS[:1], "train": 48, "test": 64, "epochs": 1}


class Sentences:
    """Tokenised sentences, the same for all runs.

    Args:
        pretrained: model whose tokenizer is used.
        train: number of training sentences.
        test: number of test sentences.
    """

    def __init__(self, pretrained: Any, train: int = TRAIN, test: int = TEST) -> None:
        rows = [
            row for row in reviews(console.print).to_pylist() if row["domain"] == DOMAIN and row["label"] in CLASSES
        ]
        # Order by a hash of the text: the file is sorted, and equal sentences must stay in the same split.
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
        self.train, held_out = samples[:train], samples[train : train + test]
        self.test = sorted(held_out, key=lambda sample: len(sample.ids))
        self.true = np.array([sample.label for sample in self.test])

    def batch(self, samples: Sequence[LabelledText]) -> Batch:
        """Collate sentences to a batch."""
        return collate_labelled(samples, self.pad)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def recipe_of(split: int, cut: Mapping[str, Any], seed: int, epochs: int = EPOCHS) -> SplitTuneRecipe:
    """Make the recipe of one run."""
    return SplitTuneRecipe.parse(
        {"model": MODEL, "seed": seed, "start_block": split, "uplink": dict(cut), "epochs": epochs}
    )


class Unsplit:
    """Unsplit model, with the same head, loss, trainer and dropout masks as a split one."""

    def __init__(self, model: PreTrainedModel, recipe: SplitTuneRecipe, total_steps: int) -> None:
        self.model = Segment(model)
        self.task = task_of(recipe, self.model, len(CLASSES))
        groups: dict[str, nn.Module] = {"model": self.model, "head": self.task.head}
        self.trainer = Trainer(groups, recipe.training, total_steps=total_steps, seed=recipe.seed)
        self._parts = {f"block {place}": block for place, block in enumerate(self.model.blocks)}
        self._parts["head"] = self.task.head

    def step(self, batches: Sequence[Batch]) -> None:
        """Take one optimiser step on one batch."""
        self.model.train()
        self.task.head.train()
        self.trainer.step(batches, self._loss)

    @torch.no_grad()
    def predict(self, batch: Batch) -> torch.Tensor:
        """Compute the outputs of the head, without dropout."""
        self.model.eval()
        self.task.head.eval()
        return self._outputs(batch)

    def _loss(self, batch: Batch) -> Loss:
        with seeded(self._parts, self.trainer.seed, self.trainer.step_index, 0):
            return self.task.loss(self._outputs(batch), batch)

    def _outputs(self, batch: Batch) -> torch.Tensor:
        hidden = self.model.hidden(batch.ids, valid=batch.valid, types=batch.types)
        if self.task.pooling != "none":
            hidden = pooled(hidden, batch.valid, self.task.pooling)
        return self.task.outputs(hidden, batch)


def correct_predictions(
    sentences: Sentences,
    recipe: SplitTuneRecipe,
    build: Callable[[int], Unsplit | EdgeTrainer],
    on_progress: Callable[[float], None],
) -> tuple[np.ndarray, Unsplit | EdgeTrainer, SampleOrder]:
    """Train a model and evaluate it on the test sentences.

    Args:
        sentences: training and test sentences.
        recipe: recipe of the run.
        build: makes the model, given the number of steps.
        on_progress: called after each step with the fraction of steps that are done.

    Returns:
        Which test sentences are classified correctly (n,), the trained model, and the order of samples.
    """
    order = SampleOrder([len(one.ids) for one in sentences.train], recipe.training.batch_size, recipe.seed)
    total = order.steps_per_epoch * recipe.epochs
    learner = build(total)
    for step in range(total):
        learner.step([sentences.batch([sentences.train[place] for place in order.indices(step)])])
        on_progress((step + 1) / total)
    guesses = [
        learner.predict(sentences.batch(sentences.test[at : at + _EVALUATE])).argmax(dim=-1).numpy()
        for at in range(0, len(sentences.test), _EVALUATE)
    ]
    return np.concatenate(guesses) == sentences.true, learner, order


def bytes_of(
    sentences: Sentences, wire_formats: WireFormats, order: SampleOrder, epochs: int, codes: Counter[str]
) -> Counter[str]:
    """Count the bytes of a whole training run by kind of message, including those in ``codes``."""
    lengths = [len(one.ids) for one in sentences.train]
    sizes = Counter(codes)
    for step in range(order.steps_per_epoch * epochs):
        sizes += step_traffic(
            step, [[lengths[place] for place in order.indices(step)]], wire_formats, "mean", TrainableParts()
        )
    return sizes


def run(
    *,
    splits: Sequence[int] = SPLITS,
    seeds: Sequence[int] = SEEDS,
    train: int = TRAIN,
    test: int = TEST,
    epochs: int = EPOCHS,
) -> Measured:
    """Train every cut at each split with each seed; ``train`` and ``test`` are numbers of sentences."""
    pretrained = load(MODEL, device="cpu", dtype="float32", notify=console.print)
    sentences = Sentences(pretrained, train, test)
    fresh = {name: tensor.clone() for name, tensor in weights_of(pretrained.model).items()}
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    traffic: dict[tuple[str, int], Counter[str]] = {}
    runs = [("unsplit", 0, PLAIN)] + [(name, split, cut) for split in splits for name, cut in CUTS.items()]
    total = len(runs) * len(seeds)
    with progress_bars(100) as shown:
        for seed in seeds:
            for name, split, cut in runs:
                recipe = recipe_of(split or 1, cut, seed, epochs)

                def build(steps: int, name: str = name, recipe: SplitTuneRecipe = recipe) -> Unsplit | EdgeTrainer:
                    # Every run starts from the pretrained weights, in new modules.
                    model = type(pretrained.model)(pretrained.model.config)
                    load_weights(model, fresh)
                    if name == "unsplit":
                        return Unsplit(model, recipe, steps)
                    some = [sentences.batch(sentences.train[at::100]) for at in range(_CALIBRATE)]
                    return build_local_edge(model, recipe, some, classes=len(CLASSES), total_steps=steps)

                done = sum(map(len, found.values()))
                title = f"{name}, seed {seed}" if name == "unsplit" else f"{name}, split {split}, seed {seed}"
                right, learner, order = correct_predictions(
                    sentences,
                    recipe,
                    build,
                    lambda share, done=done, title=title: shown.move(  # type: ignore[misc]
                        "percent of all runs", round(100 * (done + share) / total), title
                    ),
                )
                found.setdefault((name, split), []).append(right)
                if isinstance(learner, EdgeTrainer):
                    width = int(pretrained.model.config.hidden_size)
                    codes = bottleneck_traffic(
                        [], learner.wire_formats, width, uplink=cut["kind"] == "low_rank", downlink=False
                    )
                    traffic[name, split] = bytes_of(sentences, learner.wire_formats, order, epochs, codes)
                    whole_rows = WireFormat("float32", width)
                    traffic["plain", 0] = bytes_of(
                        sentences, WireFormats(whole_rows, whole_rows), order, epochs, Counter()
                    )
    return _measured(found, traffic, sentences, splits, seeds)


def _measured(
    found: Mapping[tuple[str, int], list[np.ndarray]],
    traffic: Mapping[tuple[str, int], Counter[str]],
    sentences: Sentences,
    splits: Sequence[int],
    seeds: Sequence[int],
) -> Measured:
    whole = np.stack(found["unsplit", 0])
    rows, table = [], []
    for (name, split), each in found.items():
        right = np.stack(each)
        first, second, total = bytes_by_cut(traffic.get((name, split), Counter()))
        points, error = 100 * (right.mean() - whole.mean()), 100 * paired_standard_error(right, whole)
        rows.append(
            {
                "cut": name,
                "split": split or None,
                "accuracy": 100 * float(right.mean()),
                "points_from_unsplit": float(points),
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
                f"{points:+.2f} ± {error:.2f}" if split else "",
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
            bytes_by_cut(traffic["plain", 0])[0] / bytes_by_cut(traffic["ours, 36 bytes", split])[0] for split in splits
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
    header = ["cut", "split", "accuracy, %", "points from unsplit", "first cut", "second cut", "total"]
    return Measured(title, header, table, result)
