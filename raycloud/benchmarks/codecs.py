"""What each codec of the link costs a real model: teacher-forced on held-out text, coded at both cuts.

Calibrated on the train split, judged on the test split of the same sources: chats of ``builtin:instruct``, sentences of
``builtin:reviews`` joined to passages. Every token of a text after its first is predicted and counts. The measures are
relative to the unsplit float32 model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.data.batches import IGNORE, Batch, in_length_order
from raycloud.link.codecs.boundary import Boundary
from raycloud.link.frames import HEADER_BYTES
from raycloud.models.loading import Pretrained, load
from raycloud.models.segments import Segment
from raycloud.report.console import bars, console, working
from raycloud.split.calibration import TOKENS, calibrate
from raycloud.split.crossing import crossed
from raycloud.split.passages import passages

SOURCES = ("builtin:instruct", "builtin:reviews")
PAIRS = ((1, 29), (2, 28), (4, 26), (6, 24), (8, 22), (10, 20), (5, 15), (15, 25))
JUDGED = ("int8", "int4")
"""Codecs with a target."""
BESIDE = ("float16", "bfloat16", "low-rank", "low-rank-int8")
"""Codecs that are shown beside them, on every fourth batch."""
TEST_TOKENS = 6_000

_BATCH = 16
_CHUNK = 256
Pair = tuple[int, int]


@dataclass
class Score:
    """Sums over predicted tokens, and over coded rows of both directions."""

    tokens: int = 0
    excess: float = 0.0
    """nats more than the unsplit model needs"""
    kl: float = 0.0
    agreed: int = 0
    coded_bytes: int = 0
    units: int = 0

    def figures(self) -> dict[str, float]:
        """The measures of one codec at one pair of cuts."""
        return {
            "bytes_per_unit": self.coded_bytes / self.units,
            "ppl_ratio": math.exp(self.excess / self.tokens),
            "top1_agreement": self.agreed / self.tokens,
            "kl": self.kl / self.tokens,
            "tokens": self.tokens,
        }


def _crossed(code: Boundary, rows: Tensor, valid: Tensor, score: Score) -> Tensor:
    sent = crossed(code, rows, valid)
    score.coded_bytes += sent.payload_bytes
    score.units += int(valid.sum()) * code.width
    return sent.rows


class Forced:
    """A model and the texts it is forced along, with the unsplit model's rows at every cut."""

    def __init__(self, pretrained: Pretrained, batches: Sequence[Batch], cuts: Sequence[int]) -> None:
        self.model, self.batches = pretrained.model, batches
        self.top = Segment(self.model, self.blocks, self.blocks)
        self.rows: dict[int, list[Tensor]] = {}
        running, before = [batch.ids for batch in batches], 0
        for cut in (*sorted(set(cuts)), self.blocks):
            part = Segment(self.model, before, cut, embed=not self.rows, head=False)
            running = [part.rows(rows, valid=batch.valid) for rows, batch in zip(running, batches, strict=True)]
            self.rows[cut], before = running, cut

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return int(self.model.config.num_hidden_layers)

    def judge(self, number: int, pair: Pair, codes: Mapping[str, tuple[Boundary, Boundary]]) -> dict[str, Score]:
        """One batch through one pair of cuts, once for each code (up, down)."""
        batch, (first, second) = self.batches[number], pair
        wanted = batch.labels != IGNORE
        middle = Segment(self.model, first, second, embed=False, head=False)
        tail = Segment(self.model, second, self.blocks, embed=False, head=False)
        scores = {name: Score() for name in codes}
        finals = {}
        for name, (up, down) in codes.items():
            rows = _crossed(up, self.rows[first][number], batch.valid, scores[name])
            rows = _crossed(down, middle.rows(rows, valid=batch.valid), batch.valid, scores[name])
            finals[name] = self.top.rows(tail.rows(rows, valid=batch.valid)[wanted][None])[0]
        unsplit, labels = self.top.rows(self.rows[self.blocks][number][wanted][None])[0], batch.labels[wanted]
        for at in range(0, len(labels), _CHUNK):
            chunk = slice(at, at + _CHUNK)
            reference = self.top.logits(unsplit[chunk]).log_softmax(dim=-1)
            for name, score in scores.items():
                _add(score, reference, self.top.logits(finals[name][chunk]).log_softmax(dim=-1), labels[chunk])
        return scores


def _add(score: Score, reference: Tensor, coded: Tensor, labels: Tensor) -> None:
    difference = reference - coded
    score.tokens += len(labels)
    score.excess += float(difference.gather(-1, labels[:, None]).double().sum())
    score.kl += float((reference.exp() * difference).sum(dim=-1).double().sum())
    score.agreed += int((reference.argmax(dim=-1) == coded.argmax(dim=-1)).sum())


def total(scores: Sequence[Score]) -> Score:
    """The sum of scores."""
    return Score(*(sum(getattr(score, field) for score in scores) for field in Score.__dataclass_fields__))


@torch.inference_mode()
def run(
    as_json: bool,
    *,
    model: str = SMOLLM2,
    pairs: Sequence[Pair] = PAIRS,
    train_tokens: int = TOKENS,
    test_tokens: int = TEST_TOKENS,
) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    pretrained = load(model, device="cpu", dtype="float32", notify=console.print)
    cuts = sorted({cut for pair in pairs for cut in pair})
    with working("calibration"):
        calibration = calibrate(pretrained.model, _texts(pretrained, "train", train_tokens), cuts)
    texts = _texts(pretrained, "test", test_tokens)
    batches = in_length_order(texts, _BATCH, pad=0)
    with working("unsplit"):
        forced = Forced(pretrained, batches, cuts)
    measured: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*JUDGED, *BESIDE)}
    with bars(len(batches) * len(pairs)) as shown:
        for nth, pair in enumerate(pairs):
            codes = {
                name: (calibration.boundary(name, pair[0]), calibration.boundary(name, pair[1])) for name in measured
            }
            parts: dict[str, list[Score]] = {name: [] for name in measured}
            for number in range(len(batches)):
                names = measured if number % 4 == 0 else JUDGED
                for name, score in forced.judge(number, pair, {name: codes[name] for name in names}).items():
                    parts[name].append(score)
                shown.move("batches", nth * len(batches) + number + 1, f"cuts {pair[0]} and {pair[1]}")
            for name, scores in parts.items():
                measured[name][f"{pair[0]}-{pair[1]}"] = total(scores).figures()
    result = {
        "model": model,
        "texts": len(texts),
        "tokens": sum(len(text.ids) for text in texts),
        "header_bytes": HEADER_BYTES,
        "codecs": measured,
        "best": {name: best(measured[name]) for name in JUDGED},
    }
    _show(result, as_json)
    return result


def best(by_pair: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Medians over cuts, and the pair of cuts with the highest perplexity."""
    worst = max(by_pair, key=lambda pair: by_pair[pair]["ppl_ratio"])
    medians = {key: statistics.median(of[key] for of in by_pair.values()) for key in ("bytes_per_unit", "ppl_ratio")}
    return {**medians, "worst": {"cuts": worst, **by_pair[worst]}}


def _texts(pretrained: Pretrained, split: Any, tokens: int) -> Any:
    return passages(SOURCES, split, pretrained.tokenizer, tokens, console.print)


def _show(result: Mapping[str, Any], as_json: bool) -> None:
    rows = [
        [
            f"{name} {pair}",
            f"{of['bytes_per_unit']:.4f}",
            f"{of['ppl_ratio']:.4f}",
            f"{of['top1_agreement']:.3f}",
            f"{of['kl']:.5f}",
            str(of["tokens"]),
        ]
        for name, by_pair in result["codecs"].items()
        for pair, of in by_pair.items()
    ]
    for name, of in result["best"].items():
        rows.append([f"{name} median", f"{of['bytes_per_unit']:.4f}", f"{of['ppl_ratio']:.4f}", "", "", ""])
    title = (
        f"{result['texts']} held-out texts of {result['tokens']} tokens; a frame's header of {HEADER_BYTES} bytes apart"
    )
    header = ["codec and cuts", "bytes per unit", "perplexity ratio", "top-1 agreement", "KL", "predicted tokens"]
    show(title, header, rows, result, as_json)
