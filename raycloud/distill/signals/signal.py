"""A signal, and where students get them from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from raycloud.data.batches import Batch
from raycloud.distill.signals.coding import decode_ids, decode_rows
from raycloud.distill.signals.draws import RAGGED, recorded, tokens_at
from raycloud.distill.signals.head import FrozenHead
from raycloud.distill.signals.kept import kept
from raycloud.distill.signals.recipe import SignalCodec, SignalKind
from raycloud.distill.signals.targets import LOG_ZERO, Targets, tempered


@dataclass(frozen=True)
class Signal:
    """What the teacher says about the labelled tokens of one batch, in row-major order of (sample, position)."""

    key: str
    kind: SignalKind
    codec: SignalCodec
    payload: dict[str, Tensor]
    """Uint8 or float32, one row a token but for draws. By kind, with T temperatures:

    - ``hidden``, ``logits``: ``rows`` (n, bytes), coded hidden rows or logits relative to the largest;
    - ``topk``: ``rows``, coded logits relative to the largest, ``ids`` (n, k, bytes) and ``tail`` (n, T), see
      :mod:`raycloud.distill.signals.kept`; ``sorted``: the same without ids;
    - ``sampled``: ``drawn``, ``drawn_ids`` and ``drawn_counts``, see :mod:`raycloud.distill.signals.draws`, and
      ``entropy`` (n, T) in nats; ``hybrid``: these, drawn from the tail, and all of ``topk``;
    - ``scalars``: ``log_p`` (n, T) of the label.
    """
    temperatures: tuple[float, ...] = (1.0,)

    @property
    def count(self) -> int:
        """Tokens it speaks about."""
        return next(len(tensor) for name, tensor in self.payload.items() if name not in RAGGED)

    def to(self, device: torch.device) -> Signal:
        """The same signal on another device."""
        return replace(self, payload={name: tensor.to(device) for name, tensor in self.payload.items()})

    @property
    def nbytes(self) -> int:
        """Payload bytes on the link."""
        return sum(tensor.nbytes for tensor in self.payload.values())

    def rows(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Hidden rows (c, D), or logits (c, W) relative to the largest, of some tokens.

        Raises:
            ValueError: the signal holds neither.
        """
        if self.kind not in ("hidden", "logits"):
            raise ValueError(f"a {self.kind} signal holds no rows; allowed: signals of kind hidden or logits")
        return decode_rows(self.payload["rows"][which], self.codec)

    def targets(self, which: slice | Tensor, temperature: float, head: FrozenHead | None) -> Targets:
        """The targets of some of its tokens at a temperature; nothing is decoded but these.

        Raises:
            ValueError: a ``hidden`` signal without the head, or a temperature that the payload is not for.
        """
        if self.kind in ("hidden", "logits"):
            numbers = self.rows(which)
            if self.kind == "hidden":
                if head is None:
                    raise ValueError("a hidden signal needs the teacher's head")
                numbers = head.logits(numbers)
            log_p = torch.log_softmax(tempered(numbers, temperature), dim=-1).clamp_min_(LOG_ZERO)
            return Targets(log_p, kind=self.kind)
        if temperature not in self.temperatures:
            raise ValueError(f"a {self.kind} signal has temperatures {self.temperatures}, not {temperature}")
        return self._compact(tokens_at(self.payload, which), temperature)

    def _compact(self, said: dict[str, Tensor], temperature: float) -> Targets:
        """From a payload that was made for this temperature."""
        at = self.temperatures.index(temperature)
        if self.kind == "scalars":
            return Targets(said["log_p"][:, at, None], kind="scalars")
        if self.kind == "sampled":
            ids, share = recorded(said, at)
            return Targets(share.log().clamp_min(LOG_ZERO), ids, "sampled", said["entropy"][:, at])
        log_p = kept(said["rows"], said["tail"][:, at], self.codec, temperature)
        if self.kind == "sorted":
            return Targets(log_p, kind="sorted")
        ids = decode_ids(said["ids"])
        if self.kind == "topk":
            return Targets(log_p, ids, "topk")
        drawn, share = recorded(said, at)
        # The tail's mass is shared out among what was drawn from it.
        weights = torch.cat([log_p[:, :-1], log_p[:, -1:] + share.log()], dim=-1).clamp_min(LOG_ZERO)
        return Targets(weights, torch.cat([ids, drawn], dim=-1), "hybrid", said["entropy"][:, at])


class SignalStore(Protocol):
    """Where students get their signals from: computed once, shared by all who ask for the same ids."""

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about a batch."""
        ...
