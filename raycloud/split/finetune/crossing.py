"""What a step sends, told from the lengths of its texts alone, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from raycloud.link.frames import Kind, with_bytes
from raycloud.split.finetune.cloud import Packings
from raycloud.split.finetune.edge import Learning
from raycloud.split.finetune.messages import Backward, Backwarded, Forward, Forwarded, Optimise, Optimised
from raycloud.split.finetune.tasks import Pooling

FIRST, SECOND = ("FWD", "BWD_OK"), ("FWD_OK", "BWD")
"""The kinds of messages that cross each cut."""


def crossing(
    step: int, micros: Sequence[Sequence[int]], packings: Packings, back: Pooling, learning: Learning
) -> Counter[str]:
    """Bytes of one optimiser step by kind of message, headers and lengths included.

    Args:
        step: its number.
        micros: for each micro-batch the tokens of its texts.
        packings: of both cuts.
        back: what of a text's rows the cloud sends back.
        learning: which parts do, and so which gradients cross.
    """
    sizes: Counter[str] = Counter()

    def count(kind: Kind, body: object, rows: int = 0, row: int = 0) -> None:
        sizes[kind.name] += len(with_bytes(kind, body).pack()) + rows * row  # type: ignore[arg-type]

    returns = learning.ahead or learning.cloud
    for micro, lengths in enumerate(micros):
        tokens = sum(lengths)
        rows = tokens if back == "rows" else len(lengths)
        first, second = packings.first.bytes_per_row, packings.second.bytes_per_row
        sent = Forward(step=step, micro=micro, training=True, returns=returns, lengths=list(lengths), unit=0.0)
        count(Kind.FWD, sent, tokens, first)
        count(Kind.FWD_OK, Forwarded(unit=0.0, seconds=0.0), rows, second)
        if returns:
            last = micro == len(micros) - 1
            gradient = Backward(step=step, micro=micro, last=last, back=learning.ahead, unit=0.0)
            count(Kind.BWD, gradient, rows, second)
            count(Kind.BWD_OK, Backwarded(unit=0.0, norm=0.0, seconds=0.0), tokens if learning.ahead else 0, first)
    if learning.cloud:
        count(Kind.OPT, Optimise(step=step, norm=0.0))
        count(Kind.OPT_OK, Optimised(step=step + 1, seconds=0.0))
    return sizes


def per_cut(sizes: Counter[str]) -> tuple[int, int, int]:
    """Bytes at the first cut, at the second one, and in all."""
    return sum(sizes[kind] for kind in FIRST), sum(sizes[kind] for kind in SECOND), sizes.total()


def per_direction(sizes: Counter[str]) -> tuple[int, int]:
    """Bytes up to the cloud, and down to the edge."""
    down = sum(size for kind, size in sizes.items() if kind.endswith("_OK"))
    return sizes.total() - down, down
