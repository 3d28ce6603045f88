"""What a session's beginning and each step send, told from the lengths of texts alone, to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from raycloud.errors import RecipeError
from raycloud.link.frames import HEADER_BYTES, MAX_CONTROL, MAX_FRAME, Body, Kind, with_bytes
from raycloud.split.finetune.code import blank, tensors_of
from raycloud.split.finetune.front import Learning
from raycloud.split.finetune.memory import ENTRY_BYTES
from raycloud.split.finetune.messages import (
    PIECE_BYTES,
    Backward,
    Backwarded,
    Fit,
    Fitted,
    Forward,
    Forwarded,
    Learn,
    Learnt,
    Optimise,
    Optimised,
    Piece,
)
from raycloud.split.finetune.numbers import Packing, Packings
from raycloud.split.finetune.tasks import Pooling

FIRST = ("FWD", "BWD_OK", "CODE", "FIT", "LEARN", "LEARN_OK")
SECOND = ("FWD_OK", "BWD", "FIT_OK", "CODE_OK")
"""The kinds of messages that cross each cut, or bring its code."""
LABEL_BYTES = 4
"""Of a label, where labels cross."""


def _add(sizes: Counter[str], kind: Kind, body: Body, more: int = 0) -> None:
    sizes[kind.name] += with_bytes(kind, body).size + more


def check_frames(tokens: int, packings: Packings, back: Pooling, fitted: int = 0) -> None:
    """Whether a batch of so many tokens fits one frame at either cut, and one that codes are fitted to at the first.

    Raises:
        RecipeError: it does not.
    """
    first, second = packings.first.bytes_per_row, packings.second.bytes_per_row
    row = max(first, second) if back == "rows" else first  # otherwise a row for each text
    if fitted * first > tokens * row:
        tokens, row = fitted, first
    if tokens * row > (room := MAX_FRAME - HEADER_BYTES - MAX_CONTROL):
        raise RecipeError(
            f"training.batch_size: {tokens:,} tokens of {row:,} bytes take {tokens * row / 1e6:.1f} MB, a frame holds "
            f"{room / 1e6:.1f}; allowed: fewer texts at once, with more training.accumulate, or a smaller form"
        )


def fitting(
    batches: Sequence[Sequence[int]], packings: Packings, width: int, *, first: bool, second: bool
) -> Counter[str]:
    """Bytes that bring narrow codes where they belong, by kind of message.

    Args:
        batches: for each batch of calibration the tokens of its texts.
        packings: of both cuts.
        width: of rows.
        first: whether the first cut's decoder is sent to the cloud.
        second: whether the second cut has a code.
    """
    sizes: Counter[str] = Counter()

    def decoder(packing: Packing) -> int:
        return len(tensors_of(blank(width, packing.width, packing.apart).decoder))

    if first:
        size = decoder(packings.first)
        for at in range(0, size, PIECE_BYTES):
            _add(sizes, Kind.CODE, Piece(up=True, at=at, size=size), min(PIECE_BYTES, size - at))
            _add(sizes, Kind.CODE_OK, Piece(up=True, at=at, size=size))
    if second:
        for number, lengths in enumerate(batches):
            last = number == len(batches) - 1
            rows = sum(lengths) * packings.first.bytes_per_row
            _add(sizes, Kind.FIT, Fit(lengths=list(lengths), last=last, unit=0.0), rows)
            _add(sizes, Kind.FIT_OK, Fitted())
        size = decoder(packings.second)
        for at in range(0, size, PIECE_BYTES):
            _add(sizes, Kind.CODE, Piece(up=False, at=at, size=0))
            _add(sizes, Kind.CODE_OK, Piece(up=False, at=at, size=size), min(PIECE_BYTES, size - at))
    return sizes


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
    returns = learning.ahead or learning.cloud
    for micro, lengths in enumerate(micros):
        tokens = sum(lengths)
        rows = tokens if back == "rows" else len(lengths)
        first, second = packings.first.bytes_per_row, packings.second.bytes_per_row
        sent = Forward(step=step, micro=micro, training=True, returns=returns, lengths=list(lengths), unit=0.0)
        which = ENTRY_BYTES * len(lengths) if packings.changes else 0
        _add(sizes, Kind.FWD, sent, tokens * first + which)
        _add(sizes, Kind.FWD_OK, Forwarded(unit=0.0, seconds=0.0), rows * second)
        if returns:
            last = micro == len(micros) - 1
            gradient = Backward(step=step, micro=micro, last=last, back=learning.ahead, unit=0.0)
            _add(sizes, Kind.BWD, gradient, rows * second)
            wanted = tokens * first if learning.ahead else 0
            _add(sizes, Kind.BWD_OK, Backwarded(unit=0.0, norm=0.0, seconds=0.0), wanted)
    if learning.cloud:
        _add(sizes, Kind.OPT, Optimise(step=step, norm=0.0))
        _add(sizes, Kind.OPT_OK, Optimised(step=step + 1, seconds=0.0))
    return sizes


def crossing_with_labels(step: int, micros: Sequence[Sequence[int]], packings: Packings, labels: int) -> Counter[str]:
    """Likewise where ``labels`` labels of each text cross as well, and no second cut is."""
    sizes: Counter[str] = Counter()
    which = ENTRY_BYTES if packings.changes else 0
    targets = labels * sum(map(len, micros))
    for micro, lengths in enumerate(micros):
        rows = sum(lengths) * packings.first.bytes_per_row
        last = micro == len(micros) - 1
        texts = len(lengths)
        sent = Learn(step=step, micro=micro, last=last, targets=targets, lengths=list(lengths), unit=0.0)
        _add(sizes, Kind.LEARN, sent, rows + texts * (LABEL_BYTES * labels + which))
        _add(sizes, Kind.LEARN_OK, Learnt(unit=0.0, norm=0.0, seconds=0.0, loss=0.0), rows)
    _add(sizes, Kind.OPT, Optimise(step=step, norm=0.0))
    _add(sizes, Kind.OPT_OK, Optimised(step=step + 1, seconds=0.0))
    return sizes


def per_cut(sizes: Counter[str]) -> tuple[int, int, int]:
    """Bytes at the first cut, at the second one, and in all."""
    return sum(sizes[kind] for kind in FIRST), sum(sizes[kind] for kind in SECOND), sizes.total()


def per_direction(sizes: Counter[str]) -> tuple[int, int]:
    """Bytes up to the cloud, and down to the edge."""
    down = sum(size for kind, size in sizes.items() if kind.endswith("_OK"))
    return sizes.total() - down, down
