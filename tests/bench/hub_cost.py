"""What reading from the Hub and writing to it costs, beside downloading both models first.

    python tests/bench/hub_cost.py [--size 2.1] [--shard-size 700MB] [--json FILE]

Synthetic Llama-shaped checkpoints are made in --work once and served by a Hub on this machine, in a
process of its own. Each job begins with an empty cache. Printed for each: bytes of files pulled
over bytes of tensors needed, bytes pushed, wall and CPU seconds, peak memory, and the most that
the cache, the output and temporary files took on the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import Built, Shape, add_shape_options, build, shape_of
from processes import (
    Cost,
    Job,
    check_disk,
    measure,
    print_table,
    weight_bytes,
    write_results,
)

TESTS = Path(__file__).parents[1]
TENSOR = "model.layers.0.mlp.up_proj.weight"
READ_ONE_TENSOR = f"""
from kifmerge.checkpoint.folder import Folders
from kifmerge.checkpoint.source import open_source
source = open_source(Folders("stream").open("org/model-1"))
numel = source.info("{TENSOR}").numel
for start in range(0, numel, 1 << 19):
    source.read("{TENSOR}", start, min(start + (1 << 19), numel))
"""
DOWNLOAD_BOTH = """
from huggingface_hub import snapshot_download
for name in ("org/model-1", "org/model-2"):
    snapshot_download(name)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A command, and the bytes of tensors that it cannot do without."""

    name: str
    command: list[str]
    needed_bytes: int


class Server:
    """A Hub in its own process; what is pushed to it lies in ``store``."""

    def __init__(self, store: Path, repos: Mapping[str, Path]) -> None:
        options = [f"--repo=org/{name}={folder}" for name, folder in repos.items()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loopback", "--store", str(store), *options],
            stdout=subprocess.PIPE, text=True, cwd=TESTS,
        )  # fmt: skip
        assert self._process.stdout is not None
        started = json.loads(self._process.stdout.readline())
        self.endpoint: str = started["endpoint"]
        self.environment: dict[str, str] = started["env"]

    def totals(self) -> dict[str, Any]:
        """What was sent and received since the last call."""
        with urllib.request.urlopen(f"{self.endpoint}/_log/summary") as answer:
            found: dict[str, Any] = json.load(answer)
        request = urllib.request.Request(f"{self.endpoint}/_log", method="DELETE")
        urllib.request.urlopen(request).close()
        return found

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def tasks_of(inputs: Built, shape: Shape, out: Path) -> list[Task]:
    kifmerge = [sys.executable, "-m", "kifmerge"]
    models = ["--model", "org/model-1", "--model", "org/model-2"]
    linear = [*kifmerge, "merge", "--rule", "linear", *models, "--quiet", "--out"]
    guided = [
        *kifmerge, "merge", "--rule", "recurrent-kif", "--base", "org/base", *models,
        "--mask", "org/mask-1", "--mask", "org/mask-2", "--quiet", "--out",
    ]  # fmt: skip
    model, mask = weight_bytes(inputs.base), weight_bytes(inputs.masks[0])
    rows, columns = dict(shape.tensors())[TENSOR]
    commands: dict[str, tuple[list[str], int]] = {
        "download both models": ([sys.executable, "-c", DOWNLOAD_BOTH], 2 * model),
        "one tensor": ([sys.executable, "-c", READ_ONE_TENSOR], 2 * rows * columns),
        "pull": ([*kifmerge, "pull", "org/model-1", "--quiet", "--out", str(out)], model),
        "linear, download": ([*linear, str(out), "--fetch", "download"], 2 * model),
        "linear, stream": ([*linear, str(out), "--fetch", "stream"], 2 * model),
        "linear, hub to hub": ([*linear, "hf://me/linear"], 2 * model),
        "recurrent-kif with masks, hub to hub": (
            [*guided, "hf://me/guided"],
            3 * model + 2 * mask,
        ),
        "push": ([*kifmerge, "push", str(inputs.models[0]), "me/pushed", "--quiet"], 0),
    }
    return [
        Task(name=name, command=command, needed_bytes=needed)
        for name, (command, needed) in commands.items()
    ]


def run(task: Task, server: Server, work: Path, out: Path) -> tuple[Cost, dict[str, Any]]:
    """From an empty cache."""
    home, temporary = work / "home", work / "temporary"
    for folder in (home, temporary, out.parent):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    server.totals()
    environment = {
        **server.environment,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "TMPDIR": str(temporary),
    }
    job = Job(
        name=task.name,
        command=task.command,
        environment=environment,
        watched=[home, temporary, out.parent],
    )
    cost = measure(job, work / "log.txt")
    return cost, server.totals()


def row_of(task: Task, cost: Cost, totals: Mapping[str, Any]) -> dict[str, str]:
    pulled = totals["pulled_bytes"]
    return {
        "job": task.name,
        "pulled": f"{pulled / 1e6:.1f} MB",
        "pulled/needed": f"{pulled / task.needed_bytes:.4f}" if task.needed_bytes else "-",
        "pushed": f"{totals['pushed_bytes'] / 1e6:.1f} MB",
        "wall s": f"{cost.wall:.1f}",
        "CPU s": f"{cost.cpu:.1f}",
        "peak MB": f"{cost.peak_rss / 1e6:.0f}",
        "disk MB": f"{cost.peak_disk / 1e6:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_shape_options(parser, size=2.1)
    parser.set_defaults(shard_size=700_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kifmerge-bench")
    parser.add_argument("--only", action="append", default=[], help="names of jobs; all if none")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = shape_of(arguments)
    check_disk(arguments.work, 10 * shape.size_bytes)
    inputs = build(arguments.work, shape, 2, "--masks")
    repos = {folder.name: folder for folder in (inputs.base, *inputs.models, *inputs.masks)}
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    out = work / "made" / "out"
    server = Server(work / "store", repos)
    rows, content = [], {}
    try:
        for task in tasks_of(inputs, shape, out):
            if arguments.only and task.name not in arguments.only:
                continue
            cost, totals = run(task, server, work, out)
            rows.append(row_of(task, cost, totals))
            content[task.name] = {**asdict(cost), **totals, "needed_bytes": task.needed_bytes}
            print(rows[-1], file=sys.stderr, flush=True)
    finally:
        server.close()
        shutil.rmtree(work)
    print_table(rows)
    if arguments.json:
        write_results(arguments.json, {"jobs": content})


if __name__ == "__main__":
    main()
