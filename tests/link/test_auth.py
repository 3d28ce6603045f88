"""Bearer tokens: several in one setting, and delays after repeated wrong ones."""

from __future__ import annotations

import asyncio
import logging

import pytest

from raycloud.errors import RecipeError
from raycloud.link.auth import TOKEN, Authenticator, bearer, server_tokens


def test_a_setting_with_a_comma_is_two_tokens_for_servers_and_the_first_one_for_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TOKEN, "first, second,")
    assert server_tokens(None) == ["first", "second"]
    assert server_tokens("third") == ["third"]
    assert bearer("first, second,") == {"Authorization": "Bearer first"}
    assert bearer(None) == bearer(" , ") == {}
    known = Authenticator(server_tokens(None))
    assert known.principal("Bearer first") != known.principal("bearer second")
    assert None not in (known.principal("Bearer first"), known.principal("bearer second"))
    for wrong in ("Bearer first, second", "Bearer third", "Bearer ", "first", "Basic first", None):
        assert known.principal(wrong) is None
    monkeypatch.delenv(TOKEN)
    with pytest.raises(RecipeError, match="no token: set RAYCLOUD_TOKEN"):
        server_tokens(" , ")


class Time:
    """Fake clock that advances only when sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_repeated_refusals_of_an_address_are_slowed_down_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    known = Authenticator(["right"], sleep=time.sleep, clock=lambda: time.now)

    def ask(header: str | None, address: str = "192.0.2.7") -> str | None:
        return asyncio.run(known.admit(header, address))

    with caplog.at_level(logging.WARNING, "raycloud.link.auth"):
        for _ in range(3):
            assert ask("Bearer wrong") is None
        assert time.slept == []
        for _ in range(9):
            assert ask(None) is None
        assert time.slept == [0.25, 0.5, 1, 2, 4, 8, 8, 8, 8]
        assert ask("Bearer right") is not None
        assert ask("Bearer wrong", "192.0.2.8") is None
        assert len(time.slept) == 9  # neither a right token nor another address waits
    lines = [record.getMessage() for record in caplog.records]
    # The principal of a token is the beginning of its SHA-256; the token itself is in no log.
    assert lines[0] == "refused 192.0.2.7: token 8810ad581e59f2bc, 1 in a row"
    assert [line.rsplit(": ")[1] for line in lines[3:5]] == ["no token, 4 in a row", "no token, 8 in a row"]
    assert "wrong" not in "".join(lines)
    time.now += 60
    assert ask("Bearer wrong") is None
    assert len(time.slept) == 9  # forgotten after a minute


def test_a_flood_of_refusals_holds_no_more_than_a_few_connections() -> None:
    async def flood() -> tuple[int, int]:
        gate = asyncio.Event()
        waiting = 0

        async def sleep(_: float) -> None:
            nonlocal waiting
            waiting += 1
            await gate.wait()

        known = Authenticator(["right"], sleep=sleep)
        calls = [asyncio.ensure_future(known.admit(None, f"192.0.2.{index % 5}")) for index in range(500)]
        done, left = await asyncio.wait(calls, timeout=0.1)
        gate.set()
        assert set(await asyncio.gather(*left)) == {None}
        return waiting, len(done)

    waiting, at_once = asyncio.run(flood())
    assert waiting == 64
    assert at_once == 436
