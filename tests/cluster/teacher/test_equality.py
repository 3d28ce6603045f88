"""Every stage and number of workers trains to the same weights as plain torch in one process."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, LlamaForCausalLM

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import ShardedCheckpoint
from raycloud.data.batches import Sample, SampleOrder, collate
from raycloud.data.tokens import TokenFile, token_table, write_tokens
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.training.loop import Loss, Trainer
from raycloud.training.lora import add_adapters
from tests.cluster.teacher.group import run

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 12
# A clip that bites, micro-batches of different numbers of tokens, warm-up and decay.
TRAINING = {
    "lr": 3e-3,
    "warmup_steps": 3,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "weight_decay": 0.1,
}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}
ROLES = ["query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down"]


def _case(name: str, model: Path, stage: int, **more: Any) -> dict[str, Any]:
    recipe = {"model": str(model), "dtype": "float32", "training": TRAINING, "deepspeed": {"stage": stage}}
    about = {key: more.pop(key) for key in ("begun", "until") if key in more}
    return {"name": name, "steps": STEPS, "recipe": {**recipe, **more}, **about}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 24, (37,), generator=generator).tolist()
    samples = [
        Sample(tuple(torch.randint(3, 500, (length,), generator=generator).tolist()), length // 3) for length in lengths
    ]
    write_tokens(folder / "tokens.arrow", [token_table(samples)])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Model like ``tiny_llama`` with a small vocabulary, which makes its steps much faster."""
    folder = tmp_path_factory.mktemp("models") / "shorter"
    shutil.copytree(tiny_llama, folder)
    config = AutoConfig.from_pretrained(tiny_llama, vocab_size=512)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, model: Path) -> Path:
    """Make all cases; two workers first write the checkpoints from which other cases resume."""
    # Stage 3 comes first: in a fresh process nothing has told the library yet how many workers there are.
    stages = [_case(f"stage{stage}", model, stage) for stage in (3, 0, 1, 2)]
    lora = [_case("lora2", model, 2, lora=LORA), _case("lora3", model, 3, lora={**LORA, "target_modules": ROLES})]
    frugal = {"training": {**TRAINING, "gradient_checkpointing": True}}
    both = [
        *stages,
        *lora,
        _case("checkpointing", model, 3, **frugal),
        _case("offloaded", model, 3, deepspeed={"stage": 3, "offload_optimizer": True, "offload_parameters": True}),
        *(_case(f"half{stage}", model, stage, until=STEPS // 2) for stage in (0, 2, 3)),
        _case("bfloat16", model, 2, dtype="bfloat16"),
        _case("bfloat16-half", model, 2, dtype="bfloat16", until=STEPS // 2),
        _case("bfloat16-resumed", model, 2, dtype="bfloat16", begun=folder / "bfloat16-half"),
        _case("resumed3from2", model, 3, begun=folder / "half2"),
    ]
    run(2, both, folder)
    alone = [{**case, "name": f"{case['name']}alone"} for case in stages]
    resumed = [
        _case(f"{to}from{of}alone", model, to, begun=folder / f"half{of}") for to, of in ((2, 3), (3, 0), (0, 2))
    ]
    run(1, [*alone, *resumed, _case("bfloat16-stage0alone", model, 0, dtype="bfloat16")], folder)
    return folder


@cache
def _reference(
    folder: Path, source: Path, lora: bool = False, products: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], list[float]]:
    recipe = TuneTeacherRecipe.model_validate(_case("", source, 0)["recipe"])
    model = load(str(source), dtype="float32").model
    if lora:
        recipe = recipe.model_validate({**recipe.model_dump(), "lora": LORA})
        assert recipe.lora is not None
        model = add_adapters(model, recipe.lora, recipe.seed)
    segment, tokens = Segment(model), TokenFile(folder / "tokens.arrow")
    trainer = Trainer({"model": model}, recipe.training, total_steps=STEPS, seed=recipe.seed)
    order = SampleOrder(tokens.lengths, recipe.training.batch_size, recipe.seed)

    def loss(batch: Any) -> Loss:
        wanted = batch.labels >= 0
        with torch.autocast("cpu", products, enabled=products != torch.float32):
            logits = segment(batch.ids, valid=batch.valid)[wanted].float()
        return Loss(cross_entropy(logits, batch.labels[wanted], reduction="sum"), batch.targets, {})

    losses = []
    for step in range(STEPS):
        which = [order.indices(2 * step + micro) for micro in range(2)]
        losses.append(trainer.step([collate([tokens[i] for i in some], 0) for some in which], loss).loss)
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}, losses


def _far(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    shards = ShardedCheckpoint(folder)
    assert set(shards.names) == set(weights)
    difference = sum(float((shards.weight(name) - one).square().sum()) for name, one in weights.items())
    return (difference / sum(float(one.square().sum()) for one in weights.values())) ** 0.5


@pytest.mark.parametrize("workers", ["", "alone"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_plain_torch(trained: Path, model: Path, stage: int, workers: str) -> None:
    weights, losses = _reference(trained, model)
    case = trained / f"stage{stage}{workers}"
    assert _far(case, weights) < 1e-4
    steps = json.loads((case / "steps.json").read_text())["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-4)
    assert max(step["grad_norm"] for step in steps) > TRAINING["max_grad_norm"]  # or clipping was not tried


@pytest.mark.parametrize("name", ["checkpointing", "offloaded"])
def test_saving_memory_changes_nothing(trained: Path, model: Path, name: str) -> None:
    assert _far(trained / name, _reference(trained, model)[0]) < 1e-4


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_train_as_plain_torch(trained: Path, model: Path, stage: int) -> None:
    assert _far(trained / f"lora{stage}", _reference(trained, model, lora=True)[0]) < 1e-4


@pytest.mark.parametrize("name", ["resumed3from2", "2from3alone", "3from0alone", "0from2alone"])
def test_a_checkpoint_goes_on_under_another_stage_and_number_of_workers(trained: Path, model: Path, name: str) -> None:
    assert _far(trained / name, _reference(trained, model)[0]) < 1e-4


def test_half_precision_resumes_bit_for_bit_and_keeps_float32_weights(trained: Path) -> None:
    undisturbed, resumed = ShardedCheckpoint(trained / "bfloat16"), ShardedCheckpoint(trained / "bfloat16-resumed")
    for name in undisturbed.names:
        assert torch.equal(undisturbed.weight(name), resumed.weight(name))
    whole = torch.cat([undisturbed.weight(name).flatten() for name in undisturbed.names])
    assert not torch.equal(whole, whole.bfloat16().float())


def test_stage_0_multiplies_in_the_type_that_all_stages_do(trained: Path, model: Path) -> None:
    weights, losses = _reference(trained, model, products=torch.bfloat16)
    assert _far(trained / "bfloat16-stage0alone", weights) < 1e-3
    steps = {
        name: [step["loss"] for step in json.loads((trained / name / "steps.json").read_text())["steps"]]
        for name in ("bfloat16-stage0alone", "bfloat16", "stage0")
    }
    assert steps["bfloat16-stage0alone"] == pytest.approx(losses, rel=1e-3)
    assert steps["bfloat16-stage0alone"] != pytest.approx(steps["stage0"], rel=1e-5)
    assert steps["bfloat16"] == pytest.approx(losses, rel=2e-2)


def test_all_stages_judge_alike(trained: Path) -> None:
    found = [
        json.loads((trained / f"stage{n}{w}" / "steps.json").read_text())["held_out"]
        for n in range(4)
        for w in ("", "alone")
    ]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-4)
