"""Server with a tiny model, and edges that exchange single frames with it, for tests of the protocol."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from raycloud.link.channel import LinkDown
from raycloud.link.codecs.cut_codec import float_cut_codec
from raycloud.link.frames import ErrorReply, Frame, ResumeRequest, SessionKind, parse_body, unpack
from raycloud.models.segments import Segment
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.blocks import StepRequest, cloud_stage
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.messages import InferenceGrant, InferenceKind, OpenInference, StepMessage
from raycloud.split.inference.server import InferenceServer
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import tiny

WIDTH, BLOCKS, FIRST, SECOND = 32, 6, 2, 4
PLANS = PlanSet((FIRST,), (SECOND,))
MODEL = tiny("llama", dtype=torch.float32, seed=4)
MIDDLE = Segment(MODEL, 0, BLOCKS, embed=False, head=False)
PART = CloudPart(MIDDLE, PlanSet((0,), (BLOCKS,)), "model")
NARROW = CloudPart(Segment(MODEL, 1, 5, embed=False, head=False), PlanSet((1,), (5,)), "model")
CODE = float_cut_codec("float32", WIDTH)
ASKED = OpenInference(fingerprint="model", codec="float32", start_blocks=[FIRST], end_blocks=[SECOND], max_tokens=100)


def coded(rows: Tensor, pos: int = 0) -> bytes:
    return CODE.encode(rows, pos).numpy().tobytes()


def text(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


class Near(bytes):
    """Compare float32 numbers up to rounding, which may depend on the thread that computes them."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, bytes) or len(other) != len(self):
            return False
        mine, others = (torch.frombuffer(bytearray(one), dtype=torch.float32) for one in (self, other))
        return bool(torch.allclose(mine, others, rtol=1e-5, atol=1e-5))

    def __ne__(self, other: object) -> bool:
        return not self == other


def expected(rows: Tensor, sizes: list[int]) -> list[bytes]:
    """Compute the middle's output for hidden states that come in steps of these sizes."""
    state, made, start = cloud_stage(MIDDLE, PLANS, BLOCKS), [], 0
    for size in sizes:
        part = rows[None, start : start + size]
        made.append(Near(coded(state.step(StepRequest(SplitPlan(FIRST, SECOND), part, start, size, start))[0])))
        start += size
    return made


def changed(frame: Frame, **changes: Any) -> Frame:
    """Frame with other values of its header, its raw bytes, or of the step in its body."""
    fields = StepMessage.__dataclass_fields__
    if not changes.keys() & fields:
        return replace(frame, **changes)
    message = replace(StepMessage.parse(frame), **{name: changes.pop(name) for name in list(changes) if name in fields})
    return replace(frame, body=message.pack(), **changes)


class Wire:
    """Cloud end of a connection whose other end is the test."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.down: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.taken = asyncio.Event()
        self.taken.set()
        self.reason: str | None = None

    async def receive(self) -> bytes:
        if self.reason is not None:
            raise LinkDown("closed")
        if (data := await self.up.get()) is None:
            raise LinkDown("the peer left")
        return data

    async def send(self, data: bytes) -> None:
        await self.taken.wait()
        if self.reason is not None:
            raise LinkDown("closed")
        self.down.put_nowait(data)

    async def close(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self.up.put_nowait(None)
            self.down.put_nowait(None)


@dataclass
class Peer:
    """Edge that sends what a test tells it to."""

    all: ClassVar[list[Peer]] = []

    wire: Wire
    served: asyncio.Task[None]
    session: bytes
    epoch: int = 0

    @classmethod
    def connect(cls, host: InferenceServer, principal: str = "me", session: bytes = b"s" * 16) -> Peer:
        wire = Wire()
        peer = cls(wire, asyncio.create_task(host.serve(wire, principal)), session)
        cls.all.append(peer)
        return peer

    def say(self, data: Frame | bytes) -> None:
        self.wire.up.put_nowait(data.pack() if isinstance(data, Frame) else data)

    async def hear(self) -> Frame | None:
        """Return the next frame; None at the end of the connection."""
        data = await self.wire.down.get()
        if data is None:
            self.wire.down.put_nowait(None)
            return None
        return unpack(data, InferenceKind)

    async def ask(self, data: Frame | bytes) -> Frame:
        self.say(data)
        frame = await self.hear()
        assert frame is not None, self.wire.reason
        return frame

    async def refused(self, data: Frame | bytes, code: str) -> ErrorReply:
        """Send a frame and return the refusal that it gets."""
        frame = await self.ask(data)
        assert frame.kind is SessionKind.ERROR, frame
        refusal = parse_body(frame, ErrorReply)
        assert refusal.code == code, refusal
        return refusal

    async def open(self, **changes: Any) -> Frame:
        return await self.ask(self.opening(**changes))

    def opening(self, **changes: Any) -> Frame:
        return Frame(SessionKind.OPEN, self.session, self.epoch, body=ASKED.model_copy(update=changes).pack())

    async def opened(self, **changes: Any) -> InferenceGrant:
        frame = await self.open(**changes)
        assert frame.kind is SessionKind.OPEN_OK, (
            parse_body(frame, ErrorReply) if frame.kind is SessionKind.ERROR else frame
        )
        return parse_body(frame, InferenceGrant)

    def resume(self, epoch: int) -> Frame:
        self.epoch = epoch
        return Frame(SessionKind.RESUME, self.session, epoch, body=ResumeRequest().pack())

    def step(self, seq: int, rows: Tensor, pos: int, **changes: Any) -> Frame:
        """Make a step with these hidden states from token ``pos`` on, all of which are returned."""
        message = StepMessage(FIRST, SECOND, pos, pos, len(rows), len(rows))
        frame = Frame(InferenceKind.STEP, self.session, self.epoch, seq, body=message.pack(), raw=coded(rows, pos))
        return changed(frame, **changes)

    def leave(self) -> None:
        self.wire.up.put_nowait(None)


def sizes_of(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


async def generate(peer: Peer, rows: Tensor, size: int = 4, seq: int = 1) -> None:
    """Send a text through an open session and compare every reply with the output of the middle."""
    sizes, pos = sizes_of(len(rows), size), 0
    for number, (count, right) in enumerate(zip(sizes, expected(rows, sizes), strict=True)):
        reply = await peer.ask(peer.step(seq + number, rows[pos : pos + count], pos))
        answered = StepMessage.parse(reply)
        assert (reply.kind, reply.seq, answered.start, answered.tokens) == (
            InferenceKind.STEP_OK,
            seq + number,
            pos,
            count,
        )
        assert reply.raw == right
        pos += count


async def turns() -> None:
    """Wait until all work that does not need the engine's thread is done."""
    for _ in range(200):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.005)


class Gate:
    """Gate that blocks the engine's steps while it is closed, and counts them."""

    def __init__(self) -> None:
        self.steps = 0
        self.reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def __call__(self, *_: Any) -> None:
        self.steps += 1
        self.reached.set()
        assert self._open.wait(120)

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@contextmanager
def gated() -> Iterator[Gate]:
    """Put a gate before the first block of the plan."""
    gate = Gate()
    hook = MIDDLE.blocks[FIRST].register_forward_pre_hook(gate)
    try:
        yield gate
    finally:
        gate.open()
        hook.remove()


def converse(
    talk: Callable[[InferenceServer], Awaitable[None]],
    *,
    part: CloudPart = PART,
    codecs: CutCodecs | None = None,
    **limits: Any,
) -> None:
    """Run a conversation with a new server; tasks left pending or unretrieved errors fail the test."""
    engine, complaints = InferenceEngine(part, threads=1), []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        patient = InferenceLimits(**{"handshake_s": 120, **limits})
        host = InferenceServer(engine, codecs or CutCodecs(WIDTH), patient)
        async with asyncio.timeout(240):
            try:
                await talk(host)
            finally:
                peers, Peer.all[:] = list(Peer.all), []
            await host.leave()
            for peer in peers:
                peer.leave()
            await asyncio.gather(*(peer.served for peer in peers))
        assert host.sessions == 0
        assert host.kv_bytes == 0
        # What is cancelled or closed may take a few turns to end.
        async with asyncio.timeout(60):
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others, timeout=0.05)

    try:
        asyncio.run(main())
        gc.collect(1)
        assert complaints == []
    finally:
        engine.close()
