"""From recipe to result directory, also after a stop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raycloud.data.batches import Batch
from raycloud.errors import Interrupted, RecipeError, TrainingError
from raycloud.link.channel import Channel, Loopback
from raycloud.models.loading import load, load_tokenizer, resolve
from raycloud.results import read_records
from raycloud.split.finetune.assembly import EdgeSetup
from raycloud.split.finetune.edge import UShapedEdge
from raycloud.split.finetune.examples import CALIBRATION_TEXTS, calibration_batches, load_examples
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.run import run
from raycloud.split.finetune.server import TuneLimits, TuneServer
from raycloud.split.finetune.sides import build_local_edge
from raycloud.split.finetune.traffic import check_batch_size
from raycloud.split.finetune.wire_format import WireFormat, WireFormats
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.training.loop import Step
from tests.split.finetune.wiring import batches, values


def recipe(model: Path, output: Path, **changes: Any) -> SplitTuneRecipe:
    return SplitTuneRecipe.parse(
        {
            "output": str(output),
            "model": str(model),
            "start_block": 1,
            "end_block": 3,
            "task": {"kind": "language"},
            "data": {"source": "builtin:instruct", "max_length": 160, "limit": 24, "held_out_samples": 8},
            "uplink": {"kind": "low_rank", "rank": 6, "dtype": "int8"},
            "training": {"lr": 5e-3, "batch_size": 4},
            "epochs": 1,
            "checkpoint_every": 2,
            "threads": 1,
            **changes,
        }
    )


def _stopping(step: Callable[[UShapedEdge, Any], Step], at: int) -> Callable[[UShapedEdge, Any], Step]:
    def stopped(self: UShapedEdge, batches: Any) -> Step:
        if self.trainer.step_index == at:
            raise KeyboardInterrupt
        return step(self, batches)

    return stopped


def test_a_run_leaves_what_it_learned_and_a_stopped_one_ends_alike(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = run(recipe(tiny_llama, tmp_path / "whole"))
    assert summary["steps"] == 6
    assert summary["bos"] == "no (the tokenizer's own post-processor)"
    assert summary["perplexity"] < summary["perplexity_before"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model").num_parameters() > 0
    assert summary["bytes_up_per_step"] + summary["bytes_down_per_step"] == summary["bytes_per_step"]
    assert not (tmp_path / "whole" / "checkpoints").exists()
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "held-out perplexity" in page and "kB per step at the first cut" in page
    logged = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [record["step"] for record in logged] == [-1, 0, 1, 2, 3, 4, 5]
    assert run(recipe(tiny_llama, tmp_path / "whole"), "resume") == summary, "what is complete stays as it is"

    monkeypatch.setattr(UShapedEdge, "step", _stopping(UShapedEdge.step, at=5))
    with pytest.raises(Interrupted, match="--resume"):
        run(recipe(tiny_llama, tmp_path / "parts"))
    monkeypatch.undo()
    again = run(recipe(tiny_llama, tmp_path / "parts"), "resume")
    assert again["perplexity"] == summary["perplexity"]
    assert again["bytes_per_step"] == summary["bytes_per_step"]
    assert read_records(tmp_path / "parts" / "metrics.jsonl") == logged
    for name in ("model/model.safetensors", "edge.safetensors"):
        ours, theirs = load_file(tmp_path / "parts" / name), load_file(tmp_path / "whole" / name)
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_a_form_alone_is_short_for_rows_in_that_form(tmp_path: Path) -> None:
    short, long = (
        recipe(tmp_path, tmp_path, downlink=downlink) for downlink in ("int8", {"kind": "plain", "dtype": "int8"})
    )
    assert short == long
    assert SplitTuneRecipe.load(_written(tmp_path, short), ["downlink=float16"]).downlink.dtype == "float16"


def _written(folder: Path, made: SplitTuneRecipe) -> Path:
    (folder / "recipe.yaml").write_text(made.dump())
    return folder / "recipe.yaml"


@pytest.mark.parametrize("activation_delta", [False, True])
def test_a_run_with_codes_at_both_cuts_ends_alike_after_a_stop(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation_delta: bool
) -> None:
    downlink = {
        "kind": "low_rank",
        "rank": 12,
        "num_outliers": 1,
        "dtype": "int4",
        "activation_delta": activation_delta,
    }
    summary = run(recipe(tiny_llama, tmp_path / "whole", downlink=downlink, epochs=2))
    assert summary["perplexity"] < summary["perplexity_before"]
    assert summary["bottleneck_bytes"] > 0
    monkeypatch.setattr(UShapedEdge, "step", _stopping(UShapedEdge.step, at=9))
    with pytest.raises(Interrupted, match="--resume"):
        run(recipe(tiny_llama, tmp_path / "parts", downlink=downlink, epochs=2))
    monkeypatch.undo()
    again = run(recipe(tiny_llama, tmp_path / "parts", downlink=downlink, epochs=2), "resume")
    assert again["perplexity"] == summary["perplexity"]
    ours, theirs = (load_file(tmp_path / name / "edge.safetensors") for name in ("parts", "whole"))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert {"encoder.weight", "decoder.weight", "decoder.apart"} <= theirs.keys()


@pytest.mark.parametrize(
    ("trainable", "trained_parts"),
    [
        ("all", {"first", "encoder", "decoder", "last"}),
        ("last+middle", {"decoder", "last"}),
        ("last", {"decoder", "last"}),
    ],
)
def test_each_end_of_a_code_learns_with_its_side(
    tiny_llama: Path, tmp_path: Path, trainable: str, trained_parts: set[str]
) -> None:
    """The edge trains the encoder with its first part and the decoder with its last; the cloud's middle has both."""
    for trained in (True, False):
        cut = {"kind": "low_rank", "rank": 6, "trained": trained, "dtype": "float32"}
        mine = recipe(tiny_llama, tmp_path, trainable=trainable, uplink=cut, downlink=cut)
        model = load(str(tiny_llama), device="cpu", dtype="float32").model
        edge = build_local_edge(model, mine, batches(0, 2, language=True), total_steps=4)
        cloud = edge.cloud.trainer  # type: ignore[attr-defined]
        before = values({**edge.modules, **{f"cloud.{name}": module for name, module in cloud.modules.items()}})
        edge.step(batches(1, 2, language=True))
        after = values({**edge.modules, **{f"cloud.{name}": module for name, module in cloud.modules.items()}})
        moved = {name.rpartition(".")[0] for name in after if not torch.equal(after[name], before[name])}
        found = {name.removeprefix("cloud.").partition(".")[0] for name in moved if not name.startswith("cloud.")}
        codes = {"encoder", "decoder"}
        assert found == (trained_parts if trained else trained_parts - codes)
        theirs = {name.split(".")[1] for name in moved if name.startswith("cloud.")}
        expected = set() if trainable == "last" else {"middle"} | (codes if trained else set())
        assert theirs == expected


@pytest.mark.parametrize("trainable", ["last", "last+middle"])
def test_with_fewer_parts_that_learn_fewer_gradients_cross(tiny_llama: Path, tmp_path: Path, trainable: str) -> None:
    cut = {"kind": "low_rank", "rank": 6, "dtype": "int8", "trained": False}
    summary = run(recipe(tiny_llama, tmp_path / "out", trainable=trainable, uplink=cut, lora={"r": 2}))
    assert summary["perplexity"] < summary["perplexity_before"]
    ways = 1 if trainable == "last" else 2
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
                "start_block": 2,
                "end_block": 4,
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


class Host:
    """Cloud with MiniLM's blocks [3, 6) behind channels, which can be killed."""

    def __init__(self, folder: Path, *, tail: bool = False, limits: TuneLimits | None = None) -> None:
        self._limits = limits
        plans = PlanSet.of(SplitPlan(3, 6))
        self._part = load_cloud("builtin:minilm-l6", plans, device="cpu", dtype="float32", training=True, tail=tail)
        self._folder = folder
        self._start()

    def _start(self) -> None:
        self._server = TuneServer(self._part, self._folder, self._limits, threads=1)
        self._loopback = Loopback(lambda connection: self._server.serve(connection, "me"))

    def connect(self, session: str) -> Channel:
        return self._loopback.connect()

    def kill(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._loopback.close()
        self._server.close()


def reviews(output: Path, **changes: Any) -> SplitTuneRecipe:
    return SplitTuneRecipe.parse(
        {
            "output": str(output),
            "task": {"kind": "classification", "label": "domain"} | changes.pop("task", {}),
            "data": {"limit": 16, "held_out_samples": 24, "max_length": 48},
            "uplink": {"rank": 16, "dtype": "float32"},
            "training": {"lr": 1e-3, "batch_size": 8},
            "epochs": 1,
            "threads": 1,
            **changes,
        }
    )


def test_a_cloud_that_is_lost_while_held_out_texts_are_judged_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(reviews(tmp_path / "here"))
    with closing(Host(tmp_path / "cloud")) as cloud:
        step, lost = UShapedEdge.step, iter([True])

        def losing(self: UShapedEdge, batches: Any) -> Step:
            if self.trainer.step_index == 1 and next(lost, False):
                cloud.kill()
            return step(self, batches)

        monkeypatch.setattr(UShapedEdge, "step", losing)
        predict, times = UShapedEdge.predict, itertools.count()

        def breaking(self: UShapedEdge, batch: Batch) -> Tensor:
            if next(times) in (1, 6):  # before training, and after it
                cloud.kill()
            return predict(self, batch)

        monkeypatch.setattr(UShapedEdge, "predict", breaking)
        there = run(reviews(tmp_path / "there"), connect=cloud.connect)
    assert next(times) == 2 * (2 + 3)
    assert [record["step"] for record in read_records(tmp_path / "there" / "metrics.jsonl")] == [-1, 0, 1]
    assert {name: there[name] for name in ("accuracy_before", "accuracy")} == {
        name: here[name] for name in ("accuracy_before", "accuracy")
    }


@pytest.mark.parametrize("trainable", ["all", "last"])
def test_over_a_link_the_first_row_goes_through_the_models_own_pooler(tmp_path: Path, trainable: str) -> None:
    def made(name: str) -> SplitTuneRecipe:
        return reviews(tmp_path / name, task={"pooling": "first"}, trainable=trainable)

    here = run(made("here"))
    with closing(Host(tmp_path / "cloud")) as cloud:
        there = run(made("there"), connect=cloud.connect)
    assert there["bytes_per_step"] == here["bytes_per_step"]
    ours, theirs = (load_file(tmp_path / name / "edge.safetensors") for name in ("there", "here"))
    assert ours.keys() == theirs.keys()
    assert {"head.pooler.dense.weight", "head.classifier.weight"} <= ours.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_a_micro_batch_that_no_message_holds_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    def connect(session: str) -> Channel:
        raise AssertionError

    mine = reviews(
        tmp_path / "out",
        uplink={"kind": "plain", "dtype": "float32"},
        data={"limit": 600},
        training={"batch_size": 600},
    )
    with pytest.raises(RecipeError, match=r"training\.batch_size: .* MB, a message holds 8\.3; allowed: fewer"):
        run(mine, connect=connect)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (TuneLimits(tokens=64), r"training\.batch_size: \d+ tokens in a batch; this cloud takes 64, padding included"),
        (TuneLimits(message_bytes=4096), r"training\.batch_size: .* a message holds 0\.0; allowed: fewer"),
    ],
)
def test_the_limits_of_the_cloud_at_hand_are_known_before_the_first_step(
    limits: TuneLimits, said: str, tmp_path: Path
) -> None:
    host = Host(tmp_path / "cloud", limits=limits)
    with closing(host), pytest.raises(RecipeError, match=said) as raised:
        run(reviews(tmp_path / "out"), connect=host.connect)
    assert "\n" not in str(raised.value)


def test_the_longest_held_out_texts_must_fit_a_message_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = reviews(tmp_path / "out", uplink={"kind": "plain", "dtype": "float32"})
    ends: list[int] = []

    def check(self: EdgeSetup, tokens: int, fitted_to: object) -> None:
        ends.append(tokens)
        raise RecipeError("enough")

    monkeypatch.setattr(EdgeSetup, "check_batch_size", check)
    with pytest.raises(RecipeError, match="enough"):
        run(mine, connect=lambda session: pytest.fail("a channel was opened"))
    _, held_out, _ = load_examples(mine, load_tokenizer(resolve(mine.model)), print)
    assert ends[0] >= sum(sorted(held_out.lengths)[-8:])


def test_codes_are_fitted_to_no_more_texts_at_once_than_are_learned_from(tmp_path: Path) -> None:
    mine = reviews(tmp_path / "out")
    texts, _, _ = load_examples(mine, load_tokenizer(resolve(mine.model)), print)
    for most, size in ((3, 3), (100, CALIBRATION_TEXTS)):
        sizes = [len(batch.ids) for batch in calibration_batches(texts, 16, most=most)]
        assert sum(sizes) == 16
        assert max(sizes) == size


def test_what_codes_are_fitted_to_must_fit_a_message_of_the_first_cut_alone() -> None:
    wide, slim = WireFormat("float32", 1024), WireFormat("int8", 8)
    with pytest.raises(RecipeError, match=r"3,000 tokens of 4,\d+ bytes take 12\.\d MB"):
        check_batch_size(10, WireFormats(wide, slim), "none", fitted=3000)
    check_batch_size(10, WireFormats(slim, wide), "none", fitted=3000)


@pytest.mark.parametrize("kind", ["plain", "low_rank"])
def test_only_a_low_rank_second_cut_has_texts_sent_to_fit_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = reviews(
        tmp_path / "out", start_block=2, end_block=4, downlink={"kind": kind, "rank": 8} if kind == "low_rank" else {}
    )
    seen: list[int] = []

    def check(tokens: int, wire_formats: WireFormats, pooling: str, fitted: int) -> None:
        seen.append(fitted)
        raise RecipeError("enough")

    monkeypatch.setattr("raycloud.split.finetune.assembly.check_batch_size", check)
    with pytest.raises(RecipeError, match="enough"):
        run(mine, connect=lambda session: pytest.fail("a channel was opened"))
    assert (seen[0] > 0) == (kind == "low_rank")


def test_every_published_recipe_fits_the_messages_of_a_link() -> None:
    """The longest texts, in a micro-batch and in the evaluation batches."""
    published = [path for path in Path("jobs/recipes").glob("sft-bert-*/*.yaml") if path.stem != "base"]
    assert len(published) == 20
    for path in published:
        mine = SplitTuneRecipe.load(path)
        width = 1024 if "large" in mine.model else 768
        pooling = "none" if mine.task.kind == "span" else "mean"
        wire_formats = WireFormats(
            WireFormat(mine.uplink.dtype, mine.uplink.rank), WireFormat(mine.downlink.dtype, width)
        )
        check_batch_size(mine.data.max_length * mine.training.batch_size, wire_formats, pooling)


def test_published_recipes_have_the_published_lengths_rates_and_epochs() -> None:
    """Those of config.py in each task's folder of the published program, a copy of which is
    github.com/Brudalaxe/BERTSplitFineTuning at 7df6fb9 (lines 25 to 30); it has no WNLI."""
    published = {
        "cola": (32, 2e-5, 3),
        "mnli": (128, 2e-5, 3),
        "mrpc": (128, 3e-5, 4),
        "qnli": (128, 2e-5, 3),
        "qqp": (96, 2e-5, 3),
        "rte": (256, 2e-5, 4),
        "sst2": (66, 2e-5, 3),
        "squad": (384, 3e-5, 2),
        "stsb": (96, 2e-5, 3),
    }
    for size in ("base", "large"):
        for task, (length, lr, epochs) in published.items():
            mine = SplitTuneRecipe.load(Path(f"jobs/recipes/sft-bert-{size}/{task}.yaml"))
            assert (mine.data.max_length, mine.training.lr, mine.epochs) == (length, lr, epochs), (size, task)
            assert mine.training.batch_size * mine.training.gradient_accumulation_steps == (
                12 if task == "squad" else 32
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_block": 0, "uplink": {"kind": "plain"}, "lora": {"r": 2}, "end_block": 2, "trainable": "last"}, None),
        (
            {"start_block": 0, "uplink": {"kind": "plain"}, "lora": {"r": 2}, "end_block": None},
            "leave the edge nothing to train",
        ),
        (
            {"trainable": "last", "lora": {"r": 2}, "end_block": None},
            "trainable=last and labels=edge leave the edge nothing",
        ),
        ({"data": {"max_length": 100_000}}, "data.max_length=100000; allowed: up to the model's"),
    ],
)
def test_an_edge_needs_something_to_learn(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    """If no block before the cut has adapters, no gradient is sent across it."""
    mine = recipe(tiny_llama, tmp_path / "out", **changes)
    if message is None:
        assert run(mine)["steps"] == 6
    else:
        with pytest.raises(RecipeError, match=message):
            run(mine)


def test_weights_that_run_away_end_the_run_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    wild = recipe(
        tiny_llama, tmp_path / "out", training={"lr": 1e12, "batch_size": 4}, uplink={"rank": 6, "dtype": "float32"}
    )
    with pytest.raises(TrainingError, match=r"^step \d: the numbers are not all finite; a smaller training\.lr"):
        run(wild)


def test_a_network_is_for_a_cloud_elsewhere(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="allowed: null, or a cloud elsewhere"):
        run(recipe(tiny_llama, tmp_path / "out", network={"mbit_s": 10}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downlink": {"kind": "sft"}}, "downlink.kind: input should be 'low_rank' or 'plain', got 'sft'"),
        ({"downlink": "int3"}, "downlink.dtype: .*, got 'int3'"),
        ({"downlink": {"activation_delta": True}}, "epochs=1 visits no text a second time"),
        ({"start_block": 3}, "start_block=3 and end_block=3; allowed: start_block < end_block"),
        ({"start_block": 0, "uplink": {"kind": "sft"}}, "allowed: 1 or more"),
        ({"task": {"kind": "span", "stride": 96}}, "task.stride=96; allowed: 164 or more"),
        ({"uplink": {"dtype": "int3"}}, "uplink.dtype"),
        ({"seed": -1}, "seed: .*, got -1"),
        ({"training": {"gradient_checkpointing": True}}, "allowed across a cut: false"),
        ({"task": {"kind": "classification", "classes": ["a", "a"]}}, "allowed: texts or numbers, each once"),
        ({"task": {"kind": "classification", "classes": [["a"], ["b"]]}}, "allowed: texts or numbers, each once"),
        ({"edges": [{"name": "a"}, {"name": "a"}]}, "edges: names a, a; allowed: each once"),
        ({"edges": [{"name": "a"}], "edge": "b"}, "edge=b; allowed: a"),
        ({"edge": "b"}, "edge=b; allowed: none without edges"),
        ({"edges": [{"name": "a"}], "lora": {"r": 2}}, "not the mean of their products"),
        ({"edges": [{"name": "a"}], "uplink": {"kind": "sft"}}, "allowed there: uplink.kind low_rank or plain"),
        ({"edges": [{"name": "a"}], "task": {"kind": "classification"}}, "task.classes: null"),
        (
            {
                "edges": [{"name": "a"}],
                "uplink": {"kind": "plain"},
                "trainable": "last",
                "rounds": {"parts": "private"},
            },
            "nothing in common",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, tmp_path, **changes)
