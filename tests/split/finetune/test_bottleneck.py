"""Traffic of a cut: bottlenecks, numbers as bytes, and byte counts known in advance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.errors import ModelError
from raycloud.link.codecs.quantised import UniformInt4
from raycloud.link.frames import Frame
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import (
    Bottleneck,
    decoder_to_bytes,
    empty_bottleneck,
    fit_low_rank,
    max_decoder_bytes,
    principal_directions,
    sft_bottleneck,
)
from raycloud.split.finetune.edge_trainer import TrainableParts
from raycloud.split.finetune.messages import TuneKind
from raycloud.split.finetune.traffic import bottleneck_traffic, bytes_by_cut, step_traffic
from raycloud.split.finetune.wire_dtype import WireDType
from raycloud.split.finetune.wire_format import EncodedTensor, WireFormat
from tests.models.families import tiny
from tests.split.finetune.wiring import WIDTH, batches, calibration, head_of, model_of, split


def rows(count: int = 300, rank: int = 5) -> Tensor:
    """Make hidden states of low rank around a mean, with one coordinate much larger than the others."""
    chance = torch.Generator().manual_seed(0)
    found = torch.randn(count, rank, generator=chance) @ torch.randn(rank, WIDTH, generator=chance) + 3.0
    found[:, 7] += 500 * torch.randn(count, generator=chance)
    return found


def off(ours: Tensor, reference: Tensor) -> float:
    return float(((ours - reference).norm() / reference.norm()).detach())


@pytest.mark.parametrize(("rank", "outliers"), [(WIDTH, 0), (5, 1), (6, 0)])
def test_a_narrow_code_loses_nothing_where_there_is_nothing_to_lose(rank: int, outliers: int) -> None:
    code = fit_low_rank(rows(), rank, outliers)
    assert code.width == rank + outliers
    assert off(code.decoder(code.encoder(rows())), rows()) < 1e-5


def test_a_narrow_code_keeps_the_mean_and_the_main_directions() -> None:
    """The residual of a bottleneck of rank one is the smallest possible error."""
    some = rows()
    code = fit_low_rank(some, 1, 1)
    centred = (some - some.mean(dim=0)).index_fill(1, torch.tensor([7]), 0.0)
    best = torch.linalg.svdvals(centred)[1:].norm()
    assert float((code.decoder(code.encoder(some)) - some).detach().norm()) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize(("rank", "outliers"), [(0, 0), (WIDTH + 1, 0), (4, WIDTH)])
def test_codes_that_rows_cannot_have_are_refused(rank: int, outliers: int) -> None:
    with pytest.raises(ModelError, match="allowed: up to 32"):
        fit_low_rank(rows(), rank, outliers)


def test_the_published_cut_is_the_block_without_its_residual() -> None:
    model = tiny("bert", dtype=torch.float32)
    first, block = Segment(model, 0, 3, head=False), Segment(model).blocks[2]
    whole = Segment(model, 0, 2, head=False)
    ids = batches(0, 1, language=False)[0].ids
    with torch.no_grad():
        before = block.attention(whole.hidden(ids))[0]
        expected = block.output.LayerNorm(block.output.dense(block.intermediate(before)))
        code = sft_bottleneck(first, WIDTH)
        found = code.decoder(code.encoder(first.hidden(ids).flatten(0, 1)))
    assert code.width == WIDTH
    assert off(found, expected.flatten(0, 1)) < 1e-5


def test_the_published_cut_is_for_encoders_alone() -> None:
    with pytest.raises(ModelError, match="BERT family"):
        sft_bottleneck(Segment(model_of("llama"), 0, 2, head=False), 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "apart", "size", "error"),
    [
        ("float32", 0, 40, 0.0),
        ("bfloat16", 0, 20, 4e-3),
        ("float16", 0, 20, 1e-3),
        ("int8", 0, 12, 1e-2),
        ("int8", 3, 6 + 9, 1e-2),
        ("int8", 10, 20, 1e-3),
        ("int4", 0, 2 + 5, 0.15),
        ("int4", 3, 6 + 2 + 4, 0.15),
    ],
)
def test_numbers_arrive(form: WireDType, apart: int, size: int, error: float) -> None:
    wire_format = WireFormat(form, 10, apart)
    # Gradients are small, and float16 must not lose them.
    numbers = 1e-9 * torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    coded = wire_format.pack(numbers)
    assert len(coded.payload) == 7 * size == 7 * wire_format.bytes_per_row
    assert off(wire_format.unpack(coded, 7), numbers) <= error


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_chance_rounds_right_on_average_and_is_repeatable(form: WireDType) -> None:
    wire_format, numbers = WireFormat(form, 64), torch.rand(1, 64, generator=torch.Generator().manual_seed(2))

    def drawn(seed: int) -> Tensor:
        coded = wire_format.pack(numbers, torch.Generator().manual_seed(seed))
        return wire_format.unpack(coded, 1, stochastic=True)

    nearest = wire_format.unpack(wire_format.pack(numbers), 1)
    assert off(torch.stack([drawn(seed) for seed in range(400)]).mean(dim=0), numbers) < off(nearest, numbers) / 4
    assert torch.equal(drawn(3), drawn(3))


def test_uneven_levels_lose_a_third_less_than_even_steps() -> None:
    wire_format, even = WireFormat("int4", 512), UniformInt4(512, 64)
    numbers = torch.randn(200, 512, generator=torch.Generator().manual_seed(4))
    ours = off(wire_format.unpack(wire_format.pack(numbers), 200), numbers)
    assert ours**2 < 0.67 * off(even.decode(even.encode(numbers)), numbers) ** 2


def test_numbers_that_are_none_and_payloads_of_another_length_are_refused() -> None:
    wire_format = WireFormat("float32", 4)
    with pytest.raises(ValueError, match="not all finite"):
        wire_format.pack(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(ValueError, match="not all finite"):
        wire_format.unpack(EncodedTensor(1.0, torch.full((4,), float("inf")).numpy().tobytes()), 1)
    with pytest.raises(ValueError, match="2 tokens of 16 bytes have 32, got 16"):
        wire_format.unpack(EncodedTensor(1.0, bytes(16)), 2)


def six_numbers(ahead: Segment) -> Bottleneck:
    return fit_low_rank(rows(), 6)


def test_a_code_for_few_steps_spans_the_same_with_coefficients_of_one_size() -> None:
    some = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(2, -1, WIDTH)
    plainly, evenly = fit_low_rank(some, 10, 1), fit_low_rank(some, 10, 1, rotate=True)
    assert off(evenly.decoder(evenly.encoder(some)), plainly.decoder(plainly.encoder(some))) < 1e-5

    def spread(code: Bottleneck) -> float:
        sizes = code.encoder(some).detach()[:, 1:].std(dim=0)
        return float(sizes.max() / sizes.min())

    assert spread(evenly) < spread(plainly) / 2


def test_bottlenecks_cross_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.frames.PIECE_BYTES", 300)  # counted with the headers of all pieces
    meter = Meter()
    edge = split(model_of("gpt2"), 2, 4, code=six_numbers, downlink_rank=7, dtype="int8", meter=meter)
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
    fitted = [batch.valid.sum(dim=1).tolist() for batch in calibration(language=True)]
    assert bottleneck_traffic(fitted, edge.wire_formats, WIDTH, uplink=False, downlink=True) == meter.payload
    assert edge.decoder.weight.detach().norm() > 1  # type: ignore[union-attr, operator]
    packed = decoder_to_bytes(cloud.decoder)
    assert 900 < len(packed) <= max_decoder_bytes(WIDTH)
    before = cloud.decoder.weight.detach().clone()
    with torch.no_grad():
        cloud.decoder.weight.zero_()
    cloud.answer(Frame(TuneKind.CODE, raw=packed))
    assert torch.equal(cloud.decoder.weight, before)
    with pytest.raises(ValueError, match="the decoder's tensors are not those that were agreed on"):
        cloud.answer(Frame(TuneKind.CODE, raw=decoder_to_bytes(fit_low_rank(rows(), 5).decoder)))
    with pytest.raises(ValueError, match="the decoder cannot be read"):
        cloud.answer(Frame(TuneKind.CODE, raw=packed[:-1]))


@pytest.mark.parametrize(("numbers", "outliers"), [(2 * WIDTH, 0), (2 * WIDTH, 2 * WIDTH), (1, 0), (1, 1)])
def test_no_decoder_is_larger_than_its_bound(numbers: int, outliers: int) -> None:
    for width in (1, WIDTH, 768):
        decoder = empty_bottleneck(width, min(numbers, 2 * width), min(outliers, 2 * width)).decoder
        assert len(decoder_to_bytes(decoder)) <= max_decoder_bytes(width)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(("family", "second", "downlink_rank"), [("bert", 6, None), ("bert", 6, 5), ("gpt2", 4, 7)])
def test_bytes_told_in_advance_are_those_that_cross(
    family: str, second: int, downlink_rank: int | None, form: WireDType, changes: bool
) -> None:
    meter, language = Meter(), family != "bert"
    edge = split(
        model_of(family),
        2,
        second,
        head=None if language else head_of(),
        code=six_numbers,
        downlink_rank=downlink_rank,
        dtype=form,
        activation_delta=changes,
        meter=meter,
    )
    mine = batches(0, 3, language=language)
    edge.step(mine)
    fitted = [batch.valid.sum(dim=1).tolist() for batch in calibration(language=language)]
    told = bottleneck_traffic(fitted, edge.wire_formats, WIDTH, uplink=False, downlink=downlink_rank is not None)
    told += step_traffic(
        0, [batch.valid.sum(dim=1).tolist() for batch in mine], edge.wire_formats, edge.pooling, TrainableParts()
    )
    assert told == meter.payload
    assert bytes_by_cut(told)[2] == meter.total


def test_main_directions_keep_more_than_others_and_all_of_them_keep_everything() -> None:
    scales = torch.linspace(4.0, 0.1, 24)
    centred = torch.randn(400, 24, generator=torch.Generator().manual_seed(0)) * scales
    basis = principal_directions(centred, 24)
    assert torch.allclose(basis.T @ basis, torch.eye(24), atol=1e-5)
    assert torch.allclose(centred @ basis @ basis.T, centred, atol=1e-4)

    def kept(basis: torch.Tensor) -> float:
        return float((centred @ basis).norm())

    assert kept(principal_directions(centred, 6)) > 1.5 * kept(torch.eye(24)[:, 12:18])
