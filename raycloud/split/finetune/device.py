"""One edge of a group as a device of its own: recipe to result directory, the cloud and the others behind a link."""

from __future__ import annotations

from typing import Any

import torch

from raycloud.errors import RecipeError
from raycloud.report.console import bars, console, working
from raycloud.report.split_edges import print_summary, summarise, write_page
from raycloud.results import Mode, ResultDir, resumable
from raycloud.split.finetune.journal import Journal, Record
from raycloud.split.finetune.member import Connect, Member
from raycloud.split.finetune.recipe import SplitTuneRecipe


def run_edge(recipe: SplitTuneRecipe, connect: Connect, mode: Mode = "new") -> dict[str, Any]:
    """Train as one of the recipe's edges; leaves what the job on a cluster leaves, of this edge alone.

    That is ``recipe.yaml``, ``metrics.jsonl``, ``summary.json``, ``report.html`` and, in a folder of the edge's name,
    ``together.safetensors``: all that this edge has learned.

    Args:
        recipe: of all edges; its ``edge`` says which this one is.
        connect: to the cloud.
        mode: ``new``, ``resume`` or ``overwrite``.

    Returns:
        The summary, see :func:`raycloud.report.split_edges.summarise`.

    Raises:
        RaycloudError: model, data, cloud or result directory cannot be had, or training cannot go on.
    """
    if recipe.edge is None:
        names = ", ".join(edge.name for edge in recipe.edges)
        raise RecipeError(f"edge: null, and with --cloud a process is one of the edges; allowed: {names}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with resumable(recipe.output), ResultDir.open(recipe.output, recipe, mode) as results:
        name = recipe.edge
        folder = results.path / "edges" / name
        member = Member(recipe, name, folder, connect, run=results.run_id, group=recipe.group, notify=console.print)
        journal = Journal(results)
        for what in ("before", *(("alone",) if recipe.alone else ()), "together"):
            if not journal.judged(name, what):
                journal.add({"kind": "judged", "edge": name, "what": what, **_done(member, what, journal)})
                member.forget(what)
        summary = summarise(results.run_id, [name], journal.records)
        results.write_summary(summary)
        print_summary(summary)
        write_page(results.path, summary, journal.records, recipe.dump())
        console.print(f"results: {results.path}")
        return summary


def _done(member: Member, what: str, journal: Journal) -> Record:
    if what == "before":
        with working("examined before the first step"):
            return {**member.before(), **member.facts()}
    with bars(member.steps) as shown:

        def told(record: Record) -> None:
            journal.add({**record, "edge": member.name})
            if record["kind"] == "step":
                shown.move(what, record["step"] + 1, f"loss {record['loss']:.3f}")

        return member.alone(told) if what == "alone" else member.together(told)
