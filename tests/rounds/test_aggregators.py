"""Aggregators against NumPy and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from torch import Tensor

from raycloud.rounds.aggregators import AGGREGATORS, TRIM, coverage_mean, mean, median, trimmed_mean
from raycloud.rounds.contribution import Contribution


def contributions(count: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    samples = torch.randint(1, 1000, (count,), generator=generator).tolist()
    return [Contribution({"w": draw(3, 4), "b": draw(5), "scale": draw()}, number) for number in samples]


def stacked(given: list[Contribution], name: str) -> Any:
    return np.stack([one.weights[name].double().numpy() for one in given])


@pytest.mark.parametrize("count", range(1, 12))
def test_aggregates_are_those_of_numpy_and_scipy(count: int) -> None:
    given = contributions(count, seed=count)
    samples = [one.samples for one in given]
    for name in ("w", "b", "scale"):
        values = stacked(given, name)
        assert_allclose(mean(given)[name], np.average(values, axis=0, weights=samples), rtol=1e-5, atol=1e-6)
        assert_allclose(trimmed_mean(given)[name], stats.trim_mean(values, TRIM, axis=0), rtol=1e-5, atol=1e-6)
        assert_allclose(median(given)[name], np.median(values, axis=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_and_half_precision_is_computed_in_float32(name: Any, dtype: torch.dtype) -> None:
    given = contributions(6, seed=1, dtype=dtype)
    ours = AGGREGATORS[name](given)["w"]
    wide = [Contribution({"w": one.weights["w"].double()}, one.samples) for one in given]
    wanted = AGGREGATORS[name](wide)["w"]
    assert ours.dtype == dtype
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 0.0}[dtype]
    assert_allclose(ours.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_coordinates_stay_whole_numbers(name: Any) -> None:
    at = torch.tensor([3, 7])
    given = [Contribution({"w": torch.tensor([float(value)]), "at": at}, 1) for value in range(3)]
    merged = AGGREGATORS[name](given)
    assert merged["at"].tolist() == [3, 7] and merged["at"].dtype == torch.long
    assert merged["w"].tolist() == [1.0]


def test_inputs_stay_as_they_are() -> None:
    given = contributions(5, seed=3)
    before = [one.weights["w"].clone() for one in given]
    for aggregate in AGGREGATORS.values():
        aggregate(given)
    coverage_mean(given, given[0].weights)
    assert all(torch.equal(one.weights["w"], old) for one, old in zip(given, before, strict=True))


def test_a_few_edges_with_wrong_weights_do_not_move_trimmed_mean_and_median() -> None:
    sound = [Contribution({"w": torch.ones(2)}, 1) for _ in range(8)]
    wrong = [Contribution({"w": torch.full((2,), value)}, 10**6) for value in (1e9, -1e9)]
    assert trimmed_mean([*wrong, *sound])["w"].tolist() == median([*wrong, *sound])["w"].tolist() == [1.0, 1.0]


@st.composite
def covered(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[Contribution]]:
    """Former weights, and contributions that lack tensors or have rows, columns or both of them."""
    shapes = {"matrix": (draw(st.integers(1, 5)), draw(st.integers(1, 5))), "row": (4,), "other": (2, 2)}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    former = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given = []
    for _ in range(draw(st.integers(0, 4))):
        weights, index = {}, {}
        for name, shape in shapes.items():
            if not draw(st.booleans()):
                continue
            cut = {
                dimension: torch.tensor(
                    draw(st.lists(st.integers(0, size - 1), unique=True, max_size=size)), dtype=torch.int64
                )
                for dimension, size in enumerate(shape)
                if draw(st.booleans())
            }
            part = [len(cut[dimension]) if dimension in cut else size for dimension, size in enumerate(shape)]
            weights[name], index[name] = torch.randn(part, generator=generator), cut
        given.append(Contribution(weights, draw(st.integers(1, 100)), index))
    return former, given


@settings(max_examples=100, deadline=None)
@given(covered())
def test_each_number_is_averaged_over_those_that_have_it(case: tuple[dict[str, Tensor], list[Contribution]]) -> None:
    former, given = case
    merged = coverage_mean(given, former)
    for name, whole in former.items():
        values: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for one in given:
            if name not in one.weights:
                continue
            part = one.weights[name].numpy()
            for at in np.ndindex(part.shape):
                where = tuple(
                    int(one.index[name][dimension][place]) if dimension in one.index[name] else place
                    for dimension, place in enumerate(at)
                )
                values.setdefault(where, []).append((one.samples, float(part[at])))
        assert (name in merged) == any(name in one.weights for one in given)
        ours = merged.get(name, whole)
        for where in np.ndindex(tuple(whole.shape)):
            if where in values:
                samples, numbers = zip(*values[where], strict=True)
                assert_allclose(float(ours[where]), np.average(numbers, weights=samples), rtol=1e-4, atol=1e-5)
            else:
                assert float(ours[where]) == float(whole[where])


def test_whole_contributions_have_the_mean_by_samples() -> None:
    given = contributions(4, seed=5)
    ours, wanted = coverage_mean(given, given[0].weights), mean(given)
    assert all(torch.allclose(ours[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted)
