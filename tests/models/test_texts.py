"""Begin and end of texts equal those of tokenizer and chat template in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from raycloud.errors import ModelError
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.surgery.extraction import extract
from raycloud.models.texts import Bos, TextBounds, end_ids, save_end_ids, special_ids, turn_end
from tests.tokenizers import BOS, EOS, GEMMA, SPECIAL, TURN, tokenizer_of

TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"


@pytest.mark.parametrize(
    ("begin", "bos", "expected", "said"),
    [
        (["<bos>"], "auto", (BOS,), "yes (the tokenizer's own post-processor)"),
        (["<bos>"], True, (BOS,), "yes (the tokenizer's own post-processor)"),
        (["<bos>"], False, (), "no (asked for)"),
        ([], "auto", (), "no (the tokenizer's own post-processor)"),
        ([], True, (BOS,), "yes (asked for)"),
        ([], False, (), "no (asked for)"),
    ],
)
def test_bos_is_the_tokenizers_own_unless_asked_for(
    begin: list[str], bos: Bos, expected: tuple[int, ...], said: str
) -> None:
    tokenizer = tokenizer_of(begin=begin)
    bounds = TextBounds.of(tokenizer, bos)
    assert (bounds.begin, bounds.bos) == (expected, said)
    bare = tokenizer("some text", add_special_tokens=False)["input_ids"]
    if bos == "auto":
        assert bounds.begun(bare) == tokenizer("some text")["input_ids"]
    assert bounds.begun([*expected, *bare]) == [*expected, *bare]  # never doubled


def test_what_the_tokenizer_puts_behind_a_text_is_its_end_and_no_prompt_has_it() -> None:
    tokenizer = tokenizer_of(begin=["<bos>"], end=["<eos>"])
    bounds = TextBounds.of(tokenizer)
    assert (bounds.begin, bounds.end) == ((BOS,), (EOS,))
    assert bounds.begun(tokenizer("go on", add_special_tokens=False)["input_ids"])[-1] != EOS


@pytest.mark.parametrize(
    ("template", "bos", "expected", "said"),
    [
        (GEMMA, "auto", (), "yes (the chat template)"),
        (GEMMA, True, (), "yes (the chat template)"),
        (GEMMA.removeprefix("{{ bos_token }}"), "auto", (), "no (the chat template)"),
        (GEMMA.removeprefix("{{ bos_token }}"), True, (BOS,), "yes (asked for)"),
    ],
)
def test_a_chat_template_that_writes_bos_gets_no_second_one(
    template: str, bos: Bos, expected: tuple[int, ...], said: str
) -> None:
    bounds = TextBounds.of(tokenizer_of(begin=["<bos>"], template=template), bos, chat=True)
    assert (bounds.begin, bounds.bos, bounds.answer) == (expected, said, (TURN,))


def test_bos_false_is_refused_where_the_chat_template_writes_it() -> None:
    tokenizer = tokenizer_of(begin=["<bos>"], template=GEMMA)
    with pytest.raises(ModelError, match=r"bos is false, and the chat template of '.*' writes BOS itself; allowed: "):
        TextBounds.of(tokenizer, False, chat=True)
    silent = tokenizer_of(begin=["<bos>"], template=GEMMA.removeprefix("{{ bos_token }}"))
    assert TextBounds.of(silent, False, chat=True).begin == ()


@pytest.mark.parametrize("bos", [True, "auto"])
def test_a_tokenizer_without_the_token_that_is_asked_for(bos: Bos) -> None:
    tokenizer = tokenizer_of(bos_token=None, eos_token=None)
    if bos is True:
        with pytest.raises(ModelError, match=r"bos is true, and the tokenizer .* names no BOS token; allowed: auto"):
            TextBounds.of(tokenizer, bos)
    else:
        with pytest.raises(ModelError, match="names no EOS token, which an answer ends with; allowed: format plain"):
            _ = TextBounds.of(tokenizer, bos).answer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (GEMMA, "<end_of_turn>"),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}", "<eos>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}, then<end_of_turn>{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_turn_end_is_what_the_template_writes_behind_an_answer(template: str | None, expected: str | None) -> None:
    tokenizer = tokenizer_of(template=template)
    found = turn_end(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected
    assert TextBounds.of(tokenizer, chat=True).answer == (EOS if found is None else found,)
    assert TextBounds.of(tokenizer).answer == (EOS,)


def test_chatml_ends_a_turn_with_im_end() -> None:
    smol = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    assert turn_end(smol) == smol.convert_tokens_to_ids("<|im_end|>")
    assert TextBounds.of(smol).begin == ()  # its <|im_start|> is named BOS, and no text begins with it


@pytest.mark.parametrize("name", ["tinyllama-1.1b-3T", "mistral-7b-v0.1", "gpt2-base"])
def test_published_tokenizers_begin_texts_as_transformers_does(name: str) -> None:
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"no tokenizer at '{TOKENIZERS / name}'")
    tokenizer, stock = load_tokenizer(str(TOKENIZERS / name)), AutoTokenizer.from_pretrained(TOKENIZERS / name)
    for text in ("Hello there", " a space", "é\n\n"):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert TextBounds.of(tokenizer).begun(bare) == stock(text)["input_ids"]


def test_ends_are_those_of_tokenizer_template_and_configurations() -> None:
    tokenizer = tokenizer_of(template=GEMMA)
    assert end_ids(tokenizer, LlamaConfig(eos_token_id=7), GenerationConfig(eos_token_id=[8, 9]), None) == {
        EOS,
        TURN,
        7,
        8,
        9,
    }


def test_special_tokens_without_a_name_are_special() -> None:
    assert special_ids(tokenizer_of()) == set(range(len(SPECIAL)))


def test_all_ends_are_kept_when_a_model_is_cut_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(template=GEMMA)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [EOS, 9]  # as instruct models publish it
    save_end_ids(model, tokenizer)
    student = extract(model, [0])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == [EOS, TURN, 9]
    # What is built from the configuration alone, as students are on their way through a cluster, has them too.
    assert LlamaForCausalLM(loaded.config).generation_config.eos_token_id == [EOS, TURN, 9]
