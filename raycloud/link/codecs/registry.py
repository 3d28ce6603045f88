"""Names of the codecs of hidden states, and what each is for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodecEntry:
    """Entry of the registry."""

    purpose: str
    calibrated: bool = False
    """True if the codec is fitted to a model's hidden states at each cut (``raycloud split calibrate``)."""


CODEC_NAMES: dict[str, CodecEntry] = {
    "float32": CodecEntry("the text of the unsplit model, token for token; also the reference of tests"),
    "float16": CodecEntry("half the bytes; numbers beyond its range saturate"),
    "bfloat16": CodecEntry("half the bytes at any range; what a model in bfloat16 computes with anyway"),
    "int8": CodecEntry("a quarter of the bytes at no measurable loss: the usual choice over a link", calibrated=True),
    "int4": CodecEntry("an eighth of the bytes for slow links, at a small loss", calibrated=True),
}
"""Codecs by name; :mod:`raycloud.link.codecs.floats` has the casts, :mod:`raycloud.link.codecs.fitting` the others."""


def check_codec(name: str) -> None:
    """Check that a codec exists.

    Raises:
        ValueError: there is no such codec.
    """
    if name not in CODEC_NAMES:
        raise ValueError(f"no codec '{name}'; allowed: {', '.join(CODEC_NAMES)}")
