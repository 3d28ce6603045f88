"""The origin of a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycloud.origin import ORIGIN, Origin, command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/x/bin/raycloud", "distill", "--out", "a b"], "raycloud distill --out 'a b'"),
        (["/x/raycloud/__main__.py", "runs"], "raycloud runs"),
        (
            ["raycloud", "edge", "serve", "--token", "secret", "--api-key=secret"],
            "raycloud edge serve --token … --api-key=…",
        ),
        (["/x/ray/default_worker.py", "--redis-password=secret"], "a worker of Ray"),
    ],
)
def test_the_command_is_told_without_secrets(words: list[str], told: str) -> None:
    assert command(words) == told


def test_the_first_origin_of_a_folder_stays(tmp_path: Path) -> None:
    assert Origin.read(tmp_path) is None
    first = Origin("ab12", "2026-11-29T12:00:00+00:00", "raycloud runs", "a processor, 2 cores")
    first.record(tmp_path)
    Origin.now("cd34").record(tmp_path)
    assert Origin.read(tmp_path) == first
    assert str(first) == "Run ab12, 2026-11-29T12:00:00+00:00, by 'raycloud runs', on a processor, 2 cores."


def test_a_damaged_origin_is_none(tmp_path: Path) -> None:
    (tmp_path / ORIGIN).write_text('{"run": 1}')
    assert Origin.read(tmp_path) is None
