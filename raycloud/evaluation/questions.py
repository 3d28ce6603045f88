"""From rows to questions: the tokens a model is asked with, and the answers that would be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample
from raycloud.data.prompts import Format, Prompt, example
from raycloud.data.splits import Row, spread
from raycloud.errors import DataError


@dataclass(frozen=True)
class Question:
    """One row of a set as one model reads it."""

    number: int
    """The row's place in the whole set: its draws depend on it, so a limit changes none of them."""
    prompt: str
    ids: tuple[int, ...]
    references: tuple[str, ...]


def ask(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, form: Format, *, max_prompt: int, limit: int | None = None
) -> list[Question]:
    """Questions of the rows, tokenised without special tokens as for training.

    ``plain`` asks the instruction and its input without a template. A prompt over ``max_prompt`` tokens is shortened in
    its body, so that the cue to answer stays.

    Raises:
        DataError: a row lacks an instruction or references, asks nothing, or the format does not suit the tokenizer.
    """
    return [_question(place, rows[place], tokenizer, form, max_prompt) for place in spread(len(rows), limit)]


def _question(number: int, row: Row, tokenizer: PreTrainedTokenizerBase, form: Format, max_prompt: int) -> Question:
    references = _references(number, row)
    if not isinstance(row.get("instruction"), str):
        raise DataError(
            f"row {number}: an evaluation needs the text column 'instruction'; the row has: {', '.join(row)}"
        )
    prompt = _prompt(row, form, tokenizer)
    pieces = (prompt.text, prompt.before, prompt.body, prompt.after)
    ids, before, body, after = tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
    text = prompt.text
    if len(ids) > max_prompt:
        ids = [*before, *body[: max(0, max_prompt - len(before) - len(after))], *after]
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if not ids:
        raise DataError(f"row {number}: the prompt is empty")
    return Question(number, text, tuple(ids), references)


def _references(number: int, row: Row) -> tuple[str, ...]:
    output = row.get("output")
    found = [output] if isinstance(output, str) else output
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise DataError(f"row {number}: 'output' must be a text or a list of texts, got {output!r}")
    return tuple(found)


def _prompt(row: Row, form: Format, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if form == "plain":
        return Prompt("", "\n\n".join(filter(None, (row["instruction"], row.get("input")))), "")
    return example({**row, "output": ""}, form, tokenizer)[0]


def references(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Sample]:
    """Every reference as the response to its prompt, ended by EOS; what leaves nothing to predict is left out.

    Raises:
        DataError: nothing is left within ``max_length`` tokens.
    """
    asked = [(question, text) for question in questions for text in question.references]
    ids = tokenizer([text for _, text in asked], add_special_tokens=False)["input_ids"]
    samples = [
        Sample((*question.ids, *answer, tokenizer.eos_token_id)[:max_length], len(question.ids))
        for (question, _), answer in zip(asked, ids, strict=True)
    ]
    kept = [sample for sample in samples if sample.targets > 0]
    if not kept:
        raise DataError(f"no reference leaves a token to predict within max_length={max_length}")
    return kept
