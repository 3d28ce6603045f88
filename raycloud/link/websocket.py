"""Channel over a WebSocket."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from raycloud.errors import LinkError, LinkSetupError
from raycloud.link.auth import bearer
from raycloud.link.channel import LinkDown
from raycloud.link.frames import MAX_FRAME
from raycloud.link.proxy import is_loopback, proxy_for

SESSION_HEADER = "x-session-id"
"""Header by which Ray Serve's consistent-hash router keeps a session at one replica."""
JOB_HEADER = "x-raycloud-job"
"""Header with the name of the job that a device takes part in."""


def check_url(url: str) -> None:
    """Check that frames may be sent to an address.

    Raises:
        LinkSetupError: the address is no WebSocket address, or is unencrypted and not on this machine.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("ws", "wss") and parts.hostname and (parts.port or True)
    except ValueError:  # unmatched brackets or an invalid port
        usable = False
    if not usable:
        raise LinkSetupError(f"'{url}' is no address of a cloud; allowed: wss://host[:port]/path")
    if parts.scheme == "ws" and not is_loopback(parts.hostname or ""):
        raise LinkSetupError(f"'{url}' would send its data unencrypted; use wss:// for any host but this one")


def check_cloud(url: str, certificates: str | None = None) -> None:
    """Check that an address and a file of certificates are usable; opens no connection.

    Raises:
        LinkSetupError: see :func:`check_url` and :func:`trusting`.
    """
    check_url(url)
    if certificates is not None:
        trusting(certificates)


def trusting(certificates: str | None) -> ssl.SSLContext:
    """TLS 1.3 context that trusts the certificates in this file, or the system's if None.

    Raises:
        LinkSetupError: the file cannot be read or holds no certificates.
    """
    try:
        context = ssl.create_default_context(cafile=certificates)
    except OSError as error:  # ssl.SSLError is a subclass
        raise LinkSetupError(f"no certificates can be read from '{certificates}': {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class _RequestFirst(ClientConnection):
    """Connection that reads nothing before it has sent its request.

    A TLS 1.3 server sends session tickets at once. OpenSSL must not receive them in one thread while another sends: the
    request would sometimes be lost, and the handshake would wait for its answer until it times out.
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
    """Channel that sends frames as binary WebSocket messages.

    Args:
        url: ``wss://host/v1/split``; ``ws://`` only to this machine, where nobody can eavesdrop.
        token: bearer token; the first one of several separated by commas.
        headers: additional headers, such as the one by which a router keeps a session at one replica.
        certificates: file of certificates to trust instead of the system's.
        timeout_s: timeout of the handshake in seconds.

    Raises:
        LinkSetupError: the address is unusable, or the server refused the token.
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
            raise LinkSetupError("the token holds line breaks or other characters that cannot be sent")
        sent = {**(headers or {}), **bearer(token)}
        context = trusting(certificates) if urlsplit(url).scheme == "wss" else None
        try:
            # Coded hidden states do not compress: the extension would only cost time at both ends.
            self._socket = connect(
                url,
                additional_headers=sent,
                ssl=context,
                compression=None,
                max_size=MAX_FRAME,
                open_timeout=timeout_s,
                close_timeout=2,
                proxy=proxy_for(url),
                create_connection=_RequestFirst,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in (401, 403):
                raise LinkSetupError(f"{url} refused the token (HTTP {status})") from None
            if status == 404:
                raise LinkSetupError(f"{url} has nothing to connect to (HTTP 404)") from None
            raise LinkDown(f"{url} answered HTTP {status}") from None
        except InvalidURI as error:
            raise LinkSetupError(f"'{url}' is no address of a cloud: {error}") from None
        except ssl.SSLCertVerificationError as error:
            raise LinkSetupError(f"{url}: its certificate is not trusted ({error.verify_message})") from None
        except ConnectionRefusedError:
            raise LinkDown(f"nobody listens at {url}") from None
        except (OSError, TimeoutError, WebSocketException) as error:
            raise LinkDown(f"{url} cannot be reached: {error or type(error).__name__}") from None

    def send(self, data: bytes) -> None:
        """Send one message."""
        try:
            self._socket.send(data)
        except (ConnectionClosed, OSError) as error:
            raise LinkDown(f"the connection broke: {error}") from None

    def receive(self, timeout_s: float) -> bytes:
        """Receive the next message."""
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
