"""Codec benchmark on a tiny model: its counts and comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raycloud.benchmarks import codecs
from raycloud.benchmarks.codecs import best, total
from raycloud.link.codecs.cut_codec import float_cut_codec


def test_figures_of_a_tiny_model(tiny_llama: Path) -> None:
    result = codecs.run(model=str(tiny_llama), pairs=((1, 3),), train_tokens=1000, test_tokens=250).figures
    assert result["header_bytes"] == 72
    of = {name: by_pair["1-3"] for name, by_pair in result["codecs"].items()}
    assert of["float16"]["bytes_per_unit"] == of["bfloat16"]["bytes_per_unit"] == 2
    assert of["float16"]["kl"] < of["int8"]["kl"] < of["int4"]["kl"]
    assert of["float16"]["top1_agreement"] > 0.95
    assert of["int4"]["bytes_per_unit"] < of["int8"]["bytes_per_unit"] < 2
    assert of["int8"]["ppl_ratio"] == pytest.approx(1, abs=0.01)
    assert of["int8"]["tokens"] == result["tokens"] - result["texts"]
    assert set(result["best"]) == {"int8", "int4"}
    assert result["best"]["int8"]["worst"]["cuts"] == "1-3"


def test_an_exact_codec_changes_nothing(tiny_llama: Path) -> None:
    from raycloud.data.batches import Sample, length_sorted_batches
    from raycloud.models.loading import load

    exact = float_cut_codec("float32", 16)
    texts = [Sample(tuple(range(5, 5 + n)), 0) for n in (7, 9, 4)]
    with torch.inference_mode():
        forced = codecs.TeacherForced(
            load(str(tiny_llama), device="cpu"), length_sorted_batches(texts, 2, pad=0), (1, 3)
        )
        scores = [forced.evaluate(number, (1, 3), {"float32": (exact, exact)})["float32"] for number in (0, 1)]
    figures = total(scores).figures()
    assert figures["tokens"] == 20 - 3
    assert figures["ppl_ratio"] == pytest.approx(1, abs=1e-6)
    assert figures["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["top1_agreement"] == 1
    assert figures["bytes_per_unit"] == 4


def test_the_median_and_the_worst_cut() -> None:
    by_pair = {f"{at}-9": {"bytes_per_unit": 0.5 + at, "ppl_ratio": ratio} for at, ratio in enumerate((1.1, 1.3, 1.0))}
    assert best(by_pair) == {
        "bytes_per_unit": 1.5,
        "ppl_ratio": 1.1,
        "worst": {"cuts": "1-9", "bytes_per_unit": 1.5, "ppl_ratio": 1.3},
    }
