"""Slices of models: nothing changes without training, and training a slice is training the masked whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.chain import block_list_of
from raycloud.models.surgery.slicing import SliceIndex
from raycloud.models.weights import weights_of
from raycloud.retrain.samples import Samples
from raycloud.retrain.slices import SlicedModel, slice_model
from raycloud.retrain.tasks import cross_entropy
from raycloud.retrain.update import BlockUpdate, changes
from raycloud.rounds.aggregators import coverage_mean
from tests.models.blocks import KNOWN
from tests.retrain.models import TASK_MODELS, task_model, task_samples

SLICED = [name for name in TASK_MODELS if name != "t5-decoder"]


def double(samples: Samples) -> Samples:
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in samples.inputs.items()}
    return Samples(inputs, samples.labels)


def index_of(name: str) -> SliceIndex:
    known = KNOWN[name]
    return SliceIndex([list(range(0, known.groups, 2))], [list(range(1, known.units, 3))])


def sliced(name: str, model: PreTrainedModel, samples: Samples) -> tuple[int, SlicedModel]:
    """Model with a slice of the block that is known, and the number of it."""
    paths = list(block_list_of(model).blocks)
    (number,) = (number for number, path in enumerate(paths) if path.endswith(KNOWN[name].block))
    return number, slice_model(model, {number: index_of(name)}, samples.inputs)


def step(model: PreTrainedModel, samples: Samples, trained: nn.Module) -> dict[str, Tensor]:
    """Take one step of plain gradient descent in a module, and return the gradients."""
    for one in model.parameters():
        one.requires_grad_(False)
    trained.requires_grad_(True)
    loss = cross_entropy(model(**samples.inputs).logits, samples.labels)
    loss.sum.backward()
    slopes = {}
    with torch.no_grad():
        for name, one in trained.named_parameters():
            if one.grad is not None:
                one.sub_(0.01 * one.grad)
                slopes[name] = one.grad
    return slopes


@pytest.mark.parametrize("name", SLICED)
def test_a_trained_slice_is_merged_as_a_step_of_the_masked_whole(name: str) -> None:
    whole = task_model(name).double()
    samples = double(task_samples(whole, 4))
    number, part = sliced(name, whole, samples)
    path = list(block_list_of(whole).blocks)[number]
    before = {key: one.clone() for key, one in weights_of(whole).items()}
    masked = copy.deepcopy(whole)
    with torch.no_grad():  # what is not kept computes zero, as the maps that lead out of it are zero
        for key in (KNOWN[name].output, KNOWN[name].down):
            weight = masked.get_parameter(f"{path}.{key}.weight")
            ((dim, kept),) = part.index[f"{path}.{key}.weight"].items()
            gone = [entry for entry in range(weight.shape[dim]) if entry not in set(kept.tolist())]
            weight.index_fill_(dim, torch.tensor(gone), 0)
    slopes = step(masked, samples, masked.get_submodule(path))
    block = part.model.get_submodule(path)
    start = {f"{path}.{key}": one.detach().clone() for key, one in block.named_parameters()}
    step(part.model, samples, block)
    deltas = changes({f"{path}.{key}": one for key, one in block.named_parameters()}, start)
    update = BlockUpdate("model", 0, 4, deltas, {key: one for key, one in part.index.items() if key in deltas})
    merged = coverage_mean([BlockUpdate.from_bytes(update.to_bytes()).contribution(before)], before)
    assert set(merged) == set(deltas)
    for key, tensor in merged.items():
        wanted = -0.01 * slopes[key.removeprefix(f"{path}.")]
        inside = torch.ones_like(tensor, dtype=torch.bool)
        for dim, entries in part.index.get(key, {}).items():
            kept = torch.zeros(tensor.shape[dim], dtype=torch.bool)
            kept[entries] = True
            inside &= kept.view([-1 if at == dim else 1 for at in range(tensor.dim())])
        assert torch.equal(tensor[~inside], before[key][~inside]), key
        assert ((tensor - before[key] - wanted)[inside]).norm() <= 1e-6 * wanted[inside].norm() + 1e-12, key


@pytest.mark.parametrize("name", SLICED)
def test_a_slice_of_everything_is_the_model_bit_for_bit(name: str) -> None:
    whole = task_model(name)
    samples, known = task_samples(whole, 4), KNOWN[name]
    everything = SliceIndex([list(range(known.groups))], [list(range(known.units))])
    paths = list(block_list_of(whole).blocks)
    (number,) = (number for number, path in enumerate(paths) if path.endswith(known.block))
    part = slice_model(whole, {number: everything}, samples.inputs)
    with torch.no_grad():
        assert torch.equal(part.model(**samples.inputs).logits, whole(**samples.inputs).logits)


@pytest.mark.parametrize("name", SLICED)
def test_a_model_without_a_block_is_one_whose_block_adds_nothing(name: str) -> None:
    whole = task_model(name)
    samples = task_samples(whole, 4)
    part = slice_model(whole, {1: None}, samples.inputs)
    path = list(block_list_of(whole).blocks)[1]
    assert part.dropped == (1,) and not list(part.model.get_submodule(path).parameters())
    handed: list[tuple[Tensor, Tensor]] = []

    def hand_on(block: nn.Module, args: tuple, kwargs: dict, output):  # type: ignore[no-untyped-def, type-arg]
        hidden = args[0] if args else kwargs["hidden_states"]
        handed.append(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = whole.get_submodule(path).register_forward_hook(hand_on, with_kwargs=True)
    with torch.no_grad():
        wanted = whole(**samples.inputs).logits
        hook.remove()
        assert handed and torch.equal(part.model(**samples.inputs).logits, wanted)
        assert not torch.equal(whole(**samples.inputs).logits, wanted)


def test_blocks_that_cannot_be_left_out_or_do_not_exist_are_refused() -> None:
    model = task_model("t5-decoder")
    inputs = task_samples(model, 4).inputs
    with pytest.raises(ModelError, match="block 1 hands on more than hidden states"):
        slice_model(model, {1: None}, inputs)
    with pytest.raises(ModelError, match="block 6 is to be sliced; allowed: 0 to 5"):
        slice_model(model, {6: None}, inputs)
