"""Tokenising rows in several processes keeps their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycloud.cluster.teacher import tokens
from raycloud.cluster.teacher.tokens import tokenise
from raycloud.data.recipe import DataRecipe
from raycloud.data.tokens import TokenFile
from raycloud.models.loading import load_tokenizer


@pytest.mark.usefixtures("local_ray")
def test_samples_are_in_the_rows_order_however_long_a_block_takes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_BLOCK", 4)
    # The first blocks take longest, and are still the first.
    texts = [f"{number} " + "and so on " * (4_000 if number < 8 else 1) for number in range(24)]
    tokenizer, path = load_tokenizer(str(tiny_llama)), tmp_path / "tokens.arrow"
    recipe = DataRecipe(format="plain", max_length=8)
    assert tokenise([{"text": text} for text in texts], tokenizer, recipe, path) == len(texts)
    samples = TokenFile(path)
    found = [int(tokenizer.decode(samples[index].ids).split()[0]) for index in range(len(samples))]
    assert found == list(range(len(texts)))
