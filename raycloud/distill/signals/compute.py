"""Computation of a signal from a teacher and a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.signal_recipe import SignalRecipe
from raycloud.distill.signals.encoding import encode_ids, encode_values
from raycloud.distill.signals.keys import combine_keys, sample_keys
from raycloud.distill.signals.sampled import draw, draw_offsets, encode_draws
from raycloud.distill.signals.signal import Signal
from raycloud.distill.signals.top_k import keep_top_k
from raycloud.models.segments import Segment


@torch.no_grad()
def compute_signal(
    teacher: Segment, name: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float], *, chunk: int = 256
) -> Signal:
    """Run the teacher once over a batch and compute its signal at every labelled position.

    Draws are seeded from the samples' keys: the same ids are drawn for a sample at any time and in any batch.

    Args:
        teacher: the whole model.
        name: identifies its weights in the signal's key.
        batch: on the teacher's device.
        recipe: kind of signal and codec.
        temperatures: temperatures that the students will use.
        chunk: number of tokens whose logits exist at a time.
    """
    wanted = batch.labels != IGNORE
    hidden = teacher.hidden(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)[wanted]
    taus = tuple(sorted(set(temperatures)))
    keys = sample_keys(name, batch, recipe, temperatures)
    if recipe.kind == "hidden":
        payload = {"rows": encode_values(hidden, recipe.codec).cpu()}
    else:
        labels, at = batch.labels[wanted], draw_offsets(keys, wanted.sum(dim=1).tolist(), len(taus)).to(hidden.device)
        parts = [
            _payload(teacher.logits(part).float(), some_labels, some_offsets, recipe, taus)
            for part, some_labels, some_offsets in zip(
                hidden.split(chunk), labels.split(chunk), at.split(chunk), strict=True
            )
        ]
        payload = {field: torch.cat([part[field] for part in parts]).cpu() for field in parts[0]}
    return Signal(combine_keys(keys), recipe.kind, recipe.codec, payload, taus)


def _payload(
    logits: Tensor, labels: Tensor, offset: Tensor, recipe: SignalRecipe, taus: Sequence[float]
) -> dict[str, Tensor]:
    """Payload for logits (c, W) with labels (c,), and with random offsets (c, temperatures) for draws."""
    vocabulary_size = logits.shape[-1]
    if recipe.kind == "logits":
        return {"rows": encode_values(logits - logits.amax(dim=-1, keepdim=True), recipe.codec)}
    if recipe.kind == "scalars":
        log_p = [(logits / tau).log_softmax(dim=-1).gather(-1, labels[:, None]) for tau in taus]
        return {"log_p": torch.cat(log_p, dim=-1)}
    if recipe.kind == "sampled":
        return _entropies(logits, taus) | _draws(logits, recipe.draws, offset, taus)
    payload, ids, others = keep_top_k(logits, recipe.k, recipe.codec, taus)
    if recipe.kind != "sorted":
        payload["ids"] = encode_ids(ids, vocabulary_size)
    if recipe.kind == "hybrid":
        payload |= _entropies(logits, taus) | _draws(others, recipe.draws, offset, taus)
    return payload


def _entropies(logits: Tensor, taus: Sequence[float]) -> dict[str, Tensor]:
    log_p = ((logits / tau).log_softmax(dim=-1) for tau in taus)
    return {"entropy": torch.stack([-(one.exp() * one).sum(dim=-1) for one in log_p], dim=-1)}


def _draws(logits: Tensor, count: int, offset: Tensor, taus: Sequence[float]) -> dict[str, Tensor]:
    """Draws from softmax(logits / τ) for each temperature; logits may be -inf."""
    peak = logits.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    masses = (((logits - peak) / tau).exp() for tau in taus)
    drawn = [draw(mass, count, offset[:, at]) for at, mass in enumerate(masses)]
    return encode_draws(torch.stack(drawn, dim=1), logits.shape[-1])
