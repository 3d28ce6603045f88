"""The edge's side: a client of a teacher at the other end of a link."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.distill.signals import FrozenHead, Signal, SignalCodec, SignalRecipe
from raycloud.distill.signals.file import SignalSource
from raycloud.distill.signals.keys import combine_keys
from raycloud.distill.signals.layout import Layout, check_layout, layout, max_payload_bytes
from raycloud.distill.signals.remote.messages import (
    OpenSignals,
    SignalMessageKind,
    SignalReply,
    SignalRequest,
    TableRequest,
    TeacherServerInfo,
    pack_batch,
)
from raycloud.errors import DataError, LinkError, LinkSetupError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.client import SessionClient
from raycloud.link.frames import ErrorReply, Frame, parse_body
from raycloud.link.meter import Meter

_PREFETCH = 4
"""Number of batches requested before they are needed."""
_HEADER_BYTES = 64 * 2**10
"""Upper bound on the size of a safetensors header."""


@dataclass(eq=False)
class PendingSignal:
    """Request to a teacher, and its reply once that has been received."""

    frame: Frame
    most: int
    """Largest number of raw bytes of the reply."""
    reply: Frame | None = None


class SignalClient:
    """Client of a teacher: requests are answered in order, each once however often the channel breaks.

    Replies cross while the edge computes, into the channel's own buffers. Not thread-safe.

    Args:
        connect: opens a channel of a session; called again whenever one breaks.
        meter: counts the frames in both directions by the names of their kinds.
        timeout_s: seconds of waiting without any message, reconnecting included, after which a request fails.

    Raises:
        LinkError: the teacher cannot be reached in time, or refuses.
    """

    def __init__(
        self, connect: Callable[[str], Channel], *, meter: Meter | None = None, timeout_s: float = 300.0
    ) -> None:
        self._session: SessionClient[PendingSignal, TeacherServerInfo] = SessionClient(
            connect,
            SignalMessageKind,
            OpenSignals(),
            TeacherServerInfo,
            lambda pending: pending.frame,
            lambda unanswered: unanswered,  # a reply depends on its request alone
            timeout_s,
            peer="the teacher",
            meter=meter,
            most_bytes=lambda pending: pending.most,
        )
        self.meter, self._closed = self._session.meter, False

    @property
    def info(self) -> TeacherServerInfo:
        """Identity of the teacher when the latest session was opened."""
        return self._session.granted

    def source(self, recipe: SignalRecipe, temperatures: Sequence[float]) -> SignalSource:
        """Properties that this teacher's signals share."""
        return SignalSource(self.info.teacher, self.info.tokenizer, recipe, tuple(map(float, temperatures)))

    def head(self, codec: SignalCodec) -> FrozenHead:
        """Copy of the teacher's head, for ``hidden`` signals of a codec.

        Raises:
            LinkError: there is no answer, or it is no head of this teacher.
        """
        reply, tensors = self._table(SignalMessageKind.HEAD, codec)
        weight, bias = tensors["weight"], tensors.get("bias")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise LinkError(f"the teacher's head has {len(weight)} rows and a bias of {tuple(bias.shape)}")
        return FrozenHead(weight, bias, reply.softcap)

    def embedding(self) -> Tensor:
        """Copy of the teacher's input embedding (W, D) in bfloat16, for objectives that use token embeddings.

        Raises:
            LinkError: there is no answer, or it is no embedding of this teacher.
        """
        return self._table(SignalMessageKind.EMBEDDING)[1]["weight"]

    def ask(self, request: SignalRequest, raw: bytes, most: int) -> PendingSignal:
        """Request the signal of a batch, of at most ``most`` bytes.

        Raises:
            DataError: the batch is larger than the teacher takes.
            LinkDown: the client is closed.
        """
        if len(raw) > self.info.request_bytes:
            raise DataError(f"a batch of {len(raw)} bytes; the teacher takes at most {self.info.request_bytes}")
        return self._send(Frame.of(SignalMessageKind.SIGNAL, request, raw), most)

    def answer(self, pending: PendingSignal) -> tuple[SignalReply, dict[str, Tensor]]:
        """Wait for the reply to a request; return it and its tensors by name.

        Raises:
            LinkError: there is no answer, it cannot be read, or the teacher refuses.
        """
        while pending.reply is None:
            earlier, reply = self._session.receive()
            earlier.reply = reply
        if pending.reply.kind is SignalMessageKind.REFUSED:
            raise LinkError(f"the teacher refused: {parse_body(pending.reply, ErrorReply).message}")
        try:
            return parse_body(pending.reply, SignalReply), load(pending.reply.raw)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise LinkError(f"the teacher's answer cannot be read: {str(error).splitlines()[0]}") from None

    def close(self) -> None:
        """End the session; unanswered requests are dropped."""
        self._closed = True
        self._session.close()

    def _table(self, kind: SignalMessageKind, codec: SignalCodec = "bfloat16") -> tuple[SignalReply, dict[str, Tensor]]:
        request = TableRequest(teacher=self.info.teacher, codec=codec)
        expected = self.info.vocabulary_size, self.info.hidden_size
        # Upper bound: a bias, and four bytes per number.
        most = 4 * expected[0] * (expected[1] + 1)
        reply, tensors = self.answer(self._send(Frame.of(kind, request), most))
        if reply.key != request.key(kind):
            raise LinkError(f"the teacher answered with '{reply.key}' where '{request.key(kind)}' was asked for")
        shape = tuple(tensors["weight"].shape) if "weight" in tensors else ()
        if shape != expected:
            raise LinkError(f"the teacher's {kind.name.lower()} has shape {shape}, not {expected}")
        return reply, tensors

    def _send(self, frame: Frame, most: int) -> PendingSignal:
        if self._closed:
            raise LinkDown("the link to the teacher is closed")
        pending = PendingSignal(frame, most + _HEADER_BYTES)
        self._session.send([pending])
        return pending


class RemoteSignals:
    """A :class:`~raycloud.distill.signals.SignalStore` whose teacher is at the other end of a link.

    Args:
        link: client of the teacher.
        source: required properties of the signals, such as :meth:`SignalClient.source`.

    Raises:
        LinkSetupError: another teacher or another tokenizer answers.
    """

    def __init__(self, link: SignalClient, source: SignalSource) -> None:
        self._link, self._source = link, replace(source, temperatures=tuple(map(float, source.temperatures)))
        for what, here, asked in (
            ("teacher", link.info.teacher, source.teacher),
            ("tokenizer", link.info.tokenizer, source.tokenizer),
        ):
            if here != asked:
                raise LinkSetupError(f"signals are asked of {what} '{asked}', the link leads to {what} '{here}'")
        self._asked: OrderedDict[str, PendingSignal] = OrderedDict()

    def prefetch(self, batch: Batch) -> None:
        """Request a batch that will be needed; does nothing if too many requests are pending."""
        key = self._key(batch)
        if key in self._asked:
            return
        if len(self._asked) >= _PREFETCH and next(iter(self._asked.values())).reply is not None:
            self._asked.popitem(last=False)  # requested but never used
        if len(self._asked) < _PREFETCH:
            self._asked[key] = self._ask(key, batch)

    def signal(self, batch: Batch) -> Signal:
        """Signal of a batch.

        Raises:
            LinkError: the link cannot be restored in time, the teacher refuses, or the answer has another key.
            DataError: the batch cannot be sent to the teacher.
        """
        key = self._key(batch)
        asked = self._asked.pop(key, None) or self._ask(key, batch)
        reply, payload = self._link.answer(asked)
        if reply.key != key:
            raise LinkError("the teacher's signal is for other token ids than were asked for")
        try:
            check_layout(payload, self._layout(batch))
        except ValueError as error:
            raise LinkError(
                f"the teacher's signal is no {self._source.recipe.kind} signal of the batch: {error}"
            ) from None
        recipe = self._source.recipe
        return Signal(key, recipe.kind, recipe.codec, payload, tuple(sorted(set(self._source.temperatures))))

    def signals(self, batches: Sequence[Batch]) -> Iterator[Signal]:
        """Signals of many batches, requested ahead of time."""
        for at, batch in enumerate(batches):
            for soon in batches[at : at + _PREFETCH]:
                self.prefetch(soon)
            yield self.signal(batch)

    def _key(self, batch: Batch) -> str:
        return combine_keys(self._source.keys(batch))

    def _layout(self, batch: Batch) -> Layout:
        taus, info = len(set(self._source.temperatures)), self._link.info
        return layout(self._source.recipe, taus, batch.targets, info.vocabulary_size, info.hidden_size)

    def _ask(self, key: str, batch: Batch) -> PendingSignal:
        source = self._source
        lengths, raw = pack_batch(batch, self._link.info.vocabulary_size)
        ask = SignalRequest(
            teacher=source.teacher,
            tokenizer=source.tokenizer,
            key=key,
            signal=source.recipe,
            temperatures=list(source.temperatures),
            lengths=lengths,
        )
        return self._link.ask(ask, raw, max_payload_bytes(self._layout(batch)))
