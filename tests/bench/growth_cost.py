"""How the cost of a merge grows: with the size of the checkpoints, and with their number.

    python tests/bench/growth_cost.py [--sizes 0.2,0.5,1,2.2,4.4] [--counts 1,2,4,8] [--json FILE]

Two models of each size are merged, and different numbers of models of one size (--count-size);
all runs take turns. A merge of next to nothing, by the same rule, is the start-up that is taken
off. What is left, divided by the bytes that were read and written, should be constant within 15 %
over sizes, and peak memory within 10 %. With the number of models only what is read grows, which
costs less than what is written: there a straight line should hold within 15 %. Small checkpoints
are merged several times a round.

Inputs are made in --work: some 35 GB for the sizes and counts above. --remove deletes them after.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median

from checkpoints import Shape, build, built, tiny_shape
from peers import our_job
from processes import (
    Cost,
    Job,
    check_disk,
    machine,
    measure_in_turn,
    medians,
    print_table,
    write_results,
)

MOST_WALL_SPREAD = 0.15
MOST_MEMORY_SPREAD = 0.10
PER_GB = ("wall_per_gb", "cpu_per_gb")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A merge of some models of some size.

    Attributes:
        rule: to merge by.
        shape: of the models.
        num_models: merged.
        runs: in a round.
    """

    rule: str
    shape: Shape
    num_models: int = 2
    runs: int = 1

    @property
    def name(self) -> str:
        """Of its job."""
        gigabytes = self.shape.size_bytes / 1e9
        return f"{self.rule}: {self.num_models} of {gigabytes:g} GB"

    def job(self, work: Path) -> Job:
        """That merges."""
        inputs = built(work, self.shape, self.num_models)
        return our_job(self.rule, inputs, work / "out" / "merged", name=self.name)


def growth(
    start: Mapping[str, float], costs: Mapping[str, Sequence[Cost]], points: Sequence[Point]
) -> list[dict[str, float]]:
    """For each point, bytes moved and what a byte takes, start-up taken off."""
    found = []
    for point in points:
        typical = medians(costs[point.name])
        moved = sum(typical[name] - start[name] for name in ("read_bytes", "written_bytes"))
        found.append(
            {
                "size_bytes": point.shape.size_bytes,
                "models": point.num_models,
                "moved_bytes": moved,
                "wall": typical["wall"],
                "cpu": typical["cpu"],
                "peak_rss": typical["peak_rss"],
                "wall_per_gb": (typical["wall"] - start["wall"]) / moved * 1e9,
                "cpu_per_gb": (typical["cpu"] - start["cpu"]) / moved * 1e9,
            }
        )
    return found


def spread(values: Sequence[float]) -> float:
    """How far the farthest value is from the median, as a share of it.

    >>> spread([1.0, 1.1, 0.8])
    0.2
    """
    middle = median(values)
    return round(max(abs(value / middle - 1) for value in values), 6)


def bend(places: Sequence[float], values: Sequence[float]) -> float:
    """How far the farthest value is from a straight line through all, as a share of the line there.

    >>> bend([1, 2, 4], [3.0, 4.0, 6.0])
    0.0
    """
    if len(places) < 2:
        return 0.0
    slope, start = linear_regression(places, values)
    line = [start + slope * place for place in places]
    return round(max(abs(v / on_line - 1) for v, on_line in zip(values, line, strict=True)), 6)


def verdict(rule: str, label: str, found: Sequence[Mapping[str, float]]) -> str:
    rss = spread([point["peak_rss"] for point in found])
    if label == "sizes":
        wall, cpu = (spread([point[name] for point in found]) for name in PER_GB)
        what = "per GB within {:.0%} of its median"
    else:
        counts = [point["models"] for point in found]
        wall, cpu = (bend(counts, [point[name] for point in found]) for name in ("wall", "cpu"))
        what = "within {:.0%} of a straight line"
    return (
        f"{rule}, {label}: wall {what.format(wall)} ({_met(wall, MOST_WALL_SPREAD)}), "
        f"CPU {what.format(cpu)}, memory within {rss:.0%} ({_met(rss, MOST_MEMORY_SPREAD)})"
    )


def _met(found: float, most: float) -> str:
    return f"at most {most:.0%}: {'met' if found <= most else 'NOT MET'}"


def row(rule: str, point: Mapping[str, float]) -> dict[str, str]:
    return {
        "rule": rule,
        "GB": f"{point['size_bytes'] / 1e9:g}",
        "models": f"{point['models']:g}",
        "moved GB": f"{point['moved_bytes'] / 1e9:.2f}",
        "wall s": f"{point['wall']:.2f}",
        "CPU s": f"{point['cpu']:.2f}",
        "wall s/GB": f"{point['wall_per_gb']:.3f}",
        "CPU s/GB": f"{point['cpu_per_gb']:.3f}",
        "RSS MB": f"{point['peak_rss'] / 1e6:.0f}",
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    parser.add_argument("--sizes", type=_numbers, default=[0.2, 0.5, 1.0, 2.2, 4.4], help="GB")
    parser.add_argument("--counts", type=_counts, default=[1, 2, 4, 8], help="of models")
    parser.add_argument("--count-size", type=float, default=1.0, help="GB of each of them")
    parser.add_argument("--rules", default="linear,recurrent-kif", type=lambda t: t.split(","))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most-runs", type=int, default=4, help="of a small merge in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--remove", action="store_true", help="the inputs, when all is measured")
    parser.add_argument("--json", type=Path, help="default: growth-cost.json in --work")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    arguments = parsed()
    work = arguments.work.resolve()

    def point(rule: str, size: float, num_models: int) -> Point:
        shape = Shape(size_bytes=round(size * 1e9), seed=arguments.seed)
        runs = min(max(round(1 / size), 1), arguments.most_runs)
        return Point(rule=rule, shape=shape, num_models=num_models, runs=runs)

    series = {
        rule: {
            "sizes": [point(rule, size, 2) for size in arguments.sizes],
            "models": [point(rule, arguments.count_size, count) for count in arguments.counts],
        }
        for rule in arguments.rules
    }
    tiny = {"shape": tiny_shape(arguments.seed), "runs": arguments.most_runs}
    starts = {rule: Point(rule=rule, **tiny) for rule in series}
    points = {p.name: p for rows in series.values() for several in rows.values() for p in several}
    points |= {point.name: point for point in starts.values()}
    _make(work, list(points.values()))
    jobs = [point.job(work) for point in points.values() for _ in range(point.runs)]
    costs = measure_in_turn(jobs, arguments.repeats, work)

    found = {
        rule: {
            label: growth(medians(costs[starts[rule].name]), costs, several)
            for label, several in rows.items()
        }
        for rule, rows in series.items()
    }
    load = max(cost.load for runs in costs.values() for cost in runs)
    print(
        f"median of {arguments.repeats} rounds, load at most {load:.1f} on "
        f"{machine()['cores']} cores; start-up: "
        + ", ".join(f"{r} {medians(costs[p.name])['wall']:.2f} s" for r, p in starts.items())
    )
    print_table(
        [row(r, p) for r, rows in found.items() for several in rows.values() for p in several]
    )
    print()
    for rule, rows in found.items():
        for label, several in rows.items():
            print(verdict(rule, label, several))
    content = {
        "growth": found,
        "start": {rule: medians(costs[point.name]) for rule, point in starts.items()},
        "runs": {name: [asdict(cost) for cost in runs] for name, runs in costs.items()},
    }
    write_results(arguments.json or work / "growth-cost.json", content)
    if arguments.remove:
        for folder in {point.shape.folder for point in points.values()}:
            shutil.rmtree(work / folder)


def _make(work: Path, points: Sequence[Point]) -> None:
    """Build each shape once, with as many models as any of its points needs."""
    most: dict[Shape, int] = {}
    for point in points:
        most[point.shape] = max(most.get(point.shape, 0), point.num_models)
    largest = max(shape.size_bytes for shape in most)
    missing = {s: n for s, n in most.items() if not (work / s.folder / f"model-{n}").exists()}
    # A base, models, their masks of a sixteenth each; and an output.
    needed = sum(s.size_bytes * (1 + n * 17 // 16) for s, n in missing.items())
    check_disk(work, round(needed + 1.1 * largest))
    extra = ["--masks"] if any(point.rule == "recurrent-kif" for point in points) else []
    for shape, num_models in most.items():
        print(f"{shape.folder}: {num_models} models", file=sys.stderr)
        build(work, shape, num_models, *extra)
    (work / "out").mkdir(exist_ok=True)


if __name__ == "__main__":
    main()
