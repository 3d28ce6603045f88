"""Chat templates: the inputs that a template takes, and the content of a generated answer without its affixes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from raycloud.errors import ModelError

Message = Mapping[str, Any]
"""Chat message: ``role`` and ``content``; ``tool_calls``, ``tool_call_id`` and ``name`` if the template takes them."""

_PROBE = "probe"
_QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "question"}]
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@dataclass(frozen=True)
class TemplateAffixes:
    """Text that a template puts between its special tokens and the content of an answer; a trained model repeats it."""

    lead: str = ""
    tail: str = ""
    trims: bool = False
    """True if the template strips whitespace around the content."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: any tokenizer.
        ends: token ids that end an answer.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> None:
        if not tokenizer.chat_template:
            raise ModelError("this model has no chat template; it completes plain text only")
        self._tokenizer, self._ends = tokenizer, frozenset(ends)

    def source(self, tools: bool = False) -> str:
        """Source text of the template; a model may have a separate template for tools."""
        return str(self._tokenizer.get_chat_template(tools=[{}] if tools else None))

    @property
    def options(self) -> frozenset[str]:
        """Variables that the template reads, other than messages, tools and the tokenizer's special tokens."""
        own = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
        return self._names(tools=False) - own - set(self._tokenizer.special_tokens_map)

    @property
    def takes_tools(self) -> bool:
        """True if the template passes tool definitions to the model."""
        return "tools" in self._names(tools=True)

    @property
    def takes_tool_calls(self) -> bool:
        """True if the template writes earlier tool calls."""
        return "tool_calls" in self.source(tools=True)

    @property
    def takes_tool_messages(self) -> bool:
        """True if the template knows the role ``tool``."""
        return re.search(r"""['"]tool['"]""", self.source(tools=True)) is not None

    def _names(self, tools: bool) -> frozenset[str]:
        try:
            # ``generation`` is a tag of transformers, which plain Jinja does not know.
            parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", self.source(tools)))
        except TemplateError:
            return frozenset()
        return frozenset(meta.find_undeclared_variables(parsed))

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of messages, followed by the generation prompt for the next message.

        Raises:
            ModelError: the template refuses these messages.
        """
        try:
            return self._ids([dict(message) for message in messages], True, tools, options)
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelError(f"the model's chat template refuses these messages: {error}") from error

    def around(self) -> TemplateAffixes:
        """Affixes that the template puts around an answer; empty if it refuses the probe messages."""
        try:
            asked = self._ids(_QUESTION, True)
            said = {text: self._ids(_answered(text), False) for text in (_PROBE, f" {_PROBE} ")}
        except (TemplateError, TypeError, ValueError):
            return TemplateAffixes()
        answer = said[_PROBE][len(asked) :]
        if said[_PROBE][: len(asked)] != asked:
            return TemplateAffixes()
        end = next((at for at, token in enumerate(answer) if token in self._ends), len(answer))
        # Decoded with the prompt: a space that the tokenizer itself puts after the prompt belongs to the affix as well.
        before, both = (self._decoded(ids) for ids in (asked, asked + answer[:end]))
        lead, found, tail = both.removeprefix(before).partition(_PROBE)
        if not found or not both.startswith(before):
            return TemplateAffixes()
        tail = tail if end < len(answer) else ""
        return TemplateAffixes(lead, tail, trims=said[_PROBE] == said[f" {_PROBE} "])

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def _ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        ask: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        made = self._tokenizer.apply_chat_template(
            list(messages),  # type: ignore[arg-type]
            tools=list(tools) if tools else None,  # type: ignore[arg-type]
            add_generation_prompt=ask,
            return_dict=True,
            **(options or {}),
        )
        return cast("list[int]", made["input_ids"])  # type: ignore[index, call-overload]


def _answered(text: str) -> list[dict[str, Any]]:
    return [*_QUESTION, {"role": "assistant", "content": text}]


class ContentFilter:
    """Filter of a streamed answer that passes its content and removes the template's affixes.

    Args:
        around: affixes that the template puts around the content.
    """

    def __init__(self, around: TemplateAffixes) -> None:
        self._around, self._begun, self._held = around, not (around.lead or around.trims), ""

    def push(self, text: str) -> str:
        """Append ``text`` and return the new part that is certainly content."""
        self._held += text
        if not self._begun and not self._begin():
            return ""
        keep = len(self._held) - self._open_end()
        through, self._held = self._held[:keep], self._held[keep:]
        return through

    def flush(self, ended: bool) -> str:
        """Return the rest when no more text follows; the template's tail is removed from an answer that ended."""
        held, self._held = self._held, ""
        if not ended:
            return held
        return "" if self._around.trims and not held.strip() else held.removesuffix(self._around.tail or "\0")

    def _begin(self) -> bool:
        if self._around.trims:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        elif len(self._held) >= len(self._around.lead) or not self._around.lead.startswith(self._held):
            self._held, self._begun = self._held.removeprefix(self._around.lead), True
        return self._begun

    def _open_end(self) -> int:
        """Number of the last characters that may belong to the template's tail."""
        if self._around.trims:
            return len(self._held) - len(self._held.rstrip())
        longest = min(len(self._around.tail), len(self._held))
        return next((size for size in range(longest, 0, -1) if self._around.tail.startswith(self._held[-size:])), 0)
