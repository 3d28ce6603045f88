"""Configuration of a model, checked as plain JSON before ``transformers`` uses it.

A model folder is data. Its ``config.json`` is read here first: an unknown family, sizes that no model has and weights
in an unsupported format are refused before anything is built from them, and ``auto_map``, which names code in the
folder, is removed. ``transformers`` is never allowed to run such code and never prompts for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from raycloud.checksums import verify_file
from raycloud.errors import ModelError
from raycloud.models.plain_text import plain_config
from raycloud.models.twin import auto_class, has_language_head

CONFIG = "config.json"
QUANTIZATION = "quantization_config"

_BLOCKS, _LABELS, _WIDTH = 1024, 2**16, 2**24
_MOST: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), _BLOCKS),
    "num_labels": _LABELS,
    **dict.fromkeys(
        (
            *("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim", "word_embed_proj_dim", "head_dim"),
            *("num_attention_heads", "n_head", "num_key_value_heads", "vocab_size", "type_vocab_size"),
            *("max_position_embeddings", "n_positions"),
        ),
        _WIDTH,
    ),
}
"""Upper limits of sizes, above those of any model: larger sizes are refused before memory is allocated.

Each block and each label becomes a Python object.
"""


UNBOUNDED = 2**20
"""Number of tokens that stands for no limit."""


def file_of(source: str, name: str) -> Path | None:
    """Path of a file of a model directory or hub id, or None if there is no file of this name.

    Raises:
        ModelError: the hub cannot be reached.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ModelError(f"cannot load '{source}': {first_line(error)}{_hint(source)}") from error
    return Path(found) if found else None


def read_config(source: str) -> dict[str, Any]:
    """Content of ``config.json`` as plain data.

    Raises:
        ModelError: there is none, it is not a JSON object, the library has no model of its type, or a size is above
            those of any model.
        ChecksumError: it differs from its entry in ``checksums.json`` in the same folder.
    """
    path = file_of(source, CONFIG)
    if path is None:
        raise ModelError(f"cannot load '{source}': it holds no {CONFIG}{_hint(source)}")
    verify_file(path)
    found = json_object(path, source)
    check_type(found.get("model_type"))
    check_sizes(found, source)
    if isinstance(text := found.get("text_config"), dict):  # of a multimodal model
        check_sizes(text, source)
    return found


def check_type(model_type: object) -> None:
    """Check that the library has models of a type, the ``model_type`` of ``config.json``.

    Raises:
        ModelError: it has none.
    """
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        said = str(model_type)[:60]
        raise ModelError(
            f"model type '{said}' is not known; allowed: a type of transformers {transformers.__version__}, whose own "
            "code runs it"
        )


def json_object(path: Path, source: str) -> dict[str, Any]:
    """Content of a JSON file of a model folder, as plain data.

    Raises:
        ModelError: the file is damaged, or is no JSON object.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{source}' has a damaged {path.name}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"'{source}' has a damaged {path.name}: it is not a JSON object")
    return found


def check_sizes(config: Mapping[str, Any], source: str) -> None:
    """Check that the sizes of a configuration are whole numbers that a model can have.

    Raises:
        ModelError: a size is not; the message names the field, the value and what is allowed.
    """
    for name, most in _MOST.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            said = str(value)[:40]
            raise ModelError(f"'{source}': {name} is {said} in its {CONFIG}; allowed: a whole number from 1 to {most}")


def load_config(source: str) -> PretrainedConfig:
    """Configuration of a text model, or of the text side of a multimodal one; the weights are not read.

    Raises:
        ModelError: it cannot be read, its weights are quantised, or the library has no text model of its type.
    """
    if (method := quantization_of(read_config(source))) is not None:
        raise ModelError(
            f"'{source}' holds weights quantised by '{method}', which are not supported; dequantise them first"
        )
    config = language_side(without_remote_code(load_auto(AutoConfig, source)))
    auto_class(config)
    return config


def language_side(config: PretrainedConfig) -> PretrainedConfig:
    """Configuration of the text model inside a multimodal model; ``config`` itself if it is no multimodal one.

    See :mod:`raycloud.models.plain_text` for sides without a language model of their own.

    Raises:
        ModelError: the library has no language model for the text side of this type.
    """
    text = config.get_text_config()
    if text is config or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return config
    plain = plain_config(text)
    if not has_language_head(plain):
        raise ModelError(
            f"transformers {transformers.__version__} has no language model for the text side of a multimodal "
            f"'{config.model_type}' model ('{text.model_type}'); run it whole"
        )
    plain.tie_word_embeddings = config.tie_word_embeddings  # the multimodal model's own head decides
    return plain


def context_length(config: PretrainedConfig) -> int:
    """Largest number of tokens of a text; :data:`UNBOUNDED` for a model that has no positions to run out of."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return next((int(one) for one in found if one), UNBOUNDED)


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """Quantisation method that a ``config.json`` names; None if the weights are not quantised."""
    found = config.get(QUANTIZATION)
    if not found:
        return None
    return str(found.get("quant_method", "an unnamed method")) if isinstance(found, dict) else "an unnamed method"


def without_remote_code(config: PretrainedConfig) -> PretrainedConfig:
    """Remove the settings of a configuration that name code in the model folder."""
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


def load_auto(auto: Any, source: str, **options: Any) -> Any:
    """Object that an ``Auto`` class of ``transformers`` loads from a model folder or hub id; no code of it is run.

    Raises:
        ModelError: it cannot be read.
        ChecksumError: a file of the folder differs from its entry in ``checksums.json``.
    """
    if Path(source).is_dir():
        for path in Path(source).iterdir():
            if path.is_file() and path.suffix != ".safetensors":  # weights are large, and only few callers read them
                verify_file(path)
    with quiet_transformers():
        try:
            return auto.from_pretrained(source, trust_remote_code=False, **options)
        except Exception as error:  # hub, file system and formats raise errors of many kinds
            raise ModelError(f"cannot load '{source}': {first_line(error)}{_hint(source)}") from error


def _hint(source: str) -> str:
    return "" if Path(source).exists() else " (no such directory, and the hub did not have it or is out of reach)"


def first_line(error: BaseException) -> str:
    """First line of the message of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress the progress bars and advice of ``transformers`` in a context."""
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
