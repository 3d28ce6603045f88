"""The edge's side: a teacher at the other end of a link."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.distill.signal_file import Origin
from raycloud.distill.signal_link.messages import (
    Ask,
    AskTable,
    Offer,
    Told,
    pack_batch,
)
from raycloud.distill.signals import FrozenHead, Signal, SignalCodec, SignalRecipe
from raycloud.distill.signals.keys import joined
from raycloud.distill.signals.layout import Layout, check, layout, most_bytes
from raycloud.errors import LinkError
from raycloud.link.caller import Patience, asked_to_wait, reconnect, refused
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import Body, Frame, FrameError, Kind, Refusal, body, split_off, unpack, with_bytes
from raycloud.link.meter import Meter

_TRIES = 8
"""Connections that may break over one request before it is given up."""
_AHEAD = 4
"""Batches asked for before they are needed."""
_HEADER_BYTES = 64 * 2**10
"""Safetensors say what they hold in less than this."""


@dataclass
class Answer:
    """What came back to one request."""

    head: Told
    content: bytearray

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name.

        Raises:
            LinkError: they cannot be read.
        """
        try:
            return load(bytes(self.content))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise LinkError(f"the teacher's answer cannot be read: {str(error).splitlines()[0]}") from None


@dataclass
class _Request:
    message: bytes
    up: str
    down: str
    most: int
    done: Future[Answer] = field(default_factory=Future)
    answer: Answer | None = None
    tries: int = 0


class TeacherLink:
    """Requests to a teacher, each answered once however often the channel breaks.

    A thread of its own takes what comes in, so that answers cross while the edge computes. Whole messages are counted:
    ``ids`` and ``signals`` are batches up and what the teacher says of them down, ``head`` and ``words`` its tables,
    ``asks`` and ``replies`` all else up and down.

    Args:
        connect: opens a channel; called again whenever one breaks.
        meter: counts what crosses.
        timeout_s: how long nothing may come back, reconnecting included, before requests fail.

    Raises:
        LinkError: the teacher cannot be reached in time, or refuses.
    """

    def __init__(self, connect: Callable[[], Channel], *, meter: Meter | None = None, timeout_s: float = 300.0) -> None:
        self._connect, self._patience = connect, Patience("the teacher", timeout_s)
        self.meter = meter if meter is not None else Meter()
        self._requests: dict[int, _Request] = {}
        self._seq = 0
        self._sending = threading.Lock()
        self._awake = threading.Event()
        self._closed = False
        self._channel: Channel | None = None
        self.offer: Offer
        """Of the teacher, as it was when last connected."""
        reconnect(self._patience, self._attempt)
        self._thread = threading.Thread(target=self._run, name="teacher-link", daemon=True)
        self._thread.start()

    def origin(self, recipe: SignalRecipe, temperatures: Sequence[float]) -> Origin:
        """What this teacher's signals have in common."""
        return Origin(self.offer.teacher, self.offer.tokenizer, recipe, tuple(map(float, temperatures)))

    def head(self, codec: SignalCodec) -> FrozenHead:
        """A copy of the teacher's head, for ``hidden`` signals of a codec.

        Raises:
            LinkError: no answer, or one that is no head of this teacher.
        """
        answer, tensors = self._table(AskTable(teacher=self.offer.teacher, table="head", codec=codec))
        weight, bias = tensors["weight"], tensors.get("bias")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise LinkError(f"the teacher's head has {len(weight)} rows and a bias of {tuple(bias.shape)}")
        return FrozenHead(weight, bias, answer.head.softcap)

    def words(self) -> Tensor:
        """A copy of the teacher's input embedding (W, D) in bfloat16, for objectives that look at the tokens.

        Raises:
            LinkError: no answer, or one that is no embedding of this teacher.
        """
        return self._table(AskTable(teacher=self.offer.teacher, table="words"))[1]["weight"]

    def ask(self, control: Ask, raw: bytes, most: int) -> Future[Answer]:
        """Ask for the signal of a batch, of at most so many bytes."""
        return self._put(Kind.ASK, control, raw, "ids", "signals", most)

    def close(self) -> None:
        """End the connection; what is unanswered fails."""
        self._closed = True
        self._awake.set()
        if self._channel is not None:
            self._channel.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _table(self, control: AskTable) -> tuple[Answer, dict[str, Tensor]]:
        # A bias and four bytes a number are the most there can be.
        most = 4 * self.offer.words * (self.offer.width + 1)
        answer = self._put(Kind.TABLE, control, b"", "asks", control.table, most).result()
        if answer.head.key != control.key:
            raise LinkError(f"the teacher answered with '{answer.head.key}' where '{control.key}' was asked for")
        tensors = answer.tensors()
        shape = tuple(tensors["weight"].shape) if "weight" in tensors else ()
        if shape != (self.offer.words, self.offer.width):
            expected = (self.offer.words, self.offer.width)
            raise LinkError(f"the teacher's {control.table} has shape {shape}, not {expected}")
        return answer, tensors

    def _put(self, kind: Kind, control: Body, raw: bytes, up: str, down: str, most: int) -> Future[Answer]:
        with self._sending:
            self._seq += 1
            message = with_bytes(kind, control, raw, seq=self._seq).pack()
            request = _Request(message, up, down, most + _HEADER_BYTES)
            if self._closed:
                raise LinkDown("the link to the teacher is closed")
            if not self._requests:
                self._patience.renew()
            self._requests[self._seq] = request
            channel = self._channel
            if channel is not None:
                # A channel that breaks here is found broken by the thread that receives, which asks again.
                with suppress(LinkDown):
                    self._send(channel, up, message)
        self._awake.set()
        return request.done

    def _send(self, channel: Channel, kind: str, message: bytes) -> None:
        self.meter.add(kind, len(message))
        channel.send(message)

    # -- the thread that receives

    def _run(self) -> None:
        while not self._closed:
            if not self._requests:
                self._awake.wait()
                self._awake.clear()
                continue
            try:
                if self._channel is None:
                    reconnect(self._patience, self._attempt)
                self._receive()
            except (LinkDown, FrameError) as error:
                self._mend(error)
            except Exception as error:  # whatever it is must reach those who wait
                self._drop()
                self._fail(error if isinstance(error, LinkError) else LinkError(f"the link failed: {error!r}"))
        self._fail(LinkDown("the link to the teacher was closed"))

    def _mend(self, cause: LinkError) -> None:
        if self._closed:
            return
        try:
            reconnect(self._patience, self._attempt, cause)
        except LinkError as error:
            self._fail(error)

    def _receive(self) -> None:
        assert self._channel is not None
        try:
            data = self._channel.receive(self._patience.left)
        except TimeoutError:
            if not self._patience.left:
                raise self._patience.over() from None
            return
        try:
            frame = unpack(data)
        except FrameError:
            self.meter.add("replies", len(data))
            raise
        request = self._requests.get(frame.seq)
        part = frame.kind in (Kind.TOLD, Kind.PART)
        self.meter.add(request.down if part and request else "replies", len(data))
        if frame.kind is Kind.GOAWAY:
            raise LinkDown("the teacher leaves")
        if frame.kind is Kind.ERROR and frame.seq == 0:
            raise LinkDown(body(frame, Refusal).message)
        if request is None:  # answered already
            return
        if part:
            self._take(frame, request)
        elif frame.kind is Kind.BUSY:
            time.sleep(asked_to_wait(frame))
            with self._sending:
                self._send(self._channel, request.up, request.message)
        elif frame.kind is Kind.ERROR:
            del self._requests[frame.seq]
            request.done.set_exception(LinkError(f"the teacher refused: {body(frame, Refusal).message}"))
        else:
            raise FrameError(f"{frame.kind.name} came where an answer should have")

    def _take(self, frame: Frame, request: _Request) -> None:
        if frame.kind is Kind.TOLD:
            head, raw = split_off(frame, Told)
            request.answer = Answer(head, bytearray(raw))
        elif request.answer is None:
            raise FrameError("an answer has no beginning")
        else:
            request.answer.content += frame.payload
        answer = request.answer
        if answer.head.nbytes > request.most or len(answer.content) > answer.head.nbytes:
            del self._requests[frame.seq]
            request.done.set_exception(
                LinkError(f"the teacher's answer is larger than the {request.most} bytes it can have")
            )
            return
        self._patience.renew()
        if len(answer.content) == answer.head.nbytes:
            del self._requests[frame.seq]
            request.done.set_result(answer)

    def _fail(self, error: LinkError) -> None:
        with self._sending:
            failed, self._requests = list(self._requests.values()), {}
        for request in failed:
            request.done.set_exception(error)

    def _attempt(self, why: str) -> None:
        """Connect, and ask again what was not answered."""
        if self._closed:
            raise LinkError("the link to the teacher was closed")
        self._drop()
        channel = self._connect()
        try:
            self._greet(channel)
            self._ask_again(channel, why)
        except BaseException:
            channel.close()
            raise

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _greet(self, channel: Channel) -> None:
        with self._sending:
            self._send(channel, "asks", Frame(Kind.OPEN).pack())
        data = channel.receive(self._patience.left)
        self.meter.add("replies", len(data))
        frame = unpack(data)
        if frame.kind is not Kind.OPEN_OK:
            raise refused(frame, self._patience.peer)
        self.offer = body(frame, Offer)

    def _ask_again(self, channel: Channel, why: str) -> None:
        with self._sending:
            self._channel = channel
            for request in self._requests.values():
                request.answer, request.tries = None, request.tries + 1
                if request.tries > _TRIES:
                    raise LinkError(f"the link to the teacher broke {_TRIES} times over one request: {why}")
                self._send(channel, request.up, request.message)


class LinkSignals:
    """A :class:`~raycloud.distill.signals.SignalStore` whose teacher is at the other end of a link.

    Args:
        link: to the teacher.
        origin: what its signals must be of, such as :meth:`TeacherLink.origin`.

    Raises:
        LinkError: another teacher or another tokenizer is there.
    """

    def __init__(self, link: TeacherLink, origin: Origin) -> None:
        self._link, self._origin = link, replace(origin, temperatures=tuple(map(float, origin.temperatures)))
        for what, here, asked in (
            ("teacher", link.offer.teacher, origin.teacher),
            ("tokenizer", link.offer.tokenizer, origin.tokenizer),
        ):
            if here != asked:
                raise LinkError(f"signals are asked of {what} '{asked}', the link leads to {what} '{here}'")
        self._asked: OrderedDict[str, Future[Answer]] = OrderedDict()

    def prefetch(self, batch: Batch) -> None:
        """Have the teacher begin with a batch that will be needed; with too many under way, nothing."""
        key = self._key(batch)
        if key in self._asked:
            return
        if len(self._asked) >= _AHEAD and next(iter(self._asked.values())).done():
            self._asked.popitem(last=False)  # nobody came for it
        if len(self._asked) < _AHEAD:
            self._asked[key] = self._ask(key, batch)

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about a batch.

        Raises:
            LinkError: the link cannot be mended in time, the teacher refuses, or the answer is for something else.
            DataError: the batch holds what the teacher cannot have.
        """
        key = self._key(batch)
        asked = self._asked.pop(key, None) or self._ask(key, batch)
        answer = asked.result()
        if answer.head.key != key:
            raise LinkError("the teacher's signal is for other token ids than were asked for")
        payload = answer.tensors()
        try:
            check(payload, self._layout(batch))
        except ValueError as error:
            raise LinkError(
                f"the teacher's signal is no {self._origin.recipe.kind} signal of the batch: {error}"
            ) from None
        recipe = self._origin.recipe
        return Signal(key, recipe.kind, recipe.codec, payload, tuple(sorted(set(self._origin.temperatures))))

    def signals(self, batches: Sequence[Batch]) -> Iterator[Signal]:
        """What it says about each of many batches, asked for ahead of time."""
        for at, batch in enumerate(batches):
            for soon in batches[at : at + _AHEAD]:
                self.prefetch(soon)
            yield self.signal(batch)

    def _key(self, batch: Batch) -> str:
        return joined(self._origin.keys(batch))

    def _layout(self, batch: Batch) -> Layout:
        taus, offer = len(set(self._origin.temperatures)), self._link.offer
        return layout(self._origin.recipe, taus, batch.targets, offer.words, offer.width)

    def _ask(self, key: str, batch: Batch) -> Future[Answer]:
        origin = self._origin
        lengths, raw = pack_batch(batch, self._link.offer.words)
        ask = Ask(
            teacher=origin.teacher,
            tokenizer=origin.tokenizer,
            key=key,
            signal=origin.recipe,
            temperatures=list(origin.temperatures),
            lengths=lengths,
        )
        return self._link.ask(ask, raw, most_bytes(self._layout(batch)))
