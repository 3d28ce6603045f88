"""Generation of answers to many prompts: batched, left-padded, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.evaluation.sampling import PADDING_ID, sample_tokens
from raycloud.models.segments import Segment
from raycloud.models.texts import end_ids

END_OF_TEXT = "<|endoftext|>"
"""End-of-text token that ends an answer, as a token or as text, even if it is not the model's EOS."""


def answer_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end a model's answer."""
    ends = end_ids(tokenizer, model.config, model.generation_config)
    end_of_text = tokenizer.get_vocab().get(END_OF_TEXT)
    return ends if end_of_text is None else ends | {end_of_text}


def generate_answers(
    model: Segment,
    prompts: Sequence[Sequence[int]],
    how: GenerationRecipe,
    *,
    seed: int,
    ends: Collection[int] = (),
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Generate the continuation of each prompt, up to the first token of ``ends``, which is left out.

    An answer depends on model, prompt, ``how``, seed and the prompt's number, not on the other prompts of its batch
    (except for rounding, if two tokens nearly tie).

    Args:
        model: the whole model.
        prompts: token ids of each prompt.
        how: generation settings.
        seed: seed of the sampling.
        ends: ids that end an answer.
        numbers: one number per prompt that selects its random draws; the prompt's index if None.
        progress: called with the number of finished answers.

    Raises:
        ValueError: a prompt is empty, or the number of ``numbers`` differs from that of the prompts.
        ModelError: the model's logits are not finite.
    """
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    named = list(range(len(prompts)) if numbers is None else numbers)
    if len(named) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many numbers, got {len(named)}")
    made: dict[int, list[int]] = {}
    # The longest prompts first, so that a batch too large for the memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), how.batch_size):
        batch = order[start : start + how.batch_size]
        texts = {index: list(prompts[index]) for index in batch}
        _continue(model, texts, {index: named[index] for index in batch}, how, seed, frozenset(ends))
        made |= {index: text[len(prompts[index]) :] for index, text in texts.items()}
        progress(len(made))
    return [made[index] for index in range(len(prompts))]


@torch.no_grad()
def _continue(
    model: Segment,
    texts: dict[int, list[int]],
    numbers: dict[int, int],
    how: GenerationRecipe,
    seed: int,
    ends: frozenset[int],
) -> None:
    """Append tokens to every text until it ends.

    When half of a batch has ended, the rest is restarted as a smaller batch: a new prefill is cheap compared with
    computing finished texts further.
    """
    device = next(model.parameters()).device
    live, step = list(texts), 0
    while live and step < how.max_new_tokens:
        batch, cache = live, model.new_cache()
        ids, valid = _left_padded([texts[index] for index in batch], device)
        history = ids.masked_fill(~valid, PADDING_ID)
        named = torch.tensor([numbers[index] for index in batch], device=device)
        mask = None if bool(valid.all()) else valid
        while 2 * len(live) > len(batch) and step < how.max_new_tokens:
            logits = model.logits(model.hidden(ids, valid=mask, cache=cache)[:, -1])
            tokens = sample_tokens(logits, history, how, seed=seed, numbers=named, step=step)
            drawn = dict(zip(batch, tokens.tolist(), strict=True))
            live = [index for index in live if drawn[index] not in ends]
            for index in live:
                texts[index].append(drawn[index])
            ids, mask, step = tokens[:, None], None, step + 1
            history = torch.cat([history, ids], dim=1)


def _left_padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, T), and the mask of the positions that are not padding (B, T)."""
    lengths = torch.tensor([len(text) for text in texts])
    slots = torch.arange(int(lengths.max()))
    valid = slots >= slots.shape[0] - lengths[:, None]
    ids = torch.zeros(valid.shape, dtype=torch.long)
    ids[valid] = torch.tensor([token for text in texts for token in text])
    return ids.to(device), valid.to(device)


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode an answer, cut it at a literal ``<|endoftext|>``, and strip it."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.partition(END_OF_TEXT)[0].strip()
