"""Cost of each link codec in perplexity: a real model, teacher-forced on held-out text, with coding at both cuts.

Codecs are calibrated on the train split and evaluated on the test split of the same sources: chats of
``builtin:instruct``, and sentences of ``builtin:reviews`` joined to passages. All tokens of a text except the first are
predicted and counted. The measures are relative to the unsplit float32 model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.data.batches import IGNORE, Batch, length_sorted_batches
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.models.loading import Pretrained, load
from raycloud.models.segments import Segment
from raycloud.report.console import console, progress_bars, timed
from raycloud.split.calibration import CALIBRATION_TOKENS, calibrate
from raycloud.split.calibration_texts import load_calibration_texts
from raycloud.split.codec_round_trip import codec_round_trip
from raycloud.split.inference.messages import STEP_BYTES

SOURCES = ("builtin:instruct", "builtin:reviews")
PAIRS = ((1, 29), (2, 28), (4, 26), (6, 24), (8, 22), (10, 20), (5, 15), (15, 25))
WITH_TARGET = ("int8", "int4")
"""Codecs for which the project sets a target."""
WITHOUT_TARGET = ("float16", "bfloat16")
"""Codecs measured for comparison, on every fourth batch."""
TEST_TOKENS = 6_000
QUICK = {"pairs": ((4, 26),), "train_tokens": 512, "test_tokens": 256}

_BATCH = 16
_CHUNK = 256
Pair = tuple[int, int]


@dataclass
class CodecScore:
    """Sums over predicted tokens, and over coded hidden states in both directions."""

    tokens: int = 0
    excess: float = 0.0
    """Negative log-likelihood in nats above that of the unsplit model."""
    kl: float = 0.0
    agreed: int = 0
    coded_bytes: int = 0
    units: int = 0

    def figures(self) -> dict[str, float]:
        """Compute the figures of one codec at one pair of cuts."""
        return {
            "bytes_per_unit": self.coded_bytes / self.units,
            "ppl_ratio": math.exp(self.excess / self.tokens),
            "top1_agreement": self.agreed / self.tokens,
            "kl": self.kl / self.tokens,
            "tokens": self.tokens,
        }


def _sent(codec: CutCodec, hidden: Tensor, valid: Tensor, score: CodecScore) -> Tensor:
    sent = codec_round_trip(codec, hidden, valid)
    score.coded_bytes += sent.payload_bytes
    score.units += int(valid.sum()) * codec.width
    return sent.hidden


class TeacherForced:
    """Model and texts for teacher forcing, with the hidden states of the unsplit model at each cut.

    Args:
        pretrained: model.
        batches: texts.
        cuts: indices of the blocks at which the model is cut.
    """

    def __init__(self, pretrained: Pretrained, batches: Sequence[Batch], cuts: Sequence[int]) -> None:
        self.model, self.batches = pretrained.model, batches
        self.top = Segment(self.model, self.blocks, self.blocks)
        self.hidden: dict[int, list[Tensor]] = {}
        running, before = [batch.ids for batch in batches], 0
        for cut in (*sorted(set(cuts)), self.blocks):
            part = Segment(self.model, before, cut, embed=not self.hidden, head=False)
            running = [part.hidden(hidden, valid=batch.valid) for hidden, batch in zip(running, batches, strict=True)]
            self.hidden[cut], before = running, cut

    @property
    def blocks(self) -> int:
        """Number of blocks of the model."""
        return int(self.model.config.num_hidden_layers)

    def evaluate(
        self, number: int, pair: Pair, codecs: Mapping[str, tuple[CutCodec, CutCodec]]
    ) -> dict[str, CodecScore]:
        """Evaluate one batch at one pair of cuts with each codec.

        Args:
            number: index of the batch.
            pair: the two cuts.
            codecs: codecs (to the cloud, to the edge) by name.

        Returns:
            Sums over the predicted tokens, by name of the codec.
        """
        batch, (first, second) = self.batches[number], pair
        wanted = batch.labels != IGNORE
        middle = Segment(self.model, first, second, embed=False, head=False)
        tail = Segment(self.model, second, self.blocks, embed=False, head=False)
        scores = {name: CodecScore() for name in codecs}
        finals = {}
        for name, (uplink, downlink) in codecs.items():
            hidden = _sent(uplink, self.hidden[first][number], batch.valid, scores[name])
            hidden = _sent(downlink, middle.hidden(hidden, valid=batch.valid), batch.valid, scores[name])
            finals[name] = self.top.hidden(tail.hidden(hidden, valid=batch.valid)[wanted][None])[0]
        unsplit, labels = self.top.hidden(self.hidden[self.blocks][number][wanted][None])[0], batch.labels[wanted]
        for at in range(0, len(labels), _CHUNK):
            chunk = slice(at, at + _CHUNK)
            reference = self.top.logits(unsplit[chunk]).log_softmax(dim=-1)
            for name, score in scores.items():
                _add(score, reference, self.top.logits(finals[name][chunk]).log_softmax(dim=-1), labels[chunk])
        return scores


def _add(score: CodecScore, reference: Tensor, coded: Tensor, labels: Tensor) -> None:
    difference = reference - coded
    score.tokens += len(labels)
    score.excess += float(difference.gather(-1, labels[:, None]).double().sum())
    score.kl += float((reference.exp() * difference).sum(dim=-1).double().sum())
    score.agreed += int((reference.argmax(dim=-1) == coded.argmax(dim=-1)).sum())


def total(scores: Sequence[CodecScore]) -> CodecScore:
    """Add scores up."""
    return CodecScore(*(sum(getattr(score, field) for score in scores) for field in CodecScore.__dataclass_fields__))


@torch.inference_mode()
def run(
    *,
    model: str = SMOLLM2,
    pairs: Sequence[Pair] = PAIRS,
    train_tokens: int = CALIBRATION_TOKENS,
    test_tokens: int = TEST_TOKENS,
) -> Measured:
    """Measure every codec at every pair of cuts."""
    pretrained = load(model, device="cpu", dtype="float32", notify=console.print)
    cuts = sorted({cut for pair in pairs for cut in pair})
    with timed("calibration"):
        calibration = calibrate(pretrained.model, _texts(pretrained, "train", train_tokens), cuts)
    texts = _texts(pretrained, "test", test_tokens)
    batches = length_sorted_batches(texts, _BATCH, pad=0)
    with timed("unsplit"):
        forced = TeacherForced(pretrained, batches, cuts)
    measured: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*WITH_TARGET, *WITHOUT_TARGET)}
    with progress_bars(len(batches) * len(pairs)) as shown:
        for nth, pair in enumerate(pairs):
            codecs = {
                name: (calibration.cut_codec(name, pair[0]), calibration.cut_codec(name, pair[1])) for name in measured
            }
            parts: dict[str, list[CodecScore]] = {name: [] for name in measured}
            for number in range(len(batches)):
                names = measured if number % 4 == 0 else WITH_TARGET
                for name, score in forced.evaluate(number, pair, {name: codecs[name] for name in names}).items():
                    parts[name].append(score)
                shown.move("batches", nth * len(batches) + number + 1, f"cuts {pair[0]} and {pair[1]}")
            for name, scores in parts.items():
                measured[name][f"{pair[0]}-{pair[1]}"] = total(scores).figures()
    result = {
        "model": model,
        "texts": len(texts),
        "tokens": sum(len(text.ids) for text in texts),
        "header_bytes": STEP_BYTES,
        "codecs": measured,
        "best": {name: best(measured[name]) for name in WITH_TARGET},
    }
    return _measured(result)


def best(by_pair: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Compute medians over the pairs of cuts, and find the pair with the highest perplexity."""
    worst = max(by_pair, key=lambda pair: by_pair[pair]["ppl_ratio"])
    medians = {key: statistics.median(of[key] for of in by_pair.values()) for key in ("bytes_per_unit", "ppl_ratio")}
    return {**medians, "worst": {"cuts": worst, **by_pair[worst]}}


def _texts(pretrained: Pretrained, split: Any, tokens: int) -> Any:
    return load_calibration_texts(SOURCES, split, pretrained.tokenizer, tokens, console.print)


def _measured(result: Mapping[str, Any]) -> Measured:
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
        f"{result['texts']} held-out texts of {result['tokens']} tokens; without frame headers of {STEP_BYTES} bytes"
    )
    header = ["codec and cuts", "bytes per element", "perplexity ratio", "top-1 agreement", "KL", "predicted tokens"]
    return Measured(title, header, rows, result)
