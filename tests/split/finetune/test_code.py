"""What crosses a cut: codes, numbers as bytes, and bytes told in advance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.errors import ModelError
from raycloud.link.codecs.quantised import EvenInt4
from raycloud.link.frames import Kind, with_bytes
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.split.finetune.code import Code, narrow, published, tensors_of
from raycloud.split.finetune.crossing import crossing, fitting, per_cut
from raycloud.split.finetune.front import Learning
from raycloud.split.finetune.messages import Piece
from raycloud.split.finetune.numbers import Coded, Form, Packing
from tests.models.families import tiny
from tests.split.finetune.wiring import WIDTH, batches, calibration, head_of, model_of, split


def rows(count: int = 300, rank: int = 5) -> Tensor:
    """Rows of few directions around a mean, with one coordinate far larger than the others."""
    chance = torch.Generator().manual_seed(0)
    found = torch.randn(count, rank, generator=chance) @ torch.randn(rank, WIDTH, generator=chance) + 3.0
    found[:, 7] += 500 * torch.randn(count, generator=chance)
    return found


def off(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).detach().norm() / reference.norm())


@pytest.mark.parametrize(("rank", "outliers"), [(WIDTH, 0), (5, 1), (6, 0)])
def test_a_narrow_code_loses_nothing_where_there_is_nothing_to_lose(rank: int, outliers: int) -> None:
    code = narrow(rows(), rank, outliers)
    assert code.width == rank + outliers
    assert off(code.decoder(code.encoder(rows())), rows()) < 1e-5


def test_a_narrow_code_keeps_the_mean_and_the_main_directions() -> None:
    """Of a code of one direction the rest is the error that no direction could lessen."""
    some = rows()
    code = narrow(some, 1, 1)
    centred = (some - some.mean(dim=0)).index_fill(1, torch.tensor([7]), 0.0)
    best = torch.linalg.svdvals(centred)[1:].norm()
    assert float((code.decoder(code.encoder(some)) - some).detach().norm()) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize(("rank", "outliers"), [(0, 0), (WIDTH + 1, 0), (4, WIDTH)])
def test_codes_that_rows_cannot_have_are_refused(rank: int, outliers: int) -> None:
    with pytest.raises(ModelError, match="allowed: up to 32"):
        narrow(rows(), rank, outliers)


def test_the_published_cut_is_the_block_without_its_residual() -> None:
    model = tiny("bert", dtype=torch.float32)
    first, block = Segment(model, 0, 3, head=False), Segment(model).blocks[2]
    whole = Segment(model, 0, 2, head=False)
    ids = batches(0, 1, language=False)[0].ids
    with torch.no_grad():
        before = block.attention(whole.rows(ids))[0]
        expected = block.output.LayerNorm(block.output.dense(block.intermediate(before)))
        code = published(first, WIDTH)
        found = code.decoder(code.encoder(first.rows(ids).flatten(0, 1)))
    assert code.width == WIDTH
    assert off(found, expected.flatten(0, 1)) < 1e-5


def test_the_published_cut_is_for_encoders_alone() -> None:
    with pytest.raises(ModelError, match="BERT family"):
        published(Segment(model_of("llama"), 0, 2, head=False), 4)  # type: ignore[arg-type]


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
def test_numbers_arrive(form: Form, apart: int, size: int, error: float) -> None:
    packing = Packing(form, 10, apart)
    # Gradients are small, and float16 must not lose them.
    numbers = 1e-9 * torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    coded = packing.pack(numbers)
    assert len(coded.payload) == 7 * size == 7 * packing.bytes_per_row
    assert off(packing.unpack(coded, 7), numbers) <= error


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_chance_rounds_right_on_average_and_is_repeatable(form: Form) -> None:
    packing, numbers = Packing(form, 64), torch.rand(1, 64, generator=torch.Generator().manual_seed(2))

    def drawn(seed: int) -> Tensor:
        coded = packing.pack(numbers, torch.Generator().manual_seed(seed))
        return packing.unpack(coded, 1, by_chance=True)

    nearest = packing.unpack(packing.pack(numbers), 1)
    assert off(torch.stack([drawn(seed) for seed in range(400)]).mean(dim=0), numbers) < off(nearest, numbers) / 4
    assert torch.equal(drawn(3), drawn(3))


def test_uneven_levels_lose_a_third_less_than_even_steps() -> None:
    packing, even = Packing("int4", 512), EvenInt4(512, 64)
    numbers = torch.randn(200, 512, generator=torch.Generator().manual_seed(4))
    ours = off(packing.unpack(packing.pack(numbers), 200), numbers)
    assert ours**2 < 0.67 * off(even.decode(even.encode(numbers)), numbers) ** 2


def test_numbers_that_are_none_and_payloads_of_another_length_are_refused() -> None:
    packing = Packing("float32", 4)
    with pytest.raises(ValueError, match="not all finite"):
        packing.pack(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(ValueError, match="not all finite"):
        packing.unpack(Coded(1.0, torch.full((4,), float("inf")).numpy().tobytes()), 1)
    with pytest.raises(ValueError, match="2 rows of 16 bytes have 32, got 16"):
        packing.unpack(Coded(1.0, bytes(16)), 2)


def six_numbers(ahead: Segment) -> Code:
    return narrow(rows(), 6)


def test_a_code_for_few_steps_spans_the_same_with_coefficients_of_one_size() -> None:
    some = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.logspace(2, -1, WIDTH)
    plainly, evenly = narrow(some, 10, 1), narrow(some, 10, 1, even=True)
    assert off(evenly.decoder(evenly.encoder(some)), plainly.decoder(plainly.encoder(some))) < 1e-5

    def spread(code: Code) -> float:
        sizes = code.encoder(some).detach()[:, 1:].std(dim=0)
        return float(sizes.max() / sizes.min())

    assert spread(evenly) < spread(plainly) / 2


def test_a_code_larger_than_a_frame_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cloud", "crossing"):
        monkeypatch.setattr(f"raycloud.split.finetune.{module}.PIECE_BYTES", 300)
    meter = Meter()
    edge = split(model_of("gpt2"), 2, 4, code=six_numbers, back=7, form="int8", meter=meter)
    cloud = edge.cloud.side  # type: ignore[attr-defined]
    fitted = [batch.valid.sum(dim=1).tolist() for batch in calibration(language=True)]
    assert fitting(fitted, edge.packings, WIDTH, first=False, second=True) == meter.payload
    assert edge.decoder.weight.detach().norm() > 1  # type: ignore[union-attr, operator]
    packed = tensors_of(cloud.decoder)
    assert len(packed) > 900
    before = cloud.decoder.weight.detach().clone()
    with torch.no_grad():
        cloud.decoder.weight.zero_()
    for at in range(0, len(packed), 300):
        ours = Piece(up=True, at=at, size=len(packed))
        cloud.answer(with_bytes(Kind.CODE, ours, packed[at : at + 300]))
    assert torch.equal(cloud.decoder.weight, before)
    with pytest.raises(ValueError, match="bytes 300 to 301 of 5 of a decoder came where those from 0 to"):
        cloud.answer(with_bytes(Kind.CODE, Piece(up=True, at=300, size=5), b"x"))


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(("family", "second", "back"), [("bert", 6, None), ("bert", 6, 5), ("gpt2", 4, 7)])
def test_bytes_told_in_advance_are_those_that_cross(
    family: str, second: int, back: int | None, form: Form, changes: bool
) -> None:
    meter, language = Meter(), family != "bert"
    edge = split(
        model_of(family),
        2,
        second,
        head=None if language else head_of(),
        code=six_numbers,
        back=back,
        form=form,
        changes=changes,
        meter=meter,
    )
    mine = batches(0, 3, language=language)
    edge.step(mine)
    fitted = [batch.valid.sum(dim=1).tolist() for batch in calibration(language=language)]
    told = fitting(fitted, edge.packings, WIDTH, first=False, second=back is not None)
    told += crossing(0, [batch.valid.sum(dim=1).tolist() for batch in mine], edge.packings, edge.back, Learning())
    assert told == meter.payload
    assert per_cut(told)[2] == meter.total
