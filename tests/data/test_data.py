"""Built-in sets, files, splits, shards and prompts."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycloud.data.instruct import instruct
from raycloud.data.prompts import alpaca, chat, prompt_and_response
from raycloud.data.reviews import label_of, reviews
from raycloud.data.sources import load_rows
from raycloud.data.splits import select, shard, split_of
from raycloud.errors import DataError, MissingExtra
from raycloud.models.loading import load_tokenizer, resolve

SHARED = Path(os.environ.get("RAYCLOUD_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_reviews_are_complete_and_clean() -> None:
    table = reviews()
    assert Counter(table["domain"].to_pylist()) == {"movie": 10_605, "news": 5_190, "tweet": 4_200, "product": 3_708}
    assert table.column_names == ["domain", "text", "score", "label"]
    for row in table.to_pylist():
        assert row["text"].strip() == row["text"] != ""
        assert -4 <= row["score"] <= 4
        assert "&amp;" not in row["text"]
        assert (row["score"] >= 0.5) == (row["label"] == "positive")


def test_splits_are_disjoint_by_text_and_nearly_of_their_sizes() -> None:
    rows = {split: load_rows("builtin:reviews", split) for split in ("train", "valid", "test")}
    texts = {split: {row["text"] for row in some} for split, some in rows.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["valid"]
    assert sum(map(len, rows.values())) == 23_703
    assert 0.78 < len(rows["train"]) / 23_703 < 0.82


def test_instructions_have_real_answers_and_leak_nothing() -> None:
    rows = instruct().to_pylist()
    assert len(rows) == 23_703
    assert set(Counter(row["task"] for row in rows)) == {"sentiment", "domain", "compare", "complete"}
    scores: dict[str, set[float]] = {}
    for row in reviews().to_pylist():
        scores.setdefault(row["text"], set()).add(row["score"])
    trained = {row["text"] for row in rows if split_of(row) == "train"}
    for row in rows:
        if row["task"] == "complete":
            assert f"{row['input']} {row['output']}" == row["text"]
        elif row["task"] == "sentiment":
            assert any(label_of(score) in row["output"] for score in scores[row["text"]])
        elif row["task"] == "compare":
            first, second = (line[3:] for line in row["input"].split("\n"))
            better = first if "first" in row["output"] else second
            worse = second if better == first else first
            assert max(scores[better]) >= min(scores[worse]) + 0.499
            if split_of(row) == "test":
                assert not {first, second} & trained


def test_files_and_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"sentence {n}", "n": n} for n in range(200)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    monkeypatch.setenv("RAYCLOUD_DATA", str(tmp_path))
    from_jsonl = load_rows("some.jsonl", "train")
    assert from_jsonl == load_rows(str(tmp_path / "some.parquet"), "train")
    assert 130 < len(from_jsonl) < 190


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no data file at"),
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", '{"text": "a"\n{', "cannot read"),
        ("broken.parquet", "no parquet", "cannot read"),
    ],
)
def test_files_that_are_none(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        load_rows(str(tmp_path / name), "train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["builtin:tweets", "./folder"])
def test_sources_that_are_none(source: str) -> None:
    with pytest.raises(DataError, match="builtin:"):
        load_rows(source, "train")


def test_selections_and_shards() -> None:
    rows = load_rows("builtin:reviews", "test")
    news = select(rows, {"domain": ["news"]})
    assert {row["domain"] for row in news} == {"news"}
    parts = [shard(news, part, 3) for part in range(3)]
    assert sorted(row["text"] for part in parts for row in part) == sorted(row["text"] for row in news)
    with pytest.raises(DataError, match="no column 'topic'; the rows have: domain, text, score, label"):
        select(rows, {"topic": ["news"]})
    with pytest.raises(DataError, match=r"no row with domain in \['sport'\]; there are: movie, news, product, tweet"):
        select(rows, {"domain": ["sport"]})
    with pytest.raises(DataError, match="shard 7 of 9 is empty"):
        shard(news[:3], 7, 9)


@pytest.mark.parametrize("name", ["dolly/dev.jsonl", "dolly/valid.jsonl", "self-inst/valid.jsonl"])
def test_alpaca_prompts_equal_the_published_ones_byte_for_byte(name: str) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not here")
    rows = [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert alpaca(row["instruction"], row["input"]).text == row["prompt"]


def test_chat_prompts_are_the_templates() -> None:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    prompt = chat(tokenizer, "Say it.", "Now.")
    messages = [{"role": "user", "content": "Say it.\n\nNow."}]
    assert prompt.text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.body == "Now."


def test_rows_that_lack_a_column_are_refused() -> None:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    with pytest.raises(DataError, match="needs the text column 'output'; the rows have: instruction"):
        prompt_and_response({"instruction": "a"}, "alpaca", tokenizer)


def test_hub_sets_come_with_their_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(source: str, split: str) -> list[dict[str, str]]:
        asked.append((source, split))
        if source == "org/gone":
            raise FileNotFoundError("no such set\nand more")
        return [{"text": split}]

    hub = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda _: ["train", "validation"])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert load_rows("org/set", "valid") == [{"text": "validation"}]
    assert asked == [("org/set", "validation")]
    with pytest.raises(DataError, match=r"cannot load data set 'org/gone': no such set$"):
        load_rows("org/gone", "train")


def test_hub_sets_have_configurations_and_splits_of_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(source: str, configuration: str, split: str) -> list[dict[str, str]]:
        return [{"text": f"{source} {configuration} {split}"}]

    def names(source: str, configuration: str) -> list[str]:
        return ["train", "validation_matched"]

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=names)
    )
    assert load_rows("org/glue:mnli", "validation_matched") == [{"text": "org/glue mnli validation_matched"}]
    with pytest.raises(DataError, match=r"has no split 'validation_matched'; allowed: train, valid, test, all"):
        load_rows("builtin:reviews", "validation_matched")


def test_rows_without_text_or_instruction_are_split_by_what_text_they_have() -> None:
    rows = [{"question": f"What is {n}?", "context": "Numbers.", "label": n % 2} for n in range(300)]
    parts = [[row for row in rows if split_of(row) == part] for part in ("train", "valid", "test")]
    assert [len(part) > 10 for part in parts] == [True] * 3
    assert split_of({**rows[0], "label": 7}) == split_of(rows[0])


def test_a_hub_set_of_one_split_and_other_names_is_split_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"Say {n}.", "context": "", "response": str(n), "category": "qa"} for n in range(200)]
    hub = SimpleNamespace(load_dataset=lambda _, split: rows, get_dataset_split_names=lambda _: ["train"])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    parts = [load_rows("org/dolly", split) for split in ("train", "valid", "test")]
    assert sorted(int(row["output"]) for part in parts for row in part) == list(range(200))
    assert parts[2][0].keys() == {"instruction", "input", "output", "category"}
    assert load_rows("org/dolly", "all")[7] == {"instruction": "Say 7.", "input": "", "output": "7", "category": "qa"}


def test_hub_sets_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"needs the extra 'hub': pip install 'raycloud\[hub\]'") as raised:
        load_rows("org/set", "train")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # it comes back from an actor as itself
