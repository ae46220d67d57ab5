"""The plan of a merge: bytes that are truly read and written, known from headers alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import folders
import large_headers
import merges
import pytest
import torch
from merges import Files

from kifmerge.checkpoint import sink as sink_module
from kifmerge.checkpoint.header import TensorInfo, read_header
from kifmerge.checkpoint.sink import FolderSink
from kifmerge.checkpoint.source import open_source
from kifmerge.errors import CheckpointError
from kifmerge.fusion.rules import FusionOptions

COUNTERS = Path("/proc/self/io")
# Beside tensors: headers, JSON, what Python loads on the way.
SPARE_BYTES = 120_000
SHAPES = {
    "embed.weight": (700, 300),
    "layer.weight": (300, 256),
    "layer.bias": (300,),
    "head.weight": (301, 257),
}
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES.values())

needs_counters = pytest.mark.skipif(
    not COUNTERS.exists(), reason="only Linux counts what a process reads and writes"
)


def counted():
    lines = (line.split(": ") for line in COUNTERS.read_text().splitlines())
    counters = {name: int(value) for name, value in lines}
    return counters["rchar"], counters["wchar"]


def run_counted(merging, out):
    before = counted()
    merging.run(out)
    read, written = (after - earlier for after, earlier in zip(counted(), before, strict=True))
    return read, written


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What is loaded once is no cost of a merge."""
    Files(tmp_path_factory.mktemp("warm")).write().merge(FusionOptions())


@needs_counters
@merges.every_variant
def test_bytes_are_those_that_are_read_and_written(tmp_path, variant):
    shards = [2] * (1 + len(variant.roles))
    files = variant.write(tmp_path, dtype=torch.bfloat16, shapes=SHAPES, shards=shards)
    merging = files.open(**variant.options(), num_workers=2)
    plan = merging.plan()
    read, written = run_counted(merging, tmp_path / "out")
    assert plan.read_bytes <= read <= plan.read_bytes + SPARE_BYTES
    assert plan.write_bytes <= written <= plan.write_bytes + SPARE_BYTES
    assert plan.write_bytes == 2 * NUMEL
    assert (plan.num_tensors, plan.num_parameters) == (len(SHAPES), NUMEL)
    assert (plan.rule, plan.num_models) == (variant.rule.rule, len(variant.roles))
    assert plan.num_files == 2
    assert plan.num_unscored_tensors == 0


@needs_counters
@pytest.mark.parametrize("choice", ["base", "new", "average"])
def test_tensors_without_scores_are_compared_before_they_are_copied(tmp_path, choice):
    files = Files(tmp_path).write(shapes=SHAPES)
    scored = {"layer.weight": files.states[0]["layer.weight"]}
    for seed, role in enumerate(files.roles):
        folders.snapshot(tmp_path / f"{role}-importance", seed, scored)
    merging = files.open(FusionOptions(), unscored=choice)
    plan = merging.plan()
    read, _ = run_counted(merging, tmp_path / "out")
    assert plan.num_unscored_tensors == 3
    assert abs(read - plan.read_bytes) <= SPARE_BYTES + (
        # Averaged are those that differ: all, as nobody knows beforehand.
        2 * 4 * (NUMEL - scored["layer.weight"].numel()) if choice == "average" else 0
    )


@needs_counters
def test_score_kind_that_reads_half_of_a_snapshot(tmp_path):
    files = Files(tmp_path).write(shapes=SHAPES)
    for seed, role in enumerate(files.roles):
        folders.snapshot(
            tmp_path / f"{role}-importance", seed, files.states[0], options={"score": "sensitivity"}
        )
    merging = files.open(FusionOptions())
    read, _ = run_counted(merging, tmp_path / "out")
    assert abs(read - merging.plan().read_bytes) <= SPARE_BYTES


@needs_counters
def test_other_dtype_and_files(tmp_path):
    files = Files(tmp_path).write(torch.bfloat16, shapes=SHAPES)
    merging = files.open(FusionOptions(), dtype="float32", shard_bytes=1_000_000)
    plan = merging.plan()
    _, written = run_counted(merging, tmp_path / "out")
    assert plan.write_bytes == 4 * NUMEL
    assert plan.write_bytes <= written <= plan.write_bytes + SPARE_BYTES
    assert plan.num_files == len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_files_are_hashed_while_they_are_written(tmp_path, monkeypatch):
    """In whatever order the base has its tensors, with scores and without."""
    files = Files(tmp_path).write(shapes=merges.VARIED)
    path = tmp_path / "base/model.safetensors"
    path.unlink()
    backwards = dict(sorted(files.states[0].items(), reverse=True))
    infos = [(n, TensorInfo(t.dtype, tuple(t.shape))) for n, t in backwards.items()]
    sink = FolderSink(tmp_path / "base", "model", {"model.safetensors": infos})
    for name, tensor in backwards.items():
        sink.add(name, 0, tensor.reshape(-1))
    sink.commit()
    scored = dict(list(files.states[0].items())[::2])
    for seed, role in enumerate(files.roles):
        folders.snapshot(tmp_path / f"{role}-importance", seed, scored)
    monkeypatch.setattr(sink_module, "MOST_PENDING_BYTES", 0)
    monkeypatch.setattr(sink_module, "file_sha256", lambda path: pytest.fail("read again"))
    merges.cut_small(monkeypatch, 64)
    files.merge(FusionOptions(), unscored="base")
    assert [*read_header(tmp_path / "out/model.safetensors")] == list(backwards)


@pytest.mark.parametrize(
    ("name", "evidence", "weight_passes", "importance_passes"),
    [
        ("recurrent-kif", "importance", 1, 3),
        ("recurrent-kif", "masks", 1, 1),
        ("recurrent-kif", "units", 1, 0),
        ("recurrent-kif-adaptive", "importance", 1, 2),
        ("kif", "importance", 1, 1),
        ("kif-adaptive", "units", 1, 0),
        ("average", None, 1, 0),
        ("linear", None, 1, 0),
        ("ties", None, 3, 0),
    ],
)
def test_passes(tmp_path, name, evidence, weight_passes, importance_passes):
    files = Files(tmp_path).write().make_masks().make_units()
    plan = files.open(FusionOptions(rule=name), evidence=evidence).plan()
    assert (plan.weight_passes, plan.importance_passes) == (weight_passes, importance_passes)


def test_counts_tensors_and_bytes(tmp_path):
    files = Files(tmp_path).write()
    plan = files.open(FusionOptions()).plan()
    assert plan.disk_bytes == plan.write_bytes
    numel = sum(value.numel() for value in files.states[0].values())
    assert (plan.num_tensors, plan.num_parameters) == (4, numel)
    assert plan.write_bytes == 4 * numel
    assert plan.read_bytes == 3 * 4 * numel + 3 * 2 * 8 * numel


def test_plan_writes_and_reads_nothing(tmp_path):
    files = Files(tmp_path).write()
    before = sorted(tmp_path.rglob("*"))
    merging = files.open(FusionOptions())
    for path in tmp_path.rglob("*.safetensors"):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        path.write_bytes(path.read_bytes()[:header] + bytes(path.stat().st_size - header))
    # The peak so far is no matter of the files.
    plans = [m.plan() for m in (merging, files.open(FusionOptions()))]
    assert len({replace(plan, peak_memory_bytes=0) for plan in plans}) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_peak_grows_with_workers_and_stays_within_their_budget(tmp_path):
    files = Files(tmp_path, merges.roles_of(8)).write()
    rule = FusionOptions(rule="average")
    peaks = [files.open(rule, num_workers=n).plan().peak_memory_bytes for n in (1, 2, 4, 64)]
    assert peaks == sorted(peaks)
    assert peaks[-1] - peaks[0] <= 200_000_000


def planned(directory, model, *, num_models=2):
    """The plan of a merge of models of which there are but headers, and its processor seconds."""
    folders_made = [
        large_headers.write(directory / str(number), model) for number in range(num_models + 1)
    ]
    base, *models = map(str, folders_made)
    given = [word for path in models for word in ("--model", path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "kifmerge", "merge", "--rule", "task-arithmetic", "--base", base,
         *given, "--out", str(directory / "out"), "--dry-run", "--disk-rate", "500MB", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout), seconds


# What it takes on a quiet machine, `import torch` included, is a tenth of that.
MOST_SECONDS = 60


def test_of_a_model_of_70_billion_parameters(tmp_path):
    model = large_headers.llama_3_70b()
    plan, seconds = planned(tmp_path, model)
    assert (plan["num_tensors"], plan["num_files"]) == (723, 30)
    assert plan["num_parameters"] == 70_553_706_496
    assert plan["write_bytes"] == plan["disk_bytes"] == 2 * plan["num_parameters"]
    assert plan["read_bytes"] == 3 * plan["write_bytes"]
    assert plan["estimate"]["seconds"] == round(4 * plan["write_bytes"] / 500_000_000)
    assert plan["estimate"]["time"] == "18 min 49 s"
    assert plan["estimate"]["bound_by"] == "disk"
    assert plan["peak_memory_bytes"] <= 400_000_000
    assert seconds < MOST_SECONDS


@pytest.mark.slow
def test_of_a_model_of_671_billion_parameters(tmp_path):
    model = large_headers.deepseek_v3()
    plan, seconds = planned(tmp_path, model)
    assert (plan["num_tensors"], plan["num_files"]) == (46_183, 163)
    assert plan["num_parameters"] == model.num_parameters == 684_489_845_504
    assert plan["write_bytes"] == model.num_bytes
    assert plan["read_bytes"] == 3 * model.num_bytes
    assert plan["peak_memory_bytes"] <= 450_000_000
    assert seconds < MOST_SECONDS


def peak_of_torch():
    """What a process that imports torch, and does nothing, has held at most."""
    program = (
        "import torch; from kifmerge.checkpoint.workers import peak_bytes; print(peak_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_of_a_model_of_671_billion_parameters_on_the_hub(tmp_path, hub):
    """What is not read yet takes no memory but for headers, which cost two requests a file."""
    model = large_headers.deepseek_v3()
    for name in ("base", "a", "b"):
        hub.add_holes(f"org/{name}", large_headers.write(tmp_path / name, model))
    done = subprocess.run(
        [sys.executable, "-m", "kifmerge", "merge", "--rule", "task-arithmetic",
         "--base", "org/base", "--model", "org/a", "--model", "org/b", "--fetch", "stream",
         "--out", str(tmp_path / "out"), "--dry-run", "--json"],
        capture_output=True, text=True, check=True, env={**os.environ, **hub.env},
    )  # fmt: skip
    plan = json.loads(done.stdout)
    assert plan["write_bytes"] == model.num_bytes
    assert plan["pulled_bytes"] == 3 * model.num_bytes
    # What `import torch` takes differs by 50 MB between two environments on one machine.
    assert plan["peak_memory_bytes"] <= 310_000_000 + peak_of_torch()
    asked = Counter(row.kind for row in hub.log if (row.file or "").endswith(".safetensors"))
    assert asked == {"resolve": 3 * 163, "cdn": 3 * 163}


def test_of_a_model_in_float8_says_what_to_take_instead(tmp_path):
    path = large_headers.write(tmp_path / "model", large_headers.deepseek_v3(fp8=True))
    with pytest.raises(CheckpointError, match=r"quantised by fp8: .*as it was before"):
        open_source(path)
