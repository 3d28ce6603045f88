"""Server of the rounds for devices: it gives tasks and weights, and accepts each contribution once.

What runs the rounds calls :meth:`RoundServer.prepare`, :meth:`RoundServer.train` and :meth:`RoundServer.advance` for a
device as it would for a student of its own, on the server's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raycloud.errors import LinkError, TrainingError
from raycloud.link.frames import Frame, parse_body
from raycloud.link.server import RequestRefused, Session, SessionServer, completed
from raycloud.models.weights import Weights
from raycloud.rounds.contribution import Contribution, form_of
from raycloud.rounds.machine import Refusal, RoundMachine
from raycloud.rounds.service.limits import HEADER_BYTES, REPORT_BYTES, RoundLimits
from raycloud.rounds.service.messages import (
    SERVICE,
    Blob,
    ContributionReply,
    ContributionRequest,
    HeartbeatReply,
    HeartbeatRequest,
    OpenRounds,
    PullReply,
    PullRequest,
    RoundGrant,
    RoundKind,
    TaskReply,
    TaskRequest,
)

_NEVER = float("inf")


class DeviceGone(LinkError):
    """Error of a device that left, or of which nothing was heard for the time of its lease."""


@dataclass(frozen=True)
class DeviceMember:
    """Edge of a job that is a device: what the server tells and allows it.

    Args:
        recipe: recipe of the job, as JSON.
        config: configuration of the model, as JSON.
        weights_bytes: bytes of the weights that each round sends and gets back.
        facts: further facts by name.
        blobs: files by name.
        most_samples: largest number of samples or tokens that the device can train on in a round: a mean by samples
            would follow a device that tells more.
        parse_report: turns the report of a contribution into what :attr:`DeviceUpdate.report` holds; it raises
            ValueError for bytes that are no report.
    """

    recipe: str
    config: str
    weights_bytes: int
    facts: Mapping[str, str] = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    most_samples: int = 2**53
    parse_report: Callable[[bytes], Any] = lambda report: report


@dataclass(frozen=True)
class DeviceUpdate:
    """Contribution of a device that was accepted."""

    weights: dict[str, Tensor]
    samples: int
    report: Any


@dataclass
class _Task:
    """Round that a device is asked to train for."""

    attempt: int
    round: int
    weights: Blob
    machine: RoundMachine
    update: asyncio.Future[DeviceUpdate | None]


class _Device:
    """State of one device."""

    def __init__(self, name: str, member: DeviceMember) -> None:
        self.name, self.member = name, member
        self.blobs = {Blob.of(content).digest: content for content in member.blobs.values()}
        self.weights = b""
        """Weights of the current task, or the final ones."""
        self.session, self.principal, self.process = b"", "", ""
        self.former: set[str] = set()
        """Ids of processes whose place another one took."""
        self.samples = 0
        """Number of samples; 0 while the device is not ready."""
        self.task: _Task | None = None
        self.accepted: Blob | None = None
        """Contribution that was accepted last."""
        self.final: Blob | None = None
        self.heartbeat: HeartbeatRequest | None = None
        self.changed = asyncio.Event()

    def notify(self) -> None:
        """Wake up all who wait for a change."""
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(kw_only=True)
class DeviceSession(Session):
    """Session of a device."""

    device: str


class RoundServer(SessionServer[DeviceSession]):
    """Server of the rounds of one job. Everything but reading and writing tensors runs on one event loop.

    Args:
        members: edges that are devices, by name.
        limits: limits of sessions.
    """

    service, kinds = SERVICE, RoundKind
    requests = frozenset({RoundKind.TASK, RoundKind.PULL, RoundKind.PUSH, RoundKind.HEARTBEAT})
    _limits: RoundLimits

    def __init__(self, members: Mapping[str, DeviceMember], limits: RoundLimits | None = None) -> None:
        super().__init__(limits or RoundLimits())
        self._devices = {name: _Device(name, member) for name, member in members.items()}
        largest = max((member.weights_bytes for member in members.values()), default=0)
        self._push_bytes = REPORT_BYTES + HEADER_BYTES + largest

    # -- for what runs the rounds

    async def prepare(self, name: str) -> int:
        """Wait until a device is there and ready; return the number of its samples."""
        device = self._devices[name]
        while not device.samples:
            await device.changed.wait()
        return device.samples

    def process(self, name: str) -> str:
        """Return the id of the process that a device is."""
        return self._devices[name].process

    def present(self, name: str) -> bool:
        """Return whether a device has a session."""
        return bool(self._devices[name].session)

    async def train(
        self, name: str, attempt: int, number: int, weights: Weights, *, any_form: bool = False
    ) -> DeviceUpdate | None:
        """Let a device train for a round; None if a newer attempt begins.

        Args:
            name: name of the device.
            attempt: id that grows with every attempt at a round.
            number: number of the round.
            weights: weights that the round begins with.
            any_form: True if the contribution may have other tensors than these, which the caller checks.

        Raises:
            DeviceGone: the device is not there, or goes.
            TrainingError: the device says that its training failed.
        """
        device = self._devices[name]
        self._end_task(device, attempt)
        if not device.samples:
            raise DeviceGone(f"the device '{name}' is not there")
        blob = await self._keep(device, weights)
        machine = RoundMachine({}, number - 1)
        machine.open(number, [name], deadline=_NEVER, form=None if any_form else form_of(weights))
        task = _Task(attempt, number, blob, machine, asyncio.get_running_loop().create_future())
        device.task = task
        device.notify()
        return await task.update

    async def advance(self, name: str, attempt: int) -> None:
        """Set the newest attempt: a contribution to an older one is not awaited any longer, and refused."""
        self._end_task(self._devices[name], attempt)

    def heartbeat(self, name: str) -> HeartbeatRequest | None:
        """Return the latest heartbeat of a device; None before the first one of a task."""
        return self._devices[name].heartbeat

    async def finish(self, weights: Mapping[str, Weights], timeout_s: float) -> None:
        """Tell all devices that there are no further rounds, and wait until they have left.

        Args:
            weights: final weights by device.
            timeout_s: longest time to wait.
        """
        for name, device in self._devices.items():
            self._end_task(device, None)
            device.final = await self._keep(device, weights[name])
            device.notify()
        try:
            async with asyncio.timeout(timeout_s):
                for device in self._devices.values():
                    while device.session:
                        await device.changed.wait()
        except TimeoutError:
            return

    async def _keep(self, device: _Device, weights: Weights) -> Blob:
        """Keep weights for a device to pull, in place of its former ones."""

        def write() -> tuple[Blob, bytes]:
            content = save({name: tensor.contiguous() for name, tensor in weights.items()})
            return Blob.of(content), content

        blob, content = await asyncio.to_thread(write)
        # Devices of one cohort share the bytes.
        same = (other.weights for other in self._devices.values() if other.weights == content)
        device.weights = next(same, content)
        return blob

    def _end_task(self, device: _Device, attempt: int | None, error: Exception | None = None) -> None:
        """End a device's task if it is of an older attempt; None for any."""
        task = device.task
        if task is None or (attempt is not None and task.attempt >= attempt):
            return
        if not task.update.done():
            if error is None:
                task.update.set_result(None)
            else:
                task.update.set_exception(error)
        task.machine.remove(device.name)
        task.machine.close(0.0, lambda contributions: {})
        device.heartbeat = None
        device.notify()

    # -- sessions

    def opening(self, frame: Frame, principal: str) -> Callable[[], DeviceSession]:
        """Check that the device is one of the job's, with the token that it came with first."""
        asked = parse_body(frame, OpenRounds)
        device = self._devices.get(asked.device or "")
        if asked.device is None and len(self._devices) == 1:
            (device,) = self._devices.values()
        if device is None and asked.device is None:
            raise RequestRefused("device", f"say which device of this job you are: {', '.join(self._devices)}")
        if device is None:
            allowed = ", ".join(self._devices) or "none"
            raise RequestRefused("device", f"no device '{asked.device}' takes part in this job; allowed: {allowed}")
        if device.principal and device.principal != principal:
            raise RequestRefused("device", f"the device '{device.name}' takes part with another token")
        if asked.process in device.former:
            raise RequestRefused("replaced", f"another process takes part as '{device.name}'")
        return partial(self._opened, device, asked, frame, principal)

    def _opened(self, device: _Device, asked: OpenRounds, frame: Frame, principal: str) -> DeviceSession:
        before = device.session
        if device.process and device.process != asked.process:
            device.former.add(device.process)
            device.samples = 0
        device.session, device.principal, device.process = frame.session, principal, asked.process
        for session in self.held():
            if session.id == before:
                self._free(session)
        return DeviceSession(
            id=frame.session, principal=principal, epoch=frame.epoch, limits=self._limits, device=device.name
        )

    def granted(self, session: DeviceSession) -> RoundGrant:
        """Grant with all that the device must know before it decides to take part."""
        member = self._devices[session.device].member
        return RoundGrant(
            lease_s=self._limits.lease_s,
            credit=self._limits.credit,
            device=session.device,
            recipe=member.recipe,
            config=member.config,
            facts=dict(member.facts),
            blobs={name: Blob.of(content) for name, content in member.blobs.items()},
            weights_bytes=member.weights_bytes,
        )

    def most_bytes(self, kind: IntEnum) -> int:
        """Largest number of raw bytes of a request: only contributions have some."""
        return self._push_bytes if kind is RoundKind.PUSH else 0

    def freed(self, session: DeviceSession) -> None:
        """Count a device as gone, unless another session took the place of this one."""
        device = self._devices[session.device]
        if device.session != session.id:
            return
        device.session, device.samples = b"", 0
        gone = DeviceGone(f"nothing was heard of the device '{session.device}' for {self._limits.lease_s:g} s")
        self._end_task(device, None, gone)
        device.notify()

    # -- requests

    def begin(self, session: DeviceSession, frame: Frame) -> Awaitable[Frame]:
        """Check a request and begin its reply."""
        device = self._devices[session.device]
        if frame.kind is RoundKind.TASK:
            return self._task(device, parse_body(frame, TaskRequest))
        if frame.kind is RoundKind.PULL:
            return completed(self._pull(device, parse_body(frame, PullRequest).digest))
        if frame.kind is RoundKind.HEARTBEAT:
            return completed(self._heartbeat(device, parse_body(frame, HeartbeatRequest)))
        return self._push(device, parse_body(frame, ContributionRequest), frame.raw)

    async def _task(self, device: _Device, asked: TaskRequest) -> Frame:
        if device.samples != asked.samples:
            device.samples = asked.samples
            device.notify()
        try:
            async with asyncio.timeout(self._limits.poll_s):
                while (reply := _current(device)) is None:
                    await device.changed.wait()
        except TimeoutError:
            reply = TaskReply(state="wait")
        return Frame.of(RoundKind.TASK_OK, reply)

    def _pull(self, device: _Device, digest: str) -> Frame:
        blobs = [device.final, device.task.weights if device.task is not None else None]
        if any(blob is not None and blob.digest == digest for blob in blobs):
            return Frame.of(RoundKind.PULL_OK, PullReply(found=True), device.weights)
        if digest in device.blobs:
            return Frame.of(RoundKind.PULL_OK, PullReply(found=True), device.blobs[digest])
        return Frame.of(RoundKind.PULL_OK, PullReply(found=False))

    def _heartbeat(self, device: _Device, sent: HeartbeatRequest) -> Frame:
        task = device.task
        current = task is not None and not task.update.done() and _fits(task, sent.round, sent.weights)
        if current:
            device.heartbeat = sent
        return Frame.of(RoundKind.HEARTBEAT_OK, HeartbeatReply(current=current))

    async def _push(self, device: _Device, sent: ContributionRequest, raw: bytes) -> Frame:
        blob = await asyncio.to_thread(Blob.of, raw)
        if device.accepted != blob:
            if (refusal := _early_refusal(device, sent)) is not None:
                return _refused(refusal.reason, refusal.detail)
            if sent.error:
                self._end_task(device, None, TrainingError("".join(filter(str.isprintable, sent.error))))
                return _refused("failed", sent.error)
            try:
                update = await asyncio.to_thread(_parsed, device.member, sent, raw)
            except ValueError as error:
                return _refused("unreadable", str(error))
            if (refusal := _accept(device, sent, blob, update)) is not None:
                return _refused(refusal.reason, refusal.detail)
        return Frame.of(RoundKind.PUSH_OK, ContributionReply(accepted=True))


def _current(device: _Device) -> TaskReply | None:
    """Return the task of a device; None if it has to wait."""
    task = device.task
    if device.final is not None:
        return TaskReply(state="finished", weights=device.final)
    if task is None or task.update.done():
        return None
    return TaskReply(state="train", round=task.round, weights=task.weights)


def _fits(task: _Task, number: int, weights: str) -> bool:
    """Return whether a round and its weights are those of a task; attempts from the same weights are alike."""
    return task.round == number and task.weights.digest == weights


def _accept(device: _Device, sent: ContributionRequest, blob: Blob, update: DeviceUpdate) -> Refusal | None:
    """Accept a contribution, or return why it is refused."""
    if device.accepted == blob:
        return None
    # Another task may have begun while the tensors were read.
    task, refusal = device.task, _early_refusal(device, sent)
    if refusal is not None or task is None:
        return refusal
    refusal = task.machine.accept(device.name, sent.round, Contribution(update.weights, sent.samples))
    if refusal is None:
        device.accepted = blob
        task.update.set_result(update)
        device.notify()
    return refusal


def _early_refusal(device: _Device, sent: ContributionRequest) -> Refusal | None:
    """Return the reason to refuse a contribution before its tensors are read."""
    task, most = device.task, device.member.most_samples
    if task is None:
        return Refusal("wrong_round", f"the contribution is for round {sent.round}, no round is open")
    if sent.round == task.round and task.machine.number is not None and task.weights.digest != sent.weights:
        return Refusal("wrong_round", f"the contribution is not from the weights that round {sent.round} began with")
    if sent.samples > most:
        return Refusal("no_samples", f"the contribution has {sent.samples} samples; allowed: {most} or fewer")
    if sent.round != task.round or task.machine.number is None:
        return task.machine.accept(device.name, sent.round, Contribution({}, sent.samples))
    return None


def _parsed(member: DeviceMember, sent: ContributionRequest, raw: bytes) -> DeviceUpdate:
    """Read a contribution.

    Raises:
        ValueError: the bytes are no report, or no tensors.
    """
    if sent.report_bytes > len(raw):
        raise ValueError(f"a report of {sent.report_bytes} bytes in {len(raw)}")
    report = member.parse_report(raw[: sent.report_bytes])
    try:
        return DeviceUpdate(load(raw[sent.report_bytes :]), sent.samples, report)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"the tensors cannot be read: {str(error).splitlines()[0]}") from None


def _refused(reason: str, detail: str) -> Frame:
    return Frame.of(RoundKind.PUSH_OK, ContributionReply(accepted=False, reason=reason, detail=detail[:500]))
