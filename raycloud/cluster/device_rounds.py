"""Actor by which devices without Ray take part in the rounds of a job, and the handle of such a device.

The actor speaks the services of rounds and of signals over the link; Ray Serve relays the WebSockets of devices to it.
To the driver a device looks like the actor of a student.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from transformers import PretrainedConfig

from raycloud.cluster.actor_channel import CALLS_AT_ONCE, ActorService
from raycloud.cluster.cloud_teacher import TeacherInfo
from raycloud.cluster.edge_student import TeacherActors
from raycloud.cluster.run_log import RunLog
from raycloud.data.batches import Batch
from raycloud.distill.device_member import device_member
from raycloud.distill.learner import Heartbeat, StudentUpdate
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.signals import FrozenHead, Signal, SignalCodec, SignalRecipe
from raycloud.distill.signals.file import tokenizer_fingerprint
from raycloud.distill.signals.remote import SignalServer
from raycloud.errors import ClusterError, ClusterSetupError
from raycloud.link.meter import Meter
from raycloud.link.server import RequestRefused
from raycloud.models.weights import Weights
from raycloud.rounds.service import RoundServer

NAMESPACE = "raycloud"
"""Ray namespace of the actors that other jobs of the cluster may look up."""
FAREWELL_S = 15.0
"""Longest time to wait until the devices know that a job has ended."""
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def actor_name(job: str) -> str:
    """Return the name of the actor of a job."""
    return f"rounds-{job}"


def job_name(output: str) -> str:
    """Return the name by which devices ask for a job: the last part of its result directory."""
    return Path(output).name


class TeacherReplicas:
    """Implementation of :class:`~raycloud.distill.signals.remote.SignalTeacher` by the actors of a job's teacher.

    Args:
        actors: client of the actors.
        recipe: recipe of the job, whose signals are the only ones.
    """

    def __init__(self, actors: TeacherActors, recipe: DistillRecipe) -> None:
        info: TeacherInfo = actors.info
        if info.head_shape is None:
            raise ClusterError(f"teacher '{info.name}' has a head of several layers; devices need one linear map")
        self.name, self.tokenizer = info.name, tokenizer_fingerprint(info.tokenizer)
        self.head_shape, self.max_length = info.head_shape, info.positions
        self._actors, self._recipe = actors, recipe

    def signal(self, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> Signal:
        """Ask the replicas for the signal of a batch."""
        if recipe != self._recipe.signal or sorted(set(temperatures)) != sorted(set(self._recipe.temperatures)):
            raise RequestRefused("signal", "the signals asked for are not those of this job")
        return self._actors.signals(Meter()).signal(batch)

    def head(self, codec: SignalCodec) -> FrozenHead:
        """Ask for the head."""
        if codec != self._recipe.signal.codec:
            raise RequestRefused("signal", "the head asked for is not that of this job")
        return self._actors.head()

    def embedding(self) -> Tensor:
        """Ask for the input embedding."""
        return self._actors.embedding()


@dataclass(frozen=True)
class StudentForm:
    """Form of a student, which devices must know before they train it."""

    config: PretrainedConfig
    weights_bytes: int
    """Bytes of the trained weights."""


@dataclass(frozen=True)
class _Servers:
    rounds: RoundServer
    signals: SignalServer


class DeviceRounds(ActorService):
    """Actor of a job that serves its devices. It keeps nothing on disk: devices that find it restarted begin anew.

    Args:
        recipe: whole distillation recipe.
        students: students to train by cohort.
        replicas: names of the teacher's actors.
        run: id of the run; a resumed run keeps it, and so devices keep their state.
        log: log of the run; None for none.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        students: Mapping[str, StudentForm],
        replicas: Sequence[str],
        run: str,
        log: RunLog | None = None,
    ) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._students, self._names, self._run = recipe, students, replicas, run
        # No method of this class may be a coroutine: Ray would run all of them on one event loop, one at a time.
        super().__init__(
            lambda connection, principal, service: getattr(self._servers, service).serve(connection, principal)
        )

    def ready(self) -> None:
        """Prepare what devices may ask for. A restarted actor does so with the first call."""
        _ = self._servers

    def prepare(self, name: str) -> int:
        """Wait until a device is there and ready; return the number of its samples."""
        return self._do(self._servers.rounds.prepare(name))

    def train(self, name: str, round_id: int, current: int, weights: Weights) -> StudentUpdate | None:
        """Let a device train for one round; None if a newer round id arrives.

        Raises:
            DeviceGone: the device is not there, or goes.
            TrainingError: the device says that its weights are not finite.
        """
        update = self._do(self._servers.rounds.train(name, round_id, current, weights))
        return None if update is None else update.report.update(name, current, update.weights, update.samples)

    def heartbeat(self, name: str) -> Heartbeat | None:
        """Return a device's latest heartbeat; None before the first step of a round."""
        sent = self._servers.rounds.heartbeat(name)
        if sent is None or not sent.step:
            return None
        return Heartbeat(sent.round, sent.step, sent.loss, sent.tokens_per_second, sent.process)

    def advance(self, name: str, round_id: int) -> None:
        """Set the newest round id. A device that trains for an older one is told to stop."""
        self._do(self._servers.rounds.advance(name, round_id))

    def finish(self, weights: Mapping[str, Weights]) -> None:
        """Tell the devices that there are no further rounds, with the final weights by cohort."""
        final = {edge.name: weights[self._recipe.cohort_of(edge).name] for edge in self._recipe.devices}
        self._do(self._servers.rounds.finish(final, FAREWELL_S))

    def _do(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._service.loop).result()

    @cached_property
    def _servers(self) -> _Servers:
        recipe = self._recipe
        members, teacher = {}, None
        for edge in recipe.devices:
            cohort = recipe.cohort_of(edge).name
            actors, student = TeacherActors(self._names, recipe, cohort), self._students[cohort]
            teacher = TeacherReplicas(actors, recipe)
            members[edge.name] = device_member(
                recipe, edge, student.config, student.weights_bytes, actors, teacher.head_shape, self._run
            )
        assert teacher is not None, "the recipe has a device"
        names = ", ".join(members)
        _LOG.info("devices may take part as %s", names)
        return _Servers(RoundServer(members), SignalServer(teacher))


@dataclass(frozen=True)
class DeviceCall:
    """Method of the actor for one device, with the interface of an actor's method."""

    method: Any
    device: str

    def remote(self, *arguments: Any) -> Any:
        """Call the method for the device; return the reference of the result."""
        return self.method.remote(self.device, *arguments)


class DeviceStudent:
    """Handle of a device with the methods that the handle of a student's actor has.

    Args:
        actor: handle of :class:`DeviceRounds`.
        device: name of the device's edge.
    """

    def __init__(self, actor: Any, device: str) -> None:
        self.prepare, self.train = DeviceCall(actor.prepare, device), DeviceCall(actor.train, device)
        self.heartbeat, self.advance = DeviceCall(actor.heartbeat, device), DeviceCall(actor.advance, device)


def start_device_rounds(
    recipe: DistillRecipe, students: Mapping[str, StudentForm], replicas: Sequence[str], run: str, log: RunLog | None
) -> Any:
    """Start the actor of a job beside its driver and return its handle.

    Raises:
        ClusterSetupError: another job of the same name runs.
    """
    name = actor_name(job_name(recipe.output))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(DeviceRounds)
    try:
        return actor.options(
            name=name,
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=-1,
            # A device waits in one call, and trains in one; its two channels wait in one each.
            max_concurrency=max(CALLS_AT_ONCE, 8 * len(recipe.devices)),
            scheduling_strategy=here,
        ).remote(recipe, students, replicas, run, log)
    except ValueError:
        raise ClusterSetupError(
            f"a job '{job_name(recipe.output)}' with devices runs already; choose another last part of output"
        ) from None


def find_device_rounds(job: str) -> Any | None:
    """Return the handle of the actor of a job; None if no such job runs."""
    try:
        return ray.get_actor(actor_name(job), namespace=NAMESPACE)
    except (ValueError, RayActorError):
        return None
