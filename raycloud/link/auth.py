"""Bearer tokens: the ones a server accepts, the one a client sends, and the delay after repeated wrong tokens."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from raycloud.errors import RecipeError

TOKEN = "RAYCLOUD_TOKEN"

_LOG = logging.getLogger(__name__)
_FREE = 3
"""Refusals in a row without a delay, for typing errors."""
_FIRST_S, _LONGEST_S = 0.25, 8.0
_FORGET_S = 60.0
_ADDRESSES = 4096
"""Number of addresses kept; the one refused longest ago is removed first."""
_WAITING = 64
"""Number of refusals delayed at a time; more are answered immediately, since a delayed one holds a connection."""


def tokens_of(given: str | None) -> list[str]:
    """Split a setting into its tokens, which are separated by commas."""
    return [token for part in (given or "").split(",") if (token := part.strip())]


def server_tokens(given: str | None) -> list[str]:
    """Tokens that a server accepts: the given ones, or those in the variable RAYCLOUD_TOKEN.

    Raises:
        RecipeError: there is no token.
    """
    tokens = tokens_of(given or os.environ.get(TOKEN))
    if not tokens:
        raise RecipeError(f"no token: set {TOKEN} or the argument token; whoever connects must bring it")
    return tokens


def bearer(given: str | None) -> dict[str, str]:
    """Authorization header with the first token of a setting; empty if the setting holds none."""
    tokens = tokens_of(given)
    return {"Authorization": f"Bearer {tokens[0]}"} if tokens else {}


class Authenticator:
    """Authenticator that accepts a list of tokens; repeated refusals of one address are delayed and logged.

    The first three refusals in a row are answered at once. Each further one takes twice as long as the one before, up
    to eight seconds, until the address has sent no wrong token for a minute. Right tokens are never delayed.

    Args:
        tokens: accepted tokens.
        sleep: coroutine function that waits a number of seconds.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._sleep, self._clock = sleep, clock
        self._refused: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._waiting = 0

    def principal(self, authorization: str | None) -> str | None:
        """Principal of an ``Authorization`` header; None if wrong. It compares every token in constant time."""
        brought = _brought(authorization)
        digest = hashlib.sha256(brought.encode()).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return _short(digest) if any(matches) and brought else None

    async def admit(self, authorization: str | None, address: str) -> str | None:
        """Principal of an ``Authorization`` header; None for a wrong token, after a delay if it is repeated.

        Args:
            authorization: value of the header.
            address: host that sent it.
        """
        principal = self.principal(authorization)
        if principal is None:
            count = self._count(address)
            brought = _brought(authorization)
            who = f"token {_short(hashlib.sha256(brought.encode()).digest())}" if brought else "no token"
            if count <= _FREE or count & (count - 1) == 0:  # a flood must not fill the log
                _LOG.warning("refused %s: %s, %d in a row", address, who, count)
            if count > _FREE and self._waiting < _WAITING:
                self._waiting += 1
                try:
                    await self._sleep(min(_LONGEST_S, _FIRST_S * 2.0 ** min(count - _FREE - 1, 16)))
                finally:
                    self._waiting -= 1
        return principal

    def _count(self, address: str) -> int:
        """Count a refusal and return the number of refusals in a row of this address, this one included."""
        now = self._clock()
        before, last = self._refused.pop(address, (0, now))
        count = before + 1 if now - last < _FORGET_S else 1
        self._refused[address] = (count, now)
        if len(self._refused) > _ADDRESSES:
            self._refused.popitem(last=False)
        return count


def _brought(authorization: str | None) -> str:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _short(digest: bytes) -> str:
    return digest.hex()[:16]
