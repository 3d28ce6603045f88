"""Label sharing, with head, loss and labels in the cloud: equal weights, and no labels are sent unless requested."""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycloud.data.batches import Batch
from raycloud.errors import LinkError, ModelError, RecipeError
from raycloud.link.frames import Frame
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import identity_bottleneck
from raycloud.split.finetune.client import LocalCloudClient
from raycloud.split.finetune.edge_trainer import EdgeTrainer
from raycloud.split.finetune.label_sharing import LabelSharingCloud, LabelSharingEdge
from raycloud.split.finetune.messages import PredictRequest, TrainRequest, TuneConfig, TuneKind
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.run import run
from raycloud.split.finetune.tasks import HeadConfig
from raycloud.split.parts import export, load_cloud
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.training.loop import Step
from tests.split.finetune.test_run import Host, reviews
from tests.split.finetune.wiring import (
    CLASSES,
    SEED,
    STEPS,
    TRAINING,
    WIDTH,
    Whole,
    agreed,
    batches,
    distance,
    head_of,
    model_of,
    parts_of,
    values,
)

TERMS = HeadConfig(kind="classification", outputs=CLASSES, pooling="mean", dropout=0.1)
LAST = 6


def labelled(
    model: Any, first: int, *, activation_delta: bool = False, max_in_flight: int = 2, meter: Meter | None = None
) -> EdgeTrainer:
    """Make both sides of a copy of a model, with head and labels in the cloud."""
    model, code = copy.deepcopy(model), identity_bottleneck(WIDTH)
    ahead, middle = Segment(model, 0, first, head=False), Segment(model, first, LAST, embed=False, head=False)
    last, task = Segment(model, LAST, embed=False), TERMS.task(WIDTH, SEED, None)
    config = TuneConfig(
        seed=SEED,
        total_steps=STEPS,
        training=TRAINING,
        train_cloud=True,
        pooling="none" if last.has_norm else "mean",
        uplink=agreed(code, activation_delta=activation_delta),
        downlink=agreed(identity_bottleneck(WIDTH)),
        head=TERMS,
    )
    cloud = LabelSharingCloud(middle, code.decoder, last, task, config)
    return LabelSharingEdge(ahead, code.encoder, config, LocalCloudClient(cloud, meter), max_in_flight)


def side(edge: EdgeTrainer) -> LabelSharingCloud:
    found = edge.cloud.trainer  # type: ignore[attr-defined]
    assert isinstance(found, LabelSharingCloud)
    return found


@pytest.mark.parametrize(("family", "first"), [("bert", 3), ("bert", 0), ("llama", 2)])
def test_weights_after_many_steps_are_the_whole_models(family: str, first: int) -> None:
    model = model_of(family)
    whole, edge = Whole(model, head_of()), labelled(model, first)
    for step in range(STEPS):
        mine = batches(step, language=False)
        theirs, ours = whole.step(mine), edge.step(mine)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    cloud = side(edge)
    modules = {"first": edge.modules["first"], **{n: cloud.modules[n] for n in ("middle", "last", "head")}}
    assert distance(values(modules), values(parts_of(whole, first, LAST))) <= 1e-5
    said = edge.predict(batches(99, 1, language=False)[0])
    assert said.shape == (4, CLASSES)


@pytest.mark.parametrize("changes", [False, True])
def test_bytes_are_told_from_lengths_alone(changes: bool) -> None:
    meter = Meter()
    edge = labelled(model_of("bert"), 3, activation_delta=changes, meter=meter)
    mine = batches(0, 3, language=False)
    edge.step(mine)
    edge.wait_for_optimiser()
    told = edge.traffic(0, [batch.valid.sum(dim=1).tolist() for batch in mine])
    assert dict(meter.payload) == dict(told)


def test_the_number_of_labels_is_told_with_as_many_bytes_as_it_takes() -> None:
    meter = Meter()
    edge = labelled(model_of("bert"), 3, meter=meter)
    mine = batches(0, 34, language=False)
    assert sum(batch.targets for batch in mine) > 127
    edge.step(mine)
    edge.wait_for_optimiser()
    assert dict(meter.payload) == dict(edge.traffic(0, [batch.valid.sum(dim=1).tolist() for batch in mine]))


def test_a_label_that_no_class_has_is_refused() -> None:
    cloud = side(labelled(model_of("bert"), 3))
    hidden = torch.zeros(5, WIDTH).numpy().tobytes()

    def learn(labels: bytes, lengths: list[int]) -> Frame:
        ours = TrainRequest(step=0, micro_batch=0, last=True, targets=1, lengths=lengths, scale=1.0)
        return Frame.of(TuneKind.TRAIN, ours, labels + hidden)

    with pytest.raises(ValueError, match="label 3; allowed: 0 to 2"):
        cloud.answer(learn(bytes([3, 0, 0, 0]), [5]))
    with pytest.raises(ValueError, match="0 labels came for 1 texts"):
        cloud.answer(
            Frame.of(TuneKind.TRAIN, TrainRequest(step=0, micro_batch=0, last=True, targets=1, lengths=[5], scale=1.0))
        )
    with pytest.raises(LinkError, match="FWD has no place where labels are the cloud's"):
        cloud.answer(Frame.of(TuneKind.FWD, PredictRequest(lengths=[5], scale=1.0), hidden))


def test_over_a_link_the_cloud_learns_what_it_learns_here_also_after_it_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_cut = {"kind": "plain", "dtype": "float32"}

    def made(name: str, **changes: Any) -> dict[str, Any]:
        return {"output": tmp_path / name, "task": {"pooling": "first"}, "uplink": plain_cut, **changes}

    apart = run(reviews(**made("edge", max_in_flight=1)))
    assert "labels=cloud" not in capsys.readouterr().out
    here = run(reviews(**made("here", labels="cloud")))
    printed = " ".join(capsys.readouterr().out.split())
    assert "labels=cloud: the cloud is sent the label of every training text" in printed
    with closing(Host(tmp_path / "cloud", tail=True)) as cloud:
        step, killed = EdgeTrainer.step, []

        def breaking(self: EdgeTrainer, some: list[Batch]) -> Step:
            if self.trainer.step_index == 1 and not killed:
                killed.append(cloud.kill())
            return step(self, some)

        monkeypatch.setattr(EdgeTrainer, "step", breaking)
        there = run(reviews(**made("there", labels="cloud")), connect=cloud.connect)
    assert killed
    for name in ("accuracy_before", "accuracy", "bytes_per_step"):
        assert there[name] == here[name]
    assert [apart[name] for name in ("accuracy_before", "accuracy")] == [
        here[name] for name in ("accuracy_before", "accuracy")
    ]
    assert here["second_cut_bytes_per_step"] == 0 < here["first_cut_bytes_per_step"]
    files = {name: load_file(tmp_path / name / "edge.safetensors") for name in ("edge", "here", "there")}
    assert all(name.startswith("first.") for name in files["here"])
    for name, tensor in files["here"].items():
        assert torch.allclose(tensor, files["edge"][name], atol=1e-5)
        assert torch.allclose(tensor, files["there"][name], atol=1e-5)


def test_a_cloud_that_was_not_started_for_labels_refuses_them(tmp_path: Path) -> None:
    with closing(Host(tmp_path / "cloud")) as cloud, pytest.raises(LinkError, match="labels=cloud; allowed here"):
        run(reviews(tmp_path / "out", labels="cloud"), connect=cloud.connect)


def test_blocks_that_do_not_lead_to_the_models_end_have_no_head(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"blocks \[1, 3\) of .* do not lead to its end"):
        load_cloud(str(tiny_llama), PlanSet.of(SplitPlan(1, 3)), training=True, tail=True)
    export(str(tiny_llama), PlanSet.of(SplitPlan(1, 4)), tmp_path / "parts")
    with pytest.raises(ModelError, match="holds only the cloud's blocks"):
        load_cloud(str(tmp_path / "parts" / "cloud"), training=True, tail=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "cloud", "task": {"kind": "language"}}, "the text itself; allowed: labels=edge"),
        ({"labels": "cloud", "end_block": 5}, "no second cut"),
        ({"labels": "cloud", "downlink": "int8"}, "no second cut"),
        ({"labels": "cloud", "trainable": "last"}, "nothing to train; allowed: all"),
        ({"labels": "here"}, "labels: .*, got 'here'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        SplitTuneRecipe.parse({"output": str(tmp_path), **changes})
