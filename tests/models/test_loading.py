"""Models from directories, GGUF files and built-in names; clear errors for everything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EncodecConfig

from raycloud.durable import write_folder
from raycloud.errors import ChecksumError, FetchError, ModelError
from raycloud.models.checkpoint import Checkpoint
from raycloud.models.loading import check_model, load, load_config, load_tokenizer, resolve
from raycloud.models.verdict import structure_of
from tests.models.families import tiny


def test_a_directory_loads_with_its_tokenizer(tiny_llama: Path) -> None:
    loaded = load(str(tiny_llama), device="cpu")
    assert loaded.model.config.model_type == "llama"
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.pad_token_id is not None
    assert not loaded.model.training


def test_the_built_in_teacher_knows_its_capitals() -> None:
    loaded = load("builtin:smollm2-135m-instruct", device="cpu")
    assert loaded.model.config.num_hidden_layers == 30
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(loaded.model(input_ids=ids).logits[0, -1].argmax())
    assert loaded.tokenizer.decode(best) == " Paris"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04zip", "is not a GGUF file"),
        (b"GGUF" + b"\x07" * 64, "cannot read GGUF"),
    ],
)
def test_a_corrupt_gguf_is_one_line_and_leaves_nothing(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message) as raised:
        load(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(raised.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("builtin:nothing", FetchError, "available: builtin:smollm2-135m-instruct"),
        ("builtin:reviews", ModelError, "is data, not a model"),
        ("./nowhere", ModelError, "allowed: a directory"),
        ("/nowhere/model.gguf", ModelError, "no GGUF file"),
        ("a b c", ModelError, "allowed: a directory"),
    ],
)
def test_sources_that_are_none(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(source)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_a_type_without_a_text_model_is_refused(tmp_path: Path) -> None:
    EncodecConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'encodec'") as raised:
        structure_of(load_config(str(tmp_path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_byte_of_a_folder_with_checksums_is_named(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """transformers itself would load such weights without an error."""
    model = tmp_path / "model"
    write_folder(model, lambda to: shutil.copytree(tiny_llama, to, dirs_exist_ok=True) and None)
    load(str(model))
    content = bytearray((model / name).read_bytes())
    content[-3] ^= 1
    (model / name).write_bytes(content)
    readers = [load, Checkpoint]
    if name != "model.safetensors":
        readers.append({"tokenizer.json": load_tokenizer, "config.json": load_config}[name])
    for read in readers:
        with pytest.raises(ChecksumError, match=f"{name}' is damaged or was changed") as raised:
            read(str(model))
        assert "\n" not in str(raised.value)
    (model / "checksums.json").unlink()  # as a folder from a hub: nothing to compare
    if name == "model.safetensors":
        load(str(model))


def test_a_model_without_a_tokenizer_says_which_file_is_missing(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds no tokenizer; allowed: one of the files tokenizer\.json, "):
        load_tokenizer(str(tmp_path))


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot read") as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_job_is_told_before_it_starts_that_tensors_are_missing(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    assert check_model(str(tmp_path)).num_hidden_layers == 6
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    for ask in (check_model, load):
        with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
            ask(str(tmp_path))
