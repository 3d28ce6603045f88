"""One edge of several: what it can do before, what it learns alone, and what together with the others."""

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
from raycloud.link.caller import SessionLost
from raycloud.link.channel import Channel
from raycloud.models.loading import load_config, load_tokenizer, pick_device, resolve
from raycloud.results import write_atomically
from raycloud.split.finetune.assembly import Ends, check_lengths, ends_of, plan_of
from raycloud.split.finetune.company import Company, Meeting
from raycloud.split.finetune.crossing import per_cut
from raycloud.split.finetune.examples import calibration, examples_of, judge, lessons_of, most_tokens
from raycloud.split.finetune.front import Cloud, Front
from raycloud.split.finetune.journal import Record
from raycloud.split.finetune.loop import LOSSES, train
from raycloud.split.finetune.messages import Begin, Together
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.remote import RemoteCloud
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet
from raycloud.training.loop import Step

Connect = Callable[[str], Channel]
"""Opens a channel to the cloud for a session's id, or for whatever else sessions that belong together are kept by."""


class Member:
    """An edge of a recipe, with its own texts and its own folder.

    What it does ends alike however often it is broken off and done again.

    Args:
        recipe: of all edges.
        name: this one's.
        folder: on this edge's own disk: checkpoints, and what it has learned.
        connect: to the cloud.
        run: tells this run of the recipe from others.
        group: what the edges' group is called at the cloud.
        notify: told one line before each download or conversion.

    Raises:
        RaycloudError: its model or its texts cannot be had.
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
        texts, self._held_out, self._classes = examples_of(self._recipe, load_tokenizer(where), notify)
        self._texts, self._lessons = texts, lessons_of(texts, recipe)
        self.steps = recipe.rounds.count * recipe.rounds.steps
        """Of either training."""

    def facts(self) -> Record:
        """How many texts it has."""
        return {"train_texts": len(self._texts.samples), "held_out_texts": len(self._held_out.samples)}

    def before(self) -> Record:
        """The metrics of the model as it begins, on this edge's held-out texts.

        Raises:
            LinkError: the cloud cannot be reached, or refuses.
        """
        (ends, begin), lost = self._ends("before"), 0
        while True:
            edge = ends.edge(RemoteCloud(self._connect, begin, ends.code.decoder))
            with closing(edge.cloud):
                try:
                    edge.fit(self._calibration())
                    return self._judged(edge)
                except SessionLost:
                    lost += 1
                    if lost > LOSSES:
                        raise

    def alone(self, told: Callable[[Record], None]) -> Record:
        """Train without the others; the metrics then, and what a step sends.

        Args:
            told: of every step.

        Raises:
            LinkError: the cloud cannot be reached, or refuses.
            TrainingError: gradients stay non-finite, or a checkpoint cannot be read.
        """
        return self._trained("alone", None, told)

    def together(self, told: Callable[[Record], None]) -> Record:
        """Likewise with the others; ``told`` hears of every meeting as well."""
        rounds = self._rounds
        group = Together(
            group=self._group,
            name=self.name,
            edges=self._names,
            steps=rounds.steps,
            deadline_s=rounds.deadline_s,
            averaged=rounds.parts == "averaged",
        )
        return self._trained("together", group, told)

    def forget(self, what: str) -> None:
        """Let go of the checkpoints of what is done and known to be; what was learned stays."""
        shutil.rmtree(self._kept_in(what), ignore_errors=True)

    def _kept_in(self, what: str) -> Path:
        """Where the checkpoints of this run are; a disk of the edge's own may hold some of an earlier one."""
        return self._folder / f"{what}-{self._run}"

    def _ends(self, what: str) -> tuple[Ends, Begin]:
        """This edge's part of the model as it begins, and what it asks of the cloud."""
        recipe = self._recipe
        part = load_edge(
            recipe.model, self._plans, device=recipe.device, dtype="float32", training=True, pooler=recipe.first_rows
        )
        fitted_to = self._calibration()
        ends = ends_of(
            recipe,
            part.first,
            part.last,
            fitted_to,
            classes=self._classes,
            total_steps=self.steps,
            pooler=part.pooler,
        )
        ends.check_frames(most_tokens(self._lessons, self.steps, self._held_out, recipe), fitted_to)
        run = hashlib.sha256(f"{self._run}/{self.name}/{what}".encode()).hexdigest()[:32]
        return ends, ends.begin(part.fingerprint, run)

    def _calibration(self) -> list[Batch]:
        most = self._recipe.training.batch_size
        return [batch.to(self._device) for batch in calibration(self._texts, most=most)]

    def _trained(self, what: str, group: Together | None, told: Callable[[Record], None]) -> Record:
        kept = Checkpoints(self._kept_in(what))
        ends, begin = self._ends(what)

        def connect(session: str) -> Channel:
            # By the group's name a router keeps all its sessions at one replica, which they must meet at.
            return self._connect(session if group is None else group.group)

        def cloud_at(step: int | None) -> Cloud:
            asked = begin.model_copy(update={"restore": step, "together": group})
            return RemoteCloud(connect, asked, ends.code.decoder)

        def stepped(step: Step) -> None:
            record = {"step": step.step, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
            told({"kind": "step", "what": what, **record, "skipped": step.skipped})

        def met(meeting: Meeting) -> None:
            told({"kind": "meeting", **asdict(meeting)})

        latest = max(kept.steps(), default=None)
        edge = ends.edge(cloud_at(latest), self._recipe.depth)
        found: Record = {}
        try:
            if latest is None:
                edge.fit(self._calibration())
            train(
                edge,
                lambda step: [batch.to(self._device) for batch in self._lessons.batches(step)],
                steps=self.steps,
                every=self._recipe.checkpoint_every,
                kept=kept,
                cloud_at=cloud_at,
                told=stepped,
                company=None if group is None else Company(group, self._lessons.samples, met),
                then=lambda: found.update(self._judged(edge)),
            )
        finally:
            edge.cloud.close()
        write_atomically(self._folder / f"{what}.safetensors", save(edge.learnt()))
        return {**found, "bytes_per_step": self._bytes(edge) / self.steps}

    def _judged(self, edge: Front) -> Record:
        return dict(judge(lambda batch: edge.predict(batch.to(self._device)), self._held_out, self._recipe))

    def _bytes(self, edge: Front) -> int:
        """Of all steps, both cuts together."""
        sizes: Counter[str] = Counter()
        for step in range(self.steps):
            sizes += edge.crossing(step, self._lessons.lengths(step))
        return per_cut(sizes)[2]
