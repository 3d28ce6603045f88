"""Codecs of a model's cuts, on which both ends of a link must agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raycloud.errors import LinkSetupError
from raycloud.link.codecs.cut_codec import CutCodec, float_cut_codec
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.registry import check_codec


class FittedCodecs(Protocol):
    """Codecs fitted to one model's hidden states, such as :class:`raycloud.split.calibration.Calibration`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all fitted values."""
        ...

    def cut_codec(self, codec: str, cut: int) -> CutCodec:
        """Codec of one cut; raises LinkSetupError if the cut is not calibrated."""
        ...


@dataclass(frozen=True)
class CutCodecs:
    """Codecs of a model's cuts: casts for any cut, smaller codecs for calibrated cuts."""

    width: int
    calibration: FittedCodecs | None = None

    def cut_codec(self, codec: str, cut: int) -> CutCodec:
        """Codec of one cut.

        Raises:
            LinkSetupError: the codec is unknown, or needs a calibration that this end does not have.
        """
        try:
            check_codec(codec)
        except ValueError as error:
            raise LinkSetupError(str(error)) from None
        if codec in CODECS:
            return float_cut_codec(codec, self.width)
        if self.calibration is None:
            raise LinkSetupError(f"codec '{codec}' needs a calibration (raycloud split calibrate) and none was given")
        return self.calibration.cut_codec(codec, cut)

    def fingerprint(self, codec: str) -> str:
        """Fingerprint of the calibration that the other end needs to decode this codec; empty for casts."""
        return "" if codec in CODECS or self.calibration is None else self.calibration.fingerprint
