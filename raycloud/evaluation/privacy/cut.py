"""A model cut for the cloud, and what the cloud sees of whole sessions: the rows entering and leaving its blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.link.codecs.boundary import Boundary
from raycloud.models.anatomy import anatomy_of, blocks_of
from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class Seen:
    """What the cloud sees, and the final rows it does not see: each (B, T, d)."""

    up: Tensor
    down: Tensor
    final: Tensor


class CutModel:
    """The three parts of a decoder cut at ``first`` and ``second``, with the code of each way between them.

    Raises:
        ModelError: the cut does not fit the model, or the model is no decoder.
    """

    def __init__(
        self, model: PreTrainedModel, first: int, second: int, up: Boundary | None = None, down: Boundary | None = None
    ) -> None:
        count = len(blocks_of(model))
        if not 0 <= first <= second <= count:
            raise ModelError(f"cut: need 0 <= first <= second <= {count}, got first={first}, second={second}")
        if not anatomy_of(model.config).causal:
            raise ModelError(f"family '{model.config.model_type}' is an encoder; only decoders answer prompts")
        self.edge = Segment(model, 0, first, head=False)
        self.cloud = Segment(model, first, second, embed=False, head=False)
        self.last = Segment(model, second, embed=False)
        self.words: int = model.config.get_text_config().vocab_size
        self.device = model.device
        self._up, self._down, self._dtype = up, down, model.dtype

    def run(self, ids: Tensor, valid: Tensor | None = None, caches: Sequence[KVCache] | None = None) -> Seen:
        """All three parts on token ids (B, T); ``caches`` are one for each part."""
        edge, cloud, last = caches or (None, None, None)
        up = self.send(ids, valid, edge)
        down = _crossed(self._down, self.cloud, up.to(self._dtype), valid, cloud)
        return Seen(up, down, self.last.rows(down.to(self._dtype), valid=valid, cache=last))

    def send(self, ids: Tensor, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The rows (B, T, d) that reach the cloud for token ids (B, T)."""
        return _crossed(self._up, self.edge, ids, valid, cache)


def _crossed(code: Boundary | None, part: Segment, x: Tensor, valid: Tensor | None, cache: KVCache | None) -> Tensor:
    """What arrives of the rows (B, T, d) that leave a part, as float32; without a code they arrive as they are."""
    store = KVCache() if cache is None else cache
    past = store.length
    rows = part.rows(x, valid=valid, cache=store)
    if code is None:
        return rows.float()
    arrived = code.arrived(rows.flatten(0, 1), store.positions(past, store.length).flatten())
    return arrived.to(rows.device).view(rows.shape)


@dataclass(frozen=True)
class Trace:
    """One session: a prompt and the model's greedy answer, for the T tokens whose rows went up.

    ``up`` and ``down`` (T, d) are what the cloud saw. ``ids`` (T,) are the tokens, the first ``prompt`` of them the
    prompt's; ``said`` (T - prompt + 1,) are the tokens the edge took from the rows of ``down`` from the prompt's last
    on, an ending token included. The last token said has not gone up.
    """

    ids: Tensor
    said: Tensor
    prompt: int
    up: Tensor
    down: Tensor


@torch.no_grad()
def record(cut: CutModel, prompts: Sequence[Sequence[int]], limit: int, eos: Collection[int] = ()) -> list[Trace]:
    """Sessions of at most ``limit`` answered tokens each, run together as the edge would, wire and caches included."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=cut.device)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=cut.device)
        valid[row, longest - len(prompt) :] = True
    caches = [KVCache() for _ in range(3)]
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    over = torch.zeros(len(prompts), dtype=torch.bool, device=cut.device)
    endings = torch.tensor(sorted(eos), dtype=torch.long, device=cut.device)
    sent, mask = ids, None if bool(valid.all()) else valid
    for _ in range(limit):
        seen = cut.run(sent, mask, caches)
        said = cut.last.logits(seen.final[:, -1:]).argmax(-1)
        steps.append((sent, said, seen.up, seen.down, valid if not steps else ~over[:, None]))
        sent, mask = said, None
        over = over | torch.isin(sent[:, 0], endings)
        if bool(over.all()):
            break
    sent, said, up, down, alive = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
    return [
        Trace(
            ids=sent[row, real],
            said=said[row, real[longest - 1 :]],
            prompt=len(prompt),
            up=up[row, real],
            down=down[row, real],
        )
        for row, (prompt, real) in enumerate(zip(prompts, alive, strict=True))
    ]
