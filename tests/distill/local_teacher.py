"""Teacher of a learner in the same process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.distill.signals import FrozenHead, Signal, SignalRecipe, compute_signal, frozen_head
from raycloud.link.meter import Meter
from raycloud.models.loading import Pretrained
from raycloud.models.segments import Segment
from raycloud.models.weights import Weights


class LocalSignals:
    """Signals computed at once by a model in this process."""

    def __init__(
        self, segment: Segment, name: str, recipe: SignalRecipe, temperatures: Sequence[float], meter: Meter
    ) -> None:
        self._segment, self._name, self._recipe, self._temperatures = segment, name, recipe, temperatures
        self._meter = meter

    def prefetch(self, batch: Batch) -> None:
        pass

    def signal(self, batch: Batch) -> Signal:
        with torch.autocast("cpu", enabled=False):  # the student trains in the same thread
            found = compute_signal(self._segment, self._name, batch, self._recipe, self._temperatures)
        self._meter.add("signals", found.nbytes)
        return found


class LocalTeacher:
    """Teacher in this process; it remembers what it was asked for."""

    def __init__(
        self,
        loaded: Pretrained,
        name: str = "t",
        recipe: SignalRecipe | None = None,
        temperatures: Sequence[float] = (),
        frozen: Weights | None = None,
    ) -> None:
        self.name, self.tokenizer, self._model = name, loaded.tokenizer, loaded.model
        self._recipe, self._temperatures = recipe or SignalRecipe(), temperatures
        self._frozen = frozen or {}
        self.asked: list[str] = []

    def signals(self, meter: Meter) -> LocalSignals:
        return LocalSignals(Segment(self._model), self.name, self._recipe, self._temperatures, meter)

    def head(self) -> FrozenHead:
        self.asked.append("head")
        return frozen_head(Segment(self._model), self._recipe.codec)

    def embedding(self) -> Tensor:
        self.asked.append("embedding")
        table = self._model.get_input_embeddings()
        assert isinstance(table, torch.nn.Embedding)
        return table.weight.detach().to(torch.bfloat16)

    def frozen(self) -> Weights:
        self.asked.append("frozen")
        return self._frozen
