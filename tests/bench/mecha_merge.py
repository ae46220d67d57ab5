"""A merge by sd-mecha, run by the Python that it is installed in: see peers.py.

It computes in float32 on as many threads as it chooses, both its defaults, and writes bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sd_mecha
import torch


def recipe(arguments: argparse.Namespace) -> Any:
    """The rule as sd-mecha names it: weighted sum, added differences, TIES on their sum."""
    models = [sd_mecha.model(path) for path in arguments.model]
    weights = arguments.weight
    if arguments.rule == "linear":
        if len(models) == 2:
            return sd_mecha.weighted_sum(*models, alpha=weights[1] / sum(weights))
        if len(set(weights)) > 1:
            raise SystemExit("linear: expected equal weights where there are not two models")
        return sd_mecha.n_average(*models)
    base = sd_mecha.model(arguments.base)
    if arguments.rule == "ties":
        # The sign of the sum, as the paper and mergekit elect it, not that of more models.
        return base + sd_mecha.ties_sum(
            *(m - base for m in models), k=arguments.density, vote_sgn=True
        )
    merged = base
    for model, weight in zip(models, weights, strict=True):
        merged = merged + (model - base) * weight  # its add_difference takes no sum of these
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", choices=("linear", "task-arithmetic", "ties"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--model", type=Path, action="append")
    parser.add_argument("--weight", type=float, action="append")
    parser.add_argument("--density", type=float)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    out = arguments.out / "model.safetensors"
    sd_mecha.merge(recipe(arguments), output=out.absolute(), output_dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
