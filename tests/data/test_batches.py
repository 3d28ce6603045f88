"""Samples, labels, padding and the order of samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raycloud.data.batches import IGNORE, Sample, SampleOrder, collate, encode, encode_counted
from raycloud.data.prompts import Format
from raycloud.errors import DataError
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.texts import Bos
from tests.tokenizers import BOS, EOS, GEMMA, TURN, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


def test_labels_are_the_response_shifted_by_one(tokenizer) -> None:
    (sample,) = encode(
        [{"instruction": "Say hello.", "output": "Hello there"}],
        tokenizer,
        "alpaca",
        max_length=99,
        max_prompt_length=99,
    )
    batch = collate([sample], tokenizer.pad_token_id)
    said = batch.labels[batch.labels != IGNORE].tolist()
    assert tokenizer.decode(said) == "Hello there" + tokenizer.eos_token
    assert said == list(sample.ids[sample.prompt :])
    first = int((batch.labels[0] != IGNORE).nonzero()[0])
    assert first == sample.prompt - 1


def test_plain_text_is_learnt_from_its_second_token_on(tokenizer) -> None:
    (sample,) = encode([{"text": "A fine film."}], tokenizer, "plain", max_length=99, max_prompt_length=99)
    batch = collate([sample], tokenizer.pad_token_id)
    assert batch.targets == sample.targets == len(sample.ids) - 1
    assert batch.labels[0, :-1].tolist() == list(sample.ids[1:])


@pytest.mark.parametrize(
    ("form", "bos", "begins", "ends"),
    [
        ("plain", "auto", 1, None),
        ("alpaca", "auto", 1, EOS),
        ("chat", "auto", 1, TURN),  # the template writes BOS itself
        ("chat", True, 1, TURN),
        ("plain", False, 0, None),
        ("alpaca", False, 0, EOS),
    ],
)
def test_texts_begin_and_end_as_their_tokenizer_has_them(form: Format, bos: Bos, begins: int, ends: int | None) -> None:
    """Gemma needs BOS: without it, perplexity rises many times."""
    gemma = tokenizer_of(begin=["<bos>"], template=GEMMA)
    row = {"text": "A film.", "instruction": "Say", "input": "w" * 99, "output": "A film."}
    for max_prompt_length in (30, 500):  # a prompt that is shortened begins so too
        if form == "alpaca" and max_prompt_length == 30:
            continue  # its cue alone is longer
        (sample,) = encode([row], gemma, form, max_length=999, max_prompt_length=max_prompt_length, bos=bos)
        assert sample.ids.count(BOS) == sample.ids[:1].count(BOS) == begins
        said = gemma.decode(sample.ids[sample.prompt :])
        assert said == "A film." + ("" if ends is None else gemma.convert_ids_to_tokens(ends))
        if form == "plain":
            assert sample.prompt == begins and sample.targets == len("A film.") - 1 + begins
    if form != "chat" and bos == "auto":
        spelt = "<bos>A film."
        (sample,) = encode([{**row, "text": spelt}], gemma, "plain", max_length=99, max_prompt_length=99)
        assert list(sample.ids) == gemma("A film.")["input_ids"]


def test_a_long_prompt_keeps_its_cue(tokenizer) -> None:
    row = {"instruction": "Summarise.", "input": "word " * 500, "output": "Words."}
    (sample,) = encode([row], tokenizer, "alpaca", max_length=200, max_prompt_length=128)
    assert sample.prompt == 128
    assert tokenizer.decode(sample.ids[:128]).endswith("### Response:\n")
    assert tokenizer.decode(sample.ids[128:]).startswith("Words.")


def test_rows_without_anything_to_predict_are_dropped(tokenizer) -> None:
    rows = [{"text": "a"}, {"text": "a longer one"}]
    assert len(encode(rows, tokenizer, "plain", max_length=9, max_prompt_length=9)) == 1
    with pytest.raises(DataError, match="no row of 1 leaves a token to predict"):
        encode(rows[:1], tokenizer, "plain", max_length=9, max_prompt_length=9)


def test_what_became_of_the_rows_is_told(tokenizer) -> None:
    rows = [
        {"instruction": "Say hello.", "output": "Hello"},
        {"instruction": "Repeat.", "input": "word " * 90, "output": "Words."},
        {"instruction": "word " * 200, "output": "Words."},
    ]
    cue = {"max_length": 90, "max_prompt_length": 60}
    samples, tally = encode_counted(rows, tokenizer, "alpaca", **cue)
    assert (tally.rows, tally.kept, tally.shortened, tally.unlike) == (3, len(samples), 2, 0)
    samples, tally = encode_counted(rows, tokenizer, "alpaca", max_length=60, max_prompt_length=60)
    assert (tally.kept, tally.crowded, tally.empty) == (1, 2, 0)
    _, tally = encode_counted([{"text": "a"}, {"text": "a longer one"}], tokenizer, "plain", **cue)
    assert (tally.kept, tally.crowded, tally.empty) == (1, 0, 1)


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(0, 40)), min_size=1, max_size=8))
def test_collate_pads_and_labels(shapes: list[tuple[int, int]]) -> None:
    samples = [Sample(tuple(range(1, length + 1)), min(prompt, length)) for length, prompt in shapes]
    batch = collate(samples, pad=0)
    assert batch.targets == sum(max(0, sample.targets) for sample in samples)
    for row, sample in enumerate(samples):
        assert batch.ids[row][batch.valid[row]].tolist() == list(sample.ids)
        labelled = (batch.labels[row] != IGNORE).nonzero()[:, 0]
        assert torch.equal(batch.labels[row][labelled], batch.ids[row][labelled + 1])
        assert batch.valid[row][labelled + 1].all()


def test_the_order_is_a_function_of_seed_and_step() -> None:
    lengths = [(7 * n) % 23 + 2 for n in range(103)]
    order, again = SampleOrder(lengths, 8, seed=3), SampleOrder(lengths, 8, seed=3)
    backwards = [again.indices(step) for step in reversed(range(30))][::-1]
    assert [order.indices(step) for step in range(30)] == backwards
    assert SampleOrder(lengths, 8, seed=4).indices(0) != order.indices(0)


def test_an_epoch_takes_every_sample_at_most_once_and_groups_lengths() -> None:
    lengths = [(7919 * n) % 61 + 2 for n in range(640)]
    order = SampleOrder(lengths, 16, seed=0)
    batches = [order.indices(step) for step in range(order.steps_per_epoch)]
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(640))
    padded = sum(max(lengths[i] for i in batch) * 16 for batch in batches)
    assert sum(lengths) / padded > 0.85
    assert [order.indices(order.steps_per_epoch + s) for s in range(3)] != batches[:3]


def test_fewer_samples_than_a_batch_make_one_batch() -> None:
    assert sorted(SampleOrder([5, 6, 7], 32, seed=0).indices(9)) == [0, 1, 2]
