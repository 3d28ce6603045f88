"""Chat in the terminal that prints the cost of each answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.filesize import decimal

from raycloud.errors import RaycloudError
from raycloud.link.meter import Meter
from raycloud.models.generation import Decoding
from raycloud.models.sampling import Sampling
from raycloud.models.text_model import TextChunk, TextModel

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass
class Conversation:
    """Messages so far and the model that answers them."""

    model: TextModel
    limit: int
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> Generator[TextChunk, None, None]:
        """Yield the model's answer; the part that was read is kept in the messages, an unanswered question is not.

        Raises:
            RaycloudError: the conversation fills the model's context, or the model has no chat template.
            LinkError: the link to the cloud broke.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = self.model.chat_prompt(asked)
        room = self.model.source.max_length - len(prompt)
        if room < 1:
            raise RaycloudError(
                f"the conversation has {len(prompt)} tokens, the model takes {room + len(prompt)} with its answer: "
                "/reset, or ask something shorter"
            )
        said = ""
        try:
            how = Decoding(self.sampling)
            with closing(self.model.pieces(prompt, min(self.limit, room), how, chat=True)) as pieces:
                for piece in pieces:
                    said += piece.text
                    yield piece
        finally:
            if said:
                self.messages = [*asked, {"role": "assistant", "content": said}]


def chat(conversation: Conversation, console: Console, ask: Callable[[], str], meter: Meter | None = None) -> None:
    """Run the chat until the user ends it.

    Args:
        conversation: the conversation to continue.
        console: output of the answers.
        ask: function that returns the next question; EOFError ends the chat.
        meter: meter of the link to the cloud, whose messages have the kinds ``up`` and ``down``.
    """
    console.print(HELP, style="dim")
    while True:
        try:
            question = ask().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print(f"\n{HELP}", style="dim")
            continue
        if question == "/quit":
            return
        if question == "/reset":
            conversation.messages.clear()
            console.print("forgotten", style="dim")
        elif question:
            _answer(conversation, question, console, meter or Meter())


def _answer(conversation: Conversation, question: str, console: Console, meter: Meter) -> None:
    trips, up, down = meter.messages["down"], meter.payload["up"], meter.payload["down"]
    start = time.monotonic()
    first, last, tokens, note = start, start, 0, ""
    error: RaycloudError | None = None
    try:
        with closing(conversation.answer(question)) as pieces:
            for piece in pieces:
                if piece.tokens > tokens:
                    last = time.monotonic()
                    first, tokens = first if tokens else last, piece.tokens
                console.print(piece.text, end="")
                if piece.finish == "length":
                    note = "cut at the limit"
    except KeyboardInterrupt:
        note = "stopped"
    except RaycloudError as caught:
        error = caught
    if tokens or error is None:
        costs = [f"{tokens} tokens"]
        if tokens:
            costs.append(f"first after {first - start:.1f} s")
        if last > first:
            costs.append(f"{(tokens - 1) / (last - first):.1f} tokens/s")
        if meter.messages:
            costs.append(f"{meter.messages['down'] - trips} round trips")
            costs.append(f"{decimal(meter.payload['up'] - up)} up, {decimal(meter.payload['down'] - down)} down")
        console.print()
        console.print(" · ".join([*costs, *filter(None, [note])]), style="dim")
    if error is not None:
        console.print(f"error: {error}", style="red")


def make_prompt(console: Console) -> Callable[[], str]:
    """Reader of questions: with a prompt and line editing on a terminal, plain lines otherwise."""
    if not console.is_terminal:
        return input
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines with it
    return lambda: console.input("> ")
