"""Memory of a merge: within a bound, whatever the size of tensors and files, and of models many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kifmerge.checkpoint.header import TensorInfo, header_of
from kifmerge.checkpoint.sink import new_layout

MB = 1_000_000
TOTAL_BYTES = 200 * MB
# Above `import torch`, with two workers; and what two runs of one merge may differ in.
MOST_BYTES = 130 * MB
NOISE_BYTES = 25 * MB
# What a model more takes: pieces of it for each worker, as long as all stay within their budget.
MODEL_BYTES = 12 * MB

RUN = """
import json, sys, warnings
from pathlib import Path
import torch


def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


with_torch = peak()
from kifmerge.fusion.inputs import MergeInputs
from kifmerge.phases.merge import Merge, MergeOptions
from kifmerge.fusion.rules import FusionOptions

warnings.simplefilter("ignore")
folder, rule, evidence, num_models = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
models = {f"model_{n}": folder / f"model_{n}" for n in range(1, num_models + 1)}
given = {} if evidence == "none" else {evidence: {r: folder / evidence for r in models}}
inputs = MergeInputs(base=folder / "base", models=models, **given)
merging = Merge(inputs, FusionOptions(rule=rule), MergeOptions(), num_workers=2)
planned = merging.plan().peak_memory_bytes
merging.run(folder / "out")
print(json.dumps({"above_torch": peak() - with_torch, "peak": peak(), "planned": planned}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak"),
]


def tensors(largest_bytes, itemsize=2):
    """A checkpoint's, of one size: as many of the largest as fit, and small ones."""
    num_large = TOTAL_BYTES // largest_bytes
    shapes = {f"large.{n}.weight": (largest_bytes // 2 // 1000, 1000) for n in range(num_large)}
    left = (TOTAL_BYTES - num_large * largest_bytes) // 2
    shapes |= {f"small.{n}.weight": (500, 1000) for n in range(left // 500_000)}
    return shapes | {f"norm.{n}.weight": (1000,) for n in range(200)}


def write(directory, stem, infos, shard_bytes):
    """Zeros, which take no room on the disk."""
    directory.mkdir()
    layout = new_layout(infos, stem, shard_bytes or 10**12)
    for file, of_file in layout.items():
        first, placed = header_of(of_file)
        (directory / file).write_bytes(first)
        end = max(tensor.offset + tensor.info.nbytes for tensor in placed.values())
        os.truncate(directory / file, end)
    if len(layout) > 1:
        weight_map = {name: file for file, of_file in layout.items() for name, _ in of_file}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / f"{stem}.safetensors.index.json").write_text(index)


def measured(folder, rule, evidence, *, largest=60 * MB, num_models=2, shard_bytes=None):
    """Bytes above what torch alone takes, at the highest."""
    shapes = tensors(largest)
    weights = [(name, TensorInfo(torch.bfloat16, shape)) for name, shape in shapes.items()]
    folder.mkdir()
    for number in range(num_models + 1):
        role = f"model_{number}" if number else "base"
        write(folder / role, "model", weights, shard_bytes)
        (folder / role / "config.json").write_text("{}")
    if evidence == "importance":
        kept = [(f"score/{n}", TensorInfo(torch.bfloat16, s)) for n, s in shapes.items()]
        write(folder / "importance", "importance", kept, shard_bytes)
        details = {"format": "kifmerge.importance", "version": 1}
        (folder / "importance/importance.json").write_text(json.dumps(details))
    if evidence == "masks":
        bits = [(n, TensorInfo(torch.uint8, (-(-i.numel // 8),))) for n, i in weights]
        write(folder / "masks", "mask", bits, None)
        details = {"format": "kifmerge.mask", "version": 1, "shapes": shapes}
        (folder / "masks/mask.json").write_text(json.dumps(details))
    command = [sys.executable, "-c", RUN, str(folder), rule, evidence, str(num_models)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["peak"] <= found["planned"] + NOISE_BYTES
    assert found["planned"] <= found["peak"] + 100 * MB
    return found["above_torch"]


CASES = [
    ("recurrent-kif", "importance"),
    ("recurrent-kif", "masks"),
    ("linear", "none"),
    ("ties", "none"),
]


@pytest.mark.parametrize(("rule", "evidence"), CASES)
def test_peak_is_bounded_and_flat(tmp_path, rule, evidence):
    plain = measured(tmp_path / "plain", rule, evidence)
    assert plain < MOST_BYTES
    larger = measured(tmp_path / "larger", rule, evidence, largest=180 * MB)
    assert larger < plain + NOISE_BYTES
    in_shards = measured(tmp_path / "shards", rule, evidence, shard_bytes=50 * MB)
    assert abs(in_shards - plain) < NOISE_BYTES
    of_five = measured(tmp_path / "models", rule, evidence, num_models=5)
    assert of_five < MOST_BYTES
    assert of_five < plain + NOISE_BYTES + 3 * MODEL_BYTES
