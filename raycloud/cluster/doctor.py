"""What may go wrong with a job on a cluster, found before it does: small checks of one snapshot.

Each check is a function of the snapshot and returns findings; every finding that is not fine comes with its mend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raycloud.cluster.bundles import Bundle, bundles_of
from raycloud.cluster.capacity import crowded, shortfall, spelled, summed
from raycloud.cluster.snapshot import Snapshot, Unreachable, gather
from raycloud.fetch import cache_dir
from raycloud.recipe import Recipe

Level = Literal["fine", "warning", "error"]

_PINS = "pip install --constraint constraints.txt 'raycloud[cluster]'"
_DASHBOARD = "start the head with its dashboard: ray start --head --include-dashboard=true"
_TOKEN = "ray get-auth-token --generate, and RAY_AUTH_MODE=token before every ray start"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: str
    level: Level
    what: str
    mend: str = ""


def examine(address: str | None = None, recipe: Recipe | None = None) -> list[Finding]:
    """Join a cluster, look around, and say what was found.

    Args:
        address: ``host:port``; None for what a job would join.
        recipe: of the job that is to run, whose actors and output are then looked at, too.
    """
    folders = {"cache": cache_dir().absolute()}
    if output := getattr(recipe, "output", None):
        folders["output"] = Path(output).expanduser().absolute()
    try:
        seen = gather(address, folders)
    except Unreachable as error:
        return [Finding("address", "error", str(error), error.mend)]
    return diagnose(seen, bundles_of(recipe) if recipe is not None else [])


def diagnose(seen: Snapshot, actors: Sequence[Bundle]) -> list[Finding]:
    """The findings of all checks, in the order in which to mend them."""
    found = [finding for check in CHECKS for finding in check(seen)]
    return found + _capacity(seen, actors)


def _address(seen: Snapshot) -> list[Finding]:
    if seen.address is None:
        return [Finding("address", "fine", "no cluster here: a job starts a Ray of its own on this machine")]
    return [Finding("address", "fine", f"{seen.address}: {_counted(len(seen.nodes), 'node')}")]


def _versions(seen: Snapshot) -> list[Finding]:
    found = []
    for node in seen.nodes:
        if node.versions is None:
            mend = "look at it with: ray list nodes; its ports must be open to the driver's node"
            found.append(Finding("versions", "error", f"node {node.name} does not answer", mend))
            continue
        for name, here in seen.here.items():
            there = node.versions.get(name)
            if there != here:
                # What is pickled must be read by what wrote it; other releases only compute a little differently.
                level: Level = "error" if there is None or name in ("python", "ray", "raycloud") else "warning"
                what = f"{name} is {there or 'missing'} on node {node.name}, {here or 'missing'} here"
                found.append(Finding("versions", level, what, f"on that node: {_PINS}"))
    if not found:
        found = [Finding("versions", "fine", ", ".join(f"{name} {version}" for name, version in seen.here.items()))]
    return found


def _token(seen: Snapshot) -> list[Finding]:
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


def _ports(seen: Snapshot) -> list[Finding]:
    if seen.address is None:
        return []
    if seen.job_server is None:
        return [Finding("job server", "warning", "none: ray job submit will not work", _DASHBOARD)]
    if not seen.job_server.reachable:
        what = f"{seen.job_server.url} cannot be reached from here: ray job submit will not work"
        mend = "a tunnel (ssh -L 8265:localhost:8265 HEAD), or on the head: ray start --dashboard-host=…"
        return [Finding("job server", "warning", what, mend)]
    return [Finding("job server", "fine", seen.job_server.url)]


def _tiers(seen: Snapshot) -> list[Finding]:
    if seen.address is None:
        return []
    found = []
    for tier in ("cloud", "edge"):
        offering = [node for node in seen.nodes if node.resources.get(tier)]
        if not offering and not seen.capacity.totals.get(tier):
            mend = f"ray start --address=… --resources='{{\"{tier}\": 1}}' --labels=tier={tier}"
            found.append(Finding("tiers", "warning", f"no node offers the resource '{tier}'", mend))
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


def _storage(seen: Snapshot) -> list[Finding]:
    found = []
    for name, folder in seen.folders.items():
        if name in seen.unwritable:
            found.append(Finding("storage", "error", f"{name} {folder} may not be written", "name another folder"))
            continue
        blind = [node.name for node in seen.nodes if name in node.unseen]
        if blind:
            what = f"{name} {folder} is not the same folder on {', '.join(blind)}"
            # Built-in models can be fetched on every node; results would be scattered.
            level: Level = "warning" if name == "cache" else "error"
            option = "RAYCLOUD_CACHE" if name == "cache" else "output"
            found.append(Finding("storage", level, what, f"mount one file system on all nodes and name it in {option}"))
        elif len(seen.nodes) > 1:
            found.append(Finding("storage", "fine", f"{name} {folder} is shared by all nodes"))
        else:
            found.append(Finding("storage", "fine", f"{name} {folder} may be written"))
    return found


def _capacity(seen: Snapshot, actors: Sequence[Bundle]) -> list[Finding]:
    if not actors:
        return []
    needs = summed(actors)
    short = shortfall(needs, actors, seen.capacity)
    if short is not None:
        return [Finding("capacity", "error", short.what, short.mend)]
    homeless = 0 if seen.capacity.grows else crowded(actors, [node.resources for node in seen.nodes])
    if homeless:
        what = f"{homeless} of the job's {len(actors)} actors find no place beside the others"
        return [Finding("capacity", "error", what, "add nodes, or ask for less in the recipe's placement")]
    busy = {name: amount for name, amount in needs.items() if seen.free.get(name, 0.0) < amount}
    if busy:
        what = f"in use right now: {spelled({name: seen.free.get(name, 0.0) for name in busy})} free"
        mend = f"the job waits until others leave it {spelled(busy)}"
        if seen.capacity.grows:
            mend += ", or the autoscaler has started nodes"
        return [Finding("capacity", "warning", what, mend)]
    return [Finding("capacity", "fine", f"there is room for {_counted(len(actors), 'actor')}: {spelled(needs)}")]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


CHECKS: tuple[Callable[[Snapshot], list[Finding]], ...] = (_address, _versions, _token, _ports, _tiers, _storage)
