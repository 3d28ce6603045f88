"""A chat in the terminal that says what each answer cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass, field

from rich.console import Console
from rich.filesize import decimal

from raycloud.errors import RaycloudError
from raycloud.link.meter import Meter
from raycloud.models.sampling import Sampling
from raycloud.models.text import Piece, TextModel

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass
class Conversation:
    """The messages so far and the model that answers them."""

    model: TextModel
    limit: int
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, question: str) -> Generator[Piece, None, None]:
        """The model's next message, which is remembered as far as it was read; a question without answer is not.

        Raises:
            RaycloudError: the conversation fills the model's context, or the model cannot chat.
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
            with closing(self.model.pieces(prompt, min(self.limit, room), self.sampling)) as pieces:
                for piece in pieces:
                    said += piece.text
                    yield piece
        finally:
            if said:
                self.messages = [*asked, {"role": "assistant", "content": said}]


def chat(conversation: Conversation, console: Console, ask: Callable[[], str], meter: Meter | None = None) -> None:
    """Questions and answers until the user leaves.

    Args:
        conversation: goes on from what it holds.
        console: where answers go.
        ask: the next question; EOFError ends the chat.
        meter: of the link to the cloud, whose messages are of the kinds ``up`` and ``down``.
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


def asker(console: Console) -> Callable[[], str]:
    """Asks with a prompt and line editing on a terminal, and reads plain lines otherwise."""
    if not console.is_terminal:
        return input
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines with it
    return lambda: console.input("> ")
