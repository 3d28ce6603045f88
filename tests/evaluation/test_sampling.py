"""Sampling is a pure function of seed, text, step and token, and follows the model's distribution."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.evaluation.sampling import (
    PADDING_ID,
    gumbel_noise,
    mask_repeated_ngrams,
    sample_tokens,
    splitmix,
    top_k_top_p,
)
from raycloud.models.sampling import Sampling, distribution


def test_splitmix_gives_the_published_numbers() -> None:
    made = splitmix(torch.tensor(1234567), torch.arange(1, 4))
    assert [number % 2**64 for number in made.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_noise_is_gumbel_noise() -> None:
    made = gumbel_noise(3, torch.arange(8), 5, 50_000)
    assert made.shape == (8, 50_000) and bool(made.isfinite().all())
    for row in made:
        assert float(row.mean()) == pytest.approx(0.5772, abs=0.03)
        assert float(row.var()) == pytest.approx(math.pi**2 / 6, abs=0.06)
    uniform = (-(-made).exp()).exp()
    assert (torch.histc(uniform, 100, 0, 1) / 4_000 - 1).abs().max() < 0.07


def test_noise_is_of_seed_text_step_and_token_alone() -> None:
    numbers = torch.tensor([4, 0, 9])
    made = gumbel_noise(7, numbers, 2, 1000)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(gumbel_noise(7, numbers[order], 2, 1000), made[order])
    assert torch.equal(gumbel_noise(7, numbers[1:2], 2, 400), made[1:2, :400])
    streams = [gumbel_noise(seed, numbers, step, 1000) for seed in (0, 1, 7, 2**62) for step in (0, 1, 2)]
    assert torch.corrcoef(torch.cat(streams)).fill_diagonal_(0).abs().max() < 0.2


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5])
    many = 40_000
    how = GenerationRecipe(temperature=0.7, no_repeat_ngram_size=0)
    history = torch.zeros(many, 0, dtype=torch.long)
    drawn = sample_tokens(logits.expand(many, -1), history, how, seed=1, numbers=torch.arange(many), step=0)
    shares = torch.bincount(drawn, minlength=6) / many
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.008)
    assert shares[4] == 0


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_no_repeated_ngrams_as_transformers(size: int) -> None:
    """Each padded row against the library's rule on that row alone."""
    random = torch.Generator().manual_seed(size)
    stock, banned = NoRepeatNGramLogitsProcessor(size), 0
    for length in (1, 2, 5, 80):
        lengths = torch.randint(0, length + 1, (50,), generator=random)
        lengths[0] = length
        history = torch.randint(0, 2, (50, length), generator=random)
        history[torch.arange(length) < length - lengths[:, None]] = PADDING_ID
        logits = torch.randn(50, 3, generator=random)
        ours = mask_repeated_ngrams(logits, history, size)
        for row, one, known, made in zip(history, logits, lengths, ours, strict=True):
            expected = stock(row[length - int(known) :][None], one[None].clone())[0]
            assert torch.equal(made, expected)
            banned += int(expected.isinf().sum())
    assert banned > 20


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8), (1, 0.1), (500, 0.95)])
def test_narrowing_as_transformers_and_as_the_servers_sampling(top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(top_k))
    ours = top_k_top_p(logits, top_k, top_p)
    stock = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    stock = TopPLogitsWarper(top_p)(None, stock) if top_p < 1 else stock
    assert torch.equal(ours, stock)
    for one, row in zip(ours, logits, strict=True):
        assert torch.allclose(one.softmax(-1), distribution(row, Sampling(1.0, top_k, top_p)))


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.randn(4, 30)
    how = GenerationRecipe(temperature=0, no_repeat_ngram_size=0)
    empty = torch.zeros(4, 0, dtype=torch.long)
    assert torch.equal(sample_tokens(logits, empty, how, seed=0, numbers=torch.arange(4), step=0), logits.argmax(-1))
