"""Signals from the teacher's replicas through Ray's object store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raycloud.data.batches import Batch
from raycloud.distill.signals import Signal, SignalRecipe, signal_key
from raycloud.errors import ClusterError
from raycloud.link.meter import Meter

_TRIES = 3


class ObjectStoreSignals:
    """Implementation of :class:`~raycloud.distill.signals.SignalStore` with signals computed by teacher actors.

    A batch always goes to the same replica, so that students with the same batch share the result. Requests are
    idempotent: if a replica dies or an object is lost, the only cost is a second request.

    Args:
        teachers: handles of the teacher's replicas.
        name: the teacher's name, part of every key.
        recipe: recipe of the signals.
        temperatures: see :attr:`~raycloud.distill.recipe.DistillRecipe.temperatures`.
        timeout_s: maximum time to wait for one signal.
        meter: counts bytes of ids (uplink) and of signals (downlink).
    """

    def __init__(
        self,
        teachers: Sequence[Any],
        name: str,
        recipe: SignalRecipe,
        temperatures: Sequence[float],
        timeout_s: float,
        meter: Meter,
    ) -> None:
        self._teachers, self._name, self._recipe = teachers, name, recipe
        self._temperatures, self._timeout, self._meter = temperatures, timeout_s, meter
        self._asked: dict[str, ray.ObjectRef] = {}

    def _key(self, batch: Batch) -> str:
        return signal_key(self._name, batch, self._recipe, self._temperatures)

    def _ask(self, key: str, batch: Batch) -> ray.ObjectRef:
        self._meter.add("ids", batch.nbytes)
        return self._teachers[int(key[:8], 16) % len(self._teachers)].signal.remote(self._name, batch)

    def prefetch(self, batch: Batch) -> None:
        """Request the signal of a batch that will be needed."""
        key = self._key(batch)
        if key not in self._asked:
            self._asked[key] = self._ask(key, batch)

    def signal(self, batch: Batch) -> Signal:
        """Return the teacher's signal of a batch.

        Raises:
            ClusterError: no replica answered in time, or the signal is for other ids.
        """
        key = self._key(batch)
        why: Exception | None = None
        for _ in range(_TRIES):
            ref = self._asked.pop(key, None) or self._ask(key, batch)
            try:
                (shared,) = ray.get(ref, timeout=self._timeout)
                signal: Signal = ray.get(shared, timeout=self._timeout)
            except (RayTaskError, GetTimeoutError) as error:
                raise ClusterError(f"no signal from the teacher: {_reason(error, self._timeout)}") from error
            except RayError as error:  # the replica died, or its node with the object; Ray restarts it
                why = error
                continue
            if signal.key != key:
                raise ClusterError("the teacher's signal is for other token ids than were asked for")
            self._meter.add("signals", signal.nbytes)
            return signal
        raise ClusterError(f"no signal from the teacher in {_TRIES} tries: {_reason(why, self._timeout)}")


def _reason(error: Exception | None, timeout: float) -> str:
    if isinstance(error, GetTimeoutError):
        return f"timed out after {timeout:g} s"
    return str(error).strip().splitlines()[-1]
