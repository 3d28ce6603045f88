"""GGUF files of other types than Llama: converted exactly as llama.cpp writes them, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raycloud.benchmarks.family_configs import DECODERS, tiny_config
from raycloud.errors import ModelError
from raycloud.models.conversion import convert_gguf

Tensors = dict[str, Tensor]
BLOCKS = 4

# Options beyond the tiny sizes: what a file does not state, and the library's reader takes from the type's defaults.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3_moe": ("qwen3moe", {"moe_intermediate_size": 768, "norm_topk_prob": True}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "lfm2": ("lfm2", {"block_auto_adjust_ff_dim": False, "intermediate_size": 48}),
}
FIELDS = {"context_length": 128, "embedding_length": 32, "block_count": BLOCKS, "feed_forward_length": 48}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path / "cache"))


def model_of(name: str) -> PreTrainedModel:
    kind, options = DECODERS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, {**options, **TYPES[name][1]})).eval()


def tensors_of(name: str, model: PreTrainedModel) -> Tensors:
    """Tensors under llama.cpp's names: experts' two projections apart, norms of Gemma plus one, kernels of two axes."""
    architecture = next(key for key, said in gguf.MODEL_ARCH_NAMES.items() if said == TYPES[name][0])
    names, found = gguf.get_tensor_name_map(architecture, BLOCKS), Tensors()
    for path, tensor in model.state_dict().items():
        if path in model.all_tied_weights_keys:
            continue
        base, _, ending = path.rpartition(".")
        if path.endswith("experts.gate_up_proj"):
            block = f"blk.{path.split('.')[2]}"
            found[f"{block}.ffn_gate_exps.weight"], found[f"{block}.ffn_up_exps.weight"] = tensor.chunk(2, dim=1)
        elif path.endswith("experts.down_proj"):
            found[f"blk.{path.split('.')[2]}.ffn_down_exps.weight"] = tensor
        else:
            if name == "gemma2" and "norm" in base:
                tensor = tensor + 1
            found[f"{names.get_name(base)}.{ending}"] = tensor.squeeze(1) if base.endswith("conv.conv") else tensor
    return found


def written(path: Path, name: str, model: PreTrainedModel, tensors: Tensors, **fields: Any) -> Path:
    architecture, config = fields.pop("architecture", TYPES[name][0]), model.config
    writer = gguf.GGUFWriter(str(path), architecture)

    def add(values: dict[str, Any]) -> None:
        for key, value in values.items():
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)

    eps = getattr(config, "rms_norm_eps", None) or config.norm_eps if name != "starcoder2" else config.norm_epsilon
    rotated = next(tensor.numel() for at, tensor in model.named_buffers() if at.endswith("inv_freq"))
    stated = {
        **FIELDS,
        "vocab_size": 97,
        "attention.head_count": 4,
        "attention.key_length": getattr(config, "head_dim", 8),
        "attention.layer_norm_rms_epsilon": eps,
        "attention.layer_norm_epsilon": eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": 2 * rotated,
        **{key.replace("__", "."): value for key, value in fields.items()},
    }
    if name == "lfm2":
        heads = [2 if kind == "full_attention" else 0 for kind in config.layer_types]
        writer.add_array("lfm2.attention.head_count_kv", heads)
        stated["shortconv.l_cache"] = config.conv_L_cache
    else:
        stated["attention.head_count_kv"] = 2
    if name == "qwen3_moe":
        stated |= {"expert_count": 4, "expert_used_count": 2}
    if (window := getattr(config, "sliding_window", None)) is not None:
        stated.setdefault("attention.sliding_window", window)
    add(stated)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + number) for number in range(90)), *(f"<{number}>" for number in range(6)), '!"'])
    writer.add_token_types([1] * 97)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for key, tensor in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 60)[None]).logits
    return found


@pytest.mark.parametrize("name", TYPES)
def test_a_file_is_the_model_it_was_made_of(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    folder = convert_gguf(written(tmp_path / "model.gguf", name, model, tensors_of(name, model)))
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(converted), logits(model), atol=1e-5)


def without(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


def shorter(tensors: Tensors) -> None:
    tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"][:3].clone()


ODD: dict[str, tuple[str, Callable[[Tensors], object], dict[str, Any], str]] = {
    "half of the experts": (
        "qwen3_moe",
        without("blk.1.ffn_gate_exps.weight"),
        {},
        "lacks model.layers.1.mlp.experts.gate_up_proj",
    ),
    "an expert less": ("qwen3_moe", shorter, {}, "blk.1.ffn_gate_exps.weight and blk.1.ffn_up_exps.weight holds"),
    "a kernel": ("lfm2", without("blk.0.shortconv.conv.weight"), {}, "lacks model.layers.0.conv.conv.weight"),
    "a tensor too many": (
        "lfm2",
        lambda tensors: tensors.update({"blk.0.stranger": torch.ones(2)}),
        {},
        "no place for blk.0.stranger",
    ),
    "another architecture": (
        "qwen3",
        lambda tensors: None,
        {"architecture": "grok"},
        "architecture 'grok'; allowed in GGUF files: bloom, ",
    ),
    "a part of each head": ("starcoder2", lambda tensors: None, {"rope__dimension_count": 4}, "dimension_count to 4"),
    "a window": ("qwen3", lambda tensors: None, {"attention__sliding_window": 8}, "sliding_window to 8"),
    "a cap": ("gemma2", lambda tensors: None, {"final_logit_softcapping": 20.0}, "final_logit_softcapping to 20"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_file_that_does_not_add_up_is_named(case: str, tmp_path: Path) -> None:
    name, change, fields, said = ODD[case]
    model = model_of(name)
    tensors = tensors_of(name, model)
    change(tensors)
    with pytest.raises(ModelError) as raised:
        convert_gguf(written(tmp_path / "model.gguf", name, model, tensors, **fields))
    message = str(raised.value)
    assert "\n" not in message and str(tmp_path) in message and said in message, message
