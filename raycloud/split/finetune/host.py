"""Split fine-tuning in the cloud: a session for each edge, with weights and an optimiser of its own."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from raycloud.errors import RaycloudError
from raycloud.link.frames import Frame, FrameError, Granted, Kind, body, split_off, with_bytes
from raycloud.link.hosting import Refused, Session, SessionHost, SessionLimits, SessionMetrics
from raycloud.split.cloud.metrics import NoMetrics
from raycloud.split.finetune.cloud import CloudSide, OutOfStep, Packings
from raycloud.split.finetune.code import blank, load_decoder, plain
from raycloud.split.finetune.messages import Began, Begin, Rows, Saved
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.parts import CloudPart
from raycloud.training.loop import Trainer


class TuneLimits(SessionLimits):
    """What is granted to edges that train."""

    sessions: int = Field(default=8, ge=1)
    sessions_per_principal: int = Field(default=8, ge=1)
    tokens: int = Field(default=16_384, ge=1)
    """Of a micro-batch, its padding included."""
    micros: int = Field(default=32, ge=1)
    """Micro-batches whose gradient may be outstanding."""


@dataclass(kw_only=True)
class TuneSession(Session):
    """One edge's run."""

    asked: Begin
    kept: Checkpoints
    side: CloudSide | None = None
    """Made by the first request, on the thread that computes."""
    ended: bool = False


class TuneHost(SessionHost[TuneSession]):
    """Trains with many edges, each by itself, one request at a time on one thread.

    Args:
        part: the blocks that every session begins with; never changed.
        folder: where checkpoints are kept.
        limits: what is granted.
        metrics: told of sessions and errors.
        threads: of torch; None leaves them as they are.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.CODE, Kind.FIT, Kind.FWD, Kind.BWD, Kind.OPT, Kind.SAVE})
    _limits: TuneLimits

    def __init__(
        self,
        part: CloudPart,
        folder: Path,
        limits: TuneLimits | None = None,
        metrics: SessionMetrics | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(limits or TuneLimits(), metrics or NoMetrics())
        self._part, self._folder = part, folder
        start = (lambda: None) if threads is None else (lambda: torch.set_num_threads(threads))
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine", initializer=start)

    def close(self) -> None:
        """Stop, behind what is under way."""
        self._engine.shutdown()

    def opening(self, frame: Frame, principal: str) -> Callable[[], TuneSession]:
        """Check the edge's model, cuts and checkpoint against what is here."""
        asked, held = body(frame, Begin), self._part.plans.cloud
        if asked.fingerprint != self._part.fingerprint:
            here = self._part.fingerprint[:12]
            raise Refused("fingerprint", f"the edge's model {asked.fingerprint[:12]} is not {here}")
        if (asked.first, asked.second) != (held.start, held.stop):
            cut = f"[{asked.first}, {asked.second})"
            raise Refused("plan", f"blocks {cut} are asked for, [{held.start}, {held.stop}) are here")
        width = int(self._part.config.hidden_size)
        for there in (asked.up, asked.down):
            if there.apart > there.width or there.width > 2 * width or (not there.narrow and there.width != width):
                raise Refused("width", f"{there.width} numbers of a token, {there.apart} apart; rows have {width}")
        # Another principal's run must not be found, whatever id is guessed.
        kept = Checkpoints(self._folder / hashlib.sha256(principal.encode()).hexdigest()[:16] / asked.run)
        if asked.restore is not None and asked.restore not in kept.steps():
            raise Refused("checkpoint", f"no checkpoint of step {asked.restore} of run {asked.run[:8]} is here")
        return lambda: TuneSession(
            id=frame.session, principal=principal, limits=self._limits, epoch=frame.epoch, asked=asked, kept=kept
        )

    def granted(self, session: TuneSession) -> Granted:
        """Lease and credit."""
        return Granted(lease_s=self._limits.lease_s, credit=self._limits.credit)

    def begin(self, session: TuneSession, frame: Frame) -> Awaitable[Frame]:
        """Hand a request to the thread that computes."""
        if frame.kind in (Kind.FWD, Kind.FIT):
            lengths = split_off(frame, Rows)[0].lengths
            longest = int(self._part.config.max_position_embeddings)
            if max(lengths) > longest or max(lengths) * len(lengths) > self._limits.tokens:
                padded = f"{len(lengths)} texts of up to {max(lengths)} tokens"
                raise Refused("tokens", f"{padded}; allowed: {self._limits.tokens} tokens in all, {longest} of a text")
            if session.side is not None and session.side.outstanding >= self._limits.micros:
                raise Refused("micros", f"{self._limits.micros} micro-batches are outstanding")
        return asyncio.wrap_future(self._engine.submit(self._answer, session, frame))

    def freed(self, session: TuneSession) -> None:
        """Its weights and optimiser go with it; checkpoints stay."""
        session.side, session.ended = None, True

    # -- on the thread that computes

    def _answer(self, session: TuneSession, frame: Frame) -> Frame:
        if session.ended:
            raise Refused("unknown-session", "the session ended")
        with _refusing():
            if session.side is None:
                session.side = self._side(session)
            side = session.side
            if frame.kind is Kind.CODE:
                _, raw = split_off(frame, Began)
                load_decoder(side.decoder, raw)
                return with_bytes(Kind.CODE_OK, Began())
            if frame.kind is Kind.SAVE:
                asked, _ = split_off(frame, Saved)
                if asked.step != side.step:
                    raise OutOfStep(f"step {asked.step} is to be saved in step {side.step}")
                session.kept.save(side.step, side.state())
                return with_bytes(Kind.SAVE_OK, asked)
            return side.answer(frame)

    def _side(self, session: TuneSession) -> CloudSide:
        """A side of the session's own, as it begins or as it was saved."""
        asked, width = session.asked, int(self._part.config.hidden_size)
        middle = copy.deepcopy(self._part.middle)
        if not asked.cloud:
            middle.requires_grad_(False)
        up, down = (
            blank(width, cut.width, cut.apart) if cut.narrow else plain(width) for cut in (asked.up, asked.down)
        )
        up.decoder.requires_grad_(asked.up.trained and asked.cloud)
        down.encoder.requires_grad_(asked.down.trained and asked.cloud)
        side = CloudSide(
            middle,
            up.decoder,
            down.encoder,
            Packings(asked.up.packing, asked.down.packing),
            asked.back,
            None,
            asked.seed,
        )
        if any(parameter.requires_grad for module in side.modules.values() for parameter in module.parameters()):
            side.trainer = Trainer(side.modules, asked.training, total_steps=asked.total_steps, seed=asked.seed)
        if asked.restore is not None:
            side.load(asked.restore, session.kept.load(asked.restore))
        return side


@contextmanager
def _refusing() -> Iterator[None]:
    """What an edge may do wrong, in words that it is told."""
    try:
        yield
    except OutOfStep as error:
        raise Refused("step", str(error)) from None
    except (ValueError, FrameError, RaycloudError) as error:
        raise Refused("numbers", str(error)) from None
