"""Token-by-token matching (A5), the worst case of the attacks.

Part 1 is public and deterministic, so a guessed prefix and a guessed token either reproduce the observed hidden state
or do not. The cost is linear in the text's length, and a deeper cut does not protect. The idea is that of "Hidden No
More" (arXiv 2505.18332) and SipIt (arXiv 2510.15511).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raycloud.evaluation.privacy.split_decoder import SplitDecoder
from raycloud.models.cache import KVCache

Propose = Callable[[Tensor, int], Tensor]
"""Function from hidden states (n, d) and a count to tokens (n, count), best first: an attack's ``guess`` that does not
depend on positions."""

_AHEAD = 32
"""Number of proposed tokens that are checked in one forward pass."""

_ROUNDING = 1e-6
"""Lower bound of the distance of a right token, for a calibration that measures less."""

_FEW, _MANY = 16, 1024
"""First and largest number of candidates that run through part 1 at a time."""


class Matching:
    """Attack A5: matching of hidden states. Distances are root mean squares in units of ``scale`` (d,), the deviation
    of each coordinate.

    A token is accepted within ``tolerance``; if no candidate is that close, the nearest one is taken.
    """

    def __init__(self, cut: SplitDecoder, propose: Propose, scale: Tensor, tolerance: float) -> None:
        self._cut, self._propose, self._scale = cut, propose, scale
        self.tolerance = tolerance

    @classmethod
    @torch.no_grad()
    def fit(
        cls, cut: SplitDecoder, propose: Propose, scale: Tensor, public: Sequence[tuple[Tensor, Tensor]]
    ) -> Matching:
        """Calibrate the tolerance on public texts: pairs of token ids (T,) and their observed hidden states (T, d).

        The attack applies the same codec, so a right token differs only by rounding that depends on the batching, and a
        wrong one by orders of magnitude more: the tolerance is the geometric mean of the two distances.
        """
        attack = cls(cut, propose, scale, tolerance=0.0)
        right, wrong = _ROUNDING, float("inf")
        for ids, hidden in public:
            trunk = cut.edge.new_cache()
            if len(ids) > 1:
                right = max(right, float(attack._distance(cut.send(ids[None, :-1], cache=trunk)[0], hidden[:-1]).max()))
            others = propose(hidden[-1:], _FEW)[0]
            others = others[others != ids[-1]]
            distances = attack._distance(cut.send(others[:, None], cache=trunk.branch(len(others)))[:, 0], hidden[-1])
            wrong = min(wrong, float(distances.min()))
        attack.tolerance = (right * wrong) ** 0.5
        return attack

    @torch.no_grad()
    def guess(self, hidden: Tensor, count: int = 1) -> Tensor:
        """Guess the tokens (T, 1) of the hidden states (T, d) of one text; a match has one candidate, whatever
        ``count`` is."""
        found = self._propose(hidden, 1)[:, 0].clone()
        trunk, at = self._cut.edge.new_cache(), 0
        while at < len(found):
            ahead = slice(at, at + _AHEAD)
            distances = self._distance(self._cut.send(found[None, ahead], cache=trunk)[0], hidden[ahead])
            right = int((distances <= self.tolerance).long().cumprod(0).sum())
            trunk.crop(at + right)
            at += right
            if right < len(distances):
                found[at] = self._nearest(hidden[at], trunk)
                self._cut.send(found[None, at : at + 1], cache=trunk)
                at += 1
        return found[:, None]

    def _nearest(self, hidden: Tensor, trunk: KVCache) -> Tensor:
        """Token after ``trunk`` whose hidden state is nearest to ``hidden`` (d,); the whole vocabulary is tried, the
        likeliest tokens first, until one is within the tolerance."""
        candidates = self._propose(hidden[None], self._cut.vocab_size)[0]
        best, nearest, size = candidates[0], float("inf"), _FEW
        while len(candidates) and nearest > self.tolerance:
            some, candidates = candidates[:size], candidates[size:]
            distances = self._distance(self._cut.send(some[:, None], cache=trunk.branch(len(some)))[:, 0], hidden)
            least = int(distances.argmin())
            if distances[least] < nearest:
                best, nearest = some[least], float(distances[least])
            size = min(4 * size, _MANY)
        return best

    def _distance(self, ours: Tensor, observed: Tensor) -> Tensor:
        return ((ours - observed) / self._scale).square().mean(-1).sqrt()
