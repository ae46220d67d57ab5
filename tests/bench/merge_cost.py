"""What a merge costs, next to copying one checkpoint and to mergekit on the same files.

    python tests/bench/merge_cost.py [--mergekit /path/to/mergekit-yaml] [--json FILE]
        [--size 2.2] [--models 2] [--largest-tensor 272MB] [--shard-size 500MB] [--repeats 3]

Synthetic Llama-shaped bfloat16 checkpoints are made in --work once. Then `cp` of one of them,
`import torch`, and one command per rule run in turn, from a warm page cache until the output is on
the disk. Printed: medians, and the medians of the ratios of each round:

    wall/cp    wall seconds over those of `cp`; "less start" with those of `import torch` taken off
    CPU/peer   CPU seconds over mergekit's; "less start" with `import torch` taken off both

mergekit's own rules are chosen by --peer-rules: its ties sorts every tensor, some 150 ns a weight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints import Built, add_shape_options, build, shape_of
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

RULES = ("linear", "task-arithmetic", "ties", "recurrent-kif")
PEER_RULES = RULES[:3]
DENSITY = 0.2
TASK_WEIGHT = 0.5
COPY, START, PEER_START = "cp", "import torch", "import torch (peer)"

Costs = Mapping[str, Sequence[Cost]]


def our_command(rule: str, inputs: Built, out: Path, weights: Sequence[float]) -> list[str | Path]:
    """``weights``: of the models; only linear and task-arithmetic are given them."""
    command: list[str | Path] = [sys.executable, "-m", "kifmerge", "merge", "--rule", rule]
    models = [word for model in inputs.models for word in ("--model", model)]
    weighed = [*models, *(word for weight in weights for word in ("--weight", repr(weight)))]
    base: list[str | Path] = ["--base", inputs.base]
    chosen = {
        "linear": weighed,
        "task-arithmetic": [*base, *weighed],
        "ties": [*base, *models, "--density", str(DENSITY), "--scope", "tensor"],
        "recurrent-kif": [*base, *_sides(inputs)],
    }
    return [*command, *chosen[rule], "--out", out, "--quiet"]


def _sides(inputs: Built) -> list[str | Path]:
    """Two models as new and historical; more of them by their order."""
    if len(inputs.models) == 2:
        (new, historical), (new_mask, historical_mask) = inputs.models, inputs.masks
        return [
            "--new", new, "--historical", historical, "--new-mask", new_mask,
            "--historical-mask", historical_mask, "--historical-parent", "base",
        ]  # fmt: skip
    pairs = zip(inputs.models, inputs.masks, strict=True)
    return [word for model, mask in pairs for word in ("--model", model, "--mask", mask)]


def peer_config(rule: str, inputs: Built, weights: Sequence[float], *, dtype: str) -> str:
    """mergekit's YAML. Where ``dtype`` is float32 it computes in that, and writes bfloat16 too."""
    lines = [f"merge_method: {rule.replace('-', '_')}", f"dtype: {dtype}", "out_dtype: bfloat16"]
    if rule != "linear":
        lines.append(f"base_model: {inputs.base}")
    lines.append("models:")
    for model, weight in zip(inputs.models, weights, strict=True):
        lines += [f"  - model: {model}", "    parameters:", f"      weight: {weight!r}"]
        lines += [f"      density: {DENSITY}"] * (rule == "ties")
    return "\n".join(lines) + "\n"


def peer_command(
    mergekit: Path,
    rule: str,
    inputs: Built,
    out: Path,
    weights: Sequence[float],
    *,
    dtype: str,
    shard_bytes: int,
) -> list[str | Path]:
    """Write mergekit's configuration beside ``out``; the command that uses it."""
    config = out.with_name(f"{rule}-{dtype}.yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(peer_config(rule, inputs, weights, dtype=dtype))
    shard = f"{shard_bytes // 1_000_000}M"
    return [
        mergekit, config, out, "--no-copy-tokenizer", "--lazy-unpickle", "--out-shard-size", shard,
    ]  # fmt: skip


def interpreter_of(script: Path) -> str:
    """The Python that an installed command runs in, by its first line."""
    with script.open("rb") as file:
        first = file.readline().decode(errors="replace").strip()
    found = first.removeprefix("#!")
    if found == first or not Path(found).is_file():
        raise SystemExit(f"{script}: expected a first line such as #!/path/to/python")
    return found


def jobs_of(arguments: argparse.Namespace, inputs: Built, shard_bytes: int) -> list[Job]:
    out = arguments.work / "out" / "merged"
    out.parent.mkdir(parents=True, exist_ok=True)
    size, checkpoints = weight_bytes(inputs.base), [inputs.base, *inputs.models]
    import_torch = ["-c", "import torch"]
    jobs = [
        Job(
            name=COPY,
            command=["cp", "-r", inputs.base, out],
            out=out,
            inputs=checkpoints[:1],
            weight_bytes=size,
        ),
        Job(name=START, command=[sys.executable, *import_torch]),
    ]
    if arguments.mergekit:
        peer = interpreter_of(arguments.mergekit)
        jobs.append(Job(name=PEER_START, command=[peer, *import_torch]))
    for rule in arguments.rules:
        num_models = len(inputs.models)
        each = {"linear": 1 / num_models, "task-arithmetic": TASK_WEIGHT}.get(rule, 1.0)
        weights = [each] * num_models
        masks = inputs.masks if rule == "recurrent-kif" else ()
        common: dict[str, Any] = {"out": out, "weight_bytes": size}
        common["inputs"] = [*checkpoints[rule == "linear" :], *masks]
        jobs.append(Job(name=rule, command=our_command(rule, inputs, out, weights), **common))
        if arguments.mergekit and rule in arguments.peer_rules:
            command = peer_command(
                arguments.mergekit, rule, inputs, out, weights,
                dtype=arguments.peer_dtype, shard_bytes=shard_bytes,
            )  # fmt: skip
            jobs.append(Job(name=f"mergekit {rule}", command=command, **common))
    return jobs


def ratios(costs: Costs, name: str) -> dict[str, float]:
    """Medians over the rounds of what the table shows for a merge; no peer, no ratio to it."""
    ours, start = costs[name], costs[PEER_START if name.startswith("mergekit") else START]
    rounds = range(len(ours))

    def median(ratio: Callable[[int], float]) -> float:
        return statistics.median(ratio(number) for number in rounds)

    copies = costs[COPY]
    found = {
        "wall/cp": median(lambda n: ours[n].wall / copies[n].wall),
        "wall/cp less start": median(lambda n: (ours[n].wall - start[n].wall) / copies[n].wall),
    }
    peer, peer_start = costs.get(f"mergekit {name}"), costs.get(PEER_START)
    if peer is not None and peer_start is not None:
        found["CPU/peer"] = median(lambda n: ours[n].cpu / peer[n].cpu)
        found["CPU/peer less start"] = median(
            lambda n: (ours[n].cpu - start[n].cpu) / (peer[n].cpu - peer_start[n].cpu)
        )
        found["wall/peer"] = median(lambda n: ours[n].wall / peer[n].wall)
        found["RSS/peer"] = median(lambda n: ours[n].peak_rss / peer[n].peak_rss)
    return found


def table(costs: Costs, merges: Sequence[str]) -> list[dict[str, str]]:
    rows = []
    for name, found in costs.items():
        typical = medians(found)
        row = {
            "run": name,
            "wall s": f"{typical['wall']:.2f}",
            "CPU s": f"{typical['cpu']:.2f}",
            "RSS MB": f"{typical['peak_rss'] / 1e6:.0f}",
            "anon MB": f"{typical['peak_anon'] / 1e6:.0f}",
            **dict.fromkeys(
                ("wall/cp", "wall/cp less start", "CPU/peer", "CPU/peer less start"), ""
            ),
        }
        if name in merges:
            shown = {k: f"{v:.2f}" for k, v in ratios(costs, name).items() if k in row}
            row.update(shown)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    add_shape_options(parser)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES))
    parser.add_argument("--mergekit", type=Path, help="its mergekit-yaml")
    parser.add_argument(
        "--peer-rules", type=lambda text: text.split(","), default=["linear", "task-arithmetic"]
    )
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = {*arguments.rules} - {*RULES} | {*arguments.peer_rules} - {*PEER_RULES}
    if unknown:
        parser.error(f"expected rules among {', '.join(RULES)}, found {', '.join(sorted(unknown))}")
    arguments.work = arguments.work.resolve()
    if arguments.mergekit:
        arguments.mergekit = arguments.mergekit.absolute()
    shape = shape_of(arguments)
    check_disk(arguments.work, shape.size_bytes * 3)  # an output, and a part that is not there yet
    extra = ["--masks"] if "recurrent-kif" in arguments.rules else []
    inputs = build(arguments.work, shape, arguments.models, *extra)
    jobs = jobs_of(arguments, inputs, shape.shard_bytes)
    costs = measure_in_turn(jobs, arguments.repeats, arguments.work)
    merges = [name for name in costs if name not in (COPY, START, PEER_START)]
    largest = max(size[0] * size[-1] for _, size in shape.tensors()) * 2
    print(
        f"{arguments.models} models of {weight_bytes(inputs.base) / 1e9:.2f} GB, largest tensor "
        f"{largest / 1e6:.0f} MB, shards of {shape.shard_bytes / 1e6:.0f} MB, "
        f"median of {arguments.repeats}, load at most "
        f"{max(cost.load for found in costs.values() for cost in found):.1f} "
        f"on {machine()['cores']} cores"
    )
    print_table(table(costs, merges))
    if arguments.json:
        content = {
            "machine": machine(),
            "shape": asdict(shape),
            "models": arguments.models,
            "peer_dtype": arguments.peer_dtype,
            "runs": {name: [asdict(cost) for cost in found] for name, found in costs.items()},
            "medians": {name: medians(found) for name, found in costs.items()},
            "ratios": {name: ratios(costs, name) for name in merges},
        }
        write_results(arguments.json, content)


if __name__ == "__main__":
    main()
