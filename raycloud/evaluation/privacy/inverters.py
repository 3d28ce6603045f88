"""Learned inverters: from a row back to its token, linear (A2) or with one hidden layer (A3).

Both end in the embedding space and are read off against the whole vocabulary, so they can name tokens that the
attacker's text never held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from raycloud.evaluation.privacy.affine import Affine, ridge
from raycloud.evaluation.privacy.vocabulary import Vocabulary

_SHARPNESS = 10.0
"""What the affine start is multiplied by: a cosine of one is then a logit that can win."""

_OTHERS = 2048
"""Random words beside those of a batch."""


@dataclass(frozen=True)
class RidgeInverter:
    """A2: an affine map to the embedding space, then the nearest embedding."""

    affine: Affine
    vocabulary: Vocabulary

    @classmethod
    def fit(cls, rows: Tensor, ids: Tensor, vocabulary: Vocabulary) -> RidgeInverter:
        """From public rows (n, d) and the tokens (n,) they belong to."""
        return cls(ridge(rows, vocabulary.directions[ids]), vocabulary)

    def guess(self, rows: Tensor, count: int) -> Tensor:
        """Tokens (T, count), best first, of the rows (T, d) of one text."""
        return self.vocabulary.nearest(self.affine(rows), count)


class MlpInverter(nn.Module):
    """A3: a layer of ``hidden`` units between a row and its token's logits, beside an affine path.

    Args:
        affine: where training starts, and what standardises the rows.
        vocabulary: what the output is read off against.
        hidden: width of the layer.
    """

    def __init__(self, affine: Affine, vocabulary: Vocabulary, hidden: int = 1024) -> None:
        super().__init__()
        self.affine, self.vocabulary = affine, vocabulary
        width, out = affine.weight.shape
        self.straight = nn.Linear(width, out)
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, out)
        nn.init.zeros_(self.outer.weight)
        with torch.no_grad():
            self.straight.weight.copy_(_SHARPNESS * affine.weight.T)
            self.straight.bias.copy_(_SHARPNESS * affine.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Points (n, d) whose products with the vocabulary's directions are logits."""
        rows = self.affine.standard(rows)
        return self.straight(rows) + self.outer(nn.functional.gelu(self.inner(rows)))

    @classmethod
    def fit(
        cls, rows: Tensor, ids: Tensor, start: RidgeInverter, *, steps: int = 200, batch: int = 512, seed: int = 0
    ) -> MlpInverter:
        """From public rows (n, d) and their tokens (n,).

        Every step weighs a batch's tokens against each other and against random words of the whole vocabulary, since
        logits of all of it for every row would cost far more and teach little.
        """
        device, vocabulary = rows.device, start.vocabulary
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(start.affine, vocabulary).to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
        words = len(vocabulary.directions)
        for _ in range(steps):
            some = torch.randint(len(rows), (batch,), generator=generator).to(device)
            others = torch.randint(words, (_OTHERS,), generator=generator).to(device)
            known, places = torch.cat([ids[some], others]).unique(return_inverse=True)
            loss = cross_entropy(model(rows[some]) @ vocabulary.directions[known].T, places[:batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        return model.eval()

    @torch.no_grad()
    def guess(self, rows: Tensor, count: int) -> Tensor:
        """Tokens (T, count), best first, of the rows (T, d) of one text."""
        return self.vocabulary.nearest(self(rows), count)
