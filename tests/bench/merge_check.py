"""Whether what a tool wrote is the merge it was asked for, in a sample of the tensors.

    python tests/bench/merge_check.py RULE OUT --base BASE --model MODEL --model MODEL

Nobody is to be compared with a tool that did nothing, or something else. All names, shapes and
dtypes must be those of the base; in the sample, nearly all elements must be within some last places
of bfloat16 of the rule's float64 result: rule_errors.py measures the same exactly. Of recurrent-kif
the sample must lie between the models, and be none of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rule_errors import Weights, exact_result, last_place
from torch import Tensor

SAMPLE_TENSORS = 6
MOST_NUMEL = 1 << 22
MOST_LAST_PLACES = 4.0  # mergekit computing in bfloat16 is seldom farther off
MOST_OFF = 0.01  # share of elements farther off than this
CHANGED = 0.05  # share of elements by which a merge differs from each of its inputs, at least
TASK_TENTHS = 5


def sample(weights: Weights) -> list[str]:
    """Some tensors of all kinds that are quick to look at, the same ones each time."""
    small = [name for name in sorted(weights.names()) if weights.numel(name) <= MOST_NUMEL]
    return small[:: max(len(small) // SAMPLE_TENSORS, 1)]


def share_off(rule: str, base: Tensor, models: list[Tensor], found: Tensor) -> float:
    """Share of elements that are not the rule's, where the rule leaves no choice."""
    if rule == "recurrent-kif":
        lowest, highest = torch.stack([base, *models]).aminmax(dim=0)
        unit = last_place(torch.maximum(lowest.abs(), highest.abs()))
        off = (found < lowest - unit) | (found > highest + unit)
        return float(off.double().mean())
    tenths = [TASK_TENTHS if rule == "task-arithmetic" else 10] * len(models)
    exact = exact_result(rule, base, models, tenths, delta_dtype=torch.bfloat16)
    largest_input = torch.stack([base, *models]).abs().amax(0)
    unit = torch.maximum(last_place(exact.values), last_place(largest_input / 256))
    off = (found - exact.values).abs() > MOST_LAST_PLACES * unit
    return float((off & ~exact.at_cut & ~exact.no_majority).double().mean())


def problems(rule: str, out: Path, base_path: Path, model_paths: list[Path]) -> list[str]:
    """What is wrong with an output, one line each."""
    base, result = Weights(base_path), Weights(out)
    models = {path.name: Weights(path) for path in model_paths}
    shapes, expected = ({n: w.shape(n) for n in w.names()} for w in (result, base))
    if shapes != expected:
        differing = {n for n in shapes | expected if shapes.get(n) != expected.get(n)}
        return [f"names or shapes differ from the base: {sorted(differing)[:10]}"]
    found, unchanged = [], dict.fromkeys((base_path.name, *models), 0)
    numel = 0
    for name in sample(base):
        weights = [model[name] for model in models.values()]
        merged = result[name]
        off = share_off(rule, base[name], weights, merged)
        if off > MOST_OFF:
            found.append(f"{name}: {off:.1%} of the elements are not those of {rule}")
        for label, values in zip(unchanged, [base[name], *weights], strict=True):
            unchanged[label] += int((merged == values).sum())
        numel += merged.numel()
    least = numel * (1 - CHANGED)
    found += [f"it is {label}, unchanged" for label, same in unchanged.items() if same > least]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--model", type=Path, action="append", required=True)
    arguments = parser.parse_args()
    found = problems(arguments.rule, arguments.out, arguments.base, arguments.model)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
