"""Demands of a job on a device that takes part in it, and the device's allowance."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from raycloud.distill.recipe import DistillEdgeRecipe, DistillRecipe
from raycloud.distill.signals.layout import layout, max_payload_bytes
from raycloud.errors import LinkSetupError, RecipeError
from raycloud.link.codecs.floats import CODECS
from raycloud.retrain.cloud import MOST_STEPS
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.rounds.service.messages import RoundGrant
from raycloud.split.finetune.recipe import SplitTuneRecipe, UplinkRecipe

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TRAINED = 16
"""Bytes of a trained number in float32: itself, its gradient and Adam's two moments."""
_ID = 4
_STEP_BYTES = 2**16
"""Most bytes of the headers and lengths of a micro-batch's messages, and of heartbeats meanwhile."""


def size_of(given: str) -> int:
    """Number of bytes of a size such as ``500MB`` or ``2GiB``.

    Raises:
        RecipeError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", given)
    if match is None or match[2].upper() not in _UNITS:
        raise RecipeError(f"'{given}' is no size; allowed: a number with one of B, KB, MB, GB, KiB, MiB, GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Allowance:
    """Allowance of a device."""

    send_tokens: bool = False
    """Token ids of its texts may leave for the teacher."""
    send_hidden: bool = False
    """Hidden states of its texts may leave for the cloud's blocks."""
    max_bytes: int | None = None
    """Largest number of bytes that may cross the link in a round, both directions together."""
    max_memory: int | None = None
    """Largest estimate of the memory in bytes that training takes."""


@dataclass(frozen=True)
class JobDemands:
    """Demands of a job on a device. Numbers of bytes are the most that can be, for texts of the longest length."""

    job: str
    model: str
    """Model that the device trains, or its part of it: a student, or the edge's blocks."""
    trained: str
    """``weights`` or ``adapters``."""
    rounds: int
    steps: int
    leaves: str
    """Data that leaves the device besides trained weights and losses; empty for none."""
    tokens_leave: bool
    """Token ids of the device's texts go to the teacher."""
    hidden_leave: bool
    """Hidden states of the device's texts go to the cloud."""
    bytes_up: int
    """Most bytes of a round to the cloud."""
    bytes_down: int
    """Most bytes of a round from the cloud."""
    once_bytes: int
    """Bytes that come down before the first round."""
    memory_bytes: int
    """Estimate of the peak memory of training."""

    @property
    def round_bytes(self) -> int:
        """Most bytes of a round, both directions together."""
        return self.bytes_up + self.bytes_down

    def check(self, allowed: Allowance, notify: Callable[[str], None]) -> None:
        """Tell what is asked, one line each; then refuse if something is not allowed.

        Raises:
            RecipeError: something is not allowed; the message says what and how to allow it.
        """
        up, down = _mb(self.bytes_up), _mb(self.bytes_down)
        notify(f"job '{self.job}' trains {self.trained} of {self.model}, {self.rounds} rounds of {self.steps} steps")
        notify(f"leaves this device: {self.leaves and self.leaves + '; '}trained {self.trained} and losses")
        notify(f"bytes per round, at most: {up} up, {down} down; once: {_mb(self.once_bytes)} down")
        notify(f"memory, estimated: {_mb(self.memory_bytes)}")
        refused = []
        if self.tokens_leave and not allowed.send_tokens:
            refused.append("token ids of the data would leave this device; allow it by --send-tokens")
        if self.hidden_leave and not allowed.send_hidden:
            refused.append("hidden states of the data would leave this device; allow it by --send-hidden")
        if allowed.max_bytes is not None and self.round_bytes > allowed.max_bytes:
            refused.append(f"a round takes up to {_mb(self.round_bytes)}; --max-bytes allows {_mb(allowed.max_bytes)}")
        if allowed.max_memory is not None and self.memory_bytes > allowed.max_memory:
            refused.append(
                f"training takes about {_mb(self.memory_bytes)}; --max-memory allows {_mb(allowed.max_memory)}"
            )
        if refused:
            raise RecipeError(f"job '{self.job}' asks for more than is allowed: " + "; ".join(refused))


def distill_demands(
    job: str, granted: RoundGrant, recipe: DistillRecipe, edge: DistillEdgeRecipe, config: PretrainedConfig
) -> JobDemands:
    """Derive the demands of a distillation from what the cloud says.

    Args:
        job: name of the job.
        granted: grant of the cloud.
        recipe: recipe of the job.
        edge: the device's edge.
        config: configuration of the student.

    Raises:
        LinkSetupError: the cloud does not say what it must.
    """
    try:
        shape = int(granted.facts["vocabulary_size"]), int(granted.facts["hidden_size"])
    except (KeyError, ValueError):
        raise LinkSetupError(f"the cloud does not describe the teacher of job '{job}'") from None
    cohort, training = recipe.cohort_of(edge), recipe.training
    objective, signal = cohort.objective, recipe.signal
    batch_tokens = training.batch_size * recipe.data.max_length
    batches = recipe.rounds.steps * training.gradient_accumulation_steps
    down = up = tables = 0
    if objective.kd_weight:
        down = batches * max_payload_bytes(layout(signal, len(recipe.temperatures), batch_tokens, *shape))
        up = batches * batch_tokens * _ID
        if signal.kind == "hidden":
            width = 2 if signal.codec == "int8" else CODECS[signal.codec].bytes_per_row(1)
            tables = shape[0] * shape[1] * (width + (2 if objective.needs.teacher_embedding else 0))
    frozen = granted.blobs["frozen"].nbytes if "frozen" in granted.blobs else 0
    blocks = config.get_text_config().num_hidden_layers
    return JobDemands(
        job=job,
        model=f"{config.model_type} with {blocks} blocks",
        trained="weights" if cohort.student.lora is None else "adapters",
        rounds=recipe.rounds.count,
        steps=recipe.rounds.steps,
        leaves=f"token ids of your data, to the teacher, for {signal.kind} signals" if objective.kd_weight else "",
        tokens_leave=bool(objective.kd_weight),
        hidden_leave=False,
        bytes_up=granted.weights_bytes + up,
        bytes_down=granted.weights_bytes + down,
        once_bytes=_file_bytes(granted) + tables,
        memory_bytes=(
            granted.weights_bytes // 4 * _TRAINED
            + frozen
            + 2 * tables
            + _activation_bytes(config, blocks, training.batch_size, recipe.data.max_length)
        ),
    )


def split_tune_demands(job: str, granted: RoundGrant, recipe: SplitTuneRecipe, config: PretrainedConfig) -> JobDemands:
    """Derive the demands of a split fine-tuning from what the cloud says.

    Args:
        job: name of the job.
        granted: grant of the cloud; its ``weights_bytes`` are those of the edge's parts of the model.
        recipe: recipe of the job.
        config: configuration of the whole model.
    """
    text, training = config.get_text_config(), recipe.training
    end = text.num_hidden_layers if recipe.end_block is None else recipe.end_block
    blocks = recipe.start_block + text.num_hidden_layers - end
    tokens = training.batch_size * recipe.data.max_length
    batches = recipe.rounds.steps * training.gradient_accumulation_steps
    # A hidden state and its gradient cross each cut in opposite directions; both cuts are counted as whole rows.
    sent = batches * sum(tokens * _most_row_bytes(cut, text.hidden_size) for cut in (recipe.uplink, recipe.downlink))
    shared = granted.weights_bytes if recipe.rounds.parts == "averaged" else 0
    return JobDemands(
        job=job,
        model=f"{blocks} of {text.num_hidden_layers} blocks of {config.model_type}, with its ends",
        trained="weights",
        rounds=recipe.rounds.count,
        steps=recipe.rounds.steps,
        leaves="hidden states of your data and their gradients, to the cloud's blocks",
        tokens_leave=False,
        hidden_leave=True,
        bytes_up=shared + sent + batches * _STEP_BYTES,
        bytes_down=shared + sent + batches * _STEP_BYTES,
        once_bytes=_file_bytes(granted),
        memory_bytes=granted.weights_bytes // 4 * _TRAINED
        + _activation_bytes(config, blocks, training.batch_size, recipe.data.max_length),
    )


def _most_row_bytes(cut: UplinkRecipe, width: int) -> int:
    """Most bytes of a token's hidden state at a cut: float32 of all numbers that are sent, with their scales."""
    numbers = width if cut.kind == "plain" else cut.rank + cut.num_outliers
    return 4 * numbers + 8


def retrain_demands(job: str, granted: RoundGrant, recipe: RetrainRecipe, config: PretrainedConfig) -> JobDemands:
    """Derive the demands of a block retraining from what the cloud says.

    Args:
        job: name of the job.
        granted: grant of the cloud.
        recipe: recipe of the job, with the device's edge alone.
        config: configuration of the model.
    """
    blocks = config.get_text_config().num_hidden_layers if hasattr(config, "num_hidden_layers") else 0
    means = recipe.statistics == "means"
    told = "means of hidden states behind each block" if means else "distances of hidden states from the source"
    length = recipe.data.max_length
    activations = (
        0
        if not hasattr(config, "vocab_size")
        else _activation_bytes(config, blocks, recipe.training.batch_size, length)
    )
    return JobDemands(
        job=job,
        model=f"{config.model_type} with {blocks} blocks",
        trained="blocks",
        rounds=len(recipe.edges[0].windows),
        steps=MOST_STEPS,
        leaves=f"{told}, and norms of gradients, of windows with {recipe.samples} samples",
        tokens_leave=False,
        hidden_leave=means,
        bytes_up=granted.weights_bytes,
        bytes_down=2 * granted.weights_bytes,
        once_bytes=_file_bytes(granted),
        memory_bytes=granted.weights_bytes // 4 * _TRAINED + activations,
    )


def _file_bytes(granted: RoundGrant) -> int:
    return sum(blob.nbytes for blob in granted.blobs.values())


def _activation_bytes(config: PretrainedConfig, blocks: int, batch: int, length: int) -> int:
    """Estimate of the activations of a step in float32: 34 numbers of half precision per hidden value and block, five
    per attention score (Korthikanti et al. 2022, arXiv 2205.05198), and the logits with their gradient and softmax."""
    text = config.get_text_config()
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", 1)
    block = 2 * batch * length * (34 * hidden + 5 * heads * length)
    return int(blocks * block + 3 * 4 * batch * length * text.vocab_size)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
