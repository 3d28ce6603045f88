"""Table of trials: appended atomically, repaired after a crash, locked by one search."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from raycloud.distill.recipe import DistillRecipe
from raycloud.errors import ResultError
from raycloud.search.rows import RowFile, TrialRow, check_recipes, latest, numbers_of, texts_of
from raycloud.search.space import Metric, Space, Variant, trials
from raycloud.split.recipe import SplitEvaluateRecipe

ROOT = Path(__file__).parents[2]


def row(number: int, error: str | None = None) -> TrialRow:
    return TrialRow(variant="a", seed=number, recipe={"seed": number}, metrics={"ppl": 1.5}, seconds=2.0, error=error)


def write(path: Path, *rows: TrialRow) -> None:
    with RowFile.open(path) as file:
        for one in rows:
            file.append(one)


def test_rows_are_appended_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write(path, row(1))
    write(path, row(2))
    with RowFile.open(path) as file:
        assert file.rows == [row(1), row(2)]
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [1, 2]


def test_every_torn_last_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, row(1), row(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first + 1, len(whole), 7):
        path.write_bytes(whole[:size])
        write(path, row(3))
        with RowFile.open(path) as file:
            assert file.rows == [row(1), row(3)]
    path.write_bytes(whole[:-1])  # the line is there, only its end is not
    write(path, row(3))
    with RowFile.open(path) as file:
        assert file.rows == [row(1), row(2), row(3)]


def test_other_lines_that_are_no_rows_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, row(1))
    content = path.read_text() + '{"variant": "a"}\n'
    path.write_text(content)
    with pytest.raises(ResultError, match=r"line 2: "), RowFile.open(path):
        pass
    assert path.read_text() == content


def test_one_search_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowFile.open(path), pytest.raises(ResultError, match="in use by another search"), RowFile.open(path):
        pass


def test_the_latest_row_of_a_recipe_counts() -> None:
    metric = Metric(name="ppl", direction="min")
    one, two = trials(Space(base={"job": "distill"}, variants={"a": Variant(seeds=[1, 2])}, metrics=[metric]))
    strange = row(1).model_copy(update={"recipe": {"seed": 1, "colour": "red"}})
    rows = [row(1, "broke"), row(2), row(1), row(3), strange]
    assert latest(rows, [one, two]) == {one.fingerprint: row(1), two.fingerprint: row(2)}


def test_rows_with_a_former_key_are_refused_and_those_of_other_jobs_are_not(tmp_path: Path) -> None:
    old = row(1).model_copy(update={"recipe": {"job": "distill", "training": {"clip": 1.0}}})
    message = f"rows '{tmp_path}', line 2: training.clip: this key is called max_grad_norm now"
    with pytest.raises(ResultError, match=f"^{re.escape(message)}$"):
        check_recipes([row(1), old], DistillRecipe, tmp_path)
    check_recipes([row(1), old], SplitEvaluateRecipe, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces" / "rows").glob("*.jsonl")), ids=lambda path: path.stem)
def test_every_published_row_has_a_valid_recipe(path: Path) -> None:
    rows = [TrialRow.model_validate_json(line) for line in path.read_text().splitlines()]
    assert len(rows) > 20 and {row.recipe["job"] for row in rows} == {"distill"}
    check_recipes(rows, DistillRecipe, path)


def test_numbers_are_those_at_the_top_of_a_summary() -> None:
    summary = {"ppl": 3, "kl": float("inf"), "note": "x", "groups": {"a": 1}, "fine": True, "gap": None}
    assert numbers_of(summary) == {"ppl": 3.0, "kl": None}


def test_texts_are_scores_per_token(tmp_path: Path) -> None:
    assert texts_of(tmp_path) == {}
    lines = [
        {"group": "news", "text": 0, "tokens": 4, "nll": 8.0, "compared": 0, "kl": 0.0, "agree": 0},
        {"group": "news", "text": 1, "tokens": 2, "nll": 3.0, "compared": 1, "kl": 0.5, "agree": 1},
        {"group": "news", "text": 2, "tokens": 0, "nll": 0.0, "compared": 0, "kl": 0.0, "agree": 0},
    ]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert texts_of(tmp_path) == {
        "nll": {"news/0": 2.0, "news/1": 1.5},
        "kl": {"news/1": 0.5},
        "agreement": {"news/1": 1.0},
    }
