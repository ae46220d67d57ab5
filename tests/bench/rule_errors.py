"""How exact a merge is: the error of each rule against float64, ours and mergekit's.

    python tests/bench/rule_errors.py [--mergekit /path/to/mergekit-yaml] [--json FILE]
        [--size 0.05] [--models 3]

Errors are in units of the output's last place: that of a bfloat16 at the exact result (or, where
the inputs cancel, at 1/256 of the largest of them). Rounding the exact result once gives at most
0.5; an entry differs where it is not the exact result rounded once.
mergekit runs twice, computing in bfloat16 and in float32, and writes bfloat16 both times.

The exact result of ties keeps of each task vector the ceil(density * n) largest of n elements and
those as large as the smallest of them, elects the sign of their sum, and adds the mean of those of
that sign. Where an element is as large as the smallest one kept, or the sum is 0, the paper leaves
the choice open: errors there are counted apart.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import Built, add_shape_options, build, shape_of
from peers import DENSITY, PEER_RULES, mergekit_command, our_command
from processes import print_table, write_results
from safetensors import safe_open
from torch import Tensor

_MANTISSA_BITS = 8  # of bfloat16, the hidden one counted
_CANCELLED = (
    256.0  # where the result is so much smaller than an input, float32 shows its limits too
)
_LEAST_EXPONENT = -133  # of the last place of its smallest numbers
_MIDPOINT = 0.5 + 2.0**-8  # farther off than this, more was lost than the side of a midpoint

REASONS = {
    "midpoint": "the exact result lies within 1/256 of a last place of the middle between two "
    "numbers, and what was computed fell to the other side of it",
    "rounded on the way": "weights, changes, products or sums were rounded to the precision of "
    "the computation before the result was",
    "at the cut": "the element of some model is as large as the smallest one kept: one keeps all "
    "of these, the other as many as fill the count, by the order of its sort",
    "no majority": "the kept changes, as the tool rounds them, add up to 0, so either sign may be "
    "elected",
}


@dataclass(frozen=True, slots=True)
class Exact:
    """The float64 result of a rule, flat, and where it is open to choice.

    Attributes:
        values: float64.
        at_cut: bool, where one more or one fewer element may have been kept.
        no_majority: bool, where the kept elements add up to 0 and some are not 0.
    """

    values: Tensor
    at_cut: Tensor
    no_majority: Tensor


def tenths_of(rule: str, num_models: int) -> list[int]:
    """Weights of the models, in tenths: sums of whole numbers are exact, and divided once."""
    return (
        [3 + 2 * n for n in range(num_models)] if rule == "task-arithmetic" else [10] * num_models
    )


def exact_result(
    rule: str,
    base: Tensor,
    models: Sequence[Tensor],
    tenths: Sequence[int],
    *,
    delta_dtype: torch.dtype,
) -> Exact:
    """The rule in float64; ``delta_dtype`` says how a tool rounds changes before it cuts."""
    nowhere = torch.zeros_like(base, dtype=torch.bool)
    if rule == "linear":
        total = torch.stack([w * model for w, model in zip(tenths, models, strict=True)]).sum(0)
        return Exact(total / sum(tenths), nowhere, nowhere)
    vectors = [model - base for model in models]
    if rule == "task-arithmetic":
        change = torch.stack([w * v for w, v in zip(tenths, vectors, strict=True)]).sum(0)
        return Exact((10 * base + change) / 10, nowhere, nowhere)
    at_cut, kept = nowhere, []
    for vector in vectors:
        sizes = vector.abs()
        smallest = smallest_kept(sizes, math.ceil(DENSITY * sizes.numel()))
        kept.append(torch.where(sizes >= smallest, vector, 0.0))
        rounded = sizes.to(delta_dtype)
        for count in (math.floor, math.ceil):
            num_kept = max(count(DENSITY * sizes.numel()), 1)
            at_cut = at_cut | (rounded == smallest_kept(rounded, num_kept))
    stacked = torch.stack(kept)
    total = stacked.sum(0)
    agreeing = stacked.sign() == torch.where(total >= 0, 1.0, -1.0)
    number = agreeing.sum(0).clamp(min=1)
    values = (number * base + (stacked * agreeing).sum(0)) / number
    rounded_total = stacked.to(delta_dtype).double().sum(0)
    undecided = ((total == 0) | (rounded_total == 0)) & (stacked != 0).any(0)
    return Exact(values, at_cut, undecided)


def smallest_kept(sizes: Tensor, num_kept: int) -> Tensor:
    return sizes.float().kthvalue(sizes.numel() - num_kept + 1).values.to(sizes.dtype)


def last_place(values: Tensor) -> Tensor:
    """The distance of neighbouring bfloat16 numbers at float64 values."""
    exponent = torch.frexp(values).exponent.to(torch.int64) - _MANTISSA_BITS
    return torch.ldexp(torch.ones_like(values), exponent.clamp(min=_LEAST_EXPONENT))


@dataclass(slots=True)
class Errors:
    """Of one tool and rule, added up over tensors.

    Attributes:
        num_entries: compared.
        num_open: of them, where the rule leaves a choice.
        num_differing: entries that are not the exact result rounded once.
        largest: error where the rule leaves no choice.
        sum_of_squares: of those errors.
        reasons: entries that differ, by why.
    """

    num_entries: int = 0
    num_open: int = 0
    num_differing: int = 0
    largest: float = 0.0
    sum_of_squares: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, found: Tensor, exact: Exact, largest_input: Tensor) -> None:
        own_unit = last_place(exact.values)
        differs = found != (exact.values / own_unit).round() * own_unit
        unit = torch.maximum(own_unit, last_place(largest_input / _CANCELLED))
        errors = ((found - exact.values) / unit).abs()
        is_open = exact.at_cut | exact.no_majority
        settled = errors[~is_open]
        self.num_entries += found.numel()
        self.num_open += int(is_open.sum())
        self.num_differing += int(differs.sum())
        if settled.numel():
            self.largest = max(self.largest, float(settled.max()))
        self.sum_of_squares += float(settled.square().sum())
        where = {
            "at the cut": exact.at_cut,
            "no majority": exact.no_majority & ~exact.at_cut,
            "midpoint": ~is_open & (errors <= _MIDPOINT),
            "rounded on the way": ~is_open & (errors > _MIDPOINT),
        }
        for reason, mask in where.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + int((differs & mask).sum())

    def figures(self) -> dict[str, float]:
        num_settled = max(self.num_entries - self.num_open, 1)
        return {
            "largest": self.largest,
            "rms": math.sqrt(self.sum_of_squares / num_settled),
            "differing": self.num_differing / self.num_entries,
            "open": self.num_open / self.num_entries,
            **{f"differing, {why}": n / self.num_entries for why, n in self.reasons.items()},
        }


class Weights:
    """Tensors of a checkpoint, one at a time, flat float64."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(file.keys(), file))

    def names(self) -> Iterator[str]:
        yield from self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        if tensor.dtype != torch.bfloat16:
            raise SystemExit(f"{name}: expected bfloat16, found {tensor.dtype}")
        return tensor.double().reshape(-1)


def errors_of(rule: str, inputs: Built, out: Path, *, delta_dtype: torch.dtype) -> Errors:
    base, result = Weights(inputs.base), Weights(out)
    models = [Weights(model) for model in inputs.models]
    errors = Errors()
    for name in base.names():
        weights = [model[name] for model in models]
        tenths = tenths_of(rule, len(weights))
        exact = exact_result(rule, base[name], weights, tenths, delta_dtype=delta_dtype)
        largest_input = torch.stack([base[name], *weights]).abs().amax(0)
        errors.add(result[name], exact, largest_input)
    return errors


def run(command: Sequence[str | Path], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape_options(parser, size=0.05)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(PEER_RULES))
    parser.add_argument("--mergekit", type=Path, help="its mergekit-yaml")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kifmerge-bench")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work, shape = arguments.work.resolve(), shape_of(arguments)
    inputs = build(work, shape, arguments.models)
    out = work / "out" / "errors"
    found: dict[str, dict[str, float]] = {}
    for rule in arguments.rules:
        weights = [tenths / 10 for tenths in tenths_of(rule, arguments.models)]
        commands = {"kifmerge": our_command(rule, inputs, out, weights)}
        for dtype in ("float32", "bfloat16") if arguments.mergekit else ():
            commands[f"mergekit, {dtype}"] = mergekit_command(
                arguments.mergekit.absolute(), rule, inputs, out, weights,
                dtype=dtype, shard_bytes=shape.shard_bytes,
            )  # fmt: skip
        for tool, command in commands.items():
            run(command, out)
            delta_dtype = torch.bfloat16 if tool.endswith("bfloat16") else torch.float64
            errors = errors_of(rule, inputs, out, delta_dtype=delta_dtype)
            found[f"{rule}: {tool}"] = errors.figures()
    shutil.rmtree(out, ignore_errors=True)
    print(f"{arguments.models} models of {shape.size_bytes / 1e6:.0f} MB, last places of bfloat16")
    print_table([_row(name, figures) for name, figures in found.items()])
    print("\nWhere they differ from the exact result rounded once, as shares of all entries:")
    for name, figures in found.items():
        shares = {k.partition(", ")[2]: v for k, v in figures.items() if k.startswith("differing,")}
        parts = [f"{why} {share:.2%}" for why, share in shares.items() if share]
        print(f"  {name}: {', '.join(parts) or 'nowhere'}")
    print("\nWhy:")
    for why, text in REASONS.items():
        print(f"  {why}: {text}")
    if arguments.json:
        write_results(arguments.json, {"models": arguments.models, "errors": found})


def _row(name: str, figures: dict[str, float]) -> dict[str, str]:
    return {
        "rule: tool": name,
        "largest error": f"{figures['largest']:.4f}",
        "RMS error": f"{figures['rms']:.4f}",
        "differing": f"{figures['differing']:.4%}",
        "open to choice": f"{figures['open']:.3%}",
    }


if __name__ == "__main__":
    main()
