"""Every step of a window, from drift to a version, on configurations with random weights of five families."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from raycloud.rounds.versions import VERSIONS, VersionStore
from tests.retrain.in_process import DIGITS, recipe_of, run_windows
from tests.tokenizers import tokenizer_of

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WINDOWS = [{"name": "a", "windows": ["inside", "outside"]}]
CASES: dict[str, dict[str, Any]] = {
    "vit": {**DIGITS, "source": {"steps": 2}, "edges": [{"name": "a", "windows": ["source", "invert"]}]},
    "swin": {
        **DIGITS,
        "source": {"steps": 2},
        "edges": [{"name": "a", "windows": ["source", "invert"]}],
        "model": {
            "model_type": "swin",
            "image_size": 8,
            "patch_size": 1,
            "num_channels": 1,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
    },
    "opt": {
        "task": "language_modelling",
        "model": {
            "model_type": "opt",
            "vocab_size": 264,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    },
    "qwen3": {
        "task": "language_modelling",
        "model": {"model_type": "qwen3", "vocab_size": 264, **SMALL, "num_key_value_heads": 1, "head_dim": 8},
    },
    "t5": {
        "task": "token_tagging",
        "model": {
            "model_type": "t5",
            "vocab_size": 264,
            "d_model": 16,
            "d_ff": 32,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
        },
    },
}


def texts(folder: Path, task: str) -> dict[str, Any]:
    """Data of two domains of made-up words, and a tokenizer."""
    tokenizer_of().save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "opt"}')
    draw = random.Random(1)
    rows = []
    for domain, letters in (("inside", "abcdefg "), ("outside", "UVWXYZ  ")):
        for _ in range(700):
            words = "".join(draw.choices(letters, k=40)).split()
            row: dict[str, Any] = {"domain": domain, "text": " ".join(words)}
            if task == "token_tagging":
                row = {"domain": domain, "text": words, "label": ["long" if len(one) > 3 else "short" for one in words]}
            rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"source": str(path), "source_domain": "inside", "max_length": 24},
        "tokenizer": str(folder / "tokenizer"),
        "samples": 64,
        "drift": {"window": 32},
        "edges": WINDOWS,
        "budget": {"full_steps": 20},
        "source": {"steps": 2},
        "test_samples": 32,
    }


@pytest.mark.parametrize("name", CASES)
def test_a_window_runs_from_drift_to_a_version(name: str, tmp_path: Path) -> None:
    values = CASES[name]
    if "data" not in values:
        values = {**texts(tmp_path, values["task"]), **values}
    recipe = recipe_of(values, threads=1)
    cloud, _, (first, second) = run_windows(recipe, tmp_path / "run")
    assert first["cause"] is None and second["cause"] == "hidden_states"
    assert second["steps"] and not second["over_budget"]
    assert len(second["gains"]) == len(cloud.facts().blocks) == second["blocks"]
    store = VersionStore(tmp_path / "run" / VERSIONS)
    assert store.current == int(second["helped"])
    cloud.save()
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    if name in ("vit", "swin"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
        newest = store.weights(store.current)
        assert all(torch.equal(newest[key], one) for key, one in model.state_dict().items() if key in newest)
