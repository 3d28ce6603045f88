"""Attack on summaries of many texts: is a word among them? One classifier for each word, and its area under the curve.

The attacker knows the model and has texts of the same kind. He plants the word in some of them, sees what the summaries
of windows with and without it look like, and guesses for windows of other texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

_SHRUNK = 0.1
"""Share of the diagonal in the covariance of hidden states, which has more coordinates than there are texts."""


def area_under_curve(scores: Tensor, truth: Tensor) -> float:
    """Chance that a window with the word scores above one without, 0.5 for guesses; ties count half.

    Args:
        scores: (n,) of the windows.
        truth: (n,), True for those with the word; some are True, and some are not.
    """
    apart = scores[truth][:, None] - scores[~truth][None, :]
    if not apart.numel():
        raise ValueError("windows with and without the word are needed")
    return float(((apart > 0).double() + 0.5 * (apart == 0).double()).mean())


def presence_area(known: Tensor, known_truth: Tensor, seen: Tensor, truth: Tensor, penalty: float = 1e-2) -> float:
    """Fit a logistic regression on the attacker's windows, and return its area under the curve on those that he sees.

    Args:
        known: (n, k) features of the attacker's own windows.
        known_truth: (n,), True for windows with the word.
        seen: (m, k) features of the windows under attack.
        truth: (m,), which the attacker does not know.
        penalty: weight of the squared coefficients of standardised features.
    """
    mean, scale = known.double().mean(0), known.double().std(0).clamp_min(1e-12)
    inputs, target = (known.double() - mean) / scale, known_truth.double()
    weight = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        found = binary_cross_entropy_with_logits(inputs @ weight[1:] + weight[0], target)
        found = found + penalty * weight[1:].square().sum()
        found.backward()
        return found

    solver.step(loss)
    return area_under_curve((seen.double() - mean) / scale @ weight.detach()[1:], truth)


def word_directions(plain: Sequence[Tensor], planted: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Direction at each tap along which a word shifts the mean of a window most against what texts differ by.

    Linear discriminant: the inverse covariance of texts times the mean shift.

    Args:
        plain: hidden states of the attacker's texts, (n, d) at each tap.
        planted: those of some texts with the word, (k, d).
        before: those of the same texts without it, (k, d).
    """
    found = []
    for texts, after, base in zip(plain, planted, before, strict=True):
        covariance = torch.cov(texts.double().T)
        diagonal = covariance.diagonal().clamp_min(1e-12)
        shrunk = (1 - _SHRUNK) * covariance + _SHRUNK * torch.diag(diagonal)
        shift = (after.double() - base.double()).mean(0)
        found.append(torch.linalg.solve(shrunk, shift).float())
    return tuple(found)
