"""Distillation job on one Ray: its results, and students of all kinds."""

from __future__ import annotations

import json
import math
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raycloud.data.sources import load_rows
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import DataError, ModelError
from raycloud.jobs.distill import run
from raycloud.jobs.registry import REPORTS
from raycloud.report.render import render
from raycloud.results import read_records
from tests.cluster.recipes import small
from tests.jobs.distill_run import events, logged, records, weights, weights_in
from tests.models.families import tiny
from tests.tokenizers import trained

pytestmark = pytest.mark.usefixtures("local_ray")

SUMMARY = {
    "teacher_ppl", "student_ppl_before", "student_ppl_after", "agreement_before", "agreement_after", "teacher_params",
    "student_params", "teacher_tok_s", "student_tok_s", "wire_bytes_per_token", "rounds", "seconds",
}  # fmt: skip


def test_a_run_leaves_recipe_metrics_summary_report_and_a_model(distilled: Path, tiny_llama: Path) -> None:
    assert DistillRecipe.load(distilled / "recipe.yaml") == small(tiny_llama, distilled)
    summary = json.loads((distilled / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["rounds"] == 3
    assert set(summary["groups"]) == {"movie", "news", "product", "tweet"}
    assert summary["student_ppl_after"] < summary["student_ppl_before"]
    assert [(r["round"], r["students"].sort()) for r in records(distilled, "round")] == [(n, None) for n in range(3)]
    assert len(records(distilled, "step")) == 3 * 3 * 2
    assert "newsroom" in (distilled / "report.html").read_text()
    measured = records(distilled, "diagnostics")
    assert sorted((r["student"], r["round"], "data" in r) for r in measured) == [
        (name, 0, whole) for name in ("newsroom", "store") for whole in (False, True)
    ]
    assert {name: edge["shares"] for name, edge in summary["diagnostics"].items()} == {
        name: {"forward_kl": 1.0} for name in ("newsroom", "store")
    }
    (flat,) = summary["diagnostics"]["store"]["warnings"]  # the teacher is random
    assert "targets are nearly uniform" in flat
    assert {path.name for path in distilled.iterdir()} == {
        ".lock", "recipe.yaml", "run_id", "origin.json", "log.jsonl", "metrics.jsonl", "summary.json", "held_out.jsonl",
        "report.html", "student", "tensorboard", "inputs.json", "versions",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(distilled / "student")
    tokenizer = AutoTokenizer.from_pretrained(distilled / "student")
    assert model.config.num_hidden_layers == 2
    assert model.generate(**tokenizer("The film", return_tensors="pt"), max_new_tokens=3).shape[1] >= 3


def test_driver_teacher_and_students_log_with_the_runs_id(distilled: Path) -> None:
    log = read_records(distilled / "log.jsonl")
    assert {record["run"] for record in log} == {json.loads((distilled / "summary.json").read_text())["run"]}
    assert {record["source"] for record in log} == {"driver", "teacher 0", "student store", "student newsroom"}
    messages = [record["message"].split(" (")[0].split(":")[0] for record in log if record["source"] == "student store"]
    assert messages[1:] == ["round 1", "round 2", "round 3"]
    assert [log[0]["message"], log[-1]["message"]] == ["run begins (new)", "run ends"]


def test_tensorboard_shows_the_records(distilled: Path) -> None:
    shown = events(distilled)
    assert set(shown) == {"store", "newsroom", "round"}
    for student in ("store", "newsroom"):
        assert shown[student]["loss"] == logged(distilled, student, "loss")
        assert shown[student]["lr"] == logged(distilled, student, "lr")
        assert len(shown[student]["terms/forward_kl"]) == 9
    assert [at for at, _ in shown["round"]["loss"]] == [0, 1, 2]
    assert all(speed > 0 for _, speed in shown["round"]["tokens_per_second/store"])


def test_the_page_is_rendered_again_from_the_directory(distilled: Path) -> None:
    page = distilled / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert render(distilled, REPORTS) == page
    assert page.read_bytes() == before


@pytest.mark.waits
def test_a_runs_metrics_can_be_scraped(distilled: Path) -> None:
    """Read the metrics from the node's Prometheus endpoint; Ray exports them every few seconds."""
    (node,) = ray.nodes()
    run, deadline = json.loads((distilled / "summary.json").read_text())["run"], time.monotonic() + 240
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[tuple[str, bool], float] = {}
    while found.get(("ray_raycloud_run_round", False)) != 3:
        assert time.monotonic() < deadline, found
        time.sleep(1)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                shown = answer.read().decode()
        except OSError:  # the node's agent starts later than Ray, and may be busy
            continue
        lines = [one for one in shown.splitlines() if "raycloud_run_" in one and run in one]
        found = {(one.split("{")[0], 'student="store"' in one): float(one.split()[-1]) for one in lines}
    assert found["ray_raycloud_run_loss", True] > 0
    assert found["ray_raycloud_run_tokens_per_second", True] > 0


def test_held_out_texts_add_up_to_the_summary(distilled: Path) -> None:
    summary = json.loads((distilled / "summary.json").read_text())
    texts = [json.loads(line) for line in (distilled / "held_out.jsonl").read_text().splitlines()]
    assert len({(text["group"], text["text"]) for text in texts}) == len(texts) == 4 * 8
    tokens = sum(text["tokens"] for text in texts)
    assert math.exp(sum(text["nll"] for text in texts) / tokens) == pytest.approx(summary["student_ppl_after"])
    assert sum(text["kl"] for text in texts) / tokens == pytest.approx(summary["kl_after"])
    assert sum(text["agree"] for text in texts) / tokens == pytest.approx(summary["agreement_after"])
    assert 0 < summary["kl_after"] < summary["kl_before"]


def test_students_of_several_kinds_learn_from_one_teacher(
    distilled: Path, tiny_llama: Path, foreigner: Path, tmp_path: Path
) -> None:
    """Recipe with the two edges of the other run, a smaller student and one with another tokenizer."""
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
    summary = run(recipe)
    assert list(summary["students"]) == ["store", "watch", "abroad"]
    assert all(one["student_ppl_after"] < one["student_ppl_before"] for one in summary["students"].values())
    assert summary["trained_tokens"] == sum(one["student_tokens"] for one in summary["students"].values())
    folder = tmp_path / "run" / "students"
    blocks = {one.name: AutoModelForCausalLM.from_pretrained(one).config.num_hidden_layers for one in folder.iterdir()}
    assert blocks == {"store": 2, "watch": 1, "abroad": tiny("llama").config.num_hidden_layers}
    # The others' company changes nothing.
    for name, tensor in weights(distilled).items():
        assert torch.equal(tensor, load_file(folder / "store" / "model.safetensors")[name])
    assert "student &#x27;watch&#x27;" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_kept_signals_serve_all_epochs_and_runs(tiny_llama: Path, tmp_path: Path) -> None:
    one: dict[str, Any] = {"edges": [{"name": "edge"}], "data": {"limit": 64}}

    def kept(output: str, teacher: Path = tiny_llama, **changes: Any) -> DistillRecipe:
        where = {"model": str(teacher), "signals": str(tmp_path / "signals")}
        return small(tiny_llama, tmp_path / output, teacher=where, **one, **changes)

    summary = run(kept("run"))
    assert summary["wire_bytes"]["signals"] == summary["trained_tokens"] * 16 * 2
    parts = {part: part.stat().st_mtime_ns for part in (tmp_path / "signals").glob("*.safetensors")}
    run(kept("again", objective={"kd": {"name": "reverse_kl", "temperature": 2.0}}))
    assert parts == {part: part.stat().st_mtime_ns for part in (tmp_path / "signals").glob("*.safetensors")}
    with_less = run(small(tiny_llama, tmp_path / "asked", **one))
    assert with_less["student_ppl_after"] == pytest.approx(summary["student_ppl_after"], rel=1e-3)
    with pytest.raises(DataError, match="stale: teacher is"):
        run(kept("other", teacher=scrambled(tiny_llama, tmp_path)))


def scrambled(model: Path, folder: Path) -> Path:
    """Copy of a model with other weights."""
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
        data={"source": "builtin:instruct", "format": "alpaca", "max_length": 96, "max_prompt_length": 80, "limit": 64},
        evaluation={
            "answers": 4,
            "generation": {"max_new_tokens": 6},
            "held_out_samples": 4,
            "prompts": ["The film"],
            "max_new_tokens": 2,
        },
        edges=[{"name": "edge"}],
        rounds={"count": 1, "steps": 2},
    )
    summary = run(recipe)
    assert all(0 <= summary[key] <= 100 for key in ("teacher_rouge_l", "rouge_l_before", "rouge_l_after"))


def test_an_objective_with_projectors_trains_them_beside_the_student(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        objective={"kd": {"name": "dskd_cma"}, "ce_weight": 0.5, "extras_lr": 1e-2},
        edges=[{"name": "edge"}],
        rounds={"count": 2, "steps": 6},
    )
    run(recipe)
    steps = records(tmp_path / "run", "step")
    assert {"dskd_cma", "dskd_cma/student_space", "dskd_cma/projected", "cross_entropy"} <= steps[0]["terms"].keys()
    projected = [step["terms"]["dskd_cma/projected"] for step in steps]
    assert sum(projected[-4:]) < sum(projected[:4])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["wire_bytes"]["embedding"] == 49_152 * 16 * 2
    assert summary["objective"]["kd"]["compat"] == "ours"


@pytest.fixture(scope="module")
def foreigner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student with another tokenizer."""
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
        edges=[{"name": "edge"}],
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
    """The recipe is supervised fine-tuning, which needs no signals of the teacher."""
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


def test_the_bytes_are_those_of_the_payloads(distilled: Path) -> None:
    summary = json.loads((distilled / "summary.json").read_text())
    wire, tokens = summary["wire_bytes"], summary["trained_tokens"]
    assert tokens == sum(record["tokens"] for record in records(distilled, "step"))
    assert wire["signals"] == tokens * 16 * 2  # hidden 16 in bfloat16
    assert wire["head"] == 2 * 49_152 * 16 * 2  # once to each edge
    assert wire["weights_down"] == wire["weights_up"] == 2 * 3 * 4 * summary["student_params"]
    assert summary["wire_bytes_per_token"] == (wire["ids"] + wire["signals"]) / tokens


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
