"""What a teacher's fine-tuning will take of every worker's memory, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from raycloud.cluster.teacher.engine import LOGITS_CHUNK, deepspeed
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.models.anatomy import blocks_of
from raycloud.training.lora import attach

_KEPT_PER_TOKEN = 34
"""Bytes that a block in half precision keeps of a token and hidden unit for its backward pass, without the scores of
attention, which sdpa does not keep (Korthikanti et al. 2022, arXiv 2205.05198, equation 2)."""
_MASTER, _AVERAGES = 4, 8
"""Bytes of a trained parameter's float32 copy, and of Adam's two averages."""


@dataclass(frozen=True)
class Parameters:
    """How many a model has."""

    total: int
    trained: int
    largest_block: int
    """Of the blocks, the embedding and the head, whichever is largest."""

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: TuneTeacherRecipe) -> Parameters:
        """Counted on a model without storage."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            if recipe.lora is not None:
                model = attach(model, recipe.lora, recipe.seed)
        parts: list[nn.Module] = [*blocks_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
        return cls(
            sum(one.numel() for one in model.parameters()),
            sum(one.numel() for one in model.parameters() if one.requires_grad),
            max(sum(one.numel() for one in part.parameters()) for part in parts),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker by what they hold, on its device and in the host's memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def rows(self) -> Iterator[tuple[str, int, int]]:
        """What, on the device, on the host; the sums last."""
        for what in self.device:
            yield what, self.device[what], self.host.get(what, 0)
        yield "in all", sum(self.device.values()), sum(self.host.values())


def estimate(config: PretrainedConfig, parameters: Parameters, recipe: TuneTeacherRecipe, kind: torch.dtype) -> Memory:
    """The memory of one worker at its largest.

    Mixed precision takes 2 bytes of weights, 4 of gradients and 12 of float32 weights and averages a trained parameter
    (ZeRO, section 3.1, with gradients summed in float32); what stage and offloading spread or move is divided or moved.

    Args:
        config: of the model.
        parameters: how many it has.
        recipe: how it is trained.
        kind: the weights' type.
    """
    zero, workers = recipe.deepspeed, recipe.workers.count
    width = torch.finfo(kind).bits // 8
    text = config.get_text_config()
    tokens = recipe.training.batch_size // workers * recipe.data.max_length
    block = tokens * text.hidden_size * _KEPT_PER_TOKEN * width // 2
    if recipe.training.gradient_checkpointing:
        activations = block + text.num_hidden_layers * tokens * text.hidden_size * width
    else:
        activations = block * text.num_hidden_layers
    found = {
        "weights": width * parameters.total // (workers if zero.stage == 3 else 1),
        "gathered weights": 2 * width * parameters.largest_block if zero.stage == 3 else 0,
        "gradients": 4 * parameters.trained // (workers if zero.stage >= 2 else 1),
        "optimiser": ((_MASTER if zero.stage else 0) + _AVERAGES)
        * parameters.trained
        // (workers if zero.stage >= 1 else 1),
        "activations": activations,
        # Logits in float32, their gradient, and the softmax between them.
        "logits": 3 * 4 * min(tokens, LOGITS_CHUNK) * text.vocab_size,
    }
    moved = [
        *(["optimiser", "gradients"] if zero.offload_optimizer else []),
        *(["weights"] if zero.offload_parameters else []),
    ]
    host = {what: found[what] for what in moved}
    return Memory({what: 0 if what in host else size for what, size in found.items()}, host)


def library_estimate(parameters: Parameters, recipe: TuneTeacherRecipe) -> tuple[int, int] | None:
    """DeepSpeed's own estimate of weights, gradients and optimiser: bytes of one worker, and of its node's host.

    It knows stages 2 and 3 of a model that is trained as a whole, in half precision; None for anything else.
    """
    zero = recipe.deepspeed
    if parameters.trained < parameters.total or zero.stage < 2:
        return None
    deepspeed()
    devices: dict[str, Any] = {"num_gpus_per_node": recipe.workers.count, "num_nodes": 1}
    if zero.stage == 2:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as second

        host, device = second(parameters.total, cpu_offload=zero.offload_optimizer, **devices)
    else:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as third

        host, device, _ = third(
            parameters.total,
            parameters.largest_block,
            cpu_offload=zero.offload_optimizer,
            cpu_offload_params=zero.offload_parameters,
            zero_init=True,
            **devices,
        )
    return int(device), int(host)
