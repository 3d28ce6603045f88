"""Choice of the next token: processors of transformers, and OpenAI's formula of penalties, on the same logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raycloud.errors import ModelError
from raycloud.evaluation.answers import generate_answers
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.models.generation import greedy
from raycloud.models.logprobs import scores_of
from raycloud.models.sampling import Sampler, Sampling, apply_penalties, distribution
from raycloud.models.segments import Segment
from tests.models.families import tiny

SIZE = 40
CPU = torch.device("cpu")


def case(seed: int) -> tuple[torch.Tensor, list[int]]:
    """Make logits, and previous tokens with many repeats."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 6, (30,), generator=random).tolist()
    return 3 * torch.randn(SIZE, generator=random), tokens


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.4, "min_p": 0.05},
        {"temperature": 1.7, "top_k": 12, "min_p": 0.02},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.1},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {
            "repetition_penalty": 0.7,
            "no_repeat_ngram_size": 3,
            "temperature": 0.9,
            "top_k": 9,
            "top_p": 0.7,
            "min_p": 0.03,
        },
        {"logit_bias": ((3, 2.5), (17, -100.0)), "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_as_transformers(how: dict[str, Any], seed: int) -> None:
    logits, tokens = case(seed)
    sampling = Sampling(**{"temperature": 1.0, **how})
    stock = LogitsProcessorList()
    if sampling.logit_bias:
        stock.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in sampling.logit_bias]))
    if sampling.repetition_penalty != 1:
        stock.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        stock.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    stock.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        stock.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        stock.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        stock.append(MinPLogitsWarper(sampling.min_p))
    expected = stock(torch.tensor([tokens]), logits[None].clone())[0].softmax(-1)
    ours = distribution(apply_penalties(logits, sampling, tokens, prompt=10), sampling)
    assert torch.equal(ours > 0, expected > 0)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-8)


def test_presence_and_frequency_are_openais_formula() -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c[j] being how often j was sampled before
    (OpenAI, API guide "Frequency and presence penalties"): the prompt does not count."""
    logits, tokens = case(3)
    for presence, frequency in ((0.6, 0.0), (0.0, 1.1), (-0.4, 0.3), (2.0, 2.0)):
        ours = apply_penalties(
            logits, Sampling(presence_penalty=presence, frequency_penalty=frequency), tokens, prompt=20
        )
        for token in range(SIZE):
            count = tokens[20:].count(token)
            expected = float(logits[token]) - count * frequency - float(count > 0) * presence
            assert float(ours[token]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(apply_penalties(logits, Sampling(presence_penalty=2.0), tokens, prompt=30), logits)


def test_no_end_before_min_tokens() -> None:
    logits, tokens = case(0)
    logits[[5, 7]] = 50.0  # the ends
    sampler = Sampler(Sampling(min_tokens=3), CPU, tokens, ends={5, 7, SIZE + 9})
    ids = torch.tensor([tokens])
    made = []
    for _ in range(5):
        stock = MinNewTokensLengthLogitsProcessor(len(tokens), 3, [5, 7], device="cpu")
        expected = int(stock(ids, logits[None].clone()).argmax())
        made.append(sampler.pick(logits))
        assert made[-1] == expected
        ids = torch.cat([ids, torch.tensor([[expected]])], dim=1)
    assert not {5, 7} & set(made[:3]) and {5, 7} & set(made[3:])


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.9, "min_p": 0.1}])
def test_a_temperature_near_zero_is_greedy(temperature: float, more: dict[str, Any]) -> None:
    logits, _ = case(1)
    chances = distribution(logits, Sampling(temperature=temperature, **more))
    assert torch.isfinite(chances).all() and int(chances.argmax()) == int(logits.argmax())
    assert float(chances.max()) == pytest.approx(1)
    assert Sampler(Sampling(temperature=temperature, **more), CPU).pick(logits) == int(logits.argmax())


@pytest.mark.parametrize("penalty", [1e-40, 1e-300, 1e300])
def test_penalties_beyond_all_measure_choose_all_the_same(penalty: float) -> None:
    logits, tokens = case(2)
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty, seed=1), CPU, tokens)
        picked = {sampler.pick(logits) for _ in range(5)}
        liked = {token for token in tokens if logits[token] > 0}
        assert picked <= liked if penalty < 1 else picked <= set(range(SIZE))


class Only:
    """Constraint that allows one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(torch.arange(len(logits)) != self.token, -torch.inf)

    def accept(self, token: int) -> None:
        assert token == self.token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_comes_before_all_other_rules(temperature: float) -> None:
    logits, _ = case(4)
    how = Sampling(temperature=temperature, no_repeat_ngram_size=1, min_tokens=9)
    assert Sampler(how, CPU, [7], {5}, Only(7)).pick(logits) == 7
    assert Sampler(how, CPU, [7], {5}, Only(5)).pick(logits) == 5


def test_what_is_no_way_to_choose() -> None:
    for wrong in ({"min_p": 1.5}, {"presence_penalty": float("nan")}, {"no_repeat_ngram_size": -1}, {"min_tokens": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_logits_that_are_not_finite_nothing_is_chosen(odd: float, temperature: float) -> None:
    """Regression: argmax of NaN is the first token, so a diverged model kept generating it."""
    logits = torch.full((SIZE,), odd)
    if odd > 0 or math.isnan(odd):
        logits[1:] = 0.0
    said = f"the model's logits are not finite \\({odd}\\), so no token can be chosen"
    with pytest.raises(ModelError, match=said):
        Sampler(Sampling(temperature=temperature), CPU).pick(logits)
    with pytest.raises(ModelError, match=said):
        scores_of(logits[None], [3], 1)
    masked = torch.full((SIZE,), -math.inf)
    masked[4] = 0.0  # some models rule tokens out themselves
    assert Sampler(Sampling(temperature=temperature), CPU).pick(masked) == 4


def test_a_model_of_nan_continues_no_prompt() -> None:
    model = tiny("llama", dtype=torch.float32)
    torch.nn.init.constant_(next(iter(model.parameters())), math.nan)
    how = GenerationRecipe(max_new_tokens=2, temperature=0)
    with pytest.raises(ModelError, match=r"logits are not finite \(nan\)"):
        greedy(Segment(model), [[5, 6]], 4)
    with pytest.raises(ModelError, match=r"logits are not finite \(nan\)"):
        generate_answers(Segment(model), [[5, 6]], how, seed=1)
