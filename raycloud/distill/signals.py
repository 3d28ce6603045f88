"""Signals: what a teacher says about a batch, compacted to response tokens and coded for the link.

A signal is valid for exact token ids only and carries a key that says which; a student refuses any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.link.codecs import CODECS, CodecName
from raycloud.models.segments import Segment
from raycloud.recipe import Recipe

SignalKind = Literal["hidden", "logits", "topk"]

_LOG_ZERO = -1e30
"""Stands for the logarithm of zero: 0 · log 0 is then 0 and not NaN."""


class SignalRecipe(Recipe):
    """What the teacher sends for every response token."""

    kind: SignalKind = "hidden"
    """``hidden``: the row entering the head, with one frozen copy of the head (exact); ``logits``: all of them (exact);
    ``topk``: the largest with their ids, and the log-sum-exp that tells the mass of the tail."""
    codec: CodecName = "bfloat16"
    """How hidden rows or logits are coded."""
    k: int = Field(64, gt=0)
    """Logits kept by ``topk``."""


@dataclass(frozen=True)
class Targets:
    """What a student is to match at some tokens: log-probabilities over a common support.

    The support is the vocabulary, or the teacher's ``k`` ids and one bucket for all others.
    """

    log_p: Tensor
    """(c, S), the teacher's."""
    ids: Tensor | None = None
    """(c, k) where the support is ids and a tail; None where it is the vocabulary."""

    def log_q(self, logits: Tensor, temperature: float) -> Tensor:
        """The student's log-probabilities (c, S) over the same support, from its logits (c, V)."""
        log_q = torch.log_softmax(_tempered(logits, temperature), dim=-1)
        if self.ids is None:
            return log_q
        return _with_tail(log_q.gather(-1, self.ids))


@dataclass(frozen=True)
class FrozenHead:
    """A copy of the teacher's head that stays at the edge, for ``hidden`` signals."""

    weight: Tensor
    """(W, D)"""
    bias: Tensor | None = None
    softcap: float | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenHead:
        """The same head where and in the type it is computed with."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (c, W) of final rows (c, D)."""
        logits = nn.functional.linear(rows, self.weight, self.bias)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    @property
    def nbytes(self) -> int:
        """Bytes it takes to send."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


@dataclass(frozen=True)
class Signal:
    """What the teacher says about the labelled tokens of one batch, in row-major order of (sample, position)."""

    key: str
    kind: SignalKind
    codec: CodecName
    payload: dict[str, Tensor]
    """``rows``: coded hidden rows, logits, or top-k logits, uint8 (n, bytes); for top-k also ``ids`` (n, k) as int32
    and ``lse`` (n, temperatures), the log-sum-exp of all logits divided by each temperature."""
    temperatures: tuple[float, ...] = (1.0,)

    @property
    def count(self) -> int:
        """Tokens it speaks about."""
        return self.payload["rows"].shape[0]

    def to(self, device: torch.device) -> Signal:
        """The same signal on another device."""
        return replace(self, payload={name: tensor.to(device) for name, tensor in self.payload.items()})

    @property
    def nbytes(self) -> int:
        """Payload bytes on the link."""
        return sum(tensor.nbytes for tensor in self.payload.values())

    def targets(self, rows: slice, temperature: float, head: FrozenHead | None) -> Targets:
        """The targets of some of its tokens at a temperature; nothing is decoded but these.

        Raises:
            ValueError: a ``hidden`` signal without the head, or a temperature that ``topk`` has no log-sum-exp for.
        """
        numbers = CODECS[self.codec].decode(self.payload["rows"][rows])
        if self.kind == "topk":
            if temperature not in self.temperatures:
                raise ValueError(f"top-k signal has temperatures {self.temperatures}, not {temperature}")
            lse = self.payload["lse"][rows, self.temperatures.index(temperature), None]
            log_p = numbers / temperature - lse
            return Targets(_with_tail(log_p), self.payload["ids"][rows].long())
        if self.kind == "hidden":
            if head is None:
                raise ValueError("a hidden signal needs the teacher's head")
            numbers = head.logits(numbers)
        return Targets(torch.log_softmax(_tempered(numbers, temperature), dim=-1).clamp_min_(_LOG_ZERO))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _with_tail(log_p: Tensor) -> Tensor:
    """Append the log of the mass that is left, (c, k) to (c, k + 1), never below a mass of 1e-7.

    log(1 - Σ exp) is computed from the logarithm of the kept mass, which stays exact when almost all of it is kept.
    """
    kept = log_p.logsumexp(dim=-1, keepdim=True).clamp_max(-1e-7)
    return torch.cat([log_p, torch.log(-torch.expm1(kept))], dim=-1)


def signal_key(teacher: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float]) -> str:
    """What a signal is valid for: teacher, exact ids and labels, kind of payload and temperatures."""
    digest = hashlib.sha256(f"{teacher}|{recipe.model_dump_json()}|{sorted(set(temperatures))}|".encode())
    for tensor in (batch.ids, batch.labels):
        digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def observe(
    teacher: Segment, name: str, batch: Batch, recipe: SignalRecipe, temperatures: Sequence[float], *, chunk: int = 256
) -> Signal:
    """Run the teacher over a batch once and say what it thinks of every labelled position.

    Args:
        teacher: the whole model.
        name: identifies its weights in the signal's key.
        batch: on the teacher's device.
        recipe: kind of signal and codec.
        temperatures: those the students will use.
        chunk: tokens whose logits exist at a time.
    """
    wanted = batch.labels != IGNORE
    rows = teacher.rows(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)[wanted]
    codec, taus = CODECS[recipe.codec], tuple(sorted(set(temperatures)))
    key = signal_key(name, batch, recipe, temperatures)
    if recipe.kind == "hidden":
        return Signal(key, "hidden", recipe.codec, {"rows": codec.encode(rows).cpu()}, taus)
    parts: list[dict[str, Tensor]] = []
    for part in rows.split(chunk):
        logits = teacher.logits(part).float()
        if recipe.kind == "logits":
            parts.append({"rows": codec.encode(logits)})
            continue
        top, ids = logits.topk(min(recipe.k, logits.shape[-1]), dim=-1)
        # Logits are sent relative to the largest: the codec's precision then goes where the mass is.
        peak = top[:, :1]
        coded = codec.encode(top - peak)
        lse = torch.stack([((logits - peak) / tau).logsumexp(-1) for tau in taus], dim=-1)
        parts.append({"rows": coded, "ids": ids.int(), "lse": lse})
    return Signal(key, recipe.kind, recipe.codec, {k: torch.cat([p[k] for p in parts]).cpu() for k in parts[0]}, taus)


def frozen_head(teacher: Segment, codec: CodecName) -> FrozenHead:
    """A copy of a teacher's head as it arrives at the edge after crossing the link in ``codec``'s type.

    Raises:
        ValueError: the head is more than one linear map.
    """
    if not isinstance(teacher.head, nn.Linear):
        raise ValueError("hidden signals need a teacher whose head is one linear map; use kind: topk")
    dtype = getattr(torch, codec)
    bias = teacher.head.bias
    return FrozenHead(
        teacher.head.weight.detach().to(dtype).cpu(),
        None if bias is None else bias.detach().to(dtype).cpu(),
        getattr(teacher.config, "final_logit_softcapping", None),
    )


class SignalStore(Protocol):
    """Where students get their signals from: computed once, shared by all who ask for the same ids."""

    def signal(self, batch: Batch) -> Signal:
        """What the teacher says about a batch."""
        ...
