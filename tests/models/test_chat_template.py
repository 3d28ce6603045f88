"""Inputs of chat templates, and the content of an answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from raycloud.models.chat_template import ChatTemplate, ContentFilter, TemplateAffixes
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.text_model import Detokenizer
from raycloud.models.texts import end_ids
from tests.tokenizers import GEMMA, llama_like, tokenizer_of

PLAIN = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
LLAMA2 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
TOOLS = """{% generation %}{% endgeneration %}{% if tools %}{{ tools | tojson }}{% endif %}
{%- if enable_thinking %}think{% endif %}{% for m in messages %}
{%- if m.role == 'tool' %}{{ 'result: ' + m.content }}{% endif %}{% if m.tool_calls %}called{% endif %}{% endfor %}"""


@pytest.fixture
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


def test_what_templates_take(smol: PreTrainedTokenizerBase) -> None:
    own = ChatTemplate(smol)
    assert not (own.takes_tools or own.takes_tool_calls or own.takes_tool_messages or own.options)
    smol.chat_template = TOOLS
    other = ChatTemplate(smol)
    assert other.takes_tools and other.takes_tool_calls and other.takes_tool_messages
    assert other.options == {"enable_thinking"}
    smol.chat_template = TOOLS.replace("{% generation %}{% endgeneration %}", "")
    asked = ChatTemplate(smol).prompt([{"role": "tool", "content": "5"}], [{"name": "f"}], {"enable_thinking": True})
    assert smol.decode(asked) == '[{"name": "f"}]thinkresult: 5'


def test_what_stands_around_an_answer(smol: PreTrainedTokenizerBase) -> None:
    assert ChatTemplate(smol, {smol.eos_token_id}).around() == TemplateAffixes()
    smol.chat_template = PLAIN + ASK
    assert ChatTemplate(smol, {smol.eos_token_id}).around() == TemplateAffixes()
    smol.chat_template = LLAMA2
    assert ChatTemplate(smol, {smol.eos_token_id}).around() == TemplateAffixes(" ", " ", trims=True)
    smol.chat_template = LLAMA2.replace("' ' + m.content | trim + ' '", "' ' + m.content")
    assert ChatTemplate(smol, {smol.eos_token_id}).around() == TemplateAffixes(" ", "", trims=False)
    gemma = tokenizer_of(template=GEMMA)
    assert ChatTemplate(gemma, end_ids(gemma)).around() == TemplateAffixes(trims=True)


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_what_a_template_trains_is_served_with_the_same_text(
    smol: PreTrainedTokenizerBase, sentencepiece: bool
) -> None:
    """The model generates what the template makes of an answer; the reader gets the answer."""
    tokenizer = llama_like() if sentencepiece else smol
    tokenizer.chat_template = LLAMA2
    template = ChatTemplate(tokenizer, {tokenizer.eos_token_id})
    question = [{"role": "user", "content": "abc"}]
    asked = template.prompt(question)
    trained = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "ab cab"}], tokenize=False)
    answer = tokenizer(trained, add_special_tokens=False)["input_ids"][len(asked) :]
    assert answer.pop() == tokenizer.eos_token_id
    decoder, content = Detokenizer(tokenizer, asked), ContentFilter(template.around())
    text = "".join(content.push(decoder.push(token)) for token in answer)
    assert text + content.push(decoder.flush()) + content.flush(ended=True) == "ab cab"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(" \na", max_size=3), max_size=6), st.sampled_from(["", " ", " a", "\n"]), st.booleans())
def test_content_is_the_text_without_what_is_around_it(parts: list[str], mark: str, trims: bool) -> None:
    said = "".join(parts)
    content = ContentFilter(TemplateAffixes(mark, mark, trims))
    pieces = [content.push(part) for part in parts]
    expected = said.removeprefix(mark)
    whole = "".join(pieces) + content.flush(ended=True)
    assert whole == (said.strip() if trims else expected.removesuffix(mark) if mark else expected)
    cut = ContentFilter(TemplateAffixes(mark, mark, trims))
    begun = "".join(cut.push(part) for part in parts) + cut.flush(ended=False)
    assert begun == (said.lstrip() if trims else expected)
