"""Search spaces: their trials, and errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycloud.data.fingerprint import data_sources
from raycloud.errors import RecipeError
from raycloud.search.rows import TrialRow, latest
from raycloud.search.space import Metric, Space, Variant, example_trial, load_space, point_of, trials

ROOT = Path(__file__).parents[2]
PPL = Metric(name="student_ppl_after", direction="min")


def space(**changes: Any) -> Space:
    values: dict[str, Any] = {
        "base": {"job": "distill", "training": {"lr": 1e-3}},
        "variants": {"a": Variant(), "b": Variant(overrides={"objective.kd": {"name": "dskd", "version": 1}})},
        "metrics": [PPL],
    }
    return Space(**{**values, **changes})


def test_trials_are_variants_times_grid_times_seeds_first_seeds_first() -> None:
    found = trials(space(grid={"training.lr": [1e-5, 1e-4]}, seeds=[1, 2]))
    assert [(trial.variant, trial.seed) for trial in found] == [
        (f"{name}, training.lr={lr}", seed) for seed in (1, 2) for name in "ab" for lr in (1e-5, 1e-4)
    ]
    values: list[Any] = [trial.recipe for trial in found]
    assert [value.training.lr for value in values[:4]] == [1e-5, 1e-4, 1e-5, 1e-4]
    assert [value.seed for value in values] == [1] * 4 + [2] * 4
    assert values[2].objective.kd.model_dump()["version"] == 1
    assert len({trial.folder for trial in found}) == 8


def test_a_variants_own_seeds_stand_for_the_spaces() -> None:
    both = {"a": Variant(seeds=[1, 2, 3]), "b": Variant(overrides={"rounds.count": 2})}
    found = trials(space(variants=both, seeds=[7]))
    assert [(trial.variant, trial.seed) for trial in found] == [("a", 1), ("b", 7), ("a", 2), ("a", 3)]


def test_the_fingerprint_is_of_all_of_the_recipe_but_its_output() -> None:
    def prints(*overrides: str) -> list[str]:
        return [trial.fingerprint for trial in trials(space(), overrides)]

    assert prints() == prints("output=elsewhere") == prints("training.max_grad_norm=1.0")
    assert not set(prints()) & set(prints("rounds.count=9"))
    assert trials(space(), ["training.lr=0.1"])[0].recipe.model_dump()["training"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "nothing varies"),
        ({"grid": {"training.lr": []}}, "'training.lr' has no values"),
        ({"baseline": "c"}, "baseline is 'c'; allowed: null, a, b"),
        ({"references": {"a": {}}}, "'a' is the name of a variant"),
        ({"references": {"none": {"rouge": "x"}}}, "no metric 'rouge'; allowed: student_ppl_after"),
        ({"metrics": []}, "metrics"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"bad": Variant(overrides={"training.lrr": 1})}}, "variant 'bad': unknown key 'training.lrr'"),
        ({"base": {"job": "bake"}}, "job is 'bake'; allowed: distill"),
        ({"base": {}}, "job is None; allowed: distill"),
        ({"variants": {"a": Variant(), "b": Variant()}}, r"'b \(seed 10\)' is the same run as 'a \(seed 10\)'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        trials(space(**changes))


HEAD = "from raycloud.search.space import Metric, Space, Variant\n"
LOST = "SPACE = Space(base='no.yaml', grid={'a': [1]}, metrics=[Metric(name='x', direction='min')])"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read space 'PATH': No such file or directory"),
        ("x = (", "space 'PATH', line 1: '(' was never closed"),
        ("a = 1\nb = a / 0", "space 'PATH', line 2: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name", "space 'PATH', line 1: ModuleNotFoundError: No module"),
        ("a = 1", "space 'PATH' must define SPACE = Space(...), it defines nothing of that name"),
        ("SPACE = {}", "it defines a dict of that name"),
        (HEAD + "SPACE = Space(bases='x')", "space 'PATH', Space: missing key 'base'"),
        (HEAD + "M = Metric(name='x', direction='up')", "Metric: direction: input should be 'min' or 'max', got 'up'"),
        (HEAD + "V = Variant(override={})", "Variant: unknown key 'override' (allowed: overrides, seeds)"),
        (HEAD + LOST, "no.yaml"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_space_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_space(path)
    assert message.replace("PATH", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["objectives", "objectives_two_tokenizers"])
def test_the_spaces_that_come_with_the_package_are_valid(name: str) -> None:
    found = load_space(ROOT / "tune_spaces" / f"{name}.py")
    wanted = trials(found)
    assert len(wanted) >= 8
    # The rows that were published are still those of these trials.
    rows = [
        TrialRow.model_validate_json(line)
        for line in (ROOT / "tune_spaces" / "rows" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(latest(rows, wanted)) == len({(row.variant, row.seed) for row in rows})


@pytest.mark.parametrize("name", ["split", "cuts", "blocks", "retrain"])
def test_the_spaces_that_sample_are_valid(name: str) -> None:
    found = load_space(ROOT / "tune_spaces" / f"{name}.py")
    one = example_trial(found)
    point = point_of(found, one.recipe.model_dump(mode="json"))
    assert point is not None and point.keys() == found.sample.keys()
    assert found.stop_by is None or (one.support.rungs and one.recipe.rungs)
    assert data_sources(one.recipe.data)  # type: ignore[attr-defined]
