"""What OpenAI's chat and completion endpoints take and give, as far as one model that writes text can follow.

Source: https://platform.openai.com/docs/api-reference (chat, completions, models, errors). ``top_k`` and
``repetition_penalty`` are extensions. What would change the answer and cannot be done is refused, not ignored.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from raycloud.models.sampling import Sampling

_MOST_STOPS = 4


class ApiError(Exception):
    """An error in OpenAI's shape.

    Args:
        status: of HTTP.
        message: one line for the caller.
        kind: the shape's ``type``.
        param: the field of the request that is wrong.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _sound(text: str) -> str:
    """JSON can name half a surrogate pair, which is no character and which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair, which is no text")
    return text


def _text(content: object) -> object:
    """A message's content as one string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of text parts")
    texts = [part["text"] for part in content if _is_text(part)]
    if len(texts) < len(content):
        raise ValueError("has a part that is no text; this model takes only text")
    return "".join(texts)


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _prompt(prompt: object) -> object:
    match prompt:
        case str() as text:
            return text
        case [str() as text]:
            return text
    raise ValueError("must be a string, or a list of one string; this server takes one prompt per request, as text")


def _stops(stop: object) -> object:
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return []
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"must be a non-empty string or a list of up to {_MOST_STOPS} of them")
    return stops


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are known but not supported, with the values that ask for nothing; null asks for nothing either."""


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, neutral in _NEUTRAL.items() if isinstance(data, dict) else ():
            value = data.get(name)
            # 1 is no True and 0 no False here: "logprobs": 0 asks a completion for something.
            if value is not None and not any(
                value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in neutral
            ):
                allowed = " or ".join(repr(fine) for fine in neutral)
                raise ApiError(400, f"{name} is not supported here; leave it out or use {allowed}", param=name)
        return data

    def sampling(self) -> Sampling:
        """How tokens are to be chosen; OpenAI's defaults where nothing is said."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=self.seed,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text), AfterValidator(_sound)]


class ChatRequest(_Request):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most; None for as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Request):
    """The body of ``/v1/completions``."""

    prompt: Annotated[str, BeforeValidator(_prompt), AfterValidator(_sound)]

    @property
    def limit(self) -> int:
        """Tokens to generate at most; 16 where nothing is said, as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage of one request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def listed(name: str, created: int) -> dict[str, Any]:
    """One entry of ``/v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "raycloud"}


class Answer(Protocol):
    """The shapes of one answer: chat and completion differ in these only."""

    def whole(self, text: str, finish: str, used: Mapping[str, int]) -> dict[str, Any]:
        """The answer at once."""
        ...

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        ...

    def chunk(self, text: str) -> dict[str, Any]:
        """More text."""
        ...

    def closing(self, finish: str) -> dict[str, Any]:
        """Why the text ends."""
        ...

    def tally(self, used: Mapping[str, int]) -> dict[str, Any]:
        """The usage, as a chunk without choices."""
        ...


@dataclass(frozen=True)
class ChatAnswer:
    """The shapes of a chat completion; see :class:`Answer`."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _delta(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def whole(self, text: str, finish: str, used: Mapping[str, int]) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": used}

    def opening(self) -> list[dict[str, Any]]:
        """The chunk that says who speaks."""
        return [self._delta({"role": "assistant", "content": ""})]

    def chunk(self, text: str) -> dict[str, Any]:
        """More text."""
        return self._delta({"content": text})

    def closing(self, finish: str) -> dict[str, Any]:
        """Why the text ends."""
        return self._delta({}, finish)

    def tally(self, used: Mapping[str, int]) -> dict[str, Any]:
        """The usage, as a chunk without choices."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": used}


@dataclass(frozen=True)
class TextAnswer:
    """The shapes of a completion, whose chunks look like the whole; see :class:`Answer`."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _with(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}

    @staticmethod
    def _choice(text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def whole(self, text: str, finish: str, used: Mapping[str, int]) -> dict[str, Any]:
        """The answer at once."""
        return self._with([self._choice(text, finish)], usage=used)

    def opening(self) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def chunk(self, text: str) -> dict[str, Any]:
        """More text."""
        return self._with([self._choice(text, None)])

    def closing(self, finish: str) -> dict[str, Any]:
        """Why the text ends."""
        return self._with([self._choice("", finish)])

    def tally(self, used: Mapping[str, int]) -> dict[str, Any]:
        """The usage, as a chunk without choices."""
        return self._with([], usage=used)
