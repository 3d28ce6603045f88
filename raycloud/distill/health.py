"""Whether a distillation can teach what it is meant to: what its data lost, and which of its terms still pull.

A run whose loss falls may yet learn from one term alone, from a third of the tokens, or from a teacher that says
nothing. All of this can be seen beforehand or from a few numbers on the way.
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

from raycloud.data.batches import Tally
from raycloud.distill.objective import Objective, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives.dskd import DSKD
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.pairs import Pairs
from raycloud.distill.recipe import ObjectiveRecipe
from raycloud.distill.signals import Targets

DWARFED = 0.01
"""Share of the gradient: two micro-batches differ by more. The published multi-cost code has terms of 1/300."""
POOR_ALIGNMENT = 0.7
"""Student's tokens with a partner: 0.88 to 0.91 between tokenizers in use, 0.23 to 0.29 where tokens are paired by
their index; below, a third of the text and more teaches nothing."""
POOR_VOCABULARY = 0.6
"""Student's words that some word of the teacher stands for: 0.77 and 0.86 between tokenizers in use."""
ONE_HOT = 0.05
"""Nats: as much as a choice that is 99 % sure. Such targets say no more than the text does."""
FLAT = 0.99
"""Of the logarithm of the vocabulary: such targets are noise. SmolLM2's have 0.81 at temperature 2, 0.93 at 3."""
SHORTENED = 0.05
"""Of the prompts: more than the 4.8 % of Dolly's at 256 tokens means a limit that does not fit the data."""
_MAPPING = (MinED, DSKD)
"""Objectives that go through a map between the vocabularies."""


@dataclass(frozen=True)
class DataHealth:
    """What can be said of an edge's data before it is trained on. With one tokenizer everything has its partner."""

    samples: int
    dropped_empty: int
    """Rows whose response leaves no token to predict."""
    dropped_long: int
    """Rows whose prompt takes all of ``max_length``."""
    shortened_prompts: float
    """Share of the rows."""
    unlike_prompts: float
    """Share of the rows whose prompts the two templates write differently."""
    exact_partners: float
    """Share of the student's labelled tokens that a token of the teacher has exactly the bytes of."""
    shared_boundaries: float
    """Share of the student's token ends that are token ends of the teacher."""
    student_words: float
    """Share of the student's words that some word of the teacher stands for."""
    teacher_words: float
    """Share of the teacher's words that stand for some word of the student."""
    shared_words: int
    """Words of the same bytes or the same role."""
    eos_mapped: bool
    """Whether the teacher's end of text stands for the student's."""
    student_specials: tuple[str, ...]
    """Special tokens that only the student has."""
    teacher_specials: tuple[str, ...]
    vocabulary: int
    """Words of the teacher."""

    @classmethod
    def of(
        cls,
        tally: Tally,
        teacher: PreTrainedTokenizerBase,
        student: PreTrainedTokenizerBase | None = None,
        pairs: Pairs | None = None,
    ) -> DataHealth:
        """That of encoded data.

        Args:
            tally: what became of the rows.
            teacher: its tokenizer.
            student: its tokenizer where it is another.
            pairs: the data in both models' tokens where those differ.
        """
        losses = (tally.kept, tally.empty, tally.crowded, tally.shortened / tally.rows, tally.unlike / tally.rows)
        if student is None or pairs is None:
            return cls(*losses, 1.0, 1.0, 1.0, 1.0, len(teacher), True, (), (), len(teacher))
        partners = pairs.partners(range(len(pairs.student))) >= 0
        words, ours, theirs = pairs.map, student.all_special_tokens, teacher.all_special_tokens
        start, stop = words.offsets[teacher.eos_token_id : teacher.eos_token_id + 2].tolist()
        return cls(
            *losses,
            float(partners.double().mean()),
            pairs.alignment.chunks / len(pairs.alignment.student_group),
            float(words.covered.double().mean()),
            float((words.offsets.diff() > 0).double().mean()),
            int((words.distances == 0).sum()),
            student.eos_token_id in words.student_ids[start:stop].tolist(),
            tuple(sorted({*ours} - {*theirs})),
            tuple(sorted({*theirs} - {*ours})),
            len(teacher),
        )


@dataclass(frozen=True)
class StepHealth:
    """What the first micro-batch of a step tells."""

    step: int
    shares: dict[str, float]
    """Of each term, see :func:`gradient_shares`."""
    entropy: float | None
    """Of the teacher, see :func:`teacher_entropy`."""


def gradient_shares(
    objectives: Sequence[tuple[float, Objective]],
    student: StudentOutput,
    teacher: TeacherOutput | None = None,
    extras: Mapping[str, nn.Module] | None = None,
    *,
    chunk: int = 64,
) -> dict[str, float]:
    """The norm of each weighted term's gradient in the student's final rows, over the sum of these norms.

    Nothing is changed by it, neither gradients nor what the extras remember. Empty where no term pulls, or one is not
    finite.

    Args:
        objectives: as in :func:`~raycloud.distill.objective.weighted_sum`, and so are all others.
    """
    still = {name: copy.deepcopy(module).requires_grad_(False) for name, module in (extras or {}).items()}
    norms = {one.name: _norm((weight, one), student, teacher, still, chunk) for weight, one in objectives}
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if 0 < total < math.inf else {}


def _norm(
    term: tuple[float, Objective],
    student: StudentOutput,
    teacher: TeacherOutput | None,
    extras: Mapping[str, nn.Module],
    chunk: int,
) -> float:
    rows = student.rows.detach().requires_grad_()
    loss = weighted_sum([term], replace(student, rows=rows, head=_still(student.head)), teacher, extras, chunk=chunk)
    (gradient,) = torch.autograd.grad(loss.sum, rows)
    return float(gradient.double().norm())


def _still(head: nn.Linear) -> nn.Linear:
    """The same head as a constant: its gradient would be the dearest part."""
    made = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    made.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    if head.bias is not None:
        made.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
    return made


@torch.no_grad()
def teacher_entropy(teacher: TeacherOutput, temperature: float, words: int, *, chunk: int = 64) -> float | None:
    """Nats a token of what the teacher says at a temperature; None where a signal knows of no distribution.

    Args:
        teacher: see :class:`~raycloud.distill.objective.TeacherOutput`.
        temperature: the objective's.
        words: of the teacher's vocabulary.
        chunk: tokens whose logits exist at a time.
    """
    signal = teacher.signal
    if signal.kind == "scalars" or not signal.count:
        return None
    places = (slice(at, min(at + chunk, signal.count)) for at in range(0, signal.count, chunk))
    sums = [entropies(signal.targets(at, temperature, teacher.head), words).double().sum() for at in places]
    return float(torch.stack(sums).sum()) / signal.count


def entropies(targets: Targets, words: int) -> Tensor:
    """Nats (c,) of a distribution over ``words`` words.

    What is known as one mass counts as spread evenly, so that this is the most it can be: for ``topk`` and ``sorted``.
    """
    if targets.entropy is not None:
        return targets.entropy
    p = targets.log_p.exp()
    known = -(p * targets.log_p).sum(dim=-1)
    if targets.kind in ("topk", "sorted"):
        known += p[:, -1] * math.log(max(1, words - p.shape[-1] + 1))
    return known


def warnings(objective: ObjectiveRecipe, data: DataHealth, steps: Sequence[StepHealth] = ()) -> dict[str, str]:
    """What is wrong, in a sentence each, by what it is about; averages over the steps."""
    found: dict[str, str] = {}
    if data.shortened_prompts > SHORTENED:
        found["prompts"] = f"{_percent(data.shortened_prompts)} of the prompts are shortened; raise data.max_prompt"
    if not objective.kd_weight:
        return found
    if data.unlike_prompts:
        found["templates"] = (
            f"the teacher's template writes {_percent(data.unlike_prompts)} of the prompts in other words than the "
            "student's; data.format alpaca is the same for both"
        )
    if data.exact_partners < POOR_ALIGNMENT:
        found["alignment"] = (
            f"the alignment is poor: {_percent(data.exact_partners)} of the student's tokens have a partner among the "
            "teacher's; what goes token by token learns from these alone"
        )
    if isinstance(objective.kd, _MAPPING):
        found |= _vocabulary(objective.kd.name, data)
    entropy = _mean([step.entropy for step in steps if step.entropy is not None])
    temperature = f"objective.kd.temperature {objective.kd.temperature:g}"
    if entropy is not None and entropy < ONE_HOT:
        found["entropy"] = f"the teacher is sure of itself, {entropy:.3f} nats a token: raise {temperature}"
    elif entropy is not None and entropy > FLAT * (most := math.log(data.vocabulary)):
        found["entropy"] = (
            f"the teacher says next to nothing, {entropy:.2f} nats a token of {most:.2f} at most: "
            f"lower {temperature}, or see whether teacher.model is trained"
        )
    return found | _dwarfed(steps)


def _vocabulary(name: str, data: DataHealth) -> dict[str, str]:
    found = {}
    if data.student_words < POOR_VOCABULARY:
        found["vocabulary"] = (
            f"the teacher's words stand for {_percent(data.student_words)} of the student's; "
            f"'{name}' teaches nothing about the others"
        )
    if not data.eos_mapped:
        found["eos"] = f"no end of text is mapped to the student's; '{name}' does not teach it to stop"
    return found


def _dwarfed(steps: Sequence[StepHealth]) -> dict[str, str]:
    names = dict.fromkeys(name for step in steps for name in step.shares)
    means = {name: _mean([step.shares[name] for step in steps if step.shares]) or 0.0 for name in names}
    return {
        f"dwarfed/{name}": f"objective '{name}' is dwarfed: its gradient is {_percent(share)} of the sum; "
        f"raise objective.{'ce_weight' if name == 'cross_entropy' else 'kd_weight'}"
        for name, share in means.items()
        if share < DWARFED
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Health:
    """What a student reports of a round."""

    data: DataHealth
    steps: tuple[StepHealth, ...]
    warnings: dict[str, str]
    """By what they are about."""

    def after(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """All that is known of an edge, as plain JSON: the newest numbers, and each warning as it was first given."""
        measured = {"shares": self.steps[-1].shares, "entropy": self.steps[-1].entropy} if self.steps else {}
        told = {**self.warnings, **before.get("warnings", {})}
        return {"shares": {}, "entropy": None, **before, "data": asdict(self.data), **measured, "warnings": told}


class Monitor:
    """Measures the first micro-batch of some steps, and leaves all others alone.

    Args:
        objective: which terms, and how often.
        words: of the teacher's vocabulary.
    """

    def __init__(self, objective: ObjectiveRecipe, words: int) -> None:
        self._objective, self._words = objective, words
        self._step: int | None = None
        self.steps: list[StepHealth] = []

    def begin(self, step: int) -> None:
        """An optimiser step begins."""
        every = self._objective.health_every
        self._step = step if every and step % every == 0 else None

    def look(
        self, student: StudentOutput, teacher: TeacherOutput | None, extras: Mapping[str, nn.Module] | None
    ) -> None:
        """At a micro-batch."""
        if self._step is None:
            return
        shares = gradient_shares(self._objective.weighted(), student, teacher, extras)
        temperature = self._objective.kd.temperature
        entropy = None if teacher is None else teacher_entropy(teacher, temperature, self._words)
        self.steps.append(StepHealth(self._step, shares, entropy))
        self._step = None

    def report(self, data: DataHealth) -> Health:
        """With the data that the steps were made of."""
        return Health(data, tuple(self.steps), warnings(self._objective, data, self.steps))
