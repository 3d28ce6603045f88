"""Signals: a teacher's outputs for a batch, reduced to response tokens and encoded for the link.

A signal is valid for exact token ids only and carries a key that identifies them; a student refuses any other.
"""

from __future__ import annotations

from raycloud.distill.signal_recipe import SignalCodec, SignalKind, SignalRecipe
from raycloud.distill.signals.compute import compute_signal
from raycloud.distill.signals.head import FrozenHead, frozen_head
from raycloud.distill.signals.keys import sample_keys, signal_key
from raycloud.distill.signals.signal import Signal, SignalStore
from raycloud.distill.signals.targets import Targets

__all__ = [
    "FrozenHead",
    "Signal",
    "SignalCodec",
    "SignalKind",
    "SignalRecipe",
    "SignalStore",
    "Targets",
    "compute_signal",
    "frozen_head",
    "sample_keys",
    "signal_key",
]
