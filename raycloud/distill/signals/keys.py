"""Keys that identify what a signal is valid for.

A sample's key depends on its own tokens alone, not on its batch: a store can combine signals sample by sample, and
draws seeded from the key are the same in every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from raycloud.data.batches import Batch
from raycloud.distill.signal_recipe import SignalRecipe


def sample_keys(teacher: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> list[str]:
    """Key of each sample of a batch: hash of teacher, exact ids and labels without padding, recipe and temperatures."""
    asked = hashlib.sha256(f"{teacher}|{recipe.model_dump_json()}|{sorted(set(temperatures))}|".encode())
    keys = []
    tensors = (batch.ids.cpu().long(), batch.labels.cpu().long(), batch.valid.cpu())
    for ids, labels, valid in zip(*tensors, strict=True):
        digest = asked.copy()
        digest.update(ids[valid].numpy().tobytes() + labels[valid].numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def signal_key(teacher: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> str:
    """Key of a batch's signal: its samples' keys combined in order."""
    return combine_keys(sample_keys(teacher, batch, recipe, temperatures))


def combine_keys(keys: Sequence[str]) -> str:
    """Combine several keys into one."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()
