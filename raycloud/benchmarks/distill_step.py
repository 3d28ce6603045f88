"""One forward-KL step from hidden signals: logits for every padded position against our chunks of response tokens.

Batch 4, length 512, vocabulary 49,152, hidden 576 (SmolLM2-135M), 16 % of the positions labelled. A step is everything
from both models' final rows to the gradients of the student's rows and head.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raycloud.benchmarks.measure import PAIRS, in_subprocess, interleaved, median_ratio, peak_growth_mb, show
from raycloud.data.batches import IGNORE
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.link.codecs import CODECS
from raycloud.report.console import working

BATCH, LENGTH, WORDS, HIDDEN, LABELLED = 4, 512, 49_152, 576, 0.16

Gradients = tuple[Tensor, Tensor, Tensor]
"""Loss, gradient of the rows, gradient of the head."""


class Case:
    """The inputs of one step; both formulations see the same numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        labels = torch.full((BATCH, LENGTH), IGNORE)
        answer = round(LABELLED * LENGTH)
        labels[:, 100 : 100 + answer] = torch.randint(0, WORDS, (BATCH, answer), generator=generator)
        self.labels = labels
        self.rows = normal(BATCH, LENGTH, HIDDEN).requires_grad_()
        self.teacher_rows = normal(BATCH, LENGTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, WORDS, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(normal(WORDS, HIDDEN, scale=0.08))
        self.teacher_weight = normal(WORDS, HIDDEN, scale=0.08)

    def dense(self) -> Gradients:
        """Forward KL as it is usually written: full logits of both models, masked at the end."""
        logits = self.head(self.rows)
        with torch.no_grad():
            log_p = (self.teacher_rows @ self.teacher_weight.T).log_softmax(-1)
        kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
        mask = self.labels != IGNORE
        return self._gradients((kl * mask).sum() / mask.sum())

    def ours(self) -> Gradients:
        """Labelled rows only, chunk by chunk, the head's gradient taken on the way."""
        mask = self.labels != IGNORE
        coded = CODECS["float32"].encode(self.teacher_rows[mask])
        signal = Signal("", "hidden", "float32", {"rows": coded})
        student = StudentOutput(self.rows[mask], self.labels[mask], self.head)
        loss = weighted_sum(
            [(1.0, DIVERGENCES["forward_kl"]())], student, TeacherOutput(signal, FrozenHead(self.teacher_weight))
        )
        return self._gradients(loss.sum / loss.count)

    def _gradients(self, loss: Tensor) -> Gradients:
        d_rows, d_head = torch.autograd.grad(loss, (self.rows, self.head.weight))
        return loss.detach(), d_rows, d_head

    def formulation(self, name: str) -> Callable[[], Gradients]:
        """``dense`` or ``ours``."""
        return {"dense": self.dense, "ours": self.ours}[name]


def difference(case: Case) -> float:
    """The largest relative difference between both formulations, of the loss and of both gradients."""
    pairs = zip(case.dense(), case.ours(), strict=True)
    return max(float((ours - dense).norm() / dense.norm()) for dense, ours in pairs)


def run(as_json: bool) -> dict[str, float]:
    """Measure, print, and return the figures."""
    case = Case()
    with working("equality"):
        apart = difference(case)
    with working(f"time, {PAIRS} pairs"):
        times = interleaved({name: case.formulation(name) for name in ("dense", "ours")})
    with working("memory, one process each"):
        memory = {name: float(in_subprocess(__name__, name)["mb"]) for name in ("dense", "ours")}
    result = {
        "ms_dense": statistics.median(times["dense"]),
        "ms_ours": statistics.median(times["ours"]),
        "mb_dense": memory["dense"],
        "mb_ours": memory["ours"],
        "speedup": median_ratio(times["dense"], times["ours"]),
        "memory_ratio": memory["dense"] / memory["ours"],
        "difference": apart,
    }
    rows = [[name, f"{result[f'ms_{name}']:.0f}", f"{result[f'mb_{name}']:.0f}"] for name in ("dense", "ours")]
    rows.append(["dense / ours", f"{result['speedup']:.1f}", f"{result['memory_ratio']:.1f}"])
    rows.append(["largest difference", f"{apart:.1e}", ""])
    title = f"forward-KL step, batch {BATCH} x {LENGTH}, vocabulary {WORDS}, {LABELLED:.0%} labelled"
    show(title, ["", f"ms (median of {PAIRS})", "MB of peak growth"], rows, result, as_json)
    return result


if __name__ == "__main__":
    print(json.dumps({"mb": peak_growth_mb(lambda: Case().formulation(sys.argv[1]))}))
