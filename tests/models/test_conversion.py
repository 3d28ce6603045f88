"""Conversion of weights: all tensors of the file are converted exactly, or it is refused and nothing is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, LlamaForCausalLM, PreTrainedModel

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.checkpoint import Checkpoint, empty_model, load_tensors
from raycloud.models.conversion import dequantised
from raycloud.models.loading import load, resolve
from raycloud.models.tensor_check import match_tensors
from raycloud.split.inference.generation import local_split_model
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import tiny
from tests.tokenizers import trained

HEADS, GROUPS, HEAD_DIM, THETA = 4, 2, 8, 500_000.0
PLANS = PlanSet.of(SplitPlan(2, 4))
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama(**changes: Any) -> PreTrainedModel:
    return tiny("llama", dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": THETA, **changes})


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Permute queries and keys as ``convert_hf_to_gguf.py`` of llama.cpp does: pairs of angles side by side."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def arrays_of(model: PreTrainedModel) -> Arrays:
    names, found = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 6), {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = permuted(tensor, HEADS if "q_proj" in name else GROUPS)
        found[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = tensor.numpy()
    return found


def written(path: Path, arrays: Arrays, **fields: Any) -> Path:
    """Write a GGUF file of the tiny Llama with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(fields.pop("blocks", 6))
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_vocab_size(97)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + number) for number in range(90)), *(f"<{number}>" for number in range(6)), '!"'])
    writer.add_token_types([1] * 97)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in fields.items():
        add = writer.add_uint16 if isinstance(value, int) and not isinstance(value, bool) else writer.add_string
        (writer.add_bool if isinstance(value, bool) else add)(name.replace("__", "."), value)
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 90)[None]).logits
    return found


def kept(cache: Path) -> list[Path]:
    """Files of conversions; verdicts on configurations are kept too, and are no part of a model."""
    return [path for path in (cache / "converted").rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path: Path) -> None:
    model = llama()
    loaded = load(str(written(tmp_path / "model.gguf", arrays_of(model))), device="cpu").model
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def llama3_factors(factor: float) -> np.ndarray[Any, Any]:
    """``rope_freqs.weight`` as ``convert_hf_to_gguf.py`` of llama.cpp writes it for ``rope_type`` llama3."""
    low, high, old, found = 1.0, 4.0, 8192, []
    for freq in 1.0 / THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM):
        wavelen = 2 * math.pi / freq
        if wavelen < old / high:
            found.append(1.0)
        elif wavelen > old / low:
            found.append(factor)
        else:
            smooth = (old / wavelen - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_factors_of_llama_3_are_applied(factor: float, tmp_path: Path) -> None:
    plain = llama()
    scaled = llama(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    arrays = {**arrays_of(plain), "rope_freqs.weight": llama3_factors(factor)}
    loaded = load(str(written(tmp_path / "model.gguf", arrays)), device="cpu").model
    assert not torch.allclose(logits(plain), logits(scaled), atol=1e-3)
    assert torch.allclose(logits(loaded), logits(scaled), atol=1e-5)


def test_rotary_factors_of_one_change_nothing(tmp_path: Path) -> None:
    model = llama()
    arrays = {**arrays_of(model), "rope_freqs.weight": np.ones(4, dtype=np.float32)}
    loaded = load(str(written(tmp_path / "model.gguf", arrays)), device="cpu").model
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def without(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__delitem__(name)


def adding(name: str, *shape: int) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.full(shape, 2.0, dtype=np.float32)})


ODD: dict[str, tuple[Callable[[Arrays], None], dict[str, Any], tuple[str, ...]]] = {
    "shard": (lambda arrays: None, {"split__count": 3, "split__no": 0}, ("one of 3 shards", "merge")),
    "left out": (without("blk.4.ffn_up.weight"), {}, ("lacks model.layers.4.mlp.up_proj.weight",)),
    "no embedding": (without("token_embd.weight"), {}, ("lacks model.embed_tokens.weight",)),
    "blocks of another model": (lambda arrays: None, {"blocks": 7}, ("lacks", "model.layers.6.")),
    "a block less": (lambda arrays: None, {"blocks": 5}, ("no place for", "blk.5.")),
    "a bias": (adding("blk.0.attn_q.bias", 32), {}, ("no place for blk.0.attn_q.bias",)),
    "a shape": (adding("blk.0.attn_norm.weight", 31), {}, ("blk.0.attn_norm.weight holds 31 numbers, not 32",)),
    "factors": (adding("rope_freqs.weight", 4), {}, ("rope_freqs.weight", "not Llama 3's factors")),
    "yarn": (lambda arrays: None, {"llama__rope__scaling__type": "yarn"}, ("'yarn'",)),
    "not causal": (lambda arrays: None, {"llama__attention__causal": False}, ("bidirectional",)),
    "a million blocks": (lambda arrays: None, {"blocks": 1_000_000}, ("num_hidden_layers is 1000000",)),
}


@pytest.mark.parametrize("case", ODD)
def test_a_gguf_file_that_does_not_add_up_is_named_and_not_kept(case: str, tmp_path: Path, cache: Path) -> None:
    change, fields, words = ODD[case]
    arrays = arrays_of(llama())
    change(arrays)
    path = written(tmp_path / "model.gguf", arrays, **fields)
    with pytest.raises(ModelError) as raised:
        resolve(str(path))
    said = str(raised.value)
    assert "\n" not in said and str(path) in said
    for word in words:
        assert word in said, said
    assert not kept(cache)


def coded(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code weights in blocks of 128 as DeepSeek's do: FP8 numbers, scales, and the values that both encode."""
    rows, columns = weights.shape
    tall, wide = max(1, rows // 128), max(1, columns // 128)
    blocks = weights.reshape(tall, rows // tall, wide, columns // wide)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    numbers = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (numbers.float() * scales[:, None, :, None]).reshape(rows, columns)
    return numbers.reshape(rows, columns), scales, values


def fp8_folder(folder: Path) -> tuple[Path, PreTrainedModel]:
    """Write a checkpoint in DeepSeek's format, and the model with the values that it encodes."""
    model = tiny("llama", dtype=torch.float32, intermediate_size=256)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("proj.weight")]:
        stored[name], stored[f"{name}_scale_inv"], model.get_parameter(name).data = coded(stored[name])
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    mark_fp8(folder)
    return folder, model


def mark_fp8(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    trained(97, ["a text"]).save_pretrained(folder)


def fp8_shards(name: str, folder: Path) -> None:
    """Write a random model of another type with FP8 projections, in shards."""
    tiny_model(name).float().save_pretrained(folder, max_shard_size="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in sorted({*index["weight_map"].values()}):
        stored = load_file(folder / shard)
        for weight in [one for one in stored if "proj" in one and one.endswith(".weight")]:
            stored[weight], scales, _ = coded(stored[weight])
            stored[f"{weight}_scale_inv"], index["weight_map"][f"{weight}_scale_inv"] = scales, shard
        save_file(stored, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mark_fp8(folder)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_fp8_shards_give_the_logits_of_the_librarys_own_loading(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    fp8_shards(name, folder)
    options: dict[str, Any] = {"dtype": torch.float32, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    stock = AutoModelForCausalLM.from_pretrained(folder, **options)
    where = dequantised(str(folder))
    checkpoint = Checkpoint(where)
    config = AutoConfig.from_pretrained(where)
    model = empty_model(config, dtype=torch.float32, attention="sdpa", device=torch.device("cpu"))
    load_tensors(model, match_tensors(model, checkpoint), checkpoint, torch.device("cpu"))
    assert torch.allclose(logits(model), logits(stock), atol=1e-5)
    assert not hasattr(config, "quantization_config")


EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


def without_expert(stored: dict[str, torch.Tensor]) -> None:
    for ending in ("", "_scale_inv"):
        del stored[EXPERT.format(1) + ending]


def another_expert(stored: dict[str, torch.Tensor]) -> None:
    """As many experts as the model has, of which one has another number: the library would take it for the last."""
    for ending in ("", "_scale_inv"):
        stored[EXPERT.format(4) + ending] = stored.pop(EXPERT.format(1) + ending)


def other_blocks(stored: dict[str, torch.Tensor]) -> None:
    stored[f"{EXPERT.format(1)}_scale_inv"] = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_expert, f"lacks {EXPERT.format(1)}"),
        (another_expert, f"lacks {EXPERT.format(1)}.*no place for {EXPERT.format(4)}"),
        (other_blocks, rf"{EXPERT.format(1)}_scale_inv has shape \(2, 1\)"),
    ],
)
def test_fp8_experts_that_do_not_add_up_are_named_and_not_kept(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path, cache: Path
) -> None:
    fp8_shards("qwen3_moe", tmp_path)
    stored: dict[str, torch.Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
        path.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    change(stored)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as raised:
        dequantised(str(tmp_path))
    assert "\n" not in str(raised.value) and not kept(cache)


def test_fp8_weights_are_dequantised_for_whole_models_and_parts(tmp_path: Path) -> None:
    folder, model = fp8_folder(tmp_path / "fp8")
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    loaded = load(str(folder), device="cpu").model
    assert isinstance(loaded, LlamaForCausalLM)
    for reference in (stock, model):
        assert torch.allclose(logits(loaded), logits(reference), atol=1e-5)
    edge, cloud = (part(str(folder), PLANS, device="cpu") for part in (load_edge, load_cloud))
    assert edge.fingerprint == cloud.fingerprint
    with torch.no_grad():
        ours = local_split_model(edge, cloud).open().advance(torch.arange(3, 90)[None], logits=87)
    assert torch.allclose(ours, logits(model), atol=1e-5)


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ((f"{UP}_scale_inv",), f"lacks {UP}_scale_inv"),
        ((UP,), f"no place for {UP}_scale_inv"),
        ((UP, f"{UP}_scale_inv"), f"lacks {UP}"),
        ((NORM,), f"lacks {NORM}"),
    ],
)
def test_fp8_weights_that_do_not_add_up_are_named_and_not_kept(
    gone: tuple[str, ...], message: str, tmp_path: Path, cache: Path
) -> None:
    folder, _ = fp8_folder(tmp_path / "fp8")
    stored = load_file(folder / "model.safetensors")
    for name in gone:
        del stored[name]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message) as raised:
        resolve(str(folder))
    assert "\n" not in str(raised.value) and not kept(cache)
