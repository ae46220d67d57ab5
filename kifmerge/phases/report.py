"""Reports: matrices of scores in, tables for people, spreadsheets and programs out."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kifmerge.tensor.metrics import DEFINITIONS, Cell, Matrix, continual_metrics

REFERENCE_METHOD = "recurrent-kif"
METRIC_NAMES = tuple(DEFINITIONS)

# score name ("score", "own_labels_score") -> method -> seed -> matrix of scores in [0, 1]
Matrices = Mapping[str, Mapping[str, Mapping[int, Matrix]]]


@dataclass(frozen=True, slots=True)
class Report:
    """A finished or partly finished run in figures.

    Attributes:
        name: of the recipe.
        task_names: in the order of learning.
        matrices: of all scores; the primary one is called ``score``.
        num_steps: method -> optimizer steps, inner and outer, of one seed.
        num_nonfinite_steps: method -> steps left out because a gradient was not finite, all seeds.
    """

    name: str
    task_names: Sequence[str]
    matrices: Matrices
    num_steps: Mapping[str, int]
    num_nonfinite_steps: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the definitions of the metrics: content of ``results.json``."""
        return {
            "format": "kifmerge.report",
            "version": 1,
            "name": self.name,
            "tasks": list(self.task_names),
            "definitions": {
                "matrix": "a[i][j] = score on task j after learning task i; row 0 before any",
                **DEFINITIONS,
            },
            "num_steps": dict(self.num_steps),
            "num_nonfinite_steps": dict(self.num_nonfinite_steps),
            "matrices": {
                score: {
                    method: {str(seed): matrix for seed, matrix in by_seed.items()}
                    for method, by_seed in methods.items()
                }
                for score, methods in self.matrices.items()
            },
            "metrics": {
                score: {method: self.summary(score, method) for method in methods}
                for score, methods in self.matrices.items()
            },
        }

    def metric_rows(self) -> list[dict[str, Any]]:
        """One flat row per score, method and seed: content of ``metrics.csv``."""
        return [
            {
                "score": score,
                "method": method,
                "seed": seed,
                **continual_metrics(matrix).as_dict(),
                **{f"final:{n}": c for n, c in zip(self.task_names, matrix[-1], strict=True)},
            }
            for score, methods in self.matrices.items()
            for method, by_seed in methods.items()
            for seed, matrix in by_seed.items()
        ]

    def summary(self, score: str, method: str) -> dict[str, Any]:
        """Mean and standard deviation over seeds of each metric and of each task's final score."""
        by_seed = self.matrices[score][method]
        metrics = [continual_metrics(matrix).as_dict() for matrix in by_seed.values()]
        finals = [matrix[-1] for matrix in by_seed.values()]
        return {
            "num_seeds": len(by_seed),
            **{name: mean_and_deviation(m[name] for m in metrics) for name in METRIC_NAMES},
            "final": {
                task: mean_and_deviation(final[number] for final in finals)
                for number, task in enumerate(self.task_names)
            },
        }

    def paired_differences(self, score: str = "score") -> dict[str, dict[int, float]]:
        """Per seed, OP of Recurrent-KIF minus OP of each other method."""
        methods = self.matrices.get(score, {})
        reference = methods.get(REFERENCE_METHOD, {})
        differences: dict[str, dict[int, float]] = {}
        for method, by_seed in methods.items():
            pairs = {
                seed: (continual_metrics(reference[seed]).op, continual_metrics(matrix).op)
                for seed, matrix in by_seed.items()
                if seed in reference and method != REFERENCE_METHOD
            }
            found = {s: a - b for s, (a, b) in pairs.items() if a is not None and b is not None}
            if found:
                differences[method] = found
        return differences


def mean_and_deviation(cells: Iterable[Cell]) -> dict[str, float] | None:
    """Mean and sample standard deviation; None if a cell is missing.

    >>> mean_and_deviation([0.25, 0.75])["mean"]
    0.5
    """
    values = list(cells)
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None
    deviation = statistics.stdev(present) if len(present) > 1 else 0.0
    return {"mean": statistics.fmean(present), "deviation": deviation}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with common keys as CSV text."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def as_markdown(self) -> str:
        """The table in Markdown, with its title as a heading."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{body}\n"


def report_tables(report: Report) -> list[Table]:
    """The tables of a report: metrics, final scores per task, paired differences."""
    tables = []
    for score, methods in report.matrices.items():
        suffix = "" if score == "score" else ", choosing among the task's own labels"
        summaries = {method: report.summary(score, method) for method in methods}
        tables.append(
            Table(
                f"Metrics in %{suffix}",
                ["method", "seeds", "OP", "BWT", "FWT", "forgetting", "learning accuracy", "steps"],
                [
                    [
                        method,
                        str(summary["num_seeds"]),
                        *(_percent(summary[name]) for name in METRIC_NAMES),
                        str(report.num_steps.get(method, "-")),
                    ]
                    for method, summary in summaries.items()
                ],
            )
        )
        tables.append(
            Table(
                f"Score on each task at the end, in %{suffix}",
                ["method", *report.task_names],
                [
                    [method, *(_percent(cell) for cell in summary["final"].values())]
                    for method, summary in summaries.items()
                ],
            )
        )
    differences = report.paired_differences()
    if any(len(by_seed) > 1 for by_seed in differences.values()):
        tables.append(_difference_table(differences))
    left_out = {m: number for m, number in report.num_nonfinite_steps.items() if number}
    if left_out:
        tables.append(
            Table(
                "Optimizer steps left out: a gradient was not finite",
                ["method", "steps"],
                [[method, str(number)] for method, number in left_out.items()],
            )
        )
    return tables


def overview_table(report: Report) -> Table:
    """One table that shows forgetting at a glance: metrics and final scores side by side."""
    summaries = {method: report.summary("score", method) for method in report.matrices["score"]}
    return Table(
        "After the last task, in %: overall performance (OP), backward transfer (BWT), each task",
        ["method", "OP", "BWT", *report.task_names, "steps"],
        [
            [
                method,
                _percent(summary["op"]),
                _percent(summary["bwt"]),
                *(_percent(cell) for cell in summary["final"].values()),
                str(report.num_steps.get(method, "-")),
            ]
            for method, summary in summaries.items()
        ],
    )


def _difference_table(differences: Mapping[str, Mapping[int, float]]) -> Table:
    return Table(
        f"OP of {REFERENCE_METHOD} minus OP of, in points, seed by seed",
        ["method", "mean", "each seed"],
        [
            [
                method,
                f"{100 * statistics.fmean(by_seed.values()):+.1f}",
                " ".join(f"{100 * value:+.1f}" for value in by_seed.values()),
            ]
            for method, by_seed in differences.items()
        ],
    )


def as_markdown(report: Report) -> str:
    """The whole report as a Markdown page."""
    definitions = "\n".join(f"- {name}: {text}" for name, text in DEFINITIONS.items())
    tables = "\n".join(table.as_markdown() for table in report_tables(report))
    return f"# {report.name}\n\nMean ± standard deviation over seeds.\n\n{tables}\n{definitions}\n"


def _percent(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    if value["deviation"] == 0.0:
        return f"{100 * value['mean']:.1f}"
    return f"{100 * value['mean']:.1f} ± {100 * value['deviation']:.1f}"
