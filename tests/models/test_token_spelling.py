"""The bytes of single tokens join to those of the text."""

from __future__ import annotations

import pytest

from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.token_spelling import TokenSpelling
from tests.tokenizers import llama_like

TEXT = "Bonjour, 世界 😀!\n\tand é"


@pytest.mark.parametrize("name", ["builtin:smollm2-135m-instruct", "sentencepiece"])
def test_bytes_of_tokens(name: str) -> None:
    tokenizer = llama_like() if name == "sentencepiece" else load_tokenizer(resolve(name))
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    spelling = TokenSpelling(tokenizer)
    spelled = b"".join(map(spelling.bytes_of, ids)).decode()
    assert spelled.removeprefix(" ") == TEXT
    assert tokenizer.eos_token_id in spelling.special
    assert spelling.bytes_of(tokenizer.eos_token_id).decode() == tokenizer.eos_token
    assert len(TEXT) <= len(ids) * spelling.longest
