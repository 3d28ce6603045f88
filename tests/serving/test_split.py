"""Middle of a split model on Ray Serve, with sessions of edges, one of them behind an unmodified `openai` client."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest
import ray
import torch
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from raycloud.edge.endpoint import CloudEndpoint, load_split
from raycloud.edge.split_model import SplitModel
from raycloud.edge.whole_model import load_whole
from raycloud.errors import LinkError, RecipeError
from raycloud.link.frames import ErrorReply, Frame, SessionKind, parse_body, unpack
from raycloud.link.meter import Meter
from raycloud.link.websocket import WebSocketChannel
from raycloud.models.text_model import TextModel
from raycloud.serving.split import SplitSettings, app
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.parts import export
from raycloud.split.plan import PlanSet, SplitPlan

CONFIG = Path(__file__).parents[2] / "serve_apps" / "split.yaml"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOKEN = "s3cret"


TOKENS = 96


@pytest.fixture(scope="module")
def parts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the parts of the tiny model."""
    out = tmp_path_factory.mktemp("exported") / "parts"
    export(str(tiny_llama), PlanSet.of(SplitPlan(1, 3)), out)
    return out


@pytest.fixture(scope="module")
def cloud(serve_port: int, parts: Path) -> Iterator[CloudEndpoint]:
    """Cloud with two tokens, which has only its own part."""
    settings = SplitSettings(
        model=str(parts / "cloud"),
        name="tiny",
        token=f"{TOKEN},other",
        limits=InferenceLimits(lease_s=10, sessions=16, tokens=TOKENS),
        num_cpus=0.2,
        threads=1,
    )
    serve.run(app(settings), name="split", route_prefix="/split")
    yield CloudEndpoint(f"ws://127.0.0.1:{serve_port}/split/v1/split", TOKEN)
    serve.delete("split")


@pytest.fixture(scope="module")
def edge(cloud: CloudEndpoint, parts: Path) -> TextModel:
    """Load the edge's side from only its own part."""
    # On a busy machine a replica that was killed is replaced slowly.
    return load_split(str(parts / "edge"), cloud, codec="float32", device="cpu", patience_s=240)


def sessions(cloud: CloudEndpoint) -> int:
    address = cloud.url.replace("ws:", "http:").replace("/v1/split", "/healthz")
    with urlopen(address, timeout=120) as answer:
        return int(json.load(answer)["sessions"])


def until(condition: Any, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


def test_text_is_that_of_the_whole_model(edge: TextModel, tiny_llama: Path, cloud: CloudEndpoint) -> None:
    prompt = list(range(5, 40))
    reference = list(load_whole(str(tiny_llama)).source.stream(prompt, 20))
    assert list(edge.source.stream(prompt, 20)) == reference
    made: list[list[int]] = []
    threads = [threading.Thread(target=lambda: made.append(list(edge.source.stream(prompt, 20)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [reference] * 4
    assert until(lambda: sessions(cloud) == 0)


def test_a_split_model_of_the_python_api_writes_the_same(cloud: CloudEndpoint, parts: Path, tiny_llama: Path) -> None:
    """Its blocks in the cloud, or all here."""
    prompt, make = "The three primary colours are", SplitModel.from_pretrained
    here = make(str(tiny_llama), start_block=1, end_block=3)
    there = make(
        str(parts / "edge"), start_block=1, end_block=3, cloud=cloud.url, token=TOKEN, codec="float32", device="cpu"
    )
    assert there.generate(prompt, max_new_tokens=12) == here.generate(prompt, max_new_tokens=12) != ""


def test_a_text_may_be_as_long_as_the_cloud_grants(edge: TextModel) -> None:
    prompt = list(range(5, 40))
    assert edge.source.max_length == TOKENS
    assert len(list(edge.source.stream(prompt, TOKENS - len(prompt)))) == TOKENS - len(prompt)


def test_a_killed_replica_changes_no_token(edge: TextModel, tiny_llama: Path) -> None:
    prompt, made = list(range(5, 20)), []
    for token in edge.source.stream(prompt, 16):
        made.append(token)
        if len(made) == 5:
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if "#split#" in actor["name"]:
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
    assert made == list(load_whole(str(tiny_llama)).source.stream(prompt, 16))


def test_who_has_no_token_gets_nothing(cloud: CloudEndpoint, parts: Path) -> None:
    for token in (None, "guess"):
        stranger = CloudEndpoint(cloud.url, token)
        with pytest.raises(LinkError, match="refused the token"):
            stranger.server_info()
        with pytest.raises(LinkError, match="refused the token"):
            stranger.channel(Meter(), "0" * 32)
    with pytest.raises(LinkError, match="does not offer codec 'int8'; it offers: float32, float16, bfloat16"):
        load_split(str(parts / "edge"), cloud, codec="int8")


def test_another_model_is_refused(cloud: CloudEndpoint) -> None:
    with pytest.raises(LinkError, match=r"is not the model that .* serves; their fingerprints are"):
        load_split("builtin:smollm2-135m-instruct", cloud)


def test_a_session_belongs_to_who_opened_it(edge: TextModel, cloud: CloudEndpoint) -> None:
    triad = edge.source.open()  # type: ignore[attr-defined]
    triad.advance(torch.tensor([[5, 6]]))
    session = triad._cloud_blocks._client.session
    for token, code in (("other", "unknown-session"), (TOKEN, "epoch")):
        channel = WebSocketChannel(cloud.url, token=token)
        channel.send(Frame(SessionKind.RESUME, session).pack())
        assert parse_body(unpack(channel.receive(20)), ErrorReply).code == code
        channel.close()
    triad.close()
    assert until(lambda: sessions(cloud) == 0)


def test_an_abandoned_session_ends_with_its_lease(edge: TextModel, cloud: CloudEndpoint) -> None:
    triad = edge.source.open()  # type: ignore[attr-defined]
    triad.advance(torch.tensor([[5, 6]]))
    triad._cloud_blocks._client._channel.close()
    assert sessions(cloud) == 1
    assert until(lambda: sessions(cloud) == 0)


def test_an_openai_client_of_the_edge_is_served_through_the_cloud(
    cloud: CloudEndpoint, parts: Path, tiny_llama: Path
) -> None:
    """Run `raycloud edge serve` in a process of its own, with only the edge's part."""
    words = ["serve", "--model", str(parts / "edge"), "--name", "tiny", "--port", "0", "--codec", "float32"]
    words += ["--cloud", cloud.url, "--token", TOKEN]
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", "raycloud", "edge", *words], stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving 'tiny': base_url=http://127.0.0.1:"), line + process.communicate()[1]
        url = line.split("base_url=")[1].split()[0]
        with openai.OpenAI(base_url=url, api_key="anything", max_retries=0, timeout=240) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            asked: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 12}
            answer = client.chat.completions.create(**asked)
            text = answer.choices[0].message.content or ""
            model = load_whole(str(tiny_llama))
            assert text == "".join(piece.text for piece in model.pieces(model.chat_prompt(HELLO), 12))
            assert answer.usage is not None and answer.usage.completion_tokens == 12
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
            assert chunks[-1].usage == answer.usage
            stopped = client.chat.completions.create(**asked, stop=text[5:9]).choices[0]
            assert (stopped.message.content, stopped.finish_reason) == (text[: text.find(text[5:9])], "stop")
            drawn = [
                client.completions.create(model="tiny", prompt="so", seed=4, max_tokens=9).choices[0].text
                for _ in range(2)
            ]
            assert drawn[0] == drawn[1]
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(model="tiny", prompt="x " * 3000)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="large", prompt="x")
        assert until(lambda: sessions(cloud) == 0)
    finally:
        process.terminate()
        process.communicate(timeout=120)


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="sesions"):
        SplitSettings.model_validate({"model": "m", "sesions": 3})
    with pytest.raises(RecipeError, match="RAYCLOUD_TOKEN"):
        _ = SplitSettings(model="m", token=" ,").tokens
    with pytest.raises(RecipeError, match="both start_block and end_block"):
        _ = SplitSettings(model="m", start_block=3).plans


def test_the_config_file_deploys_the_application() -> None:
    read = yaml.safe_load(CONFIG.read_text())
    config = ServeDeploySchema.model_validate(read)
    assert config.http_options.host == "127.0.0.1"
    [application] = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is app
    settings = SplitSettings.model_validate(application.args)
    assert settings.plans == PlanSet.of(SplitPlan(4, 26)) and settings.token is None
