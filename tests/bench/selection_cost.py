"""How fast the exact global threshold is found, next to the order statistics of torch and numpy.

    python tests/bench/selection_cost.py [--scores 268000000] [--repeats 3] [--json FILE]

The same scores, of many tensors, in bfloat16 and in float32: over memory, over a snapshot's file in
the page cache, and by `torch.kthvalue` and `numpy.partition`, which need all of them in one tensor
(numpy knows no bfloat16 and is given float32; `torch.quantile` stops at 2^24 values). One thread;
GB/s count the bytes of the scores once, over CPU seconds: they are those of one core. Before the
time is taken, the threshold is compared with those of the others.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from checkpoints import IMPORTANT_FRACTION, SCORE_DTYPES, Shape, build
from processes import check_disk, print_table, write_results
from torch import Tensor

from kifmerge.checkpoint.scores import Scores, open_scores
from kifmerge.fusion.selection import ScoreStream
from kifmerge.tensor.selection import importance_threshold, threshold_rank

TARGET = 1e9  # bytes a second and core


def in_memory(scores: Scores) -> list[Tensor]:
    """Every parameter's scores."""
    return [scores.read(name, 0, scores.info(name).numel) for name in scores.names()]


def ways(scores: Scores) -> dict[str, Callable[[], float]]:
    """Functions that find the threshold."""
    tensors = in_memory(scores)
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    rank = threshold_rank(together.numel(), IMPORTANT_FRACTION)
    array = together.float().numpy()
    return {
        "ours, memory": lambda: importance_threshold(tensors, IMPORTANT_FRACTION).value,
        "ours, file": lambda: importance_threshold(ScoreStream(scores), IMPORTANT_FRACTION).value,
        "torch.kthvalue": lambda: float(torch.kthvalue(together, rank).values),
        "numpy.partition": lambda: float(np.partition(array, rank - 1)[rank - 1]),
    }


def seconds(find: Callable[[], float]) -> float:
    """CPU seconds of this process, the system's included."""
    started = time.process_time()
    find()
    return time.process_time() - started


def measure(
    snapshot: Path, dtype: str, chosen: Sequence[str], repeats: int
) -> dict[str, list[float]]:
    """CPU seconds of each way, in turn."""
    scores = open_scores(str(snapshot))
    found = {name: find for name, find in ways(scores).items() if name in chosen}
    values = {name: find() for name, find in found.items()}
    if len(set(values.values())) > 1:
        raise SystemExit(f"{dtype}: the thresholds differ: {values}")
    rounds = [{name: seconds(find) for name, find in found.items()} for _ in range(repeats)]
    return {name: [costs[name] for costs in rounds] for name in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["ours, memory", "ours, file", "torch.kthvalue", "numpy.partition"]
    parser.add_argument("--scores", type=int, default=268_000_000, help="how many, about")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--json", type=Path, help="default: selection-cost.json in --work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work, shape = arguments.work.resolve(), Shape(size_bytes=2 * arguments.scores)
    check_disk(work, 7 * arguments.scores)
    chosen = [word for dtype in SCORE_DTYPES for word in ("--scores", dtype)]
    inputs = build(work, shape, 0, *chosen)
    results, rows = {}, []
    for dtype, snapshot in inputs.scores.items():
        num_bytes = open_scores(str(snapshot)).num_bytes
        shown = names[: 2 if arguments.no_peers else None]
        for name, costs in measure(snapshot, dtype, shown, arguments.repeats).items():
            cost = statistics.median(costs)
            itemsize = getattr(torch, dtype).itemsize
            results[f"{dtype}: {name}"] = {
                "seconds": costs, "score_bytes": num_bytes, "bytes_per_second": num_bytes / cost,
            }  # fmt: skip
            rows.append(
                {
                    "scores: way": f"{dtype}: {name}",
                    "CPU s": f"{cost:.3f}",
                    "ns/score": f"{cost / num_bytes * itemsize * 1e9:.2f}",
                    "GB/s": f"{num_bytes / cost / 1e9:.2f}",
                    f"{TARGET / 1e9:g} GB/s": _met(num_bytes / cost, name),
                }
            )
    print(f"median of {arguments.repeats}, one thread")
    print_table(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_results(
        arguments.json or work / "selection-cost.json", {"selection": results, "peak_rss": peak}
    )


def _met(rate: float, name: str) -> str:
    if not name.startswith("ours"):
        return ""
    return "met" if rate >= TARGET else "not met"


if __name__ == "__main__":
    main()
