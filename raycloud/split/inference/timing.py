"""Time and bytes of a new token, measured with one session over an emulated link in this process.

Edge, frames, codec, meter, cloud and engine are those of a deployment; only the socket is replaced, by
:class:`~raycloud.link.network.EmulatedChannel`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.channel import Loopback, MeteredChannel
from raycloud.link.meter import Meter
from raycloud.link.network import EmulatedChannel, Network
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.blocks import CloudBlocks, StepRequest
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.generation import SplitTokenSource, local_split_model
from raycloud.split.inference.pipeline import SplitPipeline
from raycloud.split.inference.server import InferenceServer
from raycloud.split.parts import CloudPart, EdgePart

_PROMPT, _WARM = 32, 3
UNTIMED_TOKENS = _PROMPT + _WARM
"""Number of tokens that a session needs in addition to the timed ones."""


@dataclass(frozen=True)
class TokenCost:
    """Cost of a new token: median times and mean bytes over tokens."""

    ms_per_token: float
    edge_ms_per_token: float
    """Edge's part of that time: all but waiting for link and cloud."""
    bytes_per_token: float
    """Bytes in both directions, headers included."""


class _TimedBlocks:
    """Cloud blocks that add up the seconds spent waiting for them."""

    def __init__(self, inner: CloudBlocks) -> None:
        self._inner, self.seconds = inner, 0.0

    def held(self, index: int) -> int:
        return self._inner.held(index)

    def send(self, request: StepRequest) -> None:
        self._inner.send(request)

    def receive(self) -> Tensor:
        start = time.perf_counter()
        try:
            return self._inner.receive()
        finally:
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._inner.close()


def measure_split(
    edge: EdgePart, cloud: CloudPart, codecs: CutCodecs, codec: str, network: Network, ids: Sequence[int]
) -> TokenCost:
    """Measure the cost of a token by sending a text token by token through a session of one plan.

    Args:
        edge: the edge's part.
        cloud: the cloud's part, of the same single plan.
        codecs: codecs of the cuts, with the calibration of both cuts if the codec needs one.
        codec: name of the codec.
        network: emulated network.
        ids: :data:`UNTIMED_TOKENS` tokens that are not measured, then those that are.

    Raises:
        LinkError: the codec is unknown or needs a calibration.
    """
    config = SessionConfig(edge.fingerprint, edge.plans, codecs, codec, len(ids))
    engine, meter = InferenceEngine(cloud, threads=torch.get_num_threads()), Meter()
    server = InferenceServer(engine, codecs)
    with closing(engine), closing(Loopback(lambda connection: server.serve(connection, "split evaluate"))) as loopback:
        channel = EmulatedChannel(MeteredChannel(loopback.connect(), meter), network)
        with closing(_TimedBlocks(RemoteBlocks(lambda _: channel, config))) as middle:
            pipeline = SplitTokenSource(edge.first, edge.last, lambda: middle, edge.plans).open()
            return _measure_pipeline(pipeline, _on_device(edge, ids), lambda: middle.seconds, lambda: meter.total)


def measure_unsplit(whole: EdgePart, ids: Sequence[int]) -> float:
    """Median milliseconds of a token at an edge whose plan leaves the cloud no blocks; see :func:`measure_split`."""

    def nothing() -> float:
        return 0.0

    return _measure_pipeline(local_split_model(whole).open(), _on_device(whole, ids), nothing, nothing).ms_per_token


def _on_device(edge: EdgePart, ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids], device=next(edge.last.parameters()).device)


def _measure_pipeline(
    pipeline: SplitPipeline, ids: Tensor, waited: Callable[[], float], crossed: Callable[[], float]
) -> TokenCost:
    """Token cost of a new text; ``waited`` and ``crossed`` return the seconds waited and the bytes sent so far."""
    pipeline.advance(ids[:, :_PROMPT])
    whole, own, sizes = list[float](), list[float](), list[float]()
    for place in range(_PROMPT, ids.shape[1]):
        away, sent, start = waited(), crossed(), time.perf_counter()
        # A continuation needs this token before the next one can begin: reading the logits waits for it.
        int(pipeline.advance(ids[:, place : place + 1])[0, -1].argmax())
        taken = time.perf_counter() - start
        if place >= UNTIMED_TOKENS:
            whole.append(1e3 * taken)
            own.append(1e3 * (taken - (waited() - away)))
            sizes.append(crossed() - sent)
    return TokenCost(statistics.median(whole), statistics.median(own), statistics.fmean(sizes))
