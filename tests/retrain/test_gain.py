"""Gains are those of per-batch gradients taken one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.errors import DataError
from raycloud.models.weights import weights_of
from raycloud.retrain.gain import block_gains
from raycloud.retrain.parts import parts_of
from raycloud.retrain.tasks import cross_entropy
from raycloud.training.loop import Loss
from tests.retrain.models import task_model, task_samples


@pytest.mark.parametrize("name", ["llama", "vit", "swin", "t5-decoder"])
def test_gains_are_those_of_gradients_of_whole_backwards(name: str) -> None:
    model = task_model(name)
    samples = task_samples(model, 16)
    parts = parts_of(model, samples.inputs)
    before = {key: one.clone() for key, one in weights_of(model).items()}
    found = block_gains(model, parts, samples, cross_entropy, micro_batches=4)
    some = block_gains(model, parts, samples, cross_entropy, micro_batches=4, together=1)
    assert all(torch.equal(one, before[key]) for key, one in weights_of(model).items())
    assert all(one.grad is None for one in model.parameters())
    slopes: list[list[Tensor]] = [[] for _ in parts.blocks]
    for batch in samples.batches(4):
        loss = torch.nn.functional.cross_entropy(model(**batch.inputs).logits.flatten(0, -2), batch.labels.flatten())
        for index, block in enumerate(parts.blocks.values()):
            grads = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True, allow_unused=True)
            slopes[index].append(torch.cat([one.flatten() for one in grads if one is not None]))
    for index, each in enumerate(slopes):
        stacked = torch.stack(each)
        mean, variance = stacked.mean(0), stacked.var(0)
        assert found.blocks[index].magnitude == pytest.approx(float(mean.norm()), rel=1e-4)
        assert found.blocks[index].snr == pytest.approx(float(mean.square().sum() / (variance.sum() / 4)), rel=1e-3)
        assert some.blocks[index].snr == pytest.approx(found.blocks[index].snr, rel=1e-4)
    assert some.flops > found.flops and some.memory < found.memory


def test_the_ratio_of_signal_to_noise_does_not_change_with_the_scale_of_the_loss() -> None:
    model = task_model("vit")
    samples = task_samples(model, 16)
    parts = parts_of(model, samples.inputs)

    def tenfold(logits: Tensor, labels: Tensor) -> Loss:
        loss = cross_entropy(logits, labels)
        return Loss(10 * loss.sum, loss.count, {})

    one, ten = (block_gains(model, parts, samples, loss, micro_batches=4) for loss in (cross_entropy, tenfold))
    for plain, scaled in zip(one.blocks, ten.blocks, strict=True):
        assert scaled.snr == pytest.approx(plain.snr, rel=1e-4)
        assert scaled.magnitude == pytest.approx(10 * plain.magnitude, rel=1e-4)


def test_too_few_samples_are_refused() -> None:
    model = task_model("vit")
    samples = task_samples(model, 6)
    with pytest.raises(DataError, match="6 samples are given for 8 micro-batches; allowed: one each or more"):
        block_gains(model, parts_of(model, samples.inputs), samples, cross_entropy)
