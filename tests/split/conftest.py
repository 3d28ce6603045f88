"""Fixtures: tiny models on one thread, edges with short timeouts, and a cloud per file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.split.wiring import Cloud, cloud


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are not faster with a second thread, which they wait for on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.client._FIRST_WAIT_S", 0.005)
    monkeypatch.setattr("raycloud.link.client._FAREWELL_S", 0.1)


@pytest.fixture(scope="module")
def there() -> Iterator[Cloud]:
    with cloud() as made:
        yield made
