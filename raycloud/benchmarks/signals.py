"""Cost of each kind of signal in bytes, and the error of the gradient that a student gets from it.

The teacher is SmolLM2. The student is 20 of its 30 blocks, evenly spaced and not trained further. The text is held out.
The gradient of the summed forward KL in the student's final hidden states is compared with the gradient from the
teacher's exact logits. For sampled signals, the mean over repeated draws is compared too: if there is no bias, its
error is about its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.data.batches import encode, length_sorted_batches
from raycloud.data.sources import load_rows
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives.forward_kl import ForwardKL, forward_kl
from raycloud.distill.signals import FrozenHead, Signal, SignalRecipe, compute_signal, frozen_head
from raycloud.models.cache import KVCache
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.surgery.extraction import extract
from raycloud.models.surgery.importance import evenly_spaced
from raycloud.report.console import console, progress_bars

SOURCE = "builtin:instruct"
BLOCKS = 20
TOKENS = 512
TEMPERATURES = (1.0, 2.0)
REPEATS = 12
"""Number of repeated draws whose gradients are averaged."""
QUICK = {"tokens": 48, "repeats": 2}
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


class CachedSegment(Segment):
    """Segment that caches its hidden states, so that it runs over each batch only once."""

    def hidden(
        self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None, types: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Segment.hidden`."""
        known: dict[int, Tensor] = self.__dict__.setdefault("_known", {})
        if id(x) not in known:
            known[id(x)] = super().hidden(x, valid=valid, cache=cache, types=types)
        return known[id(x)]


class SignalCase:
    """Teacher, student and held-out text, with the student's outputs.

    Args:
        model: teacher; also the source of the student's blocks.
        blocks: number of blocks of the student.
        tokens: number of response tokens.
    """

    def __init__(self, model: str, blocks: int, tokens: int) -> None:
        pretrained = load(model, device="cpu", dtype="float32", notify=console.print)
        total = pretrained.model.config.num_hidden_layers
        student = Segment(extract(pretrained.model, evenly_spaced(total, blocks)).requires_grad_(False))
        rows = load_rows(SOURCE, "test", console.print)
        samples = encode(rows[:tokens], pretrained.tokenizer, "chat", max_length=512, max_prompt_length=256)
        while sum(sample.targets for sample in samples[:-1]) >= tokens:
            samples.pop()
        self.teacher = CachedSegment(pretrained.model)
        self.batches = length_sorted_batches(samples, _BATCH, pad=0)
        with torch.no_grad():
            outputs = [StudentOutput.of(student, batch) for batch in self.batches]
        self.students = [replace(one, hidden=one.hidden.requires_grad_()) for one in outputs]
        self.count = sum(batch.targets for batch in self.batches)

    def head(self, recipe: SignalRecipe) -> FrozenHead | None:
        """Return the teacher's head, which hidden-state signals need; None for other kinds."""
        if recipe.kind != "hidden":
            return None
        return frozen_head(self.teacher, recipe.codec).to(torch.device("cpu"), torch.float32)

    def signals(self, recipe: SignalRecipe, temperature: float, name: str = SMOLLM2) -> list[Signal]:
        """Compute one signal per batch; another name gives other random draws."""
        return [compute_signal(self.teacher, name, batch, recipe, [temperature]) for batch in self.batches]

    def gradient(self, signals: Sequence[Signal], head: FrozenHead | None, temperature: float) -> Tensor:
        """Compute the gradient of the summed forward KL in the student's final hidden states, (n, d)."""
        objective = ForwardKL(temperature=temperature)
        parts = []
        for student, signal in zip(self.students, signals, strict=True):
            loss = weighted_sum([(1.0, objective)], student, TeacherOutput(signal, head))
            parts.append(torch.autograd.grad(loss.sum, student.hidden)[0])
        return torch.cat(parts)

    @torch.no_grad()
    def decoding_kl(self, recipe: SignalRecipe, temperature: float) -> float:
        """Compute KL(teacher ‖ decoded) in nats per token, for signals over the whole vocabulary."""
        pairs = zip(self.signals(_EXACT, temperature), self.signals(recipe, temperature), strict=True)
        total = 0.0
        for exact, coded in pairs:
            everything = slice(0, exact.count)
            p = exact.targets(everything, temperature, self.head(_EXACT)).log_p
            total += float(forward_kl(p, coded.targets(everything, temperature, self.head(recipe)).log_p).sum())
        return total / self.count


def cosine(found: Tensor, exact: Tensor) -> float:
    """Cosine similarity of two gradients, each flattened to a vector."""
    return float(torch.cosine_similarity(found.flatten().double(), exact.flatten().double(), dim=0))


def repeated(gradients: Sequence[Tensor], exact: Tensor) -> dict[str, float]:
    """Compare the mean of independent gradient estimates with the exact gradient.

    Returns:
        ``error``: mean error of one estimate. ``mean_error``: error of the mean. ``standard_error``: the error of the
        mean that sampling alone explains, √(Σ variance / repeats). All are relative to the norm of the exact gradient.
        ``repeats``: number of estimates.
    """
    stacked = torch.stack(list(gradients)).double()
    size = float(exact.double().norm())
    return {
        "error": float((stacked - exact).flatten(1).norm(dim=1).mean()) / size,
        "mean_error": float((stacked.mean(dim=0) - exact).norm()) / size,
        "standard_error": math.sqrt(float(stacked.var(dim=0).sum()) / len(stacked)) / size,
        "repeats": len(stacked),
    }


def evaluate(case: SignalCase, recipe: SignalRecipe, temperature: float, exact: Tensor, repeats: int) -> dict[str, Any]:
    """Measure one payload at one temperature."""
    signals, head = case.signals(recipe, temperature), case.head(recipe)
    measured: dict[str, Any] = {"bytes_per_token": sum(signal.nbytes for signal in signals) / case.count}
    if recipe.kind not in ForwardKL.requires.signals:
        return {**measured, "grad_cosine": None}
    found = case.gradient(signals, head, temperature)
    measured["grad_cosine"] = cosine(found, exact)
    if recipe.kind in ("hybrid", "sampled"):
        others = [
            case.gradient(case.signals(recipe, temperature, f"{SMOLLM2}, again {number}"), head, temperature)
            for number in range(1, repeats)
        ]
        return measured | repeated([found, *others], exact)
    measured["error"] = float((found - exact).norm() / exact.norm())
    if recipe.kind in ("hidden", "logits"):
        measured["decoding_kl"] = case.decoding_kl(recipe, temperature)
    return measured


def run(*, model: str = SMOLLM2, blocks: int = BLOCKS, tokens: int = TOKENS, repeats: int = REPEATS) -> Measured:
    """Measure every payload at every temperature."""
    case = SignalCase(model, blocks, tokens)
    measured: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in PAYLOADS}
    with progress_bars(len(TEMPERATURES) * len(PAYLOADS)) as shown:
        for nth, temperature in enumerate(TEMPERATURES):
            exact = case.gradient(case.signals(_EXACT, temperature), case.head(_EXACT), temperature)
            for number, (name, recipe) in enumerate(PAYLOADS.items()):
                measured[name][f"{temperature:g}"] = evaluate(case, recipe, temperature, exact, repeats)
                shown.move("payloads", nth * len(PAYLOADS) + number + 1, name)
    first = f"{TEMPERATURES[0]:g}"
    result = {
        "model": model,
        "tokens": case.count,
        "hidden_size": case.teacher.config.hidden_size,
        "payloads": {name: {**by[first], "temperatures": by} for name, by in measured.items()},
    }
    return _measured(result, repeats)


def _measured(result: dict[str, Any], repeats: int) -> Measured:
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
    header += [f"error of the mean of {repeats} (standard error)", "KL of decoding"]
    return Measured(f"{result['tokens']} held-out response tokens, forward KL", header, rows, result)
