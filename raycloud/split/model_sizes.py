"""Sizes of a model and of its blocks, computed from its configuration alone: tensors have shapes and no memory.

A model larger than this machine is sized in seconds. Keys and values are counted by running the library's own forward
on the meta device, so no formula per family is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from raycloud.errors import ModelError
from raycloud.fetch import PREFIX, fetch
from raycloud.models.chain import find_chain
from raycloud.models.configuration import (
    CONFIG,
    check_sizes,
    file_of,
    json_object,
    language_side,
    load_auto,
    quiet_transformers,
)
from raycloud.models.stock_cache import cache_argument, states_of

_TOKENS = 2
"""Tokens of the forward that counts keys and values: fewer than any sliding window."""
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""Names under which configurations keep the number of experts that run for a token."""


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one block, in numbers, not bytes."""

    dense: int
    """Weights that run for every token."""
    experts: int = 0
    """Weights of all routed experts."""
    active_share: float = 1.0
    """Share of the routed experts that run for one token."""
    kv_per_token: int = 0
    """Keys and values kept for each token. Blocks with a sliding window keep all of them too."""
    state: int = 0
    """State of a text that does not grow with it, in the model's type, such as that of a convolution."""
    state_float32: int = 0
    """Such a state that the library keeps in float32 whatever the model's type, as that of linear attention."""
    attention_width: int = 0
    """Numbers of a query over all heads; 0 for a block without attention."""

    @property
    def weights(self) -> int:
        """All weights."""
        return self.dense + self.experts

    def weights_read(self, tokens: int = 1) -> float:
        """Weights read for a step of ``tokens`` tokens, if the router chooses experts uniformly."""
        return self.dense + self.experts * (1 - (1 - self.active_share) ** tokens)

    def kept_bytes(self, context: int, itemsize: float) -> float:
        """Bytes kept of a text of ``context`` tokens by a model with ``itemsize`` bytes per number."""
        return itemsize * (self.kv_per_token * context + self.state) + 4 * self.state_float32

    def flops(self, tokens: int, context: int) -> float:
        """Floating-point operations of ``tokens`` tokens that attend to ``context`` tokens each."""
        weights = self.dense + self.experts * self.active_share
        return tokens * (2 * weights + 4 * self.attention_width * context)


@dataclass(frozen=True)
class SplitSizes:
    """Sizes of a model, in numbers, not bytes."""

    blocks: tuple[BlockSizes, ...]
    outer: int
    """Weights outside the blocks: embedding, final norm and head, tied weights once. The edge holds all of them."""
    head: int
    """Outer weights that are read for every token: final norm and head, and not the embedding's table."""
    width: int
    """Numbers of a hidden state."""
    causal: bool = True

    @property
    def weights(self) -> int:
        """All weights of the model."""
        return self.outer + sum(block.weights for block in self.blocks)


def read_configuration(source: str, notify: Callable[[str], None] = lambda line: None) -> PretrainedConfig:
    """Configuration of a model; its weights are not read and need not be there.

    Args:
        source: hub id, directory with a ``config.json``, GGUF file or ``builtin:`` name.
        notify: called with one line before a download.

    Raises:
        ModelError: there is no configuration, or it cannot be read.
        FetchError: the built-in cannot be fetched.
    """
    path = Path(source).expanduser()
    if source.startswith(PREFIX):
        path = fetch(source, notify)
        path = next(iter(sorted(path.glob("*.gguf"))), path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at '{path}'")
        config: PretrainedConfig = load_auto(AutoConfig, str(path.parent), gguf_file=path.name)
        check_sizes(config.to_dict(), str(path))
        return config
    if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"no model at '{source}'; allowed: a directory, a .gguf file, a hub id, or a builtin: name")
    where = str(path) if path.is_dir() else source
    found = file_of(where, CONFIG)
    if found is None:
        why = "" if path.is_dir() else ": no such directory, and the hub did not have it or is out of reach"
        raise ModelError(f"'{source}' holds no {CONFIG}; allowed: a model, or a folder with its {CONFIG}{why}")
    check_sizes(json_object(found, source), source)
    config = language_side(load_auto(AutoConfig, where))
    # Weights are dequantised when they are loaded; planning needs their shapes only.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def sizes_of(config: PretrainedConfig, *, causal: bool = True) -> SplitSizes:
    """Sizes of the models of a configuration.

    Args:
        config: configuration of a text model.
        causal: True for a language model, False for an encoder, which has no head and no keys and values.

    Raises:
        ModelError: no model can be built of it, or its blocks are not found.
    """
    model = _meta_model(config, causal)
    chain = find_chain(model)
    inside = {id(parameter) for parameter in chain.blocks.parameters()}
    outside = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and "pooler" not in name.split(".")
    }
    text = config.get_text_config()
    kept = _kept_per_block(model, len(chain.blocks)) if causal else [_Kept()] * len(chain.blocks)
    attention_width = _attention_width(text)
    blocks = []
    for block, own in zip(chain.blocks, kept, strict=True):
        dense, experts, share = _weights(block, text)
        width = attention_width if own.per_token or not causal else 0
        blocks.append(BlockSizes(dense, experts, share, own.per_token, own.state, own.state_float32, width))
    return SplitSizes(
        blocks=tuple(blocks),
        outer=_count(outside.values()),
        head=_count(outside.values()) - _table_numbers(model, outside),
        width=int(text.hidden_size),
        causal=causal,
    )


def _meta_model(config: PretrainedConfig, causal: bool) -> PreTrainedModel:
    auto = AutoModelForCausalLM if causal else AutoModel
    with quiet_transformers(), torch.device("meta"):
        try:
            # In bfloat16, for which kernels of every kind have shapes on the meta device.
            model: PreTrainedModel = auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        except Exception as error:  # sizes that contradict each other raise errors of many kinds
            why = (str(error).splitlines() or [""])[0][:160]
            raise ModelError(f"no '{config.model_type}' model can be built of its {CONFIG}: {why}") from error
    return model.eval()


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _table_numbers(model: PreTrainedModel, outside: dict[int, nn.Parameter]) -> int:
    """Numbers of the tables of embeddings, of which a token reads one row; without a table that is also the head."""
    output = model.get_output_embeddings()
    heads = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    tables = {id(one.weight): one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
    return _count(table for key, table in tables.items() if key in outside and key not in heads)


def _weights(block: nn.Module, config: PretrainedConfig) -> tuple[int, int, float]:
    """Dense weights and those of routed experts of a block, and the share of the experts that run for one token."""
    parameters = {id(parameter): (name.split("."), parameter) for name, parameter in block.named_parameters()}
    routed = [(path, parameter) for path, parameter in parameters.values() if "experts" in path[:-1]]
    total = _count(parameter for _, parameter in parameters.values())
    if not routed:
        return total, 0, 1.0
    # Experts are one tensor with an expert per row, or a list of modules.
    indices = {path[path.index("experts") + 1] for path, _ in routed}
    numbered = {index for index in indices if index.isdecimal()}
    count = len(numbered) or max(parameter.shape[0] for _, parameter in routed)
    active = next((int(found) for name in _ACTIVE_EXPERTS if (found := getattr(config, name, None))), count)
    experts = _count(parameter for _, parameter in routed)
    return total - experts, experts, min(1.0, active / count)


@dataclass(frozen=True)
class _Kept:
    """Numbers that a block keeps of a text, see :class:`BlockSizes`."""

    per_token: int = 0
    state: int = 0
    state_float32: int = 0


@torch.no_grad()
def _kept_per_block(model: PreTrainedModel, blocks: int) -> list[_Kept]:
    """Run the library's own forward of a model in half precision and count what its cache holds, by block."""
    cache: Any = DynamicCache(config=model.config.get_text_config())
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        model(input_ids=ids, use_cache=True, **{cache_argument(inspect.signature(model.forward).parameters): cache})
        layers = cache.layers
    except Exception:  # some types read values in their forward, and there are none
        layers = []
    if len(layers) < blocks:
        return [_Kept(_kv_by_configuration(model.config.get_text_config()))] * blocks
    return [_kept(layer) for layer in layers[:blocks]]


def _kept(layer: Any) -> _Kept:
    per_token = [getattr(layer, name, None) for name in ("keys", "values")]
    states = list(states_of(layer))
    single = _count(one for one in states if one.dtype == torch.float32)
    return _Kept(_count(one for one in per_token if one is not None) // _TOKENS, _count(states) - single, single)


def _kv_by_configuration(config: PretrainedConfig) -> int:
    heads = int(getattr(config, "num_attention_heads", 1))
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * groups * (_attention_width(config) // heads)


def _attention_width(config: PretrainedConfig) -> int:
    """Numbers of a query over all heads."""
    try:
        return int(config.num_attention_heads) * int(config.head_dim)
    except Exception:  # it is not set, or of some types it varies by block
        return int(config.hidden_size)
