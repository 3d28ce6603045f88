"""The distillation job on one Ray: what it leaves, and what it survives."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from raycloud.cluster.edge_student import Beat
from raycloud.cluster.jobs import distill as job
from raycloud.cluster.jobs.distill import run
from raycloud.cluster.rounds import Member, Round
from raycloud.data.sources import load_rows
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import DataError, Interrupted, ModelError, ResultError
from raycloud.report.render import render
from raycloud.results import read_records
from tests.cluster.recipes import small
from tests.models.families import tiny
from tests.tokenizers import trained

pytestmark = pytest.mark.usefixtures("local_ray")

SUMMARY = {
    "teacher_ppl", "student_ppl_before", "student_ppl_after", "agreement_before", "agreement_after", "teacher_params",
    "student_params", "teacher_tok_s", "student_tok_s", "wire_bytes_per_token", "rounds", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an undisturbed run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    run(small(tiny_llama, path))
    return path


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return weights_in(path / "student")


def test_a_run_leaves_recipe_metrics_summary_report_and_a_model(finished: Path, tiny_llama: Path) -> None:
    assert DistillRecipe.load(finished / "recipe.yaml") == small(tiny_llama, finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["rounds"] == 3
    assert set(summary["groups"]) == {"movie", "news", "product", "tweet"}
    assert summary["student_ppl_after"] < summary["student_ppl_before"]
    assert [(r["round"], r["students"].sort()) for r in records(finished, "round")] == [(n, None) for n in range(3)]
    assert len(records(finished, "step")) == 3 * 3 * 2
    assert "newsroom" in (finished / "report.html").read_text()
    measured = records(finished, "health")
    assert sorted((r["student"], r["round"], "data" in r) for r in measured) == [
        (name, 0, whole) for name in ("newsroom", "store") for whole in (False, True)
    ]
    assert {name: edge["shares"] for name, edge in summary["health"].items()} == {
        name: {"forward_kl": 1.0} for name in ("newsroom", "store")
    }
    (flat,) = summary["health"]["store"]["warnings"]  # the teacher is random
    assert "says next to nothing" in flat
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "recipe.yaml", "run_id", "log.jsonl", "metrics.jsonl", "summary.json", "held_out.jsonl",
        "report.html", "student", "tensorboard",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(finished / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    assert model.config.num_hidden_layers == 2
    assert model.generate(**tokenizer("The film", return_tensors="pt"), max_new_tokens=3).shape[1] >= 3


def test_driver_teacher_and_students_log_with_the_runs_id(finished: Path) -> None:
    log = read_records(finished / "log.jsonl")
    assert {record["run"] for record in log} == {json.loads((finished / "summary.json").read_text())["run"]}
    assert {record["source"] for record in log} == {"driver", "teacher 0", "student store", "student newsroom"}
    told = [record["message"].split(" (")[0].split(":")[0] for record in log if record["source"] == "student store"]
    assert told[1:] == ["round 1", "round 2", "round 3"]
    assert [log[0]["message"], log[-1]["message"]] == ["run begins (new)", "run ends"]


def events(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What TensorBoard shows: points by curve and tag."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for folder in (path / "tensorboard").iterdir():
        read = EventAccumulator(str(folder)).Reload()
        found[folder.name] = {
            tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]
        }
    return found


def told(path: Path, student: str, key: str) -> list[tuple[int, float]]:
    steps = [record for record in records(path, "step") if record["student"] == student]
    return [(step["step"], pytest.approx(step[key], rel=1e-6)) for step in steps]


def test_tensorboard_shows_the_records(finished: Path) -> None:
    shown = events(finished)
    assert set(shown) == {"store", "newsroom", "round"}
    for student in ("store", "newsroom"):
        assert shown[student]["loss"] == told(finished, student, "loss")
        assert shown[student]["lr"] == told(finished, student, "lr")
        assert len(shown[student]["terms/forward_kl"]) == 9
    assert [at for at, _ in shown["round"]["loss"]] == [0, 1, 2]
    assert all(speed > 0 for _, speed in shown["round"]["tokens_per_second/store"])


def test_the_page_is_rendered_again_from_the_directory(finished: Path) -> None:
    page = finished / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert render(finished) == page
    assert page.read_bytes() == before


def test_a_runs_metrics_can_be_scraped(finished: Path) -> None:
    """By Prometheus, from the node; Ray exports them every few seconds."""
    (node,) = ray.nodes()
    run, deadline = json.loads((finished / "summary.json").read_text())["run"], time.monotonic() + 60
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[tuple[str, bool], float] = {}
    while found.get(("ray_raycloud_run_round", False)) != 3:
        assert time.monotonic() < deadline, found
        time.sleep(1)
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = [one for one in answer.read().decode().splitlines() if "raycloud_run_" in one and run in one]
        found = {(one.split("{")[0], 'student="store"' in one): float(one.split()[-1]) for one in lines}
    assert found["ray_raycloud_run_loss", True] > 0
    assert found["ray_raycloud_run_tokens_per_second", True] > 0


def test_held_out_texts_add_up_to_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    texts = [json.loads(line) for line in (finished / "held_out.jsonl").read_text().splitlines()]
    assert len({(text["group"], text["text"]) for text in texts}) == len(texts) == 4 * 8
    tokens = sum(text["tokens"] for text in texts)
    assert math.exp(sum(text["nll"] for text in texts) / tokens) == pytest.approx(summary["student_ppl_after"])
    assert sum(text["kl"] for text in texts) / tokens == pytest.approx(summary["kl_after"])
    assert sum(text["agree"] for text in texts) / tokens == pytest.approx(summary["agreement_after"])
    assert 0 < summary["kl_after"] < summary["kl_before"]


def test_students_of_several_kinds_learn_from_one_teacher(
    finished: Path, tiny_llama: Path, foreigner: Path, tmp_path: Path
) -> None:
    """Two edges as in the other run, and beside them a smaller student and one with a tokenizer of its own."""
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        edges=[
            {"name": "store", "where": {"domain": ["movie", "product"]}},
            {
                "name": "watch",
                "student": {"blocks": 1, "choose": "spacing"},
                "objective": {"kd": {"name": "reverse_kl"}},
            },
            {"name": "newsroom", "where": {"domain": ["news", "tweet"]}},
            {
                "name": "abroad",
                "student": {"model": str(foreigner)},
                "objective": {"kd": {"name": "uld"}, "ce_weight": 1},
            },
        ],
    )
    assert [cohort.edges for cohort in recipe.cohorts] == [("store", "newsroom"), ("watch",), ("abroad",)]
    summary = run(recipe).summary
    assert list(summary["students"]) == ["store", "watch", "abroad"]
    assert all(one["student_ppl_after"] < one["student_ppl_before"] for one in summary["students"].values())
    assert summary["trained_tokens"] == sum(one["student_tokens"] for one in summary["students"].values())
    folder = tmp_path / "run" / "students"
    blocks = {one.name: AutoModelForCausalLM.from_pretrained(one).config.num_hidden_layers for one in folder.iterdir()}
    assert blocks == {"store": 2, "watch": 1, "abroad": tiny("llama").config.num_hidden_layers}
    # The others' company changes nothing.
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, load_file(folder / "store" / "model.safetensors")[name])
    assert "student &#x27;watch&#x27;" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_kept_signals_serve_all_epochs_and_runs(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def kept(output: str, teacher: Path = tiny_llama, **changes: Any) -> DistillRecipe:
        where = {"model": str(teacher), "signals": str(tmp_path / "signals")}
        return small(tiny_llama, tmp_path / output, teacher=where, data={"limit": 64}, **changes)

    summary = run(kept("run")).summary
    assert summary["wire_bytes"]["signals"] == summary["trained_tokens"] * 16 * 2
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "signals").glob("*.safetensors")}
    run(kept("again", objective={"kd": {"name": "reverse_kl", "temperature": 2.0}}))
    assert parts == {part: part.stat().st_mtime_ns for part in (tmp_path / "signals").glob("*.safetensors")}
    with_less = run(small(tiny_llama, tmp_path / "asked", data={"limit": 64})).summary
    assert with_less["student_ppl_after"] == pytest.approx(summary["student_ppl_after"], rel=1e-3)
    with pytest.raises(DataError, match="stale: teacher is"):
        run(kept("other", teacher=scrambled(tiny_llama, tmp_path)))


def scrambled(model: Path, folder: Path) -> Path:
    """The same model with other weights."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(1.5)
    loaded.save_pretrained(folder / "scrambled")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "scrambled")
    return folder / "scrambled"


def test_answers_to_held_out_instructions_are_compared_with_references(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        data={"source": "builtin:instruct", "format": "alpaca", "max_length": 96, "max_prompt": 80, "limit": 64},
        evaluation={
            "answers": 4,
            "generation": {"new_tokens": 6},
            "samples": 4,
            "prompts": ["The film"],
            "new_tokens": 2,
        },
        edges=[{"name": "edge"}],
        rounds={"count": 1, "steps": 2},
    )
    summary = run(recipe).summary
    assert all(0 <= summary[key] <= 100 for key in ("teacher_rouge_l", "rouge_l_before", "rouge_l_after"))


def test_an_objective_with_projectors_trains_them_beside_the_student(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        objective={"kd": {"name": "dskd_cma"}, "ce_weight": 0.5, "extras_lr": 1e-2},
        rounds={"count": 2, "steps": 6},
    )
    run(recipe)
    steps = records(tmp_path / "run", "step")
    assert {"dskd_cma", "dskd_cma/student_space", "dskd_cma/projected", "cross_entropy"} <= steps[0]["terms"].keys()
    projected = [step["terms"]["dskd_cma/projected"] for step in steps]
    assert sum(projected[-4:]) < sum(projected[:4])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["wire_bytes"]["words"] == 2 * 49_152 * 16 * 2


@pytest.fixture(scope="module")
def foreigner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("foreigner")
    tokenizer = trained(500, [row["text"] for row in load_rows("builtin:reviews", "train")[:2000]])
    tiny("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_student_with_its_own_tokenizer_learns_and_keeps_it(
    tiny_llama: Path, foreigner: Path, tmp_path: Path
) -> None:
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        student={"model": str(foreigner)},
        objective={"kd": {"name": "uld"}, "ce_weight": 1.0},
        rounds={"count": 2, "steps": 6},
    )
    run(recipe)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student_ppl_after"] < summary["student_ppl_before"]
    assert 0 <= summary["agreement_after"] <= 1
    assert all(record["terms"]["uld"] > 0 for record in records(tmp_path / "run", "step"))
    kept = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert kept.get_vocab() == AutoTokenizer.from_pretrained(foreigner).get_vocab()
    assert summary["student_blocks"] == [0, 1] and (tmp_path / "run" / "student" / "config.json").is_file()
    with pytest.raises(ModelError, match="'forward_kl' needs one tokenizer"):
        run(small(tiny_llama, tmp_path / "other", student={"model": str(foreigner)}))


def test_students_with_adapters_exchange_only_those(tiny_llama: Path, tmp_path: Path) -> None:
    """As supervised fine-tuning, which asks the teacher for nothing."""
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        student={"model": str(tiny_llama), "blocks": None, "lora": {"r": 2, "alpha": 8}},
        objective={"ce_weight": 1.0, "kd_weight": 0.0},
        rounds={"count": 2, "steps": 6},
    )
    run(recipe)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["student_ppl_after"] < summary["student_ppl_before"]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    size = sum(tensor.nbytes for tensor in adapter.values())
    whole = sum(tensor.nbytes for tensor in weights_in(tiny_llama).values())
    assert summary["wire_bytes"] == {"weights_down": 4 * size, "weights_up": 4 * size, "frozen": 2 * whole}
    assert summary["wire_bytes_per_token"] == 0
    base, merged = weights_in(tiny_llama), weights(tmp_path / "run")
    assert {name for name in base if not torch.equal(base[name], merged[name])} == {
        name.removeprefix("base_model.model.").replace("lora_A.", "") for name in adapter if "lora_A" in name
    }
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "run" / "adapter"
        )
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
        assert torch.allclose(theirs(ids).logits, ours(ids).logits, atol=1e-5)


def test_the_bytes_are_those_of_the_payloads(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    wire, tokens = summary["wire_bytes"], summary["trained_tokens"]
    assert tokens == sum(record["tokens"] for record in records(finished, "step"))
    assert wire["signals"] == tokens * 16 * 2  # hidden 16 in bfloat16
    assert wire["head"] == 2 * 49_152 * 16 * 2  # once to each edge
    assert wire["weights_down"] == wire["weights_up"] == 2 * 3 * 4 * summary["student_params"]
    assert summary["wire_bytes_per_token"] == (wire["ids"] + wire["signals"]) / tokens


@pytest.mark.slow
def test_a_run_can_be_repeated_bit_for_bit(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    run(small(tiny_llama, tmp_path / "again"))
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name])


def test_a_finished_run_is_refused_and_resuming_it_changes_nothing(finished: Path, tiny_llama: Path) -> None:
    before = (finished / "summary.json").read_bytes()
    with pytest.raises(ResultError, match="--resume"):
        run(small(tiny_llama, finished))
    assert run(small(tiny_llama, finished), "resume").summary["rounds"] == 3
    assert (finished / "summary.json").read_bytes() == before


def interrupting(
    monkeypatch: pytest.MonkeyPatch,
    when: Callable[[dict[str, Member], dict[str, Beat]], None],
    *,
    anytime: bool = False,
) -> None:
    """Call ``when`` once in round 1 (the second): when "store" has trained some of its steps, or at any time."""
    original, called = job.run_round, list[bool]()

    def disturbed(number: int, index: int, members: Sequence[Member], weights: Any, recipe: Any, watch: Any) -> Round:
        def watching(beats: dict[str, Beat]) -> None:
            watch(beats)
            if index == 1 and not called and (anytime or "store" in beats):
                called.append(True)
                when({member.name: member for member in members}, beats)

        return original(number, index, members, weights, recipe, watching)

    monkeypatch.setattr(job, "run_round", disturbed)


@pytest.mark.parametrize("how", ["sigkill", pytest.param("ray.kill", marks=pytest.mark.slow)])
def test_a_killed_student_is_left_out_and_takes_part_again(
    how: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(members: dict[str, Member], beats: dict[str, Beat]) -> None:
        if how == "sigkill":
            os.kill(beats["store"].pid, signal.SIGKILL)
        else:
            ray.kill(members["store"].actor, no_restart=False)

    interrupting(monkeypatch, kill)
    # Rounds long enough to be killed in the middle of.
    recipe = small(tiny_llama, tmp_path / "run", rounds={"count": 3, "steps": 40, "deadline_s": 120})
    summary = run(recipe).summary
    assert summary["rounds"] == 3
    took_part = [sorted(record["students"]) for record in records(tmp_path / "run", "round")]
    assert took_part == [["newsroom", "store"], ["newsroom"], ["newsroom", "store"]]
    missed = [(record["round"], record["student"], record["why"]) for record in records(tmp_path / "run", "missed")]
    assert missed == [(1, "store", "died")]


@pytest.mark.slow
def test_a_late_student_is_left_out_stops_and_takes_part_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suspend(_: dict[str, Member], beats: dict[str, Beat]) -> None:
        pid = beats["store"].pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(44.0, os.kill, (pid, signal.SIGCONT)).start()

    interrupting(monkeypatch, suspend)
    recipe = small(tiny_llama, tmp_path / "run", rounds={"count": 3, "steps": 40, "deadline_s": 40})
    assert run(recipe).summary["rounds"] == 3
    missed = [(record["round"], record["student"], record["why"]) for record in records(tmp_path / "run", "missed")]
    assert (1, "store", "late") in missed
    assert sorted(records(tmp_path / "run", "round")[2]["students"]) == ["newsroom", "store"]


def test_a_stopped_run_resumes_to_the_same_weights(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second round; the actors of the interrupted run are gone when it goes on."""

    def stop(members: dict[str, Member], _: dict[str, Beat]) -> None:
        for member in members.values():
            ray.kill(member.actor)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        interrupting(patched, stop, anytime=True)
        with pytest.raises(Interrupted, match="go on with: --resume"):
            run(small(tiny_llama, tmp_path / "run"))
    assert (tmp_path / "run" / "state" / "round-0001").is_dir()
    result = run(small(tiny_llama, tmp_path / "run"), "resume")
    assert result.summary["rounds"] == 3
    assert [record["round"] for record in records(tmp_path / "run", "round")] == [0, 1, 2]
    shown = events(tmp_path / "run")
    assert shown["store"]["loss"] == told(tmp_path / "run", "store", "loss")  # no step twice
    assert [at for at, _ in shown["round"]["loss"]] == [0, 1, 2]
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])


@pytest.mark.slow
def test_several_replicas_answer_and_a_killed_one_comes_back(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[Any] = []
    original = job._Run._start_students

    def start(self: Any, checkpoint: Any) -> list[Member]:
        killed.append(self.replicas[1])
        ray.kill(self.replicas[1], no_restart=False)
        return original(self, checkpoint)

    monkeypatch.setattr(job._Run, "_start_students", start)
    recipe = small(tiny_llama, tmp_path / "run", teacher={"replicas": 2})
    assert run(recipe).summary["rounds"] == 3
    assert killed
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])


def test_students_with_one_shard_share_the_teachers_forward_passes(tiny_llama: Path) -> None:
    from raycloud.cluster.cloud_teacher import CloudTeacher
    from raycloud.data.batches import Sample, collate

    recipe = small(tiny_llama, Path("unused"))
    teacher: Any = ray.remote(CloudTeacher).options(resources={"cloud": 1}, num_cpus=0.1).remote(recipe)
    facts = ray.get(teacher.prepare.remote())
    batch = collate([Sample((5, 6, 7, 8), 1)], 0)
    (first,), (second,) = ray.get([teacher.signal.remote(facts.name, batch) for _ in range(2)])
    assert first == second
    (other,) = ray.get(teacher.signal.remote(facts.name, collate([Sample((5, 6, 7, 9), 1)], 0)))
    assert other != first
