"""Split decoder, and the hidden states that the cloud sees in whole sessions: those entering and leaving its blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment, cut_segments
from raycloud.models.structure import blocks_of
from raycloud.models.verdict import structure_of


@dataclass(frozen=True)
class ObservedHidden:
    """Hidden states (B, T, d): ``uplink`` and ``downlink``, which the cloud sees, and ``final``, which it does not."""

    uplink: Tensor
    downlink: Tensor
    final: Tensor


class SplitDecoder:
    """Three parts of a decoder cut at the blocks ``start_block`` and ``end_block``, with a codec for the uplink and one
    for the downlink.

    Raises:
        ModelError: the cut does not fit the model, or the model is no decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start_block: int,
        end_block: int,
        uplink: CutCodec | None = None,
        downlink: CutCodec | None = None,
    ) -> None:
        count = len(blocks_of(model))
        if not 0 <= start_block <= end_block <= count:
            raise ModelError(
                f"cut: need 0 <= start_block <= end_block <= {count}, "
                f"got start_block={start_block}, end_block={end_block}"
            )
        if not structure_of(model.config).causal:
            raise ModelError(f"family '{model.config.model_type}' is an encoder; only decoders answer prompts")
        self.edge, self.cloud, self.last = cut_segments(model, start_block, end_block)
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.device = model.device
        self._uplink, self._downlink, self._dtype = uplink, downlink, model.dtype

    def run(self, ids: Tensor, valid: Tensor | None = None, caches: Sequence[KVCache] | None = None) -> ObservedHidden:
        """Run all three parts on token ids (B, T); ``caches`` holds one cache per part."""
        edge, cloud, last = caches or (None, None, None)
        uplink = self.send(ids, valid, edge)
        downlink = _codec_round_trip(self._downlink, self.cloud, uplink.to(self._dtype), valid, cloud)
        return ObservedHidden(uplink, downlink, self.last.hidden(downlink.to(self._dtype), valid=valid, cache=last))

    def send(self, ids: Tensor, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, d) that reach the cloud for token ids (B, T), after the uplink codec."""
        return _codec_round_trip(self._uplink, self.edge, ids, valid, cache)


def _codec_round_trip(
    codec: CutCodec | None, part: Segment, x: Tensor, valid: Tensor | None, cache: KVCache | None
) -> Tensor:
    """Run a part and return its hidden states (B, T, d) in float32 as the receiver decodes them; unchanged without a
    codec."""
    store = part.new_cache() if cache is None else cache
    past = store.length
    hidden = part.hidden(x, valid=valid, cache=store)
    if codec is None:
        return hidden.float()
    arrived = codec.arrived(hidden.flatten(0, 1), store.positions(past, store.length).flatten())
    return arrived.to(hidden.device).view(hidden.shape)


@dataclass(frozen=True)
class SessionTrace:
    """One session: a prompt and the model's greedy answer, for the T tokens whose hidden states were sent.

    ``uplink`` and ``downlink`` (T, d) are the hidden states that the cloud saw. ``ids`` (T,) are the tokens, the first
    ``prompt`` of them the prompt's; ``said`` (T - prompt + 1,) are the tokens generated from ``downlink``, beginning
    with the prompt's last position, an ending token included. The last generated token has not been sent.
    """

    ids: Tensor
    said: Tensor
    prompt: int
    uplink: Tensor
    downlink: Tensor


@torch.no_grad()
def record_sessions(
    cut: SplitDecoder, prompts: Sequence[Sequence[int]], limit: int, eos: Collection[int] = ()
) -> list[SessionTrace]:
    """Run one session per prompt, with at most ``limit`` answer tokens each, in one batch with codecs and KV caches."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=cut.device)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=cut.device)
        valid[row, longest - len(prompt) :] = True
    caches = [part.new_cache() for part in (cut.edge, cut.cloud, cut.last)]
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    over = torch.zeros(len(prompts), dtype=torch.bool, device=cut.device)
    endings = torch.tensor(sorted(eos), dtype=torch.long, device=cut.device)
    sent, mask = ids, None if bool(valid.all()) else valid
    for _ in range(limit):
        seen = cut.run(sent, mask, caches)
        said = cut.last.logits(seen.final[:, -1:]).argmax(-1)
        steps.append((sent, said, seen.uplink, seen.downlink, valid if not steps else ~over[:, None]))
        sent, mask = said, None
        over = over | torch.isin(sent[:, 0], endings)
        if bool(over.all()):
            break
    sent, said, uplink, downlink, alive = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
    return [
        SessionTrace(
            ids=sent[row, real],
            said=said[row, real[longest - 1 :]],
            prompt=len(prompt),
            uplink=uplink[row, real],
            downlink=downlink[row, real],
        )
        for row, (prompt, real) in enumerate(zip(prompts, alive, strict=True))
    ]
