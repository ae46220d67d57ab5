"""What a mask costs: `kifmerge prune` over a snapshot of scores, next to copying the snapshot.

    python tests/bench/prune_cost.py [--size 2.2] [--repeats 3] [--json FILE]

--size is that of the bfloat16 model the scores belong to: 2.2 GB are 1.1 billion scores, kept in
bfloat16 and in float32. Printed for each: `cp` of the snapshot, `kifmerge prune`, and the search of
the threshold alone, without digest and mask. All are medians; "read GB" counts every pass, GB/s and
GB/CPU s are how fast that was read, `import torch` taken off.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from checkpoints import IMPORTANT_FRACTION, SCORE_DTYPES, add_shape_options, build, shape_of
from peers import IMPORT_TORCH
from processes import (
    Cost,
    Job,
    check_disk,
    machine,
    measure_in_turn,
    medians,
    print_table,
    weight_bytes,
    write_results,
)

START = "import torch"

THRESHOLD_PROGRAM = f"""
import sys
from kifmerge.checkpoint.scores import open_scores
from kifmerge.checkpoint.workers import worker_pool
from kifmerge.fusion.selection import mark_important

with worker_pool() as workers:
    scores = open_scores(sys.argv[1])
    mark_important(scores, {IMPORTANT_FRACTION}, "global", "new", workers=workers)
"""


def jobs_of(snapshots: Mapping[str, Path], out: Path) -> list[Job]:
    jobs = [Job(name=START, command=IMPORT_TORCH)]
    for dtype, snapshot in snapshots.items():
        jobs += [
            Job(
                name=f"{dtype}: cp",
                command=["cp", "-r", snapshot, out],
                out=out,
                inputs=[snapshot],
                weight_bytes=weight_bytes(snapshot),
            ),
            Job(
                name=f"{dtype}: prune",
                command=[
                    sys.executable, "-m", "kifmerge", "prune", "--importance", snapshot,
                    "--important-fraction", str(IMPORTANT_FRACTION), "--out", out, "--quiet",
                ],
                out=out,
                inputs=[snapshot],
            ),
            Job(
                name=f"{dtype}: threshold",
                command=[sys.executable, "-c", THRESHOLD_PROGRAM, snapshot],
                inputs=[snapshot],
            ),
        ]  # fmt: skip
    return jobs


def rates(costs: Mapping[str, Sequence[Cost]], name: str) -> dict[str, float]:
    """Medians over the rounds; bytes per second less the time that starting takes."""
    found: dict[str, list[float]] = {"bytes_per_second": [], "bytes_per_cpu_second": []}
    for cost, start in zip(costs[name], costs[START], strict=True):
        num_bytes = cost.read_bytes - start.read_bytes
        found["bytes_per_second"].append(num_bytes / (cost.wall - start.wall))
        found["bytes_per_cpu_second"].append(num_bytes / (cost.cpu - start.cpu))
    return {rate: statistics.median(values) for rate, values in found.items()}


def table(costs: Mapping[str, Sequence[Cost]]) -> list[dict[str, str]]:
    rows = []
    for name, found in costs.items():
        typical = medians(found)
        row = {
            "run": name,
            "wall s": f"{typical['wall']:.2f}",
            "CPU s": f"{typical['cpu']:.2f}",
            "RSS MB": f"{typical['peak_rss'] / 1e6:.0f}",
            "anon MB": f"{typical['peak_anon'] / 1e6:.0f}",
            "read GB": f"{typical['read_bytes'] / 1e9:.2f}",
            "GB/s": "",
            "GB/CPU s": "",
        }
        if name.endswith(("prune", "threshold")):
            found_rates = rates(costs, name)
            row["GB/s"] = f"{found_rates['bytes_per_second'] / 1e9:.2f}"
            row["GB/CPU s"] = f"{found_rates['bytes_per_cpu_second'] / 1e9:.2f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work, shape = arguments.work.resolve(), shape_of(arguments)
    chosen = [word for dtype in SCORE_DTYPES for word in ("--scores", dtype)]
    check_disk(work, shape.size_bytes * 5)  # snapshots, and a copy of the larger one
    inputs = build(work, shape, 0, *chosen)
    out = work / "out" / "mask"
    out.parent.mkdir(parents=True, exist_ok=True)
    costs = measure_in_turn(jobs_of(inputs.scores, out), arguments.repeats, work)
    num_scores = weight_bytes(inputs.scores["float32"]) // 4
    print(f"{num_scores:,} scores, median of {arguments.repeats}, {machine()['cores']} cores")
    print_table(table(costs))
    if arguments.json:
        content = {
            "scores": num_scores,
            "runs": {name: [asdict(cost) for cost in found] for name, found in costs.items()},
            "medians": {name: medians(found) for name, found in costs.items()},
            "rates": {
                name: rates(costs, name) for name in costs if name.endswith(("prune", "threshold"))
            },
        }
        write_results(arguments.json, content)


if __name__ == "__main__":
    main()
