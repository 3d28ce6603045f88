"""The `openai` package, unmodified, against the edge server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from transformers import PreTrainedTokenizerBase

from raycloud.edge.local import whole
from raycloud.edge.server import address_of, bind, create_app
from raycloud.errors import LinkError, RaycloudError
from raycloud.link.meter import Meter
from raycloud.models.loading import load_tokenizer, resolve
from tests.edge.sources import Script, running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Iterator[openai.OpenAI]:
    """A client of a server of a small random model."""
    with running(create_app(whole(str(tiny_llama)), "tiny")) as url, client(url) as made:
        yield made


def client(url: str, key: str = "anything") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


def raw(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=20)
    given = {"Content-Type": "application/json", **headers}
    connection.request("GET" if body is None else "POST", path, body, given)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def opened(url: str, stream: bool) -> http.client.HTTPConnection:
    """A connection whose answer nobody reads."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=20)
    body = json.dumps({"model": "echo", "messages": HELLO, "stream": stream})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection


def test_a_chat_answers_with_text_and_usage(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "Bonjour, 世界 😀!")
    with running(create_app(source.model, "echo")) as url, client(url) as openai_client:
        parts: list[Any] = [
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
        ]
        answer = openai_client.chat.completions.create(model="echo", messages=parts, user="me", metadata={"a": "b"})
        assert answer.choices[0].message.content == "Bonjour, 世界 😀!"
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        prompt = source.model.chat_prompt(HELLO)
        assert source.asked[0][0] == prompt
        assert source.asked[0][1] == 1000 - len(prompt)  # as many as fit
        assert source.asked[0][2].temperature == 1.0  # OpenAI's default
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(source.ids))
        assert answer.usage.total_tokens == len(prompt) + len(source.ids)
        assert [model.id for model in openai_client.models.list()] == ["echo"]
        assert openai_client.models.retrieve("echo").owned_by == "raycloud"


def test_a_streamed_chat_is_the_same_text_in_pieces(smol: PreTrainedTokenizerBase) -> None:
    text = "Bonjour, 世界 😀!"
    with running(create_app(Script(smol, text).model, "echo")) as url, client(url) as openai_client:
        options: Any = {"include_usage": True}
        chunks = list(
            openai_client.chat.completions.create(model="echo", messages=HELLO, stream=True, stream_options=options)
        )
    *body, tally = chunks
    assert body[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in body]
    assert "".join(texts) == text and sum(map(bool, texts)) > 3
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["stop"]
    assert tally.choices == [] and tally.usage is not None
    assert tally.usage.completion_tokens == len(smol(text)["input_ids"])
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_whole_and_streamed(tiny: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "Once upon", "temperature": 0}
    answer = tiny.completions.create(**asked)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 16  # OpenAI's default
    chunks = list(tiny.completions.create(**{**asked, "prompt": ["Once upon"]}, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_seed_repeats_an_answer_and_another_does_not(tiny: openai.OpenAI) -> None:
    def said(seed: int, **more: Any) -> str:
        answer = tiny.chat.completions.create(model="tiny", messages=HELLO, seed=seed, max_completion_tokens=12, **more)
        return str(answer.choices[0].message.content)

    assert said(1) == said(1) != said(2)
    assert said(1, extra_body={"top_k": 1}) == said(2, temperature=0)
    assert said(1, top_p=1e-9) == said(1, temperature=0)
    penalised = said(1, temperature=0, extra_body={"repetition_penalty": 1.5})
    assert penalised == said(2, temperature=0, extra_body={"repetition_penalty": 1.5})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["\nUser:", ["never", "ser:"]])
def test_stop_strings_across_tokens_end_the_answer(smol: PreTrainedTokenizerBase, stop: Any, stream: bool) -> None:
    source = Script(smol, "One. Two.\nUser: three and four and five and six")
    expected = "One. Two." if isinstance(stop, str) else "One. Two.\nU"
    with running(create_app(source.model, "echo")) as url, client(url) as openai_client:
        asked: Any = {"model": "echo", "messages": HELLO, "stop": stop}
        if stream:
            chunks = list(openai_client.chat.completions.create(**asked, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            choice = openai_client.chat.completions.create(**asked).choices[0]
            text, finish = choice.message.content or "", choice.finish_reason
    assert (text, finish) == (expected, "stop")
    source.wait_closed()
    assert source.given < len(source.ids) - 5


def test_a_limit_ends_the_answer(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "one two three four")
    with running(create_app(source.model, "echo")) as url, client(url) as openai_client:
        answer = openai_client.chat.completions.create(model="echo", messages=HELLO, max_tokens=2)
        assert answer.choices[0].message.content == "one two"
        assert answer.choices[0].finish_reason == "length"
        # A limit beyond the context is cut to what fits.
        openai_client.chat.completions.create(model="echo", messages=HELLO, max_tokens=100_000)
        assert source.asked[1][1] == 1000 - len(source.asked[1][0])


def test_the_real_model_knows_a_capital(tmp_path: Path) -> None:
    model = whole("builtin:smollm2-135m-instruct")
    with running(create_app(model, "smollm2")) as url, client(url) as openai_client:
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        answer = openai_client.chat.completions.create(model="smollm2", messages=question, temperature=0)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"presence_penalty": 1}, "presence_penalty", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "no text"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "messages", "context is 2048 tokens"),
    ],
)
def test_wrong_requests_are_answered_with_the_field_and_what_is_allowed(
    tiny: openai.OpenAI, change: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.chat.completions.create(**{"model": "tiny", "messages": HELLO, **change})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert words in caught.value.body["message"]  # type: ignore[index, call-overload]
    assert "\n" not in caught.value.body["message"]  # type: ignore[index, call-overload]
    assert (caught.value.code == "context_length_exceeded") == ("context" in words)


def test_fields_that_ask_for_nothing_are_taken(tiny: openai.OpenAI) -> None:
    tiny.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=1,
        n=1,
        frequency_penalty=0.0,
        presence_penalty=0,
        logprobs=False,
        logit_bias={},
        response_format={"type": "text"},
        stop=None,
        temperature=None,
        extra_body={"unknown": 1},
    )


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [[1]], ""])
def test_a_completion_takes_one_text(tiny: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt"):
        tiny.completions.create(model="tiny", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        tiny.completions.create(model="tiny", prompt="a", logprobs=0)


def test_errors_of_http_have_the_same_shape(tiny: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as missing:
        tiny.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        tiny.models.retrieve("gpt-4")
    url = str(tiny.base_url)
    assert raw(url, "/v1/embeddings", b"{}")[1]["error"]["message"] == "Not Found: POST /v1/embeddings"
    assert raw(url, "/v1/chat/completions")[0] == 405
    status, body = raw(url, "/v1/completions", b"{no")
    assert (status, body["error"]["message"]) == (400, "the body is not valid JSON")
    for odd in (
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b"[" * 9999,
    ):
        assert raw(url, "/v1/completions", odd)[0] == 400
    status, body = raw(url, "/v1/completions", b"{}")
    assert (status, body["error"]["param"]) == (400, "model")


def test_a_model_without_chat_template_still_completes() -> None:
    bare = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    bare.chat_template = None
    with running(create_app(Script(bare, "done").model, "base")) as url, client(url) as openai_client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            openai_client.chat.completions.create(model="base", messages=HELLO)
        assert openai_client.completions.create(model="base", prompt="so").choices[0].text == "done"


def test_only_the_token_opens_the_server(smol: PreTrainedTokenizerBase) -> None:
    meter = Meter()
    meter.add("up", 12)
    with running(create_app(Script(smol, "yes").model, "echo", token="s3cret", meter=meter)) as url:
        for key in ("wrong", "s3cre", "s3cret2"):
            with client(url, key) as stranger, pytest.raises(openai.AuthenticationError) as refused:
                stranger.chat.completions.create(model="echo", messages=HELLO)
            assert refused.value.code == "invalid_api_key"
        assert raw(url, "/v1/models")[0] == raw(url, "/v1/models/healthz")[0] == 401
        with client(url, "s3cret") as friend:
            assert friend.models.list().data[0].id == "echo"
        status, health = raw(url, "/healthz")
        assert (status, health["status"], health["link"]["bytes"]) == (200, "ok", {"up": 12})


def test_a_link_that_breaks_ends_an_answer_with_a_clear_error(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "so far", error=LinkError("the cloud went away"))
    with running(create_app(source.model, "echo")) as url, client(url) as openai_client:
        with pytest.raises(openai.InternalServerError, match="the cloud went away") as whole_answer:
            openai_client.chat.completions.create(model="echo", messages=HELLO)
        assert (whole_answer.value.status_code, whole_answer.value.code) == (503, "link_error")
        text = []
        stream = openai_client.chat.completions.create(model="echo", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the cloud went away"):
            text.extend(chunk.choices[0].delta.content or "" for chunk in stream)
        assert "".join(text) == "so far"
        source.ids = []  # it breaks before the first token
        with pytest.raises(openai.InternalServerError, match="the cloud went away"):
            openai_client.chat.completions.create(model="echo", messages=HELLO, stream=True)
        source.error = RuntimeError("secret of the inside")
        with pytest.raises(openai.InternalServerError) as inside:
            openai_client.chat.completions.create(model="echo", messages=HELLO)
        assert "secret" not in str(inside.value)
        source.error = None
        assert openai_client.chat.completions.create(model="echo", messages=HELLO).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_generation(smol: PreTrainedTokenizerBase, stream: bool) -> None:
    source = Script(smol, "on and on", repeat=300, max_length=10_000, pause_s=0.01)
    with running(create_app(source.model, "echo")) as url:
        connection = opened(url, stream)
        while source.given < 3:
            time.sleep(0.01)
        assert source.open == 1
        connection.close()
        source.wait_closed(3)
        assert source.given < len(source.ids) / 2
        assert raw(url, "/healthz")[1]["active"] == 0


def test_several_requests_run_at_once_and_too_many_are_refused(smol: PreTrainedTokenizerBase) -> None:
    gate = threading.Event()
    source = Script(smol, "all right", gate=gate)
    app = create_app(source.model, "echo", concurrency=2, waiting=1)
    with running(app) as url, client(url) as openai_client, ThreadPoolExecutor(3) as threads:

        def ask() -> str:
            answer = openai_client.chat.completions.create(model="echo", messages=HELLO)
            return str(answer.choices[0].message.content)

        answers = [threads.submit(ask) for _ in range(3)]
        end = time.monotonic() + 10
        while raw(url, "/healthz")[1]["active"] < 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert source.open == 2
        with pytest.raises(openai.RateLimitError):
            ask()
        gate.set()
        assert [answer.result() for answer in answers] == ["all right"] * 3
        assert source.most_open == 2


def test_answers_at_once_are_those_one_by_one(tiny: openai.OpenAI) -> None:
    def said(seed: int) -> str:
        answer = tiny.chat.completions.create(model="tiny", messages=HELLO, seed=seed, max_tokens=12)
        return str(answer.choices[0].message.content)

    alone = [said(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(said, range(4))) == alone


def test_a_server_that_stops_says_so_to_open_answers(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "on", repeat=5000, max_length=10_000, pause_s=0.01)
    with running(create_app(source.model, "echo", concurrency=1)) as url:
        streaming = opened(url, stream=True)
        while source.given < 3:
            time.sleep(0.01)
        waiting = opened(url, stream=False)
        while raw(url, "/healthz")[1]["active"] < 2:
            time.sleep(0.01)
    source.wait_closed(3)
    assert len(source.asked) == 1
    answer = streaming.getresponse().read()
    assert answer.endswith(b'"code":"stopping"}}\n\n') and b"[DONE]" not in answer
    refused = waiting.getresponse()
    assert (refused.status, json.loads(refused.read())["error"]["message"]) == (503, "the server is stopping")
    streaming.close()
    waiting.close()


def test_other_machines_need_a_token() -> None:
    with pytest.raises(RaycloudError, match=r"--host 0\.0\.0\.0 can be reached .* RAYCLOUD_EDGE_TOKEN"):
        bind("0.0.0.0", 0, None)
    with bind("0.0.0.0", 0, "s3cret") as listening:
        assert address_of(listening).startswith(f"http://{socket.gethostname()}:")
    with bind("localhost", 0, None) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(RaycloudError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port, None)
    with pytest.raises(RaycloudError, match=r"cannot listen on no\.such\.host"):
        bind("no.such.host", 0, "s3cret")
