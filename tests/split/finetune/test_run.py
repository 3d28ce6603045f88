"""A recipe becomes a result directory, also after it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raycloud.errors import Interrupted, RecipeError
from raycloud.results import read_records
from raycloud.split.finetune.edge import EdgeSide
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.run import run
from raycloud.training.loop import Step


def recipe(model: Path, output: Path, **changes: Any) -> SplitTuneRecipe:
    return SplitTuneRecipe.parse(
        {
            "output": str(output),
            "model": str(model),
            "split": 1,
            "second": 3,
            "task": {"kind": "language"},
            "data": {"source": "builtin:instruct", "max_length": 160, "limit": 24, "held_out": 8},
            "cut": {"kind": "narrow", "rank": 6, "form": "int8"},
            "training": {"lr": 5e-3, "batch_size": 4},
            "epochs": 1,
            "checkpoint_every": 2,
            "threads": 1,
            **changes,
        }
    )


def test_a_run_leaves_what_it_learned_and_a_stopped_one_ends_alike(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(recipe(tiny_llama, tmp_path / "whole"))
    assert summary["steps"] == 6
    assert summary["perplexity"] < summary["perplexity_before"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").num_parameters() > 0
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "held-out perplexity" in page and "kB of a step at the first cut" in page
    logged = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [record["step"] for record in logged] == [-1, 0, 1, 2, 3, 4, 5]

    step = EdgeSide.step

    def stopped(self: EdgeSide, batches: Any) -> Step:
        if self.trainer.step_index == 5:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(EdgeSide, "step", stopped)
    with pytest.raises(Interrupted, match="--resume"):
        run(recipe(tiny_llama, tmp_path / "parts"))
    monkeypatch.setattr(EdgeSide, "step", step)
    again = run(recipe(tiny_llama, tmp_path / "parts"), "resume")
    assert again["perplexity"] == summary["perplexity"]
    assert again["bytes_per_step"] == summary["bytes_per_step"]
    assert read_records(tmp_path / "parts" / "metrics.jsonl") == logged
    for name in ("model/model.safetensors", "edge.safetensors"):
        ours, theirs = load_file(tmp_path / "parts" / name), load_file(tmp_path / "whole" / name)
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize("learning", ["last", "last+middle"])
def test_with_fewer_parts_that_learn_fewer_gradients_cross(tiny_llama: Path, tmp_path: Path, learning: str) -> None:
    cut = {"kind": "narrow", "rank": 6, "form": "int8", "trained": False}
    summary = run(recipe(tiny_llama, tmp_path / "out", learning=learning, cut=cut, lora={"r": 2}))
    assert summary["perplexity"] < summary["perplexity_before"]
    ways = 1 if learning == "last" else 2
    tokens = summary["second_cut_bytes_per_step"] / ways / 64
    # Nothing but rows on their way up at the first cut: 6 bytes and a scale each.
    assert summary["first_cut_bytes_per_step"] < 1.5 * 8 * tokens + 400


def test_answers_are_learned_as_spans_of_their_texts(tmp_path: Path) -> None:
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    lines = []
    for n in range(80):
        context = f"House {n} stands by the lake. It is painted {colours[n % 6]} and has {n % 4} floors."
        answers = {"text": [colours[n % 6]], "answer_start": [context.index(colours[n % 6])]}
        lines.append(json.dumps({"question": f"Which colour has house {n}?", "context": context, "answers": answers}))
    (tmp_path / "houses.jsonl").write_text("\n".join(lines))
    summary = run(
        SplitTuneRecipe.parse(
            {
                "output": str(tmp_path / "out"),
                "split": 2,
                "second": 4,
                "task": {"kind": "span", "max_question": 16, "stride": 8},
                "data": {"source": str(tmp_path / "houses.jsonl"), "max_length": 64},
                "training": {"lr": 5e-4, "batch_size": 8},
                "epochs": 3,
                "threads": 1,
            }
        )
    )
    assert summary["f1"] > summary["f1_before"] + 0.3
    assert summary["exact_match"] > 0.5


def test_a_network_is_for_a_cloud_elsewhere(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="allowed: null, or a cloud elsewhere"):
        run(recipe(tiny_llama, tmp_path / "out", network={"mbit_s": 10}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": 3}, "split=3 and second=3; allowed: split < second"),
        ({"split": 0, "cut": {"kind": "sft"}}, "allowed: 1 or more"),
        ({"learning": "last"}, "allowed: cut.trained=false, or all"),
        ({"task": {"kind": "span", "stride": 96}}, "task.stride=96; allowed: 164 or more"),
        ({"cut": {"form": "int3"}}, "cut.form"),
        ({"edges": [{"name": "a"}, {"name": "a"}]}, "edges: names a, a; allowed: each once"),
        ({"edges": [{"name": "a"}], "edge": "b"}, "edge=b; allowed: a"),
        ({"edge": "b"}, "edge=b; allowed: none without edges"),
        ({"edges": [{"name": "a"}], "lora": {"r": 2}}, "not the mean of their products"),
        ({"edges": [{"name": "a"}], "cut": {"kind": "sft"}}, "allowed there: cut.kind narrow or plain"),
        ({"edges": [{"name": "a"}], "task": {"kind": "classification"}}, "task.classes: null"),
        (
            {"edges": [{"name": "a"}], "cut": {"kind": "plain"}, "learning": "last", "rounds": {"parts": "private"}},
            "nothing in common",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, tmp_path, **changes)
