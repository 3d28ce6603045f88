"""From rows to a prompt and the response to learn: plain text, the Alpaca format, or the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from raycloud.data.splits import Row
from raycloud.errors import DataError

Format = Literal["plain", "alpaca", "chat"]

_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_PAIRED = ", paired with an input that provides further context"
_MARK = "\x00body\x00"


@dataclass(frozen=True)
class Prompt:
    """A prompt in three pieces: a long one is shortened in its body, so that the cue to answer always stays."""

    before: str
    body: str
    after: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.before + self.body + self.after


def alpaca(instruction: str, given: str = "") -> Prompt:
    """The Alpaca prompt (Taori et al. 2023), byte for byte as the distillation papers render it."""
    if given:
        before = f"{_INTRO.format(_PAIRED)}\n\n### Instruction:\n{instruction}\n\n### Input:\n"
        return Prompt(before, given, "\n\n### Response:\n")
    return Prompt(f"{_INTRO.format('')}\n\n### Instruction:\n", instruction, "\n\n### Response:\n")


def chat(tokenizer: PreTrainedTokenizerBase, instruction: str, given: str = "") -> Prompt:
    """The prompt of the model's own chat template.

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


def example(row: Row, form: Format, tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, str]:
    """The prompt and the response of a row.

    Raises:
        DataError: the row lacks a column that the format needs.
    """
    needed = ("text",) if form == "plain" else ("instruction", "output")
    missing = [column for column in needed if not isinstance(row.get(column), str)]
    if missing:
        raise DataError(f"format '{form}' needs the text column '{missing[0]}'; the rows have: {', '.join(row)}")
    if form == "plain":
        return Prompt("", "", ""), row["text"]
    given = row.get("input") or ""
    prompt = alpaca(row["instruction"], given) if form == "alpaca" else chat(tokenizer, row["instruction"], given)
    return prompt, row["output"]
