"""Fixtures: a tiny teacher, its server, and a link to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, collate
from raycloud.distill.signals.remote import ModelTeacher, SignalClient, SignalServer
from raycloud.link.channel import Loopback
from tests.distill.signals.remote.wiring import LIMITS, SAMPLES, client, loopback_to
from tests.models.families import tiny


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("gemma3-untied", dtype=torch.float32)


@pytest.fixture(scope="module")
def host(model: PreTrainedModel) -> SignalServer:
    return SignalServer(ModelTeacher(model, "teacher@1", "words"), LIMITS)


@pytest.fixture(scope="module")
def loopback(host: SignalServer) -> Iterator[Loopback]:
    service = loopback_to(host)
    yield service
    service.close()


@pytest.fixture
def link(loopback: Loopback) -> Iterator[SignalClient]:
    opened = client(loopback)
    yield opened
    opened.close()


@pytest.fixture
def batch() -> Batch:
    return collate(SAMPLES, pad=3)
