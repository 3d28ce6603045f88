"""The engine: runs the middle's blocks for the steps of many sessions on one thread."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from raycloud.errors import LinkError
from raycloud.link.codecs.boundary import Boundary
from raycloud.split.cloud.metrics import Metrics, NoMetrics
from raycloud.split.middle import MiddleState, Trip, middle_state
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet, SplitPlan


class NonFinite(LinkError):
    """Rows that hold infinities or what is no number."""


class Expired(LinkError):
    """A step whose deadline passed before its turn came."""


@dataclass(frozen=True)
class Job:
    """One step of one session, coded rows in and coded rows out."""

    state: MiddleState
    plan: SplitPlan
    pos: int
    rows: int
    wanted: int
    keep: int
    payload: bytes
    up: Boundary
    down: Boundary
    deadline: float
    """On the monotonic clock."""
    done: Future[bytes] = field(default_factory=Future)


class Engine:
    """Takes the steps of all sessions in the order they come, one at a time.

    Sessions make progress together because a step is small: a prompt comes in chunks, and the chunks of several
    sessions take turns.

    Args:
        part: the cloud's blocks.
        metrics: told of rows, queue and step times.
        threads: of torch; None leaves them as they are.
    """

    def __init__(self, part: CloudPart, metrics: Metrics | None = None, threads: int | None = None) -> None:
        self.part = part
        self._metrics = metrics or NoMetrics()
        self._queue: queue.SimpleQueue[Job | MiddleState | None] = queue.SimpleQueue()
        self._device = next(part.middle.parameters(), torch.empty(0)).device
        self._dtype = next(part.middle.parameters(), torch.empty(0)).dtype
        self._threads = threads
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Steps not yet begun."""
        return self._queue.qsize()

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token of a session takes in keys and values, all blocks of this part together."""
        config = self.part.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * heads * width * self._dtype.itemsize * len(self.part.middle.blocks)

    def open(self, plans: PlanSet) -> MiddleState:
        """What a new session needs."""
        return middle_state(self.part.middle, plans, self.part.config.num_hidden_layers)

    def submit(self, job: Job) -> Future[bytes]:
        """The coded rows entering block ``plan.second``, once the step's turn has come.

        The future raises :class:`NonFinite`, :class:`Expired` or ValueError (rows that do not follow on what the
        session holds); the session is then as it was before.
        """
        self._queue.put(job)
        return job.done

    def free(self, state: MiddleState) -> None:
        """Wipe a session's keys and values, behind the steps it still has waiting."""
        self._queue.put(state)

    def close(self) -> None:
        """Stop, behind what is waiting."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while (item := self._queue.get()) is not None:
            self._metrics.level("queue", self._queue.qsize())
            if isinstance(item, MiddleState):
                self._wipe(item)
                continue
            if not item.done.set_running_or_notify_cancel():
                continue
            try:
                item.done.set_result(self._step(item))
            except Exception as error:  # whatever a step meets must reach its session, not end the engine
                item.done.set_exception(error)

    @torch.inference_mode()
    def _wipe(self, state: MiddleState) -> None:
        state.cache.wipe()

    @torch.inference_mode()
    def _step(self, job: Job) -> bytes:
        started = time.monotonic()
        if started > job.deadline:
            raise Expired("the step's deadline passed before its turn came")
        rows = job.up.decode(job.payload, job.pos, job.rows)
        if not bool(torch.isfinite(rows).all()):
            raise NonFinite("the rows hold infinities or NaN")
        rows = rows.to(self._device, self._dtype)
        stop = job.pos + job.rows
        out = job.state.step(Trip(job.plan, rows[None], job.pos, job.wanted, job.keep))[0]
        coded = job.down.encode(out.float(), stop - job.wanted)
        self._metrics.count("rows", job.rows)
        self._metrics.observe("step_seconds", time.monotonic() - started)
        return coded.numpy().tobytes()
