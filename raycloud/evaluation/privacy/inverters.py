"""Learned inverters from a hidden state to its token: linear (A2), or with one hidden layer (A3).

Both map to the embedding space and compare with the whole vocabulary, so they can guess tokens that the attacker's
text does not contain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raycloud.evaluation.privacy.affine import Affine, ridge
from raycloud.evaluation.privacy.token_directions import TokenDirections

_SHARPNESS = 10.0
"""Factor of the initial affine map, so that a cosine of 1 becomes a logit large enough for the softmax."""

_OTHERS = 2048
"""Number of random tokens in a step's softmax, in addition to the batch's own."""


@dataclass(frozen=True)
class RidgeInverter:
    """Attack A2: an affine map to the embedding space, then the nearest embedding."""

    affine: Affine
    vocabulary: TokenDirections

    @classmethod
    def fit(cls, hidden: Tensor, ids: Tensor, vocabulary: TokenDirections) -> RidgeInverter:
        """Fit on public hidden states (n, d) and their tokens (n,)."""
        return cls(ridge(hidden, vocabulary.directions[ids]), vocabulary)

    def guess(self, hidden: Tensor, count: int) -> Tensor:
        """Tokens (T, count), best first, of the hidden states (T, d) of one text."""
        return self.vocabulary.nearest(self.affine(hidden), count)


class MlpInverter(nn.Module):
    """Attack A3: a layer of ``hidden_units`` from a hidden state to its token's logits, parallel to an affine path.

    Args:
        affine: initial value of the affine path, which also standardises the input.
        vocabulary: directions that the output is compared with.
        hidden_units: width of the layer.
    """

    def __init__(self, affine: Affine, vocabulary: TokenDirections, hidden_units: int = 1024) -> None:
        super().__init__()
        self.affine, self.vocabulary = affine, vocabulary
        width, out = affine.weight.shape
        self.straight = nn.Linear(width, out)
        self.inner = nn.Linear(width, hidden_units)
        self.outer = nn.Linear(hidden_units, out)
        nn.init.zeros_(self.outer.weight)
        with torch.no_grad():
            self.straight.weight.copy_(_SHARPNESS * affine.weight.T)
            self.straight.bias.copy_(_SHARPNESS * affine.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (n, d) to points (n, m) whose products with the vocabulary's directions are logits."""
        hidden = self.affine.standard(hidden)
        return self.straight(hidden) + self.outer(nn.functional.gelu(self.inner(hidden)))

    @classmethod
    def fit(
        cls, hidden: Tensor, ids: Tensor, start: RidgeInverter, *, steps: int = 200, batch: int = 512, seed: int = 0
    ) -> MlpInverter:
        """Train on public hidden states (n, d) and their tokens (n,).

        Every step takes the softmax over the batch's own tokens and random tokens of the vocabulary, because logits of
        the whole vocabulary would cost far more and improve the result little.
        """
        device, vocabulary = hidden.device, start.vocabulary
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(start.affine, vocabulary).to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
        vocab_size = len(vocabulary.directions)
        for _ in range(steps):
            some = torch.randint(len(hidden), (batch,), generator=generator).to(device)
            others = torch.randint(vocab_size, (_OTHERS,), generator=generator).to(device)
            known, targets = torch.cat([ids[some], others]).unique(return_inverse=True)
            loss = cross_entropy(model(hidden[some]) @ vocabulary.directions[known].T, targets[:batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return model.eval()

    @torch.no_grad()
    def guess(self, hidden: Tensor, count: int) -> Tensor:
        """Tokens (T, count), best first, of the hidden states (T, d) of one text."""
        return self.vocabulary.nearest(self(hidden), count)
