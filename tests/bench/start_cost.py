"""What it costs to start: CPU seconds of the help, and of a merge that moves next to nothing.

    python tests/bench/start_cost.py [--repeats 5] [--json FILE]

All run in turn. "over torch" is what a merge takes above `import torch`: all its own work, of which
the start is the most, for a checkpoint of 1 MB. At the end each merge looks whether it has
imported transformers, which takes longer than many a merge.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from checkpoints import build, tiny_shape
from peers import IMPORT_TORCH, RULES, our_command
from processes import Cost, Job, measure_in_turn, medians, print_table, write_results

PYTHON, HELP, START = "python", "kifmerge --help", "import torch"
MOST_HELP_CPU = 0.3
MOST_MERGE_CPU = 0.5  # above import torch
LIGHT_PROGRAM = """
import runpy, sys
sys.argv = ["kifmerge", *sys.argv[1:]]
try:
    runpy.run_module("kifmerge", run_name="__main__")
except SystemExit as end:
    assert not end.code, end
assert "transformers" not in sys.modules, "a merge has imported transformers"
"""


def jobs_of(work: Path, rules: Sequence[str]) -> list[Job]:
    inputs = build(work, tiny_shape(), 2, "--masks")
    out = work / "out" / "merged"
    out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(name=PYTHON, command=[sys.executable, "-c", "pass"]),
        Job(name=HELP, command=[sys.executable, "-m", "kifmerge", "--help"]),
        Job(name=START, command=IMPORT_TORCH),
    ]
    for rule in rules:
        python, _, _, *words = our_command(rule, inputs, out, [0.5, 0.5])
        jobs.append(Job(name=rule, command=[python, "-c", LIGHT_PROGRAM, *words], out=out))
    return jobs


def row(name: str, runs: Sequence[Cost], start: Sequence[Cost]) -> dict[str, str]:
    typical = medians(runs)
    over = over_torch(runs, start)
    budget = {HELP: (typical["cpu"], MOST_HELP_CPU), **dict.fromkeys(RULES, (over, MOST_MERGE_CPU))}
    found, most = budget.get(name, (0.0, 0.0))
    return {
        "run": name,
        "CPU s": f"{typical['cpu']:.3f}",
        "wall s": f"{typical['wall']:.3f}",
        "RSS MB": f"{typical['peak_rss'] / 1e6:.0f}",
        "over torch, CPU s": f"{over:.3f}" if name in RULES else "",
        "at most": f"{most:g}: {'met' if found <= most else 'not met'}" if most else "",
    }


def over_torch(runs: Sequence[Cost], start: Sequence[Cost]) -> float:
    """CPU seconds, median over the rounds."""
    return statistics.median(a.cpu - b.cpu for a, b in zip(runs, start, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES))
    parser.add_argument("--repeats", type=int, default=5)
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--json", type=Path, help="default: start-cost.json in --work")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    costs = measure_in_turn(jobs_of(work, arguments.rules), arguments.repeats, work)
    print_table([row(name, runs, costs[START]) for name, runs in costs.items()])
    print("no merge has imported transformers")
    content = {
        "medians": {name: medians(runs) for name, runs in costs.items()},
        "over_torch": {rule: over_torch(costs[rule], costs[START]) for rule in arguments.rules},
        "runs": {name: [asdict(cost) for cost in runs] for name, runs in costs.items()},
    }
    write_results(arguments.json or work / "start-cost.json", content)


if __name__ == "__main__":
    main()
