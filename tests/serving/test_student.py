"""Distilled student on Ray Serve, used by the `openai` package."""

from __future__ import annotations

import http.client
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from raycloud.errors import RecipeError
from raycloud.serving.student import StudentSettings, app

CONFIG = Path(__file__).parents[2] / "serve_apps" / "student.yaml"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def student(serve_port: int, tiny_llama: Path) -> Iterator[str]:
    """Deploy a student with a token; yield its base URL."""
    settings = StudentSettings(model=str(tiny_llama), name="tiny", token="s3cret", concurrency=2, num_cpus=0.2)
    serve.run(app(settings), name="student", route_prefix="/student")
    yield f"http://127.0.0.1:{serve_port}/student/v1"
    serve.delete("student")


@pytest.fixture
def client(student: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=student, api_key="s3cret", max_retries=0, timeout=240) as made:
        yield made


def test_chat_streaming_stop_and_usage(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 12}
    answer = client.chat.completions.create(**asked)
    text = answer.choices[0].message.content or ""
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage == answer.usage
    stopped = client.chat.completions.create(**asked, stop=text[5:9])
    assert stopped.choices[0].message.content == text[: text.find(text[5:9])]
    assert stopped.choices[0].finish_reason == "stop"


def test_errors_and_the_token(client: openai.OpenAI, student: str) -> None:
    with pytest.raises(openai.BadRequestError, match="context is 2048 tokens") as caught:
        client.completions.create(model="tiny", prompt="x " * 3000)
    assert caught.value.code == "context_length_exceeded"
    stranger = client.with_options(api_key="guess")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert health(student)["status"] == "ok"


def test_what_is_unknown_or_too_large_is_refused(client: openai.OpenAI, student: str) -> None:
    with pytest.raises(openai.BadRequestError, match="min_pp: this field is not known here; allowed: "):
        client.completions.create(model="tiny", prompt="so", extra_body={"min_pp": 1})
    with pytest.raises(openai.APIStatusError, match="the body is too large") as caught:
        client.completions.create(model="tiny", prompt="x " * 4_000_000)
    assert caught.value.status_code == 413
    assert health(student)["status"] == "ok"
    scored = client.completions.create(model="tiny", prompt="so it goes", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].logprobs is not None and len(scored.choices[0].logprobs.tokens or ()) == 3


@pytest.mark.waits
def test_a_client_that_leaves_frees_the_replica(student: str) -> None:
    at = urlsplit(student)
    connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=120)
    body = json.dumps({"model": "tiny", "prompt": "so", "max_tokens": 2000, "n": 16, "stream": True})
    headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
    connection.request("POST", "/student/v1/completions", body, headers)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    assert health(student)["active"] == 1
    answer.close()
    connection.close()
    end = time.monotonic() + 120
    while health(student)["active"] and time.monotonic() < end:
        time.sleep(0.05)
    assert health(student)["active"] == 0


def health(url: str) -> dict[str, Any]:
    at = urlsplit(url)
    with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=120)) as connection:
        connection.request("GET", "/student/healthz")
        return dict(json.loads(connection.getresponse().read()))


def test_no_application_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCLOUD_TOKEN", raising=False)
    with pytest.raises(RecipeError, match="no token: set RAYCLOUD_TOKEN"):
        app(StudentSettings(model="builtin:smollm2-135m-instruct"))


def test_the_config_file_fits_serve_and_the_builder() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert config.http_options.host == "127.0.0.1"
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is app
    StudentSettings.model_validate(application.args)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        StudentSettings.model_validate({**application.args, "modle": "x"})
