"""Evaluation of a plan against the unsplit model, the formula of bytes, and the emulated link."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raycloud.data.batches import IGNORE, Sample, length_sorted_batches
from raycloud.errors import DataError, ModelError, RecipeError
from raycloud.link.network import Network
from raycloud.models.loading import load, load_config, load_tokenizer
from raycloud.split.calibration import Calibration
from raycloud.split.calibration_texts import load_calibration_texts
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.evaluation import run, texts_by_budget
from raycloud.split.inference.messages import STEP_BYTES
from raycloud.split.parts import edge_bytes, export, load_edge
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.recipe import SplitEvaluateRecipe
from tests.clock import Clock

SOURCES = ("builtin:instruct", "builtin:reviews")


def recipe(model: Path, output: Path, **changes: Any) -> SplitEvaluateRecipe:
    values: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "start_block": 1,
        "end_block": 3,
        "codec": "float32",
        "tokens": 300,
        "new_tokens": 5,
        "network": {"mbit_s": 10, "rtt_ms": 20},
        "device": "cpu",
        "dtype": "float32",
    }
    return SplitEvaluateRecipe(**{**values, **changes})


def stock_perplexity(model: Path, tokens: int) -> float:
    """Compute the perplexity by the stock forward pass, text by text."""
    loaded, total, count = load(str(model), device="cpu").model, 0.0, 0
    for text in load_calibration_texts(SOURCES, "test", load_tokenizer(str(model)), tokens):
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            total += float(loaded(ids, labels=ids).loss) * (len(text.ids) - 1)
        count += len(text.ids) - 1
    return math.exp(total / count)


def test_an_exact_codec_has_the_perplexity_of_the_unsplit_model(tiny_llama: Path, tmp_path: Path) -> None:
    said: list[tuple[int, dict[str, float]]] = []
    summary = run(recipe(tiny_llama, tmp_path / "out"), report=lambda step, numbers: said.append((step, numbers)))
    assert summary["perplexity"] == pytest.approx(stock_perplexity(tiny_llama, 300), rel=1e-5)
    assert summary["unsplit_perplexity"] == pytest.approx(summary["perplexity"], rel=1e-5)
    assert [step for step, _ in said] == [37, 75, 150]
    assert 0 < summary["edge_ms_per_token"] < summary["ms_per_token"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert SplitEvaluateRecipe.load(tmp_path / "out" / "recipe.yaml").output == str(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["perplexity"] for line in lines] == [*(n["perplexity"] for _, n in said), summary["perplexity"]]


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the calibration that an evaluation wrote."""
    folder = tmp_path_factory.mktemp("calibrated")
    run(recipe(tiny_llama, folder / "out", codec="int8", calibration=str(folder / "kept")))
    return folder / "kept"


@pytest.mark.waits
@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
def test_bytes_are_those_of_the_formula_and_time_is_that_of_the_link(
    codec: str, tiny_llama: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, clock = Network(mbit_s=0.1, rtt_ms=30), Clock()
    # Computing takes none of its time, and of a text that is fed token by token one message is on its way at a time.
    for module in ("raycloud.link.network", "raycloud.split.inference.timing"):
        monkeypatch.setattr(f"{module}.time", clock)
    wanted = recipe(
        tiny_llama,
        tmp_path / "out",
        codec=codec,
        calibration=str(calibrated),
        network={"mbit_s": network.mbit_s, "rtt_ms": network.rtt_ms},
    )
    summary = run(wanted)
    codecs = CutCodecs(16)
    if codec == "int8":
        files = {path.name: Calibration.load(path) for path in calibrated.iterdir()}
        assert files.keys() == {"cut-1.safetensors", "cut-3.safetensors"}
        one, three = files["cut-1.safetensors"], files["cut-3.safetensors"]
        codecs = CutCodecs(16, Calibration(one.model, one.rotation, {**one.fitted, **three.fitted}))
    # A step and its reply, each with one coded hidden state.
    expected = 2 * STEP_BYTES + sum(codecs.cut_codec(codec, cut).payload_bytes(40, 1) for cut in (1, 3))
    assert summary["bytes_per_token"] == expected
    assert summary["ms_per_token"] == pytest.approx(network.rtt_ms + 1e3 * network.seconds(expected))


def test_an_examination_that_was_broken_off_begins_anew(tiny_llama: Path, tmp_path: Path) -> None:
    asked = recipe(tiny_llama, tmp_path / "out")

    def stop(step: int, numbers: dict[str, float]) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        run(asked, report=stop)
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    run(asked, "resume")
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 4


def test_what_is_wrong_is_said(tiny_llama: Path, calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cut 9 is beyond the model's 4 blocks"):
        run(recipe(tiny_llama, tmp_path / "out", end_block=9))
    with pytest.raises(DataError, match="new_tokens=9000 needs 9035"):
        run(recipe(tiny_llama, tmp_path / "out", new_tokens=9000))
    assert not (tmp_path / "out").exists()
    shutil.copytree(calibrated, tmp_path / "kept")
    (tmp_path / "kept" / "cut-1.safetensors").rename(tmp_path / "kept" / "cut-2.safetensors")
    other = recipe(tiny_llama, tmp_path / "out", codec="int8", calibration=str(tmp_path / "kept"), start_block=2)
    with pytest.raises(ModelError, match=r"cut-2\.safetensors' is not of cut 2 of this model"):
        run(other)
    for values, message in [
        ({"codec": "int5"}, "codec: no codec 'int5'; allowed: float32, float16"),
        ({"start_block": 3, "end_block": 3}, "start_block=3 and end_block=3; allowed: start_block < end_block"),
    ]:
        with pytest.raises(RecipeError, match=message):
            SplitEvaluateRecipe.parse(values)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (0, 4), (2, 2), (4, 4)])
def test_edge_memory_is_that_of_the_loaded_part(first: int, second: int, tiny_llama: Path, tmp_path: Path) -> None:
    plans = PlanSet.of(SplitPlan(first, second))
    part = load_edge(str(tiny_llama), plans, device="cpu", dtype="float32")
    tensors = {id(one): one for segment in (part.first, part.last) for one in segment.parameters()}
    found = edge_bytes(load_config(str(tiny_llama)), plans)
    exported = export(str(tiny_llama), plans, tmp_path / "parts")
    assert found == sum(one.nbytes for one in tensors.values()) == exported["edge"]
    assert edge_bytes(load_config(str(tiny_llama)), plans, torch.bfloat16) == found / 2


def test_portions_are_whole_texts_and_all_of_them() -> None:
    texts = [Sample(tuple(range(n)), 0) for n in (5, 4, 3, 2, 1)]
    found = list(texts_by_budget(texts, (6, 8, 20)))
    assert [[len(text.ids) for text in one] for one in found] == [[5, 4], [], [3, 2, 1]]
    assert all(batch.labels[0, -1] == IGNORE for batch in length_sorted_batches(texts[:1], 1, pad=0))
