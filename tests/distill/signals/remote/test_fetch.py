"""Errors for a teacher that does not answer, raised before any work."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raycloud.distill.signals.remote.fetch import FetchRecipe, fetch
from raycloud.errors import LinkError, StorageError


def test_that_nobody_listens_is_told_at_once_and_before_data_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    told = list[str]()
    with socket.socket() as taken:  # bound, and not listening: nobody else can take the port meanwhile
        taken.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}/v1/signals"
        values = {"teacher": url, "tokenizer": str(tiny_llama), "output": str(tmp_path / "out"), "timeout_s": 0.5}
        recipe = FetchRecipe.model_validate({**values, "data": {"source": "missing.jsonl"}})
        with pytest.raises(LinkError, match=f"no answer from the teacher within 0.5 s: nobody listens at {url}"):
            fetch(recipe, notify=told.append)
    assert told == [f"nobody listens at {url}; trying again"]


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    values = {
        "teacher": "ws://localhost:1/v1/signals",
        "tokenizer": "./nowhere",
        "output": str(tmp_path / "file" / "o"),
    }
    with pytest.raises(StorageError, match="cannot write into"):
        fetch(FetchRecipe.model_validate(values))
