"""Process group of real DeepSpeed workers, each a process of its own, that train the cases in order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from tests.ports import free_port

Case = dict[str, Any]
"""``name``, ``recipe``, ``steps``, and where wanted ``begun`` (a checkpoint's folder) and ``until``."""


def run(world: int, cases: list[Case], folder: Path) -> None:
    """Train every case; each leaves ``folder/<name>/`` with a checkpoint and ``steps.json``."""
    torch.multiprocessing.spawn(_worker, (world, free_port(), cases, folder), nprocs=world)


def _worker(rank: int, world: int, port: int, cases: list[Case], folder: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")

    from raycloud.cluster.teacher.loop import TeacherLoop
    from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
    from raycloud.cluster.teacher.shards import ShardedCheckpoint
    from raycloud.data.tokens import TokenFile

    tokens = TokenFile(folder / "tokens.arrow")
    for case in cases:
        recipe = TuneTeacherRecipe.model_validate({**case["recipe"], "workers": {"count": world}})
        begun = ShardedCheckpoint(Path(case["begun"])) if "begun" in case else None
        loop = TeacherLoop(recipe, tokens, tokens, 0, case["steps"], begun)
        records = []
        while loop.step < case.get("until", case["steps"]):
            records.append(loop.train())
        held_out = loop.evaluate()
        to = folder / case["name"]
        to.mkdir(exist_ok=True)
        torch.distributed.barrier()
        loop.save(to)
        if rank == 0:
            (to / "steps.json").write_text(json.dumps({"steps": records, "held_out": held_out}))
        torch.distributed.barrier()  # the next case may read what this one wrote
    torch.distributed.destroy_process_group()
