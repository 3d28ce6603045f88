"""A model folder is only data: it is checked as JSON first, and nothing in it is run or allocates memory."""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from raycloud.errors import ModelError
from raycloud.models import configuration
from raycloud.models.loading import load, load_config, load_tokenizer
from raycloud.models.verdict import structure_of
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import tiny

PLANS = PlanSet.of(SplitPlan(1, 3))
_CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OddConfig(LlamaConfig): model_type = {model_type!r}
class OddModel(LlamaForCausalLM): config_class = OddConfig
class OddTokenizer(PreTrainedTokenizerFast): pass
"""
_MAP = {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel", "AutoModelForCausalLM": "odd.OddModel"}


def folder_with_code(folder: Path, model_type: str) -> tuple[Path, Path]:
    """Make a model folder with code that leaves a file if it is run."""
    marker = folder / "marker"
    tiny("llama", dtype=torch.float32).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": _MAP}))
    (folder / "odd.py").write_text(_CODE.format(marker=str(marker), model_type=model_type))
    mapped = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(mapped))
    return folder, marker


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("model_type", ["odd", "llama"])
def test_code_in_a_model_folder_never_runs(model_type: str, tmp_path: Path) -> None:
    folder, marker = folder_with_code(tmp_path, model_type)
    for run in (
        lambda: load_config(str(folder)),
        lambda: load_cloud(str(folder), PLANS, device="cpu"),
        lambda: load_tokenizer(str(folder)),
        lambda: load(str(folder), device="cpu"),
    ):
        with suppress(ModelError):
            run()
    assert not marker.exists()


def test_a_known_family_is_loaded_without_its_code(tmp_path: Path) -> None:
    folder, marker = folder_with_code(tmp_path, "llama")
    config = load_config(str(folder))
    assert not hasattr(config, "auto_map") and type(config).__module__.startswith("transformers.")
    part = load_cloud(str(folder), PLANS, device="cpu")
    assert not hasattr(part.config, "auto_map") and not marker.exists()


ODD: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no JSON": ("{", "damaged config.json"),
    "deep": ("[" * 100_000, "damaged config.json"),
    "a list": ("[]", "not a JSON object"),
    "no family": ({"model_type": None}, "model type 'None' is not known"),
    "another kind": ({"model_type": ["llama"]}, "is not known; allowed: a type of transformers"),
    "a million blocks": ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000.*from 1 to 1024"),
    "no blocks": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "half a block": ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
    "a wide head": ({"head_dim": 10**12}, "head_dim is 1000000000000"),
    "many labels": ({"num_labels": 10**9}, "num_labels is 1000000000"),
    "a word": ({"hidden_size": "wide"}, "hidden_size is wide"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq'"),
    "an unnamed method": ({"quantization_config": {"bits": 4}}, "quantised by 'an unnamed method'"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_configuration_is_refused_before_anything_is_built(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = ODD[case]
    plain = json.loads(tiny("llama").config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(change if isinstance(change, str) else json.dumps({**plain, **change}))

    def built(*_: object, **__: object) -> None:
        raise AssertionError("the library was asked to build it")

    monkeypatch.setattr(AutoConfig, "from_pretrained", built)
    with pytest.raises(ModelError, match=message) as raised:
        load_config(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "change"), [("llama", {"is_causal": False}), ("gemma3", {"use_bidirectional_attention": True})]
)
def test_the_direction_of_attention_is_measured(family: str, change: dict[str, Any]) -> None:
    config = tiny(family).config
    assert structure_of(config).causal
    for name, value in change.items():
        setattr(config, name, value)
    assert not structure_of(config).causal


def test_a_decoder_whose_logits_are_not_its_heads_is_refused() -> None:
    config = tiny("bert").config
    config.is_decoder = True
    with pytest.raises(ModelError, match="logits of a 'bert' model are not its head's output"):
        structure_of(config)


def test_every_reader_of_the_library_is_told_to_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Auto:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> None:
            asked.append(options)

    configuration.load_auto(Auto, "anything")
    assert asked == [{"trust_remote_code": False}]
