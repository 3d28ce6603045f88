"""Run of one edge of a group as a separate device: recipe to result directory, with the cloud over a link."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from raycloud.errors import RecipeError
from raycloud.report.console import console, print_and_log, progress_bars, timed
from raycloud.report.split_tune_edges import print_summary, summarise, write_page
from raycloud.results import Mode, ResultDir, resumable
from raycloud.split.finetune.group_member import MemberRun
from raycloud.split.finetune.metrics_log import MetricsLog, Record
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.sides import Connect

_LOG = logging.getLogger(__name__)


def run_member(recipe: SplitTuneRecipe, connect: Connect, mode: Mode = "new") -> dict[str, Any]:
    """Train as one of the recipe's edges and write the same results as the job on a cluster, for this edge alone.

    The results are ``recipe.yaml``, ``metrics.jsonl``, ``summary.json``, ``report.html`` and, in a folder of the edge's
    name, ``together.safetensors`` with the weights this edge has trained.

    Args:
        recipe: recipe of all edges; its ``edge`` names this one.
        connect: opens a channel to the cloud.
        mode: ``new``, ``resume`` or ``overwrite``.

    Returns:
        Summary, see :func:`raycloud.report.split_tune_edges.summarise`.

    Raises:
        RaycloudError: model, data, cloud or result directory is unavailable, or training cannot continue.
    """
    if recipe.edge is None:
        names = ", ".join(edge.name for edge in recipe.edges)
        raise RecipeError(f"edge: null, and with --cloud a process is one of the edges; allowed: {names}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with resumable(recipe.output), ResultDir.open(recipe.output, recipe, mode) as results:
        name = recipe.edge
        folder = results.path / "edges" / name
        member = MemberRun(
            recipe, name, folder, connect, run=results.run_id, group=recipe.group, notify=partial(print_and_log, _LOG)
        )
        metrics_log = MetricsLog(results)
        for what in ("before", *(("alone",) if recipe.alone else ()), "together"):
            if not metrics_log.evaluated(name, what):
                metrics_log.add(
                    {"kind": "evaluation", "edge": name, "what": what, **_run_phase(member, what, metrics_log)}
                )
                member.forget(what)
        summary = summarise(results.run_id, [name], metrics_log.records)
        results.write_summary(summary)
        print_summary(summary)
        write_page(results.path, summary, metrics_log.records, recipe.dump())
        console.print(f"results: {results.path}")
        return summary


def _run_phase(member: MemberRun, what: str, metrics_log: MetricsLog) -> Record:
    if what == "before":
        with timed("evaluated before the first step"):
            return {**member.before(), **member.facts()}
    with progress_bars(member.steps) as shown:

        def on_record(record: Record) -> None:
            metrics_log.add({**record, "edge": member.name})
            if record["kind"] == "step":
                shown.move(what, record["step"] + 1, f"loss {record['loss']:.3f}")

        return member.alone(on_record) if what == "alone" else member.together(on_record)
