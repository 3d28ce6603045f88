"""Keys: what a signal is valid for.

A sample's key depends on its own tokens alone, not on the batch it is in: a store can put signals together sample by
sample, and draws that are seeded from it are the same in every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from raycloud.data.batches import Batch
from raycloud.distill.signals.recipe import SignalRecipe


def sample_keys(teacher: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> list[str]:
    """One for each sample of a batch: teacher, exact ids and labels without padding, recipe and temperatures."""
    asked = hashlib.sha256(f"{teacher}|{recipe.model_dump_json()}|{sorted(set(temperatures))}|".encode())
    keys = []
    tensors = (batch.ids.cpu().long(), batch.labels.cpu().long(), batch.valid.cpu())
    for ids, labels, valid in zip(*tensors, strict=True):
        digest = asked.copy()
        digest.update(ids[valid].numpy().tobytes() + labels[valid].numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def signal_key(teacher: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> str:
    """What a batch's signal is valid for: its samples' keys, in order."""
    return joined(sample_keys(teacher, batch, recipe, temperatures))


def joined(keys: Sequence[str]) -> str:
    """One key of several."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()
