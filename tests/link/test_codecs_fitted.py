"""Fitted codecs: error bounds, exact sizes, independent positions, and guarantees for the receiver."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raycloud.link.codecs.centred import CentredCodec, CutStatistics
from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.fitting import (
    FITTED,
    CutFit,
    FitChoices,
    FittedName,
    fit_cut,
    fit_levels,
    random_rotation,
    relative_error,
)
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Int4, Int8, extremes, grouped
from raycloud.link.codecs.registry import CODEC_NAMES, check_codec

WIDTH = 90
MASSIVE = (7, 41)
ROTATION = random_rotation(WIDTH)


def residual_stream(n: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Make hidden states like those of models: a mean, a decaying spectrum, two coordinates much larger than the
    others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    hidden = torch.randn(n, width, generator=generator) * torch.linspace(3, 0.3, width) @ mixing
    hidden[:, MASSIVE[0] % width] += 100 + 30 * torch.randn(n, generator=generator)
    hidden[:, MASSIVE[1] % width] -= 40 * torch.randn(n, generator=generator)
    return hidden


def test_the_registry_names_every_codec_and_which_are_fitted() -> None:
    assert {name for name, entry in CODEC_NAMES.items() if not entry.calibrated} == set(CODECS)
    assert {name for name, entry in CODEC_NAMES.items() if entry.calibrated} == set(FITTED)
    with pytest.raises(ValueError, match=r"^no codec 'int3'; allowed: float32, float16, bfloat16, int8, int4$"):
        check_codec("int3")


@pytest.fixture(scope="module")
def fitted() -> CutFit:
    return fit_cut(residual_stream(2000), first=1, rotation=ROTATION)


@pytest.mark.parametrize(("name", "error"), [("int8", 0.004), ("int4", 0.02)])
def test_round_trips_lose_little(fitted: CutFit, name: FittedName, error: float) -> None:
    assert relative_error(fitted.codec(name, ROTATION), residual_stream(300, seed=1)) < error


def test_reported_errors_hold_for_other_hidden_states(fitted: CutFit) -> None:
    for name, error in fitted.choices.errors.items():
        assert relative_error(fitted.codec(name, ROTATION), residual_stream(500, seed=2)) == pytest.approx(
            error, rel=0.15
        )


@pytest.mark.parametrize("name", FITTED)
def test_sizes_are_the_formula_and_resends_are_equal(fitted: CutFit, name: FittedName) -> None:
    codec, hidden = fitted.codec(name, ROTATION), residual_stream(37, seed=3)
    payload = codec.encode(hidden)
    assert payload.dtype == torch.uint8
    assert payload.shape == (37, codec.bytes_per_row(WIDTH))
    assert torch.equal(payload, codec.encode(hidden.clone()))
    assert codec.encode(hidden[:0]).shape == (0, codec.bytes_per_row(WIDTH))
    assert codec.decode(payload[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("name", FITTED)
def test_hidden_states_are_coded_independently(fitted: CutFit, name: FittedName) -> None:
    codec, hidden = fitted.codec(name, ROTATION), residual_stream(64, seed=4)
    together = codec.decode(codec.encode(hidden))
    # Another hidden state a thousand times as large changes nothing; a matrix product may round its last bit otherwise.
    for at in (0, 5, 63):
        alone = codec.decode(codec.encode(hidden[at : at + 1]))
        louder = codec.decode(codec.encode(torch.cat([hidden[at : at + 1], 1000 * hidden[:3]])))[:1]
        scale = hidden[at].norm()
        assert (alone - together[at]).norm() <= 1e-3 * scale
        assert (louder - together[at]).norm() <= 1e-3 * scale


def test_int8_bits_do_not_depend_on_the_batch(fitted: CutFit) -> None:
    codec, hidden = fitted.codec("int8", ROTATION), residual_stream(64, seed=4)
    assert torch.equal(codec.encode(hidden)[10:20], codec.encode(hidden[10:20]))


@pytest.mark.parametrize("name", FITTED)
def test_outliers_arrive_as_float16(fitted: CutFit, name: FittedName) -> None:
    count = fitted.choices.int4_outliers if name == "int4" else fitted.choices.int8_outliers
    outliers = fitted.outliers[:count]
    assert set(MASSIVE) <= set(outliers.tolist())
    hidden = residual_stream(50, seed=5) * 2
    codec = fitted.codec(name, ROTATION)
    lost = (codec.decode(codec.encode(hidden)) - hidden)[:, outliers].abs()
    assert (lost <= (hidden - fitted.mean)[:, outliers].abs() * 2**-11 + hidden[:, outliers].abs() * 2**-22).all()


def test_numbers_beyond_float16_are_coded_in_units_of_the_calibration() -> None:
    hidden = residual_stream(500) * 1e6
    codec = fit_cut(hidden, first=1, rotation=ROTATION).codec("int8", ROTATION)
    assert hidden.abs().max() > 65_504
    assert relative_error(codec, hidden) < 0.004


def test_more_bits_lose_less(fitted: CutFit) -> None:
    errors = fitted.choices.errors
    assert errors["int8"] < errors["int4"] < 1


def test_fitted_levels_and_rotation_beat_even_steps(fitted: CutFit) -> None:
    hidden = residual_stream(400, seed=6)
    chosen = fitted.choices
    baseline = CutStatistics(fitted.mean, chosen.unit, fitted.outliers[: chosen.int4_outliers])
    even = Int4(WIDTH, chosen.int4_group, torch.linspace(-1, 1, 16))
    plain = CentredCodec("plain", baseline, ROTATION, even)
    assert relative_error(fitted.codec("int4", ROTATION), hidden) < 0.95 * relative_error(plain, hidden)


def test_levels_lose_least_at_the_centres_of_their_cells() -> None:
    groups = grouped(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), 32)
    levels = fit_levels(groups)
    assert (levels.diff() > 0).all()

    def lost(levels: Tensor) -> float:
        codec = Int4(64, 32, levels)
        hidden = groups.flatten(1)
        return float((codec.decode(codec.encode(hidden)) - hidden).square().sum())

    # The fit is to a float16-free scale; a percent covers that.
    assert lost(levels) <= 1.01 * min(lost(levels * 1.05), lost(levels * 0.95), lost(levels + 0.02))


@pytest.mark.parametrize("width", [1, 7, 90, 576])
def test_rotations_are_orthogonal_and_the_same_everywhere(width: int) -> None:
    rotation, hidden = random_rotation(width), torch.randn(5, width)
    turned = rotation.forward(hidden)
    assert rotation.size == width
    assert torch.allclose(turned.norm(dim=1), hidden.norm(dim=1), rtol=1e-5)
    assert torch.allclose(rotation.back(turned), hidden, atol=1e-5)
    assert torch.equal(random_rotation(width).left, rotation.left)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 130), group=st.integers(1, 70), n=st.integers(0, 5))
def test_quantisers_have_exact_sizes_at_any_width(width: int, group: int, n: int) -> None:
    hidden = torch.randn(n, width)
    groups = -(-width // group)
    for codec, per_number in ((Int8(width, group), 1.0), (Int4(width, group, torch.linspace(-1, 1, 16)), 0.5)):
        payload = codec.encode(hidden)
        assert payload.shape == (n, codec.bytes_per_row(width))
        assert codec.bytes_per_row(width) == 2 * groups + -(-width // round(1 / per_number))
        back = codec.decode(payload)
        step = {1.0: 1 / 127, 0.5: 2 / 15}[per_number]
        # Half a step, and the rounding of the scale to float16, of which the outermost level has the whole.
        bound = extremes(grouped(hidden, group)).abs() * (step / 2 + 2**-11) + 1e-6
        assert (grouped(back - hidden, group).abs() <= bound).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_finite_floats_decode_to_finite_hidden_states(data: st.DataObject) -> None:
    """A receiver checks decoded states for NaN; the check is sound because NaN comes only from NaN in the payload."""
    codec = data.draw(st.sampled_from([FIXED.codec(name, ROTATION) for name in FITTED]))
    size = codec.bytes_per_row(WIDTH)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    payload = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[None]
    decoded = codec.decode(payload)
    if not decoded.isfinite().all():
        assert not CODECS["float16"].decode(payload[:, : size // 2 * 2]).isfinite().all()


FIXED = fit_cut(residual_stream(400, seed=8), first=1, rotation=ROTATION)


@pytest.mark.parametrize("name", FITTED)
def test_nan_in_hidden_states_arrives_as_nan(name: FittedName) -> None:
    codec, hidden = FIXED.codec(name, ROTATION), residual_stream(2, seed=9)
    hidden[0, 3] = float("nan")
    decoded = codec.decode(codec.encode(hidden))
    assert not decoded[0].isfinite().all()
    assert decoded[1].isfinite().all()


@pytest.mark.parametrize("name", FITTED)
def test_infinite_hidden_states_saturate(name: FittedName) -> None:
    codec, hidden = FIXED.codec(name, ROTATION), residual_stream(1, seed=9)
    hidden[0, MASSIVE[0]] = float("inf")
    assert codec.decode(codec.encode(hidden)).isfinite().all()


@pytest.mark.parametrize("name", FITTED)
def test_hidden_states_that_never_change_can_be_fitted(name: FittedName) -> None:
    still = torch.full((80, WIDTH), 3.0)
    codec = fit_cut(still, first=1, rotation=ROTATION).codec(name, ROTATION)
    assert torch.equal(codec.decode(codec.encode(still)), still)


@pytest.mark.parametrize("name", FITTED)
def test_other_widths_and_lengths_are_refused(name: FittedName) -> None:
    codec: Codec = FIXED.codec(name, ROTATION)
    with pytest.raises(ValueError, match=f"{name} is calibrated for hidden states of {WIDTH} numbers, got 91"):
        codec.encode(torch.zeros(1, 91))
    with pytest.raises(ValueError, match="payload must be uint8 rows of"):
        codec.decode(torch.zeros(1, codec.bytes_per_row(WIDTH) + 1, dtype=torch.uint8))


def test_narrow_hidden_states_keep_most_coordinates() -> None:
    fitted = fit_cut(residual_stream(200, width=6), first=1, rotation=random_rotation(6))
    assert max(fitted.choices.int8_outliers, fitted.choices.int4_outliers) <= 3


def test_tensors_that_do_not_fit_are_refused() -> None:
    sound = {name: getattr(FIXED, name) for name in ("choices", "mean", "outliers", "levels")}
    choices: FitChoices = FIXED.choices
    for wrong in (
        {"mean": FIXED.mean[None]},
        {"levels": FIXED.levels[:-1]},
        {"mean": FIXED.mean * float("nan")},
        {"outliers": FIXED.outliers + WIDTH},
        {"choices": choices.model_copy(update={"int8_outliers": 17})},
    ):
        with pytest.raises(ValueError, match="do not fit each other"):
            CutFit(**(sound | wrong))
