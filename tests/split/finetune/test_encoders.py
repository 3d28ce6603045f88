"""Encoders of many types in split fine-tuning: they learn what the unsplit model of the library learns."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM

from raycloud.benchmarks.family_configs import ENCODERS, tiny_config, tiny_model
from raycloud.errors import ModelError
from raycloud.link.channel import Loopback
from raycloud.models.segments import Segment
from raycloud.models.structure import base_of, blocks_of, module_at, pooler_of
from raycloud.models.verdict import structure_of
from raycloud.split.finetune.bottleneck import sft_bottleneck
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.run import run
from raycloud.split.finetune.server import TuneServer
from raycloud.split.finetune.sides import build_local_edge
from raycloud.split.finetune.tasks import TextHead
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet, SplitPlan
from tests.split.finetune.test_run import reviews
from tests.split.finetune.wiring import CLASSES, SEED, WIDTH, Whole, batches, distance, parts_of, values
from tests.tokenizers import BOS, EOS, PAD, tokenizer_of

EAGER = ("deberta-v2", "mpnet")
NAMES = ("roberta", "xlm-roberta", "distilbert", "electra", "modernbert", *EAGER)
ALIKE = ("roberta", "xlm-roberta", "electra", *EAGER)
BLOCKS, STEPS = 4, 3
CASES = [(1, 3, "mean", "edge"), (2, None, "first", "edge"), (0, None, "first", "cloud")]


def encoder(name: str) -> Any:
    """Random encoder with dropout whose pads are those of its configuration."""
    model = tiny_model(name, "eager" if name in EAGER else "sdpa").float()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # of some types the default is none
    return model


def recipe(first: int, second: int | None, pooling: str, labels: str) -> SplitTuneRecipe:
    return SplitTuneRecipe.parse(
        {
            "output": "out",
            "start_block": first,
            "end_block": second,
            "task": {"kind": "classification", "pooling": pooling},
            "uplink": {"kind": "plain", "dtype": "float32"},
            "downlink": "float32",
            "labels": labels,
            "seed": SEED,
            "training": {"lr": 2e-3, "warmup_steps": 4, "max_grad_norm": 0.5, "weight_decay": 0.05},
        }
    )


def texts(step: int, pad: int) -> list[Any]:
    made = batches(step, language=False)
    for batch in made:
        batch.ids.masked_fill_(~batch.valid, pad)
    return made


@pytest.mark.parametrize(("first", "second", "pooling", "labels"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_after_steps_are_the_whole_models(
    name: str, first: int, second: int | None, pooling: str, labels: str
) -> None:
    model = encoder(name)
    stock = copy.deepcopy(model)
    shared = structure_of(model.config).shared
    for path in shared:  # tables that all parts have stay as they are
        module_at(base_of(stock), path).requires_grad_(False)
    pooler = pooler_of(stock) if pooling == "first" else None
    head = TextHead(WIDTH, CLASSES, dropout=0.1, seed=SEED, pooler=pooler)
    whole = Whole(stock, head, pooling)
    edge = build_local_edge(
        model,
        recipe(first, second, pooling, labels),
        texts(9, model.config.pad_token_id),
        classes=CLASSES,
        total_steps=20,
    )
    for step in range(STEPS):
        mine = texts(step, model.config.pad_token_id)
        theirs, ours = whole.step(mine), edge.step(mine)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    edge.wait_for_optimiser()
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
    made = {**edge.modules, **cloud.modules}
    reference = parts_of(whole, first, BLOCKS if second is None else second)
    found = {part: made[part] for part in reference}
    assert distance(values(found), values(reference)) <= 1e-5
    assert all(
        torch.equal(module_at(base_of(model), path).weight, module_at(base_of(stock), path).weight) for path in shared
    )


@pytest.mark.parametrize("name", ALIKE)
@torch.no_grad()
def test_the_published_cut_is_the_block_without_its_residual(name: str) -> None:
    model, [batch] = encoder(name), batches(0, 1, language=False)
    block, seen = blocks_of(model)[1], list[Tensor]()
    block.attention.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    model(batch.ids, attention_mask=batch.valid.long())
    expected = block.output.LayerNorm(block.output.dense(block.intermediate(seen[0])))[batch.valid]
    first = Segment(model, 0, 2, head=False)
    code = sft_bottleneck(first, WIDTH)
    found = code.decoder(code.encoder(first.hidden(batch.ids, valid=batch.valid)[batch.valid]))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["distilbert", "modernbert"])
def test_blocks_of_another_form_have_no_published_cut(name: str) -> None:
    with pytest.raises(ModelError, match=f"BERT family, .*got '{name}' and start_block=2; allowed: low_rank or plain"):
        sft_bottleneck(Segment(encoder(name), 0, 2, head=False), 4)


def folder_of(name: str, place: Path, *, head: bool) -> Path:
    """Saved random encoder with a tokenizer that puts a special token at both ends of a text."""
    tokenizer = tokenizer_of(begin=["<bos>"], end=["<eos>"])
    kind, options = ENCODERS[name]
    ids = {"vocab_size": len(tokenizer), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = tiny_config(kind, {**options, **ids})
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if head else AutoModel
    auto.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("name", ["roberta", "electra", "mpnet"])
def test_a_saved_encoder_learns_over_a_link_what_it_learns_here(name: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path / name, head=False)

    def made(output: str) -> SplitTuneRecipe:
        task, cut = {"pooling": "first"}, {"kind": "plain", "dtype": "float32"}
        return reviews(tmp_path / output, model=str(folder), start_block=1, task=task, uplink=cut)

    here = run(made("here"))
    part = load_cloud(str(folder), PlanSet.of(SplitPlan(1, BLOCKS)), device="cpu", dtype="float32", training=True)
    with (
        closing(TuneServer(part, tmp_path / "cloud", threads=1)) as server,
        closing(Loopback(lambda connection: server.serve(connection, "me"))) as loopback,
    ):
        there = run(made("there"), connect=lambda session: loopback.connect())
    assert there["bytes_per_step"] == here["bytes_per_step"]
    ours, theirs = (load_file(tmp_path / output / "edge.safetensors") for output in ("there", "here"))
    assert ours.keys() == theirs.keys() and not any("relative_attention" in name for name in ours)
    assert ("head.pooler.dense.weight" in ours) == (name != "electra")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert AutoModel.from_pretrained(tmp_path / "here" / "model").config.model_type == name


def test_a_saved_encoder_without_a_pooler_learns_from_the_mean(tmp_path: Path) -> None:
    folder = folder_of("roberta", tmp_path / "roberta", head=True)
    summary = run(reviews(tmp_path / "out", model=str(folder), start_block=1))
    assert summary["steps"] == 2


@pytest.mark.parametrize("name", ["electra", "bert"])
@torch.no_grad()
def test_token_types_of_a_pair_and_padding_reach_the_first_part(name: str) -> None:
    model, [batch] = encoder(name), batches(0, 1, language=False)
    types = (torch.arange(batch.ids.shape[1]) >= 2).long().expand_as(batch.ids)
    stock = model(batch.ids, attention_mask=batch.valid.long(), token_type_ids=types, output_hidden_states=True)
    found = Segment(model, 0, 2, head=False).hidden(batch.ids, valid=batch.valid, types=types)
    assert torch.allclose(found[batch.valid], stock.hidden_states[2][batch.valid], rtol=1e-4, atol=1e-5)
    plain = Segment(model, 0, 2, head=False).hidden(batch.ids, valid=batch.valid)
    assert not torch.allclose(found[batch.valid], plain[batch.valid], atol=1e-2)
