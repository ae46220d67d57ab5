"""What other work on the machine costs a merge: alone, and beside a busy process on every core.

    python tests/bench/busy_cost.py [--rules linear,recurrent-kif] [--repeats 3] [--json FILE]

The others compute without end, so that a merge gets half of every core. One that takes no more CPU
seconds than alone, and at most twice as long, loses nothing else to them: its threads do not spin
or wait for each other. Each merge runs alone and beside them in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from checkpoints import add_shape_options, build, shape_of
from peers import RULES, our_job
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

ALONE, BUSY = "alone", "busy"
_BUSY_PROGRAM = "while True: pass"


@contextlib.contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """As many processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY_PROGRAM]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure_both(jobs: Sequence[Job], repeats: int, work: Path) -> dict[str, dict[str, list[Cost]]]:
    """Rule -> alone or busy -> a cost of each round."""
    found: dict[str, dict[str, list[Cost]]] = {job.name: {ALONE: [], BUSY: []} for job in jobs}
    for _ in range(repeats):
        for job in jobs:
            for name, number in ((ALONE, 0), (BUSY, machine()["cores"])):
                told = replace(job, name=f"{job.name}, {name}")
                with busy_cores(number):
                    found[job.name][name] += measure_in_turn([told], 1, work)[told.name]
    return found


def ratio(found: Mapping[str, Sequence[Cost]], what: str) -> float:
    """Busy over alone, median over the rounds."""
    pairs = zip(found[BUSY], found[ALONE], strict=True)
    return statistics.median(getattr(busy, what) / getattr(alone, what) for busy, alone in pairs)


def row(rule: str, found: Mapping[str, Sequence[Cost]]) -> dict[str, str]:
    alone, busy = medians(found[ALONE]), medians(found[BUSY])
    return {
        "rule": rule,
        "wall s": f"{alone['wall']:.2f}",
        "busy": f"{busy['wall']:.2f}",
        "times": f"{ratio(found, 'wall'):.2f}",
        "CPU s": f"{alone['cpu']:.2f}",
        "busy ": f"{busy['cpu']:.2f}",
        "times ": f"{ratio(found, 'cpu'):.2f}",
        "RSS MB": f"{alone['peak_rss'] / 1e6:.0f}",
        "busy  ": f"{busy['peak_rss'] / 1e6:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    add_shape_options(parser)
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--json", type=Path, help="default: busy-cost.json in --work")
    arguments = parser.parse_args()
    work, shape = arguments.work.resolve(), shape_of(arguments)
    check_disk(work, shape.size_bytes * 5)
    inputs = build(work, shape, 2, "--masks")
    out = work / "out" / "merged"
    out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [our_job(rule, inputs, out) for rule in arguments.rules]
    costs = measure_both(jobs, arguments.repeats, work)
    print(f"each beside {machine()['cores']} busy processes on as many cores")
    print_table([row(rule, found) for rule, found in costs.items()])
    content = {
        "shape": asdict(shape),
        "ratios": {
            rule: {what: ratio(found, what) for what in ("wall", "cpu", "peak_rss")}
            for rule, found in costs.items()
        },
        "runs": {
            rule: {name: [asdict(cost) for cost in runs] for name, runs in found.items()}
            for rule, found in costs.items()
        },
    }
    write_results(arguments.json or work / "busy-cost.json", content)


if __name__ == "__main__":
    main()
