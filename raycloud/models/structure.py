"""Structure of a transformer: where its blocks are, what runs before and after them, and how logits come from its head.

A structure is found by tracing the model's own code (:mod:`raycloud.models.trace`) on a small twin, and holds for every
model of the configuration. No table of families exists; see :func:`raycloud.models.verdict.structure_of`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.models.chain import find_chain

Shape = tuple[int | str, ...]
"""Shape of a module's output: ``B`` and ``T`` are the numbers of texts and of tokens, ``w0`` and ``w1`` the sizes of
its weight."""


class LogitsRule(BaseModel):
    """Relation of a model's logits to the output of its head for final hidden states.

    The value of a rule is a setting of the configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "head", "factor", "divisor", "cap"] = "head"
    """``none``: no head. ``head``: as they are. ``factor`` and ``divisor``: times or divided by the value. ``cap``:
    value · tanh(x / value)."""
    setting: str = ""

    def value(self, config: PretrainedConfig) -> float:
        """Value of the rule for a model; 1 for a rule without one."""
        return float(getattr(config.get_text_config(), self.setting)) if self.setting else 1.0

    def scale(self, config: PretrainedConfig) -> float:
        """Factor of the head's output; 1 if there is none."""
        value = self.value(config)
        return {"factor": value, "divisor": 1 / value}.get(self.kind, 1.0)

    def cap(self, config: PretrainedConfig) -> float | None:
        """Cap of the logits; None if there is none."""
        return self.value(config) if self.kind == "cap" else None


class ModelStructure(BaseModel):
    """Structure of the models of one configuration. Paths are below the base model, see :func:`base_of`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: str
    """Path of the list of blocks."""
    tuple_size: int
    """0 if a block returns its hidden states, otherwise the size of the tuple that they are the first of."""
    early: dict[str, Shape]
    """Modules with weights that run before block 0 and that only the part with the embedding has, with the shapes of
    their outputs."""
    shared: tuple[str, ...]
    """Modules with weights outside of the blocks that every part has, such as a bias that all blocks add."""
    late: tuple[str, ...]
    """Modules with weights that run after the last block, without the head and without a pooler."""
    has_norm: bool
    """True if something runs between the last block and the head: a final norm, which may have no weights."""
    causal: bool
    """True if a token does not change the outputs for earlier ones."""
    chunks: bool = True
    """True if several tokens may follow a cached text in one call."""
    rolls_back: bool = True
    """True if the last tokens of a cache can be dropped: it holds keys and values only, and no recurrent state."""
    logits: LogitsRule = LogitsRule()
    layout: str | None = None
    """Layout of the fast path (:mod:`raycloud.models.fast_path`) if it was measured equal; None for the library's own
    forward."""
    attention: str = "sdpa"
    """Attention implementation of the library: ``eager`` where a model has no other."""

    @property
    def path(self) -> Literal["fast", "general"]:
        """Path that segments take: our own loop over blocks, or the library's forward."""
        return "general" if self.layout is None else "fast"


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Base model: the module that holds embedding and blocks, whether or not ``model`` has a task head."""
    found: PreTrainedModel | None = getattr(model, model.base_model_prefix, None)
    if found is None and model.get_output_embeddings() is not None:  # some types' prefix is not their attribute
        found = getattr(model, "model", None)
    return model if found is None else found


def pooler_of(model: PreTrainedModel) -> nn.Module | None:
    """Module that pools the first hidden state of a text, such as BERT's pooler; None if the model has none."""
    pooler: nn.Module | None = getattr(base_of(model), "pooler", None)
    return pooler


def module_at(module: nn.Module, path: str) -> Any:
    """Attribute at a dotted path, or None if a part of the path is missing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """List of the transformer blocks, in order.

    Raises:
        ModelError: the model has not exactly one chain of blocks.
    """
    return find_chain(model).blocks


def apply_rule(raw: Tensor, rule: LogitsRule, config: PretrainedConfig) -> Tensor:
    """Logits for the output of a head."""
    if (cap := rule.cap(config)) is not None:
        return torch.tanh(raw / cap) * cap
    scale = rule.scale(config)
    return raw if scale == 1.0 else raw * scale
