"""Continual-learning metrics of one matrix of scores.

``a[i][j]`` is the score on task j (1..T) after learning task i; row 0 is before any training. A
cell that was not measured is None, and a metric that needs it is None too: undefined, not zero.

References:
    Lopez-Paz and Ranzato, "Gradient Episodic Memory", 2017, for BWT; forgetting as in Chaudhry et
    al., "Riemannian Walk", 2018, here with the maximum over all rows up to the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

Cell = float | None
Matrix = Sequence[Sequence[Cell]]

DEFINITIONS = {
    "op": "overall performance: mean over tasks j of a[T][j]",
    "bwt": "backward transfer: mean over tasks j < T of a[T][j] - a[j][j]",
    "fwt": "forward transfer: mean over tasks j > 1 of a[j-1][j]",
    "forgetting": "mean over tasks j < T of max over measured i of a[i][j], minus a[T][j]",
    "learning_accuracy": "mean over tasks j of a[j][j]; low values make BWT look good",
}


@dataclass(frozen=True, slots=True)
class ContinualMetrics:
    """The five summaries of a score matrix, in the unit of its cells; None where undefined."""

    op: Cell
    bwt: Cell
    fwt: Cell
    forgetting: Cell
    learning_accuracy: Cell

    def as_dict(self) -> dict[str, Cell]:
        """The metrics by name, in the order of DEFINITIONS."""
        return asdict(self)


def continual_metrics(matrix: Matrix) -> ContinualMetrics:
    """Metrics of a (T+1) x T matrix: row 0 before training, row i after task i.

    Raises:
        ValueError: a matrix of another shape.

    >>> continual_metrics([[0.0, 0.0], [0.9, 0.2], [0.5, 0.8]]).op
    0.65
    >>> round(continual_metrics([[0.0, 0.0], [0.9, 0.2], [0.5, 0.8]]).bwt, 6)
    -0.4
    """
    num_tasks = len(matrix[0]) if matrix else 0
    if len(matrix) != num_tasks + 1 or any(len(row) != num_tasks for row in matrix):
        raise ValueError(
            f"expected T+1 rows of T scores, found rows of {[len(row) for row in matrix]}"
        )
    last = matrix[-1]
    columns = list(zip(*matrix, strict=True))
    diagonal = [matrix[j + 1][j] for j in range(num_tasks)]
    earlier = range(num_tasks - 1)
    return ContinualMetrics(
        op=_mean(last),
        bwt=_mean(_difference(last[j], diagonal[j]) for j in earlier),
        fwt=_mean(matrix[j][j] for j in range(1, num_tasks)),
        forgetting=_mean(_difference(_best(columns[j], j), last[j]) for j in earlier),
        learning_accuracy=_mean(diagonal),
    )


def _mean(cells: Iterable[Cell]) -> Cell:
    values = list(cells)
    present = [value for value in values if value is not None]
    if not values or len(present) < len(values):
        return None
    return sum(present) / len(present)


def _difference(left: Cell, right: Cell) -> Cell:
    return None if left is None or right is None else left - right


def _best(column: Sequence[Cell], task: int) -> Cell:
    """Highest score of a task; only rows before it was learned may be missing."""
    if any(cell is None for cell in column[task + 1 :]):
        return None
    return max(cell for cell in column if cell is not None)
