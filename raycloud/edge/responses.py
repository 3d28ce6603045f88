"""Formats of the responses of OpenAI's chat and completion endpoints, whole and in chunks.

Source: https://platform.openai.com/docs/api-reference (chat, completions, models). Log-probabilities are those of the
model before penalties, temperature and constraints; they include the token that ends a text, with an empty text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raycloud.edge.generation import ChoiceDelta
from raycloud.edge.tools import Call
from raycloud.models.generation import Token
from raycloud.models.token_spelling import TokenSpelling

_LEAST = -9999.0
"""Log-probability that is reported for a probability of zero, because JSON has no infinity."""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Usage object of one request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def model_entry(name: str, created: int, version: str | None) -> dict[str, Any]:
    """Entry of a model in ``/v1/models``, with the version that answers new requests."""
    entry = {"id": name, "object": "model", "created": created, "owned_by": "raycloud"}
    return {**entry, "system_fingerprint": version}


class ResponseFormatter(Protocol):
    """Formatter of one response: the only difference between chat and completion. One object serves one request."""

    def whole(self, choices: Sequence[Sequence[ChoiceDelta]], used: Mapping[str, int]) -> dict[str, Any]:
        """Whole response from all parts of each choice."""
        ...

    def chunks(self, part: ChoiceDelta, *, first: bool) -> list[dict[str, Any]]:
        """Chunks of a stream for one part; ``first`` marks the first part of its choice."""
        ...

    def tally(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Usage of the request, as a chunk without choices."""
        ...


@dataclass(frozen=True)
class ChatFormatter:
    """Formatter of a chat completion; see :class:`ResponseFormatter`."""

    model: str
    version: str | None
    spelling: TokenSpelling
    logprobs: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.version}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.spelling.bytes_of(token)
        return {"token": spelled.decode(errors="replace"), "logprob": max(logprob, _LEAST), "bytes": list(spelled)}

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        content = [
            {
                **self._token(token.id, token.scores.logprob),
                "top_logprobs": [self._token(*best) for best in token.scores.top],
            }
            for token in tokens
            if token.scores is not None
        ]
        return {"content": content, "refusal": None} if self.logprobs else None

    def whole(self, choices: Sequence[Sequence[ChoiceDelta]], used: Mapping[str, int]) -> dict[str, Any]:
        """Whole response from all parts of each choice."""
        shaped = []
        for index, parts in enumerate(choices):
            text, calls = "".join(part.text for part in parts), parts[-1].calls
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
            logprobs = self._logprobs(token for part in parts for token in part.tokens)
            shaped.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": parts[-1].finish})
        return {**self._head("chat.completion"), "choices": shaped, "usage": used}

    def chunks(self, part: ChoiceDelta, *, first: bool) -> list[dict[str, Any]]:
        """Chunks of one part: the role, then text with its log-probabilities, then calls, then the finish reason."""
        made = [self._delta(part.choice, {"role": "assistant", "content": ""})] if first else []
        if part.text or part.tokens:
            made.append(self._delta(part.choice, {"content": part.text}, self._logprobs(part.tokens)))
        if part.calls:
            calls = [{"index": number, **_call(call)} for number, call in enumerate(part.calls)]
            made.append(self._delta(part.choice, {"tool_calls": calls}))
        if part.finish:
            made.append(self._delta(part.choice, {}, finish=part.finish))
        return made

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def tally(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Usage of the request, as a chunk without choices."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": used}


@dataclass(frozen=True)
class CompletionFormatter:
    """Formatter of a completion, whose chunks have the format of the whole; see :class:`ResponseFormatter`."""

    model: str
    version: str | None
    spelling: TokenSpelling
    logprobs: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)
    """Number of characters of the tokens of each choice so far."""

    def _with(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.version, "choices": choices, **more}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        said: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            own = self._spelled(token.id)
            at = self._offsets.get(index, 0)
            said["tokens"].append(own)
            said["text_offset"].append(at)
            self._offsets[index] = at + (0 if token.id in self.spelling.special else len(own))
            if token.scores is None:
                said["token_logprobs"].append(None)
                said["top_logprobs"].append(None)
                continue
            # The token itself is listed even if others are more likely.
            best = {token.id: token.scores.logprob, **dict(token.scores.top)}
            said["token_logprobs"].append(max(token.scores.logprob, _LEAST))
            said["top_logprobs"].append({self._spelled(one): max(logprob, _LEAST) for one, logprob in best.items()})
        return said

    def _spelled(self, token: int) -> str:
        spelled = self.spelling.bytes_of(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def whole(self, choices: Sequence[Sequence[ChoiceDelta]], used: Mapping[str, int]) -> dict[str, Any]:
        """Whole response from all parts of each choice."""
        shaped = []
        for index, parts in enumerate(choices):
            tokens = [token for part in parts for token in part.tokens]
            shaped.append(self._choice(index, "".join(part.text for part in parts), tokens, parts[-1].finish))
        return self._with(shaped, usage=used)

    def chunks(self, part: ChoiceDelta, *, first: bool) -> list[dict[str, Any]]:
        """Chunks of one part: text with its log-probabilities, then the finish reason."""
        made = []
        if part.text or part.tokens:
            made.append(self._with([self._choice(part.choice, part.text, part.tokens, None)]))
        if part.finish:
            made.append(self._with([{**self._choice(part.choice, "", (), part.finish), "logprobs": None}]))
        return made

    def tally(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Usage of the request, as a chunk without choices."""
        return self._with([], usage=used)


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
