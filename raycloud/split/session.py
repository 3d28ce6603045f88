"""One session over an emulated link, all in this process: what a new token takes in time and in bytes.

Edge, frames, codec, meter, cloud and its engine are those of a deployment; only the socket is not, and the network is
:class:`~raycloud.link.network.Shaped`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.channel import Loopback, Metered
from raycloud.link.frames import HEADER_BYTES
from raycloud.link.meter import Meter
from raycloud.link.network import Network, Shaped
from raycloud.split.cloud.engine import Engine
from raycloud.split.cloud.host import Host
from raycloud.split.generation import SplitModel, in_process
from raycloud.split.middle import Middle, Trip
from raycloud.split.parts import CloudPart, EdgePart
from raycloud.split.plan import SplitPlan
from raycloud.split.remote import RemoteMiddle, Terms
from raycloud.split.terms import Codecs
from raycloud.split.triad import Triad

_PROMPT, _WARM = 32, 3
AROUND = _PROMPT + _WARM
"""Tokens that a session needs beside those it takes the time of."""


@dataclass(frozen=True)
class Pace:
    """What a new token takes: medians over tokens."""

    ms_per_token: float
    edge_ms_per_token: float
    """Of that the edge's own: all but waiting for link and cloud."""
    bytes_per_token: float
    """Both ways, headers included."""


def bytes_of_a_token(codecs: Codecs, codec: str, plan: SplitPlan, pos: int) -> int:
    """Bytes both ways of the token at ``pos``: a frame up and one down, each a header and one coded row."""
    up, down = (codecs.boundary(codec, cut) for cut in (plan.first, plan.second))
    return 2 * HEADER_BYTES + up.payload_bytes(pos, 1) + down.payload_bytes(pos, 1)


class _Waited:
    """A middle that adds up for how long it was waited for."""

    def __init__(self, inner: Middle) -> None:
        self._inner, self.seconds = inner, 0.0

    def held(self, index: int) -> int:
        return self._inner.held(index)

    def send(self, trip: Trip) -> None:
        self._inner.send(trip)

    def receive(self) -> Tensor:
        start = time.perf_counter()
        try:
            return self._inner.receive()
        finally:
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        self._inner.close()


def measure(edge: EdgePart, cloud: CloudPart, codecs: Codecs, codec: str, network: Network, ids: Sequence[int]) -> Pace:
    """Feed a text token by token through the session of one plan.

    Args:
        edge: the edge's part.
        cloud: the cloud's part, of the same single plan.
        codecs: with the calibration of both cuts, if the codec needs one.
        codec: its name.
        network: the link.
        ids: :data:`AROUND` tokens that are not counted, then those that are.

    Raises:
        LinkError: the codec is unknown or needs a calibration.
    """
    terms = Terms(edge.fingerprint, edge.plans, codecs, codec, len(ids))
    engine, meter = Engine(cloud, threads=torch.get_num_threads()), Meter()
    host = Host(engine, codecs)
    with closing(engine), closing(Loopback(lambda connection: host.serve(connection, "examination"))) as loopback:
        channel = Shaped(Metered(loopback.connect(), meter), network)
        with closing(_Waited(RemoteMiddle(lambda _: channel, terms))) as middle:
            triad = SplitModel(edge.first, edge.last, lambda: middle, edge.plans).open()
            return _paced(triad, _on_device(edge, ids), lambda: middle.seconds, lambda: meter.total)


def measure_unsplit(whole: EdgePart, ids: Sequence[int]) -> float:
    """Milliseconds of a token, the median, at an edge whose plan leaves the cloud nothing; see :func:`measure`."""

    def nothing() -> float:
        return 0.0

    return _paced(in_process(whole).open(), _on_device(whole, ids), nothing, nothing).ms_per_token


def _on_device(edge: EdgePart, ids: Sequence[int]) -> Tensor:
    return torch.tensor([ids], device=next(edge.last.parameters()).device)


def _paced(triad: Triad, ids: Tensor, waited: Callable[[], float], crossed: Callable[[], float]) -> Pace:
    """The pace of a fresh text; ``waited`` and ``crossed`` say the seconds and bytes so far."""
    triad.advance(ids[:, :_PROMPT])
    whole, own, sizes = list[float](), list[float](), list[float]()
    for place in range(_PROMPT, ids.shape[1]):
        away, sent, start = waited(), crossed(), time.perf_counter()
        # A continuation cannot begin its next token before it has this one: so does reading the logits.
        int(triad.advance(ids[:, place : place + 1])[0, -1].argmax())
        taken = time.perf_counter() - start
        if place >= AROUND:
            whole.append(1e3 * taken)
            own.append(1e3 * (taken - (waited() - away)))
            sizes.append(crossed() - sent)
    return Pace(statistics.median(whole), statistics.median(own), statistics.fmean(sizes))
