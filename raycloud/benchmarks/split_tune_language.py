"""Split fine-tuning of SmolLM2 with adapters: perplexity against bytes across both cuts, and the unsplit model.

All runs train adapters on the same texts of ``builtin:instruct`` for one epoch, with the same schedule, order of
samples and dropout. The edge runs the first and the last few of thirty blocks. Held-out perplexity is that of the model
as trained: through the cuts if there are any. Bytes are those of the whole run, including bottlenecks, headers and
lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.benchmarks.split_tune import Unsplit
from raycloud.data.batches import SampleOrder
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.weights import load_weights, weights_of
from raycloud.report.console import console, progress_bars
from raycloud.split.finetune.assembly import trainable_parts
from raycloud.split.finetune.edge_trainer import EdgeTrainer, TrainableParts
from raycloud.split.finetune.examples import batch_schedule, calibration_batches, evaluate, load_examples
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.sides import build_local_edge
from raycloud.split.finetune.traffic import bottleneck_traffic, bytes_by_cut, step_traffic
from raycloud.split.finetune.wire_format import WireFormat, WireFormats
from raycloud.training.lora import add_segment_adapters

MODEL = SMOLLM2
SPLIT, SECOND = 2, 28
TRAIN, TEST, BATCH, SEED = 256, 128, 8, 10
WORSE = 1.01
"""Maximum ratio of the perplexity to that of the unsplit model for a cut to count as harmless."""
BASE: dict[str, Any] = {
    "task": {"kind": "language", "format": "alpaca"},
    "lora": {"r": 16, "alpha": 32, "dropout": 0.05},
    "training": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 4},
    "epochs": 1,
}


def _both(**cut: Any) -> dict[str, Any]:
    return {"uplink": cut, "downlink": cut}


def _int4(rank: int, *, trained: bool) -> dict[str, Any]:
    return _both(kind="low_rank", rank=rank, num_outliers=4, dtype="int4", trained=trained)


CUTS: dict[str, dict[str, Any]] = {
    "rows in int8": _both(kind="plain", dtype="int8"),
    "rank 284, int8": _both(kind="low_rank", rank=284, num_outliers=4, dtype="int8"),
    "rank 448, int4": _int4(448, trained=True),
    "rank 448, int4, codes fixed": _int4(448, trained=False),
    "rank 572, int4, first part and codes fixed": {**_int4(572, trained=False), "trainable": "last+middle"},
    "rank 572, int4, first part fixed": {**_int4(572, trained=True), "trainable": "last+middle"},
}
"""Cuts by name. Each sends 4 outlier coordinates uncompressed: otherwise the large hidden state at the first token
determines the quantisation scale of all."""
_CALIBRATE = 32
"""Number of texts to which the bottlenecks are fitted."""
QUICK = {"cuts": ("rank 572, int4, first part and codes fixed",), "texts": 16, "held_out": 8}


def recipe_of(cut: Mapping[str, Any], texts: int, held_out: int) -> SplitTuneRecipe:
    """Make the recipe of one run."""
    return SplitTuneRecipe.parse(
        {
            **BASE,
            "model": MODEL,
            "seed": SEED,
            "start_block": SPLIT,
            "end_block": SECOND,
            "data": {"source": "builtin:instruct", "max_length": 128, "limit": texts, "held_out_samples": held_out},
            "training": {**BASE["training"], "batch_size": BATCH},
            **cut,
        }
    )


class LanguageBench:
    """Model and texts that all runs share.

    Args:
        texts: number of training texts.
        held_out: number of held-out texts.
    """

    def __init__(self, texts: int = TRAIN, held_out: int = TEST) -> None:
        self._recipe_of = partial(recipe_of, texts=texts, held_out=held_out)
        self._pretrained = load(MODEL, device="cpu", dtype="float32", notify=console.print)
        self._fresh = {name: tensor.clone() for name, tensor in weights_of(self._pretrained.model).items()}
        recipe = self._recipe_of({})
        self.train, self.test, _ = load_examples(recipe, self._pretrained.tokenizer, console.print)
        self.order: SampleOrder = batch_schedule(self.train, recipe).order
        self.steps = self.order.steps_per_epoch
        self.width = int(self._pretrained.model.config.hidden_size)
        self.calibration = calibration_batches(self.train, _CALIBRATE)

    def learner(self, name: str) -> Unsplit | EdgeTrainer:
        """Build the model of one run from the pretrained weights, in new modules."""
        model = type(self._pretrained.model)(self._pretrained.model.config)
        load_weights(model, self._fresh)
        recipe = self._recipe_of(CUTS.get(name, {}))
        if name in CUTS:
            return build_local_edge(model, recipe, self.calibration, total_steps=self.steps)
        assert recipe.lora is not None
        add_segment_adapters(Segment(model), recipe.lora, recipe.seed)
        return Unsplit(model, recipe, self.steps)

    def perplexity(self, learner: Unsplit | EdgeTrainer) -> float:
        """Compute the perplexity on the held-out texts."""
        return evaluate(learner.predict, self.test, self._recipe_of({}))["perplexity"]

    def crossed(self, wire_formats: WireFormats, trainable: TrainableParts, codes: Counter[str]) -> Counter[str]:
        """Count the bytes of a whole run by kind of message, including those in ``codes``."""
        sizes = Counter(codes)
        for step in range(self.steps):
            lengths = [self.train.lengths[place] for place in self.order.indices(step)]
            sizes += step_traffic(step, [lengths], wire_formats, "none", trainable)
        return sizes

    def cut_traffic(self, name: str, wire_formats: WireFormats) -> Counter[str]:
        """Count the bytes of a whole run with one of the cuts."""
        recipe = self._recipe_of(CUTS[name])
        low_rank = {"uplink": recipe.uplink.kind == "low_rank", "downlink": recipe.downlink.kind == "low_rank"}
        lengths = [batch.valid.sum(dim=1).tolist() for batch in self.calibration]
        return self.crossed(
            wire_formats, trainable_parts(recipe), bottleneck_traffic(lengths, wire_formats, self.width, **low_rank)
        )


def run(*, cuts: Sequence[str] | None = None, texts: int = TRAIN, held_out: int = TEST) -> Measured:
    """Train the unsplit model and these cuts (default: all) on ``texts`` texts; evaluate on ``held_out`` texts."""
    bench = LanguageBench(texts, held_out)
    names = ["unsplit", *(CUTS if cuts is None else cuts)]
    row = WireFormat("float32", bench.width)
    plain = bench.crossed(WireFormats(row, row), TrainableParts(), Counter()).total()
    found: dict[str, float] = {}
    crossed: dict[str, Counter[str]] = {}
    before = 0.0
    with progress_bars(len(names) * bench.steps) as shown:
        for number, name in enumerate(names):
            learner = bench.learner(name)
            if name == "unsplit":
                before = bench.perplexity(learner)
            for step in range(bench.steps):
                learner.step([bench.train.batch(bench.order.indices(step))])
                shown.move("steps of all runs", number * bench.steps + step + 1, name)
            found[name] = bench.perplexity(learner)
            if isinstance(learner, EdgeTrainer):
                crossed[name] = bench.cut_traffic(name, learner.wire_formats)
            del learner
    return _measured(found, crossed, before, plain, bench.steps)


def _measured(
    found: Mapping[str, float], crossed: Mapping[str, Counter[str]], before: float, plain: int, steps: int
) -> Measured:
    rows: list[dict[str, Any]] = []
    for name, perplexity in found.items():
        first, second, total = bytes_by_cut(crossed.get(name, Counter()))
        rows.append(
            {
                "cut": name,
                "perplexity": perplexity,
                "perplexity_ratio": perplexity / found["unsplit"],
                "first_cut_bytes": first,
                "second_cut_bytes": second,
                "total_bytes": total,
                "byte_ratio": plain / total if total else None,
            }
        )
    best = max(
        (row["byte_ratio"] for row in rows if row["byte_ratio"] and row["perplexity_ratio"] <= WORSE), default=None
    )
    result = {
        "rows": rows,
        "best_byte_ratio_at_1_percent": best,
        "perplexity_before": before,
        "plain_float32_bytes": plain,
        "steps": steps,
    }
    header = ["cut", "perplexity", "relative to unsplit", "first cut", "second cut", "total", "times fewer bytes"]
    reached = "none" if best is None else f"{best:.1f} times fewer bytes"
    title = (
        f"SmolLM2, adapters, {steps} steps from perplexity {before:.2f}; MB of the run, in plain float32 "
        f"{plain / 1e6:,.1f}; best within 1 %: {reached}"
    )
    return Measured(title, header, [_line(row) for row in rows], result)


def _line(row: Mapping[str, Any]) -> list[str]:
    sizes = [row["first_cut_bytes"], row["second_cut_bytes"], row["total_bytes"]]
    return [
        row["cut"],
        f"{row['perplexity']:.3f}",
        f"{row['perplexity_ratio']:.4f}",
        *(f"{size / 1e6:,.2f}" if row["total_bytes"] else "" for size in sizes),
        f"{row['byte_ratio']:.2f}" if row["byte_ratio"] else "",
    ]
