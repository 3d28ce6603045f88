"""Questions made from rows: the prompt's tokens, and the reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample, shortened_prompt
from raycloud.data.files import LocatedRow, describe_value, location_of, optional_text_in, text_in
from raycloud.data.prompts import Format, Prompt, bounds_of, prompt_and_response
from raycloud.data.splits import Row, evenly_spread_indices
from raycloud.errors import DataError
from raycloud.models.texts import Bos, TextBounds


@dataclass(frozen=True)
class EvaluationQuestion:
    """One row of a data set, tokenised for one model."""

    number: int
    """Index of the row in the whole set. The row's random draws depend on it, so they do not change with a limit."""
    prompt: str
    ids: tuple[int, ...]
    references: tuple[str, ...]


def build_questions(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    form: Format,
    *,
    max_prompt_length: int,
    limit: int | None = None,
    bos: Bos = "auto",
) -> list[EvaluationQuestion]:
    """Build the questions of the rows, tokenised as for training.

    ``plain`` uses the instruction and its input without a template. A prompt over ``max_prompt_length`` tokens
    is shortened in its body, so that the template's end, which asks for the answer, is kept.

    Raises:
        DataError: a row has no instruction, no references or an empty prompt, or the format does not fit the tokenizer.
    """
    bounds = bounds_of(tokenizer, form, bos)
    return [
        _question(index, rows[index], tokenizer, form, max_prompt_length, bounds)
        for index in evenly_spread_indices(len(rows), limit)
    ]


def _question(
    number: int, row: Row, tokenizer: PreTrainedTokenizerBase, form: Format, max_prompt_length: int, bounds: TextBounds
) -> EvaluationQuestion:
    references = _references(number, row)
    if "instruction" not in row:
        raise DataError(
            f"row {number}: an evaluation needs the text column 'instruction'; the row has: {', '.join(row)}"
        )
    prompt = _prompt(row, form, tokenizer)
    text = prompt.text
    if not text:
        raise DataError(f"row {number}: the prompt is empty")
    ids = bounds.begun(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) > max_prompt_length:
        ids = shortened_prompt(prompt, tokenizer, bounds, max_prompt_length)
        text = str(tokenizer.decode(ids[len(bounds.begin) :], clean_up_tokenization_spaces=False))
    return EvaluationQuestion(number, text, tuple(ids), references)


def _references(number: int, row: Row) -> tuple[str, ...]:
    output = row.get("output")
    found = [output] if isinstance(output, str) else output
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise DataError(
            f"{location_of(row, f'row {number}')}: 'output' is {describe_value(output)}; allowed: a text, or "
            "a list of texts"
        )
    return tuple(found)


def _prompt(row: Row, form: Format, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    if form == "plain":
        return Prompt("", "\n\n".join(filter(None, (text_in(row, "instruction"), optional_text_in(row, "input")))), "")
    return prompt_and_response(LocatedRow({**row, "output": ""}, location_of(row)), form, tokenizer)[0]


def references(
    questions: Sequence[EvaluationQuestion], tokenizer: PreTrainedTokenizerBase, form: Format, max_length: int
) -> list[Sample]:
    """Samples with every reference as the response to its prompt, ended as an answer; samples without a token to
    predict within ``max_length`` are left out.

    Raises:
        DataError: no sample is left.
    """
    asked = [(question, text) for question in questions for text in question.references]
    ids = tokenizer([text for _, text in asked], add_special_tokens=False)["input_ids"]
    end = bounds_of(tokenizer, form).answer
    samples = [
        Sample((*question.ids, *answer, *end)[:max_length], len(question.ids))
        for (question, _), answer in zip(asked, ids, strict=True)
    ]
    kept = [sample for sample in samples if sample.targets > 0]
    if not kept:
        raise DataError(f"no reference leaves a token to predict within max_length={max_length}")
    return kept
