"""One Serve on the one Ray of the fast tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def serve_port(local_ray: None) -> Iterator[int]:
    """The port that Serve's proxy listens on."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
