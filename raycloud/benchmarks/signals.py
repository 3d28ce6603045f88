"""What each kind of signal costs in bytes and in the gradient that a student gets from it.

The teacher is SmolLM2, the student 20 of its 30 blocks at even distances, untrained; the text is held out. Compared is
the gradient of the summed forward KL in the student's final rows, with the one from the teacher's exact logits. Of what
is drawn, the mean over repeated draws is compared, too: without a bias its error is its standard error, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.data.batches import encode, in_length_order
from raycloud.data.sources import load_rows
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives.forward_kl import ForwardKL, forward_kl
from raycloud.distill.signals import FrozenHead, Signal, SignalRecipe, frozen_head, observe
from raycloud.models.cache import KVCache
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.surgery.extraction import extract
from raycloud.models.surgery.importance import evenly_spaced
from raycloud.report.console import bars, console

SOURCE = "builtin:instruct"
BLOCKS = 20
TOKENS = 512
TEMPERATURES = (1.0, 2.0)
REPEATS = 12
"""Draws of the teacher that are averaged."""
PAYLOADS = {
    "logits": SignalRecipe(kind="logits"),
    "hidden": SignalRecipe(kind="hidden"),
    "hidden-int8": SignalRecipe(kind="hidden", codec="int8"),
    "topk": SignalRecipe(kind="topk", k=64),
    "hybrid": SignalRecipe(kind="hybrid", k=32, draws=16),
    "sampled": SignalRecipe(kind="sampled", draws=50),
    "sorted": SignalRecipe(kind="sorted", k=64),
    "scalars": SignalRecipe(kind="scalars"),
}
_EXACT = SignalRecipe(kind="hidden", codec="float32")
_BATCH = 16


class Once(Segment):
    """A model that runs over each batch once, however often it is asked."""

    def rows(
        self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None, types: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Segment.rows`."""
        known: dict[int, Tensor] = self.__dict__.setdefault("_known", {})
        if id(x) not in known:
            known[id(x)] = super().rows(x, valid=valid, cache=cache, types=types)
        return known[id(x)]


class Case:
    """A teacher, a student, and the text both have read."""

    def __init__(self, model: str, blocks: int, tokens: int) -> None:
        pretrained = load(model, device="cpu", dtype="float32", notify=console.print)
        total = pretrained.model.config.num_hidden_layers
        student = Segment(extract(pretrained.model, evenly_spaced(total, blocks)).requires_grad_(False))
        rows = load_rows(SOURCE, "test", console.print)
        samples = encode(rows[:tokens], pretrained.tokenizer, "chat", max_length=512, max_prompt=256)
        while sum(sample.targets for sample in samples[:-1]) >= tokens:
            samples.pop()
        self.teacher = Once(pretrained.model)
        self.batches = in_length_order(samples, _BATCH, pad=0)
        with torch.no_grad():
            outputs = [StudentOutput.of(student, batch) for batch in self.batches]
        self.students = [replace(one, rows=one.rows.requires_grad_()) for one in outputs]
        self.count = sum(batch.targets for batch in self.batches)

    def head(self, recipe: SignalRecipe) -> FrozenHead | None:
        """What crosses once beside hidden rows."""
        if recipe.kind != "hidden":
            return None
        return frozen_head(self.teacher, recipe.codec).to(torch.device("cpu"), torch.float32)

    def signals(self, recipe: SignalRecipe, temperature: float, name: str = SMOLLM2) -> list[Signal]:
        """One for each batch; another name draws anew."""
        return [observe(self.teacher, name, batch, recipe, [temperature]) for batch in self.batches]

    def gradient(self, signals: Sequence[Signal], head: FrozenHead | None, temperature: float) -> Tensor:
        """Of the summed forward KL in the student's final rows (n, d)."""
        objective = ForwardKL(temperature=temperature)
        parts = []
        for student, signal in zip(self.students, signals, strict=True):
            loss = weighted_sum([(1.0, objective)], student, TeacherOutput(signal, head))
            parts.append(torch.autograd.grad(loss.sum, student.rows)[0])
        return torch.cat(parts)

    @torch.no_grad()
    def decoding_kl(self, recipe: SignalRecipe, temperature: float) -> float:
        """KL(teacher ‖ decoded) in nats a token, for signals over the whole vocabulary."""
        pairs = zip(self.signals(_EXACT, temperature), self.signals(recipe, temperature), strict=True)
        total = 0.0
        for exact, coded in pairs:
            everything = slice(0, exact.count)
            p = exact.targets(everything, temperature, self.head(_EXACT)).log_p
            total += float(forward_kl(p, coded.targets(everything, temperature, self.head(recipe)).log_p).sum())
        return total / self.count


def cosine(found: Tensor, exact: Tensor) -> float:
    """Of the angle between two gradients taken as one vector each."""
    return float(torch.cosine_similarity(found.flatten().double(), exact.flatten().double(), dim=0))


def repeated(gradients: Sequence[Tensor], exact: Tensor) -> dict[str, float]:
    """How far the mean of independent estimates is from the exact gradient, and how far chance alone would bring it.

    Both relative to the exact one. The standard error is √(Σ variance / repeats).
    """
    stacked = torch.stack(list(gradients)).double()
    size = float(exact.double().norm())
    return {
        "error": float((stacked - exact).flatten(1).norm(dim=1).mean()) / size,
        "mean_error": float((stacked.mean(dim=0) - exact).norm()) / size,
        "standard_error": math.sqrt(float(stacked.var(dim=0).sum()) / len(stacked)) / size,
        "repeats": len(stacked),
    }


def judge(case: Case, recipe: SignalRecipe, temperature: float, exact: Tensor) -> dict[str, Any]:
    """The measures of one payload at one temperature."""
    signals, head = case.signals(recipe, temperature), case.head(recipe)
    measured: dict[str, Any] = {"bytes_per_token": sum(signal.nbytes for signal in signals) / case.count}
    if recipe.kind not in ForwardKL.kinds:
        return {**measured, "grad_cosine": None}
    found = case.gradient(signals, head, temperature)
    measured["grad_cosine"] = cosine(found, exact)
    if recipe.kind in ("hybrid", "sampled"):
        others = [
            case.gradient(case.signals(recipe, temperature, f"{SMOLLM2}, again {number}"), head, temperature)
            for number in range(1, REPEATS)
        ]
        return measured | repeated([found, *others], exact)
    measured["error"] = float((found - exact).norm() / exact.norm())
    if recipe.kind in ("hidden", "logits"):
        measured["decoding_kl"] = case.decoding_kl(recipe, temperature)
    return measured


def run(as_json: bool, *, model: str = SMOLLM2, blocks: int = BLOCKS, tokens: int = TOKENS) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    case = Case(model, blocks, tokens)
    measured: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in PAYLOADS}
    with bars(len(TEMPERATURES) * len(PAYLOADS)) as shown:
        for nth, temperature in enumerate(TEMPERATURES):
            exact = case.gradient(case.signals(_EXACT, temperature), case.head(_EXACT), temperature)
            for number, (name, recipe) in enumerate(PAYLOADS.items()):
                measured[name][f"{temperature:g}"] = judge(case, recipe, temperature, exact)
                shown.move("payloads", nth * len(PAYLOADS) + number + 1, name)
    first = f"{TEMPERATURES[0]:g}"
    result = {
        "model": model,
        "tokens": case.count,
        "hidden_size": case.teacher.config.hidden_size,
        "payloads": {name: {**by[first], "temperatures": by} for name, by in measured.items()},
    }
    _show(result, as_json)
    return result


def _show(result: dict[str, Any], as_json: bool) -> None:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        [
            f"{name} {temperature}",
            f"{of['bytes_per_token']:.1f}",
            text(of["grad_cosine"], ".4f"),
            text(of.get("error"), ".4f"),
            f"{of['mean_error']:.4f} ({of['standard_error']:.4f})" if "mean_error" in of else "",
            text(of.get("decoding_kl"), ".1e"),
        ]
        for name, payload in result["payloads"].items()
        for temperature, of in payload["temperatures"].items()
    ]
    header = ["payload and temperature", "bytes per token", "cosine of gradient", "relative error"]
    header += [f"of the mean of {REPEATS} (standard error)", "KL of decoding"]
    show(f"{result['tokens']} held-out response tokens, forward KL", header, rows, result, as_json)
