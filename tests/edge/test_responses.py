"""Requests of the unmodified `openai` client, for a whole model and for one whose middle is behind a link.

Every number equals that of the stock model on the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.edge.server import create_app
from raycloud.edge.whole_model import load_whole
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.split.plan import PlanSet
from tests.edge.sources import Script, cut, running

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Served:
    """Client of a server, with the stock model that must give the same numbers."""

    client: openai.OpenAI
    tokenizer: PreTrainedTokenizerBase
    stock: PreTrainedModel

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Compute log-probabilities (T, V) of what follows each token."""
        return self.stock(torch.tensor([ids])).logits[0].log_softmax(-1)

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int, **how: Any) -> list[int]:
        made = self.stock.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **how
        )
        return made[0, len(ids) :].tolist()

    def chat_ids(self, messages: list[Any]) -> list[int]:
        made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(made["input_ids"])

    def complete(self, prompt: Any, **more: Any) -> Any:
        return self.client.completions.create(model="tiny", prompt=prompt, **more)

    def chat(self, messages: list[Any] = HELLO, **more: Any) -> Any:
        return self.client.chat.completions.create(model="tiny", messages=messages, **more)


@pytest.fixture(scope="module", params=["whole", "split"])
def served(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Served]:
    tokenizer = load_tokenizer(str(tiny_llama))
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()

    if request.param == "whole":
        yield from over(load_whole(str(tiny_llama)), tokenizer, stock)
    else:
        # No block behind the second cut: where the cloud would return the last hidden state alone.
        with cut(tiny_llama, PlanSet((1,), (4,))) as model:
            yield from over(model, tokenizer, stock)


def over(model: Any, tokenizer: PreTrainedTokenizerBase, stock: PreTrainedModel) -> Iterator[Served]:
    with (
        running(create_app(model, "tiny")) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=240) as client,
    ):
        yield Served(client, tokenizer, stock)


def test_echo_scores_the_prompt(served: Served) -> None:
    """Requests of an evaluation harness, also with a prompt longer than a chunk."""
    for text in ("Once upon a time", "so it goes, and " * 50):
        ids = served.tokenizer(text)["input_ids"]
        expected = served.logprobs(ids)
        for prompt in (text, ids, [ids]):
            answer = served.complete(prompt, echo=True, logprobs=3, max_tokens=0)
            (choice,) = answer.choices
            assert choice.text == text and choice.finish_reason == "length"
            said = choice.logprobs
            assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
            assert "".join(said.tokens) == text
            assert [text[at:].startswith(token) for at, token in zip(said.text_offset, said.tokens, strict=True)]
            for at, token in enumerate(ids[1:]):
                assert said.token_logprobs[at + 1] == pytest.approx(float(expected[at, token]), abs=2e-4)
                top = said.top_logprobs[at + 1]
                assert max(top.values()) == pytest.approx(float(expected[at].max()), abs=2e-4)
                assert top[said.tokens[at + 1]] == said.token_logprobs[at + 1] and len(top) in (3, 4)
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)


def test_scores_of_what_is_generated(served: Served) -> None:
    ids = served.tokenizer("Once upon")["input_ids"]
    made = served.greedy(ids, 4)
    expected = served.logprobs(ids + made)[len(ids) - 1 :]
    chosen = [float(expected[at, token]) for at, token in enumerate(made)]
    plain = served.complete("Once upon", logprobs=0, max_tokens=4, temperature=0).choices[0].logprobs
    assert plain.token_logprobs == pytest.approx(chosen, abs=2e-4)
    assert [list(top) for top in plain.top_logprobs] == [[token] for token in plain.tokens]
    echoed = served.complete("Once upon", echo=True, logprobs=1, max_tokens=4, temperature=0).choices[0]
    assert echoed.text == "Once upon" + served.tokenizer.decode(made)
    assert echoed.logprobs.token_logprobs[len(ids) :] == pytest.approx(chosen, abs=2e-4)
    # The same in a stream, whose pieces joined are the whole.
    chunks = list(served.complete("Once upon", echo=True, logprobs=1, max_tokens=4, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed.text
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(echoed.logprobs, name)


def test_scores_of_a_chat(served: Served) -> None:
    ids = served.chat_ids(HELLO)
    made = served.greedy(ids, 5)
    expected = served.logprobs(ids + made)[len(ids) - 1 :]
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "temperature": 0, "max_tokens": 5}
    content = served.chat(**asked).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == served.tokenizer.decode(made)
    for at, token in enumerate(content):
        best = expected[at].topk(2)
        assert token.logprob == pytest.approx(float(expected[at, made[at]]), abs=2e-4)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-4)
    streamed = [chunk.choices[0].logprobs for chunk in served.chat(**asked, stream=True)]
    assert [token for part in streamed if part for token in part.content] == content
    assert served.chat(max_tokens=1).choices[0].logprobs is None


def test_ends_asked_for_and_held_off(served: Served) -> None:
    ids = served.tokenizer("Once upon")["input_ids"]
    made = served.greedy(ids, 12)
    end = made[3]
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "logprobs": 0}
    cut_short = served.complete("Once upon", **asked, extra_body={"stop_token_ids": [end]}).choices[0]
    until = made.index(end)
    assert cut_short.finish_reason == "stop" and cut_short.text == served.tokenizer.decode(made[:until])
    # The end is no text, and its score is told: harnesses count on one for each token that the model chose.
    assert len(cut_short.logprobs.tokens) == until + 1
    held = served.complete("Once upon", **asked, extra_body={"stop_token_ids": [end], "min_tokens": 12}).choices[0]
    expected = served.greedy(ids, 12, suppress_tokens=[end, *_ends(served)])
    assert held.finish_reason == "length" and held.text == served.tokenizer.decode(expected)


def _ends(served: Served) -> list[int]:
    return [served.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        (
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        ),
    ],
)
def test_penalties_as_stock_generates(served: Served, ours: dict[str, Any], stock: dict[str, Any]) -> None:
    text = "so it goes and so it"
    expected = served.greedy(served.tokenizer(text)["input_ids"], 12, **stock)
    assert expected != served.greedy(served.tokenizer(text)["input_ids"], 12)
    answer = served.complete(text, temperature=0, max_tokens=12, logprobs=0, extra_body=ours)
    assert answer.choices[0].text == served.tokenizer.decode(expected)


def test_biases_and_penalties_of_openai(served: Served) -> None:
    token = served.tokenizer(" house", add_special_tokens=False)["input_ids"][0]
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "logit_bias": {str(token): 100}}
    assert served.complete("so", **asked).choices[0].text == " house" * 4
    # Each one costs two more: after some, the bias no longer outweighs what was said before.
    spread = served.complete("so", **{**asked, "max_tokens": 80}, frequency_penalty=2.0, presence_penalty=2.0).choices[
        0
    ]
    assert spread.text.startswith(" house" * 20) and spread.text != " house" * 80


def test_several_choices_of_several_prompts(served: Served) -> None:
    asked: dict[str, Any] = {"seed": 5, "max_tokens": 6, "n": 2}
    prompts = ["Once upon", "so it"]
    answer = served.complete(prompts, **asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] != texts[1] and texts[2] != texts[3]
    for number, prompt in enumerate(prompts):
        assert served.complete(prompt, **{**asked, "n": 1}).choices[0].text == texts[2 * number]
    assert answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == sum(len(served.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    streamed = dict.fromkeys(range(4), "")
    for chunk in served.complete(prompts, **asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == texts and chunk.usage == answer.usage
    said = [choice.message.content for choice in served.chat(n=3, seed=1, max_tokens=6).choices]
    assert len(set(said)) == 3 and said[0] == served.chat(seed=1, max_tokens=6).choices[0].message.content


def test_a_developer_is_the_system(served: Served) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    answers = [
        served.chat([{"role": role, "content": "be brief"}, *HELLO], **asked) for role in ("system", "developer")
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage


def test_a_temperature_near_zero_and_min_p_of_one_are_greedy(served: Served) -> None:
    greedy = served.complete("Once upon", temperature=0).choices[0].text
    assert served.complete("Once upon", temperature=1e-40).choices[0].text == greedy
    assert served.complete("Once upon", extra_body={"min_p": 1}).choices[0].text == greedy


def test_answers_that_are_json(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    for seed in range(3):
        choice = served.chat(response_format=form, seed=seed, max_tokens=200).choices[0]
        made = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and made["kind"] in ("cat", "dog") and 0 <= made["legs"] <= 9
    anything = served.chat(response_format={"type": "json_object"}, seed=1, max_tokens=4).choices[0]
    assert anything.message.content.startswith("{")


@pytest.fixture(scope="module")
def smol() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve("builtin:smollm2-135m-instruct"))


def test_a_stream_line_by_line(smol: PreTrainedTokenizerBase) -> None:
    """`httpx` splits lines at Unicode line separators, so an event must not contain any."""
    text = "one\u2028two\u2029three\x85four\x0bfive\x1esix\r\nseven"
    with running(create_app(Script(smol, text).model, "echo")) as url:
        for path, body in (
            ("chat/completions", {"messages": HELLO}),
            ("completions", {"prompt": "x", "max_tokens": 99}),
        ):
            said = ""
            asked = {"model": "echo", "stream": True, **body}
            with httpx.stream("POST", f"{url}/{path}", json=asked, timeout=240) as answer:
                lines = [line for line in answer.iter_lines() if line]
            assert lines.pop() == "data: [DONE]"
            for line in lines:
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                said += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            assert said == text


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}},
]
TEMPLATE = """{% if tools %}{{ tools | tojson }} Answer <tool_call>{}</tool_call>{% endif %}{% for m in messages %}
{%- if m.role == 'tool' %}result {{ m.tool_call_id }}: {{ m.content }}{% else %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}{% endif %}
{%- endfor %}"""


@pytest.fixture(scope="module")
def with_tools() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(resolve("builtin:smollm2-135m-instruct"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        ("plain text", "plain text", []),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", {"a": 1})]),
        (
            'so <tool_call>{"name": "add", "arguments": {}}</tool_call>\n<tool_call>{"name": "f"}</tool_call>',
            "so ",
            [("add", {}), ("f", {})],
        ),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("a < b <tool_", "a < b <tool_", []),
    ],
)
def test_calls_of_tools(
    with_tools: PreTrainedTokenizerBase, said: str, content: str, calls: list[Any], stream: bool
) -> None:
    source = Script(with_tools, said)
    with (
        running(create_app(source.model, "echo")) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client,
    ):
        asked: Any = {"model": "echo", "messages": HELLO, "tools": TOOLS}
        if stream:
            found, text, finish = [], "", None
            for chunk in client.chat.completions.create(**asked, stream=True):
                delta = chunk.choices[0].delta
                text += delta.content or ""
                found += [(call.function.name, json.loads(call.function.arguments)) for call in delta.tool_calls or ()]
                finish = chunk.choices[0].finish_reason or finish
        else:
            choice = client.chat.completions.create(**asked).choices[0]
            text, finish = choice.message.content or "", choice.finish_reason
            found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]
        assert (text, found, finish) == (content, calls, "tool_calls" if calls else "stop")
        assert '"name": "add"' in with_tools.decode(source.asked[0][0])
        client.chat.completions.create(**{**asked, "tool_choice": "none"})
        assert '"name": "add"' not in with_tools.decode(source.asked[1][0])


def test_the_history_of_calls_reaches_the_template(with_tools: PreTrainedTokenizerBase) -> None:
    source = Script(with_tools, "5")
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    history: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "12"}]},
    ]
    with (
        running(create_app(source.model, "echo")) as url,
        openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client,
    ):
        client.chat.completions.create(model="echo", messages=history)
        assert with_tools.decode(source.asked[0][0]) == "user: helloassistant: add(7)result c1: 12"
        history[1]["tool_calls"][0]["function"]["arguments"] = "{broken"
        with pytest.raises(openai.BadRequestError, match="must be a JSON object, as a string"):
            client.chat.completions.create(model="echo", messages=history)
