"""Students made from blocks of one model, and one model merged from several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.segments import Segment
from raycloud.models.structure import blocks_of
from raycloud.models.surgery.extraction import check_extraction, extract
from raycloud.models.surgery.importance import angular_distances, evenly_spaced, most_important
from raycloud.models.verdict import structure_of
from raycloud.models.weights import build, load_weights, weights_of
from tests.models.families import FAMILIES, final, tiny

IDS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_its_blocks_and_loads_like_any_model(family: str, tmp_path: Path) -> None:
    model, blocks = tiny(family, dtype=torch.float32), [0, 2, 3, 5]
    student = extract(model, blocks)
    with torch.no_grad():
        hidden = Segment(model, 0, 0, head=False).hidden(IDS)
        for index in blocks:
            hidden = Segment(model, index, index + 1, embed=False, head=False).hidden(hidden)
        expected = Segment(model, 6, 6)(hidden)
        assert torch.allclose(final(student, IDS), expected, atol=1e-5)
        student.save_pretrained(tmp_path)
        auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
        loaded = auto.from_pretrained(tmp_path)
        assert torch.allclose(final(loaded, IDS), expected, atol=1e-5)
        if family != "bert":
            made = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
            assert made.shape[1] <= IDS.shape[1] + 4


@pytest.mark.parametrize(
    ("name", "blocks"), [("smollm3", [1, 3]), ("smollm3", [3]), ("deepseek_v3", [0, 2]), ("deepseek_v3", [2, 3])]
)
def test_a_student_keeps_what_the_configuration_says_of_each_block(
    name: str, blocks: list[int], tmp_path: Path
) -> None:
    """SmolLM3 lists the blocks without rotation, DeepSeek counts the first blocks without experts."""
    model = tiny_model(name).float()
    extract(model, blocks).save_pretrained(tmp_path)
    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=IDS).logits
        model.model.layers = nn.ModuleList(model.model.layers[index] for index in blocks)
        model.config.num_hidden_layers = len(blocks)
        torch.testing.assert_close(made, model(input_ids=IDS, use_cache=False).logits)


def test_blocks_that_no_configuration_describes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"no 'deepseek_v3' model consists of the blocks \[2, 0\]"):
        extract(tiny_model("deepseek_v3"), [2, 0])
    with pytest.raises(ModelError, match=r"no 'jamba' model consists of the blocks \[1, 2\]"):
        extract(tiny_model("jamba"), [1, 2])


def test_blocks_are_checked_without_weights() -> None:
    check_extraction(tiny_model("qwen3_next").config, [2, 3])
    with pytest.raises(ModelError, match=r"no 'qwen3_next' model consists of the blocks \[0, 1\]: .* Attention layers"):
        check_extraction(tiny_model("qwen3_next").config, [0, 1])
    with pytest.raises(ModelError, match=r"no 'deepseek_v3' model consists of the blocks \[2, 0\]"):
        check_extraction(tiny_model("deepseek_v3").config, [2, 0])


def test_two_multipliers_are_no_setting_of_each_of_two_blocks() -> None:
    student = extract(tiny_model("falcon_h1").float(), [1, 3])
    assert structure_of(student.config).causal


def test_a_student_is_a_copy() -> None:
    model = tiny("llama")
    before = weights_of(model)["model.layers.0.mlp.up_proj.weight"].clone()
    extract(model, [0, 1]).model.layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(weights_of(model)["model.layers.0.mlp.up_proj.weight"], before)


@pytest.mark.parametrize("blocks", [[], [6], [-1]])
def test_blocks_the_model_has_not_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="some of 0 to 5"):
        extract(tiny("llama"), blocks)


def test_even_spacing_keeps_both_ends() -> None:
    assert evenly_spaced(30, 4) == [0, 10, 19, 29]
    assert evenly_spaced(6, 6) == list(range(6))
    with pytest.raises(ValueError, match="from 1 to 6"):
        evenly_spaced(6, 7)


def test_a_block_that_does_nothing_matters_least() -> None:
    model = tiny("llama")
    idle = blocks_of(model)[3]
    for layer in (idle.self_attn.o_proj, idle.mlp.down_proj):
        nn.init.zeros_(layer.weight)
    valid = torch.ones_like(IDS, dtype=torch.bool)
    distances = angular_distances(model, [(IDS, valid)])
    assert distances[3] == pytest.approx(0, abs=1e-3)
    assert most_important(distances, 5) == [0, 1, 2, 4, 5]


def test_padding_does_not_change_importance() -> None:
    model, valid = tiny("llama"), torch.ones_like(IDS, dtype=torch.bool)
    padded = torch.cat([IDS, torch.zeros(2, 7, dtype=torch.long)], dim=1)
    mask = torch.cat([valid, torch.zeros(2, 7, dtype=torch.bool)], dim=1)
    plain, ragged = angular_distances(model, [(IDS, valid)]), angular_distances(model, [(padded, mask)])
    assert torch.allclose(plain, ragged, atol=1e-6)


def test_weights_rebuild_the_model_and_strange_ones_are_refused() -> None:
    model = tiny("gpt2", dtype=torch.float32)
    model.config.architectures = ["GPT2LMHeadModel"]
    twin = build(model.config, weights_of(model), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    strange = {**weights_of(model), "extra": torch.zeros(1)}
    with pytest.raises(ModelError, match="the first is 'extra'"):
        load_weights(model, strange)
    model.config.architectures = ["Path"]
    with pytest.raises(ModelError, match="architecture is 'Path'"):
        build(model.config, weights_of(model), device=torch.device("cpu"), dtype=torch.float32)
