"""Signal benchmark on a tiny model: its counts, and an exact payload without error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raycloud.benchmarks import signals
from raycloud.benchmarks.signals import cosine, repeated
from raycloud.distill.signals import SignalRecipe


def test_figures_of_a_tiny_model(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(signals.PAYLOADS, "all", SignalRecipe(kind="topk", codec="float32", k=49_152))
    result = signals.run(model=str(tiny_llama), blocks=2, tokens=40, repeats=3).figures
    assert result["tokens"] >= 40
    of = result["payloads"]
    assert of["hidden"]["bytes_per_token"] == 2 * result["hidden_size"] == 32
    assert of["hidden-int8"]["bytes_per_token"] == 16 + 2
    assert of["topk"]["bytes_per_token"] == 64 * (2 + 2) + 4
    assert of["sampled"]["bytes_per_token"] <= 50 * 3 + 1 + 4
    for name in ("all", "logits", "hidden", "hidden-int8"):
        for at in ("1", "2"):
            assert of[name]["temperatures"][at]["grad_cosine"] > 0.999
    assert of["all"]["error"] < 1e-4
    assert of["sampled"]["repeats"] == 3 and of["sampled"]["mean_error"] < of["sampled"]["error"]
    assert of["sorted"]["grad_cosine"] is None and of["scalars"]["bytes_per_token"] == 4


def test_estimates_without_a_bias_err_by_their_standard_error_and_others_by_more() -> None:
    made = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 30, generator=made)
    noisy = [exact + torch.randn(40, 30, generator=made) for _ in range(16)]
    fair = repeated(noisy, exact)
    assert fair["mean_error"] == pytest.approx(fair["standard_error"], rel=0.1)
    assert fair["error"] == pytest.approx(4 * fair["standard_error"], rel=0.1)
    biased = repeated([one + 1.0 for one in noisy], exact)
    assert biased["mean_error"] > 3 * biased["standard_error"]
    assert cosine(2 * exact, exact) == pytest.approx(1) and cosine(-exact, exact) == pytest.approx(-1)
