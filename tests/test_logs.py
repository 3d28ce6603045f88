"""Log of a run as lines of JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest

from raycloud.errors import DataError
from raycloud.evaluation.recipe import EvaluateRecipe
from raycloud.logs import log_into
from raycloud.results import ResultDir, read_records

LOG = logging.getLogger("raycloud.somewhere")


def test_a_line_says_when_how_bad_which_run_who_and_what(tmp_path: Path) -> None:
    path, package = tmp_path / "log.jsonl", logging.getLogger("raycloud")
    before = package.level, package.propagate, list(package.handlers)  # the root's level is that of any library
    with log_into(path, "a1b2c3d4"):
        LOG.info("%d samples, «quoted»\nand more", 3)
        LOG.warning("from an actor", extra={"source": "student store"})
        LOG.debug("too much")
        logging.getLogger("elsewhere").warning("not ours")
        try:
            raise KeyError("x")
        except KeyError:
            LOG.exception("failed")
    LOG.warning("after the run")
    assert len(path.read_text().splitlines()) == 3
    first, second, third = read_records(path)
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "INFO",
        "run": "a1b2c3d4",
        "source": "driver",
        "logger": "raycloud.somewhere",
        "message": "3 samples, «quoted»\nand more",
    }
    assert (second["source"], second["run"]) == ("student store", "a1b2c3d4")
    assert "KeyError: 'x'" in third["exception"]
    assert (package.level, package.propagate, package.handlers) == before


def said(path: Path) -> list[tuple[str, str]]:
    return [(record["run"], record["message"]) for record in read_records(path / "log.jsonl")]


def test_a_resumed_run_keeps_its_id_and_another_one_has_its_own(tmp_path: Path) -> None:
    path, recipe = tmp_path / "run", EvaluateRecipe.parse({"models": ["m"], "data": ["d"]})

    def fail(results: ResultDir) -> None:
        results.log_metrics({"step": 1})
        raise DataError("no rows")

    with pytest.raises(DataError), ResultDir.open(path, recipe, "new") as results:
        fail(results)
    first = results.run_id
    with ResultDir.open(path, recipe, "resume") as results:
        assert results.run_id == first
        LOG.info("goes on")
    words = ["run begins (new)", "run failed: no rows", "run begins (resume)", "goes on", "run ends"]
    assert said(path) == [(first, one) for one in words]
    assert "exception" not in json.loads((path / "log.jsonl").read_text().splitlines()[1])  # one line is enough
    with ResultDir.open(path, recipe, "overwrite") as results:
        assert results.run_id != first
    assert said(path) == [(results.run_id, "run begins (overwrite)"), (results.run_id, "run ends")]
