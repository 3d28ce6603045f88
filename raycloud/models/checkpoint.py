"""Checkpoints read tensor by tensor, so that only the wanted modules of a model are loaded."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from raycloud.checksums import verify
from raycloud.errors import ModelError
from raycloud.models.configuration import CONFIG, file_of, first_line, quiet_transformers
from raycloud.models.tensor_sources import Conversion, TensorSource
from raycloud.models.verdict import loading_class
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

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """Function that reads tensors as :meth:`tensor` does; in the context each shard is opened once."""
        with ExitStack() as stack:
            files: dict[str, Any] = {}

            def read(name: str) -> Tensor:
                shard = self.tensors[name].shard
                if shard not in files:
                    files[shard] = stack.enter_context(self._open(shard))
                found: Tensor = files[shard].get_tensor(name)
                return found

            yield read

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
    settings = model_settings(config)
    return hashlib.sha256(json.dumps([settings, dict(digests)], sort_keys=True).encode()).hexdigest()


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration that describe the model, not the program that saved or runs it."""
    return {key: value for key, value in config.items() if key not in _IGNORED_SETTINGS and not key.startswith("_")}


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
        dtype: type of the parameters; those that the library keeps in single precision stay so.
        attention: the attention implementation of ``transformers``.
        device: device of the computed buffers.
        names: tensor names of the checkpoint; an encoder whose checkpoint has no pooler gets none.

    Raises:
        ModelError: the configuration contradicts itself.
    """
    auto, attention = loading_class(config, attention)
    with quiet_transformers(), torch.device("meta"):
        try:
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
        except Exception as error:  # sizes that contradict each other raise errors of many kinds
            raise ModelError(
                f"no '{config.model_type}' model can be built of its {CONFIG}: {first_line(error)}"
            ) from error
    base: Any = model.base_model
    if names is not None and getattr(base, "pooler", None) is not None and not any("pooler." in name for name in names):
        base.pooler = None
    _keep_single_precision(model, dtype)
    _compute_buffers(model, device)
    return model.eval()


def _keep_single_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that the library keeps in single precision their type."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, group_names, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (found := pattern.search(name)) is not None and found.lastgroup is not None:
            tensor.data = tensor.data.to(plan[group_names[found.lastgroup]])


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that are not saved, by the library's own initialisation."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # the library then leaves it as it is
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_buffer(leaf, torch.empty_like(buffer, device=device), persistent=False)
    with torch.no_grad():
        # Of the whole model: falcon_h1 computes the buffers of its blocks in the module above them.
        model.initialize_weights()


def load_tensors(
    model: PreTrainedModel, sources: Mapping[str, TensorSource], checkpoint: Checkpoint, device: torch.device
) -> None:
    """Load tensors of a checkpoint into an empty model; all other parameters stay without memory.

    Where type and device agree, parameters are the memory-mapped pages of the file and take memory once they are used;
    tensors that the library converts are made one by one.

    Args:
        model: a model from :func:`empty_model`.
        sources: source of each wanted tensor, see :func:`raycloud.models.tensor_check.match_tensors`.
        checkpoint: the checkpoint that holds the tensors.
        device: device of the loaded tensors.
    """
    wanted: dict[Conversion, list[str]] = {}
    for name, source in sources.items():
        wanted.setdefault(source.conversion, []).append(name)
    for conversion, names in wanted.items():
        made = make_tensors(conversion, model, checkpoint)
        loaded: dict[str, nn.Parameter] = {}
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner, key = model.get_submodule(path), sources[name].name
            empty = getattr(owner, leaf)
            if key not in loaded:
                loaded[key] = nn.Parameter(made.pop(key).to(device=device), empty.is_floating_point())
            if isinstance(empty, nn.Parameter):
                setattr(owner, leaf, loaded[key])
            else:
                owner.register_buffer(leaf, loaded[key].detach())


def make_tensors(conversion: Conversion, model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Make tensors of a model of stored ones, by name, in the type that the model has them in.

    Args:
        conversion: see :func:`raycloud.models.tensor_sources.find_conversions`.
        model: the model.
        checkpoint: the checkpoint.
    """
    path, _, leaf = conversion.target.rpartition(".")
    dtype = getattr(model.get_submodule(path), leaf).dtype
    with checkpoint.reader() as read, torch.no_grad():
        return conversion.run(model, lambda name: read(name).to(dtype=dtype))


def copy_parameters(modules: Iterable[nn.Module]) -> None:
    """Copy parameters and buffers that may be memory-mapped pages of a file: training writes, and files change."""
    copies: dict[int, Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in copies:
                tensor.data = copies.setdefault(id(tensor), tensor.data.clone())
