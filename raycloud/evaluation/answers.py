"""Answers to many prompts: batched, left-padded, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.evaluation.sampling import NOTHING, pick
from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment
from raycloud.models.text import end_ids

END_OF_TEXT = "<|endoftext|>"
"""Ends an answer also where it is not the model's EOS, as token or as text."""


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a model's answer."""
    ends = end_ids(tokenizer, model.config, model.generation_config)
    end_of_text = tokenizer.get_vocab().get(END_OF_TEXT)
    return ends if end_of_text is None else ends | {end_of_text}


def answers(
    model: Segment,
    prompts: Sequence[Sequence[int]],
    how: GenerationRecipe,
    *,
    seed: int,
    ends: Collection[int] = (),
    numbers: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The continuation of each prompt, up to and without the first of ``ends``.

    An answer depends on model, prompt, ``how``, seed and the prompt's number, not on the batch it is written in (but
    for rounding, where two tokens nearly tie).

    Args:
        model: the whole model.
        prompts: token ids.
        how: length, temperature and the rest.
        seed: of the draws.
        ends: ids that end a text.
        numbers: what tells the draws of one prompt from another's; its place if None.
        progress: told how many answers are done.

    Raises:
        ValueError: a prompt is empty, or there are not as many numbers as prompts.
    """
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    named = list(range(len(prompts)) if numbers is None else numbers)
    if len(named) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many numbers, got {len(named)}")
    made: dict[int, list[int]] = {}
    # The longest first: what does not fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), how.batch_size):
        batch = order[start : start + how.batch_size]
        texts = {place: list(prompts[place]) for place in batch}
        _continue(model, texts, {place: named[place] for place in batch}, how, seed, frozenset(ends))
        made |= {place: text[len(prompts[place]) :] for place, text in texts.items()}
        progress(len(made))
    return [made[place] for place in range(len(prompts))]


@torch.no_grad()
def _continue(
    model: Segment,
    texts: dict[int, list[int]],
    numbers: dict[int, int],
    how: GenerationRecipe,
    seed: int,
    ends: frozenset[int],
) -> None:
    """Append to every text up to its end.

    When half of a batch has ended, the rest starts again as a smaller one: reading a text anew is cheap beside
    carrying finished ones along.
    """
    device = next(model.parameters()).device
    live, step = list(texts), 0
    while live and step < how.new_tokens:
        batch, cache = live, KVCache()
        rows, valid = _left_padded([texts[place] for place in batch], device)
        history = rows.masked_fill(~valid, NOTHING)
        named = torch.tensor([numbers[place] for place in batch], device=device)
        mask = None if bool(valid.all()) else valid
        while 2 * len(live) > len(batch) and step < how.new_tokens:
            logits = model.logits(model.rows(rows, valid=mask, cache=cache)[:, -1])
            tokens = pick(logits, history, how, seed=seed, numbers=named, step=step)
            drawn = dict(zip(batch, tokens.tolist(), strict=True))
            live = [place for place in live if drawn[place] not in ends]
            for place in live:
                texts[place].append(drawn[place])
            rows, mask, step = tokens[:, None], None, step + 1
            history = torch.cat([history, rows], dim=1)


def _left_padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), and which of them are real (B, T)."""
    lengths = torch.tensor([len(text) for text in texts])
    slots = torch.arange(int(lengths.max()))
    valid = slots >= slots.shape[0] - lengths[:, None]
    ids = torch.zeros(valid.shape, dtype=torch.long)
    ids[valid] = torch.tensor([token for text in texts for token in text])
    return ids.to(device), valid.to(device)


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """An answer as text: cut at a literal ``<|endoftext|>``, stripped."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.partition(END_OF_TEXT)[0].strip()
