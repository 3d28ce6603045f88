"""Sizes and predicted costs of split plans, against hand-computed numbers and against real models and sessions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

from raycloud.benchmarks.family_configs import DECODERS, tiny_config
from raycloud.errors import ModelError
from raycloud.link.codecs.sizes import widest_codec
from raycloud.link.network import Network
from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment
from raycloud.split.cost import (
    PlanCost,
    Workload,
    block_ms,
    check_fit,
    distinct_plans,
    head_ms,
    link_bytes,
    notable_plans,
    plan_costs,
    recommend,
)
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.device_profile import DeviceProfile, LinkProfile, SplitProfile
from raycloud.split.inference.messages import STEP_BYTES
from raycloud.split.inference.timing import UNTIMED_TOKENS, measure_split
from raycloud.split.model_sizes import BlockSizes, SplitSizes, sizes_of
from raycloud.split.parts import SplittableModel, edge_bytes
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import FAMILIES, tiny

CAUSAL = [name for name in FAMILIES if name != "bert"]


def large() -> PretrainedConfig:
    """Configuration of the size of Llama 3 70B."""
    return LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def uniform(blocks: int = 8, weights: int = 10_000_000, outer: int = 1_000_000) -> SplitSizes:
    block = BlockSizes(dense=weights, kv_per_token=100, attention_width=100)
    return SplitSizes((block,) * blocks, outer, outer // 2, width=256)


def work(codec: str = "bfloat16", width: int = 256, context: int = 100, prompt: int = 64) -> Workload:
    return Workload(widest_codec(codec, width), context, prompt)


SLOW = DeviceProfile(memory_gb_s=1, gflop_s=10)
FAST = DeviceProfile(memory_gb_s=100, gflop_s=1000)


def profile(edge: DeviceProfile = SLOW, cloud: DeviceProfile = FAST, **network: float) -> SplitProfile:
    return SplitProfile(edge=edge, cloud=cloud, network=LinkProfile(**{"step_us": 0, **network}))


def limited(device: DeviceProfile, memory_gb: float) -> DeviceProfile:
    return device.model_copy(update={"memory_gb": memory_gb})


def best(sizes: SplitSizes, given: SplitProfile) -> SplitPlan:
    found = recommend(plan_costs(sizes, given, work()))
    assert found is not None
    return SplitPlan(found.start_block, found.end_block)


def test_the_sizes_of_llama_3_70b_are_those_of_its_report() -> None:
    """70.6 billion weights: https://arxiv.org/abs/2407.21783; a block is computed by hand."""
    sizes = sizes_of(large())
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024
    assert sizes.blocks[0].dense == attention + 3 * 8192 * 28672 + 2 * 8192
    assert {block.kv_per_token for block in sizes.blocks} == {2 * 8 * 128}
    assert len(sizes.blocks) == 80 and round(sizes.weights / 1e9, 1) == 70.6
    assert (sizes.outer, sizes.head) == (2 * 128256 * 8192 + 8192, 128256 * 8192 + 8192)


def test_a_mixture_reads_the_experts_that_run() -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=97,
    )
    block = sizes_of(config).blocks[0]
    dense = 2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 + 2 * 32
    assert (block.dense, block.experts, block.active_share) == (dense, 8 * 3 * 32 * 48, 0.25)
    assert block.weights_read(1) == dense + 2 * 3 * 32 * 48
    # Two tokens choose 2 of 8 each: an expert is left out by both with probability 9/16.
    assert block.weights_read(2) == pytest.approx(dense + 8 * 3 * 32 * 48 * 7 / 16)
    assert block.flops(3, 10) == 3 * (2 * (dense + 2 * 3 * 32 * 48) + 4 * 32 * 10)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_of_the_real_model_and_of_its_edge_part(name: str) -> None:
    model = tiny(name, dtype=torch.float32)
    sizes = sizes_of(model.config, causal=name != "bert")
    if name != "bert":  # whose task head is no part of a split model
        assert sizes.weights == sum(parameter.numel() for parameter in model.parameters())
    for plan in (SplitPlan(0, 6), SplitPlan(2, 5), SplitPlan(6, 6)):
        [cost] = plan_costs(sizes, profile(), work(width=sizes.width), [plan])
        assert cost.edge_weight_bytes == edge_bytes(model.config, PlanSet.of(plan))
        blocks = Segment(model, plan.start_block, plan.end_block, embed=False, head=False)
        assert cost.cloud_weight_bytes == sum(parameter.nbytes for parameter in blocks.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_keys_and_values_are_those_of_the_real_cache(name: str) -> None:
    """32 tokens are more than the sliding windows of 16, which keep all keys; the cache allocates exactly 32."""
    model = tiny(name, dtype=torch.float32)
    cache = KVCache()
    with torch.inference_mode():
        Segment(model, 1, 4, embed=False, head=False).hidden(torch.zeros(1, 32, 32), cache=cache)
    sizes = sizes_of(model.config)
    [cost] = plan_costs(sizes, profile(), work(width=32, context=32), [SplitPlan(1, 4)])
    assert cost.cloud_kv_bytes == cache.nbytes
    assert cost.edge_kv_bytes == cache.nbytes  # the other three blocks


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mamba2", torch.float32),
        *((name, torch.bfloat16) for name in ("mamba", "mamba2", "bamba", "qwen3_next", "lfm2")),
    ],
)
def test_recurrent_states_are_those_of_the_real_cache(name: str, dtype: torch.dtype) -> None:
    """States of linear attention stay float32 in a model in half precision."""
    model = AutoModelForCausalLM.from_config(tiny_config(*DECODERS[name]), dtype=dtype)
    segment = Segment(model, head=False)  # in half precision some types' heads refuse their own hidden states
    cache: Any = segment.new_cache()
    with torch.inference_mode():
        segment(torch.ones(1, 16, dtype=torch.long), cache=cache)
    sizes = sizes_of(model.config)
    assert sum(block.kept_bytes(0, dtype.itemsize) for block in sizes.blocks) == cache.state_bytes > 0
    device = FAST.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    [cost] = plan_costs(sizes, profile(device, device), work(width=32, context=16), [SplitPlan(0, 2)])
    assert cost.edge_kv_bytes + cost.cloud_kv_bytes == sum(
        block.kept_bytes(16, dtype.itemsize) for block in sizes.blocks
    )


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_bytes_of_a_token_are_those_of_a_session(codec: str) -> None:
    whole = SplittableModel(tiny("llama", dtype=torch.float32), "f", "")
    plan = SplitPlan(2, 5)
    edge, cloud = whole.edge(PlanSet.of(plan)), whole.cloud(PlanSet.of(plan))
    ids = list(range(3, 3 + UNTIMED_TOKENS + 4))
    session = measure_split(edge, cloud, CutCodecs(32), codec, Network(), ids)
    [cost] = plan_costs(sizes_of(whole.model.config), profile(), work(codec, width=32), [plan])
    assert cost.link_bytes_per_token == session.bytes_per_token


def test_a_prompt_comes_back_whole_only_if_the_edge_has_blocks_behind() -> None:
    codec, row = widest_codec("bfloat16", 256), 512
    assert link_bytes(SplitPlan(2, 6), 8, codec, 0, 128, 0) == (STEP_BYTES + 128 * row, STEP_BYTES + 128 * row)
    assert link_bytes(SplitPlan(2, 8), 8, codec, 0, 128, 1) == (STEP_BYTES + 128 * row, STEP_BYTES + row)
    assert link_bytes(SplitPlan(2, 8), 8, codec, 0, 128, 0) == (STEP_BYTES + 128 * row, STEP_BYTES)
    assert link_bytes(SplitPlan(8, 8), 8, codec, 0, 128, 1) == (0, 0)
    [cost] = plan_costs(uniform(), profile(), work(prompt=300), [SplitPlan(2, 8)])  # chunks of 128, 128 and 44
    assert cost.link_bytes_per_prompt == 6 * STEP_BYTES + 301 * row


def test_time_of_a_token_by_hand() -> None:
    """10 million weights of 4 bytes at 1 GB/s are 40 ms; 512 bytes and a header each way at 8 Mbit/s."""
    edge = DeviceProfile(memory_gb_s=1, gflop_s=10, block_us=500, step_us=200)
    cloud = DeviceProfile(memory_gb_s=10, gflop_s=0.1, block_us=100, step_us=300, dtype="bfloat16")
    given = profile(edge, cloud, mbit_s=8, rtt_ms=20, step_us=1000)
    sizes = uniform()
    [cost] = plan_costs(sizes, given, work(context=100), [SplitPlan(1, 6)])
    one_edge_block = 0.5 + 4 * (10_000_000 + 100 * 100) / 1e6
    assert block_ms(sizes.blocks[0], edge, 1, 100) == pytest.approx(one_edge_block)
    one_cloud_block = 0.1 + (2 * 10_000_000 + 4 * 100 * 100) / 0.1e6  # computing is slower than reading there
    assert block_ms(sizes.blocks[0], cloud, 1, 100) == pytest.approx(one_cloud_block)
    assert head_ms(sizes, edge) == pytest.approx(2.0)
    assert cost.edge_ms == pytest.approx(3 * one_edge_block + 2.0 + 0.2)
    assert cost.cloud_ms == pytest.approx(5 * one_cloud_block + 0.3)
    assert cost.link_ms == pytest.approx(20 + 2 * (STEP_BYTES + 512) / 1e3 + 1)
    assert cost.ms_per_token == pytest.approx(cost.edge_ms + cost.cloud_ms + cost.link_ms)
    assert cost.limited_by == "cloud"


def test_chunks_of_a_prompt_overlap_and_a_lone_chunk_does_not() -> None:
    given = profile(rtt_ms=20, mbit_s=8)
    [one] = plan_costs(uniform(), given, work(prompt=128), [SplitPlan(2, 6)])
    [many] = plan_costs(uniform(), given, work(prompt=128 * 11), [SplitPlan(2, 6)])
    # The edge is the slowest stage: 4 blocks at 10 GFLOP/s. The later chunks begin at 128 to 1,280, on average at 704.
    chunk = 4 * (2 * 128 * 10_000_000 + 128 * 4 * 100 * 704) / 1e7
    assert many.ms_per_prompt == pytest.approx(one.ms_per_prompt + 10 * chunk)


def test_an_encoder_is_timed_by_whole_texts() -> None:
    sizes = sizes_of(tiny("bert").config, causal=False)
    [cost] = plan_costs(sizes, profile(rtt_ms=50), work(width=32, prompt=10), [SplitPlan(1, 6)])
    assert cost.edge_kv_bytes == cost.cloud_kv_bytes == 0
    assert cost.link_bytes_per_prompt == 2 * (STEP_BYTES + 10 * 64)  # all hidden states come back
    assert cost.link_bytes_per_token * 10 == cost.link_bytes_per_prompt - cost.link_bytes_per_prompt % 10
    assert cost.link_ms > 5


def test_every_pair_of_cuts_is_considered_once() -> None:
    plans = distinct_plans(4)
    assert len(plans) == len(set(plans)) == 4 * 5 / 2 + 1
    assert len(plan_costs(uniform(4), profile(), work())) == len(plans)


def test_a_slow_link_keeps_everything_at_the_edge() -> None:
    assert best(uniform(), profile(rtt_ms=5000)) == SplitPlan(8, 8)


def test_a_fast_link_gives_a_slow_edge_no_block() -> None:
    assert best(uniform(), profile(rtt_ms=1)) == SplitPlan(0, 8)


def test_an_edge_that_is_too_small_gives_blocks_away() -> None:
    """Each block has 40 MB, embedding and head 4 MB, and keys and values are 40 kB a block."""
    assert best(uniform(), profile(limited(SLOW, 0.1249), rtt_ms=5000)) == SplitPlan(0, 8)
    assert best(uniform(), profile(limited(FAST, 0.1249), SLOW)) == SplitPlan(3, 8)


def test_a_cloud_that_is_too_small_leaves_blocks_at_the_edge() -> None:
    assert best(uniform(), profile(cloud=limited(FAST, 0.21), rtt_ms=1)) == SplitPlan(3, 8)


def test_ties_go_to_fewer_bytes_at_the_edge_then_to_the_faster_prompt() -> None:
    """The same speed on both sides and a free link: every plan takes the same time."""
    free = profile(FAST, FAST, rtt_ms=0, mbit_s=1e9)
    assert best(uniform(), free) == SplitPlan(0, 8)
    assert best(uniform(), free.model_copy(update={"cloud": limited(FAST, 0.21)})) == SplitPlan(3, 8)


def test_a_plan_that_fits_nowhere_is_refused_with_what_is_needed() -> None:
    small_edge, small_cloud = profile(limited(SLOW, 0.001)), profile(limited(SLOW, 0.1), limited(FAST, 0.1))
    for given, why in (
        (small_edge, r"edge needs at least 0\.00 GB.* edge\.memory_gb is 0\.001"),
        (small_cloud, r"cloud needs at least 0\.24 GB and cloud\.memory_gb is 0\.1"),
    ):
        costs = plan_costs(uniform(), given, work())
        assert recommend(costs) is None
        with pytest.raises(ModelError, match=why):
            check_fit(costs, given)


def test_the_table_has_both_extremes_and_the_recommendation() -> None:
    costs = plan_costs(uniform(30), profile(), work())
    chosen = next(cost for cost in costs if (cost.start_block, cost.end_block) == (7, 9))
    shown = notable_plans(costs, chosen)
    pairs = [(cost.start_block, cost.end_block) for cost in shown]
    assert {(30, 30), (0, 30), (7, 9)} <= set(pairs) and len(pairs) <= 15
    assert [cost.edge_bytes for cost in shown] == sorted((cost.edge_bytes for cost in shown), reverse=True)


def test_costs_as_json_name_their_limit() -> None:
    [cost] = plan_costs(uniform(), profile(rtt_ms=5000), work(), [SplitPlan(0, 8)])
    assert isinstance(cost, PlanCost)
    plain = cost.as_json()
    assert plain["limited_by"] == "link" and plain["edge_bytes"] == cost.edge_bytes
