"""What a merge costs, next to copying one checkpoint and to the peers on the same tensors.

    python tests/bench/merge_cost.py [--peers [VENV]] [--json FILE]
        [--size 2.2] [--models 2] [--largest-tensor 272MB] [--shard-size 500MB] [--repeats 3]

Synthetic Llama-shaped bfloat16 checkpoints are made in --work once. Then `cp` of one of them,
`import torch`, and one command per rule run in turn, from a warm page cache until the output is on
the disk. What each wrote is checked against the rule in the first round: see merge_check.py.

--peers runs mergekit 0.1.4 and sd-mecha 1.1.8 too, from a virtual environment that is made where
there is none (in --work, unless VENV says where). mergekit merges the same shards in --peer-dtype;
sd-mecha merges single files of the same tensors, computes in float32, and its output has neither
index nor configuration. Their ties take minutes, and run in the first round alone.

Printed: medians, and the medians of the ratios of each round:

    wall/cp    wall seconds over those of `cp`; "less start" with those of `import torch` taken off
    CPU/...    our CPU seconds over the peer's; "less start" with `import torch` taken off both

and how far each rule is from what moving its bytes takes at the rates of this machine, which are
measured in each round: see limits.py.
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

from checkpoints import Built, Shape, add_shape_options, build, shape_of
from limits import Floor, Rates, floor_of, measure_rates, median_rates
from peers import (
    IMPORT_TORCH,
    PEER_RULES,
    RULES,
    Peers,
    install_peers,
    mecha_command,
    mergekit_command,
    our_command,
    read_by,
)
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

TASK_WEIGHT = 0.5
COPY, START, PEER_START = "cp", "import torch", "import torch (peers)"
PEERS = ("mergekit", "sd-mecha")
CHECK_PROGRAM = Path(__file__).with_name("merge_check.py")

Costs = Mapping[str, Sequence[Cost]]


def jobs_of(
    arguments: argparse.Namespace, inputs: Built, shape: Shape, peers: Peers | None
) -> list[Job]:
    out = arguments.work / "out" / "merged"
    out.parent.mkdir(parents=True, exist_ok=True)
    size = weight_bytes(inputs.base)
    copied = ["cp", "-r", inputs.base, out]
    jobs = [
        Job(name=COPY, command=copied, out=out, inputs=[inputs.base], weight_bytes=size),
        Job(name=START, command=IMPORT_TORCH),
    ]
    if peers:
        jobs.append(Job(name=PEER_START, command=[peers.python, "-c", "import torch"]))
    for rule in arguments.rules:
        models = [word for model in inputs.models for word in ("--model", model)]
        common: dict[str, Any] = {
            "out": out,
            "weight_bytes": size,
            "inputs": read_by(rule, inputs),
            "check": [sys.executable, CHECK_PROGRAM, rule, out, "--base", inputs.base, *models],
        }
        weights = _weights(rule, len(inputs.models))
        jobs.append(Job(name=rule, command=our_command(rule, inputs, out, weights), **common))
        if not peers or rule not in arguments.peer_rules:
            continue
        commands = {
            "mergekit": mergekit_command(
                peers.mergekit, rule, inputs, out, weights,
                dtype=arguments.peer_dtype, shard_bytes=shape.shard_bytes,
            ),
            "sd-mecha": mecha_command(peers, rule, inputs, out, weights),
        }  # fmt: skip
        rounds = 1 if rule == "ties" else None
        for peer, command in commands.items():
            name = f"{peer} {rule}"
            jobs.append(Job(name=name, command=command, most_rounds=rounds, **common))
    return jobs


def _weights(rule: str, num_models: int) -> list[float]:
    each = {"linear": 1 / num_models, "task-arithmetic": TASK_WEIGHT}.get(rule, 1.0)
    return [each] * num_models


def ratios(costs: Costs, name: str) -> dict[str, float]:
    """Medians over the rounds of what the table shows for a merge; no peer, no ratio to it."""
    ours, copies = costs[name], costs[COPY]
    start = costs[PEER_START if name.startswith(PEERS) else START]

    def median(ratio: Callable[[int], float]) -> float:
        return statistics.median(ratio(number) for number in range(len(ours)))

    found = {
        "wall/cp": median(lambda n: ours[n].wall / copies[n].wall),
        "wall/cp less start": median(lambda n: (ours[n].wall - start[n].wall) / copies[n].wall),
    }
    for label in PEERS:
        peer = costs.get(f"{label} {name}")
        if peer is not None:
            found |= _ratios_to(label, ours, start, peer, costs[PEER_START])
    return found


def _ratios_to(
    label: str,
    ours: Sequence[Cost],
    start: Sequence[Cost],
    peer: Sequence[Cost],
    peer_start: Sequence[Cost],
) -> dict[str, float]:
    """Ours over the peer's, of the rounds that the peer was run in."""
    rounds = list(zip(ours, start, peer, peer_start, strict=False))
    less_start = ((a.cpu - b.cpu) / (c.cpu - d.cpu) for a, b, c, d in rounds)
    return {
        f"CPU/{label}": statistics.median(a.cpu / c.cpu for a, _, c, _ in rounds),
        f"CPU/{label} less start": statistics.median(less_start),
        f"wall/{label}": statistics.median(a.wall / c.wall for a, _, c, _ in rounds),
        f"RSS/{label}": statistics.median(a.peak_rss / c.peak_rss for a, _, c, _ in rounds),
    }


def table(costs: Costs, merges: Sequence[str]) -> list[dict[str, str]]:
    with_peers = [peer for peer in PEERS if any(name.startswith(peer) for name in costs)]
    shown = ["wall/cp", "wall/cp less start"]
    for peer in with_peers:
        shown += [f"CPU/{peer}", f"wall/{peer}", f"RSS/{peer}"]
    rows = []
    for name, found in costs.items():
        typical = medians(found)
        row = {
            "run": name,
            "wall s": f"{typical['wall']:.2f}",
            "CPU s": f"{typical['cpu']:.2f}",
            "RSS MB": f"{typical['peak_rss'] / 1e6:.0f}",
            "anon MB": f"{typical['peak_anon'] / 1e6:.0f}",
            **dict.fromkeys(shown, ""),
        }
        if name in merges:
            row |= {k: f"{v:.2f}" for k, v in ratios(costs, name).items() if k in shown}
        rows.append(row)
    return rows


def floors(costs: Costs, jobs: Sequence[Job], rates: Rates) -> dict[str, dict[str, float]]:
    """For our merges: what moving their bytes takes at least, and what they took, start taken off.

    Bytes are those that the process asked the system to read and write.
    """
    found, start = {}, medians(costs[START])
    for job in jobs:
        if job.name not in RULES:
            continue
        typical = medians(costs[job.name])
        read = typical["read_bytes"] - start["read_bytes"]
        floor: Floor = floor_of(
            rates,
            read_bytes=read,
            input_bytes=sum(map(weight_bytes, job.inputs)),
            written_bytes=typical["written_bytes"],
            cores=machine()["cores"],
        )
        found[job.name] = {
            "read_bytes": read,
            "written_bytes": typical["written_bytes"],
            "least_cpu": floor.cpu,
            "least_disk": floor.disk,
            "least_wall": floor.wall,
            "cpu": typical["cpu"] - start["cpu"],
            "wall": typical["wall"] - start["wall"],
        }
    return found


def floor_row(rule: str, found: Mapping[str, float]) -> dict[str, str]:
    return {
        "rule": rule,
        "read GB": f"{found['read_bytes'] / 1e9:.2f}",
        "written GB": f"{found['written_bytes'] / 1e9:.2f}",
        "least CPU s": f"{found['least_cpu']:.2f}",
        "CPU s": f"{found['cpu']:.2f}",
        "times": f"{found['cpu'] / found['least_cpu']:.2f}",
        "disk s": f"{found['least_disk']:.2f}",
        "least wall s": f"{found['least_wall']:.2f}",
        "wall s": f"{found['wall']:.2f}",
        "times ": f"{found['wall'] / found['least_wall']:.2f}",
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_work = Path(tempfile.gettempdir()) / "kifmerge-bench"
    add_shape_options(parser)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--rules", type=_names, default=list(RULES))
    parser.add_argument("--peers", type=Path, nargs="?", const=Path(), help="their environment")
    parser.add_argument("--peer-rules", type=_names, default=list(PEER_RULES))
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=default_work, help="inputs are kept there")
    parser.add_argument("--json", type=Path, help="default: merge-cost.json in --work")
    arguments = parser.parse_args()
    unknown = {*arguments.rules} - {*RULES} | {*arguments.peer_rules} - {*PEER_RULES}
    if unknown:
        parser.error(f"expected rules among {', '.join(RULES)}, found {', '.join(sorted(unknown))}")
    arguments.work = arguments.work.resolve()
    return arguments


def _names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    arguments = parsed()
    work, shape = arguments.work, shape_of(arguments)
    num_inputs = arguments.models + 1
    check_disk(work, shape.size_bytes * (num_inputs * (1 + (arguments.peers is not None)) + 2))
    peers = None
    if arguments.peers is not None:
        default = arguments.peers == Path()
        peers = install_peers(work / "peers" if default else arguments.peers)
    extra = ["--masks"] if "recurrent-kif" in arguments.rules else []
    inputs = build(work, shape, arguments.models, *extra)
    jobs, rates = jobs_of(arguments, inputs, shape, peers), []
    size = weight_bytes(inputs.base)
    costs = measure_in_turn(
        jobs, arguments.repeats, work, before_round=lambda: rates.append(measure_rates(work, size))
    )
    merges = [name for name in costs if name not in (COPY, START, PEER_START)]
    largest = max(numbers[0] * numbers[-1] for _, numbers in shape.tensors()) * 2
    load = max(cost.load for found in costs.values() for cost in found)
    print(
        f"{arguments.models} models of {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, "
        f"shards of {shape.shard_bytes / 1e6:.0f} MB, median of {arguments.repeats}, "
        f"load at most {load:.1f} on {machine()['cores']} cores"
    )
    print_table(table(costs, merges))
    typical = median_rates(rates)
    found = floors(costs, jobs, typical)
    print("\nThe limit of this machine, `import torch` taken off:")
    print_table([floor_row(rule, numbers) for rule, numbers in found.items()])
    shown = ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in asdict(typical).items())
    print(f"GB/s of one core: {shown}")
    content = {
        "shape": asdict(shape),
        "models": arguments.models,
        "peer_dtype": arguments.peer_dtype,
        "peers": peers.versions() if peers else {},
        "runs": {name: [asdict(cost) for cost in runs] for name, runs in costs.items()},
        "medians": {name: medians(runs) for name, runs in costs.items()},
        "ratios": {name: ratios(costs, name) for name in merges},
        "rates": [asdict(measured) for measured in rates],
        "limits": found,
    }
    write_results(arguments.json or work / "merge-cost.json", content)


if __name__ == "__main__":
    main()
