"""What one more edge costs the cloud: teacher's passes, object store and coordinator, by the number of students.

A cluster of two nodes on this machine, the real teacher, students and rounds, a tiny random model; all students see the
same batches. Up to 16 students are processes of their own; beyond that several share one, each still trained, called
and averaged by itself. The coordinator's time is the processor time of the driver, whatever it waits for in between.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state
from ray.cluster_utils import Cluster
from transformers import LlamaConfig, LlamaForCausalLM

from raycloud.benchmarks.local_cloud import scratch
from raycloud.benchmarks.measure import SMOLLM2, show
from raycloud.cluster.cloud_teacher import CloudTeacher, Start
from raycloud.cluster.edge_student import Answer, Beat, EdgeStudent
from raycloud.cluster.rounds import Member, run_round
from raycloud.data.batches import Batch
from raycloud.distill.recipe import DistillRecipe
from raycloud.models.loading import load_tokenizer, quiet_transformers, resolve
from raycloud.models.weights import Weights, nbytes
from raycloud.report.console import bars, console, working

PROCESSES = 16
COUNTS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS, STEPS = 3, 2
EDGES = 10_000
"""What the report extrapolates to."""
_STORE = 1 << 29
_SETTLE_S = 3.0
_LIMIT_S = 1800.0
_HEAD = {"num_cpus": 1, "resources": {"cloud": 1}, "include_dashboard": False, "object_store_memory": _STORE}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    processes: int
    counts: tuple[int, ...]
    rounds: int


FULL, QUICK = Size(PROCESSES, COUNTS, ROUNDS), Size(2, (1, 2, 4), 2)


@dataclass(frozen=True)
class Tally:
    """What a teacher has done so far.

    Args:
        asked: times it was asked.
        batches: different batches among them.
        forwards: passes through the model.
        payload: bytes of all it said.
    """

    asked: int
    batches: int
    forwards: int
    payload: int


class CountingTeacher(CloudTeacher):
    """A teacher that counts; what it does is the same."""

    def __init__(self, recipe: DistillRecipe) -> None:
        super().__init__(recipe)
        self._asked, self._forwards, self._payload = list[int](), 0, 0

    def signal(self, name: str, batch: Batch) -> list[ray.ObjectRef]:
        """See :meth:`CloudTeacher.signal`."""
        self._asked.append(hash(batch.ids.numpy().tobytes()))
        return super().signal(name, batch)

    def _share(self, key: str, said: Any) -> None:
        self._forwards += 1
        self._payload += said.nbytes
        super()._share(key, said)

    def tally(self) -> Tally:
        """So far."""
        return Tally(len(self._asked), len(set(self._asked)), self._forwards, self._payload)


class Crowd:
    """Several students in one process, each in its seat and none aware of the others."""

    def __init__(self, students: Sequence[tuple[Any, ...]]) -> None:
        self._students: list[Any] = [EdgeStudent(*arguments) for arguments in students]

    def prepare(self, seat: int) -> int:
        """See :class:`EdgeStudent`, as for all that follow."""
        return self._students[seat].prepare()

    def train(self, seat: int, round_id: int, current: int, weights: Weights) -> Answer | None:
        """One round of one student."""
        return self._students[seat].train(round_id, current, weights)

    @ray.method(concurrency_group="control")
    def beat(self, seat: int) -> Beat | None:
        """Where a student is."""
        return self._students[seat].beat()

    @ray.method(concurrency_group="control")
    def advance(self, seat: int, round_id: int) -> None:
        """The newest round."""
        self._students[seat].advance(round_id)


class Seat:
    """One student of a crowd, called as an actor of its own would be."""

    def __init__(self, crowd: Any, seat: int) -> None:
        for name in ("prepare", "train", "beat", "advance"):
            setattr(self, name, _Call(partial(getattr(crowd, name).remote, seat)))


@dataclass(frozen=True)
class _Call:
    remote: Any


def recipe_of(model: Path, students: int, rounds: int) -> DistillRecipe:
    """One teacher, and so many students that see the same text."""
    place = {"num_cpus": 0.01}
    return DistillRecipe.model_validate(
        {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "teacher": {"model": str(model), "placement": place, "timeout_s": _LIMIT_S},
            "student": {"blocks": 2, "choose": "spacing", "placement": place},
            "data": {"max_length": 48, "limit": 256},
            "edges": [{"name": f"edge-{number}"} for number in range(students)],
            "objective": {"health_every": 0},
            "training": {"batch_size": 8},
            "rounds": {"count": rounds, "steps": STEPS, "deadline_s": _LIMIT_S},
        }
    )


def tiny_teacher(folder: Path) -> Path:
    """A random Llama of four narrow blocks that reads SmolLM2's tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer(resolve(SMOLLM2, console.print)).save_pretrained(folder)
    return folder


@contextmanager
def one_machine(students: int) -> Iterator[None]:
    """A cloud node and an edge node, for the time of a benchmark."""
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"  # private to this machine, and no token file is left behind
    try:
        cluster = Cluster(initialize_head=True, head_node_args=_HEAD)
        try:
            cluster.add_node(num_cpus=2, resources={"edge": students}, object_store_memory=_STORE)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()
    finally:
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


def stored() -> int:
    """Bytes of objects in the cluster's object store, copies not counted, once what is dropped has gone."""
    gc.collect()
    found, until = list[int](), time.monotonic() + _SETTLE_S
    while time.monotonic() < until:
        found.append(get_memory_info_reply(state).store_stats.object_store_bytes_primary_copy)
        time.sleep(0.25)
    return min(found)


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """All rows, and what they are made from."""
    most = max(size.counts)
    recipe = recipe_of(tiny_teacher(folder / "teacher"), most, 1 + size.rounds * len(size.counts))
    with one_machine(most):
        teacher: Any = ray.remote(CountingTeacher).options(name="teacher", num_cpus=0.01, resources={"cloud": 1})
        teacher = teacher.remote(recipe)
        cohort = recipe.cohorts[0].name
        start: Start = ray.get(teacher.start.remote(cohort))
        seats = -(-most // size.processes)
        crowd: Any = ray.remote(concurrency_groups={"control": 1})(Crowd)  # type: ignore[call-overload]
        students = [(index, recipe, start.config, ["teacher"], folder / "state") for index in range(most)]
        actors = [
            crowd.options(num_cpus=0.01, resources={"edge": seats}).remote(students[number :: size.processes])
            for number in range(size.processes)
        ]
        # The first of every process, then the second ones: few students never share one.
        members = [
            Member(f"edge-{index}", cohort, Seat(actors[index % size.processes], index // size.processes))
            for index in range(most)
        ]
        return {"rows": _rows(size, recipe, members, teacher, start.weights), "weights_bytes": nbytes(start.weights)}


def _rows(
    size: Size, recipe: DistillRecipe, members: Sequence[Member], teacher: Any, weights: Weights
) -> list[dict[str, Any]]:
    cohort = recipe.cohorts[0].name
    number = 0

    def one_round(some: Sequence[Member]) -> tuple[float, float]:
        """A round; the processor's milliseconds that it took this process, and its seconds by the clock."""
        nonlocal number
        begun = time.process_time()
        done = run_round(number + 1, number, some, {cohort: weights}, recipe.rounds, lambda beats: None)
        spent = 1e3 * (time.process_time() - begun)
        assert not done.missed and len(done.answers) == len(some), done.missed
        number += 1
        return spent, done.seconds

    with working(f"{size.processes} processes ready"):
        one_round(members)
    rows = []
    with bars(len(size.counts)) as progress:
        for nth, count in enumerate(size.counts):
            before, held = ray.get(teacher.tally.remote()), stored()
            spent, seconds = zip(*(one_round(members[:count]) for _ in range(size.rounds)), strict=True)
            after, holds = ray.get(teacher.tally.remote()), stored()
            batches = after.batches - before.batches
            rows.append(
                {
                    "students": count,
                    "students_per_actor": -(-count // size.processes),
                    "asked_per_batch": (after.asked - before.asked) / batches,
                    "teacher_forwards_per_batch": (after.forwards - before.forwards) / batches,
                    "signal_bytes": (after.payload - before.payload) / batches,
                    "object_store_bytes_per_student": (holds - held) / batches / count,
                    "coordinator_ms_per_round_per_student": statistics.median(spent) / count,
                    "round_s": statistics.median(seconds),
                }
            )
            progress.move("numbers of students", nth + 1, f"{count} students")
    return rows


def extrapolate(rows: Sequence[dict[str, Any]], weights_bytes: int, edges: int = EDGES) -> dict[str, Any]:
    """What many edges would take, by a straight line through the rows, and what that assumes."""
    counts = [row["students"] for row in rows]
    rounds = [row["coordinator_ms_per_round_per_student"] * row["students"] for row in rows]
    each, fixed = (float(one) for one in np.polyfit(counts, rounds, 1))
    signal = statistics.fmean(row["signal_bytes"] for row in rows)
    longest = max(row["round_s"] for row in rows)
    held = statistics.median(row["object_store_bytes_per_student"] * row["students"] for row in rows)
    return {
        "edges": edges,
        "coordinator_ms_fixed": fixed,
        "coordinator_ms_per_student": each,
        "coordinator_s_per_round": (fixed + each * edges) / 1e3,
        "object_store_bytes_per_batch": held,
        "signal_bytes_sent_per_batch": signal * edges,
        "weights_bytes_per_round": 2 * weights_bytes * edges,
        "assumptions": [
            "the coordinator's processor time grows in a straight line, as it does in the rows",
            f"a round lasts {longest:.0f} s at most, and every student is asked for a sign of life twice a second",
            f"a student has {weights_bytes / 1e6:.1f} MB of weights; averaging grows with them",
            "all edges see the same batches; edges with data of their own add one pass and one signal a batch each",
            "every edge is a node and fetches its own copy of a signal, which the network and not the store must carry",
            "one driver; a tree of averages would divide its time",
        ],
    }


def run(as_json: bool, *, quick: bool = False) -> dict[str, Any]:
    """Measure, print, and return the figures; ``quick`` with four students at most."""
    with scratch() as folder:
        measured = measure(QUICK if quick else FULL, folder)
    rows, far = measured["rows"], extrapolate(measured["rows"], measured["weights_bytes"])
    result = {**measured, "quick": quick, "extrapolation": far}
    header = ["students", "in a process", "asked", "passes", "stored, B", "coordinator, ms", "round, s"]
    cells = [
        [
            str(row["students"]),
            str(row["students_per_actor"]),
            f"{row['asked_per_batch']:.1f}",
            f"{row['teacher_forwards_per_batch']:.2f}",
            f"{row['object_store_bytes_per_student']:.0f}",
            f"{row['coordinator_ms_per_round_per_student']:.1f}",
            f"{row['round_s']:.1f}",
        ]
        for row in rows
    ]
    signal = statistics.fmean(row["signal_bytes"] for row in rows)
    title = f"one teacher; for a batch of {signal:.0f} B: asked, passes, stored per student; for a round: per student"
    show(title, header, cells, result, False)
    console.print(
        f"{far['edges']} edges: {far['coordinator_s_per_round']:.0f} s of coordinating a round, "
        f"{far['object_store_bytes_per_batch'] / 1e3:.0f} kB stored and "
        f"{far['signal_bytes_sent_per_batch'] / 1e6:.0f} MB of signals sent a batch, "
        f"{far['weights_bytes_per_round'] / 1e9:.0f} GB of weights a round, if"
    )
    for assumption in far["assumptions"]:
        console.print(f"  - {assumption}")
    if as_json:
        print(json.dumps(result), flush=True)
    return result
