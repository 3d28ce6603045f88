"""Edges that are devices: what their recipe says and what the device gets of it; reports of devices are checked."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from raycloud.distill.diagnostics import StudentDiagnostics
from raycloud.distill.learner import StudentUpdate
from raycloud.distill.recipe import DistillRecipe, bundles
from raycloud.distill.round_report import RoundReport
from raycloud.errors import RecipeError
from raycloud.link.meter import Meter
from raycloud.training.loop import Step
from tests.cluster.recipes import small
from tests.distill.test_diagnostics import SAME

EDGES = [
    {"name": "store", "where": {"domain": ["movie"]}},
    {"name": "shop", "device": True},
    {"name": "mill", "device": True, "objective": {"kd": {"name": "forward_kl", "temperature": 2.0}}},
    {"name": "farm", "objective": {"kd": {"name": "forward_kl", "temperature": 3.0}}},
]


def recipe(tmp_path: Path) -> DistillRecipe:
    return small(tmp_path / "teacher", tmp_path / "run", edges=EDGES, signal={"kind": "topk"})


def test_devices_take_no_resources(tmp_path: Path) -> None:
    assert [sorted(bundle) for bundle in bundles(recipe(tmp_path))] == [
        ["CPU", "cloud"],
        ["CPU", "edge"],
        ["CPU", "edge"],
    ]


@pytest.mark.parametrize("extra", [{"where": {"domain": ["news"]}}, {"part": 1, "of": 2}])
def test_a_device_brings_its_data(extra: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="the device 'shop' brings its data"):
        DistillRecipe.parse({"edges": [{"name": "shop", "device": True, **extra}]})


def test_a_device_gets_its_edge_and_the_temperatures_of_all(tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    shop = whole.for_device(whole.edges[1])
    assert [edge.name for edge in shop.edges] == ["shop", "mill", "farm"]
    assert shop.temperatures == whole.temperatures == (1.0, 2.0, 3.0)
    assert DistillRecipe.model_validate_json(shop.model_dump_json()) == shop


def test_a_quorum_is_of_every_cohort_and_a_matter_of_the_cloud() -> None:
    edges = [{"name": "a"}, {"name": "b", "device": True}, {"name": "c"}]
    whole = DistillRecipe.parse({"edges": edges, "rounds": {"quorum": 3}})
    assert whole.for_device(whole.edges[1]).rounds.quorum == 1
    other = {"name": "d", "objective": {"kd": {"name": "reverse_kl"}}}
    with pytest.raises(RecipeError, match=r"rounds.quorum=3, and cohort 'd' has 1 edges; allowed: 1 to 1"):
        DistillRecipe.parse({"edges": [*edges, other], "rounds": {"quorum": 3}})


def report(**changes: object) -> bytes:
    data = SAME
    steps = [Step(0, math.nan, {"forward_kl": math.inf}, {"forward_kl": 1.0}, 0.5, 0.1, 7, True)]
    update = StudentUpdate("shop", 0, {}, 7, steps, 2.0, Meter(), StudentDiagnostics(data, (), {"eos": "a sentence"}))
    return json.dumps({**json.loads(RoundReport.of(update).pack()), **changes}).encode()


def test_a_report_crosses_unchanged() -> None:
    update = RoundReport.parse(report(), most_steps=3).update("shop", 4, {}, 7)
    assert (update.name, update.round, update.tokens, update.seconds) == ("shop", 4, 7, 2.0)
    assert math.isnan(update.steps[0].loss) and math.isinf(update.steps[0].terms["forward_kl"])
    assert update.diagnostics.warnings == {"eos": "a sentence"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no json", "report: .*JSON"),
        (report(seconds=-1.0), "seconds"),
        (report(steps=[]), "0 steps; allowed: 1 to 3"),
        (report(steps=json.loads(report())["steps"] * 4), "4 steps; allowed: 1 to 3"),
        (report(payload={"\x1b[2J": 1}), "payload"),
        (report(payload={"ids": -1}), "payload.ids"),
        (report(extra=1), "extra"),
        (report(diagnostics={**json.loads(report())["diagnostics"], "warnings": {"eos": "\x1b[2J"}}), "not printable"),
    ],
)
def test_a_report_that_is_none_is_refused_in_one_line(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        RoundReport.parse(content, most_steps=3)
    assert len(str(refused.value).splitlines()) == 1
