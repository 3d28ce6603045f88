"""Measurement of this device for :mod:`raycloud.split.device_profile`, in a few seconds, with small random models.

The models run through the same pipeline as in a deployment, so that what a block and a step cost beside their
arithmetic is measured and not assumed.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from raycloud.link.network import Network
from raycloud.models.devices import Device, DType
from raycloud.models.loading import pick_device, pick_dtype, quiet_transformers
from raycloud.models.weight_layout import optimise_decode_layout
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.device_profile import DeviceProfile, SplitProfile
from raycloud.split.inference.generation import PROMPT_CHUNK, local_split_model
from raycloud.split.inference.timing import UNTIMED_TOKENS, measure_split, measure_unsplit
from raycloud.split.model_sizes import sizes_of
from raycloud.split.parts import EdgePart, SplittableModel
from raycloud.split.plan import PlanSet, SplitPlan

REPEATS = 3
"""Number of measurements of everything."""
_TOKENS = 24
"""Timed tokens of each measurement, of which the median counts."""
_PROMPTS = 5
_FEW, _MANY = 2, 12
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_VOCABULARY = 64


def measure_device(device: Device = "auto", dtype: DType = "auto", repeats: int = REPEATS) -> DeviceProfile:
    """Profile of this device with the threads that torch uses now.

    Args:
        device: device to measure.
        dtype: type of weights.
        repeats: number of measurements of everything, of which the fastest count: other programs only slow them down.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    narrow, wide = [_narrow(blocks, place, kind) for blocks in (_FEW, _MANY)], _wide(place, kind)
    rounds = [(*map(_token_ms, (*narrow, wide)), _prompt_ms(_whole(wide))) for _ in range(repeats)]
    few, many, wide_token, wide_prompt = map(min, zip(*rounds, strict=True))
    block_ms = max(0.0, many - few) / (_MANY - _FEW)
    [block, *_] = sizes_of(wide.model.config).blocks
    count, size = wide.blocks, kind.itemsize
    calls_ms = few + (count - _FEW) * block_ms
    reading_ms, computing_ms = (max(1e-6, taken - calls_ms) for taken in (wide_token, wide_prompt))
    return DeviceProfile(
        memory_gb=_rounded(memory_bytes(place) / 1e9),
        memory_gb_s=_rounded(count * block.dense * size / reading_ms / 1e6),
        gflop_s=_rounded(count * block.flops(PROMPT_CHUNK, 0) / computing_ms / 1e6),
        block_us=_rounded(1e3 * block_ms),
        step_us=_rounded(1e3 * max(0.0, few - _FEW * block_ms)),
        dtype={torch.float32: "float32", torch.bfloat16: "bfloat16"}.get(kind, "float16"),
    )


def measure_link_step_us(device: Device = "auto", codec: str = "bfloat16", repeats: int = REPEATS) -> float:
    """Microseconds that codec, frames and sessions add to a step, with both ends on this device and no network."""
    place = pick_device(device)
    model = _narrow(_FEW, place, pick_dtype("auto", place))
    plans = PlanSet.of(SplitPlan(1, _FEW))
    edge, cloud = model.edge(plans), model.cloud(plans)
    ids = [0] * (UNTIMED_TOKENS + _TOKENS)
    codecs = CutCodecs(edge.config.hidden_size)
    split = min(measure_split(edge, cloud, codecs, codec, Network(), ids).ms_per_token for _ in range(repeats))
    whole = min(_token_ms(model) for _ in range(repeats))
    return _rounded(1e3 * max(0.0, split - whole))


def measured_profile(profile: SplitProfile, *, keep_limit: bool) -> SplitProfile:
    """Profile whose edge is this device, as measured.

    Args:
        profile: profile of the rest.
        keep_limit: keep the profile's limit of the edge's memory instead of this device's memory.
    """
    edge = measure_device()
    if keep_limit:
        edge = edge.model_copy(update={"memory_gb": profile.edge.memory_gb})
    network = profile.network.model_copy(update={"step_us": measure_link_step_us()})
    return profile.model_copy(update={"edge": edge, "network": network})


def memory_bytes(device: torch.device) -> int:
    """Memory of a device in bytes; of a CPU what this process may use, which a container may limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(found, int(limit)) if limit.isdecimal() else found


def _narrow(blocks: int, device: torch.device, dtype: torch.dtype) -> SplittableModel:
    """Model whose blocks cost nothing but their calls."""
    return _random_model(LlamaConfig(**_sizes(64, 128, blocks, heads=4)), device, dtype)


def _wide(device: torch.device, dtype: torch.dtype) -> SplittableModel:
    """Model of blocks that are larger than caches: 4 of 51 million bytes in float32."""
    return _random_model(LlamaConfig(**_sizes(1024, 2816, 4, heads=16)), device, dtype)


def _sizes(width: int, inner: int, blocks: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 1024,
    }


def _random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> SplittableModel:
    state = torch.get_rng_state()
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    torch.set_rng_state(state)
    model = model.to(device).eval()  # type: ignore[arg-type]
    optimise_decode_layout([model])
    return SplittableModel(model, "", "")


def _whole(model: SplittableModel) -> EdgePart:
    return model.edge(PlanSet.of(SplitPlan(model.blocks, model.blocks)))


def _token_ms(model: SplittableModel) -> float:
    return measure_unsplit(_whole(model), [0] * (UNTIMED_TOKENS + _TOKENS))


def _prompt_ms(edge: EdgePart) -> float:
    """Median milliseconds of a chunk of a prompt."""
    ids = torch.zeros(1, PROMPT_CHUNK, dtype=torch.long, device=next(edge.last.parameters()).device)
    taken = []
    for _ in range(1 + _PROMPTS):
        pipeline = local_split_model(edge).open()
        start = time.perf_counter()
        int(pipeline.advance(ids)[0, -1].argmax())
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


def _rounded(value: float) -> float:
    """Value to three digits, as a measurement's noise allows no more."""
    return float(f"{value:.3g}")
