"""Codecs fitted to rows: error bounds, exact sizes, rows that stand alone, what a receiver may rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raycloud.link.codecs import CODECS, Codec
from raycloud.link.codecs.fitting import (
    FITTED,
    Choices,
    Fitted,
    FittedName,
    fit,
    fit_levels,
    principal_directions,
    relative_error,
    rotation_of,
)
from raycloud.link.codecs.quantised import Int4, Int8, extremes, grouped
from raycloud.link.codecs.relative import Baseline, Relative
from raycloud.link.codecs.transforms import Project

WIDTH = 90
MASSIVE = (7, 41)
ROTATION = rotation_of(WIDTH)


def residual_stream(n: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Rows as models have them: a mean, a decaying spectrum, two coordinates far larger than all others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    rows = torch.randn(n, width, generator=generator) * torch.linspace(3, 0.3, width) @ mixing
    rows[:, MASSIVE[0] % width] += 100 + 30 * torch.randn(n, generator=generator)
    rows[:, MASSIVE[1] % width] -= 40 * torch.randn(n, generator=generator)
    return rows


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit(residual_stream(2000), first=1, rotation=ROTATION, rank=WIDTH // 2)


@pytest.mark.parametrize(("name", "error"), [("int8", 0.004), ("int4", 0.02), ("low-rank", 0.05)])
def test_round_trips_lose_little(fitted: Fitted, name: FittedName, error: float) -> None:
    assert relative_error(fitted.codec(name, ROTATION), residual_stream(300, seed=1)) < error


def test_reported_errors_hold_for_other_rows(fitted: Fitted) -> None:
    for name, error in fitted.choices.errors.items():
        assert relative_error(fitted.codec(name, ROTATION), residual_stream(500, seed=2)) == pytest.approx(
            error, rel=0.15
        )


@pytest.mark.parametrize("name", FITTED)
def test_sizes_are_the_formula_and_resends_are_equal(fitted: Fitted, name: FittedName) -> None:
    codec, rows = fitted.codec(name, ROTATION), residual_stream(37, seed=3)
    payload = codec.encode(rows)
    assert payload.dtype == torch.uint8
    assert payload.shape == (37, codec.bytes_per_row(WIDTH))
    assert torch.equal(payload, codec.encode(rows.clone()))
    assert codec.encode(rows[:0]).shape == (0, codec.bytes_per_row(WIDTH))
    assert codec.decode(payload[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("name", FITTED)
def test_rows_stand_alone(fitted: Fitted, name: FittedName) -> None:
    codec, rows = fitted.codec(name, ROTATION), residual_stream(64, seed=4)
    together = codec.decode(codec.encode(rows))
    # Another row a thousand times as large changes nothing; a matrix product may round differently in its last bit.
    for at in (0, 5, 63):
        alone = codec.decode(codec.encode(rows[at : at + 1]))
        louder = codec.decode(codec.encode(torch.cat([rows[at : at + 1], 1000 * rows[:3]])))[:1]
        scale = rows[at].norm()
        assert (alone - together[at]).norm() <= 1e-3 * scale
        assert (louder - together[at]).norm() <= 1e-3 * scale


def test_int8_bits_do_not_depend_on_the_batch(fitted: Fitted) -> None:
    codec, rows = fitted.codec("int8", ROTATION), residual_stream(64, seed=4)
    assert torch.equal(codec.encode(rows)[10:20], codec.encode(rows[10:20]))


@pytest.mark.parametrize("name", FITTED)
def test_outliers_arrive_as_float16(fitted: Fitted, name: FittedName) -> None:
    count = fitted.choices.int4_outliers if name == "int4" else fitted.choices.int8_outliers
    apart = fitted.outliers[:count]
    assert set(MASSIVE) <= set(apart.tolist())
    rows = residual_stream(50, seed=5) * 2
    codec = fitted.codec(name, ROTATION)
    lost = (codec.decode(codec.encode(rows)) - rows)[:, apart].abs()
    assert (lost <= (rows - fitted.mean)[:, apart].abs() * 2**-11 + rows[:, apart].abs() * 2**-22).all()


def test_numbers_beyond_float16_are_coded_in_units_of_the_calibration() -> None:
    rows = residual_stream(500) * 1e6
    codec = fit(rows, first=1, rotation=ROTATION, rank=4).codec("int8", ROTATION)
    assert rows.abs().max() > 65_504
    assert relative_error(codec, rows) < 0.004


def test_more_bits_lose_less(fitted: Fitted) -> None:
    errors = fitted.choices.errors
    assert errors["int8"] < errors["int4"] < 1
    assert errors["low-rank"] == pytest.approx(errors["low-rank-int8"], rel=0.05)


def test_fitted_levels_and_rotation_beat_even_steps(fitted: Fitted) -> None:
    rows = residual_stream(400, seed=6)
    chosen = fitted.choices
    baseline = Baseline(fitted.mean, chosen.unit, fitted.outliers[: chosen.int4_outliers])
    even = Int4(WIDTH, chosen.int4_group, torch.linspace(-1, 1, 16))
    plain = Relative("plain", baseline, ROTATION, even)
    assert relative_error(fitted.codec("int4", ROTATION), rows) < 0.95 * relative_error(plain, rows)


def test_levels_lose_least_at_the_centres_of_their_cells() -> None:
    groups = grouped(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), 32)
    levels = fit_levels(groups)
    assert (levels.diff() > 0).all()

    def lost(levels: Tensor) -> float:
        codec = Int4(64, 32, levels)
        rows = groups.flatten(1)
        return float((codec.decode(codec.encode(rows)) - rows).square().sum())

    # The fit is to a float16-free scale; a percent covers that.
    assert lost(levels) <= 1.01 * min(lost(levels * 1.05), lost(levels * 0.95), lost(levels + 0.02))


def test_a_full_basis_is_exact() -> None:
    rows = residual_stream(200)
    mean = rows.mean(0)
    basis = principal_directions(rows - mean, WIDTH)
    assert torch.allclose(basis.T @ basis, torch.eye(WIDTH), atol=1e-5)
    baseline = Baseline(mean, 1.0, torch.empty(0, dtype=torch.long))
    codec = Relative("low-rank", baseline, Project(basis), CODECS["float32"])
    assert relative_error(codec, residual_stream(50, seed=7)) < 1e-5


def test_the_basis_loses_less_than_other_directions() -> None:
    rows = residual_stream(400)
    centred = rows - rows.mean(0)

    def kept(basis: Tensor) -> float:
        return float((centred @ basis).norm())

    assert kept(principal_directions(centred, 10)) > 1.5 * kept(torch.eye(WIDTH)[:, 20:30])


@pytest.mark.parametrize("width", [1, 7, 90, 576])
def test_rotations_are_orthogonal_and_the_same_everywhere(width: int) -> None:
    rotation, rows = rotation_of(width), torch.randn(5, width)
    turned = rotation.forward(rows)
    assert rotation.size == width
    assert torch.allclose(turned.norm(dim=1), rows.norm(dim=1), rtol=1e-5)
    assert torch.allclose(rotation.back(turned), rows, atol=1e-5)
    assert torch.equal(rotation_of(width).left, rotation.left)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 130), group=st.integers(1, 70), n=st.integers(0, 5))
def test_quantisers_have_exact_sizes_at_any_width(width: int, group: int, n: int) -> None:
    rows = torch.randn(n, width)
    groups = -(-width // group)
    for codec, per_number in ((Int8(width, group), 1.0), (Int4(width, group, torch.linspace(-1, 1, 16)), 0.5)):
        payload = codec.encode(rows)
        assert payload.shape == (n, codec.bytes_per_row(width))
        assert codec.bytes_per_row(width) == 2 * groups + -(-width // round(1 / per_number))
        back = codec.decode(payload)
        step = {1.0: 1 / 127, 0.5: 2 / 15}[per_number]
        bound = extremes(grouped(rows, group)).abs() * step * 0.51 + 1e-6
        assert (grouped(back - rows, group).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_finite_floats_decode_to_finite_rows(data: st.DataObject) -> None:
    """A receiver looks for NaN in decoded rows; that they come only from NaN in the payload makes it a sound check."""
    codec = data.draw(st.sampled_from([FIXED.codec(name, ROTATION) for name in FITTED]))
    size = codec.bytes_per_row(WIDTH)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    payload = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[None]
    decoded = codec.decode(payload)
    if not decoded.isfinite().all():
        assert not CODECS["float16"].decode(payload[:, : size // 2 * 2]).isfinite().all()


FIXED = fit(residual_stream(400, seed=8), first=1, rotation=ROTATION, rank=32)


@pytest.mark.parametrize("name", FITTED)
def test_nan_in_rows_arrives_as_nan(name: FittedName) -> None:
    codec, rows = FIXED.codec(name, ROTATION), residual_stream(2, seed=9)
    rows[0, 3] = float("nan")
    decoded = codec.decode(codec.encode(rows))
    assert not decoded[0].isfinite().all()
    assert decoded[1].isfinite().all()


@pytest.mark.parametrize("name", FITTED)
def test_infinite_rows_saturate(name: FittedName) -> None:
    codec, rows = FIXED.codec(name, ROTATION), residual_stream(1, seed=9)
    rows[0, MASSIVE[0]] = float("inf")
    assert codec.decode(codec.encode(rows)).isfinite().all()


@pytest.mark.parametrize("name", FITTED)
def test_rows_that_never_change_can_be_fitted(name: FittedName) -> None:
    still = torch.full((80, WIDTH), 3.0)
    codec = fit(still, first=1, rotation=ROTATION, rank=8).codec(name, ROTATION)
    assert torch.equal(codec.decode(codec.encode(still)), still)


@pytest.mark.parametrize("name", FITTED)
def test_other_widths_and_lengths_are_refused(name: FittedName) -> None:
    codec: Codec = FIXED.codec(name, ROTATION)
    with pytest.raises(ValueError, match=f"{name} is calibrated for rows of {WIDTH} numbers, got 91"):
        codec.encode(torch.zeros(1, 91))
    with pytest.raises(ValueError, match="payload must be uint8 rows of"):
        codec.decode(torch.zeros(1, codec.bytes_per_row(WIDTH) + 1, dtype=torch.uint8))


def test_narrow_rows_keep_most_coordinates() -> None:
    fitted = fit(residual_stream(200, width=6), first=1, rotation=rotation_of(6), rank=3)
    assert max(fitted.choices.int8_outliers, fitted.choices.int4_outliers) <= 3


def test_tensors_that_do_not_fit_are_refused() -> None:
    sound = {name: getattr(FIXED, name) for name in ("choices", "mean", "outliers", "levels", "basis")}
    choices: Choices = FIXED.choices
    for wrong in (
        {"mean": FIXED.mean[:-1]},
        {"levels": FIXED.levels[:-1]},
        {"basis": FIXED.basis * float("nan")},
        {"outliers": FIXED.outliers + WIDTH},
        {"choices": choices.model_copy(update={"int8_outliers": 17})},
    ):
        with pytest.raises(ValueError, match="do not fit each other"):
            Fitted(**(sound | wrong))
