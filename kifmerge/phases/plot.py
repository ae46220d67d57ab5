"""One picture of a report: what is left of the tasks so far, after each task."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path

from kifmerge.phases.report import Report
from kifmerge.tensor.metrics import Matrix


def can_draw() -> bool:
    """Whether the optional matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_report(report: Report, path: Path) -> None:
    """Draw the mean score on the tasks learned so far, one line per method, as PNG.

    Bars are standard deviations over seeds. Methods without intermediate stages get a dot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    positions = range(1, len(report.task_names) + 1)
    for method, by_seed in report.matrices.get("score", {}).items():
        curves = [seen_so_far(matrix) for matrix in by_seed.values()]
        points = [
            (position, [100 * value for value in values if value is not None])
            for position, values in zip(positions, zip(*curves, strict=True), strict=True)
            if None not in values
        ]
        axes.errorbar(
            [position for position, _ in points],
            [statistics.fmean(values) for _, values in points],
            [statistics.pstdev(values) for _, values in points],
            marker="o",
            capsize=3,
            label=method,
        )
    axes.set_xticks(
        list(positions), [f"{n}: {name}" for n, name in enumerate(report.task_names, 1)]
    )
    axes.set_xlabel("after task")
    axes.set_ylabel("mean score on the tasks so far, %")
    axes.set_title(report.name)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def seen_so_far(matrix: Matrix) -> list[float | None]:
    """Mean over tasks 1..i of a[i][j], for each i; None where a cell is missing.

    >>> seen_so_far([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]])
    [1.0, 0.75]
    """
    means: list[float | None] = []
    for number, row in enumerate(matrix[1:], start=1):
        cells = [cell for cell in row[:number] if cell is not None]
        means.append(statistics.fmean(cells) if len(cells) == number else None)
    return means
