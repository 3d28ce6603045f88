"""Every tensor of a checkpoint is used or reported, and every parameter of a model is loaded or reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertForMaskedLM

from raycloud.errors import ModelError
from raycloud.models.checkpoint import Checkpoint, empty_model
from raycloud.models.configuration import load_config
from raycloud.models.structure import pooler_of
from raycloud.models.tensor_check import match_tensors
from raycloud.split.parts import MANIFEST, export, load_cloud, load_edge, load_splittable
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import tiny
from tests.tokenizers import tokenizer_of

PLANS = PlanSet.of(SplitPlan(2, 4))
HEAD, UP = "lm_head.weight", "model.layers.5.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


def saved(folder: Path, change: Callable[[Tensors], Any] = lambda tensors: None, family: str = "llama") -> Path:
    tiny(family, dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of().save_pretrained(folder)
    return folder


def loads(folder: Path) -> dict[str, Callable[[], object]]:
    """Every way a model is loaded; the accounting of the first is that of :func:`raycloud.models.loading.load`."""

    def whole() -> object:
        model = empty_model(
            load_config(str(folder)), dtype=torch.float32, attention="sdpa", device=torch.device("cpu"), names=()
        )
        return match_tensors(model, Checkpoint(str(folder)))

    return {
        "whole": whole,
        "cut": lambda: load_splittable(str(folder), device="cpu"),
        "edge": lambda: load_edge(str(folder), PLANS, device="cpu"),
        "cloud": lambda: load_cloud(str(folder), PLANS, device="cpu"),
        "export": lambda: export(str(folder), PLANS, folder / "parts"),
    }


def refused(folder: Path, *words: str) -> None:
    for way, run in loads(folder).items():
        with pytest.raises(ModelError) as raised:
            run()
        said = str(raised.value)
        assert "\n" not in said and str(folder) in said, way
        for word in words:
            assert word in said, (way, said)


def shrink(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP][:-1].clone()


def narrow(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)


CHANGES: dict[str, tuple[Callable[[Tensors], Any], tuple[str, ...]]] = {
    "missing": (lambda tensors: tensors.pop(UP), ("lacks", UP)),
    "renamed": (lambda tensors: tensors.update({"model.layers.5.mlp.w3": tensors.pop(UP)}), ("lacks", UP, "w3")),
    "no head": (lambda tensors: tensors.pop(HEAD), ("lacks", HEAD)),
    "scales": (lambda tensors: tensors.update({f"{UP}_scale_inv": torch.ones(1, 1)}), ("no place", f"{UP}_scale_inv")),
    "a block too many": (
        lambda tensors: tensors.update({UP.replace("5", "6"): torch.ones(48, 32)}),
        ("no place", "layers.6"),
    ),
    "shape": (shrink, (UP, "(47, 32)", "(48, 32)")),
    "FP8 without scales": (narrow, (UP, "F8_E4M3")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_add_up_is_named_by_every_loader(change: str, tmp_path: Path) -> None:
    edit, words = CHANGES[change]
    refused(saved(tmp_path, edit), *words)


def test_an_adapter_beside_the_weights_is_refused_by_every_loader(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter", "merge")


def test_tied_tensors_are_one_or_equal(tmp_path: Path) -> None:
    def copy(tensors: Tensors) -> None:
        tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors: Tensors) -> None:
        copy(tensors)
        tensors[HEAD][0] += 1

    equal = saved(tmp_path / "equal", copy, "llama-tied")
    model = load_splittable(str(equal), device="cpu").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def only_head(tensors: Tensors) -> None:
        tensors[HEAD] = tensors.pop("model.embed_tokens.weight")

    swapped = saved(tmp_path / "swapped", only_head, "llama-tied")
    assert torch.equal(
        load_splittable(str(swapped), device="cpu").model.get_input_embeddings().weight, model.lm_head.weight
    )
    refused(saved(tmp_path / "other", other, "llama-tied"), HEAD, "tie_word_embeddings")


def test_shards_and_their_index_must_agree(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    fingerprint = load_cloud(str(tmp_path), PLANS, device="cpu").fingerprint
    # How tensors are spread over files is nothing of the model's.
    assert fingerprint == load_cloud(str(saved(tmp_path / "single")), PLANS, device="cpu").fingerprint

    shard = stored["weight_map"].pop(UP)
    index.write_text(json.dumps(stored))
    refused(tmp_path, UP, "disagree")
    stored["weight_map"][UP] = f"../{shard}"
    index.write_text(json.dumps(stored))
    refused(tmp_path, "outside")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "single" / "model.safetensors").read_bytes())
    refused(tmp_path, "holds both")


def test_buffers_of_older_releases_are_nothing_of_the_model(tmp_path: Path) -> None:
    def older(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    def masks(tensors: Tensors) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    load_splittable(str(saved(tmp_path / "llama", older)), device="cpu")
    load_splittable(str(saved(tmp_path / "gpt2", masks, "gpt2")), device="cpu")
    # The bias of a projection is no mask, although its name ends alike.
    refused(
        saved(tmp_path / "odd", lambda tensors: tensors.update({"model.layers.0.attn.c_attn.bias": torch.ones(1)})),
        "c_attn.bias",
    )


def legacy(tensors: Tensors) -> None:
    """Checkpoint with the tensor names of BERT's first releases, and its pretraining heads."""
    for name in list(tensors):
        new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[new] = tensors.pop(name)
    tensors["cls.seq_relationship.weight"] = torch.ones(2, 32)
    tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]


def test_an_encoder_needs_no_head_and_no_pooler_that_was_not_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path, legacy, "bert")
    config = load_config(str(folder))
    checkpoint = Checkpoint(str(folder))
    model = empty_model(
        config, dtype=torch.float32, attention="sdpa", device=torch.device("cpu"), names=checkpoint.tensors
    )
    assert pooler_of(model) is None
    assert {stored for source in match_tensors(model, checkpoint).values() for stored in source.stored} == {
        name for name in checkpoint.tensors if name.startswith("bert.") and not name.endswith("position_ids")
    }
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        reference = BertForMaskedLM.from_pretrained(folder).bert(input_ids=ids).last_hidden_state
        ours = load_splittable(str(folder), device="cpu").model(input_ids=ids).last_hidden_state
    assert torch.allclose(ours, reference, atol=1e-5)


def test_a_pooler_is_read_whole_or_named(tmp_path: Path) -> None:
    AutoModel.from_config(tiny("bert").config).save_pretrained(tmp_path)
    assert load_edge(str(tmp_path), PLANS, device="cpu", pooler=True).pooler is not None
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooler.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused_whole = loads(tmp_path)["cut"]
    with pytest.raises(ModelError, match=r"lacks pooler\.dense\.bias"):
        refused_whole()


def part_of(whole: Path, folder: Path, change: Callable[[Tensors], Any]) -> str:
    """Change the cloud part, and remove its checksums."""
    export(str(whole), PlanSet.of(SplitPlan(1, 3)), folder)
    (folder / "cloud" / "checksums.json").unlink()
    path = next((folder / "cloud").glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder / "cloud")


NORM = "model.layers.2.input_layernorm.weight"


def test_an_exported_part_is_what_was_exported(tiny_llama: Path, tmp_path: Path) -> None:
    """The fingerprint is that of the whole model, and each tensor is compared with its source."""

    def last_bit(tensors: Tensors) -> None:
        tensors[NORM].view(torch.int32)[11] ^= 1

    for number, (change, words) in enumerate(
        (
            (last_bit, f"'{NORM}' is not the tensor"),
            (lambda tensors: tensors.pop(NORM), f"lacks {NORM}"),
            (lambda tensors: tensors.update(stranger=torch.ones(1)), "'stranger' is not the tensor"),
        )
    ):
        with pytest.raises(ModelError, match=words):
            load_cloud(part_of(tiny_llama, tmp_path / str(number), change), device="cpu")


def test_a_part_with_another_configuration_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    part = Path(part_of(tiny_llama, tmp_path / "parts", lambda tensors: None))
    load_cloud(str(part), device="cpu")
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match=rf"config\.json or {MANIFEST} was changed"):
        load_cloud(str(part), device="cpu")
