"""Codecs: rows of numbers to bytes and back.

A coded row stands on its own, (n, width) rows become (n, bytes per row) bytes, so that a receiver decodes the rows it
works on and never the whole payload at once. The casts need nothing but the rows; the smaller codecs are calibrated on
a model's own rows at one cut (:mod:`raycloud.link.codecs.fitting`).
"""

from __future__ import annotations

from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.floats import CODECS, Cast

__all__ = ["CODECS", "Cast", "Codec"]
