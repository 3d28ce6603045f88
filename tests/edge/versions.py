"""Versions of a small language model, made by real retraining of its blocks, and clients that check who answered.

As a program it retrains a served model: ``python -m tests.edge.versions FOLDER KEPT COUNT`` trains one version after
the other, keeps each in ``KEPT/1``, ``KEPT/2`` …, and puts it in place of ``FOLDER`` when it reads a line.
"""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from raycloud.durable import write_folder
from raycloud.edge.whole_model import load_whole
from raycloud.models.generation import Decoding
from raycloud.models.loading import load_tokenizer
from raycloud.models.sampling import Sampling
from raycloud.models.text_model import TextModel
from raycloud.models.token_spelling import TokenSpelling
from raycloud.retrain.parts import parts_of
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import cross_entropy
from raycloud.retrain.trainer import RetrainTraining
from raycloud.retrain.window import retrain_blocks
from raycloud.training.lora import save_model
from tests.tokenizers import GEMMA, tokenizer_of

PROMPTS = ("the edge ", "a cloud ", "one more ", "block 2 of ", "x", "seven words that make a rather longer prompt ")
MADE = 4
"""Tokens of an answer."""
NAME = "tiny"
_SETTINGS = RetrainTraining(batch_size=8, lr=1e-2, warmup_steps=2)
_STEPS = 25
_LETTERS, _FIRST_LETTER = 26, 60


def write_first(folder: Path) -> None:
    """Write a random model with a byte-level tokenizer and a chat template."""
    tokenizer = tokenizer_of(begin=["<bos>"], template=GEMMA)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    write(LlamaForCausalLM(config), tokenizer, folder)


def write(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put a version in place of a folder, as every job of the package does."""
    write_folder(folder, lambda to: save_model(model, tokenizer, to))


def publish(version: Path, folder: Path) -> None:
    """Put a copy of a version in place of a folder."""
    write_folder(folder, lambda to: shutil.copytree(version, to, dirs_exist_ok=True) and None)


def retrain(source: Path, to: Path, seed: int) -> None:
    """Retrain the blocks of a version on an alphabet in an order of its own, and write the next version."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), load_tokenizer(str(source))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(_LETTERS, (64, 1), generator=generator)
    order = torch.randperm(_LETTERS, generator=generator)
    letters = order[(starts + torch.arange(25)) % _LETTERS] + _FIRST_LETTER
    samples = Samples({"input_ids": letters[:, :-1]}, letters[:, 1:])
    parts = parts_of(model, samples.inputs)
    retrain_blocks(model, parts, (0, 1), samples, cross_entropy, _SETTINGS, steps=_STEPS, seed=seed)
    write(model.eval(), tokenizer, to)


@dataclass(frozen=True)
class Answer:
    """Answer of a server to one request."""

    chat: bool
    prompt: str
    version: str
    tokens: tuple[bytes, ...]
    logprobs: tuple[float, ...]


def request_of(chat: bool, prompt: str, stream: bool, tokens: int = MADE) -> tuple[str, dict[str, Any]]:
    """Path and body of a greedy request with log-probabilities."""
    asked = {"model": NAME, "temperature": 0, "max_tokens": tokens, "min_tokens": tokens, "stream": stream}
    if chat:
        messages = [{"role": "user", "content": prompt}]
        return "/v1/chat/completions", {**asked, "messages": messages, "logprobs": True}
    return "/v1/completions", {**asked, "prompt": prompt, "logprobs": 0}


def read_answer(response: http.client.HTTPResponse, chat: bool, prompt: str) -> Answer:
    """Read an answer, whole or streamed; all parts of it must name one version."""
    assert response.status == 200, response.read()
    if str(response.headers["content-type"]).startswith("text/event-stream"):
        lines = response.read().decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-2:]
        parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    else:
        parts = [json.loads(response.read())]
    [version] = {part["system_fingerprint"] for part in parts}
    tokens, logprobs = list[bytes](), list[float]()
    for part in parts:
        choice = part["choices"][0]
        if (said := choice["logprobs"]) is None:
            continue
        if chat:
            tokens += [bytes(one["bytes"]) for one in said["content"]]
            logprobs += [one["logprob"] for one in said["content"]]
        else:
            tokens += map(_bytes_of, said["tokens"])
            logprobs += said["token_logprobs"]
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    return Answer(chat, prompt, version, tuple(tokens), tuple(logprobs))


def _bytes_of(spelled: str) -> bytes:
    """Bytes of a token of a completion, which spells those that are no text in hexadecimal."""
    _, half, escaped = spelled.partition("bytes:")
    return bytes.fromhex(escaped.replace("\\x", "")) if half else spelled.encode()


@dataclass
class Reference:
    """What one version answers offline."""

    model: TextModel

    @property
    def version(self) -> str:
        assert self.model.fingerprint is not None
        return self.model.fingerprint[:12]

    def answer(self, chat: bool, prompt: str, tokens: int = MADE) -> Answer:
        spelling = TokenSpelling(self.model.tokenizer)
        ids = self.model.chat_prompt([{"role": "user", "content": prompt}]) if chat else self.model.prompt(prompt)
        how = Decoding(Sampling(min_tokens=tokens), self.model.ends, top=0)
        made = list(self.model.source.tokens(ids, tokens, how))
        texts = tuple(spelling.bytes_of(token.id) for token in made)
        return Answer(chat, prompt, self.version, texts, tuple(token.scores.logprob for token in made if token.scores))


def references(folders: Sequence[Path]) -> dict[str, dict[tuple[bool, str], Answer]]:
    """Answers of some versions to all prompts, by version; each version differs from all others in every answer."""
    models = [Reference(load_whole(str(folder))) for folder in folders]
    found = {
        model.version: {(chat, prompt): model.answer(chat, prompt) for chat in (False, True) for prompt in PROMPTS}
        for model in models
    }
    assert len(found) == len(folders)
    for asked in next(iter(found.values())):
        assert len({answers[asked].tokens for answers in found.values()}) == len(folders), asked
    return found


def check(answer: Answer, expected: dict[str, dict[tuple[bool, str], Answer]]) -> None:
    """Check an answer token by token, with its log-probabilities, against the version that it names."""
    reference = expected[answer.version][answer.chat, answer.prompt]
    assert answer.tokens == reference.tokens
    assert torch.allclose(torch.tensor(answer.logprobs), torch.tensor(reference.logprobs), atol=1e-3)


def version_of(url: str) -> str:
    """Version that answers new requests, by the server's health."""
    at = urlsplit(url)
    with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=120)) as connection:
        connection.request("GET", "/healthz")
        return str(json.loads(connection.getresponse().read())["system_fingerprint"])


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@dataclass
class Clients:
    """Clients that ask one request after the other at the same time, whole and streamed, chats and completions."""

    url: str
    answers: list[Answer] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(6)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def wait(self, count: int, version: str | None = None) -> None:
        """Wait for a number of answers, and for one of a version."""
        wait_until(lambda: bool(self.errors) or (len(self.answers) >= count and self._answered(version)))
        assert not self.errors, self.errors[0]

    def _answered(self, version: str | None) -> bool:
        return version is None or any(answer.version == version for answer in reversed(self.answers))

    def _ask(self, number: int) -> None:
        at = urlsplit(self.url)
        try:
            with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=240)) as connection:
                for chat, prompt, stream in self._kinds(number):
                    if self._end.is_set():
                        return
                    path, body = request_of(chat, prompt, stream)
                    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                    self.answers.append(read_answer(connection.getresponse(), chat, prompt))
        except BaseException as error:
            self.errors.append(error)

    @staticmethod
    def _kinds(number: int) -> Iterator[tuple[bool, str, bool]]:
        while True:
            yield number % 2 == 0, PROMPTS[number % len(PROMPTS)], number % 3 == 0
            number += 1


def main(folder: str, kept: str, count: str) -> None:
    """Retrain a model that is served; each version takes its place when a line is read."""
    source = Path(folder)
    for seed in range(1, int(count) + 1):
        version = Path(kept) / str(seed)
        retrain(source, version, seed)
        print("trained", flush=True)
        if not sys.stdin.readline():
            return
        publish(version, Path(folder))
        source = version


if __name__ == "__main__":
    main(*sys.argv[1:])
