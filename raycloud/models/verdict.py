"""Verdict on a configuration: whether models of it can be cut, measured on a small twin and kept on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PretrainedConfig

from raycloud.durable import write_atomically
from raycloud.errors import ModelError
from raycloud.fetch import cache_dir
from raycloud.models.self_check import check_structure
from raycloud.models.twin import BLOCKS, LOADING_SETTINGS, twin_model

_VERSION = 1
"""Version of the check: verdicts of others are not read."""
_CUTS = ((1, BLOCKS - 1), (BLOCKS // 2, BLOCKS // 2))
_TOLERANCE = 1e-4


class StructureVerdict(BaseModel):
    """Verdict on the models of one configuration with one attention implementation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: bool
    reason: str = ""
    """Reason of a refusal, in one line."""
    path: str = ""
    """Dotted path of the list of blocks."""
    causal: bool = True
    chunks: bool = True
    """True if several tokens may follow a cached text in one call."""
    logits: str = "head"
    """Kind of :class:`~raycloud.models.self_check.LogitsRule`; its value may depend on sizes that a twin has not."""
    difference: float = 0.0
    """Largest relative difference between segments and whole that was measured."""


def structure_verdict(
    config: PretrainedConfig, attention: str = "sdpa", *, causal: bool = True, folder: Path | None = None
) -> StructureVerdict:
    """Verdict on a configuration: the one that is kept, or a new one by checking its twin.

    Args:
        config: configuration of the text model.
        attention: attention implementation of the library.
        causal: True for a model with a language-modelling head.
        folder: folder of verdicts; None for that of the cache.
    """
    path = (folder or cache_dir() / "structure") / f"{_key(config, attention, causal)}.json"
    try:
        return StructureVerdict.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        verdict = check_twin(config, attention, causal=causal)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, verdict.model_dump_json(indent=2) + "\n")
    return verdict


def check_twin(config: PretrainedConfig, attention: str = "sdpa", *, causal: bool = True) -> StructureVerdict:
    """Check the small twin of a configuration; see :func:`structure_verdict`."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)  # a twin is too small for more
    try:
        checked = check_structure(twin_model(config, attention, causal=causal), cuts=_CUTS, tolerance=_TOLERANCE)
    except ModelError as error:
        return StructureVerdict(accepted=False, reason=str(error))
    except Exception as error:  # the library's own code fails on the twin: so it would on the model
        why = (str(error).splitlines() or [""])[0][:160]
        said = f"a small '{config.model_type}' model fails: {type(error).__name__}: {why}; run it whole"
        return StructureVerdict(accepted=False, reason=said)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return StructureVerdict(
        accepted=True,
        path=checked.structure.chain.path,
        causal=checked.structure.causal,
        chunks=checked.chunks,
        logits=checked.logits.kind,
        difference=max(checked.prefill, checked.decode or 0.0, checked.padded),
    )


def _key(config: PretrainedConfig, attention: str, causal: bool) -> str:
    """Hash of all that a verdict depends on."""
    given = {name: value for name, value in config.to_dict().items() if name not in LOADING_SETTINGS}
    about = [_VERSION, transformers.__version__, config.model_type, attention, causal, given]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]
