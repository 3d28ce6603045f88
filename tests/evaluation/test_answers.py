"""Answers in a batch equal those of each prompt alone; greedy ones equal those of the stock model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.evaluation.answers import answer_text, generate_answers
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.models.cache import KVCache
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.segments import Segment
from tests.models.families import FAMILIES, tiny

CAUSAL = [name for name in FAMILIES if name != "bert"]
_random = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(3, 97, (n,), generator=_random).tolist() for n in (1, 4, 19, 7, 4, 11, 2)]
ENDS = frozenset(range(3, 12))
"""Number of questions for which answers end at different times."""


def how(**changes: float) -> GenerationRecipe:
    return GenerationRecipe.model_validate(
        {"max_new_tokens": 24, "no_repeat_ngram_size": 3, "batch_size": 5, **changes}
    )


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("ngram", [0, 2])
def test_greedy_equals_stock_generate(family: str, ngram: int) -> None:
    model = tiny(family)
    made = generate_answers(
        Segment(model), PROMPTS, how(temperature=0, no_repeat_ngram_size=ngram, max_new_tokens=16), seed=1, ends=ENDS
    )
    for prompt, answer in zip(PROMPTS, made, strict=True):
        stock = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=list(ENDS),
            no_repeat_ngram_size=ngram,
        )[0, len(prompt) :].tolist()
        assert answer == (stock[:-1] if stock[-1] in ENDS else stock)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("narrow", [{}, {"top_p": 0.8, "top_k": 20, "temperature": 1.5}])
def test_neither_batch_nor_order_changes_an_answer(family: str, narrow: dict[str, float]) -> None:
    model = Segment(tiny(family))
    together = generate_answers(model, PROMPTS, how(**narrow), seed=10, ends=ENDS)
    assert len({len(answer) for answer in together}) > 3
    assert generate_answers(model, PROMPTS, how(**narrow, batch_size=1), seed=10, ends=ENDS) == together
    order = [3, 6, 0, 5, 1, 4, 2]
    moved = generate_answers(
        model, [PROMPTS[i] for i in order], how(**narrow, batch_size=3), seed=10, ends=ENDS, numbers=order
    )
    assert moved == [together[i] for i in order]
    assert generate_answers(model, PROMPTS, how(**narrow), seed=11, ends=ENDS) != together
    # Prompts 1 and 4 are as long as each other; the same prompt under two numbers is answered in two ways.
    twice = generate_answers(model, [PROMPTS[1], PROMPTS[1]], how(**narrow), seed=10, ends=ENDS, numbers=[1, 4])
    assert twice[0] == together[1] and twice[1] != twice[0]


def test_single_precision_does_not_matter_either() -> None:
    model = Segment(tiny("llama", dtype=torch.float32))
    long = how(max_new_tokens=60)
    assert generate_answers(model, PROMPTS, long, seed=3) == generate_answers(
        model, PROMPTS, how(max_new_tokens=60, batch_size=1), seed=3
    )


def test_ended_answers_leave_the_batch() -> None:
    model = Segment(tiny("llama"))
    sizes: list[int] = []
    whole = model.hidden

    def watched(x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        sizes.append(x.shape[0])
        return whole(x, valid=valid, cache=cache)

    model.hidden = watched  # type: ignore[method-assign]
    done: list[int] = []
    made = generate_answers(model, PROMPTS, how(batch_size=7), seed=10, ends=ENDS, progress=done.append)
    assert done == [7]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 7 and sizes[-1] <= 3
    assert len(sizes) == min(24, 1 + max(map(len, made)))


def test_padding_is_no_token_that_was_said() -> None:
    model = Segment(tiny("llama"))
    model.logits = lambda rows: -torch.arange(97.0).expand(len(rows), -1)  # type: ignore[method-assign]
    made = generate_answers(
        model, [[5], [7, 1, 9]], how(temperature=0, no_repeat_ngram_size=1, max_new_tokens=3), seed=0
    )
    assert made == [[0, 1, 2], [0, 2, 3]]


def test_an_answer_is_bound_by_its_tokens_and_prompts_are_checked() -> None:
    model = Segment(tiny("llama"))
    assert [len(answer) for answer in generate_answers(model, PROMPTS, how(max_new_tokens=5), seed=0)] == [5] * len(
        PROMPTS
    )
    assert generate_answers(model, [], how(), seed=0) == []
    with pytest.raises(ValueError, match="empty prompt"):
        generate_answers(model, [[5], []], how(), seed=0)
    with pytest.raises(ValueError, match="2 prompts need as many numbers, got 1"):
        generate_answers(model, [[5], [6]], how(), seed=0, numbers=[0])


def test_text_ends_at_a_literal_end_of_text() -> None:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    spelled = [
        *tokenizer(" A wolf <|")["input_ids"],
        *tokenizer("endoftext")["input_ids"],
        *tokenizer("|> B")["input_ids"],
    ]
    assert answer_text(spelled, tokenizer) == "A wolf"
    assert answer_text(tokenizer("\n A wolf .\n")["input_ids"], tokenizer) == "A wolf ."
    assert answer_text([], tokenizer) == ""
