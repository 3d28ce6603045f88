"""Job of block retraining: a cloud actor with the model and its versions, and an actor for each edge.

The driver opens a round for each window, has every edge serve it, passes on the updates of those that retrained, and
closes the round. It sees neither texts nor labels of edges that have data of their own.
"""

from __future__ import annotations

import logging
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raycloud.cluster.actor_channel import CALLS_AT_ONCE
from raycloud.cluster.cloud_model import CloudModel, DeviceNode
from raycloud.cluster.device_rounds import NAMESPACE, actor_name, job_name
from raycloud.cluster.edge_node import EdgeNode, NodeWindow
from raycloud.cluster.run_log import RunLog
from raycloud.data.sources import path_of
from raycloud.errors import ClusterError, ClusterSetupError, LinkError, RaycloudError, RecipeError, TrainingError
from raycloud.jobs.runner import Summary, actor_options, cluster_run, finished_summary, get_result
from raycloud.models.chain import block_list_of
from raycloud.report.console import console, print_and_log, timed
from raycloud.report.retrain import line_of, print_summary, summarise, write_page
from raycloud.results import RECIPE, Mode, ResultDir
from raycloud.retrain.cloud_run import CloudFacts
from raycloud.retrain.domain_images import DIGITS
from raycloud.retrain.recipe import RetrainEdgeRecipe, RetrainRecipe, bundles
from raycloud.retrain.source import new_model, source_parts
from raycloud.rounds.machine import ClosedRound

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5
_NEWS_S = 5.0
_GRACE_S = 60.0
"""Seconds beyond a round's deadline in which an edge may take the new version."""


def run(recipe: RetrainRecipe, mode: Mode = "new") -> Summary:
    """Run block retraining and write its result directory.

    It holds ``recipe.yaml``, ``metrics.jsonl``, ``summary.json``, ``report.html``, ``versions/`` with the history of
    the cloud's model, ``domains/`` with the changes that fitted each domain, and ``model/``, which ``transformers``
    loads.

    Args:
        recipe: recipe of the retraining.
        mode: ``new``, ``resume`` (from the last complete window) or ``overwrite``.

    Returns:
        The headline numbers, as in ``summary.json``.

    Raises:
        RaycloudError: an error that the user can fix, raised before anything is written where possible.
        Interrupted: Ctrl-C or ``ray job stop``; the directory can be resumed.
    """
    if (done := finished_summary(recipe, recipe.output, mode)) is not None:
        return done
    check(recipe)
    with cluster_run(recipe, recipe.output, mode, bundles(recipe)) as (results, log):
        return _RetrainJob(_with_absolute_paths(recipe), results, log).whole()


def check(recipe: RetrainRecipe) -> None:
    """Fetch the built-in model and data of a recipe and check it; needs no cluster and writes no results.

    Raises:
        RaycloudError: the recipe, its model or its data are invalid.
    """
    parts = source_parts(recipe, notify=console.print)
    with torch.device("meta"):
        _ = block_list_of(new_model(parts))
    source = recipe.data.source_domain
    for part in ("clean", "test", *(("source",) if recipe.source.steps else ())):
        parts.data.samples(source, part)
    edges = [edge.windows for edge in recipe.edges if edge.source is None and not edge.device]
    for windows in (*edges, recipe.prior.domains):
        for domain in sorted(set(windows)):
            parts.data.samples(domain, "test")
            found = len(parts.data.samples(domain, "window"))
            if found < recipe.samples:
                raise RecipeError(
                    f"samples={recipe.samples}, and domain '{domain}' has {found} for windows; allowed: at most these"
                )


def _with_absolute_paths(recipe: RetrainRecipe) -> RetrainRecipe:
    """Return the recipe with absolute paths, since actors do not run in the driver's directory."""

    def absolute(source: str | None) -> str | None:
        if source is None or source == DIGITS:
            return source
        path = Path(source).expanduser()
        found = path if path.exists() else path_of(source)
        return source if found is None else str(found.absolute())

    model = absolute(recipe.model) if isinstance(recipe.model, str) else recipe.model
    return recipe.model_copy(
        update={
            "model": model,
            "tokenizer": absolute(recipe.tokenizer),
            "data": recipe.data.model_copy(update={"source": absolute(recipe.data.source)}),
        }
    )


@dataclass
class _EdgeHandle:
    """Edge's actor as seen by the driver."""

    name: str
    actor: Any
    windows: tuple[str, ...]
    died: bool = False
    """True from the death of its process until the restarted one answers."""


@dataclass
class _Window:
    """Results of a round so far."""

    number: int
    records: list[dict[str, Any]] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)
    """Why edges have no result."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why updates were refused."""


class _RetrainJob:
    """State of one run of the job."""

    def __init__(self, recipe: RetrainRecipe, results: ResultDir, log: RunLog) -> None:
        self.recipe, self.results, self.log = recipe, results, log

    def whole(self) -> Summary:
        """Run the job from the state of its result directory to the end."""
        with timed("cloud ready"):
            facts = self._start_cloud()
        console.print(f"{facts.parameters / 1e6:.1f} M parameters, {len(facts.blocks)} blocks")
        edges = self._start_edges()
        complete = {record["window"] for record in self.results.metrics() if record["kind"] == "round"}
        first = max(len(complete), facts.rounds)
        self.results.filter_metrics(lambda record: record["kind"] == "start" or record["window"] < first)
        if not first:
            self.results.log_metrics({"kind": "start", "source_error": facts.source_error, "blocks": len(facts.blocks)})
        for number in range(first, self.recipe.windows):
            self._window(number, [edge for edge in edges if number < len(edge.windows)])
        return self._finish()

    def _start_cloud(self) -> CloudFacts:
        recipe, job = self.recipe, job_name(self.recipe.output)
        # Devices ask for the job by its name; other jobs of the cluster may look it up.
        self.name = actor_name(job) if recipe.devices else f"retrain-{uuid.uuid4().hex[:8]}"
        options = {"name": self.name, "namespace": NAMESPACE, "max_restarts": -1}
        options |= actor_options(recipe.cloud_placement, "cloud")
        options["max_concurrency"] = max(CALLS_AT_ONCE, 4 * len(recipe.edges) + 8 * len(recipe.devices))
        actor: Any = ray.remote(CloudModel)
        try:
            self.cloud = actor.options(**options).remote(
                recipe, self.results.path, self.results.run_id, self.log.of("cloud")
            )
        except ValueError:
            raise ClusterSetupError(
                f"a job '{job}' with devices runs already; choose another last part of output"
            ) from None
        preparing, told = self.cloud.prepare.remote(), ""
        while not ray.wait([preparing], timeout=_NEWS_S)[0]:
            if (news := get_result(self.cloud.news.remote(), "cloud")) != told:
                console.print(f"  {news}")
                told = news
        facts: CloudFacts = get_result(preparing, "cloud")
        if recipe.devices:
            console.print(f"devices take part by: raycloud edge learn --job {job} --cloud wss://…/v1/rounds")
        return facts

    def _start_edges(self) -> list[_EdgeHandle]:
        actor: Any = ray.remote(EdgeNode)
        options = {"max_restarts": -1, **actor_options(self.recipe.edge_placement, "edge")}

        def start(index: int, edge: RetrainEdgeRecipe) -> Any:
            if edge.device:
                return DeviceNode(self.cloud, edge.name)
            log = self.log.of(f"edge {edge.name}")
            return actor.options(**options).remote(index, self.recipe, self.name, NAMESPACE, log)

        return [
            _EdgeHandle(edge.name, start(index, edge), tuple(edge.windows))
            for index, edge in enumerate(self.recipe.edges)
        ]

    def _window(self, number: int, edges: list[_EdgeHandle]) -> None:
        """Run one round: a window of every edge, the merge of their updates, and the new version."""
        begun = time.monotonic()
        get_result(self.cloud.open_round.remote(number + 1, [edge.name for edge in edges]), "cloud")
        calls = {self._call(edge, number): edge for edge in edges}
        done, closed = _Window(number), None
        while closed is None:
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=_POLL_S) if calls else ([], [])
            for ref in ready:
                edge = calls.pop(ref)
                if edge.died:
                    self._meet(ref, edge)
                    calls[self._call(edge, number)] = edge
                else:
                    self._take(ref, edge, done)
            closed = get_result(self.cloud.close_round.remote(), "cloud")
        for edge in calls.values():
            done.missed[edge.name] = "late"
            print_and_log(_LOG, f"window {number + 1}: went on without '{edge.name}', which is late", logging.WARNING)
        self._record(done, *closed, seconds=time.monotonic() - begun, edges=edges)

    @staticmethod
    def _call(edge: _EdgeHandle, number: int) -> ray.ObjectRef:
        """Have an edge serve a window, or first ask whether it is there again."""
        return edge.actor.ping.remote() if edge.died else edge.actor.window.remote(number)

    @staticmethod
    def _meet(ref: ray.ObjectRef, edge: _EdgeHandle) -> None:
        """Take the answer of an edge that had died."""
        try:
            ray.get(ref)
            edge.died = False
        except RayError:
            time.sleep(_POLL_S)

    def _take(self, ref: ray.ObjectRef, edge: _EdgeHandle, done: _Window) -> None:
        """Take the result of an edge's window, and pass its update on."""
        try:
            found: NodeWindow = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaycloudError) and not isinstance(cause, ClusterError | LinkError | TrainingError):
                raise cause from None
            self._miss(edge, done, "failed", (str(cause) or type(cause).__name__).splitlines()[0])
            return
        except RayError as error:
            edge.died = True
            self._miss(edge, done, "died", str(error).splitlines()[0])
            return
        done.records.append(found.record)
        console.print(line_of(found.record, self.recipe.metric))
        if found.update is None or found.signature is None:
            get_result(self.cloud.remove.remote(edge.name), "cloud")
            return
        update = ray.put(found.update)
        refused = get_result(self.cloud.accept.remote(edge.name, done.number + 1, update, found.signature), "cloud")
        if refused is not None:
            done.refused[edge.name] = refused.detail
            get_result(self.cloud.remove.remote(edge.name), "cloud")
            print_and_log(_LOG, f"the update of '{edge.name}' is refused: {refused.detail}", logging.WARNING)

    def _miss(self, edge: _EdgeHandle, done: _Window, why: str, detail: str) -> None:
        done.missed[edge.name] = why
        print_and_log(_LOG, f"'{edge.name}' {why}: {detail}; the others go on", logging.WARNING)
        get_result(self.cloud.remove.remote(edge.name), "cloud")

    def _record(
        self, done: _Window, closed: ClosedRound, source_error: float, *, seconds: float, edges: list[_EdgeHandle]
    ) -> None:
        """Have the edges take the new version, and write the records of the round."""
        present = [edge for edge in edges if edge.name not in done.missed]
        calls = {edge.actor.adopt.remote(edge.windows[done.number]): edge for edge in present}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_GRACE_S) if calls else ([], [])
        adopted = {}
        for ref in ready:
            try:
                found = ray.get(ref, timeout=0)
            except (RayError, GetTimeoutError):
                continue  # the next window tells
            if found is not None:
                adopted[calls[ref].name] = {"version": found[0], "test_error": found[1]}
        for record in sorted(done.records, key=lambda one: one["edge"]):
            self.results.log_metrics(record)
        self.results.log_metrics(
            {
                "kind": "round",
                "window": done.number,
                "result": closed.result,
                "members": list(closed.members),
                "missed": done.missed,
                "refused": done.refused,
                "source_error": source_error,
                "adopted": adopted,
                "seconds": seconds,
            }
        )

    def _finish(self) -> Summary:
        with timed("model written"):
            get_result(self.cloud.save.remote(), "cloud")
            get_result(self.cloud.finish.remote(), "cloud")
        records = self.results.metrics()
        summary = summarise(self.results.run_id, self.recipe.metric, records)
        recipe = (self.results.path / RECIPE).read_text(encoding="utf-8")
        write_page(self.results.path, summary, records, recipe)
        self.results.write_summary(summary)
        print_summary(summary)
        console.print(f"results: {self.results.path}")
        return summary
