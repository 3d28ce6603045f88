"""Every objective beside its dense formulation: logits for every padded position, masked at the end.

The sizes are those of GPT-2 learning from Qwen1.5-1.8B: batch 4, length 512, 16 % of the positions labelled,
vocabularies of 50,257 and 151,936 words, widths of 768 and 2,048. Both see the same numbers and give the same loss and
gradients, of the student's rows and head and of what is trained beside it. Divergences of one vocabulary have the
student's on both sides. Approximations are rows of their own, with their difference.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from raycloud.benchmarks.measure import in_subprocess, interleaved, median_ratio, peak_growth_mb, show
from raycloud.data.batches import IGNORE
from raycloud.distill.multi_level import multi_level, sequence_ranking
from raycloud.distill.objective import Ids, Objective, Sizes, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES, CrossEntropy
from raycloud.distill.objectives.dskd import DSKD, FittedProjectors, Projectors
from raycloud.distill.objectives.dskd_cma import DSKDCMA, CrossProjectors, unit
from raycloud.distill.objectives.mcw_kd import MCWKD, Extras
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.objectives.multi_level_ot import MultiLevelOT
from raycloud.distill.objectives.uld import ULD
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.link.codecs import CODECS
from raycloud.report.console import working

BATCH, LENGTH, LABELLED = 4, 512, 0.16
STUDENT_WORDS, TEACHER_WORDS, STUDENT_WIDTH, TEACHER_WIDTH = 50_257, 151_936, 768, 2_048
_SHARED = 42_000
_TAU = 2.0
_DENSE = "dense"
PAIRS = 3
"""A dense formulation of two vocabularies takes up to a minute, and the ratios are far from their bounds."""

Found = list[Tensor]
"""The loss and its gradients."""

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


class _Words:
    """The first words of both vocabularies are shared; some of the teacher's others mean a shared one, too."""

    def __init__(self) -> None:
        same = torch.arange(_SHARED)
        others = torch.arange(_SHARED, TEACHER_WORDS, 3)
        self.shared = (same, same)
        self.edges = (
            torch.cat([same, others % _SHARED]),
            torch.cat([same, others]),
            torch.ones(_SHARED + len(others)),
        )


class Case:
    """The inputs of one objective."""

    def __init__(self, name: str) -> None:
        self.objective = OBJECTIVES[name]()
        self.plain = name == "cross_entropy" or name in DIVERGENCES
        words = STUDENT_WORDS if self.plain else TEACHER_WORDS
        made = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=made) * scale

        def ids(most: int) -> tuple[Tensor, Tensor]:
            x = torch.randint(0, most, (BATCH, LENGTH), generator=made)
            y = torch.full((BATCH, LENGTH), IGNORE)
            answer = round(LABELLED * LENGTH)
            y[:, 100 : 100 + answer] = torch.randint(0, most, (BATCH, answer), generator=made)
            return x, y

        self.x, self.y = ids(STUDENT_WORDS)
        self.other_x, self.other_y = ids(words)
        self.mask = self.y != IGNORE
        self.h = normal(BATCH, LENGTH, STUDENT_WIDTH).requires_grad_()
        self.g = normal(BATCH, LENGTH, TEACHER_WIDTH)
        self.head = nn.Linear(STUDENT_WIDTH, STUDENT_WORDS, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(normal(STUDENT_WORDS, STUDENT_WIDTH, scale=0.18))
        self.teacher_head = normal(words, TEACHER_WIDTH, scale=0.11)
        self.embedding, self.other_embedding = self.head.weight.detach(), self.teacher_head
        self.words = None if self.plain else _Words()
        torch.manual_seed(1)
        sizes = Sizes(STUDENT_WIDTH, TEACHER_WIDTH, self.head.weight.detach(), self.teacher_head, self.words)
        self.extras = self.objective.extras(sizes)
        if self.extras is not None:
            self.extras.eval()  # running means would differ from one call to the next

    def _found(self, loss: Tensor) -> Found:
        inputs = [self.h, self.head.weight, *([] if self.extras is None else self.extras.parameters())]
        given = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [loss.detach(), *(one for one in given if one is not None)]

    def ours(self) -> Found:
        """Labelled rows only, chunk by chunk."""
        ends = torch.arange(BATCH + 1) * (int(self.mask.sum()) // BATCH)
        mine = Ids(self.x[self.mask], self.y[self.mask], ends)
        theirs = Ids(self.other_x[self.mask], self.other_y[self.mask], ends)
        student = StudentOutput(self.h[self.mask], mine.labels, self.head, ids=mine, embedding=self.embedding)
        teacher = TeacherOutput(
            Signal("", "hidden", "float32", {"rows": CODECS["float32"].encode(self.g[self.mask])}),
            FrozenHead(self.teacher_head),
            None if self.plain else torch.arange(len(mine)),
            theirs,
            self.other_embedding,
            self.words,
        )
        extras = {} if self.extras is None else {self.objective.name: self.extras}
        return self._found(weighted_sum([(1.0, self.objective)], student, teacher, extras).sum)

    def dense(self) -> Found:
        """As it is usually written."""
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
            values = one.between(log_p, (self._z / _TAU).log_softmax(-1))  # type: ignore[attr-defined]
            loss = (values * self.mask).sum()
        return self._found(loss)

    def _answers(self, values: Tensor) -> Tensor:
        """(B, S, …) to (B, N, …): every text has as many labelled positions."""
        return values[self.mask].unflatten(0, (BATCH, -1))

    def _levels(self, one: MultiLevelOT) -> Tensor:
        both = []
        for logits in (self._u, self._z):
            top = (logits / one.temperature).softmax(-1).topk(one.words)
            p, ids = self._answers(top.values), self._answers(top.indices)
            every = torch.ones(p.shape[:2], dtype=torch.bool)
            both.append(sequence_ranking(p, ids, every, one.keep))
        teacher, student = both
        levels = multi_level(teacher, student, every, every, share=one.share, sweeps=one.sweeps)
        return (
            one.absolute * levels.absolute + one.logarithmic * levels.logarithmic + one.transport * levels.transport
        ).sum()

    def _transports(self, one: MCWKD) -> Tensor:
        assert isinstance(self.extras, Extras)
        p, q = (
            self._answers((logits / one.rank_temperature).softmax(-1).topk(one.words).values)
            for logits in (self._u, self._z)
        )
        every = torch.ones(p.shape[:2], dtype=torch.bool)
        h, g = self._answers(self.h), self._answers(self.extras.ot(self.g))
        covered = 1 - torch.eye(p.shape[1]).expand(BATCH, -1, -1)
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
        assert self.words is not None
        mine, theirs, weights = self.words.edges
        with torch.no_grad():
            p = (self._u / _TAU).softmax(-1)
            named = torch.zeros(BATCH, LENGTH, STUDENT_WORDS).index_add_(2, mine, p[..., theirs] * weights)
            named /= named.sum(-1, keepdim=True)
        log_q = (self._z / _TAU)[..., :_SHARED].log_softmax(-1)
        named = named[..., :_SHARED]
        return ((torch.xlogy(named, named) - named * log_q).sum(-1) * self.mask).sum()

    def _kl(self, log_p: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        return ((log_p.exp() * (log_p - (z / _TAU).log_softmax(-1))).sum(-1) * mask).sum()

    def _dual(self, version: int) -> Tensor:
        extras = self.extras
        assert isinstance(extras, Projectors | FittedProjectors)
        z, aim = self._z, extras.t2s(self.g) @ self.head.weight.detach().T
        with torch.no_grad():
            u = self._u
            target, right = self.y, self.mask
            if version == 2:
                best = u.argmax(-1)
                known = self.mask & (best < _SHARED)
                target = torch.where(known, best, IGNORE)
                right = known & (aim.argmax(-1) == best)
            log_p = (u / _TAU).log_softmax(-1)
        if isinstance(extras, FittedProjectors):
            extras.follow(self.head.weight.detach()[:_SHARED], self.teacher_head[:_SHARED])
        back = extras.s2t(self.h) @ self.teacher_head.T
        entropy = nn.functional.cross_entropy(aim.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum")
        near = self._kl((aim.detach() / _TAU).log_softmax(-1), z, right)
        return entropy + near + self._kl(log_p, back, self.mask)

    def _cross(self) -> Tensor:
        extras = self.extras
        assert isinstance(extras, CrossProjectors)
        y, other = self.y.clamp_min(0), self.other_y.clamp_min(0)
        query = extras.query(torch.cat([self.embedding[self.x], self.embedding[y]], -1))
        key = unit(torch.cat([self.other_embedding[self.other_x], self.other_embedding[other]], -1))
        values = extras.t2s(unit(self.g) + unit(self.other_embedding[other]))
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
    """The largest relative difference of the loss and of the gradients."""
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, reference, strict=True))


def measure(name: str) -> dict[str, dict[str, float]]:
    """The figures of an objective and of its approximations, all beside the same dense formulation."""
    cases = {row: Case(row) for row in (name, *(row for row in OBJECTIVES if row.startswith(f"{name} top-")))}
    ways = {_DENSE: cases[name].dense, **{row: case.ours for row, case in cases.items()}}
    results = {way: call() for way, call in ways.items()}
    apart = {row: difference(results[row], results[_DENSE]) for row in cases}
    del results
    times = interleaved(ways, PAIRS, warm=True)
    del ways, cases
    memory = {row: float(in_subprocess(__name__, row)["mb"]) for row in apart}
    dense = float(in_subprocess(__name__, name, _DENSE)["mb"])
    return {
        row: {
            "ms": statistics.median(times[row]),
            "peak_mb": memory[row],
            "ms_dense": statistics.median(times[_DENSE]),
            "mb_dense": dense,
            "speedup": median_ratio(times[_DENSE], times[row]),
            "memory_ratio": dense / memory[row],
            "difference": apart[row],
        }
        for row in apart
    }


def run(as_json: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Measure, print, and return the figures."""
    found: dict[str, dict[str, float]] = {}
    for name in OBJECTIVES:
        if " top-" not in name:
            with working(name):
                found |= measure(name)
    result = {"objectives": found}
    header = ["objective", "ms", "dense", "times", "peak MB", "dense", "times", "difference"]
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
    title = f"GPT-2 from Qwen1.5: batch {BATCH} x {LENGTH}, {LABELLED:.0%} labelled, medians of {PAIRS} pairs"
    show(title, header, rows, result, as_json)
    return result


def _memory(name: str, way: str = "ours") -> None:
    def prepare() -> Callable[[], object]:
        case = Case(name)
        return case.dense if way == _DENSE else case.ours

    print(json.dumps({"mb": peak_growth_mb(prepare)}))


if __name__ == "__main__":
    _memory(*sys.argv[1:])
