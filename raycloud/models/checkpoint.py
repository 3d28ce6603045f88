"""Checkpoints read tensor by tensor: a model of which only the wanted modules are ever loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from raycloud.errors import ModelError
from raycloud.models.anatomy import anatomy_of
from raycloud.models.loading import quiet_transformers

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# What a configuration says about who saved or runs it, not about the model.
_PASSING = ("transformers_version", "dtype", "torch_dtype", "use_cache")
_SAMPLES = 16


class Checkpoint:
    """The safetensors files of a model directory or hub id, of which only the shards asked for are touched.

    Args:
        source: what :func:`raycloud.models.loading.resolve` returned.

    Raises:
        ModelError: there is no safetensors checkpoint.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        index = self.path(INDEX)
        if index is not None:
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"'{source}' has a damaged {INDEX}") from error
            self._shard_of = {str(name): str(shard) for name, shard in weight_map.items()}
        else:
            if self.path(SINGLE) is None:
                raise ModelError(f"'{source}' holds no safetensors checkpoint ({SINGLE} or {INDEX})")
            with self._open(SINGLE) as file:
                self._shard_of = dict.fromkeys(file.keys(), SINGLE)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from the file and not copied: its pages are read when they are used."""
        # One opening per tensor: the mapping ends with the tensor and takes its pages out of memory.
        with self._open(self._shard_of[name]) as file:
            return file.get_tensor(name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of the names, shapes, types and some values of all tensors.

        It tells checkpoints apart without reading them; it proves nothing against someone who forges one.
        """
        path = self.path(CONFIG)
        config = json.loads(path.read_text()) if path else {}
        plain = {key: value for key, value in config.items() if key not in _PASSING and not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        for name in sorted(self._shard_of):
            with self._open(self._shard_of[name]) as file:
                part = file.get_slice(name)
                shape = part.get_shape()
                digest.update(f"{name}{shape}{part.get_dtype()}".encode())
                if shape and min(shape):
                    rows = sorted({index * (shape[0] - 1) // _SAMPLES for index in range(_SAMPLES + 1)})
                    for row in rows:
                        values = part[row : row + 1].flatten()
                        digest.update(values[:: max(1, values.numel() // _SAMPLES)].float().numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def _open(self, shard: str) -> Iterator[Any]:
        path = self.path(shard)
        if path is None:
            raise ModelError(f"'{self.source}' lacks its shard {shard}")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {shard} of '{self.source}': {error}") from error

    def path(self, name: str) -> Path | None:
        """A file of the model, or None if it has none of this name."""
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.is_file() else None
        try:
            found = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ModelError(f"cannot load '{self.source}': {str(error).splitlines()[0]}") from error
        return Path(found) if found else None


def skeleton(config: PretrainedConfig, *, dtype: torch.dtype, attention: str, device: torch.device) -> PreTrainedModel:
    """A model whose parameters take no memory yet; its computed buffers, such as rotary frequencies, are there."""
    auto = AutoModelForCausalLM if anatomy_of(config).causal else AutoModel
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    owners: dict[str, nn.Module] = {}
    for name, buffer in model.named_non_persistent_buffers():
        path, _, leaf = name.rpartition(".")
        owners[path] = model.get_submodule(path)
        owners[path].register_buffer(leaf, torch.empty_like(buffer, device=device), persistent=False)
    with torch.no_grad():
        for owner in owners.values():
            # The library's own way to fill computed buffers; parameters are still without memory and not touched.
            model._init_weights(owner)
    return model.eval()


def stored_names(model: PreTrainedModel, modules: Iterable[nn.Module], checkpoint: Checkpoint) -> dict[str, str]:
    """Where a checkpoint keeps the parameters and saved buffers of modules of a model: its name by the model's.

    Raises:
        ModelError: the checkpoint lacks one.
    """
    wanted = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    saved = model.state_dict(keep_vars=True)
    return {name: _stored(name, tied, model, checkpoint) for name, tensor in saved.items() if id(tensor) in wanted}


def _stored(name: str, tied: dict[str, str], model: PreTrainedModel, checkpoint: Checkpoint) -> str:
    # Checkpoints of base models lack the prefix of the task model, and tied weights are stored once.
    prefix = f"{model.base_model_prefix}."
    for known in (name, tied.get(name, name)):
        for variant in (known, known.removeprefix(prefix), prefix + known):
            if variant in checkpoint:
                return variant
    raise ModelError(f"'{checkpoint.source}' does not hold the tensor '{name}'; is it a part of another cut?")


def materialise(
    model: PreTrainedModel, modules: Iterable[nn.Module], checkpoint: Checkpoint, device: torch.device
) -> None:
    """Load what the given modules hold from a checkpoint into a skeleton; the rest stays without memory.

    Where type and device agree, parameters are the file's pages themselves and take memory once they are used.

    Raises:
        ModelError: the checkpoint lacks a tensor, or its shape differs.
    """
    loaded: dict[str, nn.Parameter] = {}
    for name, stored in stored_names(model, modules, checkpoint).items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = getattr(owner, leaf)
        if stored not in loaded:
            tensor = checkpoint.tensor(stored)
            if tensor.shape != empty.shape:
                raise ModelError(
                    f"'{checkpoint.source}': '{stored}' has shape {tuple(tensor.shape)}, not {tuple(empty.shape)}"
                )
            kind = empty.dtype if empty.dtype.is_floating_point else tensor.dtype
            loaded[stored] = nn.Parameter(tensor.to(device=device, dtype=kind), tensor.is_floating_point())
        if isinstance(empty, nn.Parameter):
            setattr(owner, leaf, loaded[stored])
        else:
            owner.register_buffer(leaf, loaded[stored].detach())
