"""Proxy selection and HTTP requests: connections are direct unless a proxy was configured for raycloud itself.

Variables such as ``http_proxy`` are set for browsers and package managers and are ignored here. The operator of such a
proxy could read an unencrypted request with its bearer token.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from contextlib import suppress
from http.client import HTTPMessage, HTTPResponse
from typing import IO
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

from raycloud.errors import LinkSetupError

PROXY = "RAYCLOUD_PROXY"
"""Environment variable with the address of a proxy for all hosts but this one."""


def is_loopback(host: str) -> bool:
    """Return whether a host, given by name or address, is this machine."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower().rstrip(".") == "localhost"


def proxy_for(url: str) -> str | None:
    """Proxy for an address, as ``http://[user:password@]host:port``; None for a direct connection.

    Raises:
        LinkSetupError: the variable ``RAYCLOUD_PROXY`` holds no such address.
    """
    proxy = os.environ.get(PROXY)
    if not proxy or is_loopback(urlsplit(url).hostname or ""):
        return None
    try:
        parts = urlsplit(proxy)
        usable = parts.scheme == "http" and parts.hostname and (parts.port or True) and parts.path in ("", "/")
    except ValueError:  # unmatched brackets or an invalid port
        usable = False
    if not usable:
        raise LinkSetupError(f"{PROXY} is no address of a proxy; allowed: http://[user:password@]host:port")
    return proxy


class _NoRedirect(HTTPRedirectHandler):
    """Handler that treats a redirect as an error: the request's token is only for the named host."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        return None


def open_url(request: Request, *, timeout_s: float, context: ssl.SSLContext | None = None) -> HTTPResponse:
    """Send an HTTP request, through the proxy of :func:`proxy_for` if there is one, and follow no redirect.

    Args:
        request: request to an ``http`` or ``https`` address.
        timeout_s: timeout in seconds of connecting and of each read.
        context: TLS context with the certificates to trust; the system's if None.

    Raises:
        urllib.error.HTTPError: the answer is an error or a redirect.
        OSError: there is no answer.
    """
    proxy = proxy_for(request.full_url)
    proxies = {} if proxy is None else {"http": proxy, "https": proxy}
    opener = build_opener(ProxyHandler(proxies), HTTPSHandler(context=context), _NoRedirect())
    answer: HTTPResponse = opener.open(request, timeout=timeout_s)
    return answer
