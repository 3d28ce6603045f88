"""Segments: blocks [lo, hi) of a transformer as a separate module.

A segment runs its blocks by one of two paths: our own loop over blocks where it was measured equal for the model's
configuration, and otherwise the library's own forward with stand-ins for the other blocks.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.attention import SDPA
from raycloud.models.cache import KVCache
from raycloud.models.fast_path import FastPath
from raycloud.models.stock_path import StockPath
from raycloud.models.structure import ModelStructure, apply_rule, base_of, module_at
from raycloud.models.verdict import structure_of


class Segment(nn.Module):
    """Blocks ``[lo, hi)`` with the embedding if ``lo == 0`` and final norm and head if ``hi`` is the number of blocks.

    The modules are shared with ``model``, not copied: training a segment trains the model it was taken from.

    Args:
        model: a ``transformers`` model.
        lo: first block.
        hi: block after the last one; the number of blocks if None.
        embed: whether the segment holds the embedding; ``lo == 0`` if None. The middle of an edge-cloud-edge model
            with an empty first part starts at block 0 without it.
        head: whether the segment holds final norm and head; ``hi == len(blocks)`` if None.
        structure: structure of the model; None for that of its configuration.

    Raises:
        ModelError: models of this configuration cannot be cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lo: int = 0,
        hi: int | None = None,
        *,
        embed: bool | None = None,
        head: bool | None = None,
        structure: ModelStructure | None = None,
    ) -> None:
        super().__init__()
        self.structure = structure_of(model.config) if structure is None else structure
        base = base_of(model)
        blocks = module_at(base, self.structure.blocks)
        hi = len(blocks) if hi is None else hi
        if not 0 <= lo <= hi <= len(blocks):
            raise ValueError(f"need 0 <= lo <= hi <= {len(blocks)}, got lo={lo}, hi={hi}")
        self.config, self.lo, self.hi = model.config, lo, hi
        self.is_first = lo == 0 if embed is None else embed
        self.is_last = hi == len(blocks) if head is None else head
        self.blocks = nn.ModuleList(blocks[lo:hi])
        path = StockPath if self.structure.layout is None else FastPath
        self._path: FastPath | StockPath = path(model, self.structure, lo, self.blocks)
        self._hold(base)
        self.head: nn.Module | None = model.get_output_embeddings() if self.is_last and self.structure.causal else None

    def _hold(self, base: PreTrainedModel) -> None:
        """Register the modules around the blocks that belong to this segment."""
        structure, path = self.structure, self._path
        paths = [*structure.shared]
        if self.is_first:
            paths += path.embedding if isinstance(path, FastPath) else structure.early
        if self.is_last:
            paths += path.after if isinstance(path, FastPath) else structure.late
        for name in paths:
            self.add_module(name.replace(".", "_"), module_at(base, name))
        self.rotary: nn.Module | None = path.rotary if isinstance(path, FastPath) else None

    def train(self, mode: bool = True) -> Segment:
        """Set training or evaluation mode; return the segment."""
        super().train(mode)
        self._path.train(mode)
        return self

    @property
    def causal(self) -> bool:
        """True for a decoder: a token does not change the outputs for earlier ones."""
        return self.structure.causal

    @property
    def has_norm(self) -> bool:
        """True if the model has modules between its last block and its head."""
        return self.structure.has_norm

    def freeze_shared(self) -> None:
        """Stop training of the modules that every segment has, see :class:`~raycloud.models.structure.ModelStructure`.

        Segments in different places would train them apart.
        """
        for name in self.structure.shared:
            self.get_submodule(name.replace(".", "_")).requires_grad_(False)

    def new_cache(self) -> KVCache:
        """Empty cache of one batch of texts for this segment and others of the same model."""
        return self._path.new_cache()

    def forward(self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits if this segment holds a head, hidden states otherwise; see :meth:`hidden` for the arguments."""
        hidden = self.hidden(x, valid=valid, cache=cache)
        return self.logits(hidden) if self.head is not None else hidden

    def hidden(
        self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None, types: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, d) after block ``hi - 1``, after the final norm if this is the last segment.

        Args:
            x: token ids (B, T) if the segment holds the embedding, else hidden states (B, T, d) entering block ``lo``.
            valid: (B, T), False for padding on either side; None if there is none.
            cache: cache that keeps these tokens for the next call; inference only.
            types: token types (B, T), see :data:`~raycloud.models.fast_path.Embed`.
        """
        store = KVCache() if cache is None else cache
        past = store.length
        store.extend(x.shape[0], x.shape[1], valid, x.device)
        hidden = self.embed(x, store.positions(past, store.length), types) if self.is_first else x
        return self.finish(self._path.through(hidden, store, past, self.lo, self.hi, remember=cache is not None))

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, d) entering block 0 for token ids, token types and positions, each (B, T)."""
        return self._path.embed(ids, positions, types)

    def through(self, hidden: Tensor, cache: KVCache, start: int, lo: int, hi: int) -> Tensor:
        """Apply blocks ``[lo, hi)`` of this segment to hidden states (B, T, d) of tokens ``[start, start + T)``.

        ``cache`` must know these tokens, and each of the blocks must hold the keys of exactly the tokens before them.
        Nothing is embedded, and the modules after the last block are left to :meth:`finish`.
        """
        return self._path.through(hidden, cache, start, lo, hi, remember=True)

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply the modules after the last block, such as the final norm; none if this is not the last segment."""
        return self._path.finish(hidden) if self.is_last else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., d), scaled or capped as the model does."""
        if self.head is None:
            raise ValueError(f"segment [{self.lo}, {self.hi}) holds no head")
        return apply_rule(self.head(hidden), self.structure.logits, self.config)


def set_segment_attention(model: PreTrainedModel) -> None:
    """Set our attention function on a model that only its segments run, if they take our path and it has ``sdpa``.

    The function needs the complete masks that our path gives it.
    """
    structure = structure_of(model.config)
    if structure.layout is not None and structure.attention == "sdpa":
        model.set_attn_implementation(SDPA)


def cut_segments(
    model: PreTrainedModel, start_block: int, end_block: int, structure: ModelStructure | None = None
) -> tuple[Segment, Segment, Segment]:
    """Cut a model into three segments: before ``start_block``, from there to ``end_block``, and the rest."""
    return (
        Segment(model, 0, start_block, head=False, structure=structure),
        Segment(model, start_block, end_block, embed=False, head=False, structure=structure),
        Segment(model, end_block, embed=False, structure=structure),
    )
