"""Teacher fine-tuning job on one Ray: its results, and recovery from failures."""

from __future__ import annotations

import _thread
import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ray.util.queue import Empty
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raycloud.cluster.run_log import RunLog
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.errors import DataError, Interrupted, ModelError, RecipeError
from raycloud.jobs import tune_teacher as job
from raycloud.jobs.tune_teacher import run
from raycloud.results import ResultDir, read_records
from tests.cluster.one_machine import on_one_machine

pytest.importorskip("deepspeed")


def small(model: Path, output: Path, /, **changes: Any) -> TuneTeacherRecipe:
    """Recipe with two workers, eight steps and a checkpoint after every second step."""
    values: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "threads": 1,
        "model": str(model),
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "source": "builtin:instruct",
            "format": "alpaca",
            "max_length": 96,
            "max_prompt_length": 80,
            "limit": 200,
        },
        "training": {"batch_size": 8, "lr": 3e-2},
        "steps": 8,
        "workers": {"count": 2, "placement": {"num_cpus": 0.1}},
        "checkpoints": {"every": 2},
        "evaluation": {"held_out_samples": 16},
    }
    return TuneTeacherRecipe.model_validate({**values, **changes})


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def finished(local_ray: None, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "run"
    run(small(tiny_llama, path))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_leaves_a_model_an_adapter_and_a_report(finished: Path, tiny_llama: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["held_out_loss_after"] < summary["held_out_loss_before"]
    assert (summary["workers"], summary["stage"], summary["restarts"]) == (2, 2, 0)
    assert [record["step"] for record in records(finished, "step")] == list(range(1, 9))
    assert [record["step"] for record in records(finished, "held_out")] == [0, 2, 4, 6, 8]
    assert "<img" in (finished / "report.html").read_text()
    log = read_records(finished / "log.jsonl")
    assert {record["run"] for record in log} == {summary["run"]}
    assert {record["source"] for record in log} == {"driver", "worker 0", "worker 1"}
    assert not (finished / "state").exists()
    merged = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), finished / "adapter")
    ids = torch.tensor([AutoTokenizer.from_pretrained(finished / "model")("The film is")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
    assert (merged(ids).logits - plain).abs().max() > 1e-2


def disturbing(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[int], None]) -> None:
    """Call ``what`` with the first worker's process id, once, when a step has been made."""
    original, starts, done = job._TuneTeacherRun._write, list[dict[str, Any]](), list[bool]()

    def write(self: Any, record: dict[str, Any]) -> None:
        original(self, record)
        if record["kind"] == "start":
            starts.append(record)
        elif record["kind"] == "step" and record["step"] == step and not done:
            done.append(True)
            what(starts[-1]["pid"])

    monkeypatch.setattr(job._TuneTeacherRun, "_write", write)


def same_model(one: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_worker_is_started_again_and_the_run_ends_as_undisturbed(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbing(monkeypatch, 5, lambda pid: os.kill(pid, signal.SIGKILL))
    summary = run(small(tiny_llama, tmp_path / "run"))
    assert summary["restarts"] == 1
    first, second = (record["step"] for record in records(tmp_path / "run", "start"))
    assert (first, second) in ((0, 2), (0, 4))  # the second checkpoint may not have been complete
    assert [record["step"] for record in records(tmp_path / "run", "step")] == list(range(1, 9))
    undisturbed = json.loads((finished / "summary.json").read_text())
    assert summary["held_out_loss_after"] == undisturbed["held_out_loss_after"]
    same_model(tmp_path / "run", finished)


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_run_outlives_the_node_of_a_worker_and_ends_as_undisturbed(
    finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    seen = on_one_machine(small(tiny_llama, tmp_path / "run"), tmp_path)
    assert seen["before"] == ["cloud-a", "cloud-b"]
    assert seen["after"] == sorted({"cloud-a", "cloud-b", "cloud-c"} - {seen["removed"]})
    first, *_, last = (record["step"] for record in records(tmp_path / "run", "start"))
    assert first == 0 and last in (2, 4)  # the second checkpoint may not have been complete
    undisturbed = json.loads((finished / "summary.json").read_text())
    for number in ("held_out_loss_before", "held_out_loss_after", "trained_tokens", "steps"):
        assert seen["summary"][number] == pytest.approx(undisturbed[number], rel=1e-3)
    ours, theirs = ([step["loss"] for step in records(run, "step")] for run in (tmp_path / "run", finished))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before_and_ends_as_undisturbed(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tiny_llama, tmp_path / "run")
    with monkeypatch.context() as patch:
        disturbing(patch, 7, lambda pid: _thread.interrupt_main())
        with pytest.raises(Interrupted, match="--resume"):
            run(recipe)
    # The newest that Ray knows: a stop may leave one behind that a worker wrote and Ray did not register.
    train = tmp_path / "run" / "state" / "train"
    known = json.loads((train / "checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]
    newest = train / known["checkpoint_dir_name"]
    before = max(path for path in train.glob("checkpoint_*/state.json") if path.parent.name < newest.name)
    step = json.loads(before.read_text())["step"]
    path = newest / "worker-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # within a tensor: the library reads it as it is
    path.write_bytes(content)
    run(recipe, "resume")
    assert [record["step"] for record in records(tmp_path / "run", "start")][-1] == step
    assert [record["step"] for record in records(tmp_path / "run", "step")] == list(range(1, 9))
    same_model(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_stopped_under_one_stage_resumes_under_another_with_fewer_workers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout is drawn by each worker, so it would differ with their number.
    same = {"dtype": "float32", "lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "steps": 6}
    run(small(tiny_llama, tmp_path / "whole", **same))
    with monkeypatch.context() as patch:
        disturbing(patch, 5, lambda pid: _thread.interrupt_main())
        with pytest.raises(Interrupted, match="--resume"):
            run(small(tiny_llama, tmp_path / "run", **same))
    workers = {"count": 1, "placement": {"num_cpus": 0.1}}
    run(small(tiny_llama, tmp_path / "run", **same, deepspeed={"stage": 3}, workers=workers), "resume")
    first, second = ((one["step"], one["workers"]) for one in records(tmp_path / "run", "start"))
    assert first == (0, 2)
    assert second in ((2, 1), (4, 1))  # the second checkpoint may not have been complete
    assert TuneTeacherRecipe.load(tmp_path / "run" / "recipe.yaml").deepspeed.stage == 3
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "builtin:minilm-l6"}, ModelError, "is an encoder; allowed: causal language models"),
        ({"lora": {"r": 4, "target_modules": ["nothing"]}}, ModelError, "lora.target_modules: no linear map 'nothing'"),
        ({"deepspeed": {"config": "none.json"}}, RecipeError, "deepspeed.config 'none.json'"),
        ({"data": {"source": "none.jsonl"}}, DataError, "none.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        run(small(tiny_llama, tmp_path / "run", **changes))
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


class Told:
    """Queue with one record, then none."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._left = [record]

    def get(self, timeout: float) -> dict[str, Any]:
        if not self._left:
            raise Empty
        return self._left.pop()


def test_a_log_that_cannot_be_written_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(tmp_path, tmp_path / "run")
    with ResultDir.open(tmp_path / "run", recipe, "new") as results:
        nobody: Any = None
        one: Any = job._TuneTeacherRun(recipe, results, RunLog("nobody"), nobody, nobody, nobody)

        def full(record: dict[str, Any]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

        monkeypatch.setattr(results, "log_metrics", full)
        with pytest.raises(OSError, match="No space left"), one._following(Told({"kind": "step", "step": 1}), 3):
            pass
