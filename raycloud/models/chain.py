"""Discovery of a model's chain of blocks in its module tree, without knowing the model's family.

A list of blocks is a ``ModuleList`` whose elements are the library's ``GradientCheckpointingLayer``, or share one class
and hold a mixer of tokens (attention, a state-space or recurrent layer, a convolution). Lists of stages give way to the
blocks inside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from raycloud.errors import ModelError

_MIXERS = ("attention", "attn", "mixer", "mamba", "recurrent", "conv")
"""Parts of the class names of modules that mix tokens."""


@dataclass(frozen=True)
class BlockChain:
    """The one chain of blocks of a model."""

    path: str
    """Dotted path of the list below the model."""
    blocks: nn.ModuleList


def find_chain(model: PreTrainedModel) -> BlockChain:
    """Find the chain of blocks; of a multimodal model, that of its language side.

    Raises:
        ModelError: there is no list of blocks, or more than one chain.
    """
    kind, text = model.config.model_type, model.config.get_text_config()
    lists, total = block_lists(model), getattr(text, "num_hidden_layers", None)
    if len(lists) > 1 and not getattr(model.config, "is_encoder_decoder", False):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
        lists = [chain for chain in lists if id(chain.blocks) in inside and len(chain.blocks) == total] or lists
    if not lists:
        raise ModelError(f"no list of transformer blocks is found in a '{kind}' model; run it whole")
    if len(lists) > 1:
        paths = ", ".join(chain.path for chain in lists)
        raise ModelError(f"a '{kind}' model has {len(lists)} lists of blocks ({paths}), and one chain can be cut")
    if total is not None and len(lists[0].blocks) != total:
        held = len(lists[0].blocks)
        raise ModelError(
            f"'{lists[0].path}' of a '{kind}' model holds {held} blocks, and its configuration says {total}"
        )
    return lists[0]


@dataclass(frozen=True)
class BlockList:
    """Every block of a model that can be retrained, whether or not the model can be cut between them."""

    blocks: Mapping[str, nn.Module]
    """Blocks by dotted path below the model, in the order of registration."""
    can_cut: bool
    """True if they are the one chain that :func:`find_chain` finds. Blocks of several stages, or of an encoder and a
    decoder, differ in what they take, so a model is never cut between them."""


def block_list_of(model: PreTrainedModel) -> BlockList:
    """List the blocks of a model of texts or images: its chain, or all its lists of blocks one after another.

    Raises:
        ModelError: there is no list of blocks.
    """
    try:
        chains, can_cut = [find_chain(model)], True
    except ModelError:
        chains, can_cut = block_lists(model), False
        if not chains:
            raise
    return BlockList(
        {f"{one.path}.{index}": block for one in chains for index, block in enumerate(one.blocks)}, can_cut
    )


def block_lists(model: nn.Module) -> list[BlockChain]:
    """List every list of blocks, in the order of registration."""
    found = [
        BlockChain(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_block_list(module)
    ]

    def inside(outer: BlockChain) -> list[BlockChain]:
        return [chain for chain in found if chain.path.startswith(outer.path + ".")]

    def is_stage(outer: BlockChain) -> bool:
        # A stage holds blocks with a mixer each; a block may hold lists of its own sub-layers, which are no blocks.
        inner = [block for chain in inside(outer) for block in chain.blocks]
        return bool(inner) and all(map(_has_mixer, inner))

    kept = [chain for chain in found if not is_stage(chain)]
    return [chain for chain in kept if not any(chain.path.startswith(other.path + ".") for other in kept)]


def _is_block_list(modules: nn.ModuleList) -> bool:
    if not len(modules) or not all(any(True for _ in module.parameters()) for module in modules):
        return False
    if all(isinstance(module, GradientCheckpointingLayer) for module in modules):
        return True
    return len({type(module) for module in modules}) == 1 and all(map(_has_mixer, modules))


def _has_mixer(block: nn.Module) -> bool:
    names = (type(module).__name__.lower() for module in block.modules() if module is not block)
    return any(word in name for name in names for word in _MIXERS)
