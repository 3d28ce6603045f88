"""Check of tensors for whole models and parts: every stored tensor is used, every tensor of the model is stored.

A checkpoint is compared with the model of its configuration by the headers of its files alone, before anything takes
memory. Every tensor of the file is used, every parameter and saved buffer of the model is read, in its own shape, or
the load fails with one line that names the tensors at fault. These known differences are accepted:

- a base model's tensors may lack the prefix of the task model or have it, and LayerNorm's weights may have the names
  ``gamma`` and ``beta`` of releases before transformers;
- one of several tensors that the configuration ties together is enough; if several are stored they must be equal;
- buffers that the library now computes (rotary ``inv_freq``, ``position_ids``, GPT-2's causal masks) are not read;
- an encoder is loaded without a task head: if some tensors have the base model's prefix, those without it belong to a
  head and are not read; and an encoder that was saved without a pooler has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.checkpoint import Checkpoint
from raycloud.models.structure import structure_of

_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.(masked_)?bias)$")
_LEGACY = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
_PLAIN = ("F64", "F32", "F16", "BF16")


def match_tensors(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    modules: Iterable[nn.Module] | None = None,
    *,
    part: bool = False,
) -> dict[str, str]:
    """Match the parameters and saved buffers of a model with a checkpoint: its stored names, by the model's names.

    Args:
        model: an empty model, see :func:`~raycloud.models.checkpoint.empty_model`.
        checkpoint: the checkpoint with the same configuration.
        modules: modules whose tensors are wanted; those of the whole model if None.
        part: the checkpoint is an exported part of a model, which needs to hold the wanted tensors only.

    Raises:
        ModelError: a tensor is missing, not used, of another shape, or not stored as plain numbers.
    """
    saved = model.state_dict(keep_vars=True)
    wanted = _wanted(modules, saved)
    found = {name: stored for name in saved if (stored := _stored(name, model, checkpoint)) is not None}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    used = set(found.values())
    for target, source in tied.items():
        _tie(found, target, source, checkpoint)
    needed = wanted if part else saved
    check_tensors(
        checkpoint.source,
        model.config.model_type,
        missing=[name for name in needed if name not in found],
        unused=[name for name in checkpoint.tensors if name not in used and not _harmless(name, model, checkpoint)],
        odd=[said for name, stored in found.items() if (said := _odd(saved[name], stored, checkpoint))],
    )
    return {name: stored for name, stored in found.items() if name in wanted}


def check_tensors(
    source: str, model_type: str, *, missing: Sequence[str], unused: Sequence[str], odd: Sequence[str] = ()
) -> None:
    """Refuse missing, unused and wrong tensors, in one line.

    Args:
        source: the model folder or file.
        model_type: the family.
        missing: tensors of the model that are not stored.
        unused: stored tensors that the model does not have.
        odd: descriptions of tensors with a wrong shape or type.

    Raises:
        ModelError: any of the three is not empty.
    """
    said = [
        f"{what} {', '.join(sorted(names)[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("it lacks", missing), ("the model has no place for", unused), ("odd are", odd))
        if names
    ]
    if said:
        raise ModelError(f"'{source}' does not hold the tensors of its '{model_type}' model: {'; '.join(said)}")


def _wanted(modules: Iterable[nn.Module] | None, saved: dict[str, torch.Tensor]) -> set[str]:
    if modules is None:
        return set(saved)
    held = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return {name for name, tensor in saved.items() if id(tensor) in held}


def _stored(name: str, model: PreTrainedModel, checkpoint: Checkpoint) -> str | None:
    prefix = f"{model.base_model_prefix}."
    old = next((name.removesuffix(new) + old for new, old in _LEGACY if name.endswith(new)), name)
    for known in (name, old):
        for variant in (known, known.removeprefix(prefix), prefix + known):
            if variant in checkpoint:
                return variant
    return None


def _tie(found: dict[str, str], target: str, source: str, checkpoint: Checkpoint) -> None:
    """Map two tied tensors to the stored one of the two."""
    stored, other = found.get(source, found.get(target)), found.get(target)
    if stored and other and stored != other and not torch.equal(*map(checkpoint.tensor, (stored, other))):
        raise ModelError(
            f"'{checkpoint.source}' holds '{other}' and '{stored}' with different values, and its configuration ties "
            "them; allowed: tie_word_embeddings: false, or equal values"
        )
    if stored is not None:
        found[target] = found[source] = stored


def _odd(empty: torch.Tensor, stored: str, checkpoint: Checkpoint) -> str:
    there = checkpoint.tensors[stored]
    if there.shape != tuple(empty.shape):
        return f"{stored} has shape {there.shape}, not {tuple(empty.shape)}"
    if empty.is_floating_point() and there.dtype not in _PLAIN:
        return f"{stored} is stored as {there.dtype}, and only {', '.join(_PLAIN)} are plain numbers"
    return ""


def _harmless(name: str, model: PreTrainedModel, checkpoint: Checkpoint) -> bool:
    if _COMPUTED.search(name):
        return True
    prefix = f"{model.base_model_prefix}."
    return (
        not structure_of(model.config).causal
        and not name.startswith(prefix)
        and any(other.startswith(prefix) for other in checkpoint.tensors)
    )
