"""Loading a model with its tokenizer from a hub id, a local directory, a GGUF file or a built-in name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.errors import ModelError
from raycloud.fetch import PREFIX, fetch, find_builtin
from raycloud.models.checkpoint import Checkpoint, copy_parameters, empty_model, load_tensors
from raycloud.models.configuration import CONFIG, load_auto, load_config, quiet_transformers
from raycloud.models.conversion import convert_gguf, dequantised
from raycloud.models.devices import Device, DType
from raycloud.models.tensor_check import match_tensors

__all__ = [
    "Pretrained",
    "check_model",
    "convert_gguf",
    "load",
    "load_config",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "quiet_transformers",
    "resolve",
]

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that hold a vocabulary; a tokenizer's other files only describe it."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Pretrained:
    """Model with its tokenizer and the source that both were loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def pick_device(device: Device) -> torch.device:
    """Torch device of a recipe's device; ``auto`` is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """Torch type of a recipe's dtype; ``auto`` is bfloat16 on a GPU and float32 on a CPU.

    Half precision is slow or inexact on the CPUs of many machines.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, dtype)
    return found


def resolve(source: str, notify: Callable[[str], None] = lambda line: None) -> str:
    """Directory or hub id with plain weights: built-ins are fetched, GGUF and FP8 weights converted, once each.

    Args:
        source: ``builtin:NAME``, a path to a directory or ``.gguf`` file, or a hub id.
        notify: called with one line before each download or conversion.

    Raises:
        ModelError: the path does not exist or is no model.
        FetchError: the built-in cannot be fetched.
    """
    if source.startswith(PREFIX):
        folder = fetch(source, notify)
        inside = sorted(folder.glob("*.gguf"))
        if inside:
            return str(convert_gguf(inside[0], notify))
        if not (folder / CONFIG).is_file():
            raise ModelError(f"'{source}' is data, not a model ({find_builtin(source).about})")
        return str(folder)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return str(convert_gguf(path, notify))
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ModelError(f"model directory '{source}' holds no {CONFIG}")
        return dequantised(str(path), notify)
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"no model at '{source}'; allowed: a directory, a .gguf file, a hub id such as org/name, or a builtin: name"
        )
    return dequantised(source, notify)


def check_model(source: str) -> PretrainedConfig:
    """Check the tensors of a model against its configuration by the headers of its files; return the configuration.

    A job calls this before it starts anything; see :mod:`raycloud.models.tensor_check`.

    Raises:
        ModelError: it cannot be read, its type is not known, or its tensors are not those of its configuration.
    """
    config, checkpoint = load_config(source), Checkpoint(source)
    cpu = torch.device("cpu")
    match_tensors(
        empty_model(config, dtype=torch.float32, attention="sdpa", device=cpu, names=checkpoint.tensors), checkpoint
    )
    return config


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model; EOS is its padding token if it names none.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"'{source}' holds no tokenizer; allowed: one of the files {', '.join(_TOKENIZERS)}")
    tokenizer: PreTrainedTokenizerBase = load_auto(AutoTokenizer, source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(
    source: str,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    attention: Literal["sdpa", "eager"] = "sdpa",
    notify: Callable[[str], None] = lambda line: None,
) -> Pretrained:
    """Load a causal LM, or an encoder for encoder families, in evaluation mode, with its tokenizer.

    Args:
        source: see :func:`resolve`.
        device: device of the model.
        dtype: type of the parameters.
        attention: the attention implementation of ``transformers``.
        notify: called with one line before each download or conversion.

    Raises:
        ModelError: it cannot be found or read, or its type is not known.
        FetchError: the built-in cannot be fetched.
        ChecksumError: a file of the folder differs from its entry in ``checksums.json``.
    """
    where = resolve(source, notify)
    config, checkpoint, place = load_config(where), Checkpoint(where), pick_device(device)
    kind = pick_dtype(dtype, place)
    model = empty_model(config, dtype=kind, attention=attention, device=place, names=checkpoint.tensors)
    load_tensors(model, match_tensors(model, checkpoint), checkpoint, place)
    copy_parameters([model])
    if model.can_generate() and (generation := checkpoint.generation_config()) is not None:
        model.generation_config = generation
    return Pretrained(model, load_tokenizer(where), source)
