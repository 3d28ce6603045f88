"""Generation of text: token ids become text chunk by chunk, with whole characters only, and stop strings end it."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from raycloud.models.chat_template import ChatTemplate, ContentFilter, Message, TemplateAffixes
from raycloud.models.generation import Decoding, Token, TokenSource
from raycloud.models.texts import TextBounds, special_ids

_UNREADABLE = "\ufffd"
_LONGEST = 4  # bytes, and so tokens, that one character takes in UTF-8
_WINDOW = 16  # largest number of tokens of undecodable text before the oldest are dropped


@dataclass(frozen=True)
class TextChunk:
    """Text that one more token adds."""

    text: str
    """New text; empty while a character is incomplete or the text could still become a stop string."""
    tokens: int
    """Number of tokens generated so far."""
    finish: Literal["stop", "length"] | None = None
    """Reason for the end of the text: ``stop`` for the model or a stop string, ``length`` for the limit."""
    token: Token | None = None
    """The token, which is one of the prompt if those are requested; None for the last chunk."""


@dataclass(frozen=True)
class TextModel:
    """Token source with its tokenizer: everything that a chat or a completion needs."""

    source: TokenSource
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    """Token ids that end a text, see :func:`~raycloud.models.texts.end_ids`."""
    fingerprint: str | None = None
    """Fingerprint of the model's checkpoint; None if it has none."""

    @cached_property
    def template(self) -> ChatTemplate:
        """Chat template of the model.

        Raises:
            ModelError: there is none.
        """
        return ChatTemplate(self.tokenizer, self.ends)

    @cached_property
    def _around(self) -> TemplateAffixes:
        return self.template.around()

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt for the next message after ``messages``, each with a ``role`` and a ``content``.

        Raises:
            ModelError: the model has no chat template, or its template refuses these messages.
        """
        return self.template.prompt(messages)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a plain text to continue, with the beginning that the tokenizer adds, such as BOS."""
        ids = cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return TextBounds.of(self.tokenizer).begun(ids)

    def pieces(
        self,
        prompt: Sequence[int],
        limit: int,
        decoding: Decoding | None = None,
        stop: Sequence[str] = (),
        *,
        chat: bool = False,
    ) -> Generator[TextChunk, None, None]:
        """Yield the continuation of ``prompt``: one chunk per token, then a last one with the reason for its end.

        Args:
            prompt: token ids.
            limit: largest number of tokens to generate.
            decoding: settings of the continuation; greedy if None. Its ends are added to those of the model.
            stop: strings that end the text before them; matched across token boundaries. A string that contains a
                special token is found although the returned text does not contain such tokens.
            chat: the text is the answer of a chat; the affixes of the template are removed.
        """
        how = decoding or Decoding()
        how = replace(how, ends=self.ends | how.ends)
        silent = {number: str(self.tokenizer.convert_ids_to_tokens(number)) for number in special_ids(self.tokenizer)}
        decoder, stops, tokens = Detokenizer(self.tokenizer, prompt), StopStrings(stop, silent.values()), 0
        content, ended = ContentFilter(self._around if chat else TemplateAffixes()), False
        # Closed as soon as a stop string matches or the caller stops reading: a split model then frees its session.
        with closing(self.source.tokens(prompt, limit, how)) as stream:
            for token in stream:
                if token.part == "prompt":
                    yield TextChunk("", 0, token=token)
                    continue
                if token.part == "end":
                    yield TextChunk("", tokens, token=token)
                    ended = True
                    break
                tokens += 1
                text = content.push(stops.push(decoder.push(token.id), silent.get(token.id, "")))
                if stops.met:
                    yield TextChunk(text + content.flush(True), tokens, "stop", token)
                    return
                yield TextChunk(text, tokens, token=token)
        text = content.push(stops.push(decoder.flush()) + stops.flush())
        finish: Literal["stop", "length"] = "length" if tokens >= limit and not (stops.met or ended) else "stop"
        yield TextChunk(text + content.flush(finish == "stop"), tokens, finish)


class Detokenizer:
    """Streaming conversion of token ids to text; each step decodes a few tokens, however long the text is.

    The joined pieces equal ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`` of
    all ids. One exception: sentencepiece models with byte fallback make a whole run of byte tokens unreadable
    afterwards if the run does not end as UTF-8; characters returned by then are not taken back.

    Args:
        tokenizer: the tokenizer of the ids.
        before: token ids that the text continues. Sentencepiece's decoders drop a space at the beginning of a text, and
            keep it in a continuation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._silent = special_ids(tokenizer)
        # Tokens with complete text are the context that spaces depend on; the fresh tokens after them are not yet.
        self._window = [token for token in before[-_WINDOW:] if token not in self._silent][-_LONGEST:]
        self._fresh = len(self._window)
        self._said = self._decode(self._window).rstrip(_UNREADABLE)

    def push(self, token: int) -> str:
        """Append a token and return the text that became certain with it."""
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
        """Return the remaining text when no more tokens follow."""
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
    """Filter that passes text up to the first stop string, and holds back text that could still become one.

    The match that is complete first counts, so the result does not depend on how the text is divided into chunks.

    Args:
        stops: stop strings, none of them empty.
        special: the spellings of special tokens. Stop strings that contain one are searched in the text with its
            special tokens, all others in the text without.
    """

    def __init__(self, stops: Sequence[str], special: Collection[str] = ()) -> None:
        self._stops = tuple((stop, any(token in stop for token in special)) for stop in stops)
        self._held: list[tuple[str, bool]] = []
        self.met = False

    def push(self, text: str, special: str = "") -> str:
        """Append text and return the part that no stop string can include any more; nothing after a match.

        Args:
            text: the new text.
            special: the spelling of the special token after it, if there is one.
        """
        if self.met:
            return ""
        self._held += [(character, True) for character in text] + [(character, False) for character in special]
        whole = list(range(len(self._held)))
        shown = [at for at in whole if self._held[at][1]]
        matches, keep = [], len(whole)
        for stop, with_special in self._stops:
            searched = whole if with_special else shown
            said = "".join(self._held[at][0] for at in searched)
            if (at := said.find(stop)) >= 0:
                matches.append((searched[at + len(stop) - 1], searched[at]))
            for size in range(min(len(stop) - 1, len(said)), 0, -1):
                if said.endswith(stop[:size]):
                    keep = min(keep, searched[-size])
                    break
        if matches:
            self.met, keep = True, min(matches)[1]
        through, self._held = self._held[:keep], [] if self.met else self._held[keep:]
        return "".join(character for character, is_shown in through if is_shown)

    def flush(self) -> str:
        """Return the text that was held back, when no more text follows."""
        held, self._held = self._held, []
        return "".join(character for character, is_shown in held if is_shown)
