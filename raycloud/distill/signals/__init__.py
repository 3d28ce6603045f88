"""Signals: what a teacher says about a batch, compacted to response tokens and coded for the link.

A signal is valid for exact token ids only and carries a key that says which; a student refuses any other.
"""

from __future__ import annotations

from raycloud.distill.signals.head import FrozenHead, frozen_head
from raycloud.distill.signals.keys import sample_keys, signal_key
from raycloud.distill.signals.observe import observe
from raycloud.distill.signals.recipe import SignalCodec, SignalKind, SignalRecipe
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
    "frozen_head",
    "observe",
    "sample_keys",
    "signal_key",
]
