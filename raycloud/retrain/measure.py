"""Measured costs of retraining the parts of a model: FLOPs, bytes kept for a backward, bytes on the link.

Every block is run alone on the input that its model gives it, so the costs hold for any model and task, and a sum of
them is the cost of a step.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.block_trace import BlockCall, block_calls, tensors_in, without_cache
from raycloud.models.frozen_prefix import FrozenPrefix
from raycloud.retrain.cost import ModelCost, WidthCost
from raycloud.retrain.meter import MeteredCost, measured, training_state_bytes
from raycloud.retrain.parts import RetrainParts, trainable_only
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf


def model_cost(
    model: PreTrainedModel, parts: RetrainParts, samples: Samples, loss: LossOf, *, delta_bytes: float = 4.0
) -> ModelCost:
    """Measure the costs of a model.

    Args:
        model: the edge's model.
        parts: its parts.
        samples: two samples or more, of the size that it is trained on; the costs are those of their mean.
        loss: loss of logits and labels.
        delta_bytes: bytes on the link for each number of a change.
    """
    count = len(samples)
    calls = block_calls(model, parts.blocks, samples.inputs)
    gaps = _gaps(model, parts, samples)
    blocks = [
        _block(block, calls[path], gap, count, delta_bytes)
        for (path, block), gap in zip(parts.blocks.items(), gaps.behind, strict=True)
    ]
    last = FrozenPrefix(model, len(blocks))
    boundary, head = last.record(samples.inputs), list(parts.head.values())
    with torch.no_grad(), measured(model) as forward:
        last.run(boundary, samples.inputs)
    for tensor in boundary.tensors:  # trained blocks below need gradients
        if tensor.is_floating_point():
            tensor.requires_grad_()
    with trainable_only(model, head), measured(model, tuple(samples.inputs.values())) as whole:
        value = loss(last.run(boundary, samples.inputs).logits, samples.labels)
        (value.sum / max(value.count, 1)).backward()
    model.zero_grad(set_to_none=True)
    # Everything between the blocks runs in every step, on whatever it is given.
    between = gaps.stem + sum(gap.flops for gap in gaps.behind[:-1]) / count
    numbers = sum(one.numel() for one in head)
    inside = {id(one) for block in parts.blocks.values() for one in block.parameters()}
    around = sum(one.nbytes for one in model.parameters() if id(one) not in inside)
    held = [_held(model, index, samples) for index in range(len(blocks) + 1)]
    return ModelCost(
        blocks=tuple((one,) for one in blocks),
        stem_forward=between,
        head_forward=max(0.0, forward.flops / count - between),
        head_gradient=(whole.flops - forward.flops) / count,
        head_activations=whole.kept / count,
        fixed_memory=around + training_state_bytes(numbers) + max(shared for _, shared in held),
        fixed_bytes=delta_bytes * numbers,
        boundary=tuple(each for each, _ in held),
    )


@dataclass(frozen=True)
class _Gaps:
    """Costs of what runs outside of the blocks."""

    stem: float
    """Operations for each sample before block 0."""
    behind: list[MeteredCost]
    """Forward behind each block and before the next one, such as the merging of patches between stages; behind the last
    block nothing is counted."""


def _gaps(model: PreTrainedModel, parts: RetrainParts, samples: Samples) -> _Gaps:
    """Measure what runs between the blocks, in one forward with gradients of everything but parameters of gaps."""
    entries, exits = list[MeteredCost](), list[MeteredCost]()
    inside = [one for block in parts.blocks.values() for one in block.parameters()]
    with ExitStack() as stack:
        stack.enter_context(trainable_only(model, inside))
        cost = stack.enter_context(measured(model, tuple(samples.inputs.values())))

        def reader(places: list[MeteredCost]) -> Any:
            return lambda *_: places.append(cost.now())

        for block in parts.blocks.values():
            stack.callback(block.register_forward_pre_hook(reader(entries)).remove)
            stack.callback(block.register_forward_hook(reader(exits)).remove)
        model(**samples.inputs, **without_cache(model))
    between = [
        MeteredCost(entry.flops - leave.flops, entry.kept - leave.kept)
        for leave, entry in zip(exits, entries[1:], strict=False)
    ]
    return _Gaps(entries[0].flops / len(samples), [*between, MeteredCost()])


def _held(model: PreTrainedModel, start: int, samples: Samples) -> tuple[float, float]:
    """Bytes of the kept outputs of a prefix: for each sample, and those that all samples share."""
    half = len(samples) // 2
    prefix = FrozenPrefix(model, start)
    some, more = (prefix.record(one.inputs).nbytes for one in (samples.select(slice(0, half)), samples))
    each = (more - some) / (len(samples) - half)
    return each, more - each * len(samples)


def _block(block: nn.Module, call: BlockCall, behind: MeteredCost, count: int, delta_bytes: float) -> WidthCost:
    forward = _run(block, call, trained=False, passed=False)
    frozen = _run(block, call, trained=False, passed=True)
    trained = _run(block, call, trained=True, passed=True)
    lowest = _run(block, call, trained=True, passed=False)
    numbers = sum(one.numel() for one in block.parameters())
    return WidthCost(
        width=1.0,
        forward=forward.flops / count,
        # The gap behind a block has frozen weights, so its backward is as large as its forward.
        input_gradient=(frozen.flops - forward.flops + behind.flops) / count,
        weight_gradient=(trained.flops - frozen.flops) / count,
        weights=sum(one.nbytes for one in block.parameters()),
        trained_state=training_state_bytes(numbers),
        frozen_activations=(frozen.kept + behind.kept) / count,
        trained_activations=(trained.kept + behind.kept) / count,
        down=0,
        up=delta_bytes * numbers,
        lowest_saving=(trained.flops - lowest.flops) / count,
    )


def _run(block: nn.Module, call: BlockCall, *, trained: bool, passed: bool) -> MeteredCost:
    """Measure a block's forward, and a backward to its weights or its input."""
    arguments: dict[str, Any] = dict(call.arguments)
    hidden: Tensor = arguments[call.hidden].clone()
    for name, value in arguments.items():
        # The hidden states of an encoder may come from trained blocks, too. Each block of a decoder counts them.
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[2:] == hidden.shape[2:]:
            arguments[name] = value.clone().requires_grad_(passed)
    apart = tensors_in([value for name, value in arguments.items() if value is call.arguments[name]])
    parameters = list(block.parameters()) if trained else ()
    with (
        trainable_only(block, parameters),
        torch.set_grad_enabled(trained or passed),
        measured(block, tuple(apart)) as cost,
    ):
        output = block(**arguments)
        hidden = output[0] if isinstance(output, tuple) else output
        if trained or passed:
            hidden.backward(torch.ones_like(hidden))
    block.zero_grad(set_to_none=True)
    return cost
