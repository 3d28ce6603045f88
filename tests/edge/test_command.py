"""``raycloud edge`` as a user runs it."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from typer.testing import CliRunner

from raycloud.cli.edge import app
from raycloud.errors import RaycloudError


def test_serve_until_ctrl_c(tiny_llama: Path) -> None:
    words = ["serve", "--model", str(tiny_llama), "--name", "tiny", "--port", "0"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", "raycloud", "edge", *words], stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving 'tiny': base_url=http://127.0.0.1:"), line
        url = line.split("base_url=")[1].split()[0]
        with openai.OpenAI(base_url=url, api_key="anything", max_retries=0) as client:
            answer = client.completions.create(model="tiny", prompt="so", max_tokens=3)
            assert answer.usage is not None and answer.usage.completion_tokens == 3
        # Somebody still listens to an endless answer when Ctrl-C comes.
        at = urlsplit(url)
        connection = http.client.HTTPConnection(str(at.hostname), at.port, timeout=120)
        body = json.dumps({"model": "tiny", "prompt": "so", "max_tokens": 2000, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=120)
        connection.close()
        assert (process.returncode, shown, errors) == (130, "", "stopped\n")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines and needs an API key"),
        (["--model", "./nowhere"], "no model at './nowhere'"),
        (["--watch", "--cloud", "ws://127.0.0.1:1/v1/split"], "--watch needs a whole model: with --cloud both parts"),
        (["--watch", "--model", "builtin:smollm2-135m-instruct"], "--watch needs a directory as --model, got"),
    ],
)
def test_errors_of_one_line(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.delenv("RAYCLOUD_API_KEY", raising=False)
    done = CliRunner().invoke(app, ["serve", "--model", str(tiny_llama), "--port", "0", *words])
    assert isinstance(done.exception, RaycloudError) and done.exception.exit_code == 2
    assert message in str(done.exception) and "\n" not in str(done.exception)


def test_chat_with_lines_from_a_pipe(tiny_llama: Path) -> None:
    words = ["chat", "--model", str(tiny_llama), "--max-tokens", "5", "--seed", "1", "--temperature", "1"]
    done = CliRunner().invoke(app, words, input="hello\n/reset\nhello\n")
    assert done.exit_code == 0
    first, again = done.stdout.split("forgotten\n")
    answer = first.split("\n", 1)[1].split("\n5 tokens")[0]
    assert answer and again.startswith(answer)
    assert done.stdout.count("5 tokens · ") == 2 and done.stdout.count("cut at the limit") == 2
