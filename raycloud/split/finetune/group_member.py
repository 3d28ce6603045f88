"""Member of a group: one edge of several, which is evaluated before training, trains alone, and with the others."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.durable import write_atomically
from raycloud.link.client import SessionLost
from raycloud.results import record_inputs
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.edge_data import EdgeData
from raycloud.split.finetune.group_client import GroupClient, RoundResult
from raycloud.split.finetune.messages import GroupConfig
from raycloud.split.finetune.metrics_log import Record, step_record
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.recovery import MAX_LOST_SESSIONS, train
from raycloud.split.finetune.sides import Connect, Sides, remote_sides
from raycloud.split.finetune.traffic import bytes_by_cut
from raycloud.training.loop import Step


class MemberRun:
    """Edge of a recipe, with its own texts and its own folder.

    Its results are the same however often it is interrupted and resumed.

    Args:
        recipe: recipe of all edges.
        name: name of this edge.
        folder: folder on this edge's disk for checkpoints and trained weights.
        connect: opens a channel to the cloud.
        run: id of this run of the recipe.
        group: name of the edges' group at the cloud.
        notify: called with one line before each download or conversion.

    Raises:
        RaycloudError: its model or its texts are unavailable.
    """

    def __init__(
        self,
        recipe: SplitTuneRecipe,
        name: str,
        folder: Path,
        connect: Connect,
        *,
        run: str,
        group: str,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name, self._connect, self._run, self._folder = name, connect, run, folder
        self._names, self._rounds, self._group = [edge.name for edge in recipe.edges], recipe.rounds, group
        self._data = EdgeData(recipe.of(name), notify)
        record_inputs(folder, fingerprints(data_sources(recipe.data)))  # after the data: a mistake leaves nothing
        self.steps = recipe.rounds.count * recipe.rounds.steps
        """Number of steps of a training, alone or together."""

    def facts(self) -> Record:
        """Numbers of its texts, and whether they begin with BOS."""
        return self._data.facts()

    def before(self) -> Record:
        """Evaluate the untrained model on this edge's held-out texts.

        Raises:
            LinkError: the cloud cannot be reached, or refuses.
        """
        sides, lost = self._sides("before"), 0
        while True:
            edge = sides.fitted()
            with closing(edge.cloud):
                try:
                    return dict(self._data.evaluate(edge))
                except SessionLost:
                    lost += 1
                    if lost > MAX_LOST_SESSIONS:
                        raise

    def alone(self, on_record: Callable[[Record], None]) -> Record:
        """Train without the others; return the metrics afterwards and the bytes of a step.

        Args:
            on_record: called with the record of every step.

        Raises:
            LinkError: the cloud cannot be reached, or refuses.
            TrainingError: gradients stay non-finite, or a checkpoint cannot be read.
        """
        return self._trained("alone", None, on_record)

    def together(self, on_record: Callable[[Record], None]) -> Record:
        """Train with the others, like :meth:`alone`; ``on_record`` is also called with the result of every round."""
        rounds = self._rounds
        group = GroupConfig(
            group=self._group,
            name=self.name,
            edges=self._names,
            steps=rounds.steps,
            deadline_s=rounds.deadline_s,
            averaged=rounds.parts == "averaged",
            aggregation=rounds.aggregation,
        )
        return self._trained("together", group, on_record)

    def forget(self, what: str) -> None:
        """Remove the checkpoints of a completed phase; its trained weights stay."""
        shutil.rmtree(self._kept_in(what), ignore_errors=True)

    def _kept_in(self, what: str) -> Path:
        """Folder of this run's checkpoints of a phase; the edge's disk may hold checkpoints of an earlier run."""
        return self._folder / f"{what}-{self._run}"

    def _sides(self, what: str, group: GroupConfig | None = None) -> Sides:
        """Both sides of a phase; the cloud keeps its checkpoints under an id of its own."""
        run = hashlib.sha256(f"{self._run}/{self.name}/{what}".encode()).hexdigest()[:32]
        return remote_sides(self._data, self.steps, run, self._connect, group)

    def _trained(self, what: str, group: GroupConfig | None, on_record: Callable[[Record], None]) -> Record:
        data, sides = self._data, self._sides(what, group)
        kept = CheckpointStore(self._kept_in(what), None if group is None else group.steps)

        def stepped(step: Step) -> None:
            on_record({"kind": "step", "what": what, **step_record(step)})

        def met(result: RoundResult) -> None:
            on_record({"kind": "round", **asdict(result)})

        edge = sides.start(kept)
        found: Record = {}
        try:
            train(
                edge,
                data.batches,
                steps=self.steps,
                every=data.recipe.checkpoint_every,
                kept=kept,
                cloud_at=sides.cloud_at,
                on_step=stepped,
                group_client=None if group is None else GroupClient(group, data.schedule.samples, met),
                then=lambda: found.update(data.evaluate(edge)),
            )
        finally:
            edge.cloud.close()
        write_atomically(self._folder / f"{what}.safetensors", save(edge.trained_weights()), checksum=True)
        return {**found, "bytes_per_step": bytes_by_cut(data.traffic(edge, self.steps))[2] / self.steps}
