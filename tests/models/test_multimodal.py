"""Language side of multimodal models: its tensors are found in the whole's checkpoint, and give the whole's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.benchmarks.family_configs import SIZES
from raycloud.errors import ModelError
from raycloud.models.checkpoint import Checkpoint
from raycloud.models.configuration import load_config
from raycloud.models.loading import check_model, load
from raycloud.models.tensor_sources import is_language_side
from raycloud.split.parts import export, load_cloud, load_splittable
from raycloud.split.plan import PlanSet, SplitPlan
from tests.tokenizers import tokenizer_of

_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
_AXES: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
_WINDOWS = {"use_sliding_window": True, "max_window_layers": 2}
_YARN = {
    "rope_parameters": {
        **_AXES["rope_parameters"],
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mrope_interleaved": True},
    }
}
TYPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {}),
    "llava": ("llama", {}, {}),
    "mistral3": ("mistral", {}, {}),
    "smolvlm": ("llama", {}, {}),
    "qwen3_5": ("qwen3_5_text", _LINEAR, {"depth": 1, "out_hidden_size": 32, "num_heads": 2}),
    "qwen2_vl": ("qwen2", _AXES, {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}),
    "qwen2_5_vl": ("qwen2", _AXES | _WINDOWS, {"depth": 1, "out_hidden_size": 32, "num_heads": 2}),
    "qwen3_vl": ("qwen3", _YARN, {"depth": 1, "out_hidden_size": 32, "num_heads": 2, "deepstack_visual_indexes": [0]}),
}


def saved(kind: str, folder: Path) -> PreTrainedModel:
    """Tiny multimodal model, saved as the library does."""
    usual, (_, text, vision) = CONFIG_MAPPING[kind](), TYPES.get(kind, ("", {}, {}))
    plain = usual.text_config.to_dict()
    for derived in ("layer_types", "rope_parameters"):
        plain.pop(derived, None)
    plain |= {**SIZES, **text}
    seen = usual.vision_config.to_dict()
    seen |= {name: value for name, value in _VISION.items() if name in seen} | vision
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(
        CONFIG_MAPPING[kind](text_config=plain, vision_config=seen)
    ).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_the_language_side_alone_gives_the_wholes_logits(kind: str, tmp_path: Path) -> None:
    whole, ids = saved(kind, tmp_path), torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    assert check_model(str(tmp_path)).model_type == TYPES[kind][0]
    ours = load_splittable(str(tmp_path), device="cpu").model
    expected = whole(input_ids=ids).logits
    assert torch.allclose(ours(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert ours.num_parameters() < whole.num_parameters()
    middle = load_cloud(str(tmp_path), PlanSet.of(SplitPlan(1, 3)), device="cpu").middle
    names = {name for name, tensor in middle.named_parameters() if tensor.is_meta}
    assert len(middle.blocks) == 2 and not names


def test_a_missing_tensor_of_the_language_side_is_named(tmp_path: Path) -> None:
    saved("llava", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.weight") and is_language_side(name))
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        check_model(str(tmp_path))
    assert gone not in Checkpoint(str(tmp_path)).tensors


@torch.no_grad()
def test_a_checkpoint_as_qwen_published_it_gives_the_wholes_text(tmp_path: Path) -> None:
    """Its configuration is flat, and its text tensors have the names of a text model."""
    whole = saved("qwen2_5_vl", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config.pop("text_config"), **config}))
    assert {name.split(".")[0] for name in Checkpoint(str(tmp_path)).tensors} == {"model", "visual", "lm_head"}
    tokenizer_of().save_pretrained(tmp_path)
    ids = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(2))
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = whole.generate(ids, **asked)
    ours = load(str(tmp_path), device="cpu").model
    assert type(ours).__name__ == "Qwen2ForCausalLM" and torch.equal(ours.generate(ids, **asked), expected)
    export(str(tmp_path), PlanSet.of(SplitPlan(1, 3)), tmp_path / "parts")
    assert load_cloud(str(tmp_path / "parts" / "cloud"), device="cpu").middle.lo == 1


def test_a_side_without_a_language_model_is_refused(tmp_path: Path) -> None:
    CONFIG_MAPPING["qwen3_vl_moe"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no language model for the text side of a multimodal 'qwen3_vl_moe'"):
        load_config(str(tmp_path))
