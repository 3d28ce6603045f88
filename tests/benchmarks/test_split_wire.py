"""Traffic of the split-wire benchmark."""

from __future__ import annotations

from raycloud.benchmarks.split_wire import prompt_of
from tests.tokenizers import BOS, GEMMA, tokenizer_of


def test_a_prompt_begins_with_bos_once_where_template_and_tokenizer_both_write_it() -> None:
    tokenizer = tokenizer_of(begin=["<bos>"], template=GEMMA)
    ids = prompt_of({"instruction": "Name it.", "input": "A text."}, tokenizer)
    assert ids[0] == BOS and ids.count(BOS) == 1
    assert "Name it." in tokenizer.decode(ids) and "A text." in tokenizer.decode(ids)
