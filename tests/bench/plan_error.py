"""How far the estimates of `merge --dry-run` are from what merges take: processor seconds.

    python tests/bench/plan_error.py WORK [--size 0.6] [--repeats 3]

Synthetic bfloat16 checkpoints, masks and float32 scores are made in WORK once. Each merge runs in
this process, from a warm page cache; of the repeats the cheapest counts. Printed by rule:

    measured, estimated   processor seconds, of all threads together
    error                 of the estimate
    ns                    per parameter and model, what kifmerge/fusion/estimate.py should take
"""

from __future__ import annotations

import argparse
import shutil
import time
import warnings
from pathlib import Path

from checkpoints import Built, Shape, build

from kifmerge.fusion.estimate import model_ns
from kifmerge.fusion.inputs import MergeInputs
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.phases.merge import Merge


def opened(rule: str, inputs: Built, *, with_scores: bool) -> Merge:
    """Two models; those that need to know what matters are given masks, or scores."""
    models = dict(zip(("new", "historical"), inputs.models, strict=True))
    evidence: dict[str, dict[str, Path]] = {}
    if with_scores:
        evidence["importance"] = dict.fromkeys(models, inputs.scores["float32"])
    elif RULES[rule].needs == "masks":
        evidence["masks"] = dict(zip(models, inputs.masks, strict=True))
    base = inputs.base if RULES[rule].needs_base else None
    return Merge(MergeInputs(base=base, models=models, **evidence), FusionOptions(rule=rule))


def measured(rule: str, inputs: Built, out: Path, *, with_scores: bool) -> float:
    merging = opened(rule, inputs, with_scores=with_scores)
    before = time.process_time()
    merging.run(out)
    seconds = time.process_time() - before
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=float, default=0.6, help="GB of one checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    shape = Shape(size_bytes=round(arguments.size * 1e9))
    inputs = build(arguments.work, shape, 2, "--masks", "--scores", "float32")
    print(f"{'':34}{'measured':>10}{'estimated':>11}{'error':>8}{'ns':>7}")
    for rule, law in RULES.items():
        for with_scores in (False, True):
            if with_scores != (law.needs not in ("nothing", "largest")) and law.needs != "masks":
                continue
            merging = opened(rule, inputs, with_scores=with_scores)
            load = merging.load()
            seconds = min(
                measured(rule, inputs, arguments.work / "out", with_scores=with_scores)
                for _ in range(arguments.repeats)
            )
            plan = merging.plan()
            taken_ns = model_ns(rule, is_compiled=plan.computed_by != "torch")
            missing = (seconds - load.processor_seconds) * 1e9 / plan.num_parameters / 2
            name = f"{rule}{', scores' if with_scores else ''}"
            print(
                f"{name:34}{seconds:10.2f}{load.processor_seconds:11.2f}"
                f"{load.processor_seconds / seconds - 1:8.0%}{taken_ns + missing:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
