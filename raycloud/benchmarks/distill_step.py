"""Forward-KL step from hidden signals: dense logits at every padded position against chunks of labelled positions.

Batch 4, length 512, vocabulary 49,152, hidden size 576 (SmolLM2-135M), 16 % of the positions labelled. A step goes from
the final hidden states of both models to the gradients of the student's hidden states and head.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raycloud.benchmarks.measure import PAIRS, Measured, in_subprocess, interleaved, median_ratio, peak_growth_mb
from raycloud.data.batches import IGNORE
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.link.codecs.floats import CODECS
from raycloud.report.console import timed

BATCH, LENGTH, VOCAB_SIZE, HIDDEN, LABELLED = 4, 512, 49_152, 576, 0.16
QUICK = {"vocab_size": 4_096, "pairs": 1}

Gradients = tuple[Tensor, Tensor, Tensor]
"""Loss, gradient of the hidden states, gradient of the head."""


class StepCase:
    """Inputs of one step, the same for both formulations."""

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        labels = torch.full((BATCH, LENGTH), IGNORE)
        answer = round(LABELLED * LENGTH)
        labels[:, 100 : 100 + answer] = torch.randint(0, vocab_size, (BATCH, answer), generator=generator)
        self.labels = labels
        self.hidden = normal(BATCH, LENGTH, HIDDEN).requires_grad_()
        self.teacher_hidden = normal(BATCH, LENGTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, vocab_size, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(normal(vocab_size, HIDDEN, scale=0.08))
        self.teacher_weight = normal(vocab_size, HIDDEN, scale=0.08)

    def dense(self) -> Gradients:
        """Compute forward KL in the usual way: full logits of both models, masked at the end."""
        logits = self.head(self.hidden)
        with torch.no_grad():
            log_p = (self.teacher_hidden @ self.teacher_weight.T).log_softmax(-1)
        kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)
        mask = self.labels != IGNORE
        return self._gradients((kl * mask).sum() / mask.sum())

    def ours(self) -> Gradients:
        """Compute forward KL at labelled positions only, in chunks, accumulating the gradient of the head per chunk."""
        mask = self.labels != IGNORE
        coded = CODECS["float32"].encode(self.teacher_hidden[mask])
        signal = Signal("", "hidden", "float32", {"rows": coded})
        student = StudentOutput(self.hidden[mask], self.labels[mask], self.head)
        loss = weighted_sum(
            [(1.0, DIVERGENCES["forward_kl"]())], student, TeacherOutput(signal, FrozenHead(self.teacher_weight))
        )
        return self._gradients(loss.sum / loss.count)

    def _gradients(self, loss: Tensor) -> Gradients:
        d_hidden, d_head = torch.autograd.grad(loss, (self.hidden, self.head.weight))
        return loss.detach(), d_hidden, d_head

    def formulation(self, name: str) -> Callable[[], Gradients]:
        """Return the method with this name: ``dense`` or ``ours``."""
        return {"dense": self.dense, "ours": self.ours}[name]


def difference(case: StepCase) -> float:
    """Largest relative difference between both formulations in the loss and in both gradients."""
    pairs = zip(case.dense(), case.ours(), strict=True)
    return max(float((ours - dense).norm() / dense.norm()) for dense, ours in pairs)


def run(*, vocab_size: int = VOCAB_SIZE, pairs: int = PAIRS) -> Measured:
    """Measure time side by side, and memory in fresh processes."""
    case = StepCase(vocab_size)
    with timed("equality"):
        largest = difference(case)
    with timed(f"time, {pairs} pairs"):
        times = interleaved({name: case.formulation(name) for name in ("dense", "ours")}, pairs)
    with timed("memory, one process each"):
        memory = {name: float(in_subprocess(__name__, name, str(vocab_size))["mb"]) for name in ("dense", "ours")}
    result = {
        "ms_dense": statistics.median(times["dense"]),
        "ms_ours": statistics.median(times["ours"]),
        "mb_dense": memory["dense"],
        "mb_ours": memory["ours"],
        "speedup": median_ratio(times["dense"], times["ours"]),
        "memory_ratio": memory["dense"] / memory["ours"],
        "difference": largest,
    }
    rows = [[name, f"{result[f'ms_{name}']:.0f}", f"{result[f'mb_{name}']:.0f}"] for name in ("dense", "ours")]
    rows.append(["dense / ours", f"{result['speedup']:.1f}", f"{result['memory_ratio']:.1f}"])
    rows.append(["largest difference", f"{largest:.1e}", ""])
    title = f"forward-KL step, batch {BATCH} x {LENGTH}, vocabulary {vocab_size}, {LABELLED:.0%} labelled"
    return Measured(title, ["", f"ms (median of {pairs})", "MB of peak memory growth"], rows, result)


if __name__ == "__main__":
    print(json.dumps({"mb": peak_growth_mb(lambda: StepCase(int(sys.argv[2])).formulation(sys.argv[1]))}))
