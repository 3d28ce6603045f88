"""Tiny model cut in three, its cloud on a separate event loop, and links that break where a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from raycloud.link.channel import Channel, Connection, LinkDown, Loopback
from raycloud.link.frames import ErrorReply, Frame, SessionKind
from raycloud.models.segments import Segment
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.generation import SplitTokenSource
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.server import InferenceServer
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet
from tests.models.families import tiny

WIDTH, BLOCKS = 32, 6

PLANS = [
    PlanSet((2,), (4,)),
    PlanSet((0,), (6,)),
    PlanSet((1,), (6,)),
    PlanSet((0,), (3,)),
    PlanSet((0, 1, 3), (2, 4, 6)),
]
FIXED, DRAWN = PLANS[0], PLANS[-1]
NEW = 12
PROMPT = torch.randint(3, 97, (33,), generator=torch.Generator().manual_seed(3)).tolist()

Connect = Callable[[str], Channel]


@dataclass
class Cloud:
    """Cloud with the middle of a model, which records unhandled errors."""

    model: PreTrainedModel
    codecs: CutCodecs
    host: InferenceServer
    loopback: Loopback
    engine: InferenceEngine
    failures: list[BaseException] = field(default_factory=list)

    def connect(self, session: str = "") -> Channel:
        return self.loopback.connect()

    def forget(self) -> None:
        """Lose all sessions at once, as a replaced replica does."""

        async def forget() -> None:
            for session in self.host.held():
                self.host._free(session)

        asyncio.run_coroutine_threadsafe(forget(), self.loopback.loop).result(240)

    def settled(self) -> int:
        """Return the number of sessions after all pending messages have been read."""

        async def sessions() -> int:
            for _ in range(6_000):
                if not self.host.sessions:
                    break
                await asyncio.sleep(0.01)
            return self.host.sessions

        return asyncio.run_coroutine_threadsafe(sessions(), self.loopback.loop).result(240)

    def terms(self, plans: PlanSet, **changes: Any) -> SessionConfig:
        given: dict[str, Any] = {"codec": "float32", "max_tokens": 128, "patience_s": 120.0, **changes}
        return SessionConfig("model", plans, self.codecs, **given)

    def edge(
        self, plans: PlanSet, connect: Connect | None = None, *, chunk: int = 8, seed: int = 0, **terms: Any
    ) -> SplitTokenSource:
        """Make a split model whose middle runs in this process."""
        ahead, behind = plans.edge(BLOCKS)
        asked, reach = self.terms(plans, **terms), connect or self.connect
        return SplitTokenSource(
            Segment(self.model, 0, ahead.stop, head=False),
            Segment(self.model, behind.start, BLOCKS, embed=False),
            lambda: RemoteBlocks(reach, asked),
            plans,
            chunk=chunk,
            seed=seed,
        )


@contextmanager
def cloud(
    family: str = "llama", codecs: CutCodecs | None = None, *, model: PreTrainedModel | None = None, **limits: Any
) -> Iterator[Cloud]:
    model = tiny(family, dtype=torch.float32, seed=4) if model is None else model
    part = CloudPart(Segment(model, 0, BLOCKS, embed=False, head=False), PlanSet((0,), (BLOCKS,)), "model")
    engine, agreed, failures = InferenceEngine(part, threads=1), codecs or CutCodecs(WIDTH), list[BaseException]()
    host = InferenceServer(engine, agreed, InferenceLimits(**{"step_tokens": 16, **limits}))

    async def serve(connection: Connection) -> None:
        try:
            await host.serve(connection, "me")
        except Exception as error:
            failures.append(error)
            raise

    loopback = Loopback(serve)
    loopback.loop.set_exception_handler(lambda _, context: failures.append(context.get("exception") or Exception()))
    try:
        yield Cloud(model, agreed, host, loopback, engine, failures)
        assert failures == []
    finally:
        loopback.close()
        engine.close()


def name(plans: PlanSet) -> str:
    return f"{plans.start_blocks}-{plans.end_blocks}".replace(" ", "")


@cache
def stock(family: str = "llama", length: int = 33, new: int = NEW) -> list[int]:
    """Generate with the unsplit model."""
    model = tiny(family, dtype=torch.float32, seed=4)
    ids = torch.tensor([PROMPT[:length]])
    made = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    return made[0, length:].tolist()


def refusal(code: str, seq: int = 0) -> Frame:
    return Frame(SessionKind.ERROR, seq=seq, body=ErrorReply(code=code, message=f"because of {code}").pack())


class Script:
    """Channels to a cloud that pass through one hook, which may change, break or drop what crosses.

    Args:
        connect: opens the channel below.
        hook: told "send", "sent", "receive" or "received", the number of the event over all channels, and the data
            ("receive" has none yet). It returns the data to pass on, or raises.
    """

    def __init__(self, connect: Connect, hook: Callable[[str, int, bytes], bytes]) -> None:
        self._connect, self._hook = connect, hook
        self.events = self.channels = 0

    def __call__(self, session: str) -> Channel:
        self.channels += 1
        return _Scripted(self._connect(session), self)

    def pass_on(self, what: str, data: bytes) -> bytes:
        number = self.events
        self.events += 1
        return self._hook(what, number, data)


class _Scripted:
    def __init__(self, inner: Channel, script: Script) -> None:
        self._inner, self._script = inner, script

    def _through(self, what: str, data: bytes) -> bytes:
        try:
            return self._script.pass_on(what, data)
        except LinkDown:
            self._inner.close()
            raise

    def send(self, data: bytes) -> None:
        self._inner.send(self._through("send", data))
        self._through("sent", data)

    def receive(self, timeout_s: float) -> bytes:
        self._through("receive", b"")
        return self._through("received", self._inner.receive(timeout_s))

    def close(self) -> None:
        self._inner.close()
