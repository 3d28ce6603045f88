"""Traffic of a session's beginning and of each step, computed exactly from the lengths of texts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from raycloud.errors import RecipeError
from raycloud.link.frames import MAX_MESSAGE, Body, message_size
from raycloud.split.finetune.activation_cache import ENTRY_BYTES
from raycloud.split.finetune.bottleneck import decoder_to_bytes, empty_bottleneck
from raycloud.split.finetune.edge_trainer import TrainableParts
from raycloud.split.finetune.messages import (
    BackwardReply,
    BackwardRequest,
    FitRequest,
    ForwardReply,
    ForwardRequest,
    OptimiseReply,
    OptimiseRequest,
    TrainReply,
    TrainRequest,
    TuneKind,
)
from raycloud.split.finetune.tasks import Pooling
from raycloud.split.finetune.wire_format import WireFormat, WireFormats

FIRST_CUT_KINDS = ("FWD", "BWD_OK", "CODE", "FIT", "TRAIN", "TRAIN_OK")
"""Kinds of messages that carry data of the first cut, in either direction, or its bottleneck."""
SECOND_CUT_KINDS = ("FWD_OK", "BWD", "FIT_OK")
"""Kinds of messages that carry data of the second cut, in either direction, or its bottleneck."""
LABEL_BYTES = 4
"""Bytes of a label, if labels are sent."""
_SMALL_BYTES = 64 * 2**10
"""Room in a message for what is sent with hidden states: labels, and the indices of texts."""


def _add(sizes: Counter[str], kind: TuneKind, body: Body | None, raw_bytes: int = 0) -> None:
    sizes[kind.name] += message_size(0 if body is None else len(body.pack()), raw_bytes)


def check_batch_size(
    tokens: int, wire_formats: WireFormats, pooling: Pooling, fitted: int = 0, *, message_bytes: int = MAX_MESSAGE
) -> None:
    """Check that a cloud accepts a batch of ``tokens`` tokens at either cut, and one of ``fitted`` tokens at the first.

    Args:
        tokens: tokens of the largest batch, without padding.
        wire_formats: wire formats of both cuts.
        pooling: pooling of the hidden states that come back.
        fitted: tokens of the largest batch that the second cut is fitted to.
        message_bytes: largest number of raw bytes of a message; the default limit until the cloud has granted its own.

    Raises:
        RecipeError: a batch takes more bytes than a message may have.
    """
    first, second = wire_formats.uplink.bytes_per_row, wire_formats.downlink.bytes_per_row
    row = max(first, second) if pooling == "none" else first  # otherwise one hidden state per text
    if fitted * first > tokens * row:
        tokens, row = fitted, first
    if tokens * row > (room := message_bytes - min(_SMALL_BYTES, message_bytes // 8)):
        raise RecipeError(
            f"training.batch_size: {tokens:,} tokens of {row:,} bytes take {tokens * row / 1e6:.1f} MB, a message "
            f"holds {room / 1e6:.1f}; allowed: fewer texts at once, with more "
            "training.gradient_accumulation_steps, or a smaller dtype"
        )


def bottleneck_traffic(
    batches: Sequence[Sequence[int]], wire_formats: WireFormats, width: int, *, uplink: bool, downlink: bool
) -> Counter[str]:
    """Bytes that exchange the low-rank bottlenecks, by kind of message.

    Args:
        batches: for each calibration batch the token counts of its texts.
        wire_formats: wire formats of both cuts.
        width: width of hidden states.
        uplink: True if the first cut's decoder is sent to the cloud.
        downlink: True if the second cut has a bottleneck.
    """
    sizes: Counter[str] = Counter()

    def decoder(wire_format: WireFormat) -> int:
        return len(decoder_to_bytes(empty_bottleneck(width, wire_format.width, wire_format.num_outliers).decoder))

    if uplink:
        _add(sizes, TuneKind.CODE, None, decoder(wire_formats.uplink))
        _add(sizes, TuneKind.CODE_OK, None)
    if downlink:
        for number, lengths in enumerate(batches):
            last = number == len(batches) - 1
            size = sum(lengths) * wire_formats.uplink.bytes_per_row
            _add(sizes, TuneKind.FIT, FitRequest(lengths=list(lengths), last=last, scale=0.0), size)
            _add(sizes, TuneKind.FIT_OK, None, decoder(wire_formats.downlink) if last else 0)
    return sizes


def step_traffic(
    step: int, micros: Sequence[Sequence[int]], wire_formats: WireFormats, pooling: Pooling, trainable: TrainableParts
) -> Counter[str]:
    """Bytes of one optimiser step by kind of message, headers and lengths included.

    Args:
        step: number of the step.
        micros: for each micro-batch the token counts of its texts.
        wire_formats: wire formats of both cuts.
        pooling: pooling of the hidden states that the cloud returns.
        trainable: trained parts, which determine the gradients to send.
    """
    sizes: Counter[str] = Counter()
    backward = trainable.first_part or trainable.cloud
    for micro, lengths in enumerate(micros):
        tokens = sum(lengths)
        count = tokens if pooling == "none" else len(lengths)
        first, second = wire_formats.uplink.bytes_per_row, wire_formats.downlink.bytes_per_row
        sent = ForwardRequest(
            step=step, micro_batch=micro, training=True, backward=backward, lengths=list(lengths), scale=0.0
        )
        visits = ENTRY_BYTES * len(lengths) if wire_formats.activation_delta else 0
        _add(sizes, TuneKind.FWD, sent, tokens * first + visits)
        _add(sizes, TuneKind.FWD_OK, ForwardReply(scale=0.0, seconds=0.0), count * second)
        if backward:
            last = micro == len(micros) - 1
            gradient = BackwardRequest(
                step=step, micro_batch=micro, last=last, needs_gradient=trainable.first_part, scale=0.0
            )
            _add(sizes, TuneKind.BWD, gradient, count * second)
            wanted = tokens * first if trainable.first_part else 0
            _add(sizes, TuneKind.BWD_OK, BackwardReply(scale=0.0, norm=0.0, seconds=0.0), wanted)
    if trainable.cloud:
        _add(sizes, TuneKind.OPT, OptimiseRequest(step=step, norm=0.0))
        _add(sizes, TuneKind.OPT_OK, OptimiseReply(step=step + 1, seconds=0.0))
    return sizes


def label_sharing_traffic(
    step: int, micros: Sequence[Sequence[int]], wire_formats: WireFormats, labels: int
) -> Counter[str]:
    """Bytes of one step of the label-sharing topology, by kind of message, with ``labels`` labels per text."""
    sizes: Counter[str] = Counter()
    visits = ENTRY_BYTES if wire_formats.activation_delta else 0
    targets = labels * sum(map(len, micros))
    for micro, lengths in enumerate(micros):
        size = sum(lengths) * wire_formats.uplink.bytes_per_row
        last = micro == len(micros) - 1
        texts = len(lengths)
        sent = TrainRequest(step=step, micro_batch=micro, last=last, targets=targets, lengths=list(lengths), scale=0.0)
        _add(sizes, TuneKind.TRAIN, sent, size + texts * (LABEL_BYTES * labels + visits))
        _add(sizes, TuneKind.TRAIN_OK, TrainReply(scale=0.0, norm=0.0, seconds=0.0, loss=0.0), size)
    _add(sizes, TuneKind.OPT, OptimiseRequest(step=step, norm=0.0))
    _add(sizes, TuneKind.OPT_OK, OptimiseReply(step=step + 1, seconds=0.0))
    return sizes


def bytes_by_cut(sizes: Counter[str]) -> tuple[int, int, int]:
    """Bytes at the first cut, at the second cut, and in total."""
    return sum(sizes[kind] for kind in FIRST_CUT_KINDS), sum(sizes[kind] for kind in SECOND_CUT_KINDS), sizes.total()


def bytes_by_direction(sizes: Counter[str]) -> tuple[int, int]:
    """Bytes up to the cloud, and down to the edge."""
    down = sum(size for kind, size in sizes.items() if kind.endswith("_OK"))
    return sizes.total() - down, down
