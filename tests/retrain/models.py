"""Small models with task heads, of the families that block retraining promises, and samples for them."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.retrain.samples import Samples
from tests.models.blocks import KNOWN

TASK_MODELS = {
    **dict.fromkeys(["llama", "qwen3", "gemma3", "gpt2"], AutoModelForCausalLM),
    **dict.fromkeys(["bert", "roberta"], AutoModelForSequenceClassification),
    **dict.fromkeys(["vit", "swin", "swinv2"], AutoModelForImageClassification),
    "opt": AutoModelForCausalLM,
    "t5-decoder": AutoModelForSeq2SeqLM,
}
"""Class of the model with a task head, by name of a known family."""


def task_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Random model of a family with its task head, in evaluation mode; one classifies into 4 classes."""
    torch.manual_seed(seed)
    known = KNOWN[name]
    config = CONFIG_MAPPING[known.kind](**known.options)
    if TASK_MODELS[name] not in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        config.num_labels = 4
    attention = "eager" if known.kind == "swinv2" else "sdpa"
    model: PreTrainedModel = TASK_MODELS[name].from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1)
    return model.eval()


def task_samples(model: PreTrainedModel, count: int = 12, seed: int = 3) -> Samples:
    """Random samples for a model."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        inputs = {"pixel_values": torch.randn(count, 3, size, size, generator=generator)}
        return Samples(inputs, torch.randint(0, 4, (count,), generator=generator))
    ids = torch.randint(3, 97, (count, 13), generator=generator)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    classifies = "SequenceClassification" in type(model).__name__
    labels = torch.randint(0, 4, (count,), generator=generator) if classifies else ids.roll(-1, 1)
    return Samples(inputs, labels)
