"""Terminal chat: its output, its history, and interruptions."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from raycloud.edge.chat import Conversation, chat
from raycloud.errors import LinkError
from raycloud.link.meter import Meter
from raycloud.models.generation import Decoding, Token
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.sampling import GREEDY
from tests.edge.sources import Script


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


def says(conversation: Conversation, lines: Sequence[str | type[BaseException]], meter: Meter | None = None) -> str:
    """Return the output of the terminal when the user types these lines and ends with Ctrl-D."""
    typed = iter(lines)

    def ask() -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    shown = io.StringIO()
    chat(conversation, Console(file=shown, highlight=False, markup=False, soft_wrap=True), ask, meter)
    return shown.getvalue()


def test_an_answer_and_what_it_cost(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "All [bold] right 😀.", pause_s=0.001)
    conversation = Conversation(source.model, 100, GREEDY)
    shown = says(conversation, ["hello", "", "/quit", "never asked"])
    assert "All [bold] right 😀.\n" in shown
    assert f"{len(source.ids)} tokens · first after 0.0 s · " in shown and " tokens/s" in shown
    assert "round trips" not in shown
    assert len(source.asked) == 1


def test_a_cut_model_shows_round_trips_and_bytes(smol: PreTrainedTokenizerBase) -> None:
    meter = Meter()
    meter.add("up", 10**9, messages=9)  # an earlier answer's
    meter.add("down", 10**9, messages=9)

    class Cut(Script):
        def tokens(self, prompt: Sequence[int], limit: int, decoding: Decoding) -> Iterator[Token]:
            for token in super().tokens(prompt, limit, decoding):
                meter.add("up", 600)
                meter.add("down", 500)
                yield token

    source = Cut(smol, "one two three")
    shown = says(Conversation(source.model, 100, GREEDY), ["hello"], meter)
    assert "3 tokens" in shown and " · 3 round trips · 1.8 kB up, 1.5 kB down\n" in shown


def test_a_conversation_is_remembered_until_it_is_reset(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "fine")
    conversation = Conversation(source.model, 100, GREEDY)
    says(conversation, ["hello", "and you?", "/reset", "who?"])
    prompts = [smol.decode(prompt) for prompt, _, _ in source.asked]
    assert "hello" in prompts[1] and "fine" in prompts[1] and "and you?" in prompts[1]
    assert "hello" not in prompts[2] and "who?" in prompts[2]


def interrupted(source: Script, at: int) -> Callable[..., Iterator[Token]]:
    """Source that raises Ctrl-C before token ``at``."""
    tokens = source.tokens

    def cut(*arguments: object) -> Iterator[Token]:
        for index, token in enumerate(tokens(*arguments)):  # type: ignore[arg-type]
            if index == at:
                raise KeyboardInterrupt
            yield token

    return cut


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    smol: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Script(smol, "one two three four")
    conversation = Conversation(source.model, 100, GREEDY)
    monkeypatch.setattr(source, "tokens", interrupted(source, 2))
    shown = says(conversation, [KeyboardInterrupt, "count"])
    assert "one two\n2 tokens" in shown and "stopped" in shown and "three" not in shown
    assert source.open == 0
    assert conversation.messages[-1] == {"role": "assistant", "content": "one two"}
    monkeypatch.undo()
    assert "one two three four" in says(conversation, ["go on"])
    conversation.messages.clear()
    monkeypatch.setattr(source, "tokens", interrupted(source, 0))
    assert "0 tokens" in says(conversation, ["count"])
    assert conversation.messages == []  # a question without an answer would not be a conversation


def test_a_full_context_and_a_broken_link_are_said_and_survived(smol: PreTrainedTokenizerBase) -> None:
    source = Script(smol, "yes", max_length=60)
    conversation = Conversation(source.model, 100, GREEDY)
    shown = says(conversation, ["many words " * 40, "hello"])
    assert "error: the conversation has" in shown and "the model takes 60" in shown and "/reset" in shown
    assert "yes\n" in shown
    source.error = LinkError("the cloud went away")
    conversation.messages.clear()
    shown = says(conversation, ["hello"])
    assert "yes" in shown and "error: the cloud went away" in shown


def test_an_answer_at_its_limit_says_so(smol: PreTrainedTokenizerBase) -> None:
    shown = says(Conversation(Script(smol, "one two three four").model, 2, GREEDY), ["count"])
    assert "one two\n2 tokens" in shown and shown.endswith("cut at the limit\n")
