"""Checks that find problems of a job on a cluster before it runs.

Each check is a function of one snapshot and returns findings. Every finding that is not fine has a remedy (``fix``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raycloud.cluster.capacity import format_bundle, shortfall, total_resources, unplaceable_actors
from raycloud.cluster.diagnostic_snapshot import DiagnosticSnapshot, Unreachable, take_snapshot
from raycloud.fetch import cache_dir
from raycloud.recipe import Bundle

Level = Literal["fine", "warning", "error"]

_PINS = "pip install --constraint constraints.txt 'raycloud[cluster]'"
_DASHBOARD = "start the head with its dashboard: ray start --head --include-dashboard=true"
_TOKEN = "ray get-auth-token --generate, and RAY_AUTH_MODE=token before every ray start"


@dataclass(frozen=True)
class Finding:
    """Result of one check: one line of the doctor's output."""

    check: str
    level: Level
    what: str
    fix: str = ""


def run_checks(address: str | None = None, output: str | None = None, actors: Sequence[Bundle] = ()) -> list[Finding]:
    """Connect to a cluster, inspect it and return the findings.

    Args:
        address: ``host:port``; None for the cluster that a job would use.
        output: result directory of the job to run, which is then checked as well.
        actors: resources of each actor of that job; checked if there are any.
    """
    folders = {"cache": cache_dir().absolute()}
    if output:
        folders["output"] = Path(output).expanduser().absolute()
    try:
        seen = take_snapshot(address, folders)
    except Unreachable as error:
        return [Finding("address", "error", str(error), error.fix)]
    return diagnose(seen, actors)


def diagnose(seen: DiagnosticSnapshot, actors: Sequence[Bundle]) -> list[Finding]:
    """Return the findings of all checks, in the order in which to fix them."""
    found = [finding for check in CHECKS for finding in check(seen)]
    return found + _capacity(seen, actors)


def _address(seen: DiagnosticSnapshot) -> list[Finding]:
    if seen.address is None:
        return [Finding("address", "fine", "no cluster here: a job starts a Ray of its own on this machine")]
    return [Finding("address", "fine", f"{seen.address}: {_counted(len(seen.nodes), 'node')}")]


def _versions(seen: DiagnosticSnapshot) -> list[Finding]:
    found = []
    for node in seen.nodes:
        if node.versions is None:
            fix = "look at it with: ray list nodes; its ports must be open to the driver's node"
            found.append(Finding("versions", "error", f"node {node.name} does not answer", fix))
            continue
        for name, here in seen.here.items():
            there = node.versions.get(name)
            if there != here:
                # Pickles need equal versions on both sides; other releases only give slightly different numbers.
                level: Level = "error" if there is None or name in ("python", "ray", "raycloud") else "warning"
                what = f"{name} is {there or 'missing'} on node {node.name}, {here or 'missing'} here"
                found.append(Finding("versions", level, what, f"on that node: {_PINS}"))
    if not found:
        found = [Finding("versions", "fine", ", ".join(f"{name} {version}" for name, version in seen.here.items()))]
    return found


def _token(seen: DiagnosticSnapshot) -> list[Finding]:
    found = []
    if seen.job_server is not None and seen.job_server.guarded is not None:
        if seen.job_server.guarded:
            found.append(Finding("token", "fine", "the cluster asks for its token"))
        else:
            what = f"the cluster asks for no token: whoever reaches {seen.job_server.url} can run programs on it"
            found.append(Finding("token", "warning", what, _TOKEN))
    if seen.open_token is not None:
        what = f"everyone on this machine can read {seen.open_token}"
        found.append(Finding("token", "warning", what, f"chmod 600 {seen.open_token}"))
    return found


def _ports(seen: DiagnosticSnapshot) -> list[Finding]:
    if seen.address is None:
        return []
    if seen.job_server is None:
        return [Finding("job server", "warning", "none: ray job submit will not work", _DASHBOARD)]
    if not seen.job_server.reachable:
        what = f"{seen.job_server.url} cannot be reached from here: ray job submit will not work"
        fix = "a tunnel (ssh -L 8265:localhost:8265 HEAD), or on the head: ray start --dashboard-host=…"
        return [Finding("job server", "warning", what, fix)]
    return [Finding("job server", "fine", seen.job_server.url)]


def _tiers(seen: DiagnosticSnapshot) -> list[Finding]:
    if seen.address is None:
        return []
    found = []
    for tier in ("cloud", "edge"):
        offering = [node for node in seen.nodes if node.resources.get(tier)]
        if not offering and not seen.capacity.totals.get(tier):
            fix = f"ray start --address=… --resources='{{\"{tier}\": 1}}' --labels=tier={tier}"
            found.append(Finding("tiers", "warning", f"no node offers the resource '{tier}'", fix))
            continue
        count = sum(node.resources[tier] for node in offering)
        found.append(Finding("tiers", "fine", f"{count:g} {tier} on {_counted(len(offering), 'node')}"))
        if len(seen.nodes) > 1:
            found += [
                Finding(
                    "tiers",
                    "warning",
                    f"node {node.name} offers '{tier}', its label tier is {node.labels.get('tier') or 'missing'}",
                    f"start it with: --labels=tier={tier}",
                )
                for node in offering
                if node.labels.get("tier") != tier and not _offers_both(node.resources)
            ]
    return found


def _offers_both(resources: Mapping[str, float]) -> bool:
    return bool(resources.get("cloud") and resources.get("edge"))


def _storage(seen: DiagnosticSnapshot) -> list[Finding]:
    found = []
    for name, folder in seen.folders.items():
        if name in seen.unwritable:
            found.append(Finding("storage", "error", f"{name} {folder} may not be written", "name another folder"))
            continue
        blind = [node.name for node in seen.nodes if name in node.unseen]
        if blind:
            what = f"{name} {folder} is not the same folder on {', '.join(blind)}"
            # Built-in models can be fetched on every node, so this is a warning; results would be scattered.
            level: Level = "warning" if name == "cache" else "error"
            option = "RAYCLOUD_CACHE" if name == "cache" else "output"
            found.append(Finding("storage", level, what, f"mount one file system on all nodes and name it in {option}"))
        elif len(seen.nodes) > 1:
            found.append(Finding("storage", "fine", f"{name} {folder} is shared by all nodes"))
        else:
            found.append(Finding("storage", "fine", f"{name} {folder} may be written"))
    return found


def _capacity(seen: DiagnosticSnapshot, actors: Sequence[Bundle]) -> list[Finding]:
    if not actors:
        return []
    needs = total_resources(actors)
    short = shortfall(needs, actors, seen.capacity)
    if short is not None:
        return [Finding("capacity", "error", short.what, short.fix)]
    homeless = 0 if seen.capacity.grows else unplaceable_actors(actors, [node.resources for node in seen.nodes])
    if homeless:
        what = f"{homeless} of the job's {len(actors)} actors find no place beside the others"
        return [Finding("capacity", "error", what, "add nodes, or ask for less in the recipe's placement")]
    busy = {name: amount for name, amount in needs.items() if seen.free.get(name, 0.0) < amount}
    if busy:
        what = f"in use right now: {format_bundle({name: seen.free.get(name, 0.0) for name in busy})} free"
        fix = f"the job waits until others leave it {format_bundle(busy)}"
        if seen.capacity.grows:
            fix += ", or the autoscaler has started nodes"
        return [Finding("capacity", "warning", what, fix)]
    return [Finding("capacity", "fine", f"there is room for {_counted(len(actors), 'actor')}: {format_bundle(needs)}")]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


CHECKS: tuple[Callable[[DiagnosticSnapshot], list[Finding]], ...] = (
    _address,
    _versions,
    _token,
    _ports,
    _tiers,
    _storage,
)
