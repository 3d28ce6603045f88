"""Destination of requests with tokens if environment variables for browsers and package managers name a proxy."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest
from websockets.sync.server import ServerConnection, serve

from raycloud.edge.endpoint import CloudEndpoint
from raycloud.errors import LinkError, LinkSetupError
from raycloud.link.channel import LinkDown
from raycloud.link.proxy import is_loopback, open_url, proxy_for
from raycloud.link.websocket import WebSocketChannel

TOKEN = "a-secret-of-this-test"


class Recorder:
    """Proxy that records the head of every request, and answers none."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(20)
                head = b""
                while b"\r\n\r\n" not in head and (read := connection.recv(4096)):
                    head += read
                self.heads.append(head)
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Run a proxy that all usual environment variables name, for all hosts."""
    recorder = Recorder()
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy", "socks_proxy"):
        monkeypatch.setenv(name, recorder.url)
        monkeypatch.setenv(name.upper(), recorder.url)
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD", "RAYCLOUD_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield recorder
    recorder.close()


class Handler(BaseHTTPRequestHandler):
    """Server that reports the token it received, and redirects requests for /moved."""

    def do_GET(self) -> None:
        status = 302 if self.path == "/moved" else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(json.dumps(self.headers.get("Authorization")).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """Run an HTTP server on this machine; yield its address without scheme."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{listening.server_port}"
        listening.shutdown()


def bearing(url: str) -> Request:
    return Request(url, headers={"Authorization": f"Bearer {TOKEN}"})


def test_requests_to_this_machine_pass_every_proxy_by(
    proxy: Recorder, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chosen in ("", proxy.url):
        monkeypatch.setenv("RAYCLOUD_PROXY", chosen)
        with open_url(bearing(f"http://{server}/"), timeout_s=20) as answer:
            assert json.load(answer) == f"Bearer {TOKEN}"
    assert proxy.heads == []


def test_the_cloud_on_this_machine_is_asked_directly(proxy: Recorder, server: str) -> None:
    with pytest.raises(LinkError, match="does not say what it serves"):  # it answered, with something else
        CloudEndpoint(f"ws://{server}/v1/split", token=TOKEN).server_info()
    assert proxy.heads == []


def test_the_socket_to_this_machine_is_direct(proxy: Recorder) -> None:
    def talk(connection: ServerConnection) -> None:
        connection.send(next(iter(connection)))

    with serve(talk, "127.0.0.1", 0) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        channel = WebSocketChannel(f"ws://127.0.0.1:{listening.socket.getsockname()[1]}/v1/split", token=TOKEN)
        channel.send(b"straight")
        assert channel.receive(20) == b"straight"
        channel.close()
        listening.shutdown()
    assert proxy.heads == []


def test_no_variable_but_our_own_sends_other_hosts_through_a_proxy(
    proxy: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody is at these addresses: names that end in .invalid have none (RFC 6761).
    with pytest.raises(URLError):
        open_url(bearing("http://cloud.invalid/v1/models"), timeout_s=20)
    cloud = CloudEndpoint("wss://cloud.invalid/v1/split", token=TOKEN)
    with pytest.raises(LinkError, match="cannot be reached"):
        cloud.server_info()
    with pytest.raises(LinkDown, match="cannot be reached"):
        WebSocketChannel(cloud.url, token=TOKEN)
    assert proxy.heads == []

    monkeypatch.setenv("RAYCLOUD_PROXY", proxy.url)
    with pytest.raises(LinkError, match="cannot be reached"):
        cloud.server_info()
    with pytest.raises(LinkDown, match="cannot be reached"):
        WebSocketChannel(cloud.url, token=TOKEN)
    # The proxy is asked for a way to the cloud and no more: the token is inside TLS.
    assert [head.split(b" ")[:2] for head in proxy.heads] == [[b"CONNECT", b"cloud.invalid:443"]] * 2
    assert not any(TOKEN.encode() in head for head in proxy.heads)


def test_a_redirect_is_not_followed_with_the_token(server: str) -> None:
    with pytest.raises(HTTPError, match="302"):
        open_url(bearing(f"http://{server}/moved"), timeout_s=20)


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:1", "127.0.0.1:1", "http://[::1", "http://a:b:c", "http://h/path"]
)
def test_what_is_no_proxy_is_refused_with_what_is_allowed(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCLOUD_PROXY", proxy)
    with pytest.raises(LinkSetupError, match=r"RAYCLOUD_PROXY is no address of a proxy; allowed: http://"):
        proxy_for("wss://cloud.example/v1/split")
    assert proxy_for("ws://127.0.0.1:1/v1/split") is None


def test_which_hosts_are_this_machine() -> None:
    assert all(is_loopback(host) for host in ("localhost", "LOCALHOST.", "127.0.0.1", "127.8.8.8", "::1"))
    assert not any(is_loopback(host) for host in ("", "10.0.0.1", "localhost.example", "::", "0.0.0.0", "::2"))
