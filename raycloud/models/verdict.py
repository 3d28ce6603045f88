"""Verdict on a configuration: whether models of it can be cut, measured on a small twin and kept on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PretrainedConfig

from raycloud.durable import write_atomically
from raycloud.errors import ModelError
from raycloud.fetch import cache_dir
from raycloud.models.structure import ModelStructure
from raycloud.models.twin import BLOCKS, auto_class, twin_config, twin_model

_VERSION = 2
"""Version of the check: verdicts of others are not read."""
_CUTS = ((1, BLOCKS - 1), (BLOCKS // 2, BLOCKS // 2))
_TOLERANCE = 1e-4

_known: dict[Path, StructureVerdict] = {}
"""Verdicts of this process by the file that holds them."""


class StructureVerdict(BaseModel):
    """Verdict on the models of one configuration with one attention implementation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str = ""
    """Reason of a refusal, in one line."""
    structure: ModelStructure | None = None
    """Structure of the models; None if they are refused."""
    difference: float = 0.0
    """Largest relative difference between segments and whole that was measured."""
    fast: float | None = None
    """Largest relative difference of the fast path; None if the model's modules have no layout of it."""

    @property
    def accepted(self) -> bool:
        """True if models of this configuration can be cut."""
        return self.structure is not None


def structure_of(config: PretrainedConfig) -> ModelStructure:
    """Structure of the models of a configuration, with the attention implementation that it names, or ``sdpa``.

    Raises:
        ModelError: they cannot be cut; one line that names the reason.
    """
    verdict = structure_verdict(config, "eager" if config._attn_implementation == "eager" else "sdpa")
    if verdict.structure is None:
        raise ModelError(verdict.reason)
    return verdict.structure


def loading_class(config: PretrainedConfig, attention: str) -> tuple[Any, str]:
    """Class of the library that loads models of a configuration, and the attention implementation to load them with.

    A model that cannot be cut is loaded as well, to be run whole.

    Args:
        config: configuration of the model.
        attention: wanted attention implementation; the result is ``eager`` where the model has no other.

    Raises:
        ModelError: the library has no text model of this type.
    """
    structure = structure_verdict(config, attention).structure
    return auto_class(config), attention if structure is None else structure.attention


def structure_verdict(
    config: PretrainedConfig, attention: str = "sdpa", *, folder: Path | None = None
) -> StructureVerdict:
    """Verdict on a configuration: the one that is kept, or a new one by checking its twin.

    Args:
        config: configuration of the model.
        attention: attention implementation of the library; ``eager`` is taken where a model has no ``sdpa``.
        folder: folder of verdicts; None for that of the cache.
    """
    try:
        small = twin_config(config)
    except ModelError as error:
        return StructureVerdict(reason=str(error))
    path = (folder or cache_dir() / "structure") / f"{_key(small, attention)}.json"
    if (known := _known.get(path)) is not None:
        return known
    try:
        verdict = StructureVerdict.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        verdict = check_twin(config, attention)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, verdict.model_dump_json(indent=2) + "\n")
    _known[path] = verdict
    return verdict


def forget_verdicts() -> None:
    """Drop the verdicts that this process has read; those on disk stay."""
    _known.clear()


def check_twin(config: PretrainedConfig, attention: str = "sdpa") -> StructureVerdict:
    """Check the small twin of a configuration; see :func:`structure_verdict`."""
    # Imported here: the check runs segments, and segments ask for verdicts.
    from raycloud.models.self_check import check_structure

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)  # a twin is too small for more
    try:
        # Not in a caller's inference mode or device: the twin's weights are set here.
        with torch.inference_mode(False), torch.device("cpu"):
            checked = check_structure(twin_model(config, attention), cuts=_CUTS, tolerance=_TOLERANCE)
    except ModelError as error:
        return StructureVerdict(reason=str(error))
    except Exception as error:  # the library's own code fails on the twin: so it would on the model
        why = (str(error).splitlines() or [""])[0][:160]
        said = f"a small '{config.model_type}' model fails: {type(error).__name__}: {why}; run it whole"
        return StructureVerdict(reason=said)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return StructureVerdict(structure=checked.structure, difference=checked.difference, fast=checked.fast)


def _key(small: PretrainedConfig, attention: str) -> str:
    """Hash of all that a verdict depends on: models with equal twins share it."""
    about = [_VERSION, transformers.__version__, torch.__version__, small.model_type, attention, small.to_dict()]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]
