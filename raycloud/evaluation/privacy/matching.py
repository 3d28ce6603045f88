"""Token-by-token matching (A5), the honest worst case.

Part 1 is public and deterministic, so a guessed prefix and a guessed token either reproduce the row that was observed
or do not. The cost is linear in the text's length, and depth does not help. The idea is that of "Hidden No More" (arXiv
2505.18332) and SipIt (arXiv 2510.15511).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raycloud.evaluation.privacy.cut import CutModel
from raycloud.models.cache import KVCache

Propose = Callable[[Tensor, int], Tensor]
"""Rows (n, d), count -> tokens (n, count), best first: the ``guess`` of an attack that asks for no positions."""

_AHEAD = 32
"""Tokens that are checked in one go while the proposals are right."""

_ROUNDING = 1e-6
"""What a right token misses by at least, where the calibration finds nothing."""

_FEW, _MANY = 16, 1024
"""Candidates that run through part 1 at a time: the first few, then ever more."""


class Branches(KVCache):
    """One-token continuations of one text, side by side; the text's keys and values are read and never copied."""

    def __init__(self, trunk: KVCache, count: int) -> None:
        super().__init__()
        self._trunk = trunk
        self.extend(count, trunk.length, None, trunk.positions(0, trunk.length).device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The trunk's keys and values, the same for every branch, with each branch's own (B, H, 1, d_head) behind."""
        before = self._trunk.update(keys[:1, :, :0], values[:1, :, :0], layer_idx)
        old_keys, old_values = (one.expand(len(keys), -1, -1, -1) for one in before)
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)


class Matching:
    """A5. Distances are root mean squares in units of ``scale`` (d,), how much each coordinate varies.

    A row counts as found within ``tolerance``; where no candidate comes that close, the nearest of all is taken.
    """

    def __init__(self, cut: CutModel, propose: Propose, scale: Tensor, tolerance: float) -> None:
        self._cut, self._propose, self._scale = cut, propose, scale
        self.tolerance = tolerance

    @classmethod
    @torch.no_grad()
    def fit(cls, cut: CutModel, propose: Propose, scale: Tensor, public: Sequence[tuple[Tensor, Tensor]]) -> Matching:
        """With the tolerance that public texts call for: pairs of token ids (T,) and their observed rows (T, d).

        What a codec does is known and done again, so a right token misses only by rounding that depends on how a text
        was batched, a wrong one by orders of magnitude more: the tolerance is the geometric middle of the two.
        """
        attack = cls(cut, propose, scale, tolerance=0.0)
        right, wrong = _ROUNDING, float("inf")
        for ids, rows in public:
            trunk = KVCache()
            if len(ids) > 1:
                right = max(right, float(attack._distance(cut.send(ids[None, :-1], cache=trunk)[0], rows[:-1]).max()))
            others = propose(rows[-1:], _FEW)[0]
            others = others[others != ids[-1]]
            apart = attack._distance(cut.send(others[:, None], cache=Branches(trunk, len(others)))[:, 0], rows[-1])
            wrong = min(wrong, float(apart.min()))
        attack.tolerance = (right * wrong) ** 0.5
        return attack

    @torch.no_grad()
    def guess(self, rows: Tensor, count: int = 1) -> Tensor:
        """Tokens (T, 1) of the rows (T, d) of one text; ``count`` is 1, a match has no runner-up."""
        found = self._propose(rows, 1)[:, 0].clone()
        trunk, at = KVCache(), 0
        while at < len(found):
            ahead = slice(at, at + _AHEAD)
            apart = self._distance(self._cut.send(found[None, ahead], cache=trunk)[0], rows[ahead])
            right = int((apart <= self.tolerance).long().cumprod(0).sum())
            trunk.crop(at + right)
            at += right
            if right < len(apart):
                found[at] = self._nearest(rows[at], trunk)
                self._cut.send(found[None, at : at + 1], cache=trunk)
                at += 1
        return found[:, None]

    def _nearest(self, row: Tensor, trunk: KVCache) -> Tensor:
        """The token after ``trunk`` whose row is ``row``; the whole vocabulary is tried, the likeliest tokens first."""
        candidates = self._propose(row[None], self._cut.words)[0]
        best, nearest, size = candidates[0], float("inf"), _FEW
        while len(candidates) and nearest > self.tolerance:
            some, candidates = candidates[:size], candidates[size:]
            apart = self._distance(self._cut.send(some[:, None], cache=Branches(trunk, len(some)))[:, 0], row)
            least = int(apart.argmin())
            if apart[least] < nearest:
                best, nearest = some[least], float(apart[least])
            size = min(4 * size, _MANY)
        return best

    def _distance(self, ours: Tensor, observed: Tensor) -> Tensor:
        return ((ours - observed) / self._scale).square().mean(-1).sqrt()
