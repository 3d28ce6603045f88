"""Shared fixtures of the server's tests."""

from __future__ import annotations

import pytest

from tests.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Fake clock by which leases are measured."""
    made = Clock()
    monkeypatch.setattr("raycloud.link.server.server.time", made)
    return made
