"""A tiny teacher, its host, and a link to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, collate
from raycloud.distill.signal_link import SignalHost, TeacherLink
from raycloud.link.channel import Loopback
from tests.distill.signal_link.wiring import LIMITS, SAMPLES
from tests.models.families import tiny


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("gemma3-untied", dtype=torch.float32)


@pytest.fixture(scope="module")
def host(model: PreTrainedModel) -> SignalHost:
    return SignalHost(model, "teacher@1", "words", LIMITS)


@pytest.fixture(scope="module")
def loopback(host: SignalHost) -> Iterator[Loopback]:
    service = Loopback(host.serve)
    yield service
    service.close()


@pytest.fixture
def link(loopback: Loopback) -> Iterator[TeacherLink]:
    opened = TeacherLink(loopback.connect, timeout_s=20)
    yield opened
    opened.close()


@pytest.fixture
def batch() -> Batch:
    return collate(SAMPLES, pad=3)
