"""Conversion of GGUF files and FP8 checkpoints to cached directories of plain weights that every loader reads.

``transformers`` reads both, and silently skips what it does not know. So the tensors of the file and of the model are
compared first, and the library's report of the load is checked afterwards; a conversion is kept only if both account
for all tensors.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    FineGrainedFP8Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.quantization_config import GgufConfig

from raycloud.checksums import digest
from raycloud.errors import ModelError
from raycloud.fetch import cache_dir, cached_folder
from raycloud.models.checkpoint import Checkpoint, StoredTensor, empty_model
from raycloud.models.configuration import (
    CONFIG,
    QUANTIZATION,
    check_sizes,
    file_of,
    first_line,
    quantization_of,
    quiet_transformers,
)
from raycloud.models.tensor_check import check_tensors, match_headers
from raycloud.models.texts import save_end_ids
from raycloud.models.twin import auto_class

_Read = tuple[PreTrainedModel, dict[str, Any], PreTrainedTokenizerBase]

# Part of every cache key: conversions of an earlier release were not checked tensor by tensor.
_FORMAT = "3"
_SCALE = "_scale_inv"
_ROPE_FACTORS = "rope_freqs.weight"
# Settings that Llama 3 was trained with; the scale is the largest of the factors.
_LARGE_GEMMAS = (("gemma2", 46), ("gemma3_text", 62))
_RELATIVE = 1e-5
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert_gguf(path: Path, notify: Callable[[str], None] = lambda line: None) -> Path:
    """Dequantise a GGUF file into a cached ``transformers`` directory (float32 safetensors), once per content.

    Raises:
        ModelError: the file is missing, corrupt, one of several shards, or of an architecture that the library does not
            read, or its tensors are not those of its model.
    """
    if not path.is_file():
        raise ModelError(f"no GGUF file at '{path}'")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"'{path}' is not a GGUF file (it does not begin with 'GGUF')")

    def read() -> _Read:
        notify(f"converting {path.name} to safetensors")
        where: dict[str, Any] = {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
            "trust_remote_code": False,
        }
        reader = gguf.GGUFReader(path)
        _check_architecture(reader, path)
        _check_fields(_fields(reader), path)
        config = AutoConfig.from_pretrained(**where)
        check_sizes(config.to_dict(), str(path))
        _account_gguf(reader, config, path)
        loaded: Any = auto_class(config).from_pretrained(
            **where,
            config=config,
            dtype=torch.float32,
            # Without it the library keeps weights packed wherever it finds kernels for them.
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        return *loaded, AutoTokenizer.from_pretrained(**where)

    return _converted(f"{_FORMAT}|{digest(path)}", str(path), f"GGUF file '{path}'", read)


def dequantised(source: str, notify: Callable[[str], None] = lambda line: None) -> str:
    """Directory or hub id of plain weights: ``source`` if they are plain, else a cached directory of dequantised FP8.

    Other formats are returned unchanged; :func:`~raycloud.models.configuration.load_config` refuses them.

    Raises:
        ModelError: the weights cannot be dequantised, or are not those of the model.
    """
    if _method(source) != "fp8":
        return source
    checkpoint = Checkpoint(source)
    stored = checkpoint.config
    check_sizes(stored, source)

    def read() -> _Read:
        notify(f"dequantising {source}")
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _account_fp8(checkpoint, config)
        loaded: Any = auto_class(config).from_pretrained(
            source,
            dtype=torch.float32,
            quantization_config=FineGrainedFP8Config(dequantize=True),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        return *loaded, AutoTokenizer.from_pretrained(source, trust_remote_code=False)

    shards = sorted({one.shard for one in checkpoint.tensors.values()})
    contents = [digest(path) for name in (CONFIG, *shards) if (path := checkpoint.path(name)) is not None]
    return str(_converted("|".join([_FORMAT, *contents]), source, f"FP8 checkpoint '{source}'", read))


def _empty(config: PretrainedConfig, names: Mapping[str, Any] | None = None) -> PreTrainedModel:
    return empty_model(config, dtype=torch.float32, attention="eager", device=torch.device("cpu"), names=names)


def _account_fp8(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Check that FP8 weights and scales come in pairs, and that they are the model's.

    ``transformers`` reads a weight without its scale unscaled, and takes the size of blocks from the number of scales.
    """
    weights = {name: one for name, one in checkpoint.tensors.items() if one.dtype.startswith("F8")}
    scales = {f"{name}{_SCALE}": name for name in weights}
    check_tensors(
        checkpoint.source,
        config.model_type,
        missing=[scale for scale in scales if scale not in checkpoint],
        unused=[name for name in checkpoint.tensors if name.endswith(_SCALE) and name not in scales],
    )
    size = (checkpoint.config.get(QUANTIZATION) or {}).get("weight_block_size")
    odd = [
        f"{scale} has shape {checkpoint.tensors[scale].shape}, which the library cannot apply to {weights[name].shape} "
        f"in blocks of {tuple(size)}"
        for scale, name in scales.items()
        if size and not _fits(checkpoint.tensors[scale].shape, weights[name].shape, size)
    ]
    check_tensors(checkpoint.source, config.model_type, missing=(), unused=(), odd=odd)
    # Scales of activations serve FP8 arithmetic only.
    none = {*scales, *(f"{name.removesuffix('weight')}activation_scale" for name in weights)}
    plain = {
        name: replace(one, dtype="F32") if name in weights else one
        for name, one in checkpoint.tensors.items()
        if name not in none
    }
    match_headers(_empty(config, plain), plain, checkpoint.source)


def _fits(scales: tuple[int, ...], weights: tuple[int, ...], size: list[int]) -> bool:
    """Return whether scales are one per block; the library divides each axis into equal blocks."""
    return len(scales) == len(weights) and all(
        count == max(1, -(-length // block)) and (count == 1 or length == count * block)
        for count, length, block in zip(scales[-2:], weights[-2:], size, strict=True)
    )


def _method(source: str) -> str | None:
    """Quantisation method of a model; None as well if its configuration cannot be read, which the loader reports."""
    with suppress(ModelError, OSError, ValueError, RecursionError):
        path = file_of(source, CONFIG)
        config = json.loads(path.read_bytes()) if path else None
        return quantization_of(config) if isinstance(config, dict) else None
    return None


def _converted(
    key: str,
    source: str,
    what: str,
    read: Callable[[], _Read],
) -> Path:
    """Cached directory of a conversion; ``read`` returns model, the library's report of the load, and tokenizer."""

    def prepare(folder: Path) -> None:
        # The reader prints its own progress bar to standard error.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            try:
                model, report, tokenizer = read()
            except ModelError:
                raise
            except Exception as error:  # a damaged file raises errors of many kinds
                raise ModelError(f"cannot read {what}: {first_line(error)}") from error
            check_tensors(
                source,
                model.config.model_type,
                missing=sorted(report["missing_keys"]),
                unused=sorted(report["unexpected_keys"]),
                odd=sorted(str(one) for one in (*report["mismatched_keys"], *report["error_msgs"])),
            )
            # The weights are plain now; the quantizer that the model still holds would refuse to save them, and the
            # conversions that it used would code them again.
            for leftover in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
                with suppress(AttributeError):
                    delattr(model, leftover)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            save_end_ids(model, tokenizer)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return cached_folder(cache_dir() / "converted" / hashlib.sha256(key.encode()).hexdigest()[:24], prepare)


def _fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Metadata of a GGUF file without its tokenizer; keys without the prefix of the architecture."""
    prefix = f"{reader.fields['general.architecture'].contents()}."
    plain = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    return {name.removeprefix(prefix): field.contents() for name, field in plain.items()}


def _check_fields(fields: Mapping[str, Any], path: Path) -> None:
    if (shards := fields.get("split.count", 1)) > 1:
        raise ModelError(
            f"'{path}' is one of {shards} shards of a GGUF file; join them first (llama-gguf-split --merge)"
        )
    check_sizes({"num_hidden_layers": fields.get("block_count")}, str(path))
    if fields.get("attention.causal", True) is False:
        raise ModelError(f"'{path}' is a bidirectional model, which is not supported from GGUF files")
    # The reader ignores rotary scaling; without it every angle would be wrong.
    if (scaling := fields.get("rope.scaling.type", "none")) != "none":
        raise ModelError(f"'{path}' scales its rotary angles ('{scaling}'), which is not supported from GGUF files")


def _check_architecture(reader: gguf.GGUFReader, path: Path) -> None:
    known = sorted({*GGUF_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    found = str(reader.fields["general.architecture"].contents())
    # Files spell some names without the underscores of the library's list: qwen2moe, gpt-oss.
    if _letters(found) not in map(_letters, known):
        raise ModelError(f"'{path}' is of the architecture '{found[:60]}'; allowed in GGUF files: {', '.join(known)}")


def _letters(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _account_gguf(reader: gguf.GGUFReader, config: PretrainedConfig, path: Path) -> None:
    """Compare a GGUF file's tensors with its model's, and put its rotary factors into the configuration."""
    held = {str(tensor.name): tensor for tensor in reader.tensors}
    if (factors := held.pop(_ROPE_FACTORS, None)) is not None:
        _scale_rotary(config, torch.from_numpy(factors.data.copy()), path)
    model, architecture = _empty(config), str(reader.fields["general.architecture"].contents())
    _check_settings(_fields(reader), model, path)
    if architecture in GGUF_ARCHS:
        headers = {
            name: StoredTensor(path.name, "F32", tuple(int(size) for size in reversed(tensor.shape)))
            for name, tensor in held.items()
        }
        match_headers(model, headers, str(path), mapping=GGUF_ARCHS[architecture](config))
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    # Of experts, which the library fuses, its map has the names without the ending that they have in the file.
    names = {
        theirs if theirs in held else f"{theirs}.weight" if f"{theirs}.weight" in held else theirs: ours
        for theirs, ours in get_gguf_hf_weights_map(model, processor).items()
    }
    shapes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sizes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for theirs, ours in names.items():
        if theirs in held and ours in shapes:
            sizes[ours].append((theirs, int(held[theirs].n_elements)))
    missing = [ours for theirs, ours in names.items() if theirs not in held and ours in shapes and ours not in tied]
    check_tensors(
        str(path),
        config.model_type,
        missing=[*missing, *(name for name in shapes if name not in names.values() and name not in tied)],
        unused=[name for name in held if name not in names],
        odd=[
            f"{' and '.join(name for name, _ in parts)} holds {sum(size for _, size in parts)} numbers, not "
            f"{shapes[ours]}"
            for ours, parts in sizes.items()
            if sum(size for _, size in parts) != shapes[ours]
        ],
    )


def _check_settings(fields: Mapping[str, Any], model: PreTrainedModel, path: Path) -> None:
    """Compare settings of a GGUF file with those of the configuration that the library reads from it.

    Its readers leave some out for some architectures, and the defaults of a type are those of one model. A window that
    all blocks have is put into the configuration.

    Raises:
        ModelError: a setting is another.
    """
    config: Any = model.config
    window = fields.get("attention.sliding_window")
    if window and not hasattr(config, "layer_types") and getattr(config, "sliding_window", 0) is None:
        config.sliding_window = window  # of one width for all blocks; phi3's reader leaves it out
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    read = {
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
    }
    rotated = {2 * tensor.numel() for name, tensor in model.named_buffers() if name.endswith("inv_freq")}
    if rotated and fields.get("rope.dimension_count") not in (None, *rotated):
        read["rope.dimension_count"] = min(rotated)
    # Not in the file: llama.cpp scales attention by the width of a head, and that of the two largest models otherwise.
    if hasattr(config, "query_pre_attn_scalar"):
        large = (config.model_type, config.num_hidden_layers) in _LARGE_GEMMAS
        width = config.hidden_size // config.num_attention_heads if large else config.head_dim
        fields, read["query_pre_attn_scalar"] = {**fields, "query_pre_attn_scalar": width}, config.query_pre_attn_scalar
    for name, ours in read.items():
        said = fields.get(name)
        if said and (ours is None or abs(float(ours) - float(said)) > _RELATIVE * abs(float(said))):
            raise ModelError(
                f"'{path}' sets {name} to {said}, and the library's reader of '{config.model_type}' files gives {ours}"
            )


def _scale_rotary(config: PretrainedConfig, factors: Tensor, path: Path) -> None:
    """Write the rotary factors of Llama 3, which its GGUF files hold as a tensor, into the configuration.

    Raises:
        ModelError: the factors do not follow Llama 3's rule with the settings that it was trained with.
    """
    if bool((factors == 1).all()):
        return
    plain: dict[str, Any] = dict(config.rope_parameters or {})
    scale = round(float(factors.max()), 3)
    config.rope_parameters = {**plain, "rope_type": "llama3", "factor": scale, **_LLAMA3}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    unscaled = plain["rope_theta"] ** -(torch.arange(0, width, 2) / width)
    if config.model_type != "llama" or not torch.allclose(unscaled / factors.float(), scaled, rtol=1e-3, atol=0.0):
        raise ModelError(
            f"'{path}' holds {_ROPE_FACTORS}, which are not Llama 3's factors and would change every angle"
        )
