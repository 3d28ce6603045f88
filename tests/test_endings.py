"""Check of the end of a command's output."""

from __future__ import annotations

import pytest

from tests.endings import report_of

GOOD = "starting\n┏━┓\n┃a┃\n└─┘\nresults: out\n"


def test_a_table_and_an_object_behind_it_are_an_end() -> None:
    assert report_of(GOOD) is None and report_of(GOOD + '{"a": 1}\n') == {"a": 1}


@pytest.mark.parametrize(
    ("stdout", "stderr"),
    [
        (GOOD + "(ServeController pid=12) graceful_shutdown failed: killed by ray.kill\n", ""),
        (GOOD.replace("results", "(ServeReplica:cloud:Cloud pid=3) request served\nresults"), ""),
        (GOOD, "2026-01-01 10:00:00,123\tINFO worker.py:2013 -- Connected to Ray cluster.\n"),
        (GOOD + "done\n", ""),
    ],
)
def test_lines_of_ray_and_serve_are_none(stdout: str, stderr: str) -> None:
    with pytest.raises(AssertionError):
        report_of(stdout, stderr)
