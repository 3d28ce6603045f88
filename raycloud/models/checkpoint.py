"""Checkpoints read tensor by tensor, so that only the wanted modules of a model are loaded."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from raycloud.checksums import verify
from raycloud.errors import ModelError
from raycloud.models.configuration import CONFIG, file_of, first_line, quiet_transformers
from raycloud.models.structure import base_of, pooler_of, structure_of
from raycloud.models.weights import tensor_digest

INDEX, SINGLE, GENERATION = "model.safetensors.index.json", "model.safetensors", "generation_config.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_SETTLED_NS = 1_000_000_000
# Settings that describe the program that saved or runs the model, not the model.
_IGNORED_SETTINGS = ("transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map")


@dataclass(frozen=True)
class StoredTensor:
    """Header of a tensor in a file: its shard, its type in the notation of safetensors, and its shape."""

    shard: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """Safetensors files of a model directory or hub id; only their headers are read until a tensor is requested.

    Args:
        source: the result of :func:`raycloud.models.loading.resolve`.

    Raises:
        ModelError: there is no safetensors checkpoint, it is damaged, its index and its shards disagree, or the folder
            also holds an adapter, which may or may not be wanted.
        ChecksumError: a file of the folder differs from its entry in ``checksums.json``.
    """

    def __init__(self, source: str) -> None:
        verify(source)
        self.source = source
        for name in ADAPTERS:
            if self.path(name) is not None:
                raise ModelError(
                    f"'{source}' holds an adapter ({name}) beside a model: merge it into the weights first "
                    "(merge_and_unload of peft), or move it away to load the model without it"
                )
        index, single = self.path(INDEX), self.path(SINGLE)
        if index is None and single is None:
            raise ModelError(f"'{source}' holds no safetensors checkpoint ({SINGLE} or {INDEX})")
        if index is not None and single is not None:
            raise ModelError(f"'{source}' holds both {SINGLE} and {INDEX}: move away the one that is not wanted")
        self.tensors: Mapping[str, StoredTensor] = (
            self._indexed(index) if index is not None else dict(self._headers(SINGLE))
        )
        """Headers of all tensors by name."""

    def _indexed(self, index: Path) -> dict[str, StoredTensor]:
        try:
            weight_map = {str(name): str(shard) for name, shard in json.loads(index.read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"'{self.source}' has a damaged {INDEX}") from error
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise ModelError(f"'{self.source}' has a damaged {INDEX}: shard '{shard}' is outside of the folder")
        found = [header for shard in shards for header in self._headers(shard)]
        tensors = dict(found)
        odd = sorted({*weight_map.items()} ^ {(name, one.shard) for name, one in found})
        if odd:
            name, shard = odd[0]
            raise ModelError(
                f"'{self.source}': {INDEX} and the shards disagree about '{name}' in {shard} and {len(odd) - 1} others"
            )
        return tensors

    def _headers(self, shard: str) -> Iterator[tuple[str, StoredTensor]]:
        with self._open(shard) as file:
            for name in sorted(file.keys()):
                part = file.get_slice(name)
                yield name, StoredTensor(shard, part.get_dtype(), tuple(part.get_shape()))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory-mapped from the file and not copied: its pages are read when they are used."""
        # The file is opened once per tensor: the mapping is released with the tensor, and its pages with it.
        with self._open(self.tensors[name].shard) as file:
            return file.get_tensor(name)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every byte of each tensor with its type and shape, by name; a file is read once per process."""
        found: dict[str, str] = {}
        for shard in sorted({one.shard for one in self.tensors.values()}):
            with self._open(shard):  # reports damage as a ModelError
                path = Path(str(self.path(shard)))
                about = path.stat()
                # A file that was written just now may be written again within the same tick of the clock.
                ask = _digests if time.time_ns() - about.st_mtime_ns > _SETTLED_NS else _digests.__wrapped__
                found |= ask(str(path), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration's settings of the model, and of every byte of every tensor."""
        return fingerprint_from(self.config, self.digests)

    @property
    def config(self) -> dict[str, Any]:
        """Configuration as stored; empty if there is none."""
        path = self.path(CONFIG)
        return json.loads(path.read_bytes()) if path else {}

    @contextmanager
    def _open(self, shard: str) -> Iterator[Any]:
        path = self.path(shard)
        if path is None:
            raise ModelError(f"'{self.source}' lacks its shard {shard}")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {shard} of '{self.source}': {first_line(error)}") from error

    def path(self, name: str) -> Path | None:
        """Path of a file of the model, or None if there is no file of this name."""
        return file_of(self.source, name)

    def generation_config(self) -> GenerationConfig | None:
        """Generation settings of the model; None if it has none.

        Raises:
            ModelError: the file is damaged.
        """
        path = self.path(GENERATION)
        if path is None:
            return None
        try:
            found: GenerationConfig = GenerationConfig.from_pretrained(path.parent)
        except Exception as error:  # the library's checks raise many kinds
            raise ModelError(f"'{self.source}' has a damaged {GENERATION}: {first_line(error)}") from error
        return found


@lru_cache(maxsize=256)
def _digests(path: str, device: int, inode: int, size: int, modified_ns: int) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    found = {}
    for name in names:
        with safe_open(path, framework="pt") as file:
            found[name] = tensor_digest(file.get_tensor(name))
    return found


def fingerprint_from(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Fingerprint of a checkpoint: a hash of its configuration and of the digests of all its tensors.

    It does not depend on how the tensors are distributed over files. An exported part, which holds the list of digests,
    can compute it without all tensors, and can check its own tensors against the list.

    Args:
        config: the configuration as stored.
        digests: see :attr:`Checkpoint.digests`.
    """
    plain = {key: value for key, value in config.items() if key not in _IGNORED_SETTINGS and not key.startswith("_")}
    return hashlib.sha256(json.dumps([plain, dict(digests)], sort_keys=True).encode()).hexdigest()


def empty_model(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    names: Collection[str] | None = None,
) -> PreTrainedModel:
    """Model on the meta device, whose parameters take no memory; computed buffers such as rotary frequencies are real.

    Args:
        config: configuration of the model.
        dtype: type of the parameters.
        attention: the attention implementation of ``transformers``.
        device: device of the computed buffers.
        names: tensor names of the checkpoint; an encoder whose checkpoint has no pooler gets none.

    Raises:
        ModelError: the configuration contradicts itself.
    """
    auto = AutoModelForCausalLM if structure_of(config).causal else AutoModel
    with quiet_transformers(), torch.device("meta"):
        try:
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
        except Exception as error:  # sizes that contradict each other raise errors of many kinds
            raise ModelError(
                f"no '{config.model_type}' model can be built of its {CONFIG}: {first_line(error)}"
            ) from error
    if names is not None and pooler_of(model) is not None and not any("pooler." in name for name in names):
        base_of(model).pooler = None  # type: ignore[assignment]
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


def load_tensors(
    model: PreTrainedModel, accounts: Mapping[str, str], checkpoint: Checkpoint, device: torch.device
) -> None:
    """Load tensors of a checkpoint into an empty model; all other parameters stay without memory.

    Where type and device agree, parameters are the memory-mapped pages of the file and take memory once they are used.

    Args:
        model: a model from :func:`empty_model`.
        accounts: stored name of each wanted tensor, see :func:`raycloud.models.tensor_check.match_tensors`.
        checkpoint: the checkpoint that holds the tensors.
        device: device of the loaded tensors.
    """
    loaded: dict[str, nn.Parameter] = {}
    for name, stored in accounts.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        empty = getattr(owner, leaf)
        if stored not in loaded:
            tensor = checkpoint.tensor(stored)
            kind = empty.dtype if empty.dtype.is_floating_point else tensor.dtype
            loaded[stored] = nn.Parameter(tensor.to(device=device, dtype=kind), tensor.is_floating_point())
        if isinstance(empty, nn.Parameter):
            setattr(owner, leaf, loaded[stored])
        else:
            owner.register_buffer(leaf, loaded[stored].detach())


def copy_parameters(modules: Iterable[nn.Module]) -> None:
    """Copy parameters that may be memory-mapped pages of a file: training writes to them, and files change."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in copies:
                parameter.data = copies.setdefault(id(parameter), parameter.data.clone())
