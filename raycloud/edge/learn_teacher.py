"""Teacher of a device: the one of a job, at the other end of a link."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Batch
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.distill.signals.remote import RemoteSignals, SignalClient
from raycloud.errors import LinkSetupError
from raycloud.link.channel import Channel
from raycloud.link.meter import Meter
from raycloud.models.weights import Weights


class LinkTeacher:
    """Implementation of :class:`~raycloud.distill.learner.TeacherClient` at the other end of a link.

    Args:
        name: name of the teacher.
        tokenizer: its tokenizer.
        recipe: recipe of the job.
        frozen: frozen weights under the adapters.
        connect: opens a channel to the service of signals.
        patience_s: longest time without an answer.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        recipe: DistillRecipe,
        frozen: Weights,
        connect: Callable[[str], Channel],
        patience_s: float,
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self._recipe, self._frozen, self._connect, self._patience_s = recipe, frozen, connect, patience_s
        self._opened: SignalClient | None = None

    def signals(self, meter: Meter) -> LinkSignals:
        """Return the source of signals over the link."""
        return LinkSignals(self, meter)

    def remote(self) -> RemoteSignals:
        """Return the signals of the teacher; it must be the one that the job named."""
        recipe = self._recipe
        source = self._client().source(recipe.signal, recipe.temperatures)
        if source.teacher != self.name:
            raise LinkSetupError(f"the job's teacher is '{self.name}', the link leads to '{source.teacher}'")
        return RemoteSignals(self._client(), source)

    def head(self) -> FrozenHead:
        """Get a copy of the teacher's head."""
        return self._client().head(self._recipe.signal.codec)

    def embedding(self) -> Tensor:
        """Get the teacher's input embedding."""
        return self._client().embedding()

    def frozen(self) -> Weights:
        """Return the frozen weights under the adapters."""
        return self._frozen

    def close(self) -> None:
        """End the session."""
        if self._opened is not None:
            self._opened.close()

    def _client(self) -> SignalClient:
        if self._opened is None:
            self._opened = SignalClient(self._connect, timeout_s=self._patience_s)
        return self._opened


class LinkSignals:
    """Signals over a link, opened with the first request; their bytes are counted as actors count them."""

    def __init__(self, teacher: LinkTeacher, meter: Meter) -> None:
        self._teacher, self._meter = teacher, meter
        self._signals: RemoteSignals | None = None

    def prefetch(self, batch: Batch) -> None:
        """Request the signal of a batch that will be needed."""
        self._remote().prefetch(batch)

    def signal(self, batch: Batch) -> Signal:
        """Return the signal of a batch."""
        found = self._remote().signal(batch)
        self._meter.add("ids", batch.nbytes)
        self._meter.add("signals", found.nbytes)
        return found

    def _remote(self) -> RemoteSignals:
        if self._signals is None:
            self._signals = self._teacher.remote()
        return self._signals
