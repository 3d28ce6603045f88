"""Recipes: overrides, and one clear line for every error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from pydantic import Field

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import RecipeError
from raycloud.jobs.registry import load_recipe
from raycloud.recipe import Recipe, read_yaml

DEMO = Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml"


def test_every_shipped_recipe_is_valid_survives_its_own_dump_and_has_its_own_output(tmp_path: Path) -> None:
    paths = sorted(DEMO.parent.rglob("*.yaml"))
    outputs = set()
    for path in paths:
        recipe = load_recipe(path)
        (tmp_path / "again.yaml").write_text(recipe.dump())
        assert type(recipe).load(tmp_path / "again.yaml") == recipe
        outputs.add(recipe.model_dump()["output"])
    assert len(outputs) == len(paths) > 40


def test_published_recipes_hold_the_published_settings() -> None:
    recipes = {
        f"{path.parent.name}/{path.stem}": DistillRecipe.load(path)
        for path in DEMO.parent.glob("*-from-*/*.yaml")
        if path.stem != "sft_teacher"
    }
    for name, recipe in recipes.items():
        training, rounds = recipe.training, recipe.rounds
        assert rounds.steps == 11_435 // (training.batch_size * training.gradient_accumulation_steps), name
        assert training.lr * training.lr_floor == pytest.approx(1e-7), name
        if name.startswith(("tinyllama", "gpt2-xl")):
            assert recipe.student.lora is not None and (recipe.student.lora.r, recipe.student.lora.alpha) == (256, 8)
    gpt2 = recipes["gpt2-from-qwen1.5-1.8b/dskd_cma"]
    assert gpt2.rounds.steps * gpt2.rounds.count == 7_140
    objective = recipes["gpt2-from-qwen1.5-1.8b/mcw_kd"].objective
    assert (objective.ce_weight, objective.kd_weight, objective.kd.temperature) == (1.0, 5.0, 3.0)


def test_published_teachers_are_tuned_as_published() -> None:
    teachers = {
        path.parent.name: TuneTeacherRecipe.load(path) for path in DEMO.parent.glob("*-from-*/sft_teacher.yaml")
    }
    assert len(teachers) == 4
    for name, recipe in teachers.items():
        assert recipe.training.batch_size * recipe.training.gradient_accumulation_steps == 32
        assert recipe.training.lr * recipe.training.lr_floor == pytest.approx(1e-7)
        assert (recipe.epochs, recipe.deepspeed.stage) == (10, 1)
        assert (recipe.lora is None) == ("qwen1.5" in name)
    large = TuneTeacherRecipe.load(DEMO.parent / "teacher_33b.yaml").deepspeed
    assert (large.stage, large.offload_optimizer, large.offload_parameters) == (3, True, True)


def test_overrides_reach_any_depth() -> None:
    recipe = DistillRecipe.load(
        DEMO,
        [
            "training.lr=1e-3",
            "edges.1.name=depot",
            "objective.kd={name: js_divergence, beta: 0.3}",
            "evaluation.by=null",
            "student.blocks=[0, 3, 29]",
        ],
    )
    assert recipe.training.lr == 1e-3
    assert recipe.edges[1].name == "depot"
    assert recipe.objective.kd.model_dump()["beta"] == 0.3
    assert recipe.evaluation.by is None
    assert recipe.student.blocks == [0, 3, 29]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lrr=1", r"unknown key 'training.lrr' \(allowed: lr, lr_floor, schedule"),
        ("training.clip=1", r"training\.clip: this key is called max_grad_norm now$"),
        ("student.lora={targets: [q_proj]}", r"student\.lora\.targets: this key is called target_modules now$"),
        ("evaluation.generation.new_tokens=1", r"generation\.new_tokens: this key is called max_new_tokens now$"),
        ("colour=red", r"unknown key 'colour' \(allowed: job, output, seed"),
        ("training.lr=-1", "training.lr: input should be greater than 0, got -1"),
        ("training.lr=fast", "training.lr: input should be a valid number.*got 'fast'"),
        ("objective.kd.name=kl", "forward_kl.*reverse_kl.*adaptive_kl"),
        (
            "objective.kd={name: js_divergence, betaa: 1}",
            r"betaa' \(allowed: name, temperature,.*beta\)",
        ),
        (
            "objective.kd={name: dskd, divergence: {name: reverse_kl, temperature: 2}}",
            r"divergence\.temperature is 2\.0 and has no effect; allowed: 1\.0, the objective's applies",
        ),
        ("objective.kd={temperature: 2}", r"missing key 'objective\.kd\.name'"),
        ("evaluation.prompts=[]", r"evaluation\.prompts: list should have at least 1 item"),
        ("evaluation.prompts.0.x=1", "'0' is a value and has no keys"),
        ("training.betas=[0.9, 1.5]", r"training\.betas\.1: input should be less than 1, got 1\.5"),
        ("training.lr=.inf", r"training\.lr: input should be a finite number"),
        ("dtype=float16", "dtype: input should be 'auto', 'float32' or 'bfloat16'"),
        ("signal.kind=scalars", "'scalars' is not sufficient for objective.kd 'forward_kl'; allowed: hidden"),
        ("objective={kd_weight: 0}", "ce_weight and kd_weight must not both be 0"),
        ("edges.0.name=newsroom", "the name 'newsroom' is given twice"),
        ("edges.0.part=2", "has part 2 of 1; allowed: 0 to 0"),
        (
            "edges.0.colour=red",
            r"unknown key 'edges.0.colour' \(allowed: name, where, part, of, student, objective, device\)",
        ),
        ("edges.7.name=x", "'7' must be an index from 0 to 1"),
        ("seed", "must look like key.sub=value"),
        ("seed.sub=1", "'seed' is a value and has no keys"),
        ("seed={", "the value is not YAML"),
        ("device=tpu", "device: input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_mistakes_are_one_line_that_says_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        DistillRecipe.load(DEMO, [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read recipe"), ("", "must be a mapping.*empty"), ("- 1", "a list"), ("a: [", "is not YAML")],
)
def test_files_that_are_no_recipe(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=message) as raised:
        DistillRecipe.load(path)
    assert "\n" not in str(raised.value)


def test_a_recipe_extends_another_mapping_by_mapping(tmp_path: Path) -> None:
    (tmp_path / "pair").mkdir()
    (tmp_path / "all.yaml").write_text("seed: 3\ntraining: {lr: 1.0e-3, batch_size: 4, betas: [0.5, 0.6]}\n")
    (tmp_path / "pair" / "base.yaml").write_text("extends: ../all.yaml\ntraining: {batch_size: 8}\n")
    child = tmp_path / "pair" / "child.yaml"
    child.write_text("extends: base.yaml\ntraining: {betas: [0.7, 0.8]}\nevaluation: {by: null}\n")
    assert read_yaml(child) == {
        "seed": 3,
        "training": {"lr": 1e-3, "batch_size": 8, "betas": [0.7, 0.8]},
        "evaluation": {"by": None},
    }
    recipe = DistillRecipe.load(child, ["training.lr=2e-3"])
    assert (recipe.seed, recipe.training.lr, recipe.training.batch_size) == (3, 2e-3, 8)
    assert "extends" not in recipe.dump()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("extends: nowhere.yaml", "extends names a file that does not exist: '.*nowhere.yaml'"),
        ("extends: recipe.yaml", "extends forms a cycle, it leads back to 'recipe.yaml'"),
        ("extends: other.yaml", "other.yaml': extends forms a cycle, it leads back to './recipe.yaml'"),
        ("extends: [a]", "extends must name a file, it is a list"),
        ("extends:", "extends must name a file, it is empty"),
    ],
)
def test_recipes_that_extend_nothing_sensible(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: ./recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message) as raised:
        DistillRecipe.load(tmp_path / "recipe.yaml")
    assert "\n" not in str(raised.value)


class Item(Recipe):
    renamed: ClassVar[dict[str, str]] = {"old": "new"}
    kind: Literal["item"] = "item"
    new: int = 0


class Other(Recipe):
    kind: Literal["other"] = "other"
    size: int = 0


class Whole(Recipe):
    one: Item = Item()
    some: list[Item] = []
    maybe: Item | None = None
    either: Annotated[Item | Other, Field(discriminator="kind")] = Other()
    untagged: Item | Other = Item()
    named: dict[str, Item] = {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"one": {"old": 1}}, "recipe: one.old: this key is called new now"),
        ({"some": [{}, {"old": 1}]}, "recipe: some.1.old: this key is called new now"),
        ({"maybe": {"old": 1}}, "recipe: maybe.old: this key is called new now"),
        ({"either": {"kind": "item", "old": 1}}, "recipe: either.item.old: this key is called new now"),
        ({"either": {"kind": "other", "old": 1}}, "unknown key 'either.other.old' (allowed: kind, size)"),
        ({"untagged": {"old": 1}}, "untagged.Item.old: this key is called new now"),
        ({"named": {"a": {"old": 1}}}, "recipe: named.a.old: this key is called new now"),
        ({"old": 1}, "unknown key 'old' (allowed: one, some, maybe, either, untagged, named)"),
    ],
)
def test_a_former_key_is_refused_with_its_new_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Whole.parse(values)


def test_an_override_of_a_former_key_is_refused_with_its_new_name() -> None:
    with pytest.raises(RecipeError, match=r"^recipe: one\.old: this key is called new now$") as raised:
        Whole.parse({}, ["one.old=1"])
    assert raised.value.exit_code == 2


def test_the_schema_describes_every_field() -> None:
    schema = DistillRecipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert "Peak learning rate" in yaml.safe_dump(schema)
