"""Server of split fine-tuning in the cloud: a session for each edge, with its own weights and optimiser.

Edges that train together contribute their weights to rounds, and continue from the aggregated ones.
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
from enum import IntEnum
from pathlib import Path

import torch
from pydantic import Field

from raycloud.errors import RaycloudError, TrainingError
from raycloud.link.frames import Frame, FrameError, parse_body
from raycloud.link.server import RequestRefused, ServerBusy, Session, SessionLimits, SessionMetrics, SessionServer
from raycloud.models.configuration import context_length
from raycloud.rounds.versions import VersionStore
from raycloud.split.finetune.bottleneck import max_decoder_bytes
from raycloud.split.finetune.checkpoints import GROUPS, CheckpointStore, remove_old_runs
from raycloud.split.finetune.cloud import CloudTrainer, OutOfOrder
from raycloud.split.finetune.cloud_assembly import build_cloud
from raycloud.split.finetune.group import Group
from raycloud.split.finetune.group_rounds import GroupRounds, latest_group
from raycloud.split.finetune.messages import (
    BackwardRequest,
    ForwardRequest,
    GroupWeightsReply,
    HiddenStates,
    OpenTuning,
    OptimiseReply,
    PushRequest,
    RoundReply,
    RoundRequest,
    SaveRequest,
    TuneGrant,
    TuneKind,
)
from raycloud.split.parts import CloudPart

_WAIT_S = 4.0
"""Seconds until a ROUND is answered while its round continues: shorter than an edge's timeout for an answer."""
_LOOK_S = 0.05
_RETRY_S = 1.0


class TuneLimits(SessionLimits):
    """Limits of edges that train."""

    sessions: int = Field(default=8, ge=1)
    sessions_per_principal: int = Field(default=8, ge=1)
    credit: int = Field(default=8, ge=1, le=64)
    """Largest number of requests in flight: hidden states and gradients together."""
    heartbeat_s: float = Field(default=5.0, gt=0, le=15)
    """Seconds between heartbeats to an edge whose request waits for those of others. An edge's timeout is a minute, and
    it reconnects after a third of that."""
    tokens: int = Field(default=16_384, ge=1)
    """Largest number of tokens of a micro-batch, padding included."""
    micro_batches: int = Field(default=32, ge=1)
    """Largest number of a session's micro-batches whose gradients are outstanding."""
    outstanding: int = Field(default=65_536, ge=1)
    """Largest number of tokens of these micro-batches together, padding included."""
    runs: int = Field(default=64, ge=1)
    """Number of runs, and of groups, kept for one principal; those saved longest ago are removed first."""
    activation_cache_bytes: int = Field(default=2**30, ge=0)
    """Largest size in bytes of a session's activation cache."""
    part_bytes: int = Field(default=2**29, ge=0)
    """Largest size in bytes of the weights that an edge contributes to a round."""


@dataclass(kw_only=True)
class TuneSession(Session):
    """Session of one edge's run."""

    opening: OpenTuning
    """Configuration of the run."""
    kept: CheckpointStore
    trainer: CloudTrainer | None = None
    """Cloud trainer, created by the first request on the engine thread."""
    ended: bool = False
    in_flight: dict[int, int] = field(default_factory=dict)
    """Tokens, padding included, of each micro-batch whose gradient has not been accepted, by its number."""
    group_server: GroupRounds | None = None
    """Round server of the group that it trains with."""

    @property
    def name(self) -> str:
        """Name of the edge within its group; empty without a group."""
        return "" if self.opening.group is None else self.opening.group.name


class TuneServer(SessionServer[TuneSession]):
    """Server that trains with many edges, each alone or in a group, one request at a time on one thread.

    The members of a group share a token and must connect to the same host. They affect each other only in rounds.

    Args:
        part: blocks that every session begins with; never changed.
        folder: folder of the checkpoints.
        limits: limits of sessions.
        metrics: sink for the counts of sessions and errors.
        threads: number of torch threads; None leaves it unchanged.
        history: history of the group, where all members that come are of one; None to keep none.
    """

    service = "split-tune"
    kinds = TuneKind
    requests = frozenset(kind for kind in TuneKind if not kind.name.endswith("_OK"))
    _limits: TuneLimits

    def __init__(
        self,
        part: CloudPart,
        folder: Path,
        limits: TuneLimits | None = None,
        metrics: SessionMetrics | None = None,
        threads: int | None = None,
        history: VersionStore | None = None,
    ) -> None:
        super().__init__(limits or TuneLimits(), metrics)
        self.heartbeat_s = self._limits.heartbeat_s
        self._part, self._folder, self._history = part, folder, history
        self._group_servers: dict[Path, GroupRounds] = {}
        self._queued = 0
        """Number of requests queued or running on the engine thread."""
        start = (lambda: None) if threads is None else (lambda: torch.set_num_threads(threads))
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine", initializer=start)

    def saved_group(self, group: str, principal: str) -> Group:
        """Group after its latest round.

        Raises:
            TrainingError: no round has ended, or the latest is damaged: a run's result is never an older round.
        """
        return latest_group(group_folder(self._of(principal), group))

    def close(self) -> None:
        """Stop after the queued requests."""
        self._engine.shutdown()

    def opening(self, frame: Frame, principal: str) -> Callable[[], TuneSession]:
        """Check the edge's model, cuts and checkpoint against those of this server."""
        opening, held = parse_body(frame, OpenTuning), self._part.plans.cloud
        if opening.fingerprint != self._part.fingerprint:
            here = self._part.fingerprint[:12]
            raise RequestRefused("fingerprint", f"the edge's model {opening.fingerprint[:12]} is not {here}")
        if (opening.start_block, opening.end_block) != (held.start, held.stop):
            blocks = f"[{opening.start_block}, {opening.end_block})"
            raise RequestRefused("plan", f"blocks {blocks} are asked for, [{held.start}, {held.stop}) are here")
        width = int(self._part.config.hidden_size)
        for cut in (opening.uplink, opening.downlink):
            if cut.num_outliers > cut.width or cut.width > 2 * width or (not cut.low_rank and cut.width != width):
                raise RequestRefused(
                    "width", f"{cut.width} numbers of a token, {cut.num_outliers} outliers; hidden states have {width}"
                )
        if opening.lora is not None and opening.lora.r > width:
            allowed = f"up to {width}, as many as hidden states have numbers"
            raise RequestRefused("lora", f"lora.r={opening.lora.r}; allowed: {allowed}")
        if opening.head is not None and self._part.last is None:
            raise RequestRefused(
                "labels", "labels=cloud; allowed here: labels=edge, as this cloud was not started for labels"
            )
        # Another principal's run must not be found, even with a guessed id.
        mine = self._of(principal)
        kept = CheckpointStore(mine / opening.run, None if opening.group is None else opening.group.steps)
        if opening.restore is not None:
            if opening.restore not in kept.steps():
                raise RequestRefused(
                    "checkpoint", f"no checkpoint of step {opening.restore} of run {opening.run[:8]} is here"
                )
            try:
                kept.check(opening.restore)
            except TrainingError:
                damaged = f"the checkpoint of step {opening.restore} of run {opening.run[:8]} is damaged"
                raise RequestRefused("checkpoint", damaged) from None
        at = None if opening.group is None else group_folder(mine, opening.group.group)
        group_server = None if at is None else self._group_server(at, opening)

        def make() -> TuneSession:
            if at is not None and group_server is not None:
                self._group_servers[at] = group_server  # only once a session is granted, with which it is released
            return TuneSession(
                id=frame.session,
                principal=principal,
                limits=self._limits,
                epoch=frame.epoch,
                opening=opening,
                kept=kept,
                group_server=group_server,
            )

        return make

    def _of(self, principal: str) -> Path:
        """Folder of one principal's checkpoints."""
        return self._folder / hashlib.sha256(principal.encode()).hexdigest()[:16]

    def _group_server(self, path: Path, opening: OpenTuning) -> GroupRounds:
        group_server = self._group_servers.get(path)
        if group_server is None or group_server.overtaken():
            try:
                group_server = GroupRounds(path, opening, self._history)
            except RaycloudError as error:
                raise RequestRefused("group", str(error)) from None
        group_server.check(opening)
        return group_server

    def granted(self, session: TuneSession) -> TuneGrant:
        """Grant of lease, credit and sizes."""
        return TuneGrant(
            lease_s=self._limits.lease_s,
            credit=self._limits.credit,
            tokens=self._limits.tokens,
            message_bytes=self._limits.message_bytes,
        )

    def most_bytes(self, kind: IntEnum) -> int:
        """Largest number of raw bytes of a request: an edge's own weights and a decoder have limits of their own."""
        if kind is TuneKind.PUSH:
            return self._limits.part_bytes
        if kind is TuneKind.CODE:
            return max_decoder_bytes(int(self._part.config.hidden_size))
        return super().most_bytes(kind)

    def begin(self, session: TuneSession, frame: Frame) -> Awaitable[Frame]:
        """Check a request and queue it on the engine thread."""
        if frame.kind in (TuneKind.FWD, TuneKind.FIT, TuneKind.TRAIN, TuneKind.PREDICT):
            lengths = parse_body(frame, HiddenStates).lengths
            longest, tokens = context_length(self._part.config), _padded(lengths)
            if max(lengths) > longest or tokens > self._limits.tokens:
                padded = f"{len(lengths)} texts of up to {max(lengths)} tokens"
                raise RequestRefused(
                    "tokens", f"{padded}; allowed: {self._limits.tokens} tokens in all, {longest} of a text"
                )
            if (
                session.trainer is not None
                and session.trainer.activation_cache.nbytes > self._limits.activation_cache_bytes
            ):
                raise RequestRefused(
                    "memory",
                    f"the activation cache takes more than {self._limits.activation_cache_bytes} bytes "
                    "(limits.activation_cache_bytes)",
                )
        if frame.kind in (TuneKind.PUSH, TuneKind.ROUND, TuneKind.PULL):
            if session.group_server is None:
                raise RequestRefused("group", f"{frame.kind.name} is for edges that train in a group")
            if frame.kind is TuneKind.ROUND:
                return self._round(session, session.group_server, parse_body(frame, RoundRequest).round)
        if frame.kind is TuneKind.PUSH and session.pending:
            # Requests in flight are in memory, and an edge's weights are larger than all others together.
            raise RequestRefused("credit", f"{len(session.pending)} requests are in flight; a PUSH waits for them")
        # Closed sessions leave their queued requests behind: a client could accumulate them.
        if self._queued >= self._limits.sessions * self._limits.credit:
            raise ServerBusy(_RETRY_S)
        self._count(session, frame)
        self._queued += 1
        reply = asyncio.wrap_future(self._engine.submit(self._answer, session, frame))
        reply.add_done_callback(self._answered)
        return reply

    def _count(self, session: TuneSession, frame: Frame) -> None:
        """Enforce the limits of outstanding micro-batches, whether or not they are computed yet."""
        if frame.kind is TuneKind.FWD and (request := parse_body(frame, ForwardRequest)).backward:
            micros, tokens = len(session.in_flight) + 1, _padded(request.lengths) + sum(session.in_flight.values())
            if micros > self._limits.micro_batches or tokens > self._limits.outstanding:
                raise RequestRefused(
                    "micros",
                    f"{micros} micro-batches and {tokens} tokens would be on their way; allowed: "
                    f"{self._limits.micro_batches} and {self._limits.outstanding}, so a smaller max_in_flight",
                )
            session.in_flight[request.micro_batch] = _padded(request.lengths)
        if frame.kind is TuneKind.BWD:
            session.in_flight.pop(parse_body(frame, BackwardRequest).micro_batch, None)
        if frame.kind is TuneKind.PULL:
            session.in_flight.clear()

    def _answered(self, _: asyncio.Future[Frame]) -> None:
        self._queued -= 1

    def freed(self, session: TuneSession) -> None:
        """Release the session's weights and optimiser; checkpoints stay."""
        session.trainer, session.ended = None, True
        if session.group_server is not None:
            self._engine.submit(session.group_server.group.unregister, session.name, session.id)
            if not any(other.group_server is session.group_server for other in self.held()):
                self._group_servers = {
                    at: one for at, one in self._group_servers.items() if one is not session.group_server
                }

    async def _round(self, session: TuneSession, group_server: GroupRounds, awaited: int | None) -> Frame:
        """Reply to ROUND once the awaited round has ended, or before the edge's timeout."""
        until = time.monotonic() + _WAIT_S
        while True:
            state = await asyncio.wrap_future(self._engine.submit(self._state, session, group_server))
            if awaited is None or state.ended >= awaited or time.monotonic() >= until:
                return Frame.of(TuneKind.ROUND_OK, state)
            await asyncio.sleep(_LOOK_S)

    # -- on the engine thread

    def _answer(self, session: TuneSession, frame: Frame) -> Frame:
        with _refuse_errors():
            trainer, rounds = self._trainer_of(session), session.group_server
            if frame.kind is TuneKind.SAVE:
                return self._save(session, trainer, parse_body(frame, SaveRequest))
            if frame.kind is TuneKind.PUSH and rounds is not None:
                request, run = parse_body(frame, PushRequest), session.opening.run
                reply = rounds.contribute(session.name, session.id, run, request, frame.raw, trainer)
                return Frame.of(TuneKind.PUSH_OK, reply)
            if frame.kind is TuneKind.PULL and rounds is not None:
                ended, weights = rounds.pull(session.name, session.id, trainer)
                return Frame.of(TuneKind.PULL_OK, GroupWeightsReply(ended=ended), weights)
            answer = trainer.answer(frame)
            if frame.kind is TuneKind.OPT and rounds is not None:
                optimised = parse_body(answer, OptimiseReply).model_copy(update={"ended": rounds.ended})
                answer = Frame.of(TuneKind.OPT_OK, optimised)
            return answer

    def _save(self, session: TuneSession, trainer: CloudTrainer, request: SaveRequest) -> Frame:
        # A cloud that is not trained receives no OPT.
        if session.opening.train_cloud and request.step != trainer.step:
            raise OutOfOrder(f"step {request.step} is to be saved in step {trainer.step}")
        session.kept.save(request.step, trainer.state())
        mine = [other.opening for other in self.held() if other.principal == session.principal]
        spare = {opening.run for opening in mine}
        groups = {opening.group.group for opening in mine if opening.group is not None}
        remove_old_runs(self._of(session.principal), self._limits.runs, spare, groups)
        return Frame.of(TuneKind.SAVE_OK, request)

    def _trainer_of(self, session: TuneSession) -> CloudTrainer:
        """Cloud trainer of the session, created on first use; the edge then joins its group."""
        if session.ended:
            raise RequestRefused("unknown-session", "the session ended")
        if session.trainer is None:
            session.trainer = self._new_trainer(session)
            if session.group_server is not None:
                session.group_server.group.register(session.name, session.id)
        return session.trainer

    def _state(self, session: TuneSession, group_server: GroupRounds) -> RoundReply:
        with _refuse_errors():
            self._trainer_of(session)
            return group_server.state(session.name, session.id)

    def _new_trainer(self, session: TuneSession) -> CloudTrainer:
        """Create the session's own cloud trainer, untrained or restored from a checkpoint."""
        opening, part = session.opening, self._part
        ends = (None, None) if opening.head is None else (part.last, part.pooler)
        middle, (last, pooler) = copy.deepcopy((part.middle, ends))
        trainer = build_cloud(opening, middle, last, pooler)
        if opening.restore is not None:
            trainer.load(opening.restore, session.kept.load(opening.restore))
        return trainer


def group_folder(folder: Path, group: str) -> Path:
    """Folder of a group's rounds within the checkpoints of one principal."""
    return folder / GROUPS / group


@contextmanager
def _refuse_errors() -> Iterator[None]:
    """Convert errors caused by an edge into RequestRefused, whose message the edge receives."""
    try:
        yield
    except RequestRefused:
        raise
    except OutOfOrder as error:
        raise RequestRefused("step", str(error)) from None
    except (ValueError, FrameError, RaycloudError) as error:
        raise RequestRefused("numbers", str(error)) from None


def _padded(lengths: Sequence[int]) -> int:
    """Number of tokens of texts padded to the longest one."""
    return max(lengths) * len(lengths)
