"""``raycloud split plan``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raycloud.cli.options import AsJson, print_json
from raycloud.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from raycloud.split.cost import PlanCost
    from raycloud.split.device_profile import DeviceProfile


def plan(
    model: Annotated[
        str, typer.Option(help="A directory, GGUF file, hub id or builtin: name; its config.json is enough.")
    ],
    profile: Annotated[
        Path | None, typer.Option(help="YAML file of edge, cloud and network; without it values are assumed.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth of each direction, such as 10Mbit, in place of the profile's.")
    ] = None,
    rtt: Annotated[
        str | None, typer.Option(help="Delay of a round trip, such as 50ms, in place of the profile's.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this device and take it as the edge.")] = False,
    codec: Annotated[
        str, typer.Option(help="Codec of hidden states: float32, float16, bfloat16, int8 or int4.")
    ] = "int8",
    context: Annotated[int, typer.Option(min=1, help="Tokens whose keys and values are kept.")] = 2048,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Recommend where to cut a model: memory of both sides, bytes on the link and time of a token for pairs of cuts."""
    from raycloud.link.codecs.sizes import widest_codec
    from raycloud.link.network import parse_bandwidth, parse_delay
    from raycloud.models.verdict import structure_of
    from raycloud.report.console import console, timed
    from raycloud.report.table import print_table
    from raycloud.split.cost import Workload, check_fit, notable_plans, plan_costs, recommend
    from raycloud.split.device_profile import read_profile
    from raycloud.split.model_sizes import read_configuration, sizes_of

    given = read_profile(profile)
    network = {
        "mbit_s": _parsed("--bandwidth", parse_bandwidth, bandwidth),
        "rtt_ms": _parsed("--rtt", parse_delay, rtt),
    }
    changed = {name: value for name, value in network.items() if value is not None}
    given = given.model_copy(update={"network": given.network.model_copy(update=changed)})
    try:
        widest_codec(codec, 64)
    except ValueError as error:
        raise RecipeError(f"--codec: {error}") from None
    config = read_configuration(model, console.print)
    try:
        structure = structure_of(config)
        sizes = sizes_of(config, causal=structure.causal)
    except ModelError as error:
        print_json(as_json, {"model": model, "path": "refused", "reason": str(error)})
        raise
    if measure:
        from raycloud.split.device_measure import measured_profile

        with timed("this device measured"):
            given = measured_profile(given, keep_limit=profile is not None)
    work = Workload(widest_codec(codec, sizes.width), context, prompt)
    costs = plan_costs(sizes, given, work)
    best = recommend(costs)
    assumed = "" if profile else " (assumed; give --profile)"
    console.print(f"edge: {_described(given.edge)}" + (" (measured)" if measure else assumed))
    console.print(f"cloud: {_described(given.cloud)}{assumed}")
    link = given.network
    console.print(f"link: {link.mbit_s:g} Mbit/s each way, {link.rtt_ms:g} ms round trip, {link.step_us:g} us a step")
    if measure:
        console.print(f"for a profile file:\n{given.dump().rstrip()}")
    print_table(
        ["cloud runs", "edge MB", "cloud MB", "B/token", "KB/prompt", "ms/token", "limit", "ms/prompt"],
        [_row(cost, best) for cost in notable_plans(costs, best)],
        title=f"{model}: {structure.path} path, {len(sizes.blocks)} blocks, {sizes.weights / 1e6:,.0f} million weights",
        caption=f"* recommended, ! does not fit; one text of {context} tokens, a prompt of {prompt}, {codec}; "
        "MB of weights, keys and values",
    )
    summary: dict[str, Any] = {
        "model": model,
        "path": structure.path,
        "blocks": len(sizes.blocks),
        "weights": sizes.weights,
        "width": sizes.width,
        "codec": codec,
        "context": context,
        "prompt": prompt,
        "measured": measure,
        "profile": given.model_dump(mode="json"),
        "plans": [cost.as_json() for cost in costs],
        "recommended": None,
    }
    if best is not None:
        reason = _reason(best, costs)
        console.print(f"recommended: --start-block {best.start_block} --end-block {best.end_block}: {reason}")
        summary["recommended"] = {**best.as_json(), "reason": reason}
    print_json(as_json, summary)
    check_fit(costs, given)


def _parsed(option: str, parse: Callable[[str], float], text: str | None) -> float | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from None


def _described(device: DeviceProfile) -> str:
    limit = "no limit of memory" if device.memory_gb is None else f"{device.memory_gb:g} GB"
    return (
        f"{limit}, reads {device.memory_gb_s:g} GB/s, computes {device.gflop_s:g} GFLOP/s, "
        f"{device.block_us:g} us a block, {device.step_us:g} us a step, {device.dtype}"
    )


def _row(cost: PlanCost, best: PlanCost | None) -> list[str]:
    where = f"[{cost.start_block}, {cost.end_block})" if cost.start_block < cost.end_block else "none"
    return [
        where + " *" * (cost == best) + " !" * (not cost.fits),
        f"{cost.edge_bytes / 1e6:,.0f}",
        f"{cost.cloud_bytes / 1e6:,.0f}",
        f"{cost.link_bytes_per_token:,}",
        f"{cost.link_bytes_per_prompt / 1e3:,.0f}",
        f"{cost.ms_per_token:,.1f}",
        cost.limited_by,
        f"{cost.ms_per_prompt:,.0f}",
    ]


def _reason(best: PlanCost, costs: list[PlanCost]) -> str:
    """Reason of the recommendation: its time and limit, compared with the two extremes."""
    blocks = max(cost.end_block for cost in costs)
    fitting = sum(cost.fits for cost in costs)
    said = [
        f"{best.ms_per_token:.1f} ms per token, limited by the {best.limited_by}; "
        f"the fastest of {fitting} plans that fit (of {len(costs)})"
    ]
    for (start, end), name in {(blocks, blocks): "all at the edge", (0, blocks): "all blocks in the cloud"}.items():
        [other] = [cost for cost in costs if (cost.start_block, cost.end_block) == (start, end)]
        if other != best:
            said.append(f"{name}: {other.ms_per_token:.1f} ms" + ", does not fit" * (not other.fits))
    if best.start_block == 0 < best.end_block:
        said.append("a cut at block 0 sends embeddings, in which the cloud reads every token of the prompt")
    return "; ".join(said)
