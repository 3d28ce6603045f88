"""Checkpoints of several workers: complete ones, damaged ones, and the fallback for a damaged one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from raycloud.cluster.teacher.shards import (
    ShardedCheckpoint,
    check,
    first_undamaged,
    latest_undamaged,
    save,
    write_shard_checksums,
)
from raycloud.errors import ResultError, TrainingError


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"checkpoint_{number}" for number in range(3)]
    for folder in folders:
        folder.mkdir()
        for worker in range(2):
            save_file({"weight": torch.ones(8)}, folder / f"worker-{worker:05d}.safetensors")
        (folder / "state.json").write_text("{}")
        write_shard_checksums(folder)
    return folders


def damage(folder: Path, how: str) -> None:
    path = folder / "worker-00001.safetensors"
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "not sealed":
        (folder / "checksums.json").unlink()
    else:
        content[-1] ^= 1  # within a tensor: the library reads it as it is
        path.write_bytes(content[:-4] if how == "shorter" else content)


@pytest.mark.parametrize("how", ["flipped", "shorter", "missing", "not sealed"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(
    how: str, kept: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert latest_undamaged(kept[2]) == kept[2]
    damage(kept[2], how)
    with pytest.raises(ResultError, match="cannot read the checkpoint 'checkpoint_2'"):
        check(kept[2])
    capsys.readouterr()
    assert latest_undamaged(kept[2]) == kept[1]
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_later_ones_do_not_count_and_without_a_sound_one_it_is_one_line(kept: list[Path]) -> None:
    for folder in kept[:2]:
        damage(folder, "flipped")
    with pytest.raises(ResultError, match="checkpoint_1") as caught:
        latest_undamaged(kept[1])
    assert "\n" not in str(caught.value)


def test_the_best_one_is_left_out_where_it_is_damaged(kept: list[Path]) -> None:
    damage(kept[0], "flipped")
    assert first_undamaged([kept[0], kept[2], kept[1]]) == kept[2]


def test_a_state_that_is_not_finite_is_neither_written_nor_read(tmp_path: Path) -> None:
    scaler = SimpleNamespace(cur_scale=2.0**16, cur_iter=3)
    optimizer = SimpleNamespace(loss_scaler=scaler)
    engine = SimpleNamespace(global_rank=0, zero_optimization_stage=lambda: 0, optimizer=optimizer)
    save(tmp_path, engine, {}, {"step": 2, "updates": 2})
    assert ShardedCheckpoint(tmp_path).facts["loss_scale"] == {"cur_scale": 2.0**16, "cur_iter": 3}
    scaler.cur_scale = math.nan
    with pytest.raises(TrainingError, match=r"state is not all finite: \{'step': 2, .* loss scale .*nan"):
        save(tmp_path, engine, {}, {"step": 2, "updates": 2})
    (tmp_path / "state.json").write_text('{"step": 2, "shapes": {}, "loss_scale": {"cur_scale": NaN}}')
    with pytest.raises(ResultError, match=r"cannot read the checkpoint .*: state\.json holds NaN"):
        ShardedCheckpoint(tmp_path)
