"""Versions of finished runs: what rounds left in the history, and models written again as of any of them."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raycloud.errors import ResultError
from raycloud.jobs import distill as distill_job
from raycloud.jobs import split_tune as split_tune_job
from raycloud.jobs.versions import history_of, rollback
from raycloud.rounds.machine import RoundMachine
from raycloud.rounds.versions import VersionStore, histories
from raycloud.split.finetune.checkpoints import CheckpointStore
from tests.cluster.recipes import small, split_edges
from tests.jobs.distill_run import records, weights_in


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def merged(base: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights with adapters merged in, as the LoRA paper says: W + scale B A."""
    whole = dict(base)
    for name, down in adapters.items():
        if ".lora_A." in name:
            up = adapters[name.replace(".lora_A.", ".lora_B.")]
            whole[name.replace(".lora_A.default", "")] = whole[name.replace(".lora_A.default", "")] + scale * up @ down
    return whole


def test_a_rollback_restores_the_students_of_any_round_bit_for_bit(
    local_ray: None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cohorts: one trains all weights, one adapters, whose frozen weights no teacher brings back.

    The start is no longer kept, with which these were stored.
    """
    rounds_had: dict[str, list[dict[str, Tensor]]] = {"store": [], "newsroom": []}
    original = distill_job.run_round

    def noted(number: int, index: int, members: Any, rounds: dict[str, RoundMachine], *rest: Any) -> Any:
        for cohort, machine in rounds.items():
            if not index:
                rounds_had[cohort].append({name: tensor.clone() for name, tensor in machine.weights.items()})
        done = original(number, index, members, rounds, *rest)
        for cohort, machine in rounds.items():
            rounds_had[cohort].append({name: tensor.clone() for name, tensor in machine.weights.items()})
        return done

    monkeypatch.setattr(distill_job, "run_round", noted)
    lora = {"model": str(tiny_llama), "blocks": None, "lora": {"r": 2, "alpha": 8}, "placement": {"num_cpus": 0.1}}
    edges = [
        {"name": "store", "where": {"domain": ["movie", "product"]}},
        {"name": "newsroom", "where": {"domain": ["news", "tweet"]}, "student": lora},
    ]
    path = tmp_path / "run"
    distill_job.run(small(tiny_llama, path, edges=edges, rounds={"count": 3, "steps": 2, "keep_versions": 3}))
    found = histories(path)
    assert found.keys() == {"store", "newsroom"}
    for name, history in found.items():
        kept = history.records()
        assert [(one.round, one.parent) for one in kept] == [(1, None), (2, 1), (3, 2)]
        assert all(one.members == (name,) for one in kept)
        steps = [one for one in records(path, "step") if one["student"] == name and one["round"] == 1]
        tokens = sum(one["tokens"] for one in steps)
        assert kept[1].samples == tokens
        assert kept[1].figures["loss"] == pytest.approx(sum(one["loss"] * one["tokens"] for one in steps) / tokens)
    base = weights_in(tiny_llama)
    size = sum(tensor.nbytes for tensor in base.values())
    assert found["newsroom"].nbytes(1) > size > 9 * found["newsroom"].nbytes(2)

    last = {name: files(path / kind) for name, kind in (("student", "students"), ("adapter", "adapters"))}
    for version in (1, 2):
        back = rollback(path, version, "store")
        assert back.note == f"rollback to {version}" and history_of(path, "store")[1].current == back.version
        assert equal(loaded(path / "students" / "store"), rounds_had["store"][version])
        rollback(path, version, "newsroom")
        adapters = rounds_had["newsroom"][version]
        assert equal(loaded(path / "students" / "newsroom"), merged(base, adapters, 4.0))
        saved = load_file(path / "adapters" / "newsroom" / "adapter_model.safetensors")
        prefix = "base_model.model."
        assert equal(saved, {prefix + name.replace(".default.", "."): one for name, one in adapters.items()})
    assert not equal(loaded(path / "students" / "store"), rounds_had["store"][3])
    students = path / "students"
    (students / "store").rename(students / ".store-a1b2c3d4-old")  # a rollback killed before the new folder's rename
    for name in found:
        rollback(path, 3, name)
    assert last == {name: files(path / kind) for name, kind in (("student", "students"), ("adapter", "adapters"))}
    for history in found.values():
        assert [one.version for one in history.records()] == [1, 2, 3, 4, 5, 6]
        assert history.record(6).digest == history.record(3).digest

    with pytest.raises(ResultError, match="has a history for each cohort; give --cohort, one of: newsroom, store"):
        rollback(path, 2)
    with pytest.raises(ResultError, match=r"no cohort 'watch' in .*; allowed: newsroom, store"):
        rollback(path, 2, "watch")
    with open(path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ResultError, match="is in use by another run"):
            rollback(path, 2, "store")
    (path / "summary.json").unlink()
    with pytest.raises(ResultError, match="is not complete; continue it with --resume first"):
        rollback(path, 2, "store")
    assert last["student"] == files(path / "students")


def test_a_rollback_restores_what_edges_tuned_together_bit_for_bit(
    local_ray: None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(split_tune_job.shutil, "rmtree", lambda *_, **__: None)  # the rounds that the cloud has saved
        split_tune_job.run(split_edges(tiny_llama, path))
    [rounds] = path.glob("cloud/*/groups/*")
    history = VersionStore(path / "versions")
    assert [(one.version, one.round, one.note) for one in history.records()] == [
        (0, None, "start"), (1, 1, ""), (2, 2, ""), (3, 3, ""),
    ]  # fmt: skip
    assert all(one.members == ("store", "newsroom") and one.samples == 2 * 2 * 4 for one in history.records()[1:])
    last = {**files(path / "model"), "group": (path / "group.safetensors").read_bytes()}

    assert rollback(path, 1).version == 4
    saved = {name.partition("/")[2]: one for name, one in CheckpointStore(rounds).load(1).items()}
    had = {name.removeprefix("cloud/"): one for name, one in saved.items()}
    assert equal(load_file(path / "group.safetensors"), had)
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    blocks = dict(model.model.layers.named_parameters())
    parts = {"edge/first": 0, "middle": 1, "edge/last": 3}
    for part, start in parts.items():
        mine = {name.removeprefix(f"{part}.blocks."): one for name, one in had.items() if f"{part}.blocks." in name}
        assert mine
        for name, one in mine.items():
            number, _, rest = name.partition(".")
            assert torch.equal(blocks[f"{start + int(number)}.{rest}"], one)

    rollback(path, 0)
    assert equal(loaded(path / "model"), loaded(tiny_llama))
    rollback(path, 3)
    assert last == {**files(path / "model"), "group": (path / "group.safetensors").read_bytes()}
    recipe = (path / "recipe.yaml").read_text()
    (path / "recipe.yaml").write_text(recipe.replace("parts: averaged", "parts: private"))
    with pytest.raises(ResultError, match=r"rounds\.parts=private in .*; allowed: averaged"):
        rollback(path, 1)
    assert history.current == 6
