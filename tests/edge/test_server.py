"""Edge server, used by the unmodified `openai` package."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from raycloud.edge.server import address_of, bind, create_app
from raycloud.edge.whole_model import load_whole
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
    """Client of a server with a small random model."""
    with running(create_app(load_whole(str(tiny_llama)), "tiny")) as url, client(url) as made:
        yield made


def client(url: str, key: str = "anything") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=240)


def raw(url: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    at = urlsplit(url)
    given = {"Content-Type": "application/json", **headers}
    with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=120)) as connection:
        connection.request("GET" if body is None else "POST", path, body, given)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def opened(url: str, stream: bool) -> http.client.HTTPConnection:
    """Connection whose answer is never read."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=120)
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
    model = load_whole("builtin:smollm2-135m-instruct")
    with running(create_app(model, "smollm2")) as url, client(url) as openai_client:
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        answer = openai_client.chat.completions.create(model="smollm2", messages=question, temperature=0)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"best_of": 2}, "best_of", "not supported"),
        ({"min_pp": 0.1}, "min_pp", "not known here; allowed: chat_template_kwargs, frequency_penalty, "),
        ({"echo": True}, "echo", "not known here"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"top_logprobs": 2}, None, "top_logprobs needs logprobs: true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
        ({"min_tokens": 5, "max_tokens": 4}, None, "min_tokens 5 is above the 4 tokens"),
        ({"stop_token_ids": [49_152]}, "stop_token_ids", "no token 49152; allowed: 0 to 49151"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "no token 49152; allowed: 0 to 49151"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking", "allowed: none"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "template does not accept any"),
        ({"tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "leave it out or use True"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
            "response_format.json_schema.schema",
            "Invalid type: nope",
        ),
        ({"messages": [{"role": "user", "content": "a", "nmae": "b"}]}, "messages[0].nmae", "allowed: annotations, "),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content is missing"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "does not accept 'tool'; allowed: system, ",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            "messages[0].tool_calls",
            "template does not accept any",
        ),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'assistant' or 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "not text"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "messages", "context is 2048 tokens"),
    ],
)
def test_wrong_requests_are_answered_with_the_field_and_what_is_allowed(
    tiny: openai.OpenAI, change: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.chat.completions.create(model="tiny", messages=HELLO, extra_body=change)
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
        user="me",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        extra_body={"best_of": 1, "suffix": None, "safety_identifier": "me"},
    )


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "a"], [-1], [True], [[49_152]], {"a": 1}, ["a"] * 129])
def test_prompts_that_are_none(tiny: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt"):
        tiny.completions.create(model="tiny", prompt=prompt)


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
    with running(create_app(Script(smol, "yes").model, "echo", tokens=["s3cret", "0ther"], meter=meter)) as url:
        for key in ("wrong", "s3cre", "s3cret2"):
            with client(url, key) as stranger, pytest.raises(openai.AuthenticationError) as refused:
                stranger.chat.completions.create(model="echo", messages=HELLO)
            assert refused.value.code == "invalid_api_key"
        assert raw(url, "/v1/models")[0] == raw(url, "/v1/models/healthz")[0] == 401
        for key in ("s3cret", "0ther"):
            with client(url, key) as friend:
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


def test_a_model_of_nan_answers_with_an_error_that_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    """Regression: it answered 200 with the first token repeated, or 500 without a message."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(one, torch.nan) for name, one in tensors.items()}, folder / "model.safetensors")
    said = r"the model's logits are not finite \(nan\), so no token can be chosen"
    hows: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"stream": True},
        {"max_tokens": 0, "echo": True, "logprobs": 1},
    ]
    with running(create_app(load_whole(str(folder)), "nan")) as url, client(url) as openai_client:
        for how in hows:
            with pytest.raises(openai.InternalServerError, match=said) as caught:
                openai_client.completions.create(model="nan", prompt="hello there", **how)
            assert (caught.value.status_code, caught.value.code) == (500, "model_error")


@pytest.mark.waits
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_generation(smol: PreTrainedTokenizerBase, stream: bool) -> None:
    source = Script(smol, "on and on", repeat=3_000, max_length=20_000, pause_s=0.01)
    with running(create_app(source.model, "echo")) as url:
        connection = opened(url, stream)
        while source.given < 3:
            time.sleep(0.01)
        assert source.open == 1
        connection.close()
        source.wait_closed()
        assert source.given < len(source.ids) / 2
        # The source is closed before its thread has ended.
        end = time.monotonic() + 100
        while raw(url, "/healthz")[1]["active"] and time.monotonic() < end:
            time.sleep(0.01)
        assert raw(url, "/healthz")[1]["active"] == 0


@pytest.mark.waits
def test_several_requests_run_at_once_and_too_many_are_refused(smol: PreTrainedTokenizerBase) -> None:
    gate = threading.Event()
    source = Script(smol, "all right", gate=gate)
    app = create_app(source.model, "echo", concurrency=2, waiting=1)
    with running(app) as url, client(url) as openai_client, ThreadPoolExecutor(3) as threads:

        def ask() -> str:
            answer = openai_client.chat.completions.create(model="echo", messages=HELLO)
            return str(answer.choices[0].message.content)

        answers = [threads.submit(ask) for _ in range(3)]
        end = time.monotonic() + 100
        # A request is active before its thread has rendered the prompt and asked the source.
        while (raw(url, "/healthz")[1]["active"] < 3 or source.open < 2) and time.monotonic() < end:
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


@pytest.mark.waits
def test_a_server_that_stops_says_so_to_open_answers(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "on", repeat=5000, max_length=10_000, pause_s=0.01)
    with running(create_app(source.model, "echo", concurrency=1)) as url:
        streaming = opened(url, stream=True)
        while source.given < 3:
            time.sleep(0.01)
        waiting = opened(url, stream=False)
        while raw(url, "/healthz")[1]["active"] < 2:
            time.sleep(0.01)
    source.wait_closed()
    assert len(source.asked) == 1
    answer = streaming.getresponse().read()
    assert answer.endswith(b'"code":"stopping"}}\n\n') and b"[DONE]" not in answer
    refused = waiting.getresponse()
    assert (refused.status, json.loads(refused.read())["error"]["message"]) == (503, "the server is stopping")
    streaming.close()
    waiting.close()


def test_other_machines_need_a_token() -> None:
    with pytest.raises(RaycloudError, match=r"--host 0\.0\.0\.0 can be reached .* RAYCLOUD_API_KEY"):
        bind("0.0.0.0", 0, None)
    with bind("0.0.0.0", 0, "s3cret") as listening:
        assert address_of(listening).startswith(f"http://{socket.gethostname()}:")
    with bind("localhost", 0, None) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(RaycloudError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port, None)
    with pytest.raises(RaycloudError, match=r"cannot listen on no\.such\.host"):
        bind("no.such.host", 0, "s3cret")
