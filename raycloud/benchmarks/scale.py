"""Cost of one more edge for the cloud: teacher forward passes, object store and coordinator, by number of students.

The benchmark runs the real teacher, students and rounds with a tiny random model, on a cluster of two nodes on this
machine. All students see the same batches. Up to 16 students have processes of their own; beyond that several share a
process, but each is still trained, called and averaged separately. The coordinator's time is the processor time of the
driver, without waiting.
"""

from __future__ import annotations

import gc
import logging
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

from raycloud.benchmarks.local_cloud import no_token_auth, scratch
from raycloud.benchmarks.measure import SMOLLM2, Measured
from raycloud.cluster.cloud_teacher import CloudTeacher, InitialStudent
from raycloud.cluster.edge_student import EdgeStudent
from raycloud.cluster.rounds import StudentHandle, run_round
from raycloud.data.batches import Batch
from raycloud.distill.learner import Heartbeat, StudentUpdate
from raycloud.distill.recipe import DistillRecipe
from raycloud.models.loading import load_tokenizer, quiet_transformers, resolve
from raycloud.models.weights import Weights, nbytes
from raycloud.report.console import console, progress_bars, timed
from raycloud.rounds.machine import RoundMachine

PROCESSES = 16
COUNTS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS, STEPS = 3, 2
EDGES = 10_000
"""Number of edges to which the report extrapolates."""
_STORE = 1 << 29
_SETTLE_S = 3.0
_LIMIT_S = 1800.0
_HEAD = {"num_cpus": 1, "resources": {"cloud": 1}, "include_dashboard": False, "object_store_memory": _STORE}


@dataclass(frozen=True)
class Size:
    """Size of the benchmark: processes, numbers of students, and rounds for each number."""

    processes: int
    counts: tuple[int, ...]
    rounds: int


FULL = Size(PROCESSES, COUNTS, ROUNDS)
QUICK = {"size": Size(2, (1, 2, 4), 2)}


@dataclass(frozen=True)
class TeacherCounts:
    """Counts of a teacher's work so far.

    Args:
        requests: requests.
        batches: distinct batches in these requests.
        forwards: forward passes through the model.
        payload: bytes of all signals.
    """

    requests: int
    batches: int
    forwards: int
    payload: int


class CountingTeacher(CloudTeacher):
    """Teacher that counts its requests, forward passes and bytes, and otherwise behaves the same."""

    def __init__(self, recipe: DistillRecipe) -> None:
        super().__init__(recipe)
        self._requests, self._forwards, self._payload = list[int](), 0, 0

    def signal(self, name: str, batch: Batch) -> list[ray.ObjectRef]:
        """See :meth:`CloudTeacher.signal`."""
        self._requests.append(hash(batch.ids.numpy().tobytes()))
        return super().signal(name, batch)

    def _share(self, key: str, payload: Any) -> None:
        self._forwards += 1
        self._payload += payload.nbytes
        super()._share(key, payload)

    def counts(self) -> TeacherCounts:
        """Return the counts so far."""
        return TeacherCounts(len(self._requests), len(set(self._requests)), self._forwards, self._payload)


class StudentPool:
    """Actor with several independent students, each addressed by its index."""

    def __init__(self, students: Sequence[tuple[Any, ...]]) -> None:
        self._students: list[Any] = [EdgeStudent(*arguments) for arguments in students]

    def prepare(self, index: int) -> int:
        """Call :meth:`EdgeStudent.prepare` of one student."""
        return self._students[index].prepare()

    def train(self, index: int, round_id: int, current: int, weights: Weights) -> StudentUpdate | None:
        """Call :meth:`EdgeStudent.train` of one student."""
        return self._students[index].train(round_id, current, weights)

    @ray.method(concurrency_group="control")
    def heartbeat(self, index: int) -> Heartbeat | None:
        """Call :meth:`EdgeStudent.heartbeat` of one student."""
        return self._students[index].heartbeat()

    @ray.method(concurrency_group="control")
    def advance(self, index: int, round_id: int) -> None:
        """Call :meth:`EdgeStudent.advance` of one student."""
        self._students[index].advance(round_id)


class PooledStudent:
    """Handle of one student in a :class:`StudentPool`, with the interface of an actor of its own."""

    def __init__(self, pool: Any, index: int) -> None:
        for name in ("prepare", "train", "heartbeat", "advance"):
            setattr(self, name, _Call(partial(getattr(pool, name).remote, index)))


@dataclass(frozen=True)
class _Call:
    remote: Any


def recipe_of(model: Path, students: int, rounds: int) -> DistillRecipe:
    """Make a recipe with one teacher and a number of students that see the same text."""
    placement = {"num_cpus": 0.01}
    return DistillRecipe.model_validate(
        {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "teacher": {"model": str(model), "placement": placement, "timeout_s": _LIMIT_S},
            "student": {"blocks": 2, "choose": "spacing", "placement": placement},
            "data": {"max_length": 48, "limit": 256},
            "edges": [{"name": f"edge-{number}"} for number in range(students)],
            "objective": {"diagnostics_every": 0},
            "training": {"batch_size": 8},
            "rounds": {"count": rounds, "steps": STEPS, "deadline_s": _LIMIT_S},
        }
    )


def tiny_teacher(folder: Path) -> Path:
    """Save a random Llama with four narrow blocks and SmolLM2's tokenizer into a folder."""
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
    """Run a cloud node and an edge node on this machine during the block."""
    with no_token_auth():
        cluster = Cluster(initialize_head=True, head_node_args=_HEAD)
        try:
            cluster.add_node(num_cpus=2, resources={"edge": students}, object_store_memory=_STORE)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def stored() -> int:
    """Bytes of objects in the cluster's object store without copies, after released objects have been freed."""
    gc.collect()
    found, until = list[int](), time.monotonic() + _SETTLE_S
    while time.monotonic() < until:
        found.append(get_memory_info_reply(state).store_stats.object_store_bytes_primary_copy)
        time.sleep(0.25)
    return min(found)


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Measure all table rows, and the size of the student's weights in bytes."""
    most = max(size.counts)
    recipe = recipe_of(tiny_teacher(folder / "teacher"), most, 1 + size.rounds * len(size.counts))
    with one_machine(most):
        teacher: Any = ray.remote(CountingTeacher).options(name="teacher", num_cpus=0.01, resources={"cloud": 1})
        teacher = teacher.remote(recipe)
        cohort = recipe.cohorts[0].name
        start: InitialStudent = ray.get(teacher.start.remote(cohort))
        per_process = -(-most // size.processes)
        pool: Any = ray.remote(concurrency_groups={"control": 1})(StudentPool)  # type: ignore[call-overload]
        students = [(index, recipe, start.config, ["teacher"], folder / "state") for index in range(most)]
        actors = [
            pool.options(num_cpus=0.01, resources={"edge": per_process}).remote(students[number :: size.processes])
            for number in range(size.processes)
        ]
        # First one student of every process, then a second of each: few students do not share a process.
        members = [
            StudentHandle(
                f"edge-{index}", cohort, PooledStudent(actors[index % size.processes], index // size.processes)
            )
            for index in range(most)
        ]
        return {"rows": _rows(size, recipe, members, teacher, start.weights), "weights_bytes": nbytes(start.weights)}


def _rows(
    size: Size, recipe: DistillRecipe, members: Sequence[StudentHandle], teacher: Any, weights: Weights
) -> list[dict[str, Any]]:
    cohort = recipe.cohorts[0].name
    number = 0

    def one_round(some: Sequence[StudentHandle]) -> tuple[float, float]:
        """Run a round; return the processor time of this process in milliseconds, and the elapsed seconds."""
        nonlocal number
        begun = time.process_time()
        rounds = {cohort: RoundMachine(weights, number - 1)}
        done = run_round(number + 1, number, some, rounds, recipe.rounds, lambda beats: None)
        spent = 1e3 * (time.process_time() - begun)
        assert not done.missed and len(done.answers) == len(some), done.missed
        number += 1
        return spent, done.seconds

    with timed(f"{size.processes} processes ready"):
        one_round(members)
    rows = []
    with progress_bars(len(size.counts)) as progress:
        for nth, count in enumerate(size.counts):
            before, held = ray.get(teacher.counts.remote()), stored()
            spent, seconds = zip(*(one_round(members[:count]) for _ in range(size.rounds)), strict=True)
            after, holds = ray.get(teacher.counts.remote()), stored()
            batches = after.batches - before.batches
            rows.append(
                {
                    "students": count,
                    "students_per_actor": -(-count // size.processes),
                    "asked_per_batch": (after.requests - before.requests) / batches,
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
    """Extrapolate the cost to many edges by a linear fit through the rows, and list the assumptions."""
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
            "the coordinator's processor time grows linearly, as in the rows",
            f"a round lasts {longest:.0f} s at most, and every student is asked for a heartbeat twice a second",
            f"a student has {weights_bytes / 1e6:.1f} MB of weights; averaging grows with them",
            "all edges see the same batches; edges with data of their own add one pass and one signal per batch each",
            "every edge is a node and fetches its own copy of a signal, which loads the network and not the store",
            "one driver; hierarchical averaging would divide its time",
        ],
    }


def run(*, size: Size = FULL) -> Measured:
    """Measure, and extrapolate to many edges."""
    with scratch() as folder:
        measured = measure(size, folder)
    rows, far = measured["rows"], extrapolate(measured["rows"], measured["weights_bytes"])
    header = ["students", "per process", "requests", "forward passes", "stored, B", "coordinator, ms", "round, s"]
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
    title = (
        f"one teacher; requests, forward passes and bytes stored per student for a batch, signal of {signal:.0f} B; "
        "coordinator per round and student"
    )
    notes = [
        f"{far['edges']} edges: {far['coordinator_s_per_round']:.0f} s of the coordinator per round, "
        f"{far['object_store_bytes_per_batch'] / 1e3:.0f} kB stored and "
        f"{far['signal_bytes_sent_per_batch'] / 1e6:.0f} MB of signals sent per batch, "
        f"{far['weights_bytes_per_round'] / 1e9:.0f} GB of weights per round, if",
        *(f"  - {assumption}" for assumption in far["assumptions"]),
    ]
    return Measured(title, header, cells, {**measured, "extrapolation": far}, notes)
