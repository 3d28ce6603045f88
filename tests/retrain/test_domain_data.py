"""Samples of domains: parts without a common text, labels where the task has them, windows that do not repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycloud.data.images import image_rows, read_images
from raycloud.errors import DataError, RecipeError
from raycloud.retrain.domain_data import window_samples
from raycloud.retrain.domain_texts import packed
from raycloud.retrain.samples import IGNORE
from raycloud.retrain.source import source_parts
from tests.retrain.in_process import DIGITS, DIGITS_MODEL, recipe_of
from tests.tokenizers import tokenizer_of

LLAMA = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def rows_in(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Values of a recipe with these rows."""
    tokenizer_of().save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": LLAMA,
        "tokenizer": str(folder / "tokenizer"),
        "data": {"source": str(folder / "rows.jsonl"), "source_domain": "in", "max_length": 16},
        "edges": [{"name": "a", "windows": ["in"]}],
    }


def test_digits_have_no_image_in_two_parts_and_keep_their_classes() -> None:
    data = source_parts(recipe_of(DIGITS)).data
    parts = [data.samples("source", part) for part in ("source", "clean", "window", "test")]
    assert [len(one) for one in parts] == [697, 200, 400, 500]
    flat = [{tuple(image.flatten().tolist()) for image in one.inputs["pixel_values"]} for one in parts]
    assert sum(map(len, flat)) == len(set().union(*flat)) == 1797
    inverted, plain = data.samples("invert", "test"), data.samples("source", "test")
    assert torch.allclose(inverted.inputs["pixel_values"], -plain.inputs["pixel_values"], atol=1e-6)
    assert torch.equal(data.samples("relabel", "test").labels, (plain.labels + 3) % 10)
    with pytest.raises(DataError, match="no domain 'upside down' in builtin:digits; there are: source, invert"):
        data.samples("upside down", "test")


def test_windows_of_a_domain_are_disjoint_until_all_samples_are_used() -> None:
    data = source_parts(recipe_of(DIGITS)).data
    some = [window_samples(data, "invert", number, 100, 1, "a").inputs["pixel_values"] for number in range(5)]
    seen = [{tuple(image.flatten().tolist()) for image in one} for one in some]
    assert len(set().union(*seen[:4])) == 400 and seen[4] < set().union(*seen[:4]) and seen[4] != seen[0]
    again = window_samples(data, "invert", 0, 100, 1, "a").inputs["pixel_values"]
    assert torch.equal(again, some[0])
    assert not torch.equal(window_samples(data, "invert", 0, 100, 1, "b").inputs["pixel_values"], some[0])
    with pytest.raises(DataError, match="domain 'invert' has 400 samples for windows; samples=401"):
        window_samples(data, "invert", 0, 401)


def test_a_folder_of_images(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for domain in ("in", "out"):
        for name in ("cat", "dog"):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for number in range(40):
                Image.fromarray(draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    recipe = recipe_of(
        {"model": DIGITS_MODEL, "task": "classification", "edges": [{"name": "a", "windows": ["out"]}]},
        data={"source": str(tmp_path), "source_domain": "in"},
        source={"steps": 1},
    )
    parts = source_parts(recipe)
    assert parts.config.num_labels == 2 and parts.config.id2label == {0: "cat", 1: "dog"}
    sizes = {name: len(parts.data.samples("in", name)) for name in ("source", "window", "clean", "test")}
    assert sum(sizes.values()) == 80 and min(sizes.values()) > 0
    found = parts.data.samples("out", "window")
    assert found.inputs["pixel_values"].shape[1:] == (1, 8, 8) and set(found.labels.tolist()) == {0, 1}
    assert found.inputs["pixel_values"].abs().max() <= 1
    with pytest.raises(DataError, match="domain 'away' has no images in its part 'test'; domains: in, out"):
        parts.data.samples("away", "test")
    (tmp_path / "in" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot read the image"):
        read_images([tmp_path / "in" / "cat" / "0.png"], 8, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images; allowed:"):
        image_rows(tmp_path / "empty")


def test_texts_are_packed_and_labels_are_the_next_tokens() -> None:
    found = packed([[1, 2, 3], [4, 5, 9], [6, 7]], 4, 9)
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3, 9], [4, 5, 9, 6]]
    assert found.labels.tolist() == [[2, 3, 9, IGNORE], [5, 9, 6, IGNORE]]
    with pytest.raises(DataError, match=r"1 texts have 3 tokens; allowed: data\.max_length=8 or more"):
        packed([[1, 2]], 8, 9)


@pytest.mark.parametrize("supervision", ["labels", "none"])
def test_without_labels_only_prompts_are_learnt_and_tests_are_of_answers(tmp_path: Path, supervision: str) -> None:
    rows = [
        {"domain": "in", "text": f"{number}", "instruction": "Say.", "input": f"{number}", "output": "yes"}
        for number in range(60)
    ]
    values = rows_in(tmp_path, rows)
    values["data"] |= {"format": "alpaca", "max_length": 300}
    data = source_parts(recipe_of(values, supervision=supervision)).data
    window, test = data.samples("in", "window"), data.samples("in", "test")
    answer = [tokenizer_of().encode(letter)[0] for letter in "yes"]
    for found, answers in ((window, supervision == "labels"), (test, True)):
        known = [one[one != IGNORE].tolist() for one in found.labels]
        assert all((one[:3] == answer and len(one) == 4) == answers for one in known)
        assert answers or all(len(one) > 100 and one[:3] != answer for one in known)


def test_tags_are_those_of_the_first_tokens_of_words(tmp_path: Path) -> None:
    words, tags = ["ab", "c", "def"], ["X", "Y", "X"]
    rows = [{"domain": "in", "text": [*words, str(number)], "label": [*tags, "Y"]} for number in range(40)]
    recipe = recipe_of(rows_in(tmp_path, rows), task="token_tagging")
    parts = source_parts(recipe)
    assert parts.classes == ["X", "Y"]
    labels = parts.data.samples("in", "window").labels
    # Words are of one token for each letter, and samples of 16 tokens.
    assert labels.shape[1] == 16 and labels[0, :7].tolist() == [0, IGNORE, 1, 0, IGNORE, IGNORE, 1]
    for row in rows:
        row["label"] = ["X", "Y"]
    broken = source_parts(recipe_of(rows_in(tmp_path, rows), task="token_tagging"))
    with pytest.raises(DataError, match="'label' has 2 classes for 4 words"):
        broken.data.samples("in", "window")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "token_tagging"}, "task=token_tagging of images; allowed: classification"),
        ({"model": LLAMA}, "has images, and the model 'llama' does not"),
        ({"data": {"source": "builtin:reviews"}}, "has texts, and the model 'vit' does not"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        source_parts(recipe_of(DIGITS, **changes))


def test_a_new_model_for_texts_needs_a_tokenizer(tmp_path: Path) -> None:
    values = rows_in(tmp_path, [{"domain": "in", "text": "a"}])
    with pytest.raises(RecipeError, match="tokenizer is null, and the model is a new one"):
        source_parts(recipe_of(values, tokenizer=None))
    with pytest.raises(RecipeError, match=r"the tokenizer has 26. tokens, and the model's vocab_size is 100"):
        source_parts(recipe_of(values, model={**LLAMA, "vocab_size": 100}))
    with pytest.raises(DataError, match=r"data\.domain: no column 'place'; the rows have: domain, text"):
        source_parts(recipe_of(values, data={**values["data"], "domain": "place"}))
