"""A channel over one WebSocket."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from raycloud.errors import LinkError
from raycloud.link.channel import LinkDown
from raycloud.link.frames import MAX_FRAME

_LOCAL = ("localhost", "127.0.0.1", "::1")


def check_url(url: str) -> None:
    """Whether frames may go to an address.

    Raises:
        LinkError: it is no WebSocket address, or it is unencrypted and not on this machine.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("ws", "wss") and parts.hostname and (parts.port or True)
    except ValueError:  # brackets that do not match, a port that is none
        usable = False
    if not usable:
        raise LinkError(f"'{url}' is no address of a cloud; allowed: wss://host[:port]/path")
    if parts.scheme == "ws" and parts.hostname not in _LOCAL:
        raise LinkError(f"'{url}' would send hidden states unencrypted; use wss:// for any host but this one")


def trusting(certificates: str | None) -> ssl.SSLContext:
    """TLS 1.3 with servers whose certificate is vouched for by this file, or by the system if None.

    Raises:
        LinkError: the file cannot be read or holds no certificates.
    """
    try:
        context = ssl.create_default_context(cafile=certificates)
    except OSError as error:  # of which ssl.SSLError is one
        raise LinkError(f"no certificates can be read from '{certificates}': {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class _RequestFirst(ClientConnection):
    """Reads nothing before it has sent its request.

    A TLS 1.3 server sends session tickets at once. OpenSSL must not take them in one thread while another sends: the
    request would be lost now and then, and the handshake wait for its answer until it gives up.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._sent = threading.Event()
        super().__init__(*args, **options)

    def recv_events(self) -> None:
        self._sent.wait()
        super().recv_events()

    def send_data(self) -> None:
        super().send_data()
        self._sent.set()

    def close_socket(self) -> None:
        self._sent.set()
        super().close_socket()


class WebSocketChannel:
    """Frames as binary messages.

    Args:
        url: ``wss://host/v1/split``; ``ws://`` only to this machine, where no one listens in.
        token: sent as bearer token.
        headers: more headers, such as the one that a router keeps sessions together by.
        certificates: a file of certificates to trust instead of the system's.
        timeout_s: for the handshake.

    Raises:
        LinkError: the address is unusable, or the server refused the token.
        LinkDown: the server cannot be reached now.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        certificates: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        check_url(url)
        if token and not (token.isascii() and token.isprintable()):
            raise LinkError("the token holds line breaks or other characters that cannot be sent")
        sent = {**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        context = trusting(certificates) if urlsplit(url).scheme == "wss" else None
        try:
            # Coded rows do not compress: the extension would only burn time on both ends.
            self._socket = connect(
                url,
                additional_headers=sent,
                ssl=context,
                compression=None,
                max_size=MAX_FRAME,
                open_timeout=timeout_s,
                close_timeout=2,
                proxy=None,
                create_connection=_RequestFirst,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in (401, 403):
                raise LinkError(f"{url} refused the token (HTTP {status})") from None
            if status == 404:
                raise LinkError(f"{url} has nothing to connect to (HTTP 404)") from None
            raise LinkDown(f"{url} answered HTTP {status}") from None
        except InvalidURI as error:
            raise LinkError(f"'{url}' is no address of a cloud: {error}") from None
        except ssl.SSLCertVerificationError as error:
            raise LinkError(f"{url}: its certificate is not trusted ({error.verify_message})") from None
        except (OSError, TimeoutError, WebSocketException) as error:
            raise LinkDown(f"{url} cannot be reached: {error or type(error).__name__}") from None

    def send(self, data: bytes) -> None:
        """Send one message."""
        try:
            self._socket.send(data)
        except (ConnectionClosed, OSError) as error:
            raise LinkDown(f"the connection broke: {error}") from None

    def receive(self, timeout_s: float) -> bytes:
        """The next message."""
        try:
            data = self._socket.recv(timeout=max(0.0, timeout_s))
        except TimeoutError:
            raise
        except (ConnectionClosed, OSError) as error:
            raise LinkDown(f"the connection broke: {error}") from None
        if isinstance(data, str):
            raise LinkError("the cloud sent text where only frames are allowed")
        return data

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
