"""Prompts and responses from rows: plain text, the Alpaca format, or the model's chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raycloud.data.files import optional_text_in, text_in
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.models.texts import Bos, TextBounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["plain", "alpaca", "chat"]

_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_PAIRED = ", paired with an input that provides further context"
_MARK = "\x00body\x00"


@dataclass(frozen=True)
class Prompt:
    """Prompt in three pieces: a long prompt is shortened in its body, so that the cue to answer is always kept."""

    before: str
    body: str
    after: str

    @property
    def text(self) -> str:
        """Whole prompt."""
        return self.before + self.body + self.after


def alpaca(instruction: str, given: str = "") -> Prompt:
    """Alpaca prompt (Taori et al. 2023), byte for byte the same as in the code of the distillation papers."""
    if given:
        before = f"{_INTRO.format(_PAIRED)}\n\n### Instruction:\n{instruction}\n\n### Input:\n"
        return Prompt(before, given, "\n\n### Response:\n")
    return Prompt(f"{_INTRO.format('')}\n\n### Instruction:\n", instruction, "\n\n### Response:\n")


def chat(tokenizer: PreTrainedTokenizerBase, instruction: str, given: str = "") -> Prompt:
    """Prompt in the model's own chat template.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError("format 'chat' needs a tokenizer with a chat template; allowed without: plain, alpaca")
    content = f"{instruction}\n\n{_MARK}" if given else _MARK
    messages = [{"role": "user", "content": content}]
    rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = rendered.split(_MARK)
    return Prompt(before, given or instruction, after)


def prompt_and_response(row: Row, form: Format, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, str]:
    """Prompt and response of a row.

    Raises:
        DataError: the row lacks a column that the format needs, or its value there is no text.
    """
    if form == "plain":
        return Prompt("", "", ""), _needed(row, "text", form)
    instruction, output = (_needed(row, column, form) for column in ("instruction", "output"))
    given = optional_text_in(row, "input")
    prompt = alpaca(instruction, given) if form == "alpaca" else chat(tokenizer, instruction, given)
    return prompt, output


def check_rows(rows: Iterable[Row], form: Format) -> None:
    """Refuse rows without the columns that a format needs; no tokenizer is required.

    Raises:
        DataError: see :func:`prompt_and_response`.
    """
    for row in rows:
        if form == "plain":
            _needed(row, "text", form)
        else:
            _needed(row, "instruction", form)
            _needed(row, "output", form)
            optional_text_in(row, "input")


def bounds_of(tokenizer: PreTrainedTokenizerBase, form: Format, bos: Bos = "auto") -> TextBounds:
    """Bounds of the texts of a format.

    Raises:
        ModelError: the tokenizer has no BOS token that ``bos`` requires, or no token that ends an answer.
    """
    bounds = TextBounds.of(tokenizer, bos, chat=form == "chat")
    if form != "plain":
        _ = bounds.answer
    return bounds


def default_format(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Format:
    """Default format of rows: the chat template if the rows are instructions and the model has one."""
    if "instruction" not in rows[0]:
        return "plain"
    return "chat" if tokenizer.chat_template else "alpaca"


def _needed(row: Row, column: str, form: Format) -> str:
    if column not in row:
        raise DataError(f"format '{form}' needs the text column '{column}'; the rows have: {', '.join(row)}")
    return text_in(row, column)
