"""Slices compute what the library's own block does with the weights of everything else set to zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.block_trace import block_calls
from raycloud.models.roles import roles_of
from raycloud.models.surgery.slicing import SlicedBlock, SliceIndex, scatter_deltas, slice_block
from tests.models.blocks import KNOWN, Known, inputs_of


def sliced(model: PreTrainedModel, path: str, index: SliceIndex) -> SlicedBlock:
    blocks = {path: model.get_submodule(path)}
    return slice_block(blocks[path], block_calls(model, blocks)[path], roles_of(model, blocks)[path], index)


def with_slice(model: PreTrainedModel, path: str, part: SlicedBlock) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.set_submodule(path, copy.deepcopy(part.module))
    return model


def kept_groups(known: Known) -> list[int]:
    return list(range(0, known.groups, 2)) if known.groups > 2 else [1]


def kept_units(known: Known) -> list[int]:
    return list(range(1, known.units, 3))


def zero_inputs(module: nn.Module, columns: list[int]) -> None:
    with torch.no_grad():
        module.weight.index_fill_(0 if isinstance(module, Conv1D) else 1, torch.tensor(columns), 0)


def head_columns(known: Known, groups: list[int]) -> list[int]:
    width = known.heads // known.groups * known.head_size
    return [column for group in groups for column in range(group * width, (group + 1) * width)]


def masked(known: Known, model: PreTrainedModel) -> PreTrainedModel:
    """Model with zeros where the weights of everything that is not kept go out of the block."""
    model = copy.deepcopy(model)
    block = model.get_submodule(known.block)
    dropped = [group for group in range(known.groups) if group not in kept_groups(known)]
    zero_inputs(block.get_submodule(known.output), head_columns(known, dropped))
    zero_inputs(block.get_submodule(known.down), [unit for unit in range(known.units) if unit not in kept_units(known)])
    return model


def loss(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    hidden = model(**inputs).last_hidden_state
    # Weighted, since the final norm makes the sum of squares a constant.
    return (hidden * torch.rand(hidden.shape, generator=torch.Generator().manual_seed(6)).double()).sum()


@pytest.mark.parametrize("name", KNOWN)
def test_a_slice_is_the_block_with_zeros_and_so_are_its_gradients(name: str) -> None:
    known = KNOWN[name]
    whole = known.model()
    part = sliced(whole, known.block, SliceIndex([kept_groups(known)], [kept_units(known)]))
    cut, zeros, inputs = with_slice(whole, known.block, part), masked(known, whole), inputs_of(whole)
    with torch.no_grad():
        wanted, found, plain = (one(**inputs).last_hidden_state for one in (zeros, cut, whole))
    assert (wanted - found).abs().max() <= 1e-12
    assert (wanted - plain).abs().max() > 1e-3
    loss(zeros, inputs).backward()
    loss(cut, inputs).backward()
    assert cut.get_submodule(f"{known.block}.{known.query}").weight.grad.abs().max() > 1e-3
    assert cut.get_submodule(f"{known.block}.{known.down}").weight.grad.abs().max() > 1e-3
    gradients = {key: one.grad for key, one in zeros.get_submodule(known.block).named_parameters()}
    for parameter_name, parameter in cut.get_submodule(known.block).named_parameters():
        wanted = gradients[parameter_name]
        if (kept := part.kept.get(parameter_name)) is not None:
            wanted = wanted.index_select(kept.dim, kept.entries)
        # Gemma's norms sum the gradients of their weights over heads in float32.
        exact = 1e-6 if name == "gemma3" and "norm" in parameter_name else 1e-12
        if parameter.grad is not None or wanted is not None:
            assert (parameter.grad - wanted).abs().max() <= exact, parameter_name
    assert cut.num_parameters() < whole.num_parameters()


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert"])
def test_kept_entries_are_the_rows_and_columns_of_the_kept_heads_and_units(name: str) -> None:
    known = KNOWN[name]
    kept = sliced(known.model(), known.block, SliceIndex([kept_groups(known)], [kept_units(known)])).kept
    columns, size = head_columns(known, kept_groups(known)), known.head_size
    groups = [row for group in kept_groups(known) for row in range(group * size, (group + 1) * size)]
    if name == "gpt2":  # queries, keys and values in one map, whose weight is transposed
        fused = [row + 32 * third for third in range(3) for row in columns]
        expected = {
            "attn.c_attn.weight": (1, fused),
            "attn.c_attn.bias": (0, fused),
            "attn.c_proj.weight": (0, columns),
        }
        expected |= {"mlp.c_fc.weight": (1, kept_units(known)), "mlp.c_fc.bias": (0, kept_units(known))}
        expected |= {"mlp.c_proj.weight": (0, kept_units(known))}
    else:
        rows = {known.query: columns, known.key: groups, known.value: groups, known.up: kept_units(known)}
        if known.gate is not None:
            rows[known.gate] = kept_units(known)
        expected = {f"{path}.weight": (0, entries) for path, entries in rows.items()}
        if name == "bert":
            expected |= {f"{path}.bias": (0, entries) for path, entries in rows.items()}
        expected |= {f"{known.output}.weight": (1, columns), f"{known.down}.weight": (1, kept_units(known))}
    assert {name: (one.dim, one.entries.tolist()) for name, one in kept.items()} == expected


def test_of_swin_the_tables_of_heads_are_sliced_too() -> None:
    swin, swin2 = KNOWN["swin"], KNOWN["swinv2"]
    kept = sliced(swin.model(), swin.block, SliceIndex([[0, 3]])).kept
    (table,) = (one for name, one in kept.items() if name.endswith("relative_position_bias_table"))
    assert (table.dim, table.entries.tolist()) == (1, [0, 3])
    kept = sliced(swin2.model(), swin2.block, SliceIndex([[0, 3]])).kept
    assert (kept["attention.self.logit_scale"].dim, kept["attention.self.logit_scale"].entries.tolist()) == (0, [0, 3])
    assert kept["attention.self.continuous_position_bias_mlp.2.weight"].dim == 0
    assert not any("continuous_position_bias_mlp.0" in name for name in kept)


def test_both_attentions_of_a_decoder_are_sliced_each_by_its_own_index() -> None:
    known = KNOWN["t5-decoder"]
    model = known.model()
    part = sliced(model, known.block, SliceIndex([[0, 1, 3], [2]]))
    cut, zeros, inputs = with_slice(model, known.block, part), copy.deepcopy(model), inputs_of(model)
    block = zeros.get_submodule(known.block)
    zero_inputs(block.get_submodule(known.output), head_columns(known, [2]))
    zero_inputs(block.get_submodule("layer.1.EncDecAttention.o"), head_columns(known, [0, 1, 3]))
    with torch.no_grad():
        wanted, found = zeros(**inputs).last_hidden_state, cut(**inputs).last_hidden_state
    assert (wanted - found).abs().max() <= 1e-12


@pytest.mark.parametrize(("name", "output"), [("bloom", "self_attention.dense"), ("mpt", "attn.out_proj")])
def test_biases_of_heads_that_the_model_hands_in_are_selected(name: str, output: str) -> None:
    """Bloom's hold texts and heads on one dimension."""
    model = tiny_model(name, "eager")
    path = "transformer.h.1" if name == "bloom" else "transformer.blocks.1"
    cut, zeros = with_slice(model, path, sliced(model, path, SliceIndex([[1, 2]]))), copy.deepcopy(model)
    zero_inputs(zeros.get_submodule(f"{path}.{output}"), [*range(8), *range(24, 32)])
    for batch in (1, 3):
        ids = torch.randint(3, 97, (batch, 9), generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert (zeros(input_ids=ids).logits - cut(input_ids=ids).logits).abs().max() <= 1e-5


def test_a_whole_slice_and_changes_that_come_back() -> None:
    known = KNOWN["qwen3"]
    model = known.model()
    part = sliced(model, known.block, SliceIndex([list(range(known.groups))], [list(range(known.units))]))
    inputs = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(with_slice(model, known.block, part)(**inputs)[0], model(**inputs)[0])

    part = sliced(model, known.block, SliceIndex([[1]], [[2, 5, 7]]))
    before = {name: one.clone() for name, one in model.get_submodule(known.block).named_parameters()}
    deltas = {name: torch.ones_like(one) for name, one in part.module.named_parameters()}
    scatter_deltas(model.get_submodule(known.block), part, deltas)
    after = dict(model.get_submodule(known.block).named_parameters())
    changed = {name: (after[name] - one).round() for name, one in before.items()}
    wanted = torch.zeros_like(changed["mlp.down_proj.weight"])
    wanted[:, [2, 5, 7]] = 1
    assert torch.equal(changed["mlp.down_proj.weight"], wanted)
    assert bool((changed["self_attn.q_norm.weight"] == 1).all())  # not sliced: changed as a whole
    assert int(changed["self_attn.q_proj.weight"].sum()) == 32 * 32


@pytest.mark.parametrize(
    ("name", "path", "index", "said"),
    [
        (
            "qwen2_moe",
            "model.layers.0",
            SliceIndex(units=[[0]]),
            "'mlp.experts.gate_up_proj' holds the matrices of several",
        ),
        ("olmo2", "model.layers.0", SliceIndex([[0]]), "cannot be sliced: they are mixed after 'self_attn.q_proj'"),
        ("bitnet", "model.layers.0", SliceIndex([[0]]), "cannot be sliced: something mixes them before it"),
        ("t5", "encoder.block.0", SliceIndex([[0, 1]]), "later blocks use a tensor"),
        ("gemma4_text", "model.layers.1", SliceIndex([[0]]), "later blocks use its keys and values"),
        ("gemma4_text", "model.layers.2", SliceIndex([[0]]), "uses the keys and values of an earlier one"),
        ("llama", "model.layers.0", SliceIndex([[2]]), r"groups is \[2\]; allowed: at least one of 0 to 1, ascending"),
        ("llama", "model.layers.0", SliceIndex([[]]), r"groups is \[\]; allowed: at least one of 0 to 1"),
        ("llama", "model.layers.0", SliceIndex(units=[[3, 1]]), r"units is \[3, 1\]; allowed: at least one of 0 to 47"),
        (
            "llama",
            "model.layers.0",
            SliceIndex([[0], [0]]),
            "groups are given for 2 parts of a LlamaDecoderLayer; it has 1",
        ),
    ],
)
def test_what_cannot_be_sliced_is_refused_in_one_line(name: str, path: str, index: SliceIndex, said: str) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        sliced(tiny_model(name), path, index)
    assert "\n" not in str(raised.value)
