"""Run of one edge of several: evaluation before training, training alone, and training with the others."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save

from raycloud.data.batches import Batch
from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.durable import write_atomically
from raycloud.link.channel import Channel
from raycloud.link.client import SessionLost
from raycloud.models.loading import load_config, load_tokenizer, pick_device, resolve
from raycloud.results import record_inputs
from raycloud.split.finetune.assembly import EdgeSetup, build_edge_setup, check_lengths, plan_of
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.client import RemoteCloudClient
from raycloud.split.finetune.edge_trainer import CloudClient, EdgeTrainer
from raycloud.split.finetune.examples import (
    batch_schedule,
    bos_of,
    calibration_batches,
    evaluate,
    load_examples,
    max_batch_tokens,
)
from raycloud.split.finetune.group_client import GroupClient, RoundResult
from raycloud.split.finetune.loop import MAX_LOST_SESSIONS, last_common_checkpoint, train
from raycloud.split.finetune.messages import GroupConfig, OpenTuning
from raycloud.split.finetune.metrics_log import Record
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.traffic import bytes_by_cut
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet
from raycloud.training.loop import Step

Connect = Callable[[str], Channel]
"""Function that opens a channel to the cloud for a session's id, or for one that keeps sessions together."""


class EdgeRun:
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
        self._recipe = recipe.of(name)
        where = resolve(recipe.model, notify)
        config = load_config(where)
        check_lengths(recipe, config)
        self._plans, self._device = PlanSet.of(plan_of(recipe, config)), pick_device(recipe.device)
        tokenizer = load_tokenizer(where)
        self._bos = bos_of(self._recipe, tokenizer)
        texts, self._held_out, self._classes = load_examples(self._recipe, tokenizer, notify)
        record_inputs(folder, fingerprints(data_sources(recipe.data)))
        self._texts, self._schedule = texts, batch_schedule(texts, recipe)
        self.steps = recipe.rounds.count * recipe.rounds.steps
        """Number of steps of a training, alone or together."""

    def facts(self) -> Record:
        """Numbers of its texts, and whether they begin with BOS."""
        return {
            "bos": self._bos,
            "rows": dict(self._texts.rows),
            "train_texts": len(self._texts.samples),
            "held_out_texts": len(self._held_out.samples),
        }

    def before(self) -> Record:
        """Evaluate the untrained model on this edge's held-out texts.

        Raises:
            LinkError: the cloud cannot be reached, or refuses.
        """
        (setup, begin), lost = self._ends("before"), 0
        while True:
            edge = setup.edge(RemoteCloudClient(self._connect, begin, setup.uplink_bottleneck.decoder))
            with closing(edge.cloud):
                try:
                    edge.fit(self._calibration())
                    return self._evaluate(edge)
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

    def _ends(self, what: str) -> tuple[EdgeSetup, OpenTuning]:
        """Untrained edge setup, and the OPEN message for the cloud."""
        recipe = self._recipe
        part = load_edge(
            recipe.model, self._plans, device=recipe.device, dtype="float32", training=True, pooler=recipe.uses_pooler
        )
        fitted_to = self._calibration()
        setup = build_edge_setup(
            recipe,
            part.first,
            part.last,
            fitted_to,
            classes=self._classes,
            total_steps=self.steps,
            pooler=part.pooler,
        )
        setup.check_batch_size(max_batch_tokens(self._schedule, self.steps, self._held_out, recipe), fitted_to)
        run = hashlib.sha256(f"{self._run}/{self.name}/{what}".encode()).hexdigest()[:32]
        return setup, setup.begin(part.fingerprint, run)

    def _calibration(self) -> list[Batch]:
        most = self._recipe.training.batch_size
        return [batch.to(self._device) for batch in calibration_batches(self._texts, most=most)]

    def _trained(self, what: str, group: GroupConfig | None, on_record: Callable[[Record], None]) -> Record:
        kept = CheckpointStore(self._kept_in(what), None if group is None else group.steps)
        setup, begin = self._ends(what)

        def connect(session: str) -> Channel:
            # By the group's name a router keeps all its sessions at one replica, which the rounds need.
            return self._connect(session if group is None else group.group)

        def cloud_at(step: int | None) -> CloudClient:
            opening = begin.model_copy(update={"restore": step, "group": group})
            return RemoteCloudClient(connect, opening, setup.uplink_bottleneck.decoder)

        def stepped(step: Step) -> None:
            record = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
            on_record({"kind": "step", "what": what, **record, "skipped": step.skipped})

        def met(result: RoundResult) -> None:
            on_record({"kind": "round", **asdict(result)})

        latest = last_common_checkpoint(kept, cloud_at)
        edge = setup.edge(cloud_at(None) if latest is None else latest[1], self._recipe.max_in_flight)
        found: Record = {}
        try:
            if latest is None:
                edge.fit(self._calibration())
            train(
                edge,
                lambda step: [batch.to(self._device) for batch in self._schedule.batches(step)],
                steps=self.steps,
                every=self._recipe.checkpoint_every,
                kept=kept,
                cloud_at=cloud_at,
                on_step=stepped,
                group_client=None if group is None else GroupClient(group, self._schedule.samples, met),
                then=lambda: found.update(self._evaluate(edge)),
            )
        finally:
            edge.cloud.close()
        write_atomically(self._folder / f"{what}.safetensors", save(edge.trained_weights()), checksum=True)
        return {**found, "bytes_per_step": self._bytes(edge) / self.steps}

    def _evaluate(self, edge: EdgeTrainer) -> Record:
        return dict(evaluate(lambda batch: edge.predict(batch.to(self._device)), self._held_out, self._recipe))

    def _bytes(self, edge: EdgeTrainer) -> int:
        """Bytes of all steps, at both cuts together."""
        sizes: Counter[str] = Counter()
        for step in range(self.steps):
            sizes += edge.traffic(step, self._schedule.lengths(step))
        return bytes_by_cut(sizes)[2]
