"""The code of one cut: a codec for most rows, and a cast for the first positions of a text.

Attention parks itself on the first token or two of a text, whose rows are hundreds of times longer than all others and
unlike them; they are few and are sent as bfloat16, which has the range for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.floats import CODECS

_FIRST = CODECS["bfloat16"]


@dataclass(frozen=True)
class Boundary:
    """Rows at known positions of a text to one payload and back.

    A receiver knows ``pos`` and ``rows`` from the frame's header and checks the payload's length against
    :meth:`payload_bytes` before it allocates anything. Decoded rows are finite unless floats in the payload are not, so
    ``torch.isfinite(rows).all()`` is the whole check for poisoned payloads.

    Args:
        codec: the code of ordinary rows.
        width: numbers of a row.
        first: positions at the beginning of a text that are sent as bfloat16.
    """

    codec: Codec
    width: int
    first: int = 0

    @property
    def name(self) -> str:
        """The codec's name."""
        return self.codec.name

    def _split(self, pos: int, rows: int) -> int:
        """How many of the rows stand at one of the first positions."""
        return min(max(self.first - pos, 0), rows)

    def payload_bytes(self, pos: int, rows: int) -> int:
        """Bytes of ``rows`` rows, the first of which stands at position ``pos`` of its text."""
        first = self._split(pos, rows)
        apart = first * _FIRST.bytes_per_row(self.width)
        return apart + (rows - first) * self.codec.bytes_per_row(self.width)

    def encode(self, rows: Tensor, pos: int) -> Tensor:
        """(n, width) rows of neighbouring positions from ``pos`` on to (payload bytes,) uint8 on the CPU.

        Raises:
            ValueError: the rows have another width.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"{self.name} codes rows of {self.width} numbers, got {tuple(rows.shape)}")
        rows = rows.detach().to("cpu", torch.float32)
        first = self._split(pos, len(rows))
        return torch.cat([_FIRST.encode(rows[:first]).flatten(), self.codec.encode(rows[first:]).flatten()])

    def decode(self, payload: Tensor | bytes | bytearray | memoryview, pos: int, rows: int) -> Tensor:
        """(payload bytes,) uint8, or anything that holds bytes, to (rows, width) float32.

        Raises:
            ValueError: the payload's length is not what ``pos`` and ``rows`` imply.
        """
        length, expected = len(payload), self.payload_bytes(pos, rows)
        if length != expected:
            raise ValueError(
                f"{self.name} payload of {rows} rows from position {pos} must be {expected} bytes, got {length}"
            )
        if rows == 0:
            return torch.empty(0, self.width)
        # A copy: what the socket handed over may be read-only or reused.
        coded = payload if isinstance(payload, Tensor) else torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        first = self._split(pos, rows)
        apart = first * _FIRST.bytes_per_row(self.width)
        decoded = _FIRST.decode(coded[:apart].view(first, 2 * self.width))
        rest = coded[apart:].view(rows - first, self.codec.bytes_per_row(self.width))
        return torch.cat([decoded, self.codec.decode(rest)])

    def arrived(self, rows: Tensor, positions: Tensor) -> Tensor:
        """What the other side decodes of rows (n, width) at ``positions`` (n,) of any texts, as float32 on the CPU."""
        rows, early = rows.detach().to("cpu", torch.float32), positions.cpu() < self.first
        decoded = self.codec.decode(self.codec.encode(rows))
        decoded[early] = _FIRST.decode(_FIRST.encode(rows[early]))
        return decoded


def plain_boundary(codec: str, width: int) -> Boundary:
    """The code of any cut of any model, without calibration.

    Raises:
        LinkError: the codec is unknown or needs a calibration.
    """
    if codec not in CODECS:
        raise LinkError(f"codec '{codec}' needs a calibration or is unknown; allowed without: {', '.join(CODECS)}")
    return Boundary(CODECS[codec], width)
