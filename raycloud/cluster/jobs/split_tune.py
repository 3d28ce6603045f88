"""The job of edges that fine-tune one model together: a cloud actor with the middle, an actor for each edge.

The driver only starts them, listens, and starts again what died; rounds are between the edges and the cloud's actor. It
sees neither texts nor labels.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from safetensors.torch import save
from torch import Tensor

from raycloud.cluster.actor_channel import CALLS_AT_ONCE
from raycloud.cluster.cloud_tuner import CloudTuner
from raycloud.cluster.edge_tuner import EdgeTuner, What
from raycloud.cluster.jobs.frame import Result, answered, finished, on_cluster, placed
from raycloud.cluster.run_log import RunLog
from raycloud.data.sources import load_rows
from raycloud.errors import ClusterError, LinkError, RaycloudError, RecipeError, TrainingError
from raycloud.models.loading import load_config, resolve
from raycloud.report.console import Bars, bars, console, tell, working
from raycloud.report.split_edges import print_summary, summarise, write_page
from raycloud.results import RECIPE, Mode, ResultDir, write_atomically, write_folder
from raycloud.split.finetune.assembly import check_lengths, plan_of
from raycloud.split.finetune.journal import Journal, Record
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.whole import save_whole

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5
_NEWS_S = 10.0
_ATTEMPTS = 3
"""So many times in a row an edge may fail at one thing, or die, without getting any further before the run goes on
without it."""
_GRACE_S = 60.0
"""Beside the deadline of a round, how long nothing may be heard of those that are not done once another edge is."""


def run(recipe: SplitTuneRecipe, mode: Mode = "new") -> Result:
    """Train all edges of a recipe, and leave a result directory behind.

    That is ``recipe.yaml``, ``metrics.jsonl``, ``summary.json``, ``report.html``, ``group.safetensors``, what all edges
    have in common, where that is the whole model also ``model/``, which ``transformers`` loads, and on every edge's own
    disk ``edges/<name>/together.safetensors``, what that edge has learned.

    Args:
        recipe: what to do; it names the edges.
        mode: ``new``, ``resume`` (both sides go on from their own disks) or ``overwrite``.

    Raises:
        RaycloudError: whatever the user can mend.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    ResultDir.check(recipe.output, recipe, mode)
    if recipe.edge is not None:
        raise RecipeError(f"edge={recipe.edge}, and all edges train on a cluster; allowed: null, or --cloud")
    config = load_config(resolve(recipe.model, console.print))
    plan_of(recipe, config)
    check_lengths(recipe, config)
    if recipe.data.source.startswith("builtin:"):
        # Fetched before actors start; an edge's own files are the edge's to read.
        load_rows(recipe.data.source, "train", console.print)
    with on_cluster(recipe, mode) as (results, log):
        return _Run(_with_absolute_paths(recipe), results, log).whole()


def _with_absolute_paths(recipe: SplitTuneRecipe) -> SplitTuneRecipe:
    """Actors do not run in the driver's directory."""

    def absolute(source: str) -> str:
        path = Path(source).expanduser()
        return str(path.absolute()) if path.exists() else source

    data = recipe.data.model_copy(update={"source": absolute(recipe.data.source)})
    return recipe.model_copy(update={"model": absolute(recipe.model), "data": data})


@dataclass
class Edge:
    """An edge's actor as the driver sees it."""

    name: str
    actor: Any
    pid: int = 0
    """Of its process, once it has been heard."""
    heard: int = 0
    """Records of that process."""
    listening: ray.ObjectRef | None = None
    lost: int | None = None
    """The process whose death is known; 0 if it died before it was heard."""
    failures: list[str] = field(default_factory=list)
    """Since it last got any further."""


class _Run:
    """One run of the job."""

    def __init__(self, recipe: SplitTuneRecipe, results: ResultDir, log: RunLog) -> None:
        self.recipe, self.results, self.log = recipe, results, log
        self.journal = Journal(results)

    def whole(self) -> Result:
        """From wherever the directory stands to its end."""
        if (done := finished(self.results)) is not None:
            return done
        with working("cloud ready"):
            self._start_cloud()
        edges = self._start_edges()
        phases: list[What] = ["before", "alone", "together"] if self.recipe.alone else ["before", "together"]
        for what in phases:
            self._all(what, edges)
        return self._finish()

    def _start_cloud(self) -> None:
        self.name = f"cloud-{uuid.uuid4().hex[:8]}"
        options = {"name": self.name, "max_restarts": -1, **placed(self.recipe.cloud_placement, "cloud")}
        options["max_concurrency"] = max(CALLS_AT_ONCE, 4 * len(self.recipe.edges))
        actor: Any = ray.remote(CloudTuner)
        self.cloud = actor.options(**options).remote(self.recipe, self.results.path / "cloud", self.log.of("cloud"))
        answered(self.cloud.ready.remote(), "cloud")

    def _start_edges(self) -> list[Edge]:
        # The control group answers while the edge trains.
        actor: Any = ray.remote(concurrency_groups={"control": 1})(EdgeTuner)  # type: ignore[call-overload]
        options = {"max_restarts": -1, **placed(self.recipe.edge_placement, "edge")}
        folder = self.results.path / "edges"
        return [
            Edge(
                edge.name,
                actor.options(**options).remote(
                    index, self.recipe, self.name, folder, self.results.run_id, self.log.of(f"edge {edge.name}")
                ),
            )
            for index, edge in enumerate(self.recipe.edges)
        ]

    def _all(self, what: What, edges: list[Edge]) -> None:
        """Have every edge do one thing; once one is done, none is waited for whose process does not answer for long."""
        wanted = [edge for edge in edges if not self.journal.judged(edge.name, what)]
        calls: dict[ray.ObjectRef, Edge] = {edge.actor.do.remote(what): edge for edge in wanted}
        for edge in wanted:
            edge.failures = []
        forgetting: list[ray.ObjectRef] = []
        heard, done = time.monotonic(), len(wanted) < len(edges)
        patience = self.recipe.rounds.deadline_s + _GRACE_S
        with bars(self.recipe.rounds.count * self.recipe.rounds.steps) as progress:
            while calls and not (done and time.monotonic() > heard + patience):
                ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_S)
                alive = [self._listen(edge, progress) for edge in calls.values()]
                if any(alive):
                    heard = time.monotonic()
                for ref in ready:
                    edge = calls.pop(ref)
                    if (found := self._found(ref, edge)) is not None:
                        self._hear(edge)
                        self.journal.add({"kind": "judged", "edge": edge.name, "what": what, **found})
                        forgetting.append(edge.actor.forget.remote(what))
                        heard, done = time.monotonic(), True
                    elif len(edge.failures) < _ATTEMPTS:
                        calls[edge.actor.do.remote(what)] = edge
        if forgetting:
            ray.wait(forgetting, num_returns=len(forgetting), timeout=_NEWS_S)
        for edge in calls.values():
            tell(_LOG, f"{what}: went on without '{edge.name}', which does not answer", logging.WARNING)
        if wanted and not any(self.journal.judged(edge.name, what) for edge in wanted):
            why = next((edge.failures[-1] for edge in wanted if edge.failures), "none answers")
            raise ClusterError(f"no edge came to the end of '{what}': {why}")

    def _found(self, ref: ray.ObjectRef, edge: Edge) -> Record | None:
        """What an edge's call brought; None if it has to be made again.

        Raises:
            RaycloudError: the edge's own data or the recipe is at fault, which starting again would not mend.
        """
        try:
            found: Record = ray.get(ref)
            return found
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaycloudError) and not isinstance(cause, ClusterError | LinkError | TrainingError):
                raise cause from None
            edge.failures.append((str(cause) or type(cause).__name__).splitlines()[0])
            tell(_LOG, f"'{edge.name}' failed: {edge.failures[-1]}", logging.WARNING)
        except RayError as error:
            if edge.lost != edge.pid:  # while it starts again, Ray says so to every call
                edge.lost = edge.pid
                edge.failures.append(str(error).splitlines()[0])
                self.journal.add({"kind": "died", "edge": edge.name, "detail": edge.failures[-1]})
                tell(_LOG, f"'{edge.name}' died; it is started again, and the others go on", logging.WARNING)
            time.sleep(_POLL_S)
        return None

    def _listen(self, edge: Edge, progress: Bars) -> bool:
        """Write down what an edge has told since, and ask for more; whether its process answered. Never waits."""
        if edge.listening is not None and not ray.wait([edge.listening], timeout=0)[0]:
            return False
        news = self._told(edge)
        for record in news or ():
            if record["kind"] == "step":
                progress.move(f"{record['what']}: {edge.name}", record["step"] + 1, f"loss {record['loss']:.3f}")
        edge.listening = edge.actor.news.remote(edge.pid, edge.heard)
        return news is not None

    def _hear(self, edge: Edge) -> None:
        """All that an edge has told, now that it is done."""
        self._told(edge, timeout=_NEWS_S)
        edge.listening = edge.actor.news.remote(edge.pid, edge.heard)
        self._told(edge, timeout=_NEWS_S)

    def _told(self, edge: Edge, timeout: float = 0.0) -> list[Record] | None:
        """The answer to the last question for news; None if there is none."""
        ref, edge.listening = edge.listening, None
        if ref is None:
            return None
        try:
            pid, news = ray.get(ref, timeout=timeout)
        except (RayError, GetTimeoutError):
            return None
        edge.heard = len(news) + (edge.heard if pid == edge.pid else 0)
        edge.pid = pid
        new = [self.journal.add(record) for record in news]
        if any(new):
            edge.failures = []
        return list(news)

    def _finish(self) -> Result:
        cloud, edge = answered(self.cloud.group.remote(self.results.run_id), "cloud")
        shared: dict[str, Tensor] = {**cloud, **{f"edge/{name}": tensor for name, tensor in edge.items()}}
        write_atomically(self.results.path / "group.safetensors", save(shared))
        if self.recipe.rounds.parts == "averaged":
            learned = {**cloud, **edge}
            write_folder(self.results.path / "model", lambda folder: save_whole(self.recipe, learned, folder))
        names = [edge.name for edge in self.recipe.edges]
        summary = summarise(self.results.run_id, names, self.journal.records)
        # As it was given, not as the actors have it: the page says the same when it is rendered again.
        recipe = (self.results.path / RECIPE).read_text(encoding="utf-8")
        write_page(self.results.path, summary, self.journal.records, recipe)
        self.results.write_summary(summary)
        shutil.rmtree(self.results.path / "cloud", ignore_errors=True)
        print_summary(summary)
        console.print(f"results: {self.results.path}")
        return Result(self.results.path, summary)
