"""Loading a model with its tokenizer from a hub id, a local directory, a GGUF file or a built-in name."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from raycloud.errors import ModelError
from raycloud.fetch import PREFIX, builtin_named, cache_dir, fetch, prepared
from raycloud.models.anatomy import anatomy_of

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Pretrained:
    """A model with its tokenizer and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def pick_device(device: Device) -> torch.device:
    """``auto`` is a GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, where half precision is slow or inexact on many machines."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, dtype)
    return found


def resolve(source: str, notify: Callable[[str], None] = lambda line: None) -> str:
    """A directory or hub id that ``transformers`` loads: built-ins are fetched, GGUF files converted, once each.

    Args:
        source: ``builtin:NAME``, a path to a directory or ``.gguf`` file, or a hub id.
        notify: told one line before each download or conversion.

    Raises:
        ModelError: the path does not exist or is no model.
        FetchError: the built-in cannot be had.
    """
    if source.startswith(PREFIX):
        folder = fetch(source, notify)
        inside = sorted(folder.glob("*.gguf"))
        if inside:
            return str(convert_gguf(inside[0], notify))
        if not (folder / "config.json").is_file():
            raise ModelError(f"'{source}' is data, not a model ({builtin_named(source).about})")
        return str(folder)
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return str(convert_gguf(path, notify))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model directory '{source}' holds no config.json")
        return str(path)
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"no model at '{source}'; allowed: a directory, a .gguf file, a hub id such as org/name, or a builtin: name"
        )
    return source


def convert_gguf(path: Path, notify: Callable[[str], None] = lambda line: None) -> Path:
    """Dequantise a GGUF file into a cached ``transformers`` directory (float32 safetensors), once per content.

    Raises:
        ModelError: the file is missing, corrupt, or of a family without an anatomy record.
    """
    if not path.is_file():
        raise ModelError(f"no GGUF file at '{path}'")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"'{path}' is not a GGUF file (it does not begin with 'GGUF')")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def prepare(folder: Path) -> None:
        notify(f"converting {path.name} to safetensors")
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        # The reader draws a progress bar of its own on standard error.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            try:
                config = AutoConfig.from_pretrained(**where)
                anatomy_of(config)
                model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(**where)
            except ModelError:
                raise
            except Exception as error:  # whatever the reader meets in a damaged file
                raise ModelError(f"cannot read GGUF file '{path}': {_first_line(error)}") from error
            # The weights are plain now; the leftover quantizer would refuse to save them.
            for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
                with suppress(AttributeError):
                    delattr(model, leftover)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return prepared(cache_dir() / "converted" / digest[:24], prepare)


def load_config(source: str) -> PretrainedConfig:
    """The configuration of a model whose family has an anatomy record, without its weights.

    Raises:
        ModelError: it cannot be read, or the family has no record.
    """
    config: PretrainedConfig = _from_pretrained(AutoConfig, source)
    anatomy_of(config)
    return config


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; it always has a padding token.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source)
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
    """A causal LM, or an encoder for families that are encoders, in evaluation mode, with its tokenizer.

    Args:
        source: see :func:`resolve`.
        device: where to put it.
        dtype: the parameters' type.
        attention: the attention implementation of ``transformers``.
        notify: told one line before each download or conversion.

    Raises:
        ModelError: it cannot be found or read, or its family has no anatomy record.
        FetchError: the built-in cannot be had.
    """
    where = resolve(source, notify)
    config = load_config(where)
    auto = AutoModelForCausalLM if anatomy_of(config).causal else AutoModel
    place = pick_device(device)
    model: PreTrainedModel = _from_pretrained(
        auto, where, dtype=pick_dtype(dtype, place), attn_implementation=attention, use_safetensors=True
    )
    model.to(place)  # type: ignore[arg-type]
    return Pretrained(model.eval(), load_tokenizer(where), source)


def _from_pretrained(auto: Any, source: str, **options: Any) -> Any:
    with quiet_transformers():
        try:
            return auto.from_pretrained(source, **options)
        except Exception as error:  # the hub, the file system and the formats each raise their own
            hint = (
                "" if Path(source).exists() else " (no such directory, and the hub did not have it or is out of reach)"
            )
            raise ModelError(f"cannot load '{source}': {_first_line(error)}{hint}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the library's progress bars and advice out of a job's output."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving a model imports DeepSpeed where it is installed
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
