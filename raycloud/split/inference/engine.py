"""Engine that runs the cloud blocks for the steps of many sessions on one thread."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from raycloud.errors import LinkError
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.link.server import NullMetrics
from raycloud.models.cache import KVCache
from raycloud.split.inference.blocks import CloudStage, StepRequest, cloud_stage
from raycloud.split.inference.metrics import InferenceMetrics
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet, SplitPlan


class NonFiniteHidden(LinkError):
    """Error of hidden states that hold infinities or NaN."""


class DeadlineExceeded(LinkError):
    """Error of a step whose deadline passed while it was queued."""


@dataclass(frozen=True)
class EngineRequest:
    """Request of one step of a session, with coded hidden states as input and output."""

    state: CloudStage
    plan: SplitPlan
    start: int
    tokens: int
    wanted: int
    keep: int
    payload: bytes
    uplink: CutCodec
    downlink: CutCodec
    deadline: float
    """Time on the monotonic clock."""
    done: Future[bytes] = field(default_factory=Future)


class InferenceEngine:
    """Engine that runs the steps of all sessions in the order of arrival, one at a time.

    Sessions progress concurrently because a step is small: a prompt arrives in chunks, and the chunks of several
    sessions alternate.

    Args:
        part: the cloud's part of the model.
        metrics: sink for the number of tokens, the length of the queue, and times of steps.
        threads: number of torch threads; None leaves it unchanged.
    """

    def __init__(self, part: CloudPart, metrics: InferenceMetrics | None = None, threads: int | None = None) -> None:
        self.part = part
        self._metrics = metrics or NullMetrics()
        self._queue: queue.SimpleQueue[EngineRequest | CloudStage | None] = queue.SimpleQueue()
        self._device = next(part.middle.parameters(), torch.empty(0)).device
        self._dtype = next(part.middle.parameters(), torch.empty(0)).dtype
        self._threads = threads
        self._one_token = self._cache_of_one_token()  # not later: the engine's thread may be at work
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of queued steps."""
        return self._queue.qsize()

    def cache_bytes(self, sessions: int, tokens: int) -> int:
        """Bytes of keys, values and states of some sessions with ``tokens`` tokens in all, over this part's blocks."""
        return sessions * self._one_token.state_bytes + tokens * self._one_token.bytes_per_token

    @torch.inference_mode()
    def _cache_of_one_token(self) -> KVCache:
        """Cache of one token, which shows what a model keeps for each token and session."""
        middle = self.part.middle
        cache, width = middle.new_cache(), int(self.part.config.hidden_size)
        middle.hidden(torch.zeros(1, 1, width, device=self._device, dtype=self._dtype), cache=cache)
        return cache

    def open(self, plans: PlanSet) -> CloudStage:
        """Create the state of a new session."""
        return cloud_stage(self.part.middle, plans, self.part.config.num_hidden_layers)

    def submit(self, job: EngineRequest) -> Future[bytes]:
        """Queue a step; return a future of the coded hidden states entering block ``plan.end_block``.

        The future raises :class:`NonFiniteHidden`, :class:`DeadlineExceeded` or ValueError (the step does not follow
        the session's tokens); the session is then unchanged.
        """
        self._queue.put(job)
        return job.done

    def free(self, state: CloudStage) -> None:
        """Erase a session's keys and values, after its queued steps."""
        self._queue.put(state)

    def close(self) -> None:
        """Stop after the queued steps."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while (item := self._queue.get()) is not None:
            self._metrics.level("queue", self._queue.qsize())
            if isinstance(item, CloudStage):
                self._wipe(item)
                continue
            if not item.done.set_running_or_notify_cancel():
                continue
            try:
                item.done.set_result(self._step(item))
            except Exception as error:  # any error of a step must reach its session and not end the engine
                item.done.set_exception(error)

    @torch.inference_mode()
    def _wipe(self, state: CloudStage) -> None:
        state.cache.wipe()

    @torch.inference_mode()
    def _step(self, job: EngineRequest) -> bytes:
        started = time.monotonic()
        if started > job.deadline:
            raise DeadlineExceeded("the step's deadline passed before its turn came")
        hidden = job.uplink.decode(job.payload, job.start, job.tokens)
        if not bool(torch.isfinite(hidden).all()):
            raise NonFiniteHidden("the hidden states hold infinities or NaN")
        hidden = hidden.to(self._device, self._dtype)
        stop = job.start + job.tokens
        out = job.state.step(StepRequest(job.plan, hidden[None], job.start, job.wanted, job.keep))[0]
        coded = job.downlink.encode(out.float(), stop - job.wanted)
        self._metrics.count("tokens", job.tokens)
        self._metrics.observe("step_seconds", time.monotonic() - started)
        return coded.numpy().tobytes()
