"""Requests of OpenAI's chat and completion endpoints: every field is supported, ignored by design, or refused.

Source: https://platform.openai.com/docs/api-reference (chat, completions). Extensions that other servers also have:
``top_k``, ``min_p``, ``repetition_penalty``, ``no_repeat_ngram_size``, ``min_tokens``, ``stop_token_ids`` and
``chat_template_kwargs``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from raycloud.edge.errors import ApiError
from raycloud.models.sampling import Sampling

_MOST_STOPS = 4
_MOST_CHOICES = 128
_MOST_LOGPROBS = 20
_MOST_BIASES = 1024

WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Fields that are accepted and have no effect here."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""OpenAI's fields that are not supported, with the values that have no effect and are accepted; null is as well."""


def _without_surrogates(text: str) -> str:
    """Check a text for lone surrogates, which JSON can express, but which are no characters for a tokenizer."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair, which is no text")
    return text


def _text(content: object) -> object:
    """Content of a message as one string."""
    if isinstance(content, str) or content is None:
        return content
    if not isinstance(content, list):
        raise ValueError("must be a string or a list of text parts")
    texts = [part["text"] for part in content if _is_text(part)]
    if len(texts) < len(content):
        raise ValueError("has a part that is not text; this model takes only text")
    return "".join(texts)


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _prompts(prompt: object) -> object:
    """List of prompts, each a text or a list of token ids."""
    prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _are_ids(p) for p in prompts):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    return [_without_surrogates(one) if isinstance(one, str) else one for one in prompts]


def _are_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int and token >= 0 for token in prompt)


def _stops(stop: object) -> object:
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return []
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"must be a non-empty string or a list of up to {_MOST_STOPS} of them")
    return stops


def _arguments(given: object) -> object:
    """Arguments of a call as an object for templates; clients send them as a JSON string."""
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object, as a string")
    return found


Text = Annotated[str, AfterValidator(_without_surrogates)]
TokenId = Annotated[int, Field(ge=0, strict=True)]


class _StrictModel(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")


class StreamOptions(_StrictModel):
    """Field ``stream_options``."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Setting without effect: chunks are never padded."""


class Function(_StrictModel):
    """Function that a model may call."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_StrictModel):
    """Entry of ``tools``."""

    type: Literal["function"]
    function: Function


class CalledFunction(_StrictModel):
    """Function of a :class:`ToolCall`."""

    name: Text
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(_StrictModel):
    """Tool call in the history of a chat."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_StrictModel):
    """Message of a chat. Further fields that OpenAI's answers contain are accepted if they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | None, BeforeValidator(_text)] = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are allowed only in assistant messages")
        return self

    def rendered(self) -> dict[str, Any]:
        """Message in the format of chat templates."""
        given = self.model_dump(exclude_none=True)
        return {**given, "role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


class JsonSchema(BaseModel):
    """Field ``response_format.json_schema``."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str
    shape: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Setting without effect: answers always follow the schema."""


class ResponseFormat(_StrictModel):
    """Field ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self


_Bias = Annotated[float, Field(ge=-100, le=100)]


class _GenerationRequest(_StrictModel):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    logit_bias: Annotated[dict[Annotated[int, Field(ge=0)], _Bias], Field(max_length=_MOST_BIASES)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[TokenId] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Text], BeforeValidator(_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in NEUTRAL.keys() & data.keys() - cls.model_fields.keys():
            value = data[name]
            # 1 does not count as True, and 0 does not count as False.
            if value is not None and not any(
                value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in NEUTRAL[name]
            ):
                allowed = "".join(f" or use {fine!r}" for fine in NEUTRAL[name])
                raise ApiError(400, f"{name} is not supported here; leave it out{allowed}", param=name)
        return {name: value for name, value in data.items() if name not in NEUTRAL and name not in WITHOUT_EFFECT}

    @model_validator(mode="after")
    def _fits(self) -> _GenerationRequest:
        if self.min_tokens and self.limit is not None and self.min_tokens > self.limit:
            raise ValueError(f"min_tokens {self.min_tokens} is above the {self.limit} tokens to generate at most")
        return self

    @property
    def limit(self) -> int | None:
        """Largest number of tokens to generate; None for as many as fit."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Number of most likely tokens to list with each token; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    def sampling(self, choice: int) -> Sampling:
        """Sampling settings of one of the choices; OpenAI's defaults for fields that are not given."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            no_repeat_ngram_size=self.no_repeat_ngram_size or 0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            # Choices of one request have different seeds; the first equals that of a request for one choice.
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
        )

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_GenerationRequest):
    """Body of a request to ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.answer_schema is not None and self.offered:
            raise ValueError("response_format cannot go with tools: a call would not fit it")
        return self

    @property
    def limit(self) -> int | None:
        """Largest number of tokens to generate; None for as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Number of most likely tokens to list with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Tools that the model may call, in the format of chat templates."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """JSON schema that the answer must follow; None for any text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.shape


class CompletionRequest(_GenerationRequest):
    """Body of a request to ``/v1/completions``."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS, strict=True)] | None = None

    @model_validator(mode="after")
    def _few(self) -> CompletionRequest:
        if len(self.prompt) * self.choices > _MOST_CHOICES:
            raise ValueError(f"prompt and n ask for {len(self.prompt) * self.choices} answers, at most {_MOST_CHOICES}")
        return self

    @property
    def limit(self) -> int:
        """Largest number of tokens to generate; 16, OpenAI's default, if not given."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """Number of most likely tokens to list with each token; None for no log-probabilities."""
        return self.logprobs


_Kind = TypeVar("_Kind", bound=_GenerationRequest)
_INNER: dict[str, type[BaseModel]] = {
    "messages": Message,
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "tools": Tool,
}


def parse_request(kind: type[_Kind], body: bytes) -> _Kind:
    """Parse and validate the body of a request.

    Raises:
        ApiError: the body is invalid; the message names the field and what is allowed.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where, message = first["loc"], first["msg"].removeprefix("Value error, ")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    if first["type"] == "json_invalid":
        raise ApiError(400, "the body is not valid JSON")
    if first["type"] == "extra_forbidden":
        fields = _INNER.get(str(where[0]), kind) if len(where) > 1 else kind
        allowed = sorted({*fields.model_fields, *(WITHOUT_EFFECT if fields is kind else ())})
        message = f"this field is not known here; allowed: {', '.join(allowed)}"
    raise ApiError(400, f"{path or 'the body'}: {message}", param=path or None)
