"""Check that the segments of a model make up the whole: prefill, cached chunks and steps, and padded batches.

A model is accepted because its segments were measured to give the whole model's numbers, not because its family is
known.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from raycloud.errors import ModelError
from raycloud.models.attention import SDPA
from raycloud.models.cache import KVCache
from raycloud.models.fast_path import layout_of
from raycloud.models.segments import Segment, cut_segments
from raycloud.models.stock_cache import StockCache
from raycloud.models.structure import LogitsRule, ModelStructure, apply_rule, base_of, module_at
from raycloud.models.trace import Trace, arguments_of, hidden_of, trace

TOKENS = 19
_CHUNKS = (7, 1, 1, 5, 1, 4)
"""Tokens of the calls that process the text with a cache; they add up to ``TOKENS``."""
_ONE_BY_ONE = (9, *[1] * (TOKENS - 9))
_PADDING = 5
_FEW_PAIRS = 4
_REAL_TOKENS = 16
_REAL_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative difference on real weights; many blocks add up the rounding of kernels."""

Cut = tuple[int, int]
"""Blocks at which the second and the third segment begin."""


@dataclass(frozen=True)
class CheckedStructure:
    """Structure of a model whose segments make up the whole, with the largest differences that were measured.

    Differences are relative to the whole's largest absolute output.
    """

    structure: ModelStructure
    prefill: float
    decode: float | None
    """Difference with a cache; None if the model keeps no cache."""
    padded: float
    fast: float | None
    """Difference of the fast path; None if the model's modules have no layout of it."""

    @property
    def difference(self) -> float:
        """Largest difference of the library's own forward in segments."""
        return max(self.prefill, self.decode or 0.0, self.padded)


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
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary - 1, (2, TOKENS), generator=generator).to(model.device)
    traced = trace(model, ids)
    total = len(module_at(base_of(model), traced.structure.blocks))
    pairs = list(itertools.combinations_with_replacement(range(total + 1), 2)) if cuts is None else list(cuts)
    known: dict[str, Any] = {
        "logits": _logits_rule(model, traced.structure, ids),
        "attention": model.config._attn_implementation,
    }
    if traced.structure.causal:
        if not {"past_key_values", "cache_params"} & set(inspect.signature(type(base_of(model)).forward).parameters):
            raise ModelError(f"a '{model.config.model_type}' model keeps its state outside of a cache; run it whole")
        layers = StockCache(base_of(model).config).layers
        known["rolls_back"] = not any(isinstance(one, LinearAttentionCacheLayerMixin) for one in layers)
    structure = traced.structure.model_copy(update=known)
    compared = _Compared(model, structure, ids, pairs, tolerance)
    try:
        checked = _measured(compared, traced, structure)
    except ModelError:
        if not traced.token_independent:
            raise
        checked = _measured(compared, traced, traced.shared_structure.model_copy(update=known))
    layout = layout_of(model, checked.structure)
    if layout is None:
        return checked
    fast = checked.structure.model_copy(update={"layout": layout})
    # Our path calls the same blocks one by one wherever the cuts are.
    difference = _fast_difference(compared.few(), fast)
    return CheckedStructure(
        fast if difference <= tolerance else checked.structure,
        checked.prefill,
        checked.decode,
        checked.padded,
        difference,
    )


class _Compared:
    """Comparison of segments of a model with the whole for one text."""

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, ids: Tensor, pairs: Sequence[Cut], tolerance: float
    ) -> None:
        self.model, self.ids, self.pairs, self.tolerance = model, ids, pairs, tolerance
        self.whole = whole_output(model, structure, ids)
        self.scale = float(self.whole.abs().max())
        self.valid = torch.ones_like(ids, dtype=torch.bool)
        # Encoders are padded on the right: they count positions from the first token of the batch.
        self.valid[0, slice(None, _PADDING) if structure.causal else slice(-_PADDING, None)] = False
        self.whole_padded = whole_output(model, structure, ids, self.valid)

    def few(self) -> _Compared:
        """The same comparison at a few of the pairs of cuts."""
        few = copy.copy(self)
        few.pairs = self.pairs[:: max(1, len(self.pairs) // _FEW_PAIRS)]
        return few

    def prefill(self, structure: ModelStructure) -> float:
        """Difference without a cache."""
        return max(
            self._difference(run_parts(cut_segments(self.model, *pair, structure), self.ids)) for pair in self.pairs
        )

    def decode(self, structure: ModelStructure, sizes: Sequence[int]) -> float:
        """Difference with a cache and calls of these numbers of tokens, at the first pair beside another session.

        The last call is repeated after its tokens were taken back, if the model's cache can do so.
        """
        return max(self._difference(self._cached(structure, pair, sizes)) for pair in self.pairs)

    def _cached(self, structure: ModelStructure, pair: Cut, sizes: Sequence[int]) -> Tensor:
        parts, found = cut_segments(self.model, *pair, structure), list[Tensor]()
        caches, others = ([part.new_cache() for part in parts] for _ in range(2))
        for number, ids in enumerate(self.ids.split(list(sizes), dim=1)):
            if pair == self.pairs[0]:
                run_parts(parts, ids.flip(0, 1), others)  # another session, which must not be noticed
            if number == len(sizes) - 1 and structure.rolls_back:
                kept = caches[0].length
                run_parts(parts, ids.flip(1), caches)
                for cache in caches:
                    cache.crop(kept)
            found.append(run_parts(parts, ids, caches))
        return torch.cat(found, dim=1)

    def padded(self, structure: ModelStructure) -> float:
        """Difference for a batch in which one text is padded."""
        total = len(module_at(base_of(self.model), structure.blocks))
        parts = cut_segments(self.model, min(1, total), max(1, total - 1), structure)
        found = run_parts(parts, self.ids, valid=self.valid)
        return self._relative((found - self.whole_padded)[self.valid])

    def _difference(self, found: Tensor) -> float:
        return self._relative(found - self.whole)

    def _relative(self, difference: Tensor) -> float:
        """Largest relative difference; infinite where one is not a number, which ``max`` would pass over."""
        largest = float(difference.abs().max()) / self.scale
        return math.inf if math.isnan(largest) else largest


def _measured(compared: _Compared, traced: Trace, structure: ModelStructure) -> CheckedStructure:
    """Measure the library's own forward in segments.

    Raises:
        ModelError: a difference is above the tolerance.
    """
    kind, tolerance = compared.model.config.model_type, compared.tolerance

    def refused(measured: float, how: str) -> ModelError:
        return ModelError(
            f"a '{kind}' model in segments differs from the whole by {measured:.1e} ({how}); run it whole"
        )

    _check_crossing(compared.model, structure, traced, compared.ids)
    prefill, decode = compared.prefill(structure), None
    if not prefill <= tolerance:
        raise refused(prefill, "prefill")
    if structure.causal:
        decode = compared.decode(structure, _CHUNKS)
        if not decode <= tolerance:  # some state-space models take one token at a time after a cached text
            structure = structure.model_copy(update={"chunks": False})
            decode = compared.decode(structure, _ONE_BY_ONE)
        if not decode <= tolerance:
            raise refused(decode, "decoding in steps")
    padded = compared.padded(structure)
    if not padded <= tolerance:
        raise refused(padded, "padded batch")
    return CheckedStructure(structure, prefill, decode, padded, None)


def _fast_difference(compared: _Compared, structure: ModelStructure) -> float:
    """Largest difference of the fast path, with the attention implementations that it is used with."""
    model, differences = compared.model, list[float]()
    names = [structure.attention, *([SDPA] if structure.attention == "sdpa" else [])]
    try:
        for name in names:
            model.set_attn_implementation(name)
            differences += [compared.prefill(structure), compared.padded(structure)]
            if structure.causal:
                differences.append(compared.decode(structure, _CHUNKS))
    except Exception:  # blocks that are called otherwise raise errors of many kinds
        return math.inf
    finally:
        model.set_attn_implementation(structure.attention)
    return max(differences)


def run_parts(
    parts: Sequence[Segment], ids: Tensor, caches: Sequence[KVCache] | None = None, valid: Tensor | None = None
) -> Tensor:
    """Logits (B, T, V) of the parts of a model for token ids (B, T), or final hidden states of one without a head.

    Args:
        parts: segments that make up the model, in order.
        ids: token ids.
        caches: cache of each part; None for none.
        valid: (B, T), False for padding; None if there is none.
    """
    x = ids
    for index, part in enumerate(parts):
        x = part(x, valid=valid, cache=None if caches is None else caches[index])
    return x


def whole_output(model: PreTrainedModel, structure: ModelStructure, ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """Logits of a model by the library's own forward, or its final hidden states if it has no head of a decoder.

    Args:
        model: the model.
        structure: its structure.
        ids: token ids (B, T).
        valid: (B, T), False for padding; None if there is none.
    """
    base, arguments = base_of(model), dict[str, Tensor]()
    if valid is not None:
        arguments["attention_mask"] = valid.long()
        if structure.causal and "position_ids" in inspect.signature(type(base).forward).parameters:
            arguments["position_ids"] = (valid.long().cumsum(1) - 1).clamp_min(0)
    if structure.logits.kind == "none":
        return hidden_of(base(input_ids=ids, **arguments))
    logits: Tensor = model(input_ids=ids, **arguments).logits
    return logits


@torch.no_grad()
def check_weights(model: PreTrainedModel, structure: ModelStructure) -> None:
    """Compare the three parts of a loaded model with the whole on its real weights, for a text of 16 tokens.

    Raises:
        ModelError: they differ by more than the rounding of the model's type explains.
    """
    total = len(module_at(base_of(model), structure.blocks))
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    ids = (torch.arange(_REAL_TOKENS, device=model.device)[None] * 37 + 11) % vocabulary
    found = run_parts(cut_segments(model, total // 3, 2 * total // 3, structure), ids)
    whole = whole_output(model, structure, ids)
    difference = float((found - whole).abs().max() / whole.abs().max())
    if not difference <= _REAL_TOLERANCE[model.dtype]:
        raise ModelError(
            f"a '{model.config.model_type}' model in segments differs from the whole by {difference:.1e} on its own "
            "weights; run it whole"
        )


def _check_crossing(model: PreTrainedModel, structure: ModelStructure, traced: Trace, ids: Tensor) -> None:
    """Check that the blocks after a cut are called with the same arguments as in the whole.

    Raises:
        ModelError: an argument depends on what only the part with the embedding has.
    """
    kind, blocks = model.config.model_type, module_at(base_of(model), structure.blocks)
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
        first, rest, _ = cut_segments(model, 1, len(blocks), structure)
        hidden = first(ids)
        seen.clear()
        rest(hidden)
    except Exception as error:
        why = (str(error).splitlines() or [""])[0][:120]
        raise ModelError(f"a '{kind}' model without its embedding fails: {type(error).__name__}: {why}") from None
    finally:
        for hook in hooks:
            hook.remove()
    crossing = {
        name
        for expected, found in zip(traced.block_arguments[1:], seen, strict=True)
        for name, tensor in expected.items()
        if name not in found or not _same(found[name], tensor)
    }
    if crossing:
        names = ", ".join(sorted(crossing))
        raise ModelError(
            f"a '{kind}' model hands its blocks more than hidden states: {names} would have to cross a cut"
        )


def _same(found: Tensor, expected: Tensor) -> bool:
    """Tell whether two arguments of blocks are equal, one of them perhaps written once for all texts."""
    try:
        return torch.equal(*torch.broadcast_tensors(found, expected))
    except RuntimeError:  # shapes that are no broadcast of each other
        return False


def _logits_rule(model: PreTrainedModel, structure: ModelStructure, ids: Tensor) -> LogitsRule:
    """Compare a decoder's logits with those of its head alone.

    Raises:
        ModelError: they are not a multiple of them by a setting of the configuration, nor capped by one.
    """
    head = model.get_output_embeddings()
    if head is None or not structure.causal:
        return LogitsRule(kind="none")
    whole, plain = model(input_ids=ids).logits, head(hidden_of(base_of(model)(input_ids=ids)))
    rules = [LogitsRule()]
    for name, value in vars(model.config.get_text_config()).items():
        if isinstance(value, int | float) and value and not isinstance(value, bool):
            rules += [LogitsRule(kind=kind, setting=name) for kind in _kinds(name)]
    for rule in rules:
        expected = apply_rule(plain, rule, model.config)
        if expected.shape == whole.shape and torch.allclose(expected, whole, rtol=1e-4, atol=1e-5):
            return rule
    raise ModelError(
        f"the logits of a '{model.config.model_type}' model are not its head's output for final hidden states; run it "
        "whole"
    )


def _kinds(name: str) -> tuple[Literal["factor", "divisor", "cap"], ...]:
    """Kinds of rule that a setting of this name may be the value of."""
    if "logit" not in name and "lm_head" not in name:
        return ()
    return ("cap",) if "cap" in name else ("factor", "divisor")
