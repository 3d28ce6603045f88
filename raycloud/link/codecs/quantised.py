"""Codecs of hidden states as small integers, with float16 scales for groups of neighbouring coordinates.

A coded hidden state is its scales followed by its codes. The last group may be short: it is padded with zeros to
compute its scale, and only the hidden state's own numbers are coded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from raycloud.link.codecs.codec import check_payload, check_width
from raycloud.link.codecs.floats import CODECS

_FLOAT16 = CODECS["float16"]
_SCALE_BYTES = 2


def grouped(numbers: Tensor, group: int) -> Tensor:
    """Numbers (n, width) as (n, groups, group), padded with zeros at the end."""
    return pad(numbers, (0, -numbers.shape[1] % group)).unflatten(1, (-1, group))


def extremes(groups: Tensor) -> Tensor:
    """Number of largest magnitude of each group, with its sign: (n, groups, group) to (n, groups, 1)."""
    return groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))


def _split_off_scales(payload: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    scales = _FLOAT16.decode(payload[:, : groups * _SCALE_BYTES])
    return scales[:, :, None], payload[:, groups * _SCALE_BYTES :]


def _divisor(coded_scales: Tensor) -> Tensor:
    """Scales as the receiver decodes them, (n, groups, 1); 1 for a group of zeros."""
    scales = _FLOAT16.decode(coded_scales)[:, :, None]
    return torch.where(scales == 0, 1.0, scales)


def _paired(codes: Tensor) -> Tensor:
    """Pack codes from 0 to 15, (n, width) uint8, two to a byte."""
    codes = pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _unpaired(pairs: Tensor, width: int) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)[:, :width]


@dataclass(frozen=True)
class UniformQuantiser(ABC):
    """Quantiser with even steps between plus and minus the largest magnitude of a group.

    Args:
        width: width of a hidden state.
        group: number of neighbouring coordinates that share a scale; all of them if it equals ``width``.
    """

    width: int
    group: int
    name: ClassVar[str]
    """Name of the codec in recipes."""
    most: ClassVar[int]
    """Number of steps from zero to the largest magnitude."""

    @property
    def _groups(self) -> int:
        return -(-self.width // self.group)

    @abstractmethod
    def _code_bytes(self) -> int:
        """Bytes of one hidden state's codes."""

    @abstractmethod
    def _packed(self, codes: Tensor) -> Tensor:
        """Pack codes (n, width) int8 as (n, code bytes) uint8."""

    @abstractmethod
    def _unpacked(self, coded: Tensor) -> Tensor:
        """Inverse of :meth:`_packed`."""

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one hidden state of ``width`` numbers."""
        check_width(self.name, self.width, width)
        return self._groups * _SCALE_BYTES + self._code_bytes()

    def encode(self, hidden: Tensor, dither: Tensor | None = None) -> Tensor:
        """Encode hidden states (n, width) as (n, bytes per hidden state) uint8.

        Args:
            hidden: hidden states (n, width).
            dither: (n, width) from -1/2 to 1/2, added in units of a step before rounding to the nearest; uniformly
                distributed dither makes the rounding unbiased.
        """
        check_width(self.name, self.width, hidden.shape[1])
        groups = grouped(hidden, self.group)
        scales = _FLOAT16.encode(groups.abs().amax(dim=-1) / self.most)
        steps = groups / _divisor(scales)
        if dither is not None:
            steps += grouped(dither, self.group)
        codes = steps.round_().clamp_(-self.most, self.most).to(torch.int8)
        return torch.cat([scales, self._packed(codes.flatten(1)[:, : self.width])], dim=1)

    def decode(self, payload: Tensor) -> Tensor:
        """Decode (n, bytes per hidden state) uint8 to hidden states (n, width) float32.

        Raises:
            ValueError: the payload has another number of bytes per hidden state.
        """
        check_payload(self.name, self.bytes_per_row(self.width), payload)
        scales, coded = _split_off_scales(payload, self._groups)
        numbers = grouped(self._unpacked(coded).float(), self.group) * scales
        return numbers.flatten(1)[:, : self.width]


class Int8(UniformQuantiser):
    """Codec with one byte per number: 255 even steps."""

    name, most = "int8", 127

    def _code_bytes(self) -> int:
        return self.width

    def _packed(self, codes: Tensor) -> Tensor:
        return codes.view(torch.uint8)

    def _unpacked(self, coded: Tensor) -> Tensor:
        return coded.contiguous().view(torch.int8)


class UniformInt4(UniformQuantiser):
    """Codec with four bits per number: 15 even steps. Unlike Int4 it allows stochastic rounding, uncalibrated."""

    name, most = "int4", 7

    def _code_bytes(self) -> int:
        return -(-self.width // 2)

    def _packed(self, codes: Tensor) -> Tensor:
        return _paired((codes + 8).to(torch.uint8))

    def _unpacked(self, coded: Tensor) -> Tensor:
        # A correct sender never uses the sixteenth code; it decodes to one more step, which is finite.
        return _unpaired(coded, self.width).to(torch.int8) - 8


@dataclass(frozen=True, eq=False)
class Int4:
    """Codec with four bits per number: the nearest of 16 uneven levels, in units of the group's extreme number.

    The scale is the extreme number itself, sign included, so that it falls on the level near one: no level is wasted on
    the side where a group has no extreme. Rotated hidden states have nearly Gaussian groups, for which levels that are
    denser near zero have a smaller error than even steps (the idea of NF4: Dettmers et al., arXiv 2305.14314; there the
    levels are fixed, here they are fitted).

    Args:
        width: width of a hidden state.
        group: number of neighbouring coordinates that share a scale.
        levels: (16,) levels, ascending.
    """

    width: int
    group: int
    levels: Tensor

    @property
    def name(self) -> str:
        """Name of the codec in recipes."""
        return "int4"

    @property
    def _groups(self) -> int:
        return -(-self.width // self.group)

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one hidden state of ``width`` numbers."""
        check_width(self.name, self.width, width)
        return self._groups * _SCALE_BYTES + -(-width // 2)

    def encode(self, hidden: Tensor) -> Tensor:
        """Encode hidden states (n, width) as (n, bytes per hidden state) uint8."""
        check_width(self.name, self.width, hidden.shape[1])
        groups = grouped(hidden, self.group)
        scales = _FLOAT16.encode(extremes(groups)[:, :, 0])
        between = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(groups / _divisor(scales), between).to(torch.uint8)
        return torch.cat([scales, _paired(codes.flatten(1)[:, : self.width])], dim=1)

    def decode(self, payload: Tensor) -> Tensor:
        """Decode (n, bytes per hidden state) uint8 to hidden states (n, width) float32.

        Raises:
            ValueError: the payload has another number of bytes per hidden state.
        """
        check_payload(self.name, self.bytes_per_row(self.width), payload)
        scales, pairs = _split_off_scales(payload, self._groups)
        numbers = grouped(self.levels[_unpaired(pairs, self.width).int()], self.group) * scales
        return numbers.flatten(1)[:, : self.width]
