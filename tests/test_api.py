"""The Python API: what ``import raycloud`` offers, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import raycloud
from raycloud.distill.recipe import DistillRecipe
from raycloud.edge.whole_model import load_whole
from raycloud.errors import LinkSetupError, ModelError, RecipeError, ResultError
from raycloud.evaluation.recipe import EvaluateRecipe, GenerationRecipe
from raycloud.models.generation import Decoding
from raycloud.models.loading import load
from raycloud.models.sampling import Sampling
from raycloud.models.segments import Segment
from raycloud.split.inference.server_info import ServerInfo
from tests.edge.test_endpoint import OFFER
from tests.models.families import tiny

LIGHT = """
import sys
import raycloud
from raycloud import Result, run

heavy = {"torch", "ray", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
print(*dir(raycloud))
"""


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert set(raycloud.__all__) <= set(done.stdout.split())


def test_its_names_are_those_of_the_rooms() -> None:
    assert raycloud.load is load and raycloud.Segment is Segment
    assert all(callable(getattr(raycloud, name)) for name in raycloud.__all__)
    with pytest.raises(AttributeError, match="module 'raycloud' has no attribute 'distil'"):
        raycloud.distil  # noqa: B018


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> EvaluateRecipe:
    rows = [{"instruction": f"Name number {number}", "input": "", "output": "one"} for number in range(3)]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateRecipe(
        models=[str(tiny_llama)],
        data=[str(data)],
        split="all",
        seeds=[1],
        generation=GenerationRecipe(max_new_tokens=2),
    )


def test_a_recipe_and_its_file_run_alike(recipe: EvaluateRecipe, tmp_path: Path) -> None:
    here = raycloud.run(recipe, limit=2, **{"generation.top_k": 3})
    assert here.path is None and here.summary["questions"] == {f"{tmp_path.name}-words": 2}
    with pytest.raises(ResultError, match="has written no single model"):
        here.model_path  # noqa: B018
    file = tmp_path / "evaluate.yaml"
    file.write_text(recipe.dump())
    out = tmp_path / "out"
    there = raycloud.run(file, limit=2, output=out, **{"generation.top_k": 3})
    assert there.path == out and there.summary["sets"] == here.summary["sets"]
    assert raycloud.run(file, mode="resume", limit=2, output=out, **{"generation.top_k": 3}) == there


def test_what_is_no_jobs_recipe_is_refused(recipe: EvaluateRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no job None; allowed: tune_teacher, distill"):
        raycloud.run(GenerationRecipe())
    with pytest.raises(RecipeError, match="unknown key 'limits'"):
        raycloud.run(recipe, limits=2)
    with pytest.raises(RecipeError, match="limit: input should be greater than 0"):
        raycloud.run(recipe, limit=0)
    with pytest.raises(RecipeError, match="cannot read recipe"):
        raycloud.run(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="a DistillRecipe; allowed: EvaluateRecipe"):
        raycloud.run(DistillRecipe().model_copy(update={"job": "evaluate"}))


def test_a_split_model_writes_what_the_whole_one_does(tiny_llama: Path) -> None:
    whole, prompt = load_whole(str(tiny_llama)), "The three primary colours are"
    split = raycloud.SplitModel.from_pretrained(str(tiny_llama), start_block=1, end_block=3)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=5)):
        expected = [chunk.text for chunk in whole.pieces(whole.prompt(prompt), 8, Decoding(sampling))]
        said = list(split.stream(prompt, 8, temperature=sampling.temperature, seed=sampling.seed))
        assert said == expected and "".join(said)
    assert split.generate(prompt, max_new_tokens=8) == "".join(split.stream(prompt, 8))


def test_a_split_needs_both_blocks_and_a_model_that_writes(tiny_llama: Path, tmp_path: Path) -> None:
    make = raycloud.SplitModel.from_pretrained
    with pytest.raises(ModelError, match="a split needs start_block and end_block"):
        make(str(tiny_llama), start_block=1)
    with pytest.raises(ModelError, match="a split needs start_block and end_block"):
        make(str(tiny_llama), end_block=1, cloud="wss://cloud/v1/split")
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        make(str(tmp_path), start_block=1, end_block=1)


def test_other_blocks_than_the_clouds_are_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = ServerInfo.model_validate(OFFER)
    monkeypatch.setattr("raycloud.edge.endpoint.CloudEndpoint.server_info", lambda self: info)
    with pytest.raises(LinkSetupError, match=r"wss://cloud/v1/split does not run blocks \[1, 3\)"):
        raycloud.SplitModel.from_pretrained(str(tiny_llama), start_block=1, end_block=3, cloud="wss://cloud/v1/split")
