"""Teacher behind a server of signals: the protocol, and a teacher that is a model in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.distill.signals import FrozenHead, Signal, SignalCodec, SignalRecipe, compute_signal, frozen_head
from raycloud.errors import ModelError
from raycloud.models.configuration import context_length
from raycloud.models.segments import Segment


class SignalTeacher(Protocol):
    """Teacher of a server of signals. Its methods compute, in a thread of the server's."""

    @property
    def name(self) -> str:
        """Name of the teacher with a fingerprint of its weights; part of every key."""
        ...

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer of the ids."""
        ...

    @property
    def head_shape(self) -> tuple[int, int]:
        """Size of the vocabulary and hidden size at the head."""
        ...

    @property
    def max_length(self) -> int:
        """Largest number of tokens of a text of the teacher."""
        ...

    def signal(self, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> Signal:
        """Signal of a batch."""
        ...

    def head(self, codec: SignalCodec) -> FrozenHead:
        """Copy of the head, for ``hidden`` signals of a codec."""
        ...

    def embedding(self) -> Tensor:
        """Copy of the input embedding (W, D) in bfloat16."""
        ...


class ModelTeacher:
    """Teacher that is a model in this process.

    Args:
        model: the teacher.
        name: name of the teacher with a fingerprint of its weights.
        tokenizer: fingerprint of the tokenizer of the ids.

    Raises:
        ModelError: the teacher's head is not one linear layer.
    """

    def __init__(self, model: PreTrainedModel, name: str, tokenizer: str) -> None:
        self.name, self.tokenizer = name, tokenizer
        self._model, self._segment = model, Segment(model)
        if not isinstance(self._segment.head, nn.Linear):
            raise ModelError(f"teacher '{name}' has a head of several layers; allowed: one linear map")
        rows, columns = self._segment.head.weight.shape
        self.head_shape = rows, columns
        self.max_length = context_length(model.config)

    def signal(self, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> Signal:
        """Compute the signal of a batch."""
        return compute_signal(self._segment, self.name, batch.to(self._model.device), recipe, temperatures)

    def head(self, codec: SignalCodec) -> FrozenHead:
        """Copy the head."""
        return frozen_head(self._segment, codec)

    def embedding(self) -> Tensor:
        """Copy the input embedding."""
        table = self._model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table.weight.detach().to(torch.bfloat16).cpu()
