"""Check whether a cluster can hold a job. Ray waits forever, without a message, for resources that no node has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state

from raycloud.recipe import Bundle

_START = "ray start --address=… --resources='{{\"{}\": 1}}'"


@dataclass(frozen=True)
class Capacity:
    """Resources of a cluster, including the nodes that its autoscaler may start.

    Args:
        nodes: resources of every node, and of one node of every type that the autoscaler may start.
        totals: sum over all nodes, or the autoscaler's maximum where that is larger.
        grows: whether an autoscaler may start nodes.
    """

    nodes: tuple[Bundle, ...]
    totals: Bundle
    grows: bool = False


@dataclass(frozen=True)
class Shortfall:
    """Reason why a job would wait forever (``what``) and its remedy (``fix``), each in one line."""

    what: str
    fix: str


def capacity() -> Capacity:
    """Return the capacity of the cluster that this process is connected to."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    totals = total_resources(nodes)
    # `ray up` and KubeRay store the limits of the autoscaler in this record; it does not exist without an autoscaler.
    config = state.get_cluster_config()
    types = [group for group in config.node_group_configs if group.max_count] if config is not None else []
    for name, most in (state.get_max_resources_from_cluster_config() or {}).items() if types else ():
        totals[name] = max(totals.get(name, 0.0), float(most))
    return Capacity((*nodes, *(dict(group.resources) for group in types)), totals, bool(types))


def total_resources(bundles: Sequence[Mapping[str, float]]) -> Bundle:
    """Return the sum of the bundles, by resource name."""
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in sorted(names)}


def shortfall(needs: Mapping[str, float], actors: Sequence[Bundle], there: Capacity) -> Shortfall | None:
    """Return the reason why a job cannot run; None if it can.

    Args:
        needs: total resources of the job.
        actors: resources of each of its actors, where known.
        there: capacity of the cluster.
    """
    for name, amount in needs.items():
        if there.totals.get(name, 0.0) < amount:
            return Shortfall(
                f"the cluster has {there.totals.get(name, 0.0):g} of the resource '{name}', this job needs {amount:g}",
                f"add nodes with {name}s" if name in ("CPU", "GPU") else f"start nodes with: {_START.format(name)}",
            )
    for actor in actors:
        if not any(_fits(actor, node) for node in there.nodes):
            return Shortfall(
                f"no node has {format_bundle(actor)} together, which one actor of this job needs",
                "start a node that has them, or ask for less in the recipe's placement",
            )
    return None


def unplaceable_actors(actors: Sequence[Bundle], nodes: Sequence[Bundle]) -> int:
    """Count the actors that do not fit when the largest are placed first, each on the first node with enough left.

    Ray may place a few more or fewer, so a result above 0 is an indication, not a proof.
    """
    left = [dict(node) for node in nodes]
    homeless = 0
    for actor in sorted(actors, key=lambda actor: -sum(actor.values())):
        node = next((node for node in left if _fits(actor, node)), None)
        if node is None:
            homeless += 1
            continue
        for name, amount in actor.items():
            node[name] -= amount
    return homeless


def _fits(actor: Bundle, node: Mapping[str, float]) -> bool:
    # Ray counts in steps of 1e-4; sums of fractions are not exact.
    return all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in actor.items())


def format_bundle(bundle: Mapping[str, float]) -> str:
    """Format resources, such as ``0.25 CPU and 1 edge``."""
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())
