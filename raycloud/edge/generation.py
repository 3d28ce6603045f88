"""Generation of the answers to a checked request, part by part. All of it runs in a worker thread: chat templates and
tokenizers take seconds for long texts, and the server's event loop must answer other requests meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from raycloud.edge.errors import ApiError
from raycloud.edge.requests import ChatRequest, CompletionRequest
from raycloud.edge.tools import Call, CallReader, uses_tool_call_tags
from raycloud.errors import MissingExtra, ModelError
from raycloud.models.constraints import Grammars
from raycloud.models.generation import Decoding, Token
from raycloud.models.sampling import Constraint
from raycloud.models.text_model import TextChunk, TextModel
from raycloud.models.token_spelling import TokenSpelling

Finish = Literal["stop", "length", "tool_calls"]
_BODY_BYTES_PER_CHARACTER = 6  # as JSON may escape them
_BODY_OVERHEAD = 2**18


@dataclass(frozen=True)
class PromptRead:
    """Event: the prompts were tokenised; ``tokens`` is their total number of tokens."""

    tokens: int


@dataclass(frozen=True)
class ChoiceDelta:
    """Event: the next part of one of the answers."""

    choice: int
    text: str
    made: int
    """Number of tokens generated for this choice so far."""
    tokens: tuple[Token, ...] = ()
    """Tokens of this part whose log-probabilities were requested."""
    calls: tuple[Call, ...] = ()
    finish: Finish | None = None


Event = PromptRead | ChoiceDelta


class RequestRunner:
    """Runner of requests on a model; safe to call from several threads.

    Args:
        model: the model that generates the answers.
    """

    def __init__(self, model: TextModel) -> None:
        self.model, self.spelling = model, TokenSpelling(model.tokenizer)
        self.version = None if model.fingerprint is None else model.fingerprint[:12]
        """Version that answers, for clients: the beginning of the model's fingerprint."""
        # The library switches these off at the first text, which fails while another thread uses the tokenizer.
        backend = model.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.most_characters = model.source.max_length * self.spelling.longest
        """Largest number of characters of a prompt: a longer one cannot fit, and is refused before it is tokenised."""
        self.most_bytes = self.most_characters * _BODY_BYTES_PER_CHARACTER + _BODY_OVERHEAD
        """Largest number of bytes of the body of a request."""

    def answer(self, asked: ChatRequest | CompletionRequest) -> Generator[Event, None, None]:
        """Yield the events of a request: first the tokenised prompts, then the parts of one choice after the other.

        Raises:
            ApiError: the request does not fit the model.
            LinkError: the link to the cloud broke.
        """
        self._check_ids(asked)
        prompts = self._prompts(asked)
        for prompt in prompts:
            self._check_room(prompt, asked)
        constraints = [self._constraint(asked) for _ in range(asked.choices)]
        yield PromptRead(sum(map(len, prompts)))
        for number, prompt in enumerate(prompts):
            room = self.model.source.max_length - len(prompt)
            limit = room if asked.limit is None else min(asked.limit, room)
            for choice, constraint in enumerate(constraints):
                decoding = Decoding(
                    asked.sampling(choice),
                    frozenset(asked.stop_token_ids or ()),
                    asked.top,
                    isinstance(asked, CompletionRequest) and bool(asked.echo),
                    constraint,
                )
                pieces = self.model.pieces(prompt, limit, decoding, asked.stop, chat=isinstance(asked, ChatRequest))
                with closing(pieces):
                    yield from _parts(
                        number * asked.choices + choice, pieces, self._reader(asked), self._echo(asked, number)
                    )

    def _prompts(self, asked: ChatRequest | CompletionRequest) -> list[list[int]]:
        if isinstance(asked, ChatRequest):
            return [self._chat_prompt(asked)]
        return [self._prompt(one) for one in asked.prompt]

    def _check_ids(self, asked: ChatRequest | CompletionRequest) -> None:
        size = len(self.model.tokenizer)
        named = {"stop_token_ids": asked.stop_token_ids or (), "logit_bias": asked.logit_bias or ()}
        if isinstance(asked, CompletionRequest):
            named["prompt"] = [token for one in asked.prompt if not isinstance(one, str) for token in one]
        for param, ids in named.items():
            if (largest := max(ids, default=0)) >= size:
                raise ApiError(400, f"{param}: no token {largest}; allowed: 0 to {size - 1}", param=param)

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self.most_characters:
            message = f"{param} has {characters} characters, and this model's context is "
            message += f"{self.model.source.max_length} tokens: at most {self.most_characters} characters are taken"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def _check_room(self, prompt: list[int], asked: ChatRequest | CompletionRequest) -> None:
        param = _param(asked)
        if not prompt:
            raise ApiError(400, f"{param} has no token to continue from", param=param)
        room = self.model.source.max_length - len(prompt)
        if room < (0 if asked.limit == 0 else 1):
            message = f"this model's context is {room + len(prompt)} tokens, {param} resulted in {len(prompt)} tokens"
            message += ", which leaves no room for an answer"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def _prompt(self, given: str | list[int]) -> list[int]:
        if not isinstance(given, str):
            return given
        self._check_length(len(given), "prompt")
        return self.model.prompt(given)

    def _echo(self, asked: ChatRequest | CompletionRequest, number: int) -> str:
        """Text of the prompt that the answer repeats; empty without ``echo``."""
        if isinstance(asked, ChatRequest) or not asked.echo:
            return ""
        given = asked.prompt[number]
        if isinstance(given, str):
            return given
        return str(self.model.tokenizer.decode(given, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _chat_prompt(self, asked: ChatRequest) -> list[int]:
        self._check_length(sum(len(message.content or "") for message in asked.messages), "messages")
        try:
            template = self.model.template
        except ModelError as error:
            raise ApiError(400, str(error), param="messages") from error
        if asked.offered and not template.takes_tools:
            raise ApiError(400, "tools: this model's chat template does not accept any", param="tools")
        for number, message in enumerate(asked.messages):
            if message.tool_calls and not template.takes_tool_calls:
                where = f"messages[{number}].tool_calls"
                raise ApiError(400, f"{where}: this model's chat template does not accept any", param=where)
            if message.role == "tool" and not template.takes_tool_messages:
                where, allowed = f"messages[{number}].role", "system, developer, user, assistant"
                raise ApiError(
                    400, f"{where}: this model's chat template does not accept 'tool'; allowed: {allowed}", param=where
                )
        for name in (options := asked.chat_template_kwargs or {}):
            if name not in template.options:
                where, allowed = f"chat_template_kwargs.{name}", ", ".join(sorted(template.options)) or "none"
                raise ApiError(
                    400, f"{where}: the model's chat template does not read it; allowed: {allowed}", param=where
                )
        try:
            return template.prompt([message.rendered() for message in asked.messages], asked.offered, options)
        except ModelError as error:
            raise ApiError(400, str(error), param="messages") from error

    def _reader(self, asked: ChatRequest | CompletionRequest) -> CallReader | None:
        """Reader of tool calls, if the chat template uses the known tool call tags; None otherwise."""
        if isinstance(asked, CompletionRequest) or not asked.offered:
            return None
        return CallReader() if uses_tool_call_tags(self.model.template.source(tools=True)) else None

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.model.tokenizer, self.model.ends)

    def _constraint(self, asked: ChatRequest | CompletionRequest) -> Constraint | None:
        schema = asked.answer_schema if isinstance(asked, ChatRequest) else None
        if schema is None:
            return None
        try:
            return self._grammars.json(schema)
        except (MissingExtra, ModelError) as error:
            raise ApiError(400, f"response_format: {error}", param="response_format") from error
        except ValueError as error:
            where = "response_format.json_schema.schema"
            raise ApiError(400, f"{where}: {error}", param=where) from error


def _param(asked: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(asked, ChatRequest) else "prompt"


def _parts(
    choice: int, pieces: Generator[TextChunk, None, None], reader: CallReader | None, echo: str
) -> Generator[ChoiceDelta, None, None]:
    """Yield the parts of one choice; the first carries the echo of the prompt and the scores of its tokens."""
    waiting: list[Token] = []
    for piece in pieces:
        if piece.token is not None and piece.token.part == "prompt":
            waiting.append(piece.token)
            continue
        scored = [] if piece.token is None or piece.token.scores is None else [piece.token]
        text = piece.text if reader is None else reader.push(piece.text)
        finish: Finish | None = piece.finish
        calls: tuple[Call, ...] = ()
        if reader is not None and finish is not None:
            rest, calls = reader.flush()
            text, finish = text + rest, "tool_calls" if calls and finish == "stop" else finish
        yield ChoiceDelta(choice, echo + text, piece.tokens, (*waiting, *scored), calls, finish)
        waiting, echo = [], ""
