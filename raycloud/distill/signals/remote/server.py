"""The cloud's side: a server of one teacher's signals."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from functools import partial

import torch
from safetensors.torch import save
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.distill.signals import SignalCodec, signal_key
from raycloud.distill.signals.layout import layout, max_payload_bytes
from raycloud.distill.signals.remote.limits import SignalLimits
from raycloud.distill.signals.remote.messages import (
    OpenSignals,
    SignalMessageKind,
    SignalReply,
    SignalRequest,
    TableRequest,
    TeacherServerInfo,
    unpack_batch,
)
from raycloud.distill.signals.remote.teacher import SignalTeacher
from raycloud.link.frames import ErrorReply, Frame, FrameError, parse_body
from raycloud.link.server import RequestRefused, ServerBusy, Session, SessionServer, completed

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_TOKEN_BYTES = 4
"""Upper bound on the bytes of a token in a request: an id, and whether the next one is a label."""


class SignalServer(SessionServer[Session]):
    """Server of the signals of one teacher. Everything except its computation runs on one event loop.

    A reply depends on its request alone: edges that request the same share one computation, and a request that is
    refused or fails leaves its session as it was.

    Args:
        teacher: teacher that computes the replies.
        limits: limits of sessions, batches and replies.
        threads: number of torch threads; None leaves it unchanged.
    """

    service, kinds = "signals", SignalMessageKind
    requests = frozenset({SignalMessageKind.SIGNAL, SignalMessageKind.HEAD, SignalMessageKind.EMBEDDING})
    _limits: SignalLimits

    def __init__(self, teacher: SignalTeacher, limits: SignalLimits | None = None, threads: int | None = None) -> None:
        super().__init__(limits or SignalLimits())
        self.heartbeat_s = self._limits.heartbeat_s
        self._teacher = teacher
        vocabulary_size, hidden_size = teacher.head_shape
        self.info = TeacherServerInfo(
            lease_s=self._limits.lease_s,
            credit=self._limits.credit,
            teacher=teacher.name,
            tokenizer=teacher.tokenizer,
            vocabulary_size=vocabulary_size,
            hidden_size=hidden_size,
            request_bytes=self.most_bytes(SignalMessageKind.SIGNAL),
        )
        self._length = min(self._limits.length, teacher.max_length)
        # One worker: a single forward pass of the teacher keeps the device busy.
        self._worker = ThreadPoolExecutor(1, "teacher", partial(_begin, threads))
        self._computing: dict[str, asyncio.Task[Frame]] = {}
        self._kept: OrderedDict[str, Frame] = OrderedDict()
        self._kept_bytes = 0

    def opening(self, frame: Frame, principal: str) -> Callable[[], Session]:
        """Check the request to open a session; every edge with a token may open one."""
        parse_body(frame, OpenSignals)
        return partial(Session, id=frame.session, principal=principal, limits=self._limits, epoch=frame.epoch)

    def granted(self, session: Session) -> TeacherServerInfo:
        """Grant, with the identity of the teacher."""
        return self.info

    def most_bytes(self, kind: IntEnum) -> int:
        """Largest number of raw bytes of a request: those of as many tokens as are allowed."""
        return min(self._limits.message_bytes, _TOKEN_BYTES * self._limits.tokens)

    def begin(self, session: Session, frame: Frame) -> Awaitable[Frame]:
        """Check a request and queue its computation; a request that is refused is answered with REFUSED.

        Raises:
            ServerBusy: too many replies are being computed.
        """
        try:
            key, compute = self._parse(frame)
        except FrameError as error:
            return completed(_refusal("request", str(error)))
        except RequestRefused as error:
            return completed(_refusal(error.code, str(error)))
        if key in self._kept:
            self._kept.move_to_end(key)
            return completed(self._kept[key])
        if key not in self._computing:
            if len(self._computing) >= self._limits.queue:
                raise ServerBusy(_RETRY_S)
            self._computing[key] = asyncio.create_task(self._compute(key, compute))
        return _reply(self._computing[key])

    async def leave(self) -> None:
        """Tell every edge to reconnect elsewhere, and stop."""
        await super().leave()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def freed(self, session: Session) -> None:
        """Do nothing: computed replies are kept for other edges."""

    # -- requests

    def _parse(self, frame: Frame) -> tuple[str, Callable[[], Frame]]:
        """Key of the reply, and the function that computes it."""
        if frame.kind is SignalMessageKind.SIGNAL:
            request = parse_body(frame, SignalRequest)
            return request.key, partial(self._signal, request, self._checked_batch(request, frame.raw))
        asked = parse_body(frame, TableRequest)
        self._check_teacher(asked.teacher)
        key = asked.key(frame.kind)
        if frame.kind is SignalMessageKind.HEAD:
            return key, partial(self._head, key, asked.codec)
        return key, partial(self._embedding, key)

    def _checked_batch(self, ask: SignalRequest, raw: bytes) -> Batch:
        self._check(ask)
        try:
            batch = unpack_batch(ask.lengths, raw, self.info.vocabulary_size)
        except ValueError as error:
            raise RequestRefused("batch", f"batch: {error}") from None
        taus = len(set(ask.temperatures))
        size = max_payload_bytes(
            layout(ask.signal, taus, batch.targets, self.info.vocabulary_size, self.info.hidden_size)
        )
        if size > self._limits.reply_bytes:
            allowed = f"{self._limits.reply_bytes} are allowed; ask for a smaller batch or another kind"
            raise RequestRefused("reply", f"a {ask.signal.kind} signal of this batch has up to {size} bytes, {allowed}")
        if signal_key(self.info.teacher, batch, ask.signal, ask.temperatures) != ask.key:
            raise RequestRefused("key", "the key is not that of the batch, the signal and the temperatures asked for")
        return batch

    def _check(self, ask: SignalRequest) -> None:
        limits, longest = self._limits, max(ask.lengths)
        self._check_teacher(ask.teacher)
        if ask.tokenizer != self.info.tokenizer:
            raise RequestRefused(
                "tokenizer", f"asked with ids of tokenizer {ask.tokenizer}, here is {self.info.tokenizer}"
            )
        for field, asked, allowed in (
            ("samples", len(ask.lengths), limits.samples),
            ("length", longest, self._length),
            ("tokens with padding", len(ask.lengths) * longest, limits.tokens),
        ):
            if asked > allowed:
                raise RequestRefused("batch", f"batch: {field} {asked}; allowed: at most {allowed}")

    def _check_teacher(self, asked: str) -> None:
        if asked != self.info.teacher:
            raise RequestRefused("teacher", f"asked for the teacher '{asked}', here is '{self.info.teacher}'")

    # -- replies

    async def _compute(self, key: str, compute: Callable[[], Frame]) -> Frame:
        try:
            reply = await asyncio.get_running_loop().run_in_executor(self._worker, compute)
        finally:
            del self._computing[key]
        self._kept[key] = reply
        self._kept_bytes += len(reply.raw)
        while self._kept_bytes > self._limits.kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.raw)
        return reply

    def _signal(self, ask: SignalRequest, batch: Batch) -> Frame:
        signal = self._teacher.signal(batch, ask.signal, ask.temperatures)
        return _packed(SignalMessageKind.SIGNAL_OK, SignalReply(key=signal.key), signal.payload)

    def _head(self, key: str, codec: SignalCodec) -> Frame:
        head = self._teacher.head(codec)
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        return _packed(SignalMessageKind.HEAD_OK, SignalReply(key=key, softcap=head.softcap), tensors)

    def _embedding(self, key: str) -> Frame:
        return _packed(SignalMessageKind.EMBEDDING_OK, SignalReply(key=key), {"weight": self._teacher.embedding()})


async def _reply(computing: asyncio.Task[Frame]) -> Frame:
    """Reply that others may wait for too."""
    try:
        return await computing
    except RequestRefused as error:
        return _refusal(error.code, str(error))
    except Exception as error:
        log.exception("the teacher failed")
        return _refusal("internal", f"the teacher failed: {type(error).__name__}")


def _refusal(code: str, message: str) -> Frame:
    return Frame.of(SignalMessageKind.REFUSED, ErrorReply(code=code, message=message[:500]))


def _packed(kind: SignalMessageKind, body: SignalReply, tensors: Mapping[str, Tensor]) -> Frame:
    return Frame.of(kind, body, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _begin(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
