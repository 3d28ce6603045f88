"""Split fine-tuning in the cloud: a session for each edge, with weights and an optimiser of its own.

Edges that train together bring their weights to rounds, and begin from what becomes of them.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from raycloud.errors import RaycloudError
from raycloud.link.frames import Frame, FrameError, Granted, Kind, body, split_off, with_bytes
from raycloud.link.hosting import Refused, Session, SessionHost, SessionLimits, SessionMetrics, TooBusy
from raycloud.split.cloud.metrics import NoMetrics
from raycloud.split.finetune.cloud import CloudSide, OutOfStep
from raycloud.split.finetune.code import blank, plain
from raycloud.split.finetune.group import Group
from raycloud.split.finetune.labelled import LabelledCloud
from raycloud.split.finetune.meeting import Meeting, read
from raycloud.split.finetune.messages import (
    PIECE_BYTES,
    Backward,
    Begin,
    Forward,
    Given,
    Meet,
    Optimised,
    Rows,
    Saved,
    Take,
    Taken,
)
from raycloud.split.finetune.numbers import Packings
from raycloud.split.finetune.state import GROUPS, Checkpoints, forget
from raycloud.split.parts import CloudPart
from raycloud.training.loop import Trainer
from raycloud.training.lora import adapt

_WAIT_S = 4.0
"""How long a ROUND whose round goes on is kept waiting: shorter than an edge waits for an answer of a sound cloud."""
_LOOK_S = 0.05
_RETRY_S = 1.0


class TuneLimits(SessionLimits):
    """What is granted to edges that train."""

    sessions: int = Field(default=8, ge=1)
    sessions_per_principal: int = Field(default=8, ge=1)
    credit: int = Field(default=8, ge=1, le=64)
    """Rows and gradients both are on their way at the same time."""
    beat_s: float = Field(default=5.0, gt=0, le=15)
    """So often an edge whose request waits for those of others is told that these are answered. It is patient for a
    minute, and connects anew after a third of that."""
    tokens: int = Field(default=16_384, ge=1)
    """Of a micro-batch, its padding included."""
    micros: int = Field(default=32, ge=1)
    """Micro-batches of a session whose gradient may be outstanding."""
    outstanding: int = Field(default=65_536, ge=1)
    """Tokens of these together, their padding included."""
    runs: int = Field(default=64, ge=1)
    """Whose checkpoints are kept for one principal, and groups likewise; those that saved longest ago go first."""
    memory_bytes: int = Field(default=2**30, ge=0)
    """Of the numbers of texts that are remembered where only changes cross."""
    part_bytes: int = Field(default=2**29, ge=0)
    """Of the weights that an edge brings to a round."""


@dataclass(kw_only=True)
class TuneSession(Session):
    """One edge's run."""

    asked: Begin
    kept: Checkpoints
    side: CloudSide | None = None
    """Made by the first request, on the thread that computes."""
    ended: bool = False
    away: dict[int, int] = field(default_factory=dict)
    """Of each micro-batch that was accepted and whose gradient was not, the tokens, padding included."""
    meeting: Meeting | None = None
    """Of the group that it trains with."""
    given: bytearray = field(default_factory=bytearray)
    """What it has brought of its own weights."""
    taken: tuple[int, bytes] = (0, b"")
    """What it is being given: the round, and the edges' weights."""

    @property
    def name(self) -> str:
        """The edge's, within its group."""
        return "" if self.asked.together is None else self.asked.together.name


class TuneHost(SessionHost[TuneSession]):
    """Trains with many edges, each by itself or in a group, one request at a time on one thread.

    The members of a group share a token and must come to one host: only a round brings them together.

    Args:
        part: the blocks that every session begins with; never changed.
        folder: where checkpoints are kept.
        limits: what is granted.
        metrics: told of sessions and errors.
        threads: of torch; None leaves them as they are.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset(
        {
            *(Kind.CODE, Kind.FIT, Kind.FWD, Kind.BWD, Kind.LEARN, Kind.JUDGE, Kind.OPT, Kind.SAVE),
            *(Kind.GIVE, Kind.ROUND, Kind.TAKE),
        }
    )
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
        self.beat_s = self._limits.beat_s
        self._part, self._folder = part, folder
        self._meetings: dict[Path, Meeting] = {}
        self._queued = 0
        """Requests that wait for the thread that computes, or are computed."""
        start = (lambda: None) if threads is None else (lambda: torch.set_num_threads(threads))
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine", initializer=start)

    def kept(self, group: str, principal: str) -> Group:
        """A group as its latest round left it.

        Raises:
            TrainingError: no round has ended, or the file cannot be read.
        """
        return read(group_file(self._of(principal), group))[2]

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
        if asked.lora is not None and asked.lora.r > width:
            raise Refused("lora", f"lora.r={asked.lora.r}; allowed: up to {width}, as many as rows have numbers")
        if asked.task is not None and self._part.last is None:
            raise Refused("labels", "labels=cloud; allowed here: labels=edge, as this cloud was not started for labels")
        # Another principal's run must not be found, whatever id is guessed.
        mine = self._of(principal)
        kept = Checkpoints(mine / asked.run)
        if asked.restore is not None and asked.restore not in kept.steps():
            raise Refused("checkpoint", f"no checkpoint of step {asked.restore} of run {asked.run[:8]} is here")
        at = None if asked.together is None else group_file(mine, asked.together.group)
        meeting = None if at is None else self._meeting(at, asked)

        def make() -> TuneSession:
            if at is not None and meeting is not None:
                self._meetings[at] = meeting  # not before there is room for a session, with which it is let go of
            return TuneSession(
                id=frame.session,
                principal=principal,
                limits=self._limits,
                epoch=frame.epoch,
                asked=asked,
                kept=kept,
                meeting=meeting,
            )

        return make

    def _of(self, principal: str) -> Path:
        """Where what one principal's edges need is kept."""
        return self._folder / hashlib.sha256(principal.encode()).hexdigest()[:16]

    def _meeting(self, path: Path, asked: Begin) -> Meeting:
        meeting = self._meetings.get(path)
        if meeting is None or meeting.stale:
            try:
                meeting = Meeting(path, asked)
            except RaycloudError as error:
                raise Refused("group", str(error)) from None
        meeting.check(asked)
        return meeting

    def granted(self, session: TuneSession) -> Granted:
        """Lease and credit."""
        return Granted(lease_s=self._limits.lease_s, credit=self._limits.credit)

    def begin(self, session: TuneSession, frame: Frame) -> Awaitable[Frame]:
        """Hand a request to the thread that computes."""
        if frame.kind in (Kind.FWD, Kind.FIT, Kind.LEARN, Kind.JUDGE):
            lengths = split_off(frame, Rows)[0].lengths
            longest, tokens = int(self._part.config.max_position_embeddings), _padded(lengths)
            if max(lengths) > longest or tokens > self._limits.tokens:
                padded = f"{len(lengths)} texts of up to {max(lengths)} tokens"
                raise Refused("tokens", f"{padded}; allowed: {self._limits.tokens} tokens in all, {longest} of a text")
            if session.side is not None and session.side.memory.nbytes > self._limits.memory_bytes:
                raise Refused("memory", f"what texts were takes more than {self._limits.memory_bytes} bytes")
        if frame.kind in (Kind.GIVE, Kind.ROUND, Kind.TAKE):
            if session.meeting is None:
                raise Refused("group", f"{frame.kind.name} is for edges that train in a group")
            if frame.kind is Kind.ROUND:
                return self._round(session, session.meeting, split_off(frame, Meet)[0])
        # Sessions that were closed leave what they had asked behind: a client could pile it up.
        if self._queued >= self._limits.sessions * self._limits.credit:
            raise TooBusy(_RETRY_S)
        self._count(session, frame)
        self._queued += 1
        asked = asyncio.wrap_future(self._engine.submit(self._answer, session, frame))
        asked.add_done_callback(self._answered)
        return asked

    def _count(self, session: TuneSession, frame: Frame) -> None:
        """Hold a session to what of it may be outstanding, whether or not it is computed yet."""
        if frame.kind is Kind.FWD and (asked := split_off(frame, Forward)[0]).returns:
            micros, tokens = len(session.away) + 1, _padded(asked.lengths) + sum(session.away.values())
            if micros > self._limits.micros or tokens > self._limits.outstanding:
                raise Refused(
                    "micros",
                    f"{micros} micro-batches and {tokens} tokens would be on their way; allowed: "
                    f"{self._limits.micros} and {self._limits.outstanding}, so a smaller depth is needed",
                )
            session.away[asked.micro] = _padded(asked.lengths)
        if frame.kind is Kind.BWD:
            session.away.pop(split_off(frame, Backward)[0].micro, None)
        if frame.kind is Kind.TAKE:
            session.away.clear()

    def _answered(self, _: asyncio.Future[Frame]) -> None:
        self._queued -= 1

    def freed(self, session: TuneSession) -> None:
        """Its weights and optimiser go with it; checkpoints stay."""
        session.side, session.ended = None, True
        if session.meeting is not None:
            self._engine.submit(session.meeting.group.leave, session.name, session.id)
            if not any(other.meeting is session.meeting for other in self.held()):
                self._meetings = {at: one for at, one in self._meetings.items() if one is not session.meeting}

    async def _round(self, session: TuneSession, meeting: Meeting, asked: Meet) -> Frame:
        """Its answer once the round has ended, or before the edge loses patience."""
        until = time.monotonic() + _WAIT_S
        while True:
            ended, answer = await asyncio.wrap_future(self._engine.submit(self._meet, session, meeting, asked))
            if ended or time.monotonic() >= until:
                return answer
            await asyncio.sleep(_LOOK_S)

    # -- on the thread that computes

    def _answer(self, session: TuneSession, frame: Frame) -> Frame:
        with _refusing():
            side = self._beside(session)
            if frame.kind is Kind.SAVE:
                asked, _ = split_off(frame, Saved)
                # A cloud that does not learn is told of no step.
                if session.asked.cloud and asked.step != side.step:
                    raise OutOfStep(f"step {asked.step} is to be saved in step {side.step}")
                session.kept.save(asked.step, side.state())
                mine = [other.asked for other in self.held() if other.principal == session.principal]
                spare = {asked.run for asked in mine}
                groups = {asked.together.group for asked in mine if asked.together is not None}
                forget(self._of(session.principal), self._limits.runs, spare, groups)
                return with_bytes(Kind.SAVE_OK, asked)
            if frame.kind is Kind.GIVE:
                return self._give(session, *split_off(frame, Given))
            if frame.kind is Kind.TAKE:
                return self._take(session, side, split_off(frame, Take)[0])
            answer = side.answer(frame)
            if frame.kind is Kind.OPT and session.meeting is not None:
                told, _ = split_off(answer, Optimised)
                answer = with_bytes(Kind.OPT_OK, told.model_copy(update={"ended": session.meeting.ended}))
            return answer

    def _beside(self, session: TuneSession) -> CloudSide:
        """The session's side; its edge is there once it has one."""
        if session.ended:
            raise Refused("unknown-session", "the session ended")
        if session.side is None:
            session.side = self._side(session)
            if session.meeting is not None:
                session.meeting.group.arrive(session.name, session.id)
        return session.side

    def _meet(self, session: TuneSession, meeting: Meeting, asked: Meet) -> tuple[bool, Frame]:
        with _refusing():
            side = self._beside(session)
            ended, told = meeting.meet(session.name, session.id, session.asked.run, asked, session.given, side)
        return ended, with_bytes(Kind.ROUND_OK, told)

    def _give(self, session: TuneSession, asked: Given, raw: bytes) -> Frame:
        if asked.at == 0:
            session.given.clear()
        if asked.at != len(session.given):
            raise OutOfStep(f"bytes from {asked.at} on came where {len(session.given)} should have")
        if asked.at + len(raw) > self._limits.part_bytes:
            raise ValueError(f"the edge's weights take more than {self._limits.part_bytes} bytes")
        session.given += raw
        return with_bytes(Kind.GIVE_OK, asked)

    def _take(self, session: TuneSession, side: CloudSide, asked: Take) -> Frame:
        """The bytes are of one round, whatever ends meanwhile."""
        assert session.meeting is not None
        if asked.at == 0:
            session.taken = session.meeting.take(session.name, session.id, side)
            session.given.clear()
        ended, packed = session.taken
        return with_bytes(Kind.TAKE_OK, Taken(ended=ended, size=len(packed)), packed[asked.at : asked.at + PIECE_BYTES])

    def _side(self, session: TuneSession) -> CloudSide:
        """A side of the session's own, as it begins or as it was saved."""
        asked, width = session.asked, int(self._part.config.hidden_size)
        middle = copy.deepcopy(self._part.middle)
        if asked.lora is not None:
            adapt(middle, asked.lora, asked.seed)
        if not asked.cloud:
            middle.requires_grad_(False)
        up, down = (
            blank(width, cut.width, cut.apart) if cut.narrow else plain(width) for cut in (asked.up, asked.down)
        )
        up.decoder.requires_grad_(asked.up.trained and asked.cloud)
        down.encoder.requires_grad_(asked.down.trained and asked.cloud)
        packings = Packings(asked.up.packing, asked.down.packing)
        if asked.task is None:
            side = CloudSide(middle, up.decoder, down.encoder, packings, asked.back, None, asked.seed)
        else:
            last, pooler = copy.deepcopy((self._part.last, self._part.pooler))
            assert last is not None
            if asked.lora is not None:
                adapt(last, asked.lora, asked.seed)
            task = asked.task.task(width, asked.seed, pooler)
            task.head.to(next(middle.parameters()).device)
            side = LabelledCloud(middle, up.decoder, last, asked.task, task, packings, asked.back, None, asked.seed)
        if any(parameter.requires_grad for module in side.modules.values() for parameter in module.parameters()):
            rates = {
                name: cut.lr for name, cut in (("decoder", asked.up), ("encoder", asked.down)) if cut.lr is not None
            }
            side.trainer = Trainer(
                side.modules, asked.training, total_steps=asked.total_steps, seed=asked.seed, lr=rates
            )
        if asked.restore is not None:
            side.load(asked.restore, session.kept.load(asked.restore))
        return side


def group_file(folder: Path, group: str) -> Path:
    """Where a group is kept among the checkpoints of those who share a token."""
    return folder / GROUPS / f"{group}.safetensors"


@contextmanager
def _refusing() -> Iterator[None]:
    """What an edge may do wrong, in words that it is told."""
    try:
        yield
    except Refused:
        raise
    except OutOfStep as error:
        raise Refused("step", str(error)) from None
    except (ValueError, FrameError, RaycloudError) as error:
        raise Refused("numbers", str(error)) from None


def _padded(lengths: Sequence[int]) -> int:
    """The tokens of texts with what they are padded to the longest by."""
    return max(lengths) * len(lengths)
