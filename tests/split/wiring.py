"""A tiny model cut in three, its cloud on an event loop of its own, and links that break where a test wants it."""

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
from raycloud.link.frames import Frame, Kind, Refusal
from raycloud.models.segments import Segment
from raycloud.split.cloud.engine import Engine
from raycloud.split.cloud.host import Host
from raycloud.split.cloud.limits import Limits
from raycloud.split.generation import SplitModel
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet
from raycloud.split.remote import RemoteMiddle, Terms
from raycloud.split.terms import Codecs
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
    """The middle of a model, and everything its host let slip."""

    model: PreTrainedModel
    codecs: Codecs
    host: Host
    loopback: Loopback
    engine: Engine
    failures: list[BaseException] = field(default_factory=list)

    def connect(self, session: str = "") -> Channel:
        return self.loopback.connect()

    def forget(self) -> None:
        """Lose all sessions at once, as a replica that is replaced does."""

        async def forget() -> None:
            for session in self.host.held():
                self.host._free(session)

        asyncio.run_coroutine_threadsafe(forget(), self.loopback.loop).result(20)

    def settled(self) -> int:
        """Sessions left once what is under way has been read."""

        async def sessions() -> int:
            for _ in range(200):
                if not self.host.sessions:
                    break
                await asyncio.sleep(0.01)
            return self.host.sessions

        return asyncio.run_coroutine_threadsafe(sessions(), self.loopback.loop).result(20)

    def terms(self, plans: PlanSet, **changes: Any) -> Terms:
        given: dict[str, Any] = {"codec": "float32", "max_tokens": 128, "patience_s": 20.0, **changes}
        return Terms("model", plans, self.codecs, **given)

    def edge(
        self, plans: PlanSet, connect: Connect | None = None, *, chunk: int = 8, seed: int = 0, **terms: Any
    ) -> SplitModel:
        """A model whose middle is here."""
        ahead, behind = plans.edge(BLOCKS)
        asked, reach = self.terms(plans, **terms), connect or self.connect
        return SplitModel(
            Segment(self.model, 0, ahead.stop, head=False),
            Segment(self.model, behind.start, BLOCKS, embed=False),
            lambda: RemoteMiddle(reach, asked),
            plans,
            chunk=chunk,
            seed=seed,
        )


@contextmanager
def cloud(family: str = "llama", codecs: Codecs | None = None, **limits: Any) -> Iterator[Cloud]:
    model = tiny(family, dtype=torch.float32, seed=4)
    part = CloudPart(Segment(model, 0, BLOCKS, embed=False, head=False), PlanSet((0,), (BLOCKS,)), "model")
    engine, agreed, failures = Engine(part, threads=1), codecs or Codecs(WIDTH), list[BaseException]()
    host = Host(engine, agreed, Limits(**{"rows": 16, **limits}))

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
    return f"{plans.firsts}-{plans.seconds}".replace(" ", "")


@cache
def stock(family: str = "llama", length: int = 33, new: int = NEW) -> list[int]:
    """What the unsplit model says."""
    model = tiny(family, dtype=torch.float32, seed=4)
    ids = torch.tensor([PROMPT[:length]])
    made = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    return made[0, length:].tolist()


def refusal(code: str, seq: int = 0) -> Frame:
    return Frame(Kind.ERROR, seq=seq, payload=Refusal(code=code, message=f"because of {code}").pack())


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
