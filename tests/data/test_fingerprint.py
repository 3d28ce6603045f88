"""Fingerprints of data sets; jobs are not resumed with other data."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.data.fingerprint import data_sources, fingerprint, fingerprints
from raycloud.data.recipe import DataRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import DataError, ResultError
from raycloud.evaluation.recipe import EvaluateRecipe
from raycloud.fetch import BUILTINS
from raycloud.jobs import distill, tune_teacher
from raycloud.jobs import evaluate as protocol
from raycloud.recipe import Recipe
from raycloud.results import record_inputs
from raycloud.split.finetune import run as split_tune
from raycloud.split.finetune.recipe import SplitTuneRecipe


def test_files_are_told_by_their_bytes_and_built_in_sets_by_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    monkeypatch.setenv("RAYCLOUD_DATA", str(tmp_path))
    data = DataRecipe(source="builtin:instruct", validation="a.jsonl")
    assert fingerprints(data_sources(data)) == {
        "builtin:instruct": BUILTINS["reviews"].packages[0].sha256,
        "a.jsonl": hashlib.sha256(b'{"text": "a"}').hexdigest(),
    }
    with pytest.raises(DataError, match="no data file at"):
        fingerprint("b.jsonl")


def test_hub_sets_are_told_by_their_revision_where_it_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def dataset_info(name: str, timeout: float) -> Any:
        if name != "nyu-mll/glue":
            raise ConnectionError(name)
        return SimpleNamespace(sha="1234abcd")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(dataset_info=dataset_info))
    assert fingerprints(["nyu-mll/glue:cola", "org/set"]) == {"nyu-mll/glue:cola": "1234abcd"}


def run(recipe: Recipe) -> None:
    match recipe:
        case DistillRecipe():
            distill.run(recipe, "resume")
        case TuneTeacherRecipe():
            tune_teacher.run(recipe, "resume")
        case SplitTuneRecipe():
            split_tune.run(recipe, "resume")
        case EvaluateRecipe():
            protocol.run(recipe, "resume")


@pytest.mark.parametrize("kind", [DistillRecipe, TuneTeacherRecipe, SplitTuneRecipe, EvaluateRecipe])
def test_no_job_goes_on_over_data_that_changed(
    kind: type[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the run continued silently with samples of another file."""
    file, output = tmp_path / "data.jsonl", tmp_path / "out"
    monkeypatch.setattr(protocol, "_candidates", lambda recipe: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    file.write_text('{"text": "a"}')
    data = [str(file)] if kind is EvaluateRecipe else {"source": str(file)}
    models = {"models": ["m"]} if kind is EvaluateRecipe else {}
    recipe = kind.parse({"output": str(output), "data": data, **models})
    output.mkdir()
    (output / "recipe.yaml").write_text(recipe.dump())
    record_inputs(output, fingerprints([str(file)]))
    file.write_text('{"text": "b"}')
    with pytest.raises(
        ResultError, match=r"cannot continue in '.*out': the data of '.*data.jsonl' has changed"
    ) as raised:
        run(recipe)
    assert "\n" not in str(raised.value)
