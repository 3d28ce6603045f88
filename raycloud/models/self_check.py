"""Check that the segments of a model make up the whole: prefill, cached chunks and steps, and padded batches.

A model is accepted because its segments were measured to give the whole model's numbers, not because its family is
known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.chain import find_chain
from raycloud.models.stock_segment import StockCache, StockSegment, base_model_of
from raycloud.models.trace import TracedStructure, arguments_of, final_of, trace

TOKENS = 19
_CHUNKS = (7, 1, 1, 5, 1, 4)
"""Tokens of the calls that process the text with a cache; they add up to ``TOKENS``."""
_PADDING = 5

Cut = tuple[int, int]
"""Blocks at which the second and the third segment begin."""


@dataclass(frozen=True)
class LogitsRule:
    """Relation of a model's logits to its head's output for final hidden states."""

    kind: Literal["none", "head", "factor", "cap", "other"]
    """``none``: no head. ``head``: as they are. ``factor``: times ``value``. ``cap``: ``value`` tanh(x / ``value``)."""
    value: float = 1.0


@dataclass(frozen=True)
class CheckedStructure:
    """Structure of a model whose segments make up the whole, with the largest differences that were measured.

    Differences are relative to the whole's largest absolute output.
    """

    structure: TracedStructure
    logits: LogitsRule
    prefill: float
    decode: float | None
    """Difference with a cache; None if the model keeps no cache."""
    padded: float
    chunks: bool
    """True if several tokens may follow a cached text in one call."""


@torch.no_grad()
def check_structure(
    model: PreTrainedModel, *, cuts: Iterable[Cut] | None = None, tolerance: float = 1e-5
) -> CheckedStructure:
    """Find the structure of a model, and compare its segments with the whole for a random text.

    Args:
        model: model in evaluation mode; twins of real configurations are small and have random weights.
        cuts: pairs of cuts; None for all.
        tolerance: largest relative difference.

    Raises:
        ModelError: the model cannot be cut; one line that names the reason.
    """
    kind, chain = model.config.model_type, find_chain(model)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary - 1, (2, TOKENS), generator=generator).to(model.device)
    structure, whole = trace(model, chain, ids), final_of(model(input_ids=ids))
    total, scale = len(chain.blocks), float(whole.abs().max())
    pairs = list(itertools.combinations_with_replacement(range(total + 1), 2)) if cuts is None else list(cuts)
    _check_crossing(model, structure, ids)

    def refused(measured: float, how: str) -> ModelError:
        return ModelError(
            f"a '{kind}' model in segments differs from the whole by {measured:.1e} ({how}); run it whole"
        )

    def difference(found: Tensor, expected: Tensor) -> float:
        return float((found - expected).abs().max()) / scale

    prefill = max(difference(run_segments(cut_model(model, structure, pair), ids), whole) for pair in pairs)
    if not prefill <= tolerance:
        raise refused(prefill, "prefill")
    decode, chunks = None, True
    if StockSegment(model, structure, 0, 0).keeps_cache:

        def stepped(sizes: Sequence[int]) -> float:
            return max(difference(_with_cache(model, structure, pair, ids, sizes), whole) for pair in pairs)

        decode = stepped(_CHUNKS)
        if not decode <= tolerance:  # some state-space models take one token at a time after a cached text
            chunks, decode = False, stepped([9, *[1] * (TOKENS - 9)])
        if not decode <= tolerance:
            raise refused(decode, "decoding in steps")
    padded = _padded_difference(model, structure, ids, scale)
    if not padded <= tolerance:
        raise refused(padded, "padded batch")
    return CheckedStructure(structure, _logits_rule(model, structure, ids, whole), prefill, decode, padded, chunks)


def cut_model(model: PreTrainedModel, structure: TracedStructure, pair: Cut) -> list[StockSegment]:
    """Cut a model into three segments."""
    total, (start, end) = len(structure.chain.blocks), pair
    return [
        StockSegment(model, structure, 0, start, embed=True, head=False),
        StockSegment(model, structure, start, end, embed=False, head=False),
        StockSegment(model, structure, end, total, embed=False, head=True),
    ]


def run_segments(
    segments: Sequence[StockSegment],
    ids: Tensor,
    caches: Sequence[StockCache] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Output of the last segment for token ids (B, T) that enter the first one."""
    x = ids
    for index, segment in enumerate(segments):
        x = segment(x, valid=valid, cache=None if caches is None else caches[index])
    return x


def new_caches(model: PreTrainedModel, segments: Sequence[StockSegment]) -> list[StockCache]:
    """Empty cache for each segment."""
    return [StockCache(model.config.get_text_config()) for _ in segments]


def _with_cache(
    model: PreTrainedModel, structure: TracedStructure, pair: Cut, ids: Tensor, sizes: Sequence[int]
) -> Tensor:
    segments = cut_model(model, structure, pair)
    caches = new_caches(model, segments)
    return torch.cat([run_segments(segments, part, caches) for part in ids.split(list(sizes), dim=1)], dim=1)


def _check_crossing(model: PreTrainedModel, structure: TracedStructure, ids: Tensor) -> None:
    """Check that the blocks after a cut are called with the same arguments as in the whole.

    Raises:
        ModelError: an argument depends on what only the part with the embedding has.
    """
    kind, blocks = model.config.model_type, structure.chain.blocks
    if len(blocks) < 2:
        return
    seen: list[dict[str, Tensor]] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(arguments_of(module, args, kwargs)[1]), with_kwargs=True
        )
        for block in blocks[1:]
    ]
    try:
        first = StockSegment(model, structure, 0, 1)(ids)
        seen.clear()
        StockSegment(model, structure, 1, len(blocks))(first)
    except Exception as error:
        why = (str(error).splitlines() or [""])[0][:120]
        raise ModelError(f"a '{kind}' model without its embedding fails: {type(error).__name__}: {why}") from None
    finally:
        for hook in hooks:
            hook.remove()
    crossing = {
        name
        for expected, found in zip(structure.block_arguments[1:], seen, strict=True)
        for name, tensor in expected.items()
        if name not in found or found[name].shape != tensor.shape or not torch.equal(found[name], tensor)
    }
    if crossing:
        names = ", ".join(sorted(crossing))
        raise ModelError(
            f"a '{kind}' model hands its blocks more than hidden states: {names} would have to cross a cut"
        )


def _padded_difference(model: PreTrainedModel, structure: TracedStructure, ids: Tensor, scale: float) -> float:
    """Difference for a batch in which one text is padded on the left."""
    total = len(structure.chain.blocks)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, :_PADDING] = False
    segments = cut_model(model, structure, (min(1, total), max(1, total - 1)))
    whole = final_of(model(input_ids=ids, **segments[0].text_arguments(valid, 0, ids.shape[1])))
    found = run_segments(segments, ids, valid=valid)
    return float((found - whole)[valid].abs().max()) / scale


def _logits_rule(model: PreTrainedModel, structure: TracedStructure, ids: Tensor, whole: Tensor) -> LogitsRule:
    """Compare the model's logits with those of its head alone."""
    head = model.get_output_embeddings()
    if head is None:
        return LogitsRule("none")
    plain = head(base_model_of(model, structure.chain.path)(input_ids=ids)[0])
    if plain.shape != whole.shape:
        return LogitsRule("other")
    factor = float((whole * plain).sum() / (plain * plain).sum())
    if torch.allclose(plain, whole, rtol=1e-4, atol=1e-5):
        return LogitsRule("head")
    if torch.allclose(plain * factor, whole, rtol=1e-4, atol=1e-5):
        return LogitsRule("factor", factor)
    for cap in _caps(model):
        if torch.allclose(torch.tanh(plain / cap) * cap, whole, rtol=1e-4, atol=1e-5):
            return LogitsRule("cap", cap)
    return LogitsRule("other")


def _caps(model: PreTrainedModel) -> list[float]:
    """Numbers of the configuration that may cap logits."""
    settings = vars(model.config.get_text_config())
    named = [value for name, value in settings.items() if "logit" in name and "cap" in name]
    return [float(value) for value in named if isinstance(value, int | float) and value and value is not True]
