"""Predicted costs of split plans: memory of both sides, bytes on the link, and time of a token and of a prompt.

A block takes a fixed time per call, and beside it the longer of two: reading its weights, keys and values, and
computing (the roofline model: Williams et al., CACM 52(4), 2009). A token visits edge, link, cloud, link and edge one
after the other; the chunks of a prompt overlap there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from raycloud.errors import ModelError
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.split.device_profile import DeviceProfile, LinkProfile, SplitProfile
from raycloud.split.inference.generation import CHUNKS_IN_FLIGHT, PROMPT_CHUNK
from raycloud.split.inference.messages import STEP_BYTES
from raycloud.split.model_sizes import BlockSizes, SplitSizes
from raycloud.split.plan import SplitPlan

Place = Literal["edge", "link", "cloud"]

TIE = 0.01
"""Relative difference of times below which two plans are equally fast: a prediction does not tell them apart."""

_SHARES = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the blocks at the edge in the plans that a table shows."""


@dataclass(frozen=True)
class Workload:
    """Text that a plan is judged by, and the codec of its hidden states."""

    codec: CutCodec
    context: int = 2048
    """Tokens whose keys and values are kept; a token is timed with all of them."""
    prompt: int = 512
    """Tokens of the prompt."""


@dataclass(frozen=True)
class PlanCost:
    """Predicted costs of one plan, for one text at a time."""

    start_block: int
    end_block: int
    edge_weight_bytes: int
    edge_kv_bytes: int
    cloud_weight_bytes: int
    cloud_kv_bytes: int
    link_bytes_per_token: int
    """Bytes in both directions, headers of steps included; 0 if the cloud has no blocks."""
    link_bytes_per_prompt: int
    ms_per_token: float
    """Time of a token with a full context; of an encoder, which reads a text at once, the text's time by its tokens."""
    edge_ms: float
    link_ms: float
    cloud_ms: float
    ms_per_prompt: float
    """Time to the logits after the prompt."""
    fits: bool
    """True if weights, keys and values of both sides are within their limits."""

    @property
    def edge_bytes(self) -> int:
        """Memory of the edge's part in bytes."""
        return self.edge_weight_bytes + self.edge_kv_bytes

    @property
    def cloud_bytes(self) -> int:
        """Memory of the cloud's part in bytes."""
        return self.cloud_weight_bytes + self.cloud_kv_bytes

    @property
    def limited_by(self) -> Place:
        """Place where a token spends most of its time."""
        times: dict[Place, float] = {"edge": self.edge_ms, "link": self.link_ms, "cloud": self.cloud_ms}
        return max(times, key=lambda place: times[place])

    def as_json(self) -> dict[str, Any]:
        """Costs as plain values."""
        totals = {"edge_bytes": self.edge_bytes, "cloud_bytes": self.cloud_bytes, "limited_by": self.limited_by}
        return {**asdict(self), **totals}


def block_ms(block: BlockSizes, device: DeviceProfile, tokens: int, context: int) -> float:
    """Milliseconds of one call of a block with ``tokens`` new tokens, when ``context`` tokens are cached."""
    read = device.itemsize * block.weights_read(tokens) + block.kept_bytes(context, device.itemsize)
    return device.block_us / 1e3 + _roofline_ms(device, read, block.flops(tokens, context))


def head_ms(sizes: SplitSizes, device: DeviceProfile, tokens: int = 1) -> float:
    """Milliseconds of final norm and head for the logits of ``tokens`` tokens."""
    return _roofline_ms(device, device.itemsize * sizes.head, 2 * tokens * sizes.head)


def link_bytes(plan: SplitPlan, blocks: int, codec: CutCodec, start: int, tokens: int, wanted: int) -> tuple[int, int]:
    """Bytes of a step up and down: hidden states of ``tokens`` tokens from position ``start`` on.

    Args:
        plan: plan of the cuts.
        blocks: number of blocks of the model.
        codec: codec of both cuts.
        start: position of the first token.
        tokens: number of tokens.
        wanted: number of the last tokens whose logits are needed: without blocks behind the cloud's, the hidden states
            of the others do not come back.
    """
    if plan.start_block == plan.end_block:
        return 0, 0
    back = wanted if plan.end_block == blocks else tokens
    up = STEP_BYTES + codec.payload_bytes(start, tokens)
    return up, STEP_BYTES + codec.payload_bytes(start + tokens - back, back)


def distinct_plans(blocks: int) -> list[SplitPlan]:
    """All pairs of cuts that differ in what they do: of those without cloud blocks, only the last."""
    pairs = [SplitPlan(start, end) for start in range(blocks) for end in range(start + 1, blocks + 1)]
    return [*pairs, SplitPlan(blocks, blocks)]


def plan_costs(
    sizes: SplitSizes, profile: SplitProfile, work: Workload, plans: Iterable[SplitPlan] | None = None
) -> list[PlanCost]:
    """Predict the costs of plans.

    Args:
        sizes: sizes of the model.
        profile: edge, cloud and link.
        work: text and codec.
        plans: the plans; None for all of :func:`distinct_plans`.
    """
    predictor = _Predictor(sizes, profile, work)
    return [predictor.cost(plan) for plan in (distinct_plans(len(sizes.blocks)) if plans is None else plans)]


def recommend(costs: Sequence[PlanCost]) -> PlanCost | None:
    """Plan that fits with the least time per token; None if none fits.

    Of plans that are equally fast (:data:`TIE`) the one with the fewest bytes at the edge, then the least time of a
    prompt, then the deepest first cut.
    """
    fitting = [cost for cost in costs if cost.fits]
    if not fitting:
        return None
    least = min(cost.ms_per_token for cost in fitting)
    equal = [cost for cost in fitting if cost.ms_per_token <= least * (1 + TIE)]
    return min(equal, key=lambda cost: (cost.edge_bytes, cost.ms_per_prompt, -cost.start_block))


def check_fit(costs: Sequence[PlanCost], profile: SplitProfile) -> None:
    """Check that some plan fits.

    Raises:
        ModelError: none does; the message says what the two sides need at least.
    """
    if any(cost.fits for cost in costs):
        return
    edge, cloud = (_limit(side) for side in (profile.edge, profile.cloud))
    within = [cost for cost in costs if cost.edge_bytes <= edge]
    if not within:
        least = min(costs, key=lambda cost: cost.edge_bytes)
        raise ModelError(
            f"no plan fits: the edge needs at least {least.edge_bytes / 1e9:.2f} GB (embedding, head and the fewest "
            f"blocks) and edge.memory_gb is {profile.edge.memory_gb:g}"
        )
    needed = min(cost.cloud_bytes for cost in within)
    raise ModelError(
        f"no plan fits: with edge.memory_gb {edge / 1e9:g} the cloud needs at least {needed / 1e9:.2f} GB and "
        f"cloud.memory_gb is {cloud / 1e9:g}"
    )


def notable_plans(costs: Sequence[PlanCost], chosen: PlanCost | None = None) -> list[PlanCost]:
    """Selection of plans to show: from everything at the edge to all blocks in the cloud, and ``chosen``.

    For each share of the blocks at the edge there are two plans: all of them before the cloud's, and half of them
    behind. Sorted by the edge's memory, most first.
    """
    blocks = max(cost.end_block for cost in costs)
    at_edge = {round(blocks * share) for share in _SHARES} | {min(2, blocks)}
    wanted = {(blocks, blocks)}
    wanted |= {(count, blocks) for count in at_edge} | {(count - count // 2, blocks - count // 2) for count in at_edge}
    shown = {(cost.start_block, cost.end_block): cost for cost in costs if (cost.start_block, cost.end_block) in wanted}
    if chosen is not None:
        shown[chosen.start_block, chosen.end_block] = chosen
    return sorted(shown.values(), key=lambda cost: (-cost.edge_bytes, -cost.start_block))


def _roofline_ms(device: DeviceProfile, read: float, flops: float) -> float:
    return 1e3 * max(read / (device.memory_gb_s * 1e9), flops / (device.gflop_s * 1e9))


def _limit(device: DeviceProfile) -> float:
    return float("inf") if device.memory_gb is None else device.memory_gb * 1e9


class _Sums:
    """Sums of a value over ranges of blocks."""

    def __init__(self, values: Iterable[float]) -> None:
        self._until = list(accumulate(values, initial=0.0))

    def over(self, start: int, end: int) -> float:
        return self._until[end] - self._until[start]


class _Side:
    """Sums of one device over ranges of blocks: times of a step with a full context and of the chunks of the prompt, in
    milliseconds, and bytes kept of a text."""

    def __init__(self, sizes: SplitSizes, device: DeviceProfile, work: Workload, chunks: Sequence[tuple[int, int]]):
        tokens, context = (1, work.context) if sizes.causal else (work.prompt, 0)
        self.step = _Sums(block_ms(block, device, tokens, context) for block in sizes.blocks)
        # The chunks but the first are alike enough to be timed by their mean context.
        first, rest = chunks[0], chunks[1:]
        mean = sum(start for start, _ in rest) // len(rest) if rest else 0
        self.first = _Sums(block_ms(block, device, first[1], 0) for block in sizes.blocks)
        self.later = _Sums(block_ms(block, device, rest[0][1], mean) if rest else 0.0 for block in sizes.blocks)
        self.kept = _Sums(block.kept_bytes(work.context, device.itemsize) for block in sizes.blocks)


class _Predictor:
    """Predictor of the costs of plans of one model."""

    def __init__(self, sizes: SplitSizes, profile: SplitProfile, work: Workload) -> None:
        self._sizes, self._profile, self._work = sizes, profile, work
        self._blocks = len(sizes.blocks)
        # An encoder sees a text at once: its only step has all tokens.
        self._step = 1 if sizes.causal else work.prompt
        chunk = PROMPT_CHUNK if sizes.causal else work.prompt
        self._chunks = [(at, min(chunk, work.prompt - at)) for at in range(0, work.prompt, chunk)]
        self._edge = _Side(sizes, profile.edge, work, self._chunks)
        self._cloud = _Side(sizes, profile.cloud, work, self._chunks)
        self._weights = _Sums(block.weights for block in sizes.blocks)

    def cost(self, plan: SplitPlan) -> PlanCost:
        edge, cloud, link = self._profile.edge, self._profile.cloud, self._profile.network
        plan.check(self._blocks)
        start, end, total = plan.start_block, plan.end_block, self._blocks
        split = start < end

        def at_edge(sums: _Sums) -> float:
            return sums.over(0, start) + sums.over(end, total)

        step, codec = self._step, self._work.codec
        up, down = link_bytes(plan, total, codec, self._work.context if self._sizes.causal else 0, step, step)
        edge_ms = at_edge(self._edge.step) + head_ms(self._sizes, edge, step) + edge.step_us / 1e3
        cloud_ms = self._cloud.step.over(start, end) + cloud.step_us / 1e3 if split else 0.0
        link_ms = _link_ms(link, up, down) if split else 0.0
        memory = {
            "edge_weight_bytes": round(edge.itemsize * (self._sizes.outer + at_edge(self._weights))),
            "edge_kv_bytes": round(at_edge(self._edge.kept)),
            "cloud_weight_bytes": round(cloud.itemsize * self._weights.over(start, end)),
            "cloud_kv_bytes": round(self._cloud.kept.over(start, end)),
        }
        return PlanCost(
            start_block=start,
            end_block=end,
            **memory,
            link_bytes_per_token=round((up + down) / step),
            link_bytes_per_prompt=sum(sum(sizes) for sizes in self._prompt_bytes(plan)),
            ms_per_token=(edge_ms + cloud_ms + link_ms) / step,
            edge_ms=edge_ms / step,
            link_ms=link_ms / step,
            cloud_ms=cloud_ms / step,
            ms_per_prompt=self._prompt_ms(plan),
            fits=memory["edge_weight_bytes"] + memory["edge_kv_bytes"] <= _limit(edge)
            and memory["cloud_weight_bytes"] + memory["cloud_kv_bytes"] <= _limit(cloud),
        )

    def _prompt_bytes(self, plan: SplitPlan) -> list[tuple[int, int]]:
        end = self._work.prompt
        return [
            link_bytes(plan, self._blocks, self._work.codec, at, tokens, min(self._step, tokens) * (at + tokens == end))
            for at, tokens in self._chunks
        ]

    def _prompt_ms(self, plan: SplitPlan) -> float:
        """Time of a pipeline: the first chunk visits every stage, and the slowest stage paces the others."""
        edge, cloud, link = self._profile.edge, self._profile.cloud, self._profile.network
        start, end, total = plan.start_block, plan.end_block, self._blocks
        split = start < end

        def stages(edge_sums: _Sums, cloud_sums: _Sums, traffic: tuple[int, int]) -> list[float]:
            here = edge_sums.over(0, start) + edge_sums.over(end, total) + edge.step_us / 1e3
            if not split:
                return [here]
            there = cloud_sums.over(start, end) + (cloud.step_us + link.step_us) / 1e3
            return [here, there, *(link.network().seconds(size) * 1e3 for size in traffic)]

        traffic = self._prompt_bytes(plan)
        whole = sum(stages(self._edge.first, self._cloud.first, traffic[0])) + (link.rtt_ms if split else 0.0)
        if (rest := len(self._chunks) - 1) > 0:
            later = stages(self._edge.later, self._cloud.later, traffic[1])
            # No more chunks are on their way than the edge allows.
            trip = (sum(later) + (link.rtt_ms if split else 0.0)) / CHUNKS_IN_FLIGHT
            whole += rest * max(*later, trip)
        return whole + head_ms(self._sizes, edge, self._step)


def _link_ms(link: LinkProfile, up: int, down: int) -> float:
    return link.rtt_ms + link.network().seconds(up + down) * 1e3 + link.step_us / 1e3
