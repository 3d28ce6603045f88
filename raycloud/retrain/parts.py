"""Parts of a model for retraining: its stem, its blocks, and its head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.chain import block_list_of
from raycloud.models.frozen_prefix import FrozenPrefix


@dataclass(frozen=True)
class RetrainParts:
    """Parts of a model, found in a forward and backward of it."""

    blocks: Mapping[str, nn.Module]
    """Blocks by dotted path below the model, in order."""
    head: Mapping[str, nn.Parameter]
    """Parameters behind the last block that nothing before it reads: final norm and task head. A head that is tied to
    the embedding is not among them."""

    @property
    def paths(self) -> list[str]:
        """Paths of the blocks."""
        return list(self.blocks)

    def groups(self, trained: Sequence[int]) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters of the head and of some blocks, by name below the model, as two groups of an optimiser."""
        blocks = {
            f"{self.paths[index]}.{name}": one
            for index in trained
            for name, one in self.blocks[self.paths[index]].named_parameters()
        }
        return {"head": dict(self.head), "blocks": blocks}

    def lowest(self, trained: Sequence[int]) -> int:
        """Number of the lowest of some blocks; the number of all blocks if there is none."""
        return min(trained, default=len(self.blocks))


def parts_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> RetrainParts:
    """Find the parts of a model.

    Args:
        model: model with a task head, or a language model.
        inputs: arguments of its forward for one sample or more.

    Raises:
        ModelError: the model has no list of blocks.
    """
    blocks = block_list_of(model).blocks
    prefix = FrozenPrefix(model, len(blocks))
    named = dict(model.named_parameters())
    with trainable_only(model, named.values()), torch.enable_grad():
        logits: Tensor = prefix.run(prefix.record(inputs), inputs).logits
        late = torch.autograd.grad(logits.float().sum(), list(named.values()), allow_unused=True)
    tied = {id(one) for one in _embeddings(model)}
    inside = {id(one) for block in blocks.values() for one in block.parameters()}
    head = {
        name: parameter
        for (name, parameter), slope in zip(named.items(), late, strict=True)
        if slope is not None and id(parameter) not in tied | inside
    }
    return RetrainParts(blocks, head)


@contextmanager
def trainable_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which only these parameters of a model require gradients."""
    kept = {id(one) for one in parameters}
    before = [(one, one.requires_grad) for one in model.parameters()]
    for one, _ in before:
        one.requires_grad_(id(one) in kept)
    try:
        yield
    finally:
        for one, required in before:
            one.requires_grad_(required)


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    embedding = model.get_input_embeddings()
    return list(embedding.parameters()) if isinstance(embedding, nn.Module) else []
