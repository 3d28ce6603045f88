"""Ray Serve on the Ray session of the fast tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ports import free_port


@pytest.fixture(scope="session")
def serve_port(local_ray: None) -> Iterator[int]:
    """Port of Serve's proxy."""
    from ray import serve

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
