"""Encoding of hidden states, logits and ids."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from raycloud.distill.signal_recipe import SignalCodec
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Int8
from raycloud.link.codecs.transforms import Rotate

SCALE_BYTES = 2
"""Bytes of the scale of an ``int8`` vector."""
_ID_BYTES = 8


def encode_values(values: Tensor, codec: SignalCodec) -> Tensor:
    """Encode (n, width) numbers as (n, bytes) uint8.

    ``int8`` uses one byte per number and one scale per vector, after a rotation: a few coordinates of final hidden
    states are 20 times as large as the others, which would be left with a handful of steps. On SmolLM2 the rotation
    reduces KL(teacher ‖ decoded) from 6e-3 to 4e-4 nats per token.
    """
    if codec != "int8":
        return CODECS[codec].encode(values)
    width = values.shape[-1]
    return Int8(width, width).encode(_dct_rotation(width, values.device).forward(values.float()))


def decode_values(payload: Tensor, codec: SignalCodec) -> Tensor:
    """Decode (n, bytes) uint8 to (n, width) float32."""
    if codec != "int8":
        return CODECS[codec].decode(payload)
    width = payload.shape[-1] - SCALE_BYTES
    return _dct_rotation(width, payload.device).back(Int8(width, width).decode(payload))


@lru_cache(maxsize=8)
def _dct_rotation(width: int, device: torch.device) -> Rotate:
    """Rotation that both ends compute without communication: two discrete cosine transforms."""
    left = next(size for size in range(math.isqrt(width), 0, -1) if width % size == 0)
    return Rotate(_dct_matrix(left).to(device), _dct_matrix(width // left).to(device))


def _dct_matrix(size: int) -> Tensor:
    """Orthonormal discrete cosine transform (size, size) of the second kind."""
    steps = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * steps[:, None] * (steps + 0.5)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.float()


def id_bytes(vocabulary_size: int) -> int:
    """Number of bytes of an id: two up to a vocabulary of 65,536 entries, three up to 16 million."""
    return max(1, -(-(vocabulary_size - 1).bit_length() // 8))


def encode_ids(ids: Tensor, vocabulary_size: int) -> Tensor:
    """Encode ids below ``vocabulary_size``, (…) to (…, bytes) uint8."""
    coded = ids.long().contiguous().view(torch.uint8).view(*ids.shape, _ID_BYTES)
    return coded[..., : id_bytes(vocabulary_size)].contiguous()


def decode_ids(payload: Tensor) -> Tensor:
    """Decode (…, bytes) uint8 to ids (…)."""
    return pad(payload, (0, _ID_BYTES - payload.shape[-1])).view(torch.int64)[..., 0]
