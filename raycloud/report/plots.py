"""Plots as PNG bytes, made without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raycloud.report.numbers import plotted

_COLOURS = ("#3366cc", "#cc5533", "#339966", "#8855bb", "#aa8800", "#447788")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _axes(size: tuple[float, float]) -> tuple[Figure, object]:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def curves(
    series: Mapping[str, Sequence[tuple[float, float | None]]], x: str, y: str, marks: Sequence[float] = ()
) -> bytes:
    """Plot one line per series through its (x, y) points.

    Args:
        series: points by name; lines have gaps where y is None or not finite.
        x: label of the x axis.
        y: label of the y axis.
        marks: x positions of dotted vertical lines.

    Returns:
        A PNG.
    """
    figure, axes = _axes((7.5, 3.6))
    for at in marks:
        axes.axvline(at, color="#777777", linewidth=1.2, linestyle=":")  # type: ignore[attr-defined]
    for (name, points), colour in zip(series.items(), _COLOURS * len(series), strict=False):
        marker = "o" if len(points) == 1 else ""  # a line through one point cannot be seen
        positions, heights = [at for at, _ in points], [plotted(height) for _, height in points]
        axes.plot(positions, heights, label=name, color=colour, linewidth=1.6, marker=marker)  # type: ignore[attr-defined]
    axes.set(xlabel=x, ylabel=y)  # type: ignore[attr-defined]
    axes.legend(frameon=False)  # type: ignore[attr-defined]
    return _png(figure)


def grouped_bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], y: str, fmt: str = "%.0f") -> bytes:
    """Plot bars of several series beside each other for each group.

    Args:
        groups: names of the groups.
        series: one value per group, by name of the series.
        y: label of the y axis.
        fmt: format of the number above each bar.

    Returns:
        A PNG.
    """
    figure, axes = _axes((7.5, 3.6))
    width = 0.8 / len(series)
    for number, ((name, values), colour) in enumerate(zip(series.items(), _COLOURS, strict=False)):
        positions = [index + (number - (len(series) - 1) / 2) * width for index in range(len(groups))]
        drawn = axes.bar(positions, values, width * 0.92, label=name, color=colour)  # type: ignore[attr-defined]
        axes.bar_label(drawn, fmt=fmt, fontsize=8)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(groups)), groups)  # type: ignore[attr-defined]
    axes.set(ylabel=y)  # type: ignore[attr-defined]
    axes.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, 1.15))  # type: ignore[attr-defined]
    return _png(figure)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], y: str) -> bytes:
    """Plot a cell for each row and column, darker for larger values from 0 to 1; the first row is at the bottom.

    Args:
        rows: names of the rows.
        columns: names of the columns.
        values: one value per row and column.
        y: label of the rows.

    Returns:
        A PNG.
    """
    size = (min(12.0, 1.8 + 0.45 * len(columns)), min(12.0, 1.4 + 0.28 * len(rows)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks([at - 0.5 for at in range(len(columns) + 1)], minor=True)
    axes.set_yticks([at - 0.5 for at in range(len(rows) + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.set(ylabel=y)
    return _png(figure)


def points(names: Sequence[str], panels: Mapping[str, Sequence[tuple[float, float] | None]]) -> bytes:
    """Plot panels beside each other, each with a point and an error bar per name, from top to bottom.

    Args:
        names: names of the points.
        panels: (value, deviation) of each name, by label of the panel; None for no point.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(1.6 + 3.0 * len(panels), 1.0 + 0.28 * len(names)), dpi=110, layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, values), colour in zip(row, panels.items(), _COLOURS * len(panels), strict=False):
        for index, value in enumerate(values):
            if value is not None:
                axes.errorbar(value[0], index, xerr=value[1] or None, fmt="o", color=colour, capsize=3, markersize=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", alpha=0.3)
        axes.set(xlabel=label)
    row[0].set_yticks(range(len(names)), names)
    row[0].set_ylim(len(names) - 0.5, -0.5)
    return _png(figure)


def pareto_plot(names: Sequence[str], values: Mapping[str, Sequence[float]], pareto: Sequence[int]) -> bytes:
    """Plot the first quantity against each of the others; points on the Pareto front are coloured and numbered.

    Args:
        names: names of the points.
        values: two or more quantities by name, each with one number per point.
        pareto: indices of the points on the front; they are numbered from 1 in this order, as in the table.

    Returns:
        A PNG.
    """
    (label, ordinates), *others = values.items()
    figure = Figure(figsize=(0.6 + 3.6 * len(others), 3.8), dpi=110, layout="constrained")
    row = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    numbers = {index: number for number, index in enumerate(pareto, 1)}
    for axes, (other, abscissae) in zip(row, others, strict=True):
        for index in range(len(names)):
            x, y, chosen = abscissae[index], ordinates[index], index in numbers
            axes.plot(x, y, "o", color=_COLOURS[0] if chosen else "#bbbbbb", markersize=6 if chosen else 4)
            if chosen:
                axes.annotate(str(numbers[index]), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both", alpha=0.3)
        axes.set(xlabel=other)
    row[0].set(ylabel=label)
    return _png(figure)
