"""Training of chosen blocks equals a plain loop over the whole model with everything else frozen."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.data.batches import SampleOrder
from raycloud.models.chain import block_list_of
from raycloud.models.weights import weights_of
from raycloud.retrain.parts import parts_of
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import cross_entropy, entropy, wrong
from raycloud.retrain.trainer import BlockTrainer, RecordedSamples, Retrained
from raycloud.retrain.window import train_window
from raycloud.training.schedule import lr_factor
from tests.retrain.models import TASK_MODELS, task_model, task_samples

SETTINGS = RetrainTraining(batch_size=4, warmup_steps=2, lr=1e-2, head_lr=2e-2)
STEPS = 5


def snapshot(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in weights_of(model).items()}


def train(model: PreTrainedModel, blocks: Sequence[int], samples: Samples, cached: bool = True) -> Retrained:
    parts = parts_of(model, samples.select(slice(0, 2)).inputs)
    start = parts.lowest(blocks) if cached else 0
    groups = parts.groups(blocks)
    return BlockTrainer(model, groups, samples, cross_entropy, SETTINGS, start=start, steps=STEPS, seed=7).run()


def trained(model: PreTrainedModel, blocks: Sequence[int], samples: Samples) -> PreTrainedModel:
    model = copy.deepcopy(model)
    train(model, blocks, samples)
    return model


def names_of(model: PreTrainedModel, blocks: Sequence[int], samples: Samples) -> tuple[set[str], set[str]]:
    """Names of all trained parameters, and of those of the head."""
    groups = parts_of(model, samples.select(slice(0, 2)).inputs).groups(blocks)
    return {name for group in groups.values() for name in group}, set(groups["head"])


def plain(model: PreTrainedModel, names: set[str], head: set[str], samples: Samples) -> PreTrainedModel:
    """Loop in plain torch: AdamW, warm-up and cosine, clipping at norm 1, whole forwards."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for name, one in parameters.items():
        one.requires_grad_(name in names)
    groups = [
        {"params": [parameters[name] for name in sorted(some)], "peak": peak}
        for some, peak in ((head, 2e-2), (names - head, 1e-2))
        if some
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0)
    order = SampleOrder([1] * len(samples), 4, 7)
    for step in range(STEPS):
        batch = samples.select(torch.tensor(order.indices(step)))
        logits = model(**batch.inputs).logits.flatten(0, -2)
        torch.nn.functional.cross_entropy(logits, batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_([parameters[name] for name in names], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(step, STEPS, 2, "cosine")
        optimizer.step()
        optimizer.zero_grad()
    return model


def equal(ours: PreTrainedModel, theirs: PreTrainedModel, tolerance: float) -> None:
    other = weights_of(theirs)
    for name, tensor in weights_of(ours).items():
        assert (tensor - other[name]).norm() <= tolerance * max(float(other[name].norm()), 1.0), name


@pytest.mark.parametrize("name", TASK_MODELS)
def test_training_some_blocks_is_a_plain_loop_with_the_rest_frozen(name: str) -> None:
    model = task_model(name).double()
    samples = task_samples(model)
    samples = Samples(
        {key: one.double() if one.is_floating_point() else one for key, one in samples.inputs.items()}, samples.labels
    )
    last = len(block_list_of(model).blocks) - 1
    for blocks in ([1, last], [last], []):
        names, head = names_of(model, blocks, samples)
        ours = trained(model, blocks, samples)
        equal(ours, plain(model, names, head, samples), 1e-7)
        before = weights_of(model)
        for key, tensor in weights_of(ours).items():
            assert torch.equal(tensor, before[key]) == (key not in names) or not tensor.is_floating_point(), key


def test_all_blocks_are_the_plain_loop() -> None:
    model = task_model("llama")
    samples = task_samples(model)
    names, head = names_of(model, [0, 1, 2], samples)
    equal(trained(model, [0, 1, 2], samples), plain(model, names, head, samples), 1e-6)


@pytest.mark.parametrize("name", ["llama", "vit", "swin", "t5-decoder"])
def test_losses_with_the_frozen_blocks_run_once_are_those_of_whole_forwards(name: str) -> None:
    model = task_model(name)
    samples = task_samples(model)
    last = len(block_list_of(model).blocks) - 1
    losses = [train(copy.deepcopy(model), [last], samples, cached) for cached in (True, False)]
    assert torch.allclose(torch.tensor(losses[0].losses), torch.tensor(losses[1].losses), rtol=1e-6)
    assert losses[0].flops < losses[1].flops


def test_the_head_is_found_and_a_tied_one_is_not_trained() -> None:
    vit, llama, t5 = (task_model(name) for name in ("vit", "llama", "t5-decoder"))
    found = {one: set(parts_of(one, task_samples(one).inputs).head) for one in (vit, llama, t5)}
    assert found[vit] == {f"{part}.{kind}" for part in ("vit.layernorm", "classifier") for kind in ("weight", "bias")}
    assert found[llama] == {"model.norm.weight", "lm_head.weight"}
    assert found[t5] == {"decoder.final_layer_norm.weight"}


def test_replayed_samples_are_a_share_of_each_batch() -> None:
    model = task_model("vit")
    samples, source = task_samples(model), task_samples(model, 20, seed=9)
    seen: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
        seen.append(labels)
        return cross_entropy(logits, labels)

    settings = SETTINGS.model_copy(update={"replay": 0.25})
    parts = parts_of(model, samples.inputs)
    own = Samples(samples.inputs, torch.full((12,), 1))
    others = Samples(source.inputs, torch.full((20,), 2))
    BlockTrainer(model, parts.groups([2]), own, loss, settings, start=2, steps=3, seed=0, replayed=others).run()
    assert [sorted(one.tolist()) for one in seen] == [[1, 1, 1, 2]] * 3


def test_a_window_that_does_not_help_leaves_the_model_as_it_was() -> None:
    model = task_model("vit")
    samples, before = task_samples(model, 16), snapshot(model)
    parts = parts_of(model, samples.inputs)
    arguments = (model, parts, [1], samples.select(slice(0, 8)), samples.select(slice(8, 16)), cross_entropy)
    errors = iter([0.5, 0.5])

    def error(logits: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
        found = wrong(logits, labels)
        return type(found)(torch.tensor(next(errors) * found.count), found.count, {})

    result = train_window(*arguments, error, SETTINGS, steps=3, seed=0)
    assert (result.helped, result.deltas) == (False, {})
    assert all(torch.equal(one, before[name]) for name, one in snapshot(model).items())
    errors = iter([0.5, 0.4])
    result = train_window(*arguments, error, SETTINGS, steps=3, seed=0)
    assert result.helped and set(result.deltas) <= names_of(model, [1], samples)[0]
    after = snapshot(model)
    assert all(torch.equal(after[name] - before[name], one) for name, one in result.deltas.items())


def test_an_interrupted_window_leaves_the_model_as_it_was() -> None:
    model = task_model("vit")
    samples, before = task_samples(model, 16), snapshot(model)
    parts = parts_of(model, samples.inputs)

    def stop(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_window(model, parts, [0], samples, samples, cross_entropy, wrong, SETTINGS, steps=3, seed=0, on_step=stop)
    assert all(torch.equal(one, before[name]) for name, one in snapshot(model).items())


def test_the_loss_without_labels_reads_none() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 4
    found = [entropy(logits, labels).sum for labels in (torch.zeros(5).long(), torch.full((5,), 3))]
    assert torch.equal(*found)


def test_recorded_samples_train_alike_and_are_paid_once() -> None:
    source = task_model("vit")
    samples = task_samples(source)
    rows = torch.tensor([0, 2, 3, 5, 7, 8, 11])
    plainly, shared = copy.deepcopy(source), copy.deepcopy(source)
    expected = train(plainly, [2], samples.select(rows))
    recorded = RecordedSamples.of(shared, 2, samples, SETTINGS.batch_size)
    groups = parts_of(shared, samples.select(slice(0, 2)).inputs).groups([2])
    trainer = BlockTrainer(shared, groups, recorded.select(rows), cross_entropy, SETTINGS, start=2, steps=STEPS, seed=7)
    done = trainer.run()
    assert done.losses == pytest.approx(expected.losses, rel=1e-6)
    for (name, one), other in zip(shared.named_parameters(), plainly.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
    assert recorded.flops / 12 * 7 == pytest.approx(expected.flops - done.flops)
