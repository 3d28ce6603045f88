"""Signal files of a data set: equal to signals computed per batch, refused if stale, intact after any crash."""

from __future__ import annotations

import multiprocessing
import os
import signal as signals_of_the_system
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from raycloud.data.batches import Sample, SampleOrder, collate
from raycloud.distill.signals import SignalKind, SignalRecipe, compute_signal
from raycloud.distill.signals import file as signal_file
from raycloud.distill.signals.encoding import decode_values
from raycloud.distill.signals.file import FileSignals, SignalSource, build_signals, tokenizer_fingerprint
from raycloud.errors import DataError
from raycloud.models.segments import Segment
from tests.models.families import tiny

SAMPLES = [Sample(tuple((7 * n + i) % 97 for i in range(4 + n % 9)), n % 3) for n in range(23)]
SOURCE = SignalSource("teacher@1", "words", SignalRecipe(kind="hybrid", codec="float32", k=5, draws=7), (1.0, 2.0))


@pytest.fixture(scope="module")
def teacher() -> Segment:
    return Segment(tiny("llama", dtype=torch.float32))


@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_every_batch_of_every_epoch_is_as_observed(kind: SignalKind, teacher: Segment, tmp_path: Path) -> None:
    source = replace(SOURCE, recipe=SOURCE.recipe.model_copy(update={"kind": kind}))
    store = FileSignals.build(tmp_path / "signals", source, teacher, SAMPLES, samples_per_file=5)
    assert len(store) == len(SAMPLES)
    order = SampleOrder([len(sample.ids) for sample in SAMPLES], 4, seed=1)
    for step in range(2 * order.steps_per_epoch):
        batch = collate([SAMPLES[index] for index in order.indices(step)], pad=3)
        found = store.signal(batch)
        expected = compute_signal(teacher, source.teacher, batch, source.recipe, source.temperatures)
        assert (found.key, found.kind, found.codec) == (expected.key, expected.kind, expected.codec)
        assert (found.temperatures, found.count) == (expected.temperatures, batch.targets)
        assert found.payload.keys() == expected.payload.keys()
        for name, tensor in expected.payload.items():
            mine = found.payload[name]
            if name == "rows":
                mine, tensor = decode_values(mine, "float32"), decode_values(tensor, "float32")
            exact = not tensor.dtype.is_floating_point  # ids and counts
            assert mine.shape == tensor.shape
            assert torch.allclose(mine, tensor, rtol=0, atol=0 if exact else 1e-5)


def test_it_is_there_for_the_next_process_and_computes_nothing_twice(
    teacher: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(SAMPLES[:3], pad=0)
    first = FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES[:20], samples_per_file=8).signal(batch)
    asked = counted(monkeypatch)
    again = FileSignals(tmp_path, SOURCE).signal(batch)
    assert all(torch.equal(first.payload[name], again.payload[name]) for name in first.payload)
    FileSignals.build(tmp_path, SOURCE, teacher, [*SAMPLES, SAMPLES[0]])
    assert sorted(asked) == sorted(sample.ids for sample in SAMPLES[20:])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the requests to the teacher from here on."""
    asked: list[tuple[int, ...]] = []

    def watched(teacher, name, batch, *rest):  # type: ignore[no-untyped-def]
        asked.extend(tuple(ids[valid].tolist()) for ids, valid in zip(batch.ids, batch.valid, strict=True))
        return compute_signal(teacher, name, batch, *rest)

    monkeypatch.setattr(signal_file, "compute_signal", watched)
    return asked


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": "teacher@2"}, "teacher is teacher@1, not teacher@2"),
        ({"tokenizer": "other"}, "tokenizer is words, not other"),
        ({"temperatures": (1.0,)}, r"temperatures is \[1.0, 2.0\], not \[1.0\]"),
        ({"recipe": SignalRecipe()}, "signal is {'kind': 'hybrid'"),
    ],
)
def test_another_source_is_refused(change: dict, said: str, teacher: Segment, tmp_path: Path) -> None:
    FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES[:3])
    for use in (
        lambda source: FileSignals(tmp_path, source),
        lambda source: FileSignals.build(tmp_path, source, teacher, SAMPLES[:3]),
    ):
        with pytest.raises(DataError, match=f"^signals in '.*' are stale: {said}.*$") as error:
            use(replace(SOURCE, **change))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other", [Sample(SAMPLES[1].ids[:-1], 1), Sample(SAMPLES[1].ids, 2), Sample((96, *SAMPLES[1].ids[1:]), 1)]
)
def test_other_ids_labels_or_truncation_are_refused(other: Sample, teacher: Segment, tmp_path: Path) -> None:
    store = FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES[:3])
    with pytest.raises(DataError, match="are stale: 1 of 2 samples of the batch have other ids or labels"):
        store.signal(collate([SAMPLES[0], other], pad=0))


def dies() -> None:
    os.kill(os.getpid(), signals_of_the_system.SIGKILL)


def killed(work: Callable[[], object]) -> bool:
    """Run some work in a process that is killed with SIGKILL; tell whether it was."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode == -signals_of_the_system.SIGKILL


@pytest.mark.parametrize("when", ["between two parts", "before a part takes its name"])
def test_building_goes_on_where_it_was_killed(
    when: str, teacher: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def between() -> None:
        FileSignals.build(
            tmp_path,
            SOURCE,
            teacher,
            SAMPLES,
            samples_per_file=5,
            on_progress=lambda done, _: dies() if done >= 10 else 0,
        )

    def writing() -> None:
        plain, calls = Path.replace, []

        def replacing(path: Path, target: Path) -> Path:
            if target.suffix == ".safetensors":
                calls.append(target)
            if len(calls) == 3:  # two parts are there
                dies()
            return plain(path, target)

        Path.replace = replacing  # type: ignore[method-assign]  # this process will not live to suffer from it
        FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES, samples_per_file=5)

    assert killed(between if when == "between two parts" else writing)
    before = {part.name: part.stat().st_mtime_ns for part in tmp_path.glob("*.safetensors")}
    assert len(before) == 2
    assert any(tmp_path.glob(".*.safetensors-*")) == (when != "between two parts")
    assert len(FileSignals(tmp_path, SOURCE)) == 10  # what is there can be used
    asked = counted(monkeypatch)
    store = FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES, samples_per_file=5)
    assert len(asked) == len(SAMPLES) - 10 and len(store) == len(SAMPLES)
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in before.items())
    assert not any(tmp_path.glob(".*.safetensors-*"))
    undisturbed = FileSignals.build(tmp_path.with_name("other"), SOURCE, teacher, SAMPLES, samples_per_file=5)
    batch = collate(SAMPLES, pad=0)
    mine, theirs = store.signal(batch).payload, undisturbed.signal(batch).payload
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing"])
def test_a_damaged_part_is_said_and_mended(
    damage: str, teacher: Segment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES, samples_per_file=8)
    said = {name: one.clone() for name, one in whole.signal(collate(SAMPLES, pad=0)).payload.items()}
    part = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(part.read_bytes())
    if damage == "missing":
        part.unlink()
    else:
        content[-1] ^= 1  # within a tensor: the library reads it as it is
        part.write_bytes(content[:-10] if damage == "shorter" else content)
    with pytest.raises(DataError, match=f"{part.name}' is .*; build the signals again") as caught:
        FileSignals(tmp_path, SOURCE)
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    mended = FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES, samples_per_file=3)
    assert capsys.readouterr().out.count("warning: ") == (damage != "missing")
    assert len(mended) == len(SAMPLES)
    found = mended.signal(collate(SAMPLES, pad=0)).payload
    assert all(torch.equal(found[name], one) for name, one in said.items())


def test_folders_of_others_are_left_alone(teacher: Segment, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no signals in '.*' \(it holds no signals.json\)"):
        FileSignals(tmp_path / "missing", SOURCE)
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"not ours")
    with pytest.raises(DataError, match=r"holds no signals\.json"):
        FileSignals.build(tmp_path, SOURCE, teacher, SAMPLES)
    assert model.read_bytes() == b"not ours"
    (tmp_path / "signals.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read '.*signals\.json'"):
        FileSignals(tmp_path, SOURCE)


def test_who_comes_second_waits_and_takes_over_what_is_there(teacher: Segment, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = build_signals(tmp_path, SOURCE, teacher, SAMPLES, samples_per_file=5)
    next(first)
    second = threading.Thread(target=lambda: steps.extend(build_signals(tmp_path, SOURCE, teacher, SAMPLES)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not steps
    list(first)
    second.join()
    assert steps == [(len(SAMPLES), len(SAMPLES))]


def test_a_tokenizers_fingerprint_tells_which_id_is_which_word() -> None:
    class Words:
        def __init__(self, **words: int) -> None:
            self.get_vocab = lambda: words

    one = tokenizer_fingerprint(Words(a=0, b=1))  # type: ignore[arg-type]
    assert one == tokenizer_fingerprint(Words(b=1, a=0))  # type: ignore[arg-type]
    assert one != tokenizer_fingerprint(Words(a=1, b=0))  # type: ignore[arg-type]
