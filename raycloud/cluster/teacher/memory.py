"""Estimate of the memory of each worker of a teacher's fine-tuning, made before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from raycloud.cluster.teacher.engine import LOGITS_CHUNK, deepspeed
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.models.structure import blocks_of
from raycloud.training.lora import add_adapters

_KEPT_PER_TOKEN = 34
"""Bytes per token and hidden unit that a block in half precision keeps for its backward pass, without attention scores,
which sdpa does not keep (Korthikanti et al. 2022, arXiv 2205.05198, equation 2)."""
_MASTER, _AVERAGES = 4, 8
"""Bytes per trained parameter of its float32 copy, and of Adam's two averages."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model."""

    total: int
    trained: int
    largest_block: int
    """Parameters of the largest of the blocks, the embedding and the head."""

    @classmethod
    def of(cls, config: PretrainedConfig, recipe: TuneTeacherRecipe) -> ParameterCounts:
        """Count the parameters on a model without storage."""
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            if recipe.lora is not None:
                model = add_adapters(model, recipe.lora, recipe.seed)
        parts: list[nn.Module] = [*blocks_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
        return cls(
            sum(one.numel() for one in model.parameters()),
            sum(one.numel() for one in model.parameters() if one.requires_grad),
            max(sum(one.numel() for one in part.parameters()) for part in parts),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker by purpose, on its device and in the host's memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def rows(self) -> Iterator[tuple[str, int, int]]:
        """Yield (purpose, bytes on the device, bytes on the host); the sums come last."""
        for what in self.device:
            yield what, self.device[what], self.host.get(what, 0)
        yield "in all", sum(self.device.values()), sum(self.host.values())


def estimate(
    config: PretrainedConfig, parameters: ParameterCounts, recipe: TuneTeacherRecipe, kind: torch.dtype
) -> MemoryEstimate:
    """Estimate the peak memory of one worker.

    Mixed precision takes, per trained parameter, 2 bytes for the weight, 4 for the gradient and 12 for the float32
    weight and averages (ZeRO, section 3.1, with gradients summed in float32). State that the stage spreads is divided
    by the number of workers; state that is offloaded counts for the host.

    Args:
        config: config of the model.
        parameters: its numbers of parameters.
        recipe: recipe of the fine-tuning.
        kind: dtype of the weights.
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
        # Logits in float32, their gradient, and the softmax as an intermediate.
        "logits": 3 * 4 * min(tokens, LOGITS_CHUNK) * text.vocab_size,
    }
    moved = [
        *(["optimiser", "gradients"] if zero.offload_optimizer else []),
        *(["weights"] if zero.offload_parameters else []),
    ]
    host = {what: found[what] for what in moved}
    return MemoryEstimate({what: 0 if what in host else size for what, size in found.items()}, host)


def library_estimate(parameters: ParameterCounts, recipe: TuneTeacherRecipe) -> tuple[int, int] | None:
    """Return DeepSpeed's own estimate of weights, gradients and optimizer: bytes of one worker, and of its node's host.

    It covers stages 2 and 3 of full fine-tuning in half precision; None for anything else.
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
