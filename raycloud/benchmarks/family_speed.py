"""Time per token of the two paths of a segment: the library's own forward in parts, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.benchmarks.measure import PAIRS, SMOLLM2, interleaved, median_ratio
from raycloud.models.attention import SDPA
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.structure import ModelStructure
from raycloud.models.verdict import structure_of
from raycloud.models.weight_layout import optimise_decode_layout

_CUTS = (0, 4, 26, 30)
_PROMPT = 32


def general_vs_fast(*, new: int, pairs: int = PAIRS) -> float:
    """Ratio of the times to generate ``new`` tokens with SmolLM2 in three parts: general path over fast path."""
    model = load(SMOLLM2, device="cpu", dtype="float32").model
    fast = structure_of(model.config)
    paths = {
        "general": _parts(model, fast.model_copy(update={"layout": None})),
        "fast": _parts(model, fast),
    }
    optimise_decode_layout([model])
    ids = torch.arange(100, 100 + _PROMPT)[None]

    def run(name: str) -> list[int]:
        model.set_attn_implementation(SDPA if name == "fast" else "sdpa")
        return _generate(paths[name], ids, new)

    if run("general") != run("fast"):
        raise RuntimeError("the two paths write different texts")
    times = interleaved({name: lambda name=name: run(name) for name in paths}, pairs, warm=True)  # type: ignore[misc]
    return median_ratio(times["general"], times["fast"])


def _parts(model: PreTrainedModel, structure: ModelStructure) -> list[Segment]:
    last = _CUTS[-1]
    return [Segment(model, lo, hi, embed=lo == 0, head=hi == last, structure=structure) for lo, hi in pairwise(_CUTS)]


@torch.inference_mode()
def _generate(parts: Sequence[Segment], ids: Tensor, new: int) -> list[int]:
    caches, made, x = [part.new_cache() for part in parts], list[int](), ids
    for _ in range(new):
        for part, cache in zip(parts, caches, strict=True):
            x = part.hidden(x, cache=cache)
        x = parts[-1].logits(x[:, -1:]).argmax(-1)
        made.append(int(x))
    return made
