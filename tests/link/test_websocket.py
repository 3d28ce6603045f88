"""WebSocket channel against a real server: round trips, refusals, servers that vanish, and TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from raycloud.edge.endpoint import CloudEndpoint
from raycloud.errors import LinkError, LinkSetupError
from raycloud.link.channel import LinkDown
from raycloud.link.frames import MAX_FRAME
from raycloud.link.websocket import SESSION_HEADER, WebSocketChannel, check_url

TOKENS = {"Bearer right": None, "Bearer wrong": HTTPStatus.UNAUTHORIZED, "Bearer other": HTTPStatus.FORBIDDEN}


class Server:
    """Echo every message; some messages trigger other actions."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.agreed: list[str | None] = []

    def check(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        status = {
            "/missing": HTTPStatus.NOT_FOUND,
            "/full": HTTPStatus.SERVICE_UNAVAILABLE,
        }.get(request.path, TOKENS.get(request.headers.get("Authorization", "Bearer right")))
        return None if status is None else connection.respond(status, "no\n")

    def talk(self, connection: ServerConnection) -> None:
        assert connection.response is not None
        self.agreed.append(connection.response.headers.get("Sec-WebSocket-Extensions"))
        try:
            for message in connection:
                if message == b"text":
                    connection.send("a text")
                elif message == b"vanish":
                    connection.socket.shutdown(socket.SHUT_RDWR)
                elif message == b"too much":
                    connection.send(bytes(MAX_FRAME + 1))
                elif message != b"silence":
                    connection.send(message)
        except ConnectionClosed:
            return

    @contextmanager
    def at(self, context: ssl.SSLContext | None = None) -> Iterator[str]:
        with serve(
            self.talk, "127.0.0.1", 0, ssl=context, process_request=self.check, max_size=MAX_FRAME, close_timeout=1
        ) as listening:
            thread = threading.Thread(target=listening.serve_forever, daemon=True)
            thread.start()
            port = listening.socket.getsockname()[1]
            yield f"{'ws' if context is None else 'wss'}://127.0.0.1:{port}"
            listening.shutdown()
            thread.join()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    with server.at() as url:
        yield url


@pytest.fixture
def connect(url: str) -> Iterator[Callable[..., WebSocketChannel]]:
    opened: list[WebSocketChannel] = []

    def open_(path: str = "/v1/split", **options: object) -> WebSocketChannel:
        channel = WebSocketChannel(url + path, timeout_s=120, **options)  # type: ignore[arg-type]
        opened.append(channel)
        return channel

    yield open_
    for channel in opened:
        channel.close()


def test_messages_make_the_round_trip(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    messages = [b"", b"x", bytes(range(256)) * 10, bytes(1_000_000)]
    for message in messages:
        channel.send(message)
    assert [channel.receive(120) for _ in messages] == messages


def test_the_largest_frame_passes(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    channel.send(bytes(MAX_FRAME))
    assert len(channel.receive(120)) == MAX_FRAME


def test_more_than_a_frame_is_not_taken(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    channel.send(b"too much")
    with pytest.raises(LinkDown):
        channel.receive(120)


def test_no_compression_is_asked_for_or_agreed_on(connect: Callable[..., WebSocketChannel], server: Server) -> None:
    channel = connect()
    channel.send(b"x")
    channel.receive(120)
    assert server.agreed == [None]
    assert "Sec-WebSocket-Extensions" not in server.requests[0].headers


def test_token_and_headers_are_brought(connect: Callable[..., WebSocketChannel], server: Server) -> None:
    connect(token="right", headers={SESSION_HEADER: "abc"})
    headers = server.requests[0].headers
    assert headers["Authorization"] == "Bearer right"
    assert headers[SESSION_HEADER] == "abc"
    connect()
    assert "Authorization" not in server.requests[1].headers


@pytest.mark.parametrize(("token", "status"), [("wrong", 401), ("other", 403)])
def test_refused_tokens_end_it(connect: Callable[..., WebSocketChannel], token: str, status: int) -> None:
    with pytest.raises(LinkError, match=f"refused the token .HTTP {status}.$") as caught:
        connect(token=token)
    assert not isinstance(caught.value, LinkDown)


@pytest.mark.parametrize("token", ["two\nlines", "right\r\nx-admin: 1", "snow\N{SNOWMAN}"])
def test_tokens_that_no_header_can_carry_are_refused(
    connect: Callable[..., WebSocketChannel], server: Server, token: str
) -> None:
    with pytest.raises(LinkError, match="the token holds line breaks"):
        connect(token=token)
    assert server.requests == []


def test_other_refusals_say_whether_waiting_helps(connect: Callable[..., WebSocketChannel]) -> None:
    with pytest.raises(LinkError, match=r"has nothing to connect to \(HTTP 404\)") as caught:
        connect("/missing")
    assert not isinstance(caught.value, LinkDown)
    with pytest.raises(LinkDown, match="HTTP 503"):
        connect("/full")


@pytest.mark.waits
def test_waiting_ends_in_time(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    channel.send(b"silence")
    for timeout in (0.05, 0.0, -1.0):
        with pytest.raises(TimeoutError):
            channel.receive(timeout)
    channel.send(b"still works")
    assert channel.receive(120) == b"still works"


def test_a_vanished_server_is_noticed(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    channel.send(b"vanish")
    for _ in range(2):
        with pytest.raises(LinkDown, match="the connection broke"):
            channel.receive(120)
    with pytest.raises(LinkDown, match="the connection broke"):
        channel.send(b"x")


def test_a_text_message_is_refused(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    channel.send(b"text")
    with pytest.raises(LinkError, match="sent text where only frames are allowed"):
        channel.receive(120)


def test_a_closed_channel_is_down(connect: Callable[..., WebSocketChannel]) -> None:
    channel = connect()
    channel.close()
    channel.close()
    with pytest.raises(LinkDown):
        channel.send(b"x")
    with pytest.raises(LinkDown):
        channel.receive(120)


def test_a_server_that_is_not_there_may_come_back() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(LinkDown, match="nobody listens at"):
            WebSocketChannel(f"ws://127.0.0.1:{unused.getsockname()[1]}/v1/split", timeout_s=5)


@pytest.mark.waits
def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(LinkDown, match="cannot be reached"):
        WebSocketChannel(f"ws://127.0.0.1:{deaf.getsockname()[1]}/v1/split", timeout_s=0.3)


@pytest.mark.parametrize(
    "url", ["wss://cloud.example/v1/split", "ws://localhost:80/x", "ws://127.0.0.1/", "ws://[::1]/"]
)
def test_encrypted_and_local_addresses_are_fine(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize("host", ["cloud.example", "192.168.0.7:8000", "localhost.example", "127.0.0.1.example"])
def test_unencrypted_addresses_of_others_are_refused(host: str) -> None:
    with pytest.raises(LinkError, match="unencrypted; use wss://"):
        WebSocketChannel(f"ws://{host}/v1/split")
    with pytest.raises(LinkError, match="unencrypted"):
        check_url(f"ws://localhost@{host}/")


@pytest.mark.parametrize("url", ["", "cloud.example", "https://x/", "ws://", "wss:///x", "ws://[::1/", "ws://x:99999/"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(LinkError, match="no address of a cloud") as caught:
        check_url(url)
    assert not isinstance(caught.value, LinkDown)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a self-signed certificate for 127.0.0.1 and its key, in one file each."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=cloud", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem"


@pytest.fixture(scope="module")
def secure(certificate: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with Server().at(context) as url:
        yield url


def test_a_trusted_certificate_is_accepted(secure: str, certificate: Path) -> None:
    for url in (secure, secure.replace("wss:", "WSS:")):
        channel = WebSocketChannel(f"{url}/v1/split", certificates=str(certificate), timeout_s=120)
        channel.send(b"secret")
        assert channel.receive(120) == b"secret"
        channel.close()


def test_session_tickets_do_not_disturb_the_handshake(secure: str, certificate: Path) -> None:
    """Tickets arrive while the request is sent; if another thread read them, one connection in thirty never opened."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(150):
            WebSocketChannel(f"{secure}/v1/split", certificates=str(certificate), timeout_s=120).close()
    finally:
        sys.setswitchinterval(before)


def test_an_unknown_certificate_is_refused_in_one_line(secure: str) -> None:
    with pytest.raises(LinkError, match=r"its certificate is not trusted \(self-signed certificate\)$") as caught:
        WebSocketChannel(f"{secure}/v1/split", timeout_s=120)
    assert not isinstance(caught.value, LinkDown)
    assert "\n" not in str(caught.value)
    with pytest.raises(LinkSetupError, match=r"its certificate is not trusted \(self-signed certificate\)$"):
        CloudEndpoint(f"{secure}/v1/split").server_info()


def test_a_certificate_of_another_host_is_refused(secure: str, certificate: Path) -> None:
    with pytest.raises(LinkError, match="its certificate is not trusted"):
        WebSocketChannel(secure.replace("127.0.0.1", "localhost"), certificates=str(certificate), timeout_s=120)


def test_tls_below_1_3_is_refused(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Server().at(context) as url, pytest.raises(LinkError):
        WebSocketChannel(f"{url}/v1/split", certificates=str(certificate), timeout_s=120)


def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name, content in (("missing.pem", None), ("empty.pem", b"nothing here")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(LinkError, match=f"no certificates can be read from '.*{name}'") as caught:
            WebSocketChannel("wss://127.0.0.1:1/v1/split", certificates=str(tmp_path / name))
        assert not isinstance(caught.value, LinkDown)
