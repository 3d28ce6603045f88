"""Teacher on Ray Serve: signals over its WebSocket, and a device without ray that stores them in files."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
import torch
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ServeDeploySchema

from raycloud.data.batches import Sample, collate
from raycloud.distill.signals import SignalRecipe, compute_signal, frozen_head
from raycloud.distill.signals.file import FileSignals, tokenizer_fingerprint
from raycloud.distill.signals.remote import RemoteSignals, SignalClient, SignalLimits
from raycloud.distill.signals.remote.fetch import FetchRecipe, fetch
from raycloud.distill.signals.remote.messages import SignalMessageKind
from raycloud.errors import DataError, LinkError, RecipeError
from raycloud.link.frames import ErrorReply, Frame, SessionKind, parse_body, unpack
from raycloud.link.meter import Meter
from raycloud.link.websocket import SESSION_HEADER, WebSocketChannel
from raycloud.models.loading import Pretrained, load, load_tokenizer
from raycloud.models.segments import Segment
from raycloud.models.weights import fingerprint, weights_of
from raycloud.serving.teacher import TeacherSettings, app

CONFIG = Path(__file__).parents[2] / "serve_apps" / "teacher.yaml"
TOKEN = "s3cret"
SAMPLES = [Sample(tuple(range(5 + n, 30 + 2 * n)), n) for n in range(4)]
# Without ray a device must do: whoever imports it there fails.
WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from raycloud.cli.app import main; main()"


@pytest.fixture(scope="module")
def url(serve_port: int, tiny_llama: Path) -> Iterator[str]:
    settings = TeacherSettings(
        model=str(tiny_llama),
        name="tiny",
        token=f"{TOKEN},other",
        limits=SignalLimits(samples=32, length=128),
        dtype="float32",
        num_cpus=0.2,
        resources={"cloud": 1},
        threads=1,
    )
    serve.run(app(settings), name="teacher", route_prefix="/teacher")
    yield f"ws://127.0.0.1:{serve_port}/teacher/v1/signals"
    serve.delete("teacher")


@pytest.fixture(scope="module")
def local(tiny_llama: Path) -> Pretrained:
    return load(str(tiny_llama), device="cpu", dtype="float32")


def connected(url: str) -> SignalClient:
    return SignalClient(
        lambda session: WebSocketChannel(url, token=TOKEN, headers={SESSION_HEADER: session}), timeout_s=240
    )


def test_signals_and_tables_are_the_teachers_own(url: str, local: Pretrained) -> None:
    link = connected(url)
    name = f"tiny@{fingerprint(weights_of(local.model))}"
    assert (link.info.teacher, link.info.tokenizer) == (name, tokenizer_fingerprint(local.tokenizer))
    assert (link.info.vocabulary_size, link.info.hidden_size) == (49_152, 16)
    batch = collate(SAMPLES, pad=7)
    for kind in ("hidden", "logits", "hybrid"):  # 20 MB of logits come in parts
        recipe = SignalRecipe(kind=kind, codec="float32", k=9, draws=5)
        found = RemoteSignals(link, link.source(recipe, [1.0, 2.0])).signal(batch)
        expected = compute_signal(Segment(local.model), name, batch, recipe, [1.0, 2.0])
        assert found.key == expected.key and found.payload.keys() == expected.payload.keys()
        assert all(torch.equal(found.payload[field], expected.payload[field]) for field in expected.payload)
    assert torch.equal(link.head("float32").weight, frozen_head(Segment(local.model), "float32").weight)
    with pytest.raises(LinkError, match="length 129; allowed: at most 128"):
        RemoteSignals(link, link.source(SignalRecipe(), [1.0])).signal(collate([Sample(tuple(range(129)), 1)], pad=0))
    with urlopen(url.replace("ws:", "http:").replace("/v1/signals", "/healthz"), timeout=240) as answer:
        assert json.load(answer) == {"status": "ok", "sessions": 1}
    link.close()


def test_who_has_no_token_gets_nothing(url: str) -> None:
    for token in (None, "guess", TOKEN[:-1], f"guess,{TOKEN}"):  # of two, a client shows the first
        with pytest.raises(LinkError, match="refused the token"):
            SignalClient(lambda _, token=token: WebSocketChannel(url, token=token), timeout_s=120)


def test_garbage_is_answered_and_the_teacher_serves_on(url: str) -> None:
    for garbage, code in ((b"x" * 200, "frame"), (Frame(SignalMessageKind.SIGNAL).pack(), "handshake")):
        channel = WebSocketChannel(url, token="other")
        channel.send(garbage)
        reply = unpack(channel.receive(20))
        assert reply.kind is SessionKind.ERROR and parse_body(reply, ErrorReply).code == code
        channel.close()
    link = connected(url)
    assert RemoteSignals(link, link.source(SignalRecipe(), [1.0])).signal(collate(SAMPLES, pad=0)).count > 0
    link.close()


def test_a_device_without_ray_fills_its_files_and_goes_on_where_it_was(
    url: str, local: Pretrained, tiny_llama: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "notes.jsonl", tmp_path / "signals"
    rows = [{"text": f"note {n}: the shop opens at {n % 24} and sells {n} things"} for n in range(90)]
    data.write_text("\n".join(map(json.dumps, rows)))
    other = tmp_path / "other"
    tokenizer = load_tokenizer(str(tiny_llama))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    shutil.copy(tiny_llama / "config.json", other)
    command = [sys.executable, "-c", WITHOUT_RAY, "signals", "fetch", "--teacher", url, "--data", str(data)]
    command += ["--tokenizer", str(tiny_llama), "--out", str(out), "--token", TOKEN, "split=all", "data.limit=10"]
    command += ["--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "samples: 10/10" in done.stdout and done.stderr == ""
    *_, said, last = done.stdout.splitlines()
    assert said.startswith(f"{out}: 10 samples; ") and json.loads(last)["samples"] == 10

    asked = {"teacher": url, "tokenizer": str(tiny_llama), "data": {"source": str(data)}, "output": str(out)}
    meter, moves = Meter(), []

    def again(token: str = TOKEN, **changes: object) -> FileSignals:
        recipe = FetchRecipe.model_validate({**asked, "split": "all", **changes})
        return fetch(recipe, token=token, meter=meter, on_progress=lambda *at: moves.append(at))

    assert len(again()) == 90 and moves[-1] == (90, 90)
    asks = meter.messages["SIGNAL"]
    assert asks == 80 / 16 and len(again()) == 90 and meter.messages["SIGNAL"] == asks
    for error, said, changes in (
        (DataError, "are stale: signal is", {"signal": {"kind": "sorted"}}),
        (LinkError, "refused the token", {"token": "guess"}),
        (LinkError, "is not the one that the teacher at", {"tokenizer": str(other)}),
    ):
        with pytest.raises(error, match=said):
            again(**changes)  # type: ignore[arg-type]
    link = connected(url)
    store = FileSignals(out, link.source(SignalRecipe(kind="topk"), [1.0]))
    link.close()
    assert len(store) == 90
    ids = [local.tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in rows[:5]]
    batch = collate([Sample(tuple(one), 0) for one in ids], pad=0)
    assert store.signal(batch).count == batch.targets


def test_a_killed_replica_costs_a_second_request(url: str) -> None:
    link = connected(url)
    signals = RemoteSignals(link, link.source(SignalRecipe(kind="topk"), [1.0]))
    first = signals.signal(collate(SAMPLES, pad=0))
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "#teacher#" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
    again = signals.signal(collate(SAMPLES, pad=0))
    assert again.key == first.key
    assert all(torch.equal(first.payload[name], again.payload[name]) for name in first.payload)
    link.close()


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCLOUD_TOKEN", raising=False)
    with pytest.raises(ValidationError, match="lenght"):
        TeacherSettings.model_validate({"model": "m", "limits": {"lenght": 3}})
    for token in (None, " ,"):
        with pytest.raises(RecipeError, match="RAYCLOUD_TOKEN"):
            app(TeacherSettings(model="m", token=token))


def test_the_config_file_deploys_the_application() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    assert config.http_options.host == "127.0.0.1"
    [application] = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is app
    settings = TeacherSettings.model_validate(application.args)
    assert settings.limits == SignalLimits() and settings.token is None
