"""Codec of one cut: a calibrated codec for most positions, and bfloat16 for the first positions of a text.

The first one or two tokens of a text are attention sinks: their hidden states have norms hundreds of times larger than
all others and another direction. They are few and are sent as bfloat16, which has the range for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.errors import LinkSetupError
from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.floats import CODECS

_FIRST = CODECS["bfloat16"]


@dataclass(frozen=True)
class CutCodec:
    """Codec of hidden states at known positions of a text, to one payload and back.

    A receiver knows ``pos`` and ``count`` from the frame's header and checks the payload's length against
    :meth:`payload_bytes` before it allocates memory. Decoded hidden states are finite unless floats in the payload are
    not, so ``torch.isfinite(hidden).all()`` is the only check needed for malicious payloads.

    Args:
        codec: codec of ordinary positions.
        width: width of a hidden state.
        first: number of positions at the beginning of a text that are sent as bfloat16.
    """

    codec: Codec
    width: int
    first: int = 0

    @property
    def name(self) -> str:
        """Name of the codec."""
        return self.codec.name

    def _split(self, pos: int, count: int) -> int:
        """Number of the ``count`` tokens from position ``pos`` on that are among the first positions."""
        return min(max(self.first - pos, 0), count)

    def payload_bytes(self, pos: int, count: int) -> int:
        """Payload bytes of ``count`` hidden states, the first of which is at position ``pos`` of its text."""
        first = self._split(pos, count)
        first_bytes = first * _FIRST.bytes_per_row(self.width)
        return first_bytes + (count - first) * self.codec.bytes_per_row(self.width)

    def encode(self, hidden: Tensor, pos: int) -> Tensor:
        """Encode hidden states (n, width) of consecutive positions from ``pos`` on: (payload bytes,) uint8, on the CPU.

        Raises:
            ValueError: the hidden states have another width.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.width:
            raise ValueError(f"{self.name} codes hidden states of {self.width} numbers, got {tuple(hidden.shape)}")
        hidden = hidden.detach().to("cpu", torch.float32)
        first = self._split(pos, len(hidden))
        return torch.cat([_FIRST.encode(hidden[:first]).flatten(), self.codec.encode(hidden[first:]).flatten()])

    def decode(self, payload: Tensor | bytes | bytearray | memoryview, pos: int, count: int) -> Tensor:
        """Decode (payload bytes,) uint8, or any bytes-like object, to hidden states (count, width) float32.

        Raises:
            ValueError: the payload's length is not what ``pos`` and ``count`` imply.
        """
        length, expected = len(payload), self.payload_bytes(pos, count)
        if length != expected:
            raise ValueError(
                f"{self.name} payload of {count} hidden states from position {pos} must be {expected} bytes, "
                f"got {length}"
            )
        if count == 0:
            return torch.empty(0, self.width)
        # A copy: the socket's buffer may be read-only or reused.
        coded = payload if isinstance(payload, Tensor) else torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        first = self._split(pos, count)
        first_bytes = first * _FIRST.bytes_per_row(self.width)
        decoded = _FIRST.decode(coded[:first_bytes].view(first, 2 * self.width))
        rest = coded[first_bytes:].view(count - first, self.codec.bytes_per_row(self.width))
        return torch.cat([decoded, self.codec.decode(rest)])

    def arrived(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (n, width) at ``positions`` (n,) of any texts as the receiver decodes them (float32, CPU)."""
        hidden, early = hidden.detach().to("cpu", torch.float32), positions.cpu() < self.first
        decoded = self.codec.decode(self.codec.encode(hidden))
        decoded[early] = _FIRST.decode(_FIRST.encode(hidden[early]))
        return decoded


def float_cut_codec(codec: str, width: int) -> CutCodec:
    """Codec for any cut of any model, without calibration.

    Raises:
        LinkSetupError: the codec is unknown or needs a calibration.
    """
    if codec not in CODECS:
        raise LinkSetupError(f"codec '{codec}' needs a calibration or is unknown; allowed without: {', '.join(CODECS)}")
    return CutCodec(CODECS[codec], width)
