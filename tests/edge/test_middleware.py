"""One request stops nobody else: bodies are bounded in size and time, heads in time, and tokenising happens elsewhere.
Names of other machines do not reach a server without a token."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from transformers import PreTrainedTokenizerBase

from raycloud.edge.middleware import LocalHostMiddleware
from raycloud.edge.server import create_app
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.text_model import TextModel
from tests.edge.sources import Script, running

LONGEST = 81
"""Characters of SmolLM2's longest token, a line of spaces."""


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


@contextmanager
def asking(url: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=240)
    connection.request("GET" if body is None else "POST", path, body, headers)
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def said(answer: http.client.HTTPResponse) -> tuple[int, dict[str, Any]]:
    return answer.status, json.loads(answer.read()).get("error")


class Gated:
    """Tokenizer that blocks until the test releases it."""

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner, self.asked, self.released = inner, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)

    def _wait(self) -> None:
        self.asked.set()
        assert self.released.wait(240)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._wait()
        return self._inner(*arguments, **options)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        self._wait()
        return self._inner.apply_chat_template(*arguments, **options)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "hello"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ],
)
def test_others_are_answered_while_a_prompt_is_tokenised(
    smol: PreTrainedTokenizerBase, path: str, body: dict[str, Any]
) -> None:
    gated = Gated(smol)
    model = TextModel(Script(smol, "yes"), gated, frozenset())  # type: ignore[arg-type]
    with running(create_app(model, "echo")) as url:
        answers: list[int] = []

        def ask() -> None:
            with asking(url, f"/v1/{path}", json.dumps({"model": "echo", **body})) as answer:
                answers.append(answer.status)

        asker = threading.Thread(target=ask)
        asker.start()
        try:
            assert gated.asked.wait(240)
            with asking(url, "/healthz") as health:
                assert json.loads(health.read())["active"] == 1
            assert answers == []
        finally:
            gated.released.set()
            asker.join(60)
        assert answers == [200]


def test_threads_find_the_tokenizer_as_it_stays() -> None:
    """Regression: changing the tokenizer while another thread reads it raises "Already borrowed"."""
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    create_app(Script(tokenizer, "yes").model, "echo")
    backend = tokenizer.backend_tokenizer
    assert (backend.truncation, backend.padding, backend.encode_special_tokens) == (None, None, False)


def test_what_cannot_fit_is_refused_before_it_is_tokenised(smol: PreTrainedTokenizerBase) -> None:
    gated = Gated(smol)
    with running(create_app(TextModel(Script(smol, "yes"), gated, frozenset()), "echo")) as url:  # type: ignore[arg-type]
        long = "x" * (LONGEST * 1000 + 1)
        for path, body in (
            ("completions", {"prompt": long}),
            ("chat/completions", {"messages": [{"role": "user", "content": long[:50_000]}] * 2}),
        ):
            with asking(url, f"/v1/{path}", json.dumps({"model": "echo", **body})) as answer:
                status, error = said(answer)
            assert (status, error["code"]) == (400, "context_length_exceeded")
            assert "this model's context is 1000 tokens: at most 81000 characters are taken" in error["message"]
        assert not gated.asked.is_set()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_bounded_by_the_context(smol: PreTrainedTokenizerBase, chunked: bool) -> None:
    """Send 8 MB as a whole, and in chunks without a content length."""
    with running(create_app(Script(smol, "yes").model, "echo")) as url:
        body = json.dumps({"model": "echo", "prompt": "x" * 8_000_000}).encode()
        parts = (body[at : at + 100_000] for at in range(0, len(body), 100_000)) if chunked else body
        with asking(url, "/v1/completions", parts) as answer:
            status, error = said(answer)
            assert answer.headers["connection"] == "close"
        most = LONGEST * 1000 * 6 + 2**18
        assert (status, error["code"]) == (413, "body_too_large") and f"at most {most} bytes" in error["message"]
        with asking(url, "/healthz") as health:
            assert health.status == 200


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    at = urlsplit(url)
    with socket.create_connection((str(at.hostname), int(at.port or 0)), timeout=240) as connection:
        yield connection


def answered(connection: socket.socket) -> bytes:
    """Read the answer of a server until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.waits
@pytest.mark.parametrize("half", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A"])
def test_heads_that_do_not_end_are_given_up(smol: PreTrainedTokenizerBase, half: bytes) -> None:
    with running(create_app(Script(smol, "yes").model, "echo"), head_s=2) as url:
        with connected(url) as connection:
            connection.sendall(half)
            assert answered(connection).startswith(b"HTTP/1.1 408 ")
        with connected(url) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            # What follows a whole request on the same connection has its own time.
            connection.sendall(half or b"G")
            assert answered(connection).endswith(
                b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )


@pytest.mark.waits
def test_bodies_that_do_not_end_are_given_up(smol: PreTrainedTokenizerBase) -> None:
    with running(create_app(Script(smol, "yes").model, "echo", body_s=2)) as url:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        with connected(url) as connection:
            connection.sendall(head + b'{"model": ')
            answer = answered(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"the body did not come within 2 s" in answer
        # Nothing that takes long afterwards is counted as the body's time.
        with asking(url, "/v1/completions", json.dumps({"model": "echo", "prompt": "x"})) as whole:
            assert whole.status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:9"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:9000"}, 200),
        ({"Host": "LOCALHOST", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "my-box.lan:9000"}, 200),
        ({"Host": "evil.example:9000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "evil.example#@localhost"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_only_names_of_this_machine_are_let_in(
    smol: PreTrainedTokenizerBase, headers: dict[str, str], status: int
) -> None:
    app = create_app(Script(smol, "yes").model, "echo", allow_hosts=["My-Box.lan"])
    with running(app) as url, asking(url, "/v1/models", **headers) as answer:
        assert answer.status == status
        if status == 403:
            message = json.loads(answer.read())["error"]["message"]
            assert "allowed: localhost, 127.0.0.1, [::1], my-box.lan (--allow-host adds one)" in message


def test_a_token_is_enough_under_any_name(smol: PreTrainedTokenizerBase) -> None:
    app = create_app(Script(smol, "yes").model, "echo", tokens=["s3cret"])
    with running(app) as url:
        for token, status in (("s3cret", 200), ("guess", 401)):
            headers = {"Host": "edge.example", "Authorization": f"Bearer {token}"}
            with asking(url, "/v1/models", **headers) as answer:
                assert answer.status == status


def test_sockets_are_guarded_as_well() -> None:
    passed: list[str] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    guarded = LocalHostMiddleware(app)
    for host in (b"localhost:8000", b"evil.example"):
        asyncio.run(guarded({"type": "websocket", "headers": [(b"host", host)]}, receive, send))
    assert passed == ["websocket"]
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]
