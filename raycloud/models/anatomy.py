"""Where the parts of a transformer are, one small record per family.

A record names the embedding modules, the blocks, what follows the last block and the head, and says what the base
model adds to the token embeddings. Everything above works on these names alone: a new family is one record here and
one line in the table of ``tests/models/families.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.errors import ModelError

Parts = Mapping[str, nn.Module]
"""Modules of a base model by the dotted name they have there."""

Embed = Callable[[Parts, Tensor, Tensor, Tensor | None], Tensor]
"""(parts, token ids (B, T), positions (B, T), token types (B, T)) -> rows entering block 0, (B, T, d).

Types tell the two texts of a pair apart in families that were taught so; None where there is one text.
"""


@dataclass(frozen=True)
class Anatomy:
    """The places of one family inside its base model (the module without a task head)."""

    model_types: tuple[str, ...]
    blocks: str
    embedding: tuple[str, ...]
    embed: Embed
    after: tuple[str, ...] = ()
    """Modules applied in turn after the last block; a family may leave some of them out (None)."""
    head: str = "lm_head"
    """The module of the task model that turns final rows into logits, if it is there."""
    rotary: str | None = None
    rotary_per_layer_type: bool = False
    causal: bool = True


def _tokens(parts: Parts, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    """Rotary families add nothing; Gemma's embedding module does its own scaling."""
    return parts["embed_tokens"](ids)


def _gpt2(parts: Parts, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return parts["drop"](parts["wte"](ids) + parts["wpe"](positions))


def _opt(parts: Parts, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    rows = parts["decoder.embed_tokens"](ids)
    if "decoder.project_in" in parts:
        rows = parts["decoder.project_in"](rows)
    return rows + parts["decoder.embed_positions"](None, position_ids=positions)


def _bert(parts: Parts, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return parts["embeddings"](input_ids=ids, position_ids=positions, token_type_ids=types)


_ROTARY: dict[str, Any] = {
    "blocks": "layers",
    "embedding": ("embed_tokens",),
    "embed": _tokens,
    "after": ("norm",),
    "rotary": "rotary_emb",
}

FAMILIES: tuple[Anatomy, ...] = (
    Anatomy(model_types=("llama", "mistral", "qwen2", "qwen3"), **_ROTARY),
    Anatomy(model_types=("gemma3_text",), rotary_per_layer_type=True, **_ROTARY),
    Anatomy(model_types=("gpt2",), blocks="h", embedding=("wte", "wpe", "drop"), embed=_gpt2, after=("ln_f",)),
    Anatomy(
        model_types=("opt",),
        blocks="decoder.layers",
        embedding=("decoder.embed_tokens", "decoder.project_in", "decoder.embed_positions"),
        embed=_opt,
        after=("decoder.final_layer_norm", "decoder.project_out"),
    ),
    Anatomy(
        model_types=("bert",),
        blocks="encoder.layer",
        embedding=("embeddings",),
        embed=_bert,
        head="cls",
        causal=False,
    ),
)

_BY_TYPE = {model_type: record for record in FAMILIES for model_type in record.model_types}


def pooler_of(model: PreTrainedModel) -> nn.Module | None:
    """What a family itself makes of a text's first row, such as BERT's pooler; None where it has no such thing."""
    pooler: nn.Module | None = getattr(base_of(model), "pooler", None)
    return pooler


def anatomy_of(config: PretrainedConfig) -> Anatomy:
    """The record for a model's family.

    Raises:
        ModelError: the family has no record; the message lists those that have.
    """
    record = _BY_TYPE.get(config.model_type)
    if record is None:
        raise ModelError(
            f"model family '{config.model_type}' has no anatomy record; known: {', '.join(sorted(_BY_TYPE))}"
        )
    return record


def base_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds embedding and blocks, whether or not ``model`` has a task head."""
    return getattr(model, model.base_model_prefix, model)


def find(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or None where the family leaves it out."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of transformer blocks, in order."""
    found: nn.ModuleList = find(base_of(model), anatomy_of(model.config).blocks)
    return found


def layer_type(config: PretrainedConfig, index: int) -> str:
    """What kind of attention block ``index`` has: ``full_attention`` or ``sliding_attention``."""
    types = getattr(config, "layer_types", None)
    if types:
        return str(types[index])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def window(config: PretrainedConfig, index: int) -> int | None:
    """How many of the latest tokens block ``index`` attends to (itself included), or None for all."""
    return config.sliding_window if layer_type(config, index) == "sliding_attention" else None
