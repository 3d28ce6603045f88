"""Shared parts of the tests of signals over a link: samples, packed requests, and channels that break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from raycloud.data.batches import Batch, Sample
from raycloud.distill.signals import Signal, SignalKind, SignalRecipe
from raycloud.distill.signals.keys import combine_keys
from raycloud.distill.signals.remote import SignalClient, SignalLimits, SignalServer
from raycloud.distill.signals.remote.messages import SignalRequest, pack_batch
from raycloud.link.channel import Channel, LinkDown, Loopback
from raycloud.link.meter import Meter

SAMPLES = [Sample(tuple((11 * n + 3 * i) % 97 for i in range(3 + 5 * n)), n) for n in range(5)]
TAUS = (1.0, 2.0)
LIMITS = SignalLimits(samples=8, length=40, tokens=240, handshake_s=60, send_s=60)


def loopback_to(host: SignalServer) -> Loopback:
    return Loopback(partial(host.serve, principal="edges"))


def client(
    service: Loopback,
    wrap: Callable[[Channel], Channel] = lambda channel: channel,
    *,
    meter: Meter | None = None,
    timeout_s: float = 120.0,
) -> SignalClient:
    return SignalClient(lambda _: wrap(service.connect()), meter=meter, timeout_s=timeout_s)


def recipe(kind: SignalKind, codec: str = "float32") -> SignalRecipe:
    return SignalRecipe(kind=kind, codec=codec, k=5, draws=9)  # type: ignore[arg-type]


def same(found: Signal, expected: Signal) -> bool:
    assert found.payload.keys() == expected.payload.keys()
    assert replace(found, payload={}) == replace(expected, payload={})
    return all(torch.equal(found.payload[name], expected.payload[name]) for name in expected.payload)


def asked(link: SignalClient, batch: Batch, **changes: object) -> tuple[SignalRequest, bytes]:
    source = link.source(recipe("topk"), TAUS)
    lengths, raw = pack_batch(batch, link.info.vocabulary_size)
    ask = SignalRequest(
        teacher=source.teacher,
        tokenizer=source.tokenizer,
        key=combine_keys(source.keys(batch)),
        signal=source.recipe,
        temperatures=list(source.temperatures),
        lengths=lengths,
    )
    return ask.model_copy(update=changes), raw


class Brittle:
    """Channel that breaks after a number of received messages."""

    def __init__(self, inner: Channel, left: int, damage: bool = False) -> None:
        self._inner, self._left, self._damage = inner, left, damage

    def send(self, data: bytes) -> None:
        self._inner.send(data)

    def receive(self, timeout_s: float) -> bytes:
        data = self._inner.receive(timeout_s)
        self._left -= 1
        if self._left < 0 and self._damage:
            return data[:-1]
        if self._left < 0:
            self._inner.close()
            raise LinkDown("cut")
        return data

    def close(self) -> None:
        self._inner.close()
