"""The cloud's side: a teacher that answers whoever is connected."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.distill.signal_link.limits import SignalLimits
from raycloud.distill.signal_link.messages import Ask, AskTable, Offer, Told, told, unpack_batch
from raycloud.distill.signals import frozen_head, observe, signal_key
from raycloud.distill.signals.layout import layout, most_bytes
from raycloud.errors import ModelError
from raycloud.link.channel import Connection
from raycloud.link.frames import Frame, FrameError, Kind, split_off
from raycloud.link.hosting import Line, Refused, TooBusy, attended, converse, refusal
from raycloud.models.segments import Segment

log = logging.getLogger(__name__)

_RETRY_S = 0.5


@dataclass(frozen=True)
class _Answer:
    head: Told
    content: bytes


class SignalHost:
    """Serves signals of one teacher. All but the teacher's own work is on one event loop.

    Args:
        model: the teacher.
        name: with a fingerprint of its weights; part of every key.
        tokenizer: fingerprint of the tokenizer that ids are of.
        limits: what is granted.
        threads: of torch; None leaves them as they are.

    Raises:
        ModelError: the teacher's head is more than one linear map.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        tokenizer: str,
        limits: SignalLimits | None = None,
        threads: int | None = None,
    ) -> None:
        self._model, self._teacher = model, Segment(model)
        if not isinstance(self._teacher.head, nn.Linear):
            raise ModelError(f"teacher '{name}' has a head of several layers; allowed: one linear map")
        words, width = self._teacher.head.weight.shape
        self.offer = Offer(teacher=name, tokenizer=tokenizer, words=words, width=width)
        self._limits = limits or SignalLimits()
        positions = getattr(model.config, "max_position_embeddings", None)
        self._length = min(self._limits.length, positions or self._limits.length)
        # One at a time: a teacher's pass over a batch keeps the device busy by itself.
        self._worker = ThreadPoolExecutor(1, "teacher", partial(_begin, threads))
        self._pending: dict[str, asyncio.Task[_Answer]] = {}
        self._kept: OrderedDict[str, _Answer] = OrderedDict()
        self._kept_bytes = 0
        self._lines: set[Line] = set()

    @property
    def connections(self) -> int:
        """Edges connected."""
        return len(self._lines)

    async def serve(self, connection: Connection) -> None:
        """Answer one connection until it ends."""
        async with attended(connection, self._limits) as line:
            async with asyncio.timeout(self._limits.handshake_s):
                frame = await line.receive()
            if frame.kind is not Kind.OPEN:
                raise FrameError(f"{frame.kind.name} came where OPEN should have")
            if len(self._lines) >= self._limits.connections:
                await line.send(refusal(frame, TooBusy(_RETRY_S)))
                return
            self._lines.add(line)
            try:
                await line.send(Frame(Kind.OPEN_OK, seq=frame.seq, payload=self.offer.pack()))
                await self._converse(line)
            finally:
                self._lines.discard(line)

    async def leave(self) -> None:
        """Tell every edge to ask elsewhere, and stop."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        for line in list(self._lines):
            await line.close("the teacher leaves", Frame(Kind.GOAWAY))

    async def _converse(self, line: Line) -> None:
        """Compute the next answer while one is sent."""

        async def tell(frames: Iterator[Frame]) -> bool:
            for frame in frames:
                await line.send(frame)
            return True

        def reply(frame: Frame) -> asyncio.Future[Iterator[Frame]]:
            return asyncio.create_task(self._reply(frame))

        await converse(line.receive, reply, tell, self._limits.unanswered)

    async def _reply(self, frame: Frame) -> Iterator[Frame]:
        """The frames of the reply, once it is computed."""
        try:
            if frame.kind is Kind.ASK:
                key, compute = self._asked(frame)
            elif frame.kind is Kind.TABLE:
                key, compute = self._asked_table(frame)
            else:
                raise Refused("kind", f"{frame.kind.name} has no place here")
            answer = await self._computed(key, compute)
            return told(frame.seq, answer.head, answer.content)
        except (Refused, TooBusy) as error:
            return iter([refusal(frame, error)])
        except FrameError as error:
            return iter([refusal(frame, Refused("request", str(error)))])
        except Exception as error:
            log.exception("request %d failed", frame.seq)
            return iter([refusal(frame, Refused("internal", f"the teacher failed: {type(error).__name__}"))])

    def _asked(self, frame: Frame) -> tuple[str, Callable[[], _Answer]]:
        ask, raw = split_off(frame, Ask)
        self._check(ask)
        try:
            batch = unpack_batch(ask.lengths, raw, self.offer.words)
        except ValueError as error:
            raise Refused("batch", f"batch: {error}") from None
        taus = len(set(ask.temperatures))
        size = most_bytes(layout(ask.signal, taus, batch.targets, self.offer.words, self.offer.width))
        if size > self._limits.reply_bytes:
            allowed = f"{self._limits.reply_bytes} are allowed; ask for a smaller batch or another kind"
            raise Refused("reply", f"a {ask.signal.kind} signal of this batch has up to {size} bytes, {allowed}")
        if signal_key(self.offer.teacher, batch, ask.signal, ask.temperatures) != ask.key:
            raise Refused("key", "the key is not that of the batch, the signal and the temperatures asked for")
        return ask.key, partial(self._observed, ask, batch)

    def _check(self, ask: Ask) -> None:
        limits, longest = self._limits, max(ask.lengths)
        self._check_teacher(ask.teacher)
        if ask.tokenizer != self.offer.tokenizer:
            raise Refused("tokenizer", f"asked with ids of tokenizer {ask.tokenizer}, here is {self.offer.tokenizer}")
        for field, asked, allowed in (
            ("samples", len(ask.lengths), limits.samples),
            ("length", longest, self._length),
            ("tokens with padding", len(ask.lengths) * longest, limits.tokens),
        ):
            if asked > allowed:
                raise Refused("batch", f"batch: {field} {asked}; allowed: at most {allowed}")

    def _check_teacher(self, asked: str) -> None:
        if asked != self.offer.teacher:
            raise Refused("teacher", f"asked for the teacher '{asked}', here is '{self.offer.teacher}'")

    def _asked_table(self, frame: Frame) -> tuple[str, Callable[[], _Answer]]:
        ask, _ = split_off(frame, AskTable)
        self._check_teacher(ask.teacher)
        return ask.key, partial(self._table, ask)

    async def _computed(self, key: str, compute: Callable[[], _Answer]) -> _Answer:
        """An answer that is kept, under way for somebody else, or computed now."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._pending:
            if len(self._pending) >= self._limits.queue:
                raise TooBusy(_RETRY_S)
            self._pending[key] = asyncio.create_task(self._compute(key, compute))
        # Who asked may leave; others wait for it too, and it is there when the edge comes back.
        return await asyncio.shield(self._pending[key])

    async def _compute(self, key: str, compute: Callable[[], _Answer]) -> _Answer:
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._worker, compute)
        finally:
            del self._pending[key]
        self._kept[key] = answer
        self._kept_bytes += len(answer.content)
        while self._kept_bytes > self._limits.kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.content)
        return answer

    def _observed(self, ask: Ask, batch: Batch) -> _Answer:
        said = observe(self._teacher, self.offer.teacher, batch.to(self._model.device), ask.signal, ask.temperatures)
        content = save({name: tensor.contiguous() for name, tensor in said.payload.items()})
        return _Answer(Told(key=said.key, nbytes=len(content)), content)

    def _table(self, ask: AskTable) -> _Answer:
        softcap = None
        if ask.table == "head":
            head = frozen_head(self._teacher, ask.codec)
            softcap = head.softcap
            tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        else:
            weight: Any = self._model.get_input_embeddings().weight
            tensors = {"weight": weight.detach().to(torch.bfloat16).cpu()}
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        return _Answer(Told(key=ask.key, nbytes=len(content), softcap=softcap), content)


def _begin(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
