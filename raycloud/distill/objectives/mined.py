"""Distillation through a map between vocabularies (MinED; FuseLLM, Wan et al. 2024, arXiv 2401.10491)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.objective import Compat, TeacherAt, TokenObjective, Vocabularies
from raycloud.distill.signals import SignalKind


def carried_over(p: Tensor, words: Vocabularies, size: int) -> Tensor:
    """A teacher's probabilities (c, W) as probabilities of the student's ``size`` words (c, V), of those it can name.

    Every word of the teacher gives its probability to the words it is mapped to; what is mapped to none is lost, and
    the rest is made a distribution again.
    """
    mine, theirs, weights = words.edges
    given = p.new_zeros(p.shape[0], size).index_add_(1, mine, p[:, theirs] * weights.to(p.dtype))
    return given / given.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def covered_kl(p: Tensor, logits: Tensor, covered: Tensor) -> Tensor:
    """KL(p‖q) (c,) with q over the covered words (V,) only.

    A word that none of the teacher's stands for has p = 0 because nobody could say it: no reason to unlearn it.
    """
    log_q = logits.masked_fill(~covered, -torch.inf).log_softmax(dim=-1).masked_fill(~covered, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum(dim=-1)


def first_named(logits: Tensor, words: Vocabularies, size: int) -> Tensor:
    """A teacher's logits (c, W) as logits of the student's ``size`` words (c, V), as published.

    Of the teacher's words that mean one of the student's the first speaks for all, and a word that none means has −∞.
    """
    mine, theirs, _ = words.edges
    none = logits.shape[-1]
    first = torch.full((size,), none, device=logits.device).scatter_reduce(0, mine, theirs, "amin")
    return nn.functional.pad(logits, (0, 1), value=-torch.inf)[:, first]


class MinED(TokenObjective):
    """Forward KL at tokens that both tokenizers have, with the teacher's words replaced by the student's nearest.

    Not reproduced of the published program: tokens paired by warping edit distances, and a map from every word to its
    nearest, however far. Both options take partners and words from the bytes.
    """

    name: Literal["mined"] = "mined"
    kinds: ClassVar[tuple[SignalKind, ...]] = ("hidden", "logits")
    temperature: float = Field(2.0, gt=0)
    """Divides both models' logits."""
    k: int | None = Field(None, gt=0)
    """Words of the teacher that are carried over, the most likely ones; None for all."""
    compat: Compat = "ours"
    """``published`` has one of the teacher's words speak for each of the student's (see :func:`first_named`), pushes
    down the words that none speaks for, and at tokens without a partner teaches the data's own next token; ``k`` is not
    used."""

    @property
    def needs_partner(self) -> bool:
        """The published loss has a term where there is none."""
        return self.compat == "ours"

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAt) -> Tensor:
        """The divergence of each token (c,).

        Raises:
            ValueError: there is no map between the vocabularies.
        """
        words = teacher.teacher.words
        if words is None:
            raise ValueError(
                "objective 'mined' needs a map between the vocabularies; with one tokenizer use forward_kl"
            )
        if self.compat == "published":
            return self._published(logits, labels, teacher, words)
        with torch.no_grad():
            p = (teacher.logits() / self.temperature).softmax(dim=-1)
            if self.k is not None and self.k < p.shape[-1]:
                top = p.topk(self.k, dim=-1)
                p = torch.zeros_like(p).scatter_(1, top.indices, top.values)
            target = carried_over(p, words, logits.shape[-1]).to(logits.dtype)
            covered = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            covered[words.edges[0]] = True
        return covered_kl(target, logits / self.temperature, covered)

    def _published(self, logits: Tensor, labels: Tensor, teacher: TeacherAt, words: Vocabularies) -> Tensor:
        log_q = (logits / self.temperature).log_softmax(dim=-1)
        values = -log_q.gather(-1, labels[:, None])[:, 0]
        with torch.no_grad():
            p = (first_named(teacher.logits(), words, logits.shape[-1]) / self.temperature).softmax(dim=-1)
            p = p.to(logits.dtype)
        paired = slice(None) if teacher.found is None else teacher.found
        divergence = (torch.xlogy(p, p) - p * log_q[paired]).sum(dim=-1)
        return values.index_put((torch.arange(len(values), device=values.device)[paired],), divergence)
