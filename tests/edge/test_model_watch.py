"""Swaps of a served model while it answers."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from raycloud.checksums import CHECKSUMS
from raycloud.edge import model_watch
from raycloud.edge.model_watch import ModelWatch, folder_state
from raycloud.edge.served_model import ServedModel
from raycloud.edge.server import create_app
from raycloud.edge.whole_model import load_whole
from raycloud.errors import ModelError
from raycloud.models.checkpoint import SINGLE
from raycloud.models.configuration import CONFIG
from raycloud.models.generation import Decoding, Token, TokenSource
from tests.edge.sources import running
from tests.edge.versions import (
    MADE,
    NAME,
    PROMPTS,
    Answer,
    Clients,
    Reference,
    check,
    publish,
    read_answer,
    references,
    request_of,
    retrain,
    version_of,
    wait_until,
    write,
    write_first,
)
from tests.tokenizers import tokenizer_of

Expected = dict[str, dict[tuple[bool, str], Answer]]
REFUSED = "the new version is refused, the served one goes on: "


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of four versions: each was retrained from the one before it."""
    folders = [tmp_path_factory.mktemp("kept") / str(number) for number in range(4)]
    write_first(folders[0])
    for seed, (source, to) in enumerate(pairwise(folders), 1):
        retrain(source, to, seed)
    return folders


@pytest.fixture(scope="module")
def expected(kept: list[Path]) -> Expected:
    """Answers of each version offline, in the order of the versions."""
    return references(kept)


@pytest.fixture
def folder(tmp_path: Path, kept: list[Path]) -> Path:
    """Folder of the served model, with the first version."""
    publish(kept[0], tmp_path / NAME)
    return tmp_path / NAME


def watch_on(folder: Path, said: Callable[[str], None] = lambda line: None) -> ModelWatch:
    return ModelWatch(folder, said, every_s=0.02)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with watch_on(folder) as model, running(create_app(model, NAME)) as url:
        yield url


def ask(url: str, prompt: str = PROMPTS[0]) -> Answer:
    at = urlsplit(url)
    with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=240)) as connection:
        path, body = request_of(False, prompt, False)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return read_answer(connection.getresponse(), False, prompt)


def swap_three_times(url: str, versions: Sequence[str], publish_next: Callable[[], None], total: int) -> list[Answer]:
    """Answers to ``total`` requests and more, in whose course each version takes the place of the one before it."""
    with Clients(url) as clients:
        for number, version in enumerate(versions):
            if number:
                publish_next()
            clients.wait(total * (number + 1) // len(versions), version)
    assert not clients.errors, clients.errors[0]
    return clients.answers


def test_1000_requests_and_three_swaps(kept: list[Path], expected: Expected, folder: Path) -> None:
    versions, following = list(expected), iter(kept[1:])
    with served(folder) as url:
        answers = swap_three_times(url, versions, lambda: publish(next(following), folder), 1000)
        assert version_of(url) == versions[-1]
    assert len(answers) >= 1000
    for answer in answers:
        check(answer, expected)
    assert Counter(answer.version for answer in answers).keys() == set(versions)


@pytest.mark.slow
def test_1000_requests_while_a_process_beside_retrains(tmp_path: Path) -> None:
    folder, trained = tmp_path / NAME, tmp_path / "kept"
    write_first(folder)
    publish(folder, trained / "0")
    versions = [Reference(load_whole(str(folder))).version]
    words = ["raycloud", "edge", "serve", "--model", str(folder), "--port", "0", "--watch"]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen([sys.executable, "-m", *words], stdout=pipe, stderr=pipe, text=True) as server,
        subprocess.Popen(
            [sys.executable, "-m", "tests.edge.versions", str(folder), str(trained), "3"],
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as trainer,
    ):
        try:
            assert server.stdout is not None and trainer.stdin is not None and trainer.stdout is not None
            url = server.stdout.readline().split("base_url=")[1].split()[0]
            with Clients(url) as clients:
                clients.wait(250, versions[0])
                for number in range(1, 4):
                    assert trainer.stdout.readline() == "trained\n"
                    versions.append(Reference(load_whole(str(trained / str(number)))).version)
                    trainer.stdin.write("\n")
                    trainer.stdin.flush()
                    clients.wait(250 * (number + 1), versions[number])
            server.send_signal(signal.SIGINT)
            shown, errors = server.communicate(timeout=120)
        finally:
            server.kill()
            trainer.kill()
    assert (server.returncode, errors) == (130, "stopped\n")
    assert shown.splitlines() == [f"version {version} of '{folder}' answers from now on" for version in versions[1:]]
    expected = references([trained / str(number) for number in range(4)])
    assert not clients.errors and len(clients.answers) >= 1000
    for answer in clients.answers:
        check(answer, expected)
    assert {answer.version for answer in clients.answers} == set(versions)


@dataclass
class Gated:
    """Source that waits at the third token of an answer until it may go on."""

    source: TokenSource
    reached: threading.Event
    open: threading.Event

    @property
    def max_length(self) -> int:
        return self.source.max_length

    def tokens(self, prompt: Sequence[int], limit: int, decoding: Decoding) -> Iterator[Token]:
        for number, token in enumerate(self.source.tokens(prompt, limit, decoding)):
            if number == 2:
                self.reached.set()
                assert self.open.wait(240)
            yield token


def test_a_stream_ends_on_the_version_that_it_began_with(kept: list[Path], expected: Expected, folder: Path) -> None:
    versions, watch = list(expected), watch_on(folder)
    gate = Gated(watch.served.current.model.source, threading.Event(), threading.Event())
    watch.served.replace(replace(watch.served.current.model, source=gate))
    old = weakref.ref(gate.source)
    with watch as model, running(create_app(model, NAME)) as url:
        at = urlsplit(url)
        with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=240)) as connection:
            path, body = request_of(True, PROMPTS[1], True)
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert gate.reached.wait(240)
            publish(kept[1], folder)
            wait_until(lambda: version_of(url) == versions[1])
            other = ask(url)  # the new version answers while the old one still does
            check(other, expected)
            assert other.version == versions[1]
            gate.open.set()
            answer = read_answer(response, True, PROMPTS[1])
        check(answer, expected)
        assert answer.version == versions[0]
        del gate, watch
        gc.disable()  # the weights of a version go with its last request, not at the next collection of garbage
        try:
            wait_until(lambda: old() is None)
        finally:
            gc.enable()


def test_weights_of_modules_that_refer_to_each_other_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, load = list[weakref.ref[Any]](), model_watch.load_whole_part

    def noted(source: str, notify: Callable[[str], None]) -> Any:
        part = load(source, notify)
        weights.append(weakref.ref(next(part.first.parameters())))
        return part

    monkeypatch.setattr(model_watch, "load_whole_part", noted)
    folders = [tmp_path / "served", tmp_path / "next"]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        tokenizer = tokenizer_of(begin=["<bos>"])
        config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, bos_token_id=0)
        write(MambaForCausalLM(config), tokenizer, folder)
    with watch_on(folders[0]) as model:
        gc.collect()
        gc.disable()
        try:
            publish(folders[1], folders[0])
            wait_until(lambda: len(weights) == 2 and weights[0]() is None)
            assert model.current.version == Reference(load_whole(str(folders[1]))).version
        finally:
            gc.enable()


def memory() -> int:
    """Bytes of memory of this process that are not pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the memory of a process as Linux shows it")
def test_memory_after_swaps_is_that_of_one_model(tmp_path: Path) -> None:
    folder, others = tmp_path / "served", [tmp_path / "a", tmp_path / "b"]
    config = LlamaConfig(vocab_size=261, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    for other in others:
        model = LlamaForCausalLM(config)
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        write(model, tokenizer_of(begin=["<bos>"]), other)
        del model
    publish(others[0], folder)
    watch = watch_on(folder)
    model_watch._return_memory()
    most = memory() + nbytes // 2
    with watch as served:
        for other in (others[1], others[0], others[1]):
            version = served.current.version
            publish(other, folder)
            wait_until(lambda version=version: served.current.version != version)  # type: ignore[misc]
            wait_until(lambda: memory() < most)


def test_two_swaps_at_once_end_with_the_later(kept: list[Path], expected: Expected, folder: Path) -> None:
    with served(folder) as url, Clients(url) as clients:
        publish(kept[1], folder)
        publish(kept[2], folder)
        clients.wait(20, list(expected)[2])
        assert version_of(url) == list(expected)[2]
    for answer in clients.answers:
        check(answer, expected)


def test_a_folder_that_changes_while_it_is_loaded_is_loaded_again(
    kept: list[Path],
    expected: Expected,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded, load = list[str](), model_watch.load_whole_part

    def interrupted(source: str, notify: Callable[[str], None]) -> Any:
        loaded.append(source)
        if len(loaded) == 3:
            (folder / CONFIG).unlink()  # the old files are gone in the middle of a load, which fails
            threading.Thread(target=publish, args=(kept[2], folder)).start()
            wait_until((folder / CONFIG).is_file)
            raise OSError("a file is gone")
        part = load(source, notify)
        if len(loaded) == 2:
            publish(kept[3], folder)
        return part

    monkeypatch.setattr(model_watch, "load_whole_part", interrupted)
    said = list[str]()
    with watch_on(folder, said.append) as model:
        publish(kept[1], folder)
        wait_until(lambda: model.current.version == list(expected)[2])
    assert len(said) == 1 and len(loaded) == 4
    assert not caplog.records


def damage(folder: Path) -> None:
    raw = bytearray((folder / SINGLE).read_bytes())
    raw[-100] ^= 1
    (folder / SINGLE).write_bytes(raw)


def cut_off(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    (folder / CHECKSUMS).unlink()
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, {"format": "pt"})


def not_finite(folder: Path) -> None:
    change_weights(folder, lambda weights: weights["model.embed_tokens.weight"][7].fill_(float("nan")))


def lacks_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))


def without(name: str, listed: bool = True) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        (folder / name).unlink()
        if not listed:
            (folder / CHECKSUMS).unlink()

    return remove


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / CHECKSUMS).unlink()
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))

    return edit


def other_vocabulary(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocab = stored["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(stored))


def other_template(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (damage, "is damaged or was changed"),
        (cut_off, "cannot read model.safetensors"),
        (not_finite, "holds weights that are not finite"),
        (lacks_a_tensor, "model.norm.weight"),
        (without(SINGLE), "is missing, but checksums.json"),
        (without(SINGLE, listed=False), "holds no safetensors checkpoint"),
        (without("tokenizer.json", listed=False), "holds no tokenizer"),
        (without(CONFIG, listed=False), "holds no config.json"),
        (edited(CONFIG, hidden_size=32), "shape"),
        (edited(CONFIG, rms_norm_eps=1e-3), "config.json has rms_norm_eps 0.001, the served model 1e-06"),
        (edited(CONFIG, model_type="nothing"), "nothing"),
        (
            edited("generation_config.json", eos_token_id=[1, 9]),
            "texts end with tokens [1, 4, 9], the served",
        ),
        (other_vocabulary, "another vocabulary"),
        (other_template, "chat template"),
    ],
)
def test_a_version_that_does_not_fit_is_refused_in_one_line(
    kept: list[Path],
    expected: Expected,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
    reason: str,
) -> None:
    first, _, last, _ = expected
    bad = tmp_path / "bad"
    publish(kept[1], bad)
    change(bad)
    caplog.set_level(logging.INFO, "raycloud")
    with watch_on(folder) as model, running(create_app(model, NAME)) as url:
        folder.rename(tmp_path / "away")
        bad.rename(folder)
        wait_until(lambda: bool(caplog.records))
        assert ask(url).version == version_of(url) == first
        publish(kept[2], folder)  # and the next good version is taken
        wait_until(lambda: version_of(url) == last)
        check(ask(url), expected)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(REFUSED) and reason in line and "\n" not in line


def test_a_folder_that_is_away_is_no_version(
    kept: list[Path],
    expected: Expected,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    looks = Counter[bool]()

    def counted(folder: Path) -> model_watch.FolderState:
        state = folder_state(folder)
        looks[bool(state)] += 1
        return state

    monkeypatch.setattr(model_watch, "folder_state", counted)
    with watch_on(folder) as model:
        folder.rename(tmp_path / "away")
        wait_until(lambda: looks[False] > 4)
        assert model.current.version == next(iter(expected))
        publish(kept[2], folder)
        wait_until(lambda: model.current.version == list(expected)[2])
    assert not caplog.records


def test_writes_into_the_files_of_a_served_version_do_not_change_it(
    kept: list[Path], expected: Expected, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, *_, last = expected
    with served(folder) as url:
        with open(folder / SINGLE, "r+b") as file:
            file.truncate(0)  # a weight that is a page of the file would end the process now
        wait_until(lambda: bool(caplog.records))
        answer = ask(url)
        assert answer.version == first
        check(answer, expected)
        for path in kept[3].iterdir():  # file by file, as a plain copy does
            shutil.copyfile(path, folder / path.name)
        wait_until(lambda: version_of(url) == last)
        check(ask(url), expected)
    assert all(record.getMessage().startswith(REFUSED) for record in caplog.records)


def test_a_link_to_the_current_version_is_followed(kept: list[Path], expected: Expected, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(kept[0])
    with watch_on(link) as model:
        for number in (2, 0):  # forward, and back again
            (tmp_path / "next").symlink_to(kept[number])
            (tmp_path / "next").rename(link)
            wait_until(lambda number=number: model.current.version == list(expected)[number])  # type: ignore[misc]


def test_the_same_weights_again_are_no_new_version(kept: list[Path], expected: Expected, folder: Path) -> None:
    said = list[str]()
    with watch_on(folder, said.append) as model:
        before = model.current
        publish(kept[0], folder)
        publish(kept[1], folder)
        wait_until(lambda: bool(said))
        assert model.current is not before
    assert said == [f"version {list(expected)[1]} of '{folder}' answers from now on"]


def test_the_state_of_a_folder_is_that_of_its_models_files(folder: Path) -> None:
    before = folder_state(folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / ".lock").touch()
    assert folder_state(folder) == before
    (folder / SINGLE).touch()
    assert folder_state(folder) != before
    assert folder_state(folder / "nowhere") == ()


def test_a_first_version_that_cannot_be_loaded_is_an_error(folder: Path) -> None:
    not_finite(folder)
    with pytest.raises(ModelError, match="holds weights that are not finite"):
        watch_on(folder)


def test_versions_are_named_everywhere(kept: list[Path], expected: Expected) -> None:
    model = ServedModel(load_whole(str(kept[0])))
    with running(create_app(model, NAME)) as url:
        for version, source in zip(expected, kept, strict=True):
            model.replace(load_whole(str(source)))
            at = urlsplit(url)
            with closing(http.client.HTTPConnection(str(at.hostname), at.port, timeout=240)) as connection:
                connection.request("GET", "/v1/models")
                listed = json.loads(connection.getresponse().read())["data"]
                connection.request("GET", f"/v1/models/{NAME}")
                assert [json.loads(connection.getresponse().read())] == listed
            assert [entry["system_fingerprint"] for entry in listed] == [version] == [version_of(url)]
            assert len(ask(url).tokens) == MADE
