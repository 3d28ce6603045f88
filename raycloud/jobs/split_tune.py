"""Job of edges that fine-tune one model together: a cloud actor with the middle segment, and an actor for each edge.

The driver starts the actors, collects their records and repeats the calls of actors that died; the rounds run between
the edges and the cloud's actor. The driver sees neither texts nor labels.
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

from raycloud.cluster.actor_channel import CALLS_AT_ONCE
from raycloud.cluster.cloud_trainer import CloudTrainerActor, DeviceEdge
from raycloud.cluster.device_rounds import NAMESPACE, actor_name, job_name
from raycloud.cluster.edge_trainer import EdgeTrainerActor, Phase
from raycloud.cluster.run_log import RunLog
from raycloud.data.checks import check_eos
from raycloud.data.sources import load_rows
from raycloud.errors import ClusterError, ClusterSetupError, LinkError, RaycloudError, RecipeError, TrainingError
from raycloud.jobs.runner import Summary, actor_options, cluster_run, finished_summary, get_result
from raycloud.models.loading import check_model, load_tokenizer, resolve
from raycloud.models.weights import Weights
from raycloud.report.bos import format_bos
from raycloud.report.console import ProgressBars, console, print_and_log, progress_bars, timed
from raycloud.report.split_tune_edges import print_summary, summarise, write_page
from raycloud.results import RECIPE, Mode, ResultDir
from raycloud.rounds.versions import VERSIONS, VersionStore
from raycloud.split.finetune.assembly import check_lengths, plan_of
from raycloud.split.finetune.examples import bos_of
from raycloud.split.finetune.merge import save_group
from raycloud.split.finetune.metrics_log import MetricsLog, Record
from raycloud.split.finetune.recipe import LanguageRecipe, SplitTuneEdgeRecipe, SplitTuneRecipe, bundles

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5
_NEWS_S = 60.0
_ATTEMPTS = 3
"""Maximum number of failures or deaths of an edge in one phase without progress; then the run continues without it."""
_GRACE_S = 60.0
"""Seconds without news, added to the deadline of a round, after which unfinished edges are given up, once another edge
has finished."""


def run(recipe: SplitTuneRecipe, mode: Mode = "new") -> Summary:
    """Train all edges of a recipe and write a result directory.

    It holds ``recipe.yaml``, ``metrics.jsonl``, ``summary.json``, ``report.html`` and ``group.safetensors`` with the
    weights that all edges share, and ``versions/`` with those of every round. If these are the whole model, ``model/``
    is written too, for ``transformers``.
    Every edge writes its own weights to ``edges/<name>/together.safetensors`` on its own disk.

    Args:
        recipe: recipe of the split fine-tuning, with ``edges``.
        mode: ``new``, ``resume`` (both sides resume from their own disks) or ``overwrite``.

    Returns:
        The headline numbers, as in ``summary.json``.

    Raises:
        RaycloudError: an error that the user can fix.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    if (done := finished_summary(recipe, recipe.output, mode)) is not None:
        return done
    if recipe.edge is not None:
        raise RecipeError(f"edge={recipe.edge}, and all edges train on a cluster; allowed: null, or --cloud")
    where = resolve(recipe.model, console.print)
    config = check_model(where)
    tokenizer = load_tokenizer(where)
    if isinstance(recipe.task, LanguageRecipe):
        check_eos("model", recipe.model, tokenizer)
    console.print(format_bos(bos_of(recipe, tokenizer)))
    plan_of(recipe, config)
    check_lengths(recipe, config)
    if recipe.data.source.startswith("builtin:"):
        # Fetched before actors start; an edge's own files are read only by that edge.
        load_rows(recipe.data.source, "train", console.print)
    with cluster_run(recipe, recipe.output, mode, bundles(recipe)) as (results, log):
        return _SplitTuneJob(_with_absolute_paths(recipe), results, log).whole()


def _with_absolute_paths(recipe: SplitTuneRecipe) -> SplitTuneRecipe:
    """Return the recipe with absolute paths, since actors do not run in the driver's directory."""

    def absolute(source: str | None) -> str | None:
        path = Path(source).expanduser() if source else None
        return str(path.absolute()) if path and path.exists() else source

    data = recipe.data.model_copy(
        update={"source": absolute(recipe.data.source), "validation": absolute(recipe.data.validation)}
    )
    return recipe.model_copy(update={"model": absolute(recipe.model), "data": data})


@dataclass
class EdgeHandle:
    """Edge's actor as seen by the driver."""

    name: str
    actor: Any
    pid: int = 0
    """Process id of the actor; 0 until its first answer."""
    num_received: int = 0
    """Number of records received from that process."""
    listening: ray.ObjectRef | None = None
    lost: int | None = None
    """Id of the process whose death has been recorded; 0 if it died before its first answer."""
    failures: list[str] = field(default_factory=list)
    """Failures since the edge's last progress."""


class _SplitTuneJob:
    """State of one run of the job."""

    def __init__(self, recipe: SplitTuneRecipe, results: ResultDir, log: RunLog) -> None:
        self.recipe, self.results, self.log = recipe, results, log
        self.metrics_log = MetricsLog(results)

    def whole(self) -> Summary:
        """Run the job from the state of its result directory to the end."""
        with timed("cloud ready"):
            self._start_cloud()
        edges = self._start_edges()
        phases: list[Phase] = ["before", "alone", "together"] if self.recipe.alone else ["before", "together"]
        for what in phases:
            self._all(what, edges)
        return self._finish()

    def _start_cloud(self) -> None:
        recipe = self.recipe
        job = job_name(recipe.output)
        # Devices ask for the job by its name; other jobs of the cluster may look it up.
        self.name = actor_name(job) if recipe.devices else f"cloud-{uuid.uuid4().hex[:8]}"
        options = {"name": self.name, "namespace": NAMESPACE, "max_restarts": -1}
        options |= actor_options(recipe.cloud_placement, "cloud")
        options["max_concurrency"] = max(CALLS_AT_ONCE, 4 * len(recipe.edges) + 8 * len(recipe.devices))
        actor: Any = ray.remote(CloudTrainerActor)
        history = VersionStore(self.results.path / VERSIONS, recipe.rounds.keep_versions)
        try:
            self.cloud = actor.options(**options).remote(
                recipe, self.results.path / "cloud", history, self.results.run_id, self.log.of("cloud")
            )
        except ValueError:
            raise ClusterSetupError(
                f"a job '{job}' with devices runs already; choose another last part of output"
            ) from None
        get_result(self.cloud.ready.remote(), "cloud")
        if recipe.devices:
            console.print(f"devices take part by: raycloud edge learn --job {job} --cloud wss://…/v1/rounds")

    def _start_edges(self) -> list[EdgeHandle]:
        # The control concurrency group answers while the edge trains.
        actor: Any = ray.remote(concurrency_groups={"control": 1})(EdgeTrainerActor)  # type: ignore[call-overload]
        options = {"max_restarts": -1, **actor_options(self.recipe.edge_placement, "edge")}
        folder = self.results.path / "edges"

        def start(index: int, edge: SplitTuneEdgeRecipe) -> Any:
            if edge.device:
                return DeviceEdge(self.cloud, edge.name)
            log = self.log.of(f"edge {edge.name}")
            return actor.options(**options).remote(index, self.recipe, self.name, folder, self.results.run_id, log)

        return [EdgeHandle(edge.name, start(index, edge)) for index, edge in enumerate(self.recipe.edges)]

    def _all(self, what: Phase, edges: list[EdgeHandle]) -> None:
        """Run one phase on every edge.

        Once one edge has finished, the others are given up if none of them answers for the round's deadline plus
        ``_GRACE_S``.
        """
        wanted = [edge for edge in edges if not self.metrics_log.evaluated(edge.name, what)]
        calls: dict[ray.ObjectRef, EdgeHandle] = {edge.actor.do.remote(what): edge for edge in wanted}
        for edge in wanted:
            edge.failures = []
        forgetting: list[ray.ObjectRef] = []
        last_seen, done = time.monotonic(), len(wanted) < len(edges)
        patience = self.recipe.rounds.deadline_s + _GRACE_S
        with progress_bars(self.recipe.rounds.count * self.recipe.rounds.steps) as progress:
            while calls and not (done and time.monotonic() > last_seen + patience):
                ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_S)
                alive = [self._listen(edge, progress) for edge in calls.values()]
                if any(alive):
                    last_seen = time.monotonic()
                for ref in ready:
                    edge = calls.pop(ref)
                    if (found := self._found(ref, edge)) is not None:
                        self._drain_records(edge)
                        self.metrics_log.add({"kind": "evaluation", "edge": edge.name, "what": what, **found})
                        if not isinstance(edge.actor, DeviceEdge):  # a device forgets once its report is accepted
                            forgetting.append(edge.actor.forget.remote(what))
                        last_seen, done = time.monotonic(), True
                    elif len(edge.failures) < _ATTEMPTS:
                        calls[edge.actor.do.remote(what)] = edge
        if forgetting:
            ray.wait(forgetting, num_returns=len(forgetting), timeout=_NEWS_S)
        for edge in calls.values():
            print_and_log(_LOG, f"{what}: went on without '{edge.name}', which does not answer", logging.WARNING)
        if wanted and not any(self.metrics_log.evaluated(edge.name, what) for edge in wanted):
            why = next((edge.failures[-1] for edge in wanted if edge.failures), "none answers")
            raise ClusterError(f"no edge came to the end of '{what}': {why}")

    def _found(self, ref: ray.ObjectRef, edge: EdgeHandle) -> Record | None:
        """Return the result of an edge's call; None if the call must be repeated.

        Raises:
            RaycloudError: the edge's own data or the recipe is wrong, which a restart would not fix.
        """
        try:
            found: Record = ray.get(ref)
            return found
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaycloudError) and not isinstance(cause, ClusterError | LinkError | TrainingError):
                raise cause from None
            edge.failures.append((str(cause) or type(cause).__name__).splitlines()[0])
            print_and_log(_LOG, f"'{edge.name}' failed: {edge.failures[-1]}", logging.WARNING)
        except RayError as error:
            if edge.lost != edge.pid:  # while it restarts, every call fails with this error
                edge.lost = edge.pid
                edge.failures.append(str(error).splitlines()[0])
                self.metrics_log.add({"kind": "died", "edge": edge.name, "detail": edge.failures[-1]})
                print_and_log(_LOG, f"'{edge.name}' died; it is started again, and the others go on", logging.WARNING)
            time.sleep(_POLL_S)
        return None

    def _listen(self, edge: EdgeHandle, progress: ProgressBars) -> bool:
        """Store an edge's new records and request more; return True if its process answered. Never waits."""
        if edge.listening is not None and not ray.wait([edge.listening], timeout=0)[0]:
            return False
        news = self._receive_records(edge)
        for record in news or ():
            if record["kind"] == "step":
                progress.move(f"{record['what']}: {edge.name}", record["step"] + 1, f"loss {record['loss']:.3f}")
        edge.listening = edge.actor.news.remote(edge.pid, edge.num_received)
        return news is not None

    def _drain_records(self, edge: EdgeHandle) -> None:
        """Store all records of an edge that has finished."""
        self._receive_records(edge, timeout=_NEWS_S)
        edge.listening = edge.actor.news.remote(edge.pid, edge.num_received)
        self._receive_records(edge, timeout=_NEWS_S)

    def _receive_records(self, edge: EdgeHandle, timeout: float = 0.0) -> list[Record] | None:
        """Return the records of the last request; None if there was no request or no answer."""
        ref, edge.listening = edge.listening, None
        if ref is None:
            return None
        try:
            pid, news = ray.get(ref, timeout=timeout)
        except (RayError, GetTimeoutError):
            return None
        edge.num_received = len(news) + (edge.num_received if pid == edge.pid else 0)
        edge.pid = pid
        new = [self.metrics_log.add(record) for record in news]
        if any(new):
            edge.failures = []
        return list(news)

    def _finish(self) -> Summary:
        shared: Weights = get_result(self.cloud.group.remote(self.results.run_id), "cloud")
        get_result(self.cloud.finish.remote(), "cloud")
        save_group(self.recipe, shared, self.results.path)
        names = [edge.name for edge in self.recipe.edges]
        summary = summarise(self.results.run_id, names, self.metrics_log.records)
        # The recipe as given, not with the actors' absolute paths, so that a page rendered again is the same.
        recipe = (self.results.path / RECIPE).read_text(encoding="utf-8")
        write_page(self.results.path, summary, self.metrics_log.records, recipe)
        self.results.write_summary(summary)
        shutil.rmtree(self.results.path / "cloud", ignore_errors=True)
        print_summary(summary)
        console.print(f"results: {self.results.path}")
        return summary
