"""Training and evaluation examples of each task, from data files of users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raycloud.errors import DataError, ModelError, RecipeError, TrainingError
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.split.finetune.examples import bos_of, evaluate, load_examples
from raycloud.split.finetune.recipe import SplitTuneRecipe
from tests.tokenizers import GEMMA, tokenizer_of


@pytest.mark.parametrize("label", ["null", "NaN", "[1]"])
def test_a_label_of_no_class_is_no_row_of_another_class(label: str, tmp_path: Path) -> None:
    """Regression: with the classes given, such rows were dropped silently."""
    lines = [f'{{"text": "text {n}", "label": {label if n == 7 else n % 2}}}\n' for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "held_out.jsonl").write_text(lines[0] + lines[1])
    data = {"source": str(tmp_path / "data.jsonl"), "validation": str(tmp_path / "held_out.jsonl")}
    mine = SplitTuneRecipe.parse({"data": data, "task": {"kind": "classification", "classes": [0, 1]}})
    tokenizer = load_tokenizer(resolve("builtin:minilm-l6"))
    with pytest.raises(DataError, match=r"data.jsonl', line 8: 'label' is .*; allowed: a class"):
        load_examples(mine, tokenizer, print)
    (tmp_path / "data.jsonl").write_text("".join(lines[:7]) + '{"text": "other", "label": 2}')
    told: list[str] = []
    texts, held_out, classes = load_examples(mine, tokenizer, told.append)
    assert (len(texts.samples), len(held_out.samples), classes) == (7, 2, 2)
    assert texts.rows == {"train": 7, "validation": 2, "skipped": 1}
    assert told == [f"rows of '{data['source']}': 7 train, 2 validation, 1 skipped"]


def test_outputs_that_are_not_finite_are_not_judged(tmp_path: Path) -> None:
    """Regression: argmax of NaN is the first class, so a model of only NaN was right half the time."""
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = SplitTuneRecipe.parse({"data": {"source": str(tmp_path / "data.jsonl")}, "task": {"kind": "classification"}})
    _, held_out, _ = load_examples(mine, load_tokenizer(resolve("builtin:minilm-l6")), print)
    with pytest.raises(TrainingError, match="the head's outputs are not all finite"):
        evaluate(lambda batch: torch.full((len(batch.ids), 2), torch.nan), held_out, mine)


@pytest.mark.parametrize("kind", ["classification", "regression", "span"])
@pytest.mark.parametrize("bos", ["true", "false"])
def test_bos_is_refused_where_it_has_no_effect(kind: str, bos: str) -> None:
    """Labelled texts are encoded by the tokenizer alone; regression: ``data.bos`` was accepted and had no effect."""
    values = {"task": {"kind": kind}, "data": {"max_length": 384}}
    said = f"recipe: data.bos={bos} has no effect on task.kind={kind}, .*; allowed: auto"
    with pytest.raises(RecipeError, match=said):
        SplitTuneRecipe.parse(values, [f"data.bos={bos}"])
    assert SplitTuneRecipe.parse(values, ["data.bos=auto"]).data.bos == "auto"


def test_whether_texts_begin_with_bos_is_known_without_data() -> None:
    bert, gemma = tokenizer_of(bos_token=None), tokenizer_of(begin=["<bos>"], template=GEMMA)
    own = "the tokenizer's own post-processor"
    assert bos_of(SplitTuneRecipe(), bert) == f"no ({own})"
    assert bos_of(SplitTuneRecipe(), gemma) == f"yes ({own})"
    spoken = {"task": {"kind": "language"}, "data": {"bos": False}}
    assert bos_of(SplitTuneRecipe.parse(spoken), gemma) == "no (asked for)"
    with pytest.raises(ModelError, match=r"bos is false, and the chat template of '.*' writes BOS itself"):
        bos_of(SplitTuneRecipe.parse(spoken, ["task.format=chat"]), gemma)
    with pytest.raises(ModelError, match=r"bos is true, and the tokenizer '.*' names no BOS token"):
        bos_of(SplitTuneRecipe.parse(spoken, ["data.bos=true", "task.format=alpaca"]), bert)
