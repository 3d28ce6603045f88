"""A signal, and the interface of the stores that students get signals from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.distill.signal_recipe import SignalCodec, SignalKind
from raycloud.distill.signals.encoding import decode_ids, decode_values
from raycloud.distill.signals.head import FrozenHead
from raycloud.distill.signals.sampled import RAGGED_FIELDS, decode_draws, tokens_at
from raycloud.distill.signals.targets import LOG_ZERO, Targets, scale_by_temperature
from raycloud.distill.signals.top_k import top_k_log_p


@dataclass(frozen=True)
class Signal:
    """Teacher outputs at the labelled tokens of one batch, in row-major order of (sample, position)."""

    key: str
    kind: SignalKind
    codec: SignalCodec
    payload: dict[str, Tensor]
    """Uint8 or float32, one entry per token except for draws. By kind, with T temperatures:

    - ``hidden``, ``logits``: ``rows`` (n, bytes), encoded hidden states, or logits relative to the largest;
    - ``topk``: ``rows``, encoded logits relative to the largest, ``ids`` (n, k, bytes) and ``tail`` (n, T), see
      :mod:`raycloud.distill.signals.top_k`; ``sorted``: the same without ids;
    - ``sampled``: ``drawn``, ``drawn_ids`` and ``drawn_counts``, see :mod:`raycloud.distill.signals.sampled`, and
      ``entropy`` (n, T) in nats; ``hybrid``: these, drawn from the tail, and all of ``topk``;
    - ``scalars``: ``log_p`` (n, T) of the label.
    """
    temperatures: tuple[float, ...] = (1.0,)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return next(len(tensor) for name, tensor in self.payload.items() if name not in RAGGED_FIELDS)

    def to(self, device: torch.device) -> Signal:
        """The same signal on another device."""
        return replace(self, payload={name: tensor.to(device) for name, tensor in self.payload.items()})

    @property
    def nbytes(self) -> int:
        """Payload bytes on the link."""
        return sum(tensor.nbytes for tensor in self.payload.values())

    def values(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Hidden states (c, D), or logits (c, W) relative to the largest, at some tokens.

        Raises:
            ValueError: the signal holds neither.
        """
        if self.kind not in ("hidden", "logits"):
            raise ValueError(f"a signal of kind {self.kind} holds no vectors; allowed: hidden, logits")
        return decode_values(self.payload["rows"][which], self.codec)

    def targets(self, which: slice | Tensor, temperature: float, head: FrozenHead | None) -> Targets:
        """Targets at some tokens and a temperature; only these are decoded.

        Raises:
            ValueError: a ``hidden`` signal without the head, or a temperature that the payload does not have.
        """
        if self.kind in ("hidden", "logits"):
            numbers = self.values(which)
            if self.kind == "hidden":
                if head is None:
                    raise ValueError("a hidden signal needs the teacher's head")
                numbers = head.logits(numbers)
            log_p = torch.log_softmax(scale_by_temperature(numbers, temperature), dim=-1).clamp_min_(LOG_ZERO)
            return Targets(log_p, kind=self.kind)
        if temperature not in self.temperatures:
            raise ValueError(f"a {self.kind} signal has temperatures {self.temperatures}, not {temperature}")
        return self._compact(tokens_at(self.payload, which), temperature)

    def _compact(self, payload: dict[str, Tensor], temperature: float) -> Targets:
        """Targets from the payload of a compact kind at one of its temperatures."""
        at = self.temperatures.index(temperature)
        if self.kind == "scalars":
            return Targets(payload["log_p"][:, at, None], kind="scalars")
        if self.kind == "sampled":
            ids, share = decode_draws(payload, at)
            return Targets(share.log().clamp_min(LOG_ZERO), ids, "sampled", payload["entropy"][:, at])
        log_p = top_k_log_p(payload["rows"], payload["tail"][:, at], self.codec, temperature)
        if self.kind == "sorted":
            return Targets(log_p, kind="sorted")
        ids = decode_ids(payload["ids"])
        if self.kind == "topk":
            return Targets(log_p, ids, "topk")
        drawn, share = decode_draws(payload, at)
        # The tail's mass is divided among the ids drawn from it.
        weights = torch.cat([log_p[:, :-1], log_p[:, -1:] + share.log()], dim=-1).clamp_min(LOG_ZERO)
        return Targets(weights, torch.cat([ids, drawn], dim=-1), "hybrid", payload["entropy"][:, at])


class SignalStore(Protocol):
    """Source of signals: each is computed once and shared by all who ask for the same token ids."""

    def signal(self, batch: Batch) -> Signal:
        """Signal of a batch."""
        ...
