"""Prometheus metrics of inference servers and of runs, exported through Ray from every node."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from raycloud.split.inference.metrics import Count, Duration, Level

_STEP_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]


class RayMetrics:
    """Implementation of :class:`raycloud.split.inference.metrics.InferenceMetrics` for one model.

    Create it inside a Ray worker.
    """

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self._counts: dict[Count, Counter] = {
            "tokens": _counter("tokens", "Tokens whose hidden states were computed.", tags),
            "errors": _counter("errors", "Frames and steps refused or failed.", tags),
            "sessions_opened": _counter("sessions_opened", "Sessions opened.", tags),
            "sessions_expired": _counter("sessions_expired", "Sessions whose lease ended.", tags),
        }
        self._levels: dict[Level, Gauge] = {
            "sessions": _gauge("sessions", "Sessions held.", tags),
            "queue": _gauge("queue", "Steps waiting for the engine.", tags),
            "kv_bytes": _gauge("kv_bytes", "Bytes of keys and values of all accepted tokens.", tags),
        }
        self._steps = Histogram(
            "raycloud_split_step_seconds",
            description="Time of one step in the engine.",
            boundaries=_STEP_SECONDS,
            tag_keys=("model",),
        )
        self._steps.set_default_tags(tags)

    def count(self, name: Count, value: float = 1) -> None:
        """Add to a counter."""
        if value > 0:
            self._counts[name].inc(value)

    def level(self, name: Level, value: float) -> None:
        """Set a gauge."""
        self._levels[name].set(value)

    def observe(self, name: Duration, seconds: float) -> None:
        """Add a value to a histogram."""
        self._steps.observe(seconds)


class RunMetrics:
    """Progress of a run and its students, as ``raycloud_run_*``; create it in the driver or an actor.

    Args:
        job: name of the job, such as ``distill``.
        run: id of the run, as in its summary.
    """

    def __init__(self, job: str, run: str) -> None:
        self._tags = {"job": job, "run": run}
        keys = tuple(self._tags)
        self._round = Gauge("raycloud_run_round", description="Complete rounds.", tag_keys=keys)
        self._loss = Gauge(
            "raycloud_run_loss", description="Loss per token of a student's last step.", tag_keys=(*keys, "student")
        )
        self._speed = Gauge(
            "raycloud_run_tokens_per_second",
            description="Tokens that a student learns from in a second of its round.",
            tag_keys=(*keys, "student"),
        )

    def rounds(self, complete: int) -> None:
        """Set the number of complete rounds."""
        self._round.set(complete, tags=self._tags)

    def student(self, name: str, loss: float, tokens_per_second: float) -> None:
        """Set the progress of a student: loss per token, and tokens per second of the round."""
        tags = {**self._tags, "student": name}
        self._loss.set(loss, tags=tags)
        self._speed.set(tokens_per_second, tags=tags)


def _counter(name: str, description: str, tags: dict[str, str]) -> Counter:
    counter = Counter(f"raycloud_split_{name}", description=description, tag_keys=tuple(tags))
    counter.set_default_tags(tags)
    return counter


def _gauge(name: str, description: str, tags: dict[str, str]) -> Gauge:
    gauge = Gauge(f"raycloud_split_{name}", description=description, tag_keys=tuple(tags))
    gauge.set_default_tags(tags)
    return gauge
