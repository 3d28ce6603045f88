"""Checks of a cloud by an edge before it generates."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from typer.testing import CliRunner

from raycloud.cli import edge, signals, split
from raycloud.edge.endpoint import CloudEndpoint, load_split
from raycloud.errors import LinkSetupError, RaycloudError
from raycloud.split.inference.server_info import ServerInfo
from tests.models.families import tiny

OFFER = {
    "start_blocks": [10],
    "end_blocks": [20],
    "fingerprint": "f" * 64,
    "codecs": ["float32", "bfloat16"],
    "max_tokens": 64,
}


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    """Serve the paths of a cloud whose model has too many blocks; yield the address."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        return {"data": [{"split": OFFER}]}

    async def taken(opened: WebSocket) -> None:
        await opened.accept()
        await opened.close()

    for path in ("/v1/split", "/v1/signals"):
        app.add_api_websocket_route(path, taken)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"ws://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("path", ["/v1/splits", "/v1/signals", "/nowhere", "/v1/split-tune", ""])
def test_a_path_that_leads_nowhere_is_named(path: str, cloud: str, tiny_llama: Path) -> None:
    with pytest.raises(LinkSetupError, match=f"the path '{path}' of .* leads to no split model; a cloud serves"):
        load_split(str(tiny_llama), CloudEndpoint(cloud + path))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_another_model_is_told_by_its_fingerprint_and_not_by_its_cuts(family: str, cloud: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path)
    assert ServerInfo.model_validate(OFFER).plans.start_blocks == (10,)  # more blocks than the model has
    with pytest.raises(
        LinkSetupError, match=r"is not the model that ws://.* serves; their fingerprints are \w{12} and"
    ):
        load_split(str(tmp_path), CloudEndpoint(f"{cloud}/v1/split"))


COMMANDS = {
    "serve": (edge.app, ["serve", "--model", "m", "--cloud"]),
    "chat": (edge.app, ["chat", "--model", "m", "--cloud"]),
    "fetch": (signals.app, ["fetch", "--tokenizer", "t", "--data", "d", "--out", "o", "--teacher"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["http://localhost:1/v1/split"], "is no address of a cloud; allowed: wss://"),
        (["ws://localhost:1/v1/split", "--certificates", "missing.pem"], "no certificates can be read from 'missing.p"),
    ],
)
def test_addresses_and_certificates_are_checked_first(command: str, words: list[str], said: str) -> None:
    app, options = COMMANDS[command]
    done = CliRunner().invoke(app, [*options, *words])
    assert isinstance(done.exception, RaycloudError) and done.exception.exit_code == 2
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_an_address_is_checked_before_torch_is_loaded() -> None:
    code = """
import sys
from raycloud.cli.edge import _check
from raycloud.errors import RaycloudError
try:
    _check("http://localhost", None)
except RaycloudError:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_calibration_is_not_computed_for_a_place_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["calibrate", "--model", "./nowhere", "--start-block", "1", "--end-block", "2", "--out"]
    for out, said in (
        (tmp_path, "is a directory; give a file"),
        (tmp_path / "file" / "c.safetensors", "cannot write into"),
    ):
        done = CliRunner().invoke(split.app, [*words, str(out)])
        assert isinstance(done.exception, RaycloudError) and said in str(done.exception)
