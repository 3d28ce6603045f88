"""Text in, text out: token ids become text piece by piece, characters stay whole, and stop strings end it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from raycloud.errors import ModelError
from raycloud.models.generation import TokenSource
from raycloud.models.sampling import GREEDY, Sampling

_UNREADABLE = "\ufffd"
_LONGEST = 4  # bytes, and so tokens, that one character takes in UTF-8
_WINDOW = 16  # tokens that garbage may pile up to before the oldest are forgotten


@dataclass(frozen=True)
class Piece:
    """What one more token added to a text."""

    text: str
    """New text; empty while a character is incomplete or the text could still become a stop string."""
    tokens: int
    """Tokens generated so far."""
    finish: Literal["stop", "length"] | None = None
    """Why the text ends here: the model or a stop string ended it, or the limit was reached."""


@dataclass(frozen=True)
class TextModel:
    """A source of tokens with its tokenizer: everything a chat or a completion needs."""

    source: TokenSource
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    """Token ids that end a text, see :func:`end_ids`."""

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids that ask for the next message after ``messages``, each with a ``role`` and a ``content``.

        Raises:
            ModelError: the model has no chat template, or its template refuses these messages.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError("this model has no chat template; it completes plain text only")
        try:
            asked = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise ModelError(f"the model's chat template refuses these messages: {error}") from error
        return cast("list[int]", asked["input_ids"])  # type: ignore[index, call-overload]

    def prompt(self, text: str) -> list[int]:
        """Token ids of a plain text to go on with."""
        return cast("list[int]", self.tokenizer(text)["input_ids"])

    def pieces(
        self, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY, stop: Sequence[str] = ()
    ) -> Generator[Piece, None, None]:
        """The continuation of ``prompt``: one piece per token, then a last one that says why it ends.

        Args:
            prompt: token ids.
            limit: tokens to generate at most.
            sampling: how tokens are chosen.
            stop: strings that end the text before them; matched across the borders of tokens.
        """
        decoder, stops, tokens = Detokenizer(self.tokenizer), StopStrings(stop), 0
        # Closed as soon as a stop string matches or the reader leaves: a cut model frees its session then.
        with closing(self.source.stream(prompt, limit, sampling, self.ends)) as stream:
            for token in stream:
                tokens += 1
                text = stops.push(decoder.push(token))
                if stops.met:
                    yield Piece(text, tokens, "stop")
                    return
                yield Piece(text, tokens)
        text = stops.push(decoder.flush())
        rest = stops.flush()
        yield Piece(text + rest, tokens, "length" if tokens >= limit and not stops.met else "stop")


class Detokenizer:
    """Token ids to text, one by one, decoding a few tokens each time however long the text is.

    The pieces joined are what ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)``
    gives for all ids together. (One exception: sentencepiece models with byte fallback turn a whole run of byte tokens
    unreadable in hindsight if the run does not end as UTF-8; characters given by then are not taken back.)

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._silent = frozenset(tokenizer.all_special_ids)
        # Tokens whose text is complete give the context that spaces depend on; the fresh ones behind them do not yet.
        self._window: list[int] = []
        self._fresh = 0
        self._said = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        if token in self._silent:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.startswith(self._said):
            if len(self._window) - self._fresh < _LONGEST:
                return ""
            self._restart()
            text = self._decode(self._window)
        open_end = len(text) - len(text.rstrip(_UNREADABLE))
        certain = len(text) - min(open_end, _LONGEST - 1)
        new, self._said = text[len(self._said) : certain], text[: max(certain, len(self._said))]
        if new and not open_end:
            self._window = self._window[self._fresh :]
            self._fresh, self._said = len(self._window), self._decode(self._window)
        elif len(self._window) > _WINDOW:
            unsaid = len(text) - len(self._said)
            self._window, self._fresh = self._window[-_WINDOW // 2 :], 0
            text = self._decode(self._window)
            self._said = text[: len(text) - unsaid]
        return new

    def flush(self) -> str:
        """What is left when no more tokens come."""
        text = self._decode(self._window)
        if not text.startswith(self._said):
            self._restart()
            text = self._decode(self._window)
        new, self._said = text[len(self._said) :], text
        return new

    def _restart(self) -> None:
        self._window, self._fresh, self._said = self._window[self._fresh :], 0, ""

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)


class StopStrings:
    """Lets text through up to the first stop string, and holds back what could still become one.

    Of several matches the one that is complete first counts, so the result does not depend on how the text is cut.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """The part of the text so far that no stop string can touch any more; nothing after a match."""
        if self.met:
            return ""
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.met, self._held = True, ""
            return text[: min(matches)[1]]
        beginnings = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )
        keep = len(text) - max(beginnings, default=0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def end_ids(tokenizer: PreTrainedTokenizerBase, *configs: PretrainedConfig | GenerationConfig | None) -> frozenset[int]:
    """The ids that end a text, according to the tokenizer and to any of the model's configurations."""
    named: list[int | Sequence[int] | None] = [tokenizer.eos_token_id]
    named += [config.eos_token_id for config in configs if config is not None]
    return frozenset(token for ids in named if ids is not None for token in ((ids,) if isinstance(ids, int) else ids))
