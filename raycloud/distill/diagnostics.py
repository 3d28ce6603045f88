"""Diagnostics of a distillation run: what the data lost, and which loss terms still contribute.

A falling loss can come from one term alone, from a third of the tokens, or from a teacher whose targets carry no
information. These cases are found before training, or from a few numbers measured during it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import RowCounts
from raycloud.distill.alignment.pairs import AlignedSamples
from raycloud.distill.objective import Objective, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.recipe import ObjectiveRecipe
from raycloud.distill.signals import Targets

MIN_GRADIENT_SHARE = 0.01
"""Share of the gradient below which a term is reported as too weak: two micro-batches differ by more than this. The
published multi-cost program has terms of 1/300."""
MIN_ALIGNED_SHARE = 0.7
"""Least share of student tokens with a teacher token of the same bytes. Tokenizers in use reach 0.88 to 0.91; pairing
tokens by index reaches 0.23 to 0.29. Below this value more than 30 % of the student's tokens are not taught."""
MIN_COVERED_VOCAB = 0.6
"""Least share of the student's vocabulary that some teacher token maps to: 0.77 and 0.86 between tokenizers in use."""
MIN_ENTROPY = 0.05
"""Nats per token. A choice that is 99 % certain has this entropy; such targets add nothing to the text itself."""
MAX_ENTROPY_SHARE = 0.99
"""Share of the logarithm of the vocabulary size above which targets are noise. SmolLM2 reaches 0.81 at temperature 2
and 0.93 at temperature 3."""
MAX_TRUNCATED_PROMPTS = 0.05
"""Share of the prompts. Dolly has 4.8 % at 256 tokens; a larger share means that the limit does not fit the data."""


@dataclass(frozen=True)
class DataDiagnostics:
    """Facts about an edge's data before training. With one tokenizer every token has a partner."""

    samples: int
    dropped_empty: int
    """Rows whose response has no token to predict."""
    dropped_long: int
    """Rows whose prompt fills all of ``max_length``."""
    shortened_prompts: float
    """Share of the rows whose prompt was shortened."""
    unlike_prompts: float
    """Share of the rows whose prompt is written differently by the two chat templates."""
    exact_partners: float
    """Share of the student's labelled tokens for which a teacher token has exactly the same bytes."""
    shared_boundaries: float
    """Share of the student's token ends that are also token ends of the teacher."""
    student_vocabulary: float
    """Share of the student's vocabulary that some teacher token maps to."""
    teacher_vocabulary: float
    """Share of the teacher's vocabulary that maps to some student token."""
    shared_vocabulary: int
    """Number of vocabulary entries with the same bytes or the same special role."""
    eos_mapped: bool
    """True if the teacher's end-of-answer token maps to the student's."""
    student_specials: tuple[str, ...]
    """Special tokens that only the student's tokenizer has."""
    teacher_specials: tuple[str, ...]
    teacher_vocabulary_size: int
    """Size of the teacher's vocabulary."""

    @classmethod
    def of(
        cls,
        counts: RowCounts,
        teacher: PreTrainedTokenizerBase,
        student: PreTrainedTokenizerBase | None = None,
        pairs: AlignedSamples | None = None,
    ) -> DataDiagnostics:
        """Compute the diagnostics of encoded data.

        Args:
            counts: counts of kept, dropped and shortened rows.
            teacher: tokenizer of the teacher.
            student: tokenizer of the student if it differs from the teacher's.
            pairs: the data in the tokens of both models, if the tokenizers differ.
        """
        losses = (
            counts.kept,
            counts.empty,
            counts.crowded,
            counts.shortened / counts.rows,
            counts.unlike / counts.rows,
        )
        if student is None or pairs is None:
            return cls(*losses, 1.0, 1.0, 1.0, 1.0, len(teacher), True, (), (), len(teacher))
        partners = pairs.partners(range(len(pairs.student))) >= 0
        vocabulary, student_specials, teacher_specials = (
            pairs.map,
            student.all_special_tokens,
            teacher.all_special_tokens,
        )
        student_end, teacher_end = pairs.answer_ends
        start, stop = (0, 0) if teacher_end is None else vocabulary.offsets[teacher_end : teacher_end + 2].tolist()
        return cls(
            *losses,
            float(partners.double().mean()),
            pairs.alignment.chunks / len(pairs.alignment.student_group),
            float(vocabulary.covered.double().mean()),
            float((vocabulary.offsets.diff() > 0).double().mean()),
            int((vocabulary.distances == 0).sum()),
            student_end in vocabulary.student_ids[start:stop].tolist(),
            tuple(sorted({*student_specials} - {*teacher_specials})),
            tuple(sorted({*teacher_specials} - {*student_specials})),
            len(teacher),
        )


@dataclass(frozen=True)
class StepDiagnostics:
    """Measurements on the first micro-batch of a step."""

    step: int
    shares: dict[str, float]
    """Share of the gradient by term, see :func:`gradient_shares`."""
    entropy: float | None
    """Entropy of the teacher's targets in nats per token, see :func:`teacher_entropy`."""


def gradient_shares(
    objectives: Sequence[tuple[float, Objective]],
    student: StudentOutput,
    teacher: TeacherOutput | None = None,
    extras: Mapping[str, nn.Module] | None = None,
    *,
    chunk: int = 64,
) -> dict[str, float]:
    """Norm of each weighted term's gradient in the student's final hidden states, divided by the sum of these norms.

    Changes nothing: neither gradients nor the state of the extras. Returns an empty dict if no term has a gradient, or
    if one of the gradients is not finite.

    Args:
        objectives: see :func:`~raycloud.distill.objective.weighted_sum`, also for the other arguments.
    """
    frozen = {name: copy.deepcopy(module).requires_grad_(False) for name, module in (extras or {}).items()}
    norms = {one.name: _norm((weight, one), student, teacher, frozen, chunk) for weight, one in objectives}
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if 0 < total < math.inf else {}


def _norm(
    term: tuple[float, Objective],
    student: StudentOutput,
    teacher: TeacherOutput | None,
    extras: Mapping[str, nn.Module],
    chunk: int,
) -> float:
    hidden = student.hidden.detach().requires_grad_()
    loss = weighted_sum(
        [term], replace(student, hidden=hidden, head=_frozen_copy(student.head)), teacher, extras, chunk=chunk
    )
    (gradient,) = torch.autograd.grad(loss.sum, hidden)
    return float(gradient.double().norm())


def _frozen_copy(head: nn.Linear) -> nn.Linear:
    """Copy of the head without a gradient, because the head's gradient would be the most expensive part."""
    made = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    made.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    if head.bias is not None:
        made.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
    return made


@torch.no_grad()
def teacher_entropy(
    teacher: TeacherOutput, temperature: float, vocabulary_size: int, *, chunk: int = 64
) -> float | None:
    """Mean entropy of the teacher's targets in nats per token; None if the signal holds no distribution.

    Args:
        teacher: see :class:`~raycloud.distill.objective.TeacherOutput`.
        temperature: the objective's temperature.
        vocabulary_size: size of the teacher's vocabulary.
        chunk: number of tokens whose logits exist at a time.
    """
    signal = teacher.signal
    if signal.kind == "scalars" or not signal.count:
        return None
    slices = (slice(at, min(at + chunk, signal.count)) for at in range(0, signal.count, chunk))
    sums = [entropies(signal.targets(at, temperature, teacher.head), vocabulary_size).double().sum() for at in slices]
    return float(torch.stack(sums).sum()) / signal.count


def entropies(targets: Targets, vocabulary_size: int) -> Tensor:
    """Entropy (c,) in nats of distributions over a vocabulary of ``vocabulary_size`` entries.

    The tail of ``topk`` and ``sorted`` targets counts as spread evenly, so for these the result is an upper bound.
    """
    if targets.entropy is not None:
        return targets.entropy
    p = targets.log_p.exp()
    known = -(p * targets.log_p).sum(dim=-1)
    if targets.kind in ("topk", "sorted"):
        known += p[:, -1] * math.log(max(1, vocabulary_size - p.shape[-1] + 1))
    return known


def find_warnings(
    objective: ObjectiveRecipe, data: DataDiagnostics, steps: Sequence[StepDiagnostics] = ()
) -> dict[str, str]:
    """Problems found, one sentence each, by subject. Step measurements are averaged."""
    found: dict[str, str] = {}
    if data.shortened_prompts > MAX_TRUNCATED_PROMPTS:
        found["prompts"] = (
            f"{_percent(data.shortened_prompts)} of the prompts are shortened; raise data.max_prompt_length"
        )
    if not objective.kd_weight:
        return found
    if data.unlike_prompts:
        found["templates"] = (
            f"the teacher's template writes {_percent(data.unlike_prompts)} of the prompts in other words than the "
            "student's; data.format alpaca is the same for both"
        )
    if data.exact_partners < MIN_ALIGNED_SHARE:
        found["alignment"] = (
            f"the alignment is poor: {_percent(data.exact_partners)} of the student's tokens have a partner among the "
            "teacher's; objectives that compare token by token use only these"
        )
    if objective.needs.vocabulary_map:
        found |= _vocabulary(objective.kd.name, data)
    entropy = _mean([step.entropy for step in steps if step.entropy is not None])
    temperature = f"objective.kd.temperature {objective.kd.temperature:g}"
    if entropy is not None and entropy < MIN_ENTROPY:
        found["entropy"] = f"the teacher's entropy is only {entropy:.3f} nats a token: raise {temperature}"
    elif entropy is not None and entropy > MAX_ENTROPY_SHARE * (most := math.log(data.teacher_vocabulary_size)):
        found["entropy"] = (
            f"the teacher's targets are nearly uniform, {entropy:.2f} nats a token of {most:.2f} at most: "
            f"lower {temperature}, or see whether teacher.model is trained"
        )
    return found | _weak_terms(steps)


def _vocabulary(name: str, data: DataDiagnostics) -> dict[str, str]:
    found = {}
    if data.student_vocabulary < MIN_COVERED_VOCAB:
        found["vocabulary"] = (
            f"the teacher's vocabulary covers {_percent(data.student_vocabulary)} of the student's; "
            f"'{name}' teaches nothing about the rest"
        )
    if not data.eos_mapped:
        found["eos"] = f"no end of text is mapped to the student's; '{name}' does not teach it to stop"
    return found


def _weak_terms(steps: Sequence[StepDiagnostics]) -> dict[str, str]:
    names = dict.fromkeys(name for step in steps for name in step.shares)
    means = {name: _mean([step.shares[name] for step in steps if step.shares]) or 0.0 for name in names}
    return {
        f"weak/{name}": f"objective '{name}' contributes only {_percent(share)} of the gradient; "
        f"raise objective.{'ce_weight' if name == 'cross_entropy' else 'kd_weight'}"
        for name, share in means.items()
        if share < MIN_GRADIENT_SHARE
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class StudentDiagnostics:
    """Diagnostics that a student reports at the end of a round."""

    data: DataDiagnostics
    steps: tuple[StepDiagnostics, ...]
    warnings: dict[str, str]
    """Warning text by subject."""

    def after(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Merge with an edge's earlier report, as plain JSON: the newest numbers, and each warning in its first
        wording."""
        measured = {"shares": self.steps[-1].shares, "entropy": self.steps[-1].entropy} if self.steps else {}
        warned = {**self.warnings, **before.get("warnings", {})}
        return {"shares": {}, "entropy": None, **before, "data": asdict(self.data), **measured, "warnings": warned}


class DiagnosticsMonitor:
    """Measures the first micro-batch of selected steps and skips all others.

    Args:
        objective: gives the terms and the interval between measurements.
        vocabulary_size: size of the teacher's vocabulary.
    """

    def __init__(self, objective: ObjectiveRecipe, vocabulary_size: int) -> None:
        self._objective, self._vocabulary_size = objective, vocabulary_size
        self._step: int | None = None
        self.steps: list[StepDiagnostics] = []

    def begin(self, step: int) -> None:
        """Start an optimiser step."""
        every = self._objective.diagnostics_every
        self._step = step if every and step % every == 0 else None

    def observe(
        self, student: StudentOutput, teacher: TeacherOutput | None, extras: Mapping[str, nn.Module] | None
    ) -> None:
        """Measure a micro-batch if one is due."""
        if self._step is None:
            return
        shares = gradient_shares(self._objective.weighted(), student, teacher, extras)
        temperature = self._objective.kd.temperature
        entropy = None if teacher is None else teacher_entropy(teacher, temperature, self._vocabulary_size)
        self.steps.append(StepDiagnostics(self._step, shares, entropy))
        self._step = None

    def report(self, data: DataDiagnostics) -> StudentDiagnostics:
        """Combine the measured steps with the diagnostics of the data they were made from."""
        return StudentDiagnostics(data, tuple(self.steps), find_warnings(self._objective, data, self.steps))
