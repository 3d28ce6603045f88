"""Histories of versions: what they store, crashes, damage, rollbacks, and versions that are no longer kept."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from raycloud.errors import ChecksumError, ResultError
from raycloud.rounds.versions import VersionStore, histories


def weights(*changed: str, by: float = 0.0) -> dict[str, Tensor]:
    """Weights of three tensors; the named ones are moved."""
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "step": torch.tensor(3)}
    return {name: tensor + (by if name in changed else 0) for name, tensor in base.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def stored(folder: Path, version: int) -> set[str]:
    with safe_open(folder / f"{version:04d}" / "weights.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture
def history(tmp_path: Path) -> VersionStore:
    """History of three versions, each with one tensor changed."""
    store = VersionStore(tmp_path / "versions")
    store.add(weights())
    store.add(weights("a", by=1.0), round=1, members=["store", "newsroom"], samples=64, figures={"loss": 2.5})
    store.add({"b": weights("b", by=2.0)["b"]}, round=2, members=["store"], samples=32, note="late: newsroom")
    return store


def test_a_version_stores_what_differs_and_composes_to_the_whole(history: VersionStore) -> None:
    assert [stored(history.folder, number) for number in range(3)] == [{"a", "b", "step"}, {"a"}, {"b"}]
    expected = [weights(), weights("a", by=1.0), {**weights("a", by=1.0), "b": weights("b", by=2.0)["b"]}]
    assert all(same(history.weights(number), whole) for number, whole in enumerate(expected))
    start, first, second = history.records()
    assert (start.version, start.parent, start.round, start.samples) == (0, None, None, None)
    assert (first.parent, first.round, first.members, first.samples) == (0, 1, ("store", "newsroom"), 64)
    assert (first.figures, second.note, history.current) == ({"loss": 2.5}, "late: newsroom", 2)
    assert datetime.fromisoformat(first.time).utcoffset() == timedelta()
    assert len({one.digest for one in (start, first, second)}) == 3
    assert [history.changed(number) for number in range(3)] == [["a", "b", "step"], ["a"], ["b"]]
    assert all(history.nbytes(number) > 0 for number in range(3))


def test_an_empty_history_has_no_version(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "versions")
    assert (store.current, store.records(), histories(tmp_path)) == (-1, [], {})
    with pytest.raises(ResultError, match=r"no version 0 in '.*versions'; there are: none"):
        store.weights(0)
    store.add({})  # a start from which all tensors are new
    store.add(weights(), round=1)
    assert store.weights(0) == {} and same(store.weights(1), weights())
    assert list(histories(tmp_path)) == [""]


def test_a_rollback_is_a_new_version_with_the_bits_of_the_old_one(history: VersionStore) -> None:
    back = history.rollback(1)
    assert (back.version, back.parent, back.round, back.note) == (3, 2, None, "rollback to 1")
    assert back.digest == history.record(1).digest and back.figures == {"loss": 2.5}
    assert same(history.weights(3), history.weights(1)) and stored(history.folder, 3) == {"b"}
    assert [one.version for one in history.records()] == [0, 1, 2, 3]
    history.add(weights("step", by=1), round=3)
    assert same(history.weights(4), weights("step", by=1)) and history.record(4).parent == 3


def test_a_rollback_has_no_tensors_that_came_later(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.add({"a": torch.zeros(2)})
    store.add({"late": torch.zeros(2)}, round=1)
    assert store.weights(1).keys() == {"a", "late"}
    store.rollback(0)
    assert store.weights(2).keys() == {"a"} and store.record(2).digest == store.record(0).digest


def test_a_version_added_again_after_a_crash_is_the_same_version(history: VersionStore) -> None:
    before = history.records()
    assert history.add({"b": weights("b", by=2.0)["b"]}, version=2, note="again") == before[2]
    assert history.records() == before
    assert history.add(weights("a", by=1.0), version=1) == before[1]
    assert history.records() == before[:2]  # what came later is done again, too
    other = history.add(weights("step", by=7), version=1, round=1, note="another edge was late")
    assert history.records() == [before[0], other] and same(history.weights(1), weights("step", by=7))
    with pytest.raises(ValueError, match="version 3 after version 1; allowed: 0 to 2"):
        history.add(weights(), version=3)
    history.forget_after(0)
    assert history.records() == before[:1]


class Killed(BaseException):
    pass


def everywhere(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the writer at the given flush to the disk, of which there is one after every file and rename."""
    left, real = [times], os.fsync

    def fsync(handle: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("act", [lambda store: store.add(weights("a", by=9.0)), lambda store: store.rollback(0)])
def test_a_writer_killed_at_any_flush_leaves_the_former_or_the_new_history(
    history: VersionStore, act: Callable[[VersionStore], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole = history.records(), history.weights(2)
    for times in range(1, 100):
        with monkeypatch.context() as patch:
            everywhere(times, patch)
            try:
                act(history)
            except Killed:
                done = False
            else:
                done = True
        again = VersionStore(history.folder)
        assert again.records()[:3] == before and same(again.weights(2), whole)
        assert again.current in (2, 3)
        assert again.weights(again.current).keys() == whole.keys()
        if done:
            assert times > 4
            return
        again.forget_after(2)
    raise AssertionError("it never came to its end")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: flip(at / "weights.safetensors"), r"0001/weights\.safetensors' is damaged: 'a' is not what it was"),
        (lambda at: (at / "weights.safetensors").write_bytes(b"x" * 9), r"cannot read '.*0001/weights\.safetensors': "),
        (lambda at: (at / "weights.safetensors").unlink(), r"cannot read '.*0001/weights\.safetensors': "),
        (lambda at: (at / "record.json").write_text("{}"), r"record\.json' is damaged or was changed"),
        (lambda at: shutil.rmtree(at), r"no version 1 in '.*'; there are: 0, 2"),
    ],
)
def test_damage_is_one_line_that_names_the_file(
    history: VersionStore, damage: Callable[[Path], None], message: str
) -> None:
    damage(history.folder / "0001")
    for version in (1, 2):
        with pytest.raises((ChecksumError, ResultError), match=message) as raised:
            history.weights(version)
        assert "\n" not in str(raised.value)
    assert same(history.weights(0), weights())


def test_a_changed_record_is_noticed_without_its_checksum(history: VersionStore) -> None:
    path = history.folder / "0001" / "record.json"
    (history.folder / "0001" / "checksums.json").unlink()
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "tensors": {**about["tensors"], "a": "0"}}))
    with pytest.raises(ChecksumError, match="its digest is not that of its tensors"):
        history.record(1)
    path.write_text(json.dumps({**about, "round": "first"}))
    with pytest.raises(ChecksumError, match=r"record\.json' is damaged: Input should be a valid integer"):
        history.records()


def test_the_oldest_versions_are_merged_into_the_oldest_that_is_kept(tmp_path: Path) -> None:
    whole, kept = VersionStore(tmp_path / "whole"), VersionStore(tmp_path / "kept", keep=3)
    for store in (whole, kept):
        store.add(weights())
        for round, name in enumerate("abab", 1):
            store.add({name: weights(name, by=float(round))[name]}, round=round)
        store.rollback(3)
    assert [(one.version, one.parent) for one in kept.records()] == [(3, None), (4, 3), (5, 4)]
    assert [one.digest for one in kept.records()] == [one.digest for one in whole.records()[3:]]
    assert stored(kept.folder, 3) == {"a", "b", "step"} and stored(kept.folder, 4) == {"b"}
    assert all(same(kept.weights(number), whole.weights(number)) for number in (3, 4, 5))
    with pytest.raises(ResultError, match=r"no version 2 in '.*kept'; there are: 3, 4, 5"):
        kept.rollback(2)


def test_figures_that_are_not_finite_come_back(tmp_path: Path) -> None:
    VersionStore(tmp_path).add(weights(), figures={"loss": math.nan, "best": math.inf, "bits": 0.1})
    figures = VersionStore(tmp_path).record(0).figures
    assert math.isnan(figures["loss"]) and figures["best"] == math.inf and figures["bits"] == 0.1


def test_histories_of_several_cohorts_are_found_by_name(tmp_path: Path) -> None:
    for name in ("store", "7"):
        VersionStore(tmp_path / "versions" / name).add(weights())
    assert list(histories(tmp_path)) == ["7", "store"]
    assert same(histories(tmp_path)["7"].weights(0), weights())
