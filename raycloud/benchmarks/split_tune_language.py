"""Split fine-tuning of SmolLM2 with adapters: perplexity against what crosses both cuts, beside the unsplit model.

All train adapters on the same texts of ``builtin:instruct``, one epoch, one schedule, the same order of samples and the
same dropout; the edge runs the first and the last few of thirty blocks. Held-out perplexity is that of the model as it
was trained: where there are cuts, through them. Bytes are of the whole run, codes, headers and lengths included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.benchmarks.split_tune import Unsplit
from raycloud.data.batches import SampleOrder
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.weights import load_weights, weights_of
from raycloud.report.console import bars, console
from raycloud.split.finetune.assembly import assemble, learning_of
from raycloud.split.finetune.crossing import crossing, fitting, per_cut
from raycloud.split.finetune.examples import calibration, examples_of, judge, lessons_of
from raycloud.split.finetune.front import Front, Learning
from raycloud.split.finetune.numbers import Packing, Packings
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.training.lora import adapt

MODEL = SMOLLM2
SPLIT, SECOND = 2, 28
TRAIN, TEST, BATCH, SEED = 256, 128, 8, 10
WORSE = 1.01
"""The perplexity, in unsplit ones, up to which a cut counts as harmless."""
BASE: dict[str, Any] = {
    "task": {"kind": "language", "format": "alpaca"},
    "lora": {"r": 16, "alpha": 32, "dropout": 0.05},
    "training": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 4},
    "epochs": 1,
}


def _both(**cut: Any) -> dict[str, Any]:
    return {"cut": cut, "back": cut}


def _int4(rank: int, *, trained: bool) -> dict[str, Any]:
    return _both(kind="narrow", rank=rank, outliers=4, form="int4", trained=trained)


CUTS: dict[str, dict[str, Any]] = {
    "rows in int8": _both(kind="plain", form="int8"),
    "rank 284, int8": _both(kind="narrow", rank=284, outliers=4, form="int8"),
    "rank 448, int4": _int4(448, trained=True),
    "rank 448, int4, codes fixed": _int4(448, trained=False),
    "rank 572, int4, first part and codes fixed": {**_int4(572, trained=False), "learning": "last+middle"},
    "rank 572, int4, first part fixed": {**_int4(572, trained=True), "learning": "last+middle"},
}
"""At each cut 4 coordinates cross as they are: without them the row at the first token spoils the scale of all."""
QUICK = ("rank 572, int4, first part and codes fixed",)
_CALIBRATE = 32
"""Texts that the codes are fitted to."""


def recipe_of(cut: Mapping[str, Any]) -> SplitTuneRecipe:
    """One run."""
    return SplitTuneRecipe.parse(
        {
            **BASE,
            "model": MODEL,
            "seed": SEED,
            "split": SPLIT,
            "second": SECOND,
            "data": {"source": "builtin:instruct", "max_length": 128, "limit": TRAIN, "held_out": TEST},
            "training": {**BASE["training"], "batch_size": BATCH},
            **cut,
        }
    )


class Bench:
    """The model and the texts that all runs share."""

    def __init__(self) -> None:
        self._pretrained = load(MODEL, device="cpu", dtype="float32", notify=console.print)
        self._fresh = {name: tensor.clone() for name, tensor in weights_of(self._pretrained.model).items()}
        recipe = recipe_of({})
        self.train, self.test, _ = examples_of(recipe, self._pretrained.tokenizer, console.print)
        self.order: SampleOrder = lessons_of(self.train, recipe).order
        self.steps = self.order.steps_per_epoch
        self.width = int(self._pretrained.model.config.hidden_size)
        self.calibration = calibration(self.train, _CALIBRATE)

    def learner(self, name: str) -> Unsplit | Front:
        """One that begins with the pretrained weights, in modules of its own."""
        model = type(self._pretrained.model)(self._pretrained.model.config)
        load_weights(model, self._fresh)
        recipe = recipe_of(CUTS.get(name, {}))
        if name in CUTS:
            return assemble(model, recipe, self.calibration, total_steps=self.steps)
        assert recipe.lora is not None
        adapt(Segment(model), recipe.lora, recipe.seed)
        return Unsplit(model, recipe, self.steps)

    def perplexity(self, learner: Unsplit | Front) -> float:
        """On the held-out texts."""
        return judge(learner.predict, self.test, recipe_of({}))["perplexity"]

    def crossed(self, packings: Packings, learning: Learning, codes: Counter[str]) -> Counter[str]:
        """Bytes of a whole run by kind of message, with those that bring its codes."""
        sizes = Counter(codes)
        for step in range(self.steps):
            lengths = [self.train.lengths[place] for place in self.order.indices(step)]
            sizes += crossing(step, [lengths], packings, "rows", learning)
        return sizes

    def crossed_by(self, name: str, packings: Packings) -> Counter[str]:
        """Of one of the cuts."""
        recipe = recipe_of(CUTS[name])
        narrow = {"first": recipe.cut.kind == "narrow", "second": recipe.back.kind == "narrow"}
        lengths = [batch.valid.sum(dim=1).tolist() for batch in self.calibration]
        return self.crossed(packings, learning_of(recipe), fitting(lengths, packings, self.width, **narrow))


def run(as_json: bool = False, quick: bool = False) -> dict[str, Any]:
    """Print the table and return the figures; ``quick`` is one of the cuts beside the unsplit model."""
    bench = Bench()
    names = ["unsplit", *(QUICK if quick else CUTS)]
    row = Packing("float32", bench.width)
    plain = bench.crossed(Packings(row, row), Learning(), Counter()).total()
    found: dict[str, float] = {}
    crossed: dict[str, Counter[str]] = {}
    before = 0.0
    with bars(len(names) * bench.steps) as shown:
        for number, name in enumerate(names):
            learner = bench.learner(name)
            if name == "unsplit":
                before = bench.perplexity(learner)
            for step in range(bench.steps):
                learner.step([bench.train.batch(bench.order.indices(step))])
                shown.move("steps of all runs", number * bench.steps + step + 1, name)
            found[name] = bench.perplexity(learner)
            if isinstance(learner, Front):
                crossed[name] = bench.crossed_by(name, learner.packings)
            del learner
    return _tell(found, crossed, before, plain, bench.steps, as_json)


def _tell(
    found: Mapping[str, float],
    crossed: Mapping[str, Counter[str]],
    before: float,
    plain: int,
    steps: int,
    as_json: bool,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, perplexity in found.items():
        first, second, total = per_cut(crossed.get(name, Counter()))
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
    header = ["cut", "perplexity", "of unsplit", "first cut", "second cut", "in all", "times fewer bytes"]
    reached = "none" if best is None else f"{best:.1f} times fewer bytes"
    title = (
        f"SmolLM2, adapters, {steps} steps from perplexity {before:.2f}; MB of the run, in plain float32 "
        f"{plain / 1e6:,.1f}; best within 1 %: {reached}"
    )
    show(title, header, [_line(row) for row in rows], result, as_json)
    return result


def _line(row: Mapping[str, Any]) -> list[str]:
    sizes = [row["first_cut_bytes"], row["second_cut_bytes"], row["total_bytes"]]
    return [
        row["cut"],
        f"{row['perplexity']:.3f}",
        f"{row['perplexity_ratio']:.4f}",
        *(f"{size / 1e6:,.2f}" if row["total_bytes"] else "" for size in sizes),
        f"{row['byte_ratio']:.2f}" if row["byte_ratio"] else "",
    ]
