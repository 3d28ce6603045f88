"""Structure of transformers: one small record per family names the modules of its parts.

A record names the embedding modules, the blocks, the modules after the last block and the head, and holds the function
that embeds tokens as the base model does. All other code uses these names only: a new family is one record here and one
line in the table of ``tests/models/families.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.errors import ModelError

NamedModules = Mapping[str, nn.Module]
"""Modules of a base model by their dotted names."""

Embed = Callable[[NamedModules, Tensor, Tensor, Tensor | None], Tensor]
"""Function (parts, token ids, positions, token types) -> hidden states entering block 0, (B, T, d).

Token ids, positions and token types are (B, T). Token types distinguish the two texts of a pair in families that were
trained so; None if there is one text.
"""


@dataclass(frozen=True)
class ModelStructure:
    """Names of the parts of one family inside its base model (the module without a task head)."""

    model_types: tuple[str, ...]
    blocks: str
    embedding: tuple[str, ...]
    embed: Embed
    after: tuple[str, ...] = ()
    """Modules applied in turn after the last block; those that a model does not have are skipped."""
    head: str = "lm_head"
    """Module of the task model that turns final hidden states into logits, if there is one."""
    rotary: str | None = None
    rotary_per_layer_type: bool = False
    causal: bool = True


def _tokens(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    """Embed tokens of rotary families, which add nothing; Gemma's embedding module scales its output itself."""
    return parts["embed_tokens"](ids)


def _gpt2(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return parts["drop"](parts["wte"](ids) + parts["wpe"](positions))


def _opt(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    hidden = parts["decoder.embed_tokens"](ids)
    if "decoder.project_in" in parts:
        hidden = parts["decoder.project_in"](hidden)
    return hidden + parts["decoder.embed_positions"](None, position_ids=positions)


def _bert(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return parts["embeddings"](input_ids=ids, position_ids=positions, token_type_ids=types)


_ROTARY: dict[str, Any] = {
    "blocks": "layers",
    "embedding": ("embed_tokens",),
    "embed": _tokens,
    "after": ("norm",),
    "rotary": "rotary_emb",
}

FAMILIES: tuple[ModelStructure, ...] = (
    ModelStructure(model_types=("llama", "mistral", "qwen2", "qwen3"), **_ROTARY),
    ModelStructure(model_types=("gemma3_text",), rotary_per_layer_type=True, **_ROTARY),
    ModelStructure(model_types=("gpt2",), blocks="h", embedding=("wte", "wpe", "drop"), embed=_gpt2, after=("ln_f",)),
    ModelStructure(
        model_types=("opt",),
        blocks="decoder.layers",
        embedding=("decoder.embed_tokens", "decoder.project_in", "decoder.embed_positions"),
        embed=_opt,
        after=("decoder.final_layer_norm", "decoder.project_out"),
    ),
    ModelStructure(
        model_types=("bert",),
        blocks="encoder.layer",
        embedding=("embeddings",),
        embed=_bert,
        head="cls",
        causal=False,
    ),
)

# Settings that change the attention mask, with the only value for which a record's masks are right.
_REQUIRED_SETTINGS: dict[bool, tuple[tuple[str, bool], ...]] = {
    True: (("is_causal", True), ("use_bidirectional_attention", False), ("add_cross_attention", False)),
    False: (("is_decoder", False), ("add_cross_attention", False)),
}

_BY_TYPE = {model_type: record for record in FAMILIES for model_type in record.model_types}


def pooler_of(model: PreTrainedModel) -> nn.Module | None:
    """Module that pools the first hidden state of a text, such as BERT's pooler; None if the model has none."""
    pooler: nn.Module | None = getattr(base_of(model), "pooler", None)
    return pooler


def check_family(model_type: object) -> ModelStructure:
    """Record of a family by the ``model_type`` of ``config.json``.

    Raises:
        ModelError: the family has no record; the message lists those that have.
    """
    record = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if record is None:
        said = str(model_type)[:60]
        raise ModelError(f"model family '{said}' has no anatomy record; known: {', '.join(sorted(_BY_TYPE))}")
    return record


def structure_of(config: PretrainedConfig) -> ModelStructure:
    """Record of a model's family.

    Raises:
        ModelError: the family has no record, or a setting changes the attention from that of the record, which the
            masks of segments follow.
    """
    record = check_family(config.model_type)
    for name, value in _REQUIRED_SETTINGS[record.causal]:
        if (said := getattr(config, name, value)) is not None and bool(said) is not value:
            raise ModelError(
                f"a '{config.model_type}' model with {name}: {str(said).lower()} is not supported; allowed: "
                f"{name}: {str(value).lower()}"
            )
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise ModelError(
            f"a '{config.model_type}' model with blocks of the type '{min(odd)}' is not supported; allowed: "
            "full_attention, sliding_attention"
        )
    return record


def base_of(model: PreTrainedModel) -> nn.Module:
    """Module that holds embedding and blocks, whether or not ``model`` has a task head."""
    return getattr(model, model.base_model_prefix, model)


def module_at(module: nn.Module, path: str) -> Any:
    """Attribute at a dotted path, or None if a part of the path is missing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """List of the transformer blocks, in order."""
    found: nn.ModuleList = module_at(base_of(model), structure_of(model.config).blocks)
    return found


def layer_type(config: PretrainedConfig, index: int) -> str:
    """Attention type of block ``index``: ``full_attention`` or ``sliding_attention``."""
    types = getattr(config, "layer_types", None)
    if types:
        return str(types[index])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def attention_window(config: PretrainedConfig, index: int) -> int | None:
    """Number of latest tokens that block ``index`` attends to (the token itself included), or None for all."""
    return config.sliding_window if layer_type(config, index) == "sliding_attention" else None
