"""Comparison of each objective with its dense formulation: logits at every padded position, masked at the end.

The sizes are those of GPT-2 learning from Qwen1.5-1.8B: batch 4, length 512, 16 % of the positions labelled,
vocabularies of 50,257 and 151,936 tokens, hidden sizes of 768 and 2,048. Both formulations get the same inputs and give
the same loss and the same gradients of the student's hidden states, its head and any other trained parameters.
Divergences over one vocabulary use the student's for both models. Approximations have table rows of their own, with
their difference.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from raycloud.benchmarks.measure import Measured, in_subprocess, interleaved, median_ratio, peak_growth_mb
from raycloud.data.batches import IGNORE
from raycloud.distill.multi_level import multi_level, sequence_ranking
from raycloud.distill.objective import ModelSizes, Objective, StudentOutput, TeacherOutput, TokenIds, weighted_sum
from raycloud.distill.objectives import DIVERGENCES, CrossEntropy
from raycloud.distill.objectives.dskd import DSKD, FittedProjectors, Projectors
from raycloud.distill.objectives.dskd_cma import DSKDCMA, CrossAttentionProjectors, unit_rms
from raycloud.distill.objectives.mcw_kd import MCWKD, MCWKDExtras
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.objectives.multi_level_ot import MultiLevelOT
from raycloud.distill.objectives.uld import ULD
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.link.codecs.floats import CODECS
from raycloud.report.console import timed

LABELLED = 0.16


@dataclass(frozen=True)
class Shape:
    """Sizes of batch, vocabularies and models; the first ``shared`` tokens of both vocabularies are the same."""

    batch: int
    length: int
    student_vocab: int
    teacher_vocab: int
    student_width: int
    teacher_width: int
    shared: int


SHAPES = {
    "full": Shape(4, 512, 50_257, 151_936, 768, 2_048, shared=42_000),
    "middle": Shape(2, 256, 8_000, 12_000, 64, 96, shared=6_000),
    "small": Shape(2, 128, 900, 1_300, 24, 40, shared=700),
}
QUICK = {"names": ("uld",), "size": "middle", "pairs": 1}
_TAU = 2.0
_DENSE = "dense"
PAIRS = 3
"""Number of pairs: few, because a dense formulation over two vocabularies takes up to a minute."""

Found = list[Tensor]
"""Loss and its gradients."""

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "cross_entropy": CrossEntropy,
    **{name: partial(made, temperature=_TAU) for name, made in DIVERGENCES.items()},
    "uld": lambda: ULD(k=None),
    "uld top-128": lambda: ULD(k=128),
    "mined": lambda: MinED(temperature=_TAU),
    "mined top-128": lambda: MinED(temperature=_TAU, k=128),
    "dskd v1": lambda: DSKD(version=1, temperature=_TAU),
    "dskd v2": lambda: DSKD(temperature=_TAU),
    "dskd_cma": lambda: DSKDCMA(temperature=_TAU),
    "multi_level_ot": MultiLevelOT,
    "mcw_kd": lambda: MCWKD(temperature=_TAU),
}
EXACT = tuple(name for name in OBJECTIVES if " top-" not in name)
"""Objectives that are not approximations of another one."""


class _SharedVocabulary:
    """Mapping between vocabularies: their first tokens are shared, and every third other teacher token maps to one."""

    def __init__(self, shape: Shape) -> None:
        same = torch.arange(shape.shared)
        others = torch.arange(shape.shared, shape.teacher_vocab, 3)
        self.shared = (same, same)
        self.entries = (
            torch.cat([same, others % shape.shared]),
            torch.cat([same, others]),
            torch.ones(shape.shared + len(others)),
        )


class ObjectiveCase:
    """Inputs of one objective.

    Args:
        name: key of :data:`OBJECTIVES`.
        size: key of :data:`SHAPES`.
    """

    def __init__(self, name: str, size: str = "full") -> None:
        self.shape = shape = SHAPES[size]
        self.objective = OBJECTIVES[name]()
        self.plain = name == "cross_entropy" or self.objective.needs.tokenizers == "one"
        vocab = shape.student_vocab if self.plain else shape.teacher_vocab
        made = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=made) * scale

        def ids(most: int) -> tuple[Tensor, Tensor]:
            x = torch.randint(0, most, (shape.batch, shape.length), generator=made)
            y = torch.full((shape.batch, shape.length), IGNORE)
            answer = round(LABELLED * shape.length)
            y[:, 100 : 100 + answer] = torch.randint(0, most, (shape.batch, answer), generator=made)
            return x, y

        self.x, self.y = ids(shape.student_vocab)
        self.other_x, self.other_y = ids(vocab)
        self.mask = self.y != IGNORE
        self.h = normal(shape.batch, shape.length, shape.student_width).requires_grad_()
        self.g = normal(shape.batch, shape.length, shape.teacher_width)
        self.head = nn.Linear(shape.student_width, shape.student_vocab, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(normal(shape.student_vocab, shape.student_width, scale=0.18))
        self.teacher_head = normal(vocab, shape.teacher_width, scale=0.11)
        self.embedding, self.other_embedding = self.head.weight.detach(), self.teacher_head
        self.vocabulary_map = None if self.plain else _SharedVocabulary(shape)
        torch.manual_seed(1)
        sizes = ModelSizes(
            shape.student_width, shape.teacher_width, self.head.weight.detach(), self.teacher_head, self.vocabulary_map
        )
        self.extras = self.objective.extras(sizes)
        if self.extras is not None:
            self.extras.eval()  # in training mode, running means would change with every call

    def _found(self, loss: Tensor) -> Found:
        inputs = [self.h, self.head.weight, *([] if self.extras is None else self.extras.parameters())]
        given = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [loss.detach(), *(one for one in given if one is not None)]

    def ours(self) -> Found:
        """Compute loss and gradients at labelled positions only, in chunks."""
        ends = torch.arange(self.shape.batch + 1) * (int(self.mask.sum()) // self.shape.batch)
        mine = TokenIds(self.x[self.mask], self.y[self.mask], ends)
        theirs = TokenIds(self.other_x[self.mask], self.other_y[self.mask], ends)
        student = StudentOutput(self.h[self.mask], mine.labels, self.head, ids=mine, embedding=self.embedding)
        teacher = TeacherOutput(
            Signal("", "hidden", "float32", {"rows": CODECS["float32"].encode(self.g[self.mask])}),
            FrozenHead(self.teacher_head),
            None if self.plain else torch.arange(len(mine)),
            theirs,
            self.other_embedding,
            self.vocabulary_map,
        )
        extras = {} if self.extras is None else {self.objective.name: self.extras}
        return self._found(weighted_sum([(1.0, self.objective)], student, teacher, extras).sum)

    def dense(self) -> Found:
        """Compute loss and gradients in the usual way, with logits at every position."""
        one = self.objective
        if isinstance(one, CrossEntropy):
            loss = nn.functional.cross_entropy(self._z.flatten(0, 1), self.y.flatten(), reduction="sum")
        elif isinstance(one, DSKD):
            loss = self._dual(one.version)
        elif isinstance(one, MCWKD):
            loss = self._cross() + self._transports(one)
        elif isinstance(one, DSKDCMA):
            loss = self._cross()
        elif isinstance(one, MultiLevelOT):
            loss = self._levels(one)
        elif isinstance(one, ULD):
            loss = self._sorted()
        elif isinstance(one, MinED):
            loss = self._mapped()
        else:
            with torch.no_grad():
                log_p = (self._u / _TAU).log_softmax(-1)
            values = one.value(log_p, (self._z / _TAU).log_softmax(-1))  # type: ignore[attr-defined]
            loss = (values * self.mask).sum()
        return self._found(loss)

    def _answers(self, values: Tensor) -> Tensor:
        """Select labelled positions, (B, S, …) to (B, N, …); every text has the same number N of them."""
        return values[self.mask].unflatten(0, (self.shape.batch, -1))

    def _levels(self, one: MultiLevelOT) -> Tensor:
        both = []
        for logits in (self._u, self._z):
            top = (logits / one.temperature).softmax(-1).topk(one.k)
            p, ids = self._answers(top.values), self._answers(top.indices)
            every = torch.ones(p.shape[:2], dtype=torch.bool)
            both.append(sequence_ranking(p, ids, every, one.keep))
        teacher, student = both
        partners = torch.arange(every.shape[1]).expand_as(every)
        levels = multi_level(teacher, student, every, every, partners, share=one.share, sweeps=one.sweeps)
        return (
            one.absolute * levels.absolute + one.logarithmic * levels.logarithmic + one.transport * levels.transport
        ).sum()

    def _transports(self, one: MCWKD) -> Tensor:
        assert isinstance(self.extras, MCWKDExtras)
        p, q = (
            self._answers((logits / one.rank_temperature).softmax(-1).topk(one.k).values)
            for logits in (self._u, self._z)
        )
        every = torch.ones(p.shape[:2], dtype=torch.bool)
        h, g = self._answers(self.h), self._answers(self.extras.ot(self.g))
        covered = 1 - torch.eye(p.shape[1]).expand(self.shape.batch, -1, -1)
        far, near = one.transports(self.extras, (g, p, every), (h, q, every), covered)
        return one.transport * (far + near)

    @property
    def _z(self) -> Tensor:
        return self.head(self.h)

    @property
    def _u(self) -> Tensor:
        return self.g @ self.teacher_head.T

    def _sorted(self) -> Tensor:
        with torch.no_grad():
            p = self._u.softmax(-1).sort(dim=-1, descending=True).values
        q = self._z.softmax(-1).sort(dim=-1, descending=True).values
        q = nn.functional.pad(q, (0, p.shape[-1] - q.shape[-1]))
        return ((p - q).abs().sum(-1) * self.mask).sum()

    def _mapped(self) -> Tensor:
        assert self.vocabulary_map is not None
        mine, theirs, weights = self.vocabulary_map.entries
        with torch.no_grad():
            p = (self._u / _TAU).softmax(-1)
            named = torch.zeros(self.shape.batch, self.shape.length, self.shape.student_vocab).index_add_(
                2, mine, p[..., theirs] * weights
            )
            named /= named.sum(-1, keepdim=True)
        log_q = (self._z / _TAU)[..., : self.shape.shared].log_softmax(-1)
        named = named[..., : self.shape.shared]
        return ((torch.xlogy(named, named) - named * log_q).sum(-1) * self.mask).sum()

    def _kl(self, log_p: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        return ((log_p.exp() * (log_p - (z / _TAU).log_softmax(-1))).sum(-1) * mask).sum()

    def _dual(self, version: int) -> Tensor:
        extras = self.extras
        assert isinstance(extras, Projectors | FittedProjectors)
        z, aim = self._z, extras.t2s(self.g) @ self.head.weight.detach().T
        with torch.no_grad():
            u = self._u
            target, right, known = self.y, self.mask, self.mask
            if version == 2:
                best = u.argmax(-1)
                known = self.mask & (best < self.shape.shared)
                target = torch.where(known, best, IGNORE)
                right = known & (aim.argmax(-1) == best)
            log_p = (u / _TAU).log_softmax(-1)
        if isinstance(extras, FittedProjectors):
            extras.follow(self.head.weight.detach()[: self.shape.shared], self.teacher_head[: self.shape.shared])
        back = extras.s2t(self.h) @ self.teacher_head.T
        entropy = nn.functional.cross_entropy(aim.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum")
        near = self._kl((aim.detach() / _TAU).log_softmax(-1), z, right)
        if version == 1:
            return entropy + near + self._kl(log_p, back, self.mask)
        # Means over the tokens that are used, as published, times all tokens.
        count = self.mask.sum()
        return count * (near / right.sum().clamp_min(1) + (entropy + self._kl(log_p, back, known)) / known.sum())

    def _cross(self) -> Tensor:
        extras = self.extras
        assert isinstance(extras, CrossAttentionProjectors)
        y, other = self.y.clamp_min(0), self.other_y.clamp_min(0)
        query = extras.query(torch.cat([self.embedding[self.x], self.embedding[y]], -1))
        key = unit_rms(torch.cat([self.other_embedding[self.other_x], self.other_embedding[other]], -1))
        values = extras.t2s(unit_rms(self.g) + unit_rms(self.other_embedding[other]))
        scores = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        forth = scores.masked_fill(~self.mask[:, None, :], -1e5).softmax(-1) @ values
        back = scores.transpose(1, 2).masked_fill(~self.mask[:, None, :], -1e5).softmax(-1) @ extras.s2t(self.h)
        aim = forth @ self.head.weight.detach().T
        entropy = nn.functional.cross_entropy(aim.flatten(0, 1), self.y.flatten(), reduction="sum")
        right = self.mask & (aim.argmax(-1) == self.y)
        near = self._kl((aim.detach() / _TAU).log_softmax(-1), self._z, right)
        with torch.no_grad():
            log_p = (self._u / _TAU).log_softmax(-1)
        return entropy + near + self._kl(log_p, back @ self.teacher_head.T, self.mask)


def difference(found: Found, reference: Found) -> float:
    """Largest relative difference in the loss and in the gradients."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, reference, strict=True))


def measure(name: str, size: str = "full", pairs: int = PAIRS) -> dict[str, dict[str, float]]:
    """Measure an objective and its approximations against the same dense formulation."""
    cases = {
        row: ObjectiveCase(row, size) for row in (name, *(row for row in OBJECTIVES if row.startswith(f"{name} top-")))
    }
    ways = {_DENSE: cases[name].dense, **{row: case.ours for row, case in cases.items()}}
    results = {way: call() for way, call in ways.items()}
    differences = {row: difference(results[row], results[_DENSE]) for row in cases}
    del results
    times = interleaved(ways, pairs, warm=True)
    del ways, cases
    memory = {row: float(in_subprocess(__name__, size, row)["mb"]) for row in differences}
    dense = float(in_subprocess(__name__, size, name, _DENSE)["mb"])
    return {
        row: {
            "ms": statistics.median(times[row]),
            "peak_mb": memory[row],
            "ms_dense": statistics.median(times[_DENSE]),
            "mb_dense": dense,
            "speedup": median_ratio(times[_DENSE], times[row]),
            "memory_ratio": dense / memory[row],
            "difference": differences[row],
        }
        for row in differences
    }


def run(*, names: Sequence[str] = EXACT, size: str = "full", pairs: int = PAIRS) -> Measured:
    """Measure objectives, each with its approximations."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        with timed(name):
            found |= measure(name, size, pairs)
    header = ["objective", "ms", "ms, dense", "speedup", "peak MB", "MB, dense", "memory ratio", "difference"]
    rows = [
        [
            name,
            f"{one['ms']:.0f}",
            f"{one['ms_dense']:.0f}",
            f"{one['speedup']:.1f}",
            f"{one['peak_mb']:.0f}",
            f"{one['mb_dense']:.0f}",
            f"{one['memory_ratio']:.1f}",
            f"{one['difference']:.0e}",
        ]
        for name, one in found.items()
    ]
    shape = SHAPES[size]
    sizes = f"vocabularies of {shape.student_vocab} and {shape.teacher_vocab} tokens"
    title = f"batch {shape.batch} x {shape.length}, {LABELLED:.0%} labelled, {sizes}, medians of {pairs} pairs"
    return Measured(title, header, rows, {"objectives": found})


def _memory(size: str, name: str, way: str = "ours") -> None:
    def prepare() -> Callable[[], object]:
        case = ObjectiveCase(name, size)
        return case.dense if way == _DENSE else case.ours

    print(json.dumps({"mb": peak_growth_mb(prepare)}))


if __name__ == "__main__":
    _memory(*sys.argv[1:])
