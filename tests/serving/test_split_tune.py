"""Split fine-tuning against Ray Serve gives the weights of one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ray import serve
from safetensors.torch import load_file

from raycloud.edge.endpoint import CloudEndpoint
from raycloud.errors import LinkError, ModelError
from raycloud.link.meter import Meter
from raycloud.serving.split_tune import SplitTuneSettings, app
from raycloud.split.finetune.device_run import run_member
from raycloud.split.finetune.run import run
from tests.split.finetune.test_run import recipe

TOKEN = "s3cret"


@pytest.fixture(scope="module")
def url(serve_port: int, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = SplitTuneSettings(
        model=str(tiny_llama),
        start_block=1,
        end_block=3,
        checkpoints=str(tmp_path_factory.mktemp("checkpoints")),
        token=TOKEN,
        num_cpus=0.2,
        threads=1,
    )
    serve.run(app(settings), name="split-tune", route_prefix="/split-tune")
    yield f"ws://127.0.0.1:{serve_port}/split-tune/v1/split-tune"
    serve.delete("split-tune")


@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 2}}], ids=["all weights", "adapters"])
def test_over_serve_as_in_one_process(url: str, tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    # In float32: where numbers are rounded to bytes, a difference in the last bit of one may become a whole step.
    cut, meter = {"kind": "low_rank", "rank": 6, "dtype": "float32"}, Meter()
    here = run(recipe(tiny_llama, tmp_path / "here", uplink=cut, **changes))
    connect = partial(CloudEndpoint(url, TOKEN).channel, meter)
    there = run(recipe(tiny_llama, tmp_path / "there", uplink=cut, **changes), connect=connect)
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-5)
    assert there["bytes_per_step"] == here["bytes_per_step"]
    assert meter.total > 6 * there["bytes_per_step"]
    ours, theirs = (load_file(tmp_path / name / "edge.safetensors") for name in ("there", "here"))
    assert ours.keys() == theirs.keys()
    assert any("lora_A" in name for name in ours) == ("lora" in changes)
    apart = torch.cat([(ours[key] - theirs[key]).flatten() for key in theirs])
    assert float(apart.norm() / torch.cat([theirs[key].flatten() for key in theirs]).norm()) < 1e-4


def test_a_cloud_says_no_in_one_line(url: str, tiny_llama: Path, tmp_path: Path) -> None:
    connect = partial(CloudEndpoint(url, TOKEN).channel, Meter())
    with pytest.raises(LinkError, match="refused the token"):
        run(recipe(tiny_llama, tmp_path / "a"), connect=partial(CloudEndpoint(url, "guess").channel, Meter()))
    with pytest.raises(LinkError, match=r"blocks \[2, 3\) are asked for, \[1, 3\) are here"):
        run(recipe(tiny_llama, tmp_path / "b", start_block=2), connect=connect)
    with pytest.raises(
        ModelError, match=r"lora\.target_modules: no linear map 'c_attn' in the blocks; allowed: q_proj"
    ):
        run(recipe(tiny_llama, tmp_path / "c", lora={"target_modules": ["c_attn"]}), connect=connect)


def test_the_members_of_a_group_come_to_one_of_several_replicas(
    serve_port: int, tiny_llama: Path, tmp_path: Path
) -> None:
    """Without sticky routing, two replicas would separate three edges three times out of four."""
    settings = SplitTuneSettings(
        model=str(tiny_llama),
        start_block=1,
        end_block=3,
        checkpoints=str(tmp_path / "checkpoints"),
        token=TOKEN,
        num_cpus=0.1,
        threads=1,
        min_replicas=2,
        max_replicas=2,
    )
    names = ["a", "b", "c"]
    changes = {"edges": [{"name": name} for name in names], "rounds": {"count": 1, "steps": 1}}
    serve.run(app(settings), name="split-tune-2", route_prefix="/split-tune-2")
    try:
        cloud = CloudEndpoint(f"ws://127.0.0.1:{serve_port}/split-tune-2/v1/split-tune", TOKEN)

        def device(group: str, name: str) -> list[dict[str, Any]]:
            mine = recipe(tiny_llama, tmp_path / group / name, **changes, edge=name, group=group)
            rounds: list[dict[str, Any]] = run_member(mine, partial(cloud.channel, Meter()))["rounds"]
            return rounds

        for group in ("one", "other"):
            with ThreadPoolExecutor(len(names)) as pool:
                for rounds in pool.map(partial(device, group), names):
                    assert rounds == [{"round": 1, "members": names, "missed": {}}]
    finally:
        serve.delete("split-tune-2")


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="checkpoints"):
        SplitTuneSettings(model="builtin:minilm-l6", start_block=1, end_block=3)  # type: ignore[call-arg]
