"""Verdicts on real configurations by small twins, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BambaConfig, GPT2Config, LlamaConfig, Qwen3MoeConfig, RobertaConfig, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.errors import ModelError
from raycloud.models import verdict as module
from raycloud.models.twin import BLOCKS, twin_config
from raycloud.models.verdict import forget_verdicts, structure_of, structure_verdict


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "heads", "groups"),
    [
        (LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8), 8, 2),
        (LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32), 4, 4),
        (LlamaConfig(hidden_size=2048, num_attention_heads=8, num_key_value_heads=1), 4, 1),
    ],
)
def test_a_twin_keeps_the_groups_of_heads(config: LlamaConfig, heads: int, groups: int) -> None:
    small = twin_config(config)
    assert (small.num_attention_heads, small.num_key_value_heads) == (heads, groups)
    assert small.num_hidden_layers == BLOCKS and small.hidden_size == 8 * heads
    assert config.hidden_size >= 2048  # the model's own configuration is as it was


def test_a_twin_has_blocks_of_every_kind() -> None:
    kinds = ["full_attention"] * 11 + ["sliding_attention"] + ["full_attention"] * 4
    config = CONFIG_MAPPING["qwen3"](num_hidden_layers=16, layer_types=kinds, use_sliding_window=True)
    assert sorted(set(twin_config(config).layer_types)) == ["full_attention", "sliding_attention"]
    mixed = BambaConfig(num_hidden_layers=32, attn_layer_indices=[9, 18, 27])
    assert len(twin_config(mixed).attn_layer_indices) == 1


def test_a_model_of_few_blocks_has_a_twin_with_their_pattern_repeated() -> None:
    config = CONFIG_MAPPING["qwen3"](num_hidden_layers=4)
    assert twin_config(config).layer_types == ["full_attention"] * BLOCKS
    kinds = ["sliding_attention", "full_attention"] * 2
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=4, layer_types=kinds)
    assert twin_config(config).layer_types == ["sliding_attention", "full_attention"] * (BLOCKS // 2)


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config(), Qwen3MoeConfig(), CONFIG_MAPPING["gemma3_text"]()])
def test_a_decoder_is_accepted_by_its_twin(config: LlamaConfig) -> None:
    found = structure_verdict(config, "eager")
    structure = found.structure
    assert structure is not None, found.reason
    assert structure.causal and structure.chunks and structure.logits.kind == "head"
    assert 0 <= found.difference <= 1e-4


def test_an_encoder_is_accepted_by_its_twin() -> None:
    structure = structure_of(RobertaConfig())
    assert not structure.causal and structure.blocks == "encoder.layer"


def test_a_refusal_is_one_line_and_kept_as_well(cache: Path) -> None:
    found = structure_verdict(T5Config())
    assert not found.accepted and "lists of blocks" in found.reason and "\n" not in found.reason
    assert len(list((cache / "structure").iterdir())) == 1 and structure_verdict(T5Config()) == found
    with pytest.raises(ModelError, match="lists of blocks"):
        structure_of(T5Config())


def test_a_verdict_is_measured_once_for_what_it_depends_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = structure_verdict(LlamaConfig(hidden_size=512))
    monkeypatch.setattr(module, "check_twin", lambda *_, **__: pytest.fail("it was measured again"))
    forget_verdicts()
    assert structure_verdict(LlamaConfig(hidden_size=512, architectures=["LlamaForCausalLM"])) == first
    assert structure_verdict(LlamaConfig(hidden_size=1024, num_hidden_layers=7)) == first  # their twins are equal
    monkeypatch.undo()
    monkeypatch.setenv("RAYCLOUD_CACHE", str(cache))
    structure_verdict(LlamaConfig(hidden_size=512, attention_bias=True))
    structure_verdict(LlamaConfig(hidden_size=512), "eager")
    assert len(list((cache / "structure").iterdir())) == 3


def test_a_damaged_file_is_measured_again(cache: Path) -> None:
    first = structure_verdict(LlamaConfig())
    [path] = (cache / "structure").iterdir()
    path.write_text('{"reason": "", "surprise": 1}')
    forget_verdicts()
    assert structure_verdict(LlamaConfig()) == first and "surprise" not in path.read_text()


def test_attention_falls_back_to_what_a_model_has() -> None:
    assert structure_of(CONFIG_MAPPING["gpt_oss"](num_hidden_layers=2)).attention == "eager"
    assert structure_of(LlamaConfig()).attention == "sdpa"
