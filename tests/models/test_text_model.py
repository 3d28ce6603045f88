"""Streamed pieces join to the whole text for any token boundaries; stop strings end it at any position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from raycloud.errors import ModelError
from raycloud.models.generation import Decoding, Token
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.text_model import Detokenizer, StopStrings, TextModel
from raycloud.models.texts import end_ids
from tests import tokenizers
from tests.tokenizers import BOS, TURN, tokenizer_of

TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("  \n aé你好世界😀👩‍👩‍👧🇩🇪ß…")), max_size=40)


class Script:
    """Fake source that generates given tokens."""

    max_length = 1000

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.given, self.closed = list(ids), 0, False
        self.streams: list[Iterator[Token]] = []  # so that nothing is closed by being forgotten

    def tokens(self, prompt: Sequence[int], limit: int, decoding: Decoding) -> Iterator[Token]:
        self.streams.append(self._stream(limit))
        return self.streams[-1]

    def _stream(self, limit: int) -> Iterator[Token]:
        try:
            for token in self.ids[:limit]:
                self.given += 1
                yield Token(token)
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerBase:
    return tokenizers.llama_like()


def joined(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    decoder = Detokenizer(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def whole(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_pieces_of_a_byte_level_text_join_to_it(smol: PreTrainedTokenizerBase, text: str) -> None:
    ids = smol(text, add_special_tokens=False)["input_ids"]
    pieces = joined(smol, ids)
    assert "".join(pieces) == whole(smol, ids)
    if whole(smol, ids) == text and "\ufffd" not in text:  # the vocabulary lacks a few bytes
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.one_of(st.integers(0, 400), st.integers(0, 49_151)), max_size=60))
def test_pieces_of_any_byte_level_tokens_join_to_what_all_decode_to(
    smol: PreTrainedTokenizerBase, ids: list[int]
) -> None:
    """Texts include single bytes, special tokens and incomplete characters."""
    assert "".join(joined(smol, ids)) == whole(smol, ids)


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(TEXTS, st.text(" ab😀你", max_size=12)))
def test_pieces_of_a_sentencepiece_text_join_to_it(llama_like: PreTrainedTokenizerBase, text: str) -> None:
    ids = llama_like(text, add_special_tokens=False)["input_ids"]
    pieces = joined(llama_like, [0, *ids, 1])
    assert "".join(pieces) == whole(llama_like, ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_sentencepiece_bytes_that_are_no_text_stop_nothing(llama_like: PreTrainedTokenizerBase) -> None:
    def byte(value: int) -> int:
        return 3 + value

    lone = [byte(0xE4), *llama_like.convert_tokens_to_ids(["a", "b"])]
    assert joined(llama_like, lone) == ["", "\ufffda", "b", ""]
    after_a_character = [*(byte(value) for value in "你".encode()), byte(0x80), *lone[1:] * 2]
    assert joined(llama_like, after_a_character) == ["", "", "你", "", "", "", "\ufffdaba", "b", ""]


def test_an_emoji_comes_when_its_last_token_does(smol: PreTrainedTokenizerBase) -> None:
    ids = smol("a😀b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    assert joined(smol, ids) == ["a", *[""] * (len(ids) - 3), "😀", "b", ""]


def test_special_tokens_inside_a_character_change_nothing(smol: PreTrainedTokenizerBase) -> None:
    first, *rest = smol("😀", add_special_tokens=False)["input_ids"]
    assert "".join(joined(smol, [first, *smol.all_special_ids * 10, *rest])) == "😀"


@pytest.mark.parametrize("what", ["text", "garbage", "silence"])
def test_decoding_looks_at_a_few_tokens_only(
    smol: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    lone = smol("😀", add_special_tokens=False)["input_ids"][-1:]
    ids = {
        "text": smol("the quick brown fox " * 100)["input_ids"],
        "garbage": lone * 500,
        "silence": list(smol.all_special_ids) * 200,
    }[what]
    decoder, widths, decode = Detokenizer(smol), [0], Detokenizer._decode

    def spy(self: Detokenizer, ids: list[int]) -> str:
        widths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Detokenizer, "_decode", spy)
    text = "".join(decoder.push(token) for token in ids) + decoder.flush()
    assert text == whole(smol, ids)
    assert max(widths) <= 17
    assert len(widths) <= 3 * len(ids) + 2


def cut_at_the_first_stop(text: str, stops: Sequence[str]) -> str | None:
    """Find, by brute force, the match that ends first, and of those the one that begins first."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return None


@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_a_stop_string_ends_the_text_wherever_its_parts_lie(parts: list[str], stops: list[str]) -> None:
    found, said = StopStrings(stops), ""
    expected = cut_at_the_first_stop("".join(parts), stops)
    for part in parts:
        said += found.push(part)
        assert expected is None or expected.startswith(said)  # nothing that belongs to a stop string gets out
    assert found.met == (expected is not None)
    assert said + found.flush() == ("".join(parts) if expected is None else expected)


def test_text_is_held_back_only_while_it_could_become_a_stop_string() -> None:
    found = StopStrings(["\n\nUser:"])
    assert [found.push(text) for text in ("yes", ".\n", "\nUs", "ing", " it\n")] == ["yes", ".", "", "\n\nUsing", " it"]
    assert found.flush() == "\n"


def test_a_stop_string_across_tokens_ends_the_generation(smol: PreTrainedTokenizerBase) -> None:
    ids = smol("One, two.\n\nUser: and so on, and on", add_special_tokens=False)["input_ids"]
    source = Script(ids)
    pieces = list(TextModel(source, smol, frozenset()).pieces([1], 100, stop=["\nUser:", "never"]))
    assert "".join(piece.text for piece in pieces) == "One, two.\n"
    assert pieces[-1].finish == "stop" and pieces[-1].tokens == source.given < len(ids)
    assert source.closed


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["<end_of_turn>"], "one"),
        (["<end_of_turn>\n"], "one\n, two"),  # the second one has the line break behind it
        (["e<end_of_turn>"], "on"),
        (["one\n"], ""),  # special tokens are not in the text that ordinary stop strings are looked for in
        (["<start_of_turn>"], "one\n, two\n, three"),
    ],
)
def test_a_stop_string_with_a_special_token_ends_the_text(stop: list[str], expected: str) -> None:
    tokenizer = tokenizer_of()
    ids = tokenizer("one<end_of_turn>", add_special_tokens=False)["input_ids"]
    ids += tokenizer("\n, two<end_of_turn>\n, three", add_special_tokens=False)["input_ids"]
    if stop == ["<end_of_turn>\n"]:
        ids.remove(TURN)
    source = Script(ids)
    pieces = list(TextModel(source, tokenizer, frozenset()).pieces([1], 100, stop=stop))
    assert "".join(piece.text for piece in pieces) == expected
    assert pieces[-1].finish == "stop" and (source.given < len(ids)) == (stop != ["<start_of_turn>"])


def test_a_completion_prompt_begins_as_texts_do_and_does_not_end() -> None:
    tokenizer = tokenizer_of(begin=["<bos>"], end=["<eos>"])
    model = TextModel(Script([]), tokenizer, frozenset())
    assert model.prompt("go on") == [BOS, *tokenizer("go on", add_special_tokens=False)["input_ids"]]
    assert model.prompt("<bos>go on") == model.prompt("go on")


def test_why_a_text_ends(smol: PreTrainedTokenizerBase) -> None:
    ids = smol("so it is 😀", add_special_tokens=False)["input_ids"]
    *most, last = TextModel(Script(ids), smol, frozenset()).pieces([1], 100)
    assert (last.finish, last.tokens, len(most)) == ("stop", len(ids), len(ids))
    assert all(piece.finish is None for piece in most)
    *most, last = TextModel(Script(ids), smol, frozenset()).pieces([1], len(ids) - 1, stop=["😀"])
    assert (last.finish, last.tokens) == ("length", len(ids) - 1)
    assert "".join(piece.text for piece in [*most, last]).startswith("so it is \ufffd")
    nothing = list(TextModel(Script([]), smol, frozenset()).pieces([1], 5))
    assert [(piece.text, piece.tokens, piece.finish) for piece in nothing] == [("", 0, "stop")]


def test_leaving_early_frees_the_source(smol: PreTrainedTokenizerBase) -> None:
    source = Script([5] * 50)
    pieces = TextModel(source, smol, frozenset()).pieces([1], 50)
    next(pieces)
    pieces.close()
    assert source.closed and source.given == 1


def test_prompts(smol: PreTrainedTokenizerBase, llama_like: PreTrainedTokenizerBase) -> None:
    model = TextModel(Script([]), smol, frozenset())
    ids = model.chat_prompt([{"role": "user", "content": "hi"}])
    assert smol.decode(ids).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert smol.decode(model.prompt("hi there")) == "hi there"
    with pytest.raises(ModelError, match="no chat template"):
        TextModel(Script([]), llama_like, frozenset()).chat_prompt([{"role": "user", "content": "hi"}])


def test_a_chat_template_that_refuses_is_an_error_of_one_line(smol: PreTrainedTokenizerBase) -> None:
    strict = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match="roles must alternate"):
        TextModel(Script([]), strict, frozenset()).chat_prompt([{"role": "user", "content": "hi"}])


def test_ends_are_those_of_tokenizer_and_configurations(smol: PreTrainedTokenizerBase) -> None:
    ends = end_ids(smol, LlamaConfig(eos_token_id=7), GenerationConfig(eos_token_id=[8, 9]), None)
    assert ends == {smol.eos_token_id, 7, 8, 9}


@pytest.mark.parametrize("at", range(1, 8))
def test_a_text_goes_on_with_its_space(
    llama_like: PreTrainedTokenizerBase, smol: PreTrainedTokenizerBase, at: int
) -> None:
    """SentencePiece drops the space at the beginning of a text, but a completion begins within one."""
    for tokenizer in (llama_like, smol):
        ids = tokenizer("ab cab é ab abc", add_special_tokens=False)["input_ids"]
        pieces = TextModel(Script(ids[at:]), tokenizer, frozenset()).pieces(ids[:at], 100)
        assert (
            whole(tokenizer, ids[:at]).rstrip("\ufffd") + "".join(piece.text for piece in pieces) == "ab cab é ab abc"
        )
