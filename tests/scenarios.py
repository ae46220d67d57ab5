"""Small merges of every kind that reads or writes differently, to be interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import safetensors.torch
import torch
from torch import Tensor

from kifmerge.checkpoint.journal import unfinished_folder
from kifmerge.fusion.inputs import MergeInputs
from kifmerge.fusion.rules import FusionOptions
from kifmerge.fusion.unit_scores import GroupOptions
from kifmerge.phases.group import Group
from kifmerge.phases.merge import Merge, MergeOptions

SHAPES = {f"layer.{n}.{kind}": shape for n in range(4) for kind, shape in
          {"weight": (40, 60), "bias": (60,), "scale": ()}.items()}  # fmt: skip
NUM_FILES = 3
COMPANIONS = {"tokenizer.json": "{}", "additional_chat_templates/tools.jinja": "{{ tools }}"}


@dataclass
class Scenario:
    """A merge, told what it reads.

    Attributes:
        folder: of the inputs; the output goes there too.
        arguments: of the command, but for ``--out``.
    """

    folder: Path
    inputs: MergeInputs
    rule: FusionOptions
    options: MergeOptions
    arguments: tuple[str, ...]

    def __post_init__(self) -> None:
        """Remember what was there before any merge."""
        self._given = {path.name for path in self.folder.iterdir()}

    def run(self, out: Path | None = None, **options: Any) -> tuple[dict[str, Any], bool]:
        """Merge in this process."""
        merging = Merge(self.inputs, self.rule, self.options, num_workers=2)
        return merging.run(out or self.out, **options)

    @property
    def out(self) -> Path:
        """The output folder."""
        return self.folder / "out"

    @property
    def hidden(self) -> Path:
        """Where it is kept until it is whole."""
        return unfinished_folder(self.out)

    def left(self) -> list[str]:
        """Names of what lies in the folder beside the inputs."""
        return sorted({path.name for path in self.folder.iterdir()} - self._given)

    def journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal."""
        path = self.hidden / "journal.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def states(num: int) -> list[dict[str, Tensor]]:
    """Weights of several models, and whole numbers that they have in common."""
    whole = torch.arange(100).view(10, 10)
    return [{**folders.random_tensors(seed, SHAPES), "positions": whole} for seed in range(num)]


def two_sided(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A base in several files, a new and a historical model, and a snapshot of each side."""
    made = dict(zip(("base", "new", "historical"), states(3), strict=True))
    for role, state in made.items():
        folders.save(folder / role, state, num_shards=NUM_FILES if role == "base" else 0)
    scored = {name: made["base"][name] for name in SHAPES}
    for seed, role in enumerate(("new", "historical")):
        folders.snapshot(folder / f"{role}-importance", seed, scored, role=role)
    for name, text in COMPANIONS.items():
        (folder / "base" / name).parent.mkdir(exist_ok=True)
        (folder / "base" / name).write_text(text)
    return made


def recurrent_kif(folder: Path) -> Scenario:
    """Two sides with importance snapshots."""
    two_sided(folder)
    sides = ("new", "historical")
    inputs = MergeInputs(
        base=folder / "base",
        models={side: folder / side for side in sides},
        importance={side: folder / f"{side}-importance" for side in sides},
    )
    flags = [(f"--{role.replace('_', '-')}", str(path)) for role, path in inputs.parents.items()]
    arguments = ("--rule", "recurrent-kif", *(text for flag in flags for text in flag))
    return Scenario(folder, inputs, FusionOptions(rule="recurrent-kif"), MergeOptions(), arguments)


def kif_with_units(folder: Path) -> Scenario:
    """Weights of two sides, and their skill units; files as told."""
    two_sided(folder)
    sides = ("new", "historical")
    for side in sides:
        grouping = Group(folder / f"{side}-importance", GroupOptions(unit="tensor"))
        grouping.run(folder / f"{side}-units")
    inputs = MergeInputs(
        base=folder / "base",
        models={side: folder / side for side in sides},
        units={side: folder / f"{side}-units" for side in sides},
    )
    flags = [(f"--{role.replace('_', '-')}", str(path)) for role, path in inputs.parents.items()]
    arguments = ("--rule", "kif", *(text for flag in flags for text in flag))
    return Scenario(folder, inputs, FusionOptions(rule="kif"), MergeOptions(), arguments)


def ties(folder: Path) -> Scenario:
    """Three models, whose changes are read twice for thresholds; a tensor that differs."""
    base, *models = states(4)
    folders.save(folder / "base", base, num_shards=NUM_FILES)
    for number, state in enumerate(models, 1):
        changed = {**state, "positions": state["positions"] + number}
        folders.save(folder / f"model-{number}", changed, num_shards=number)
    inputs = MergeInputs(
        base=folder / "base",
        models={f"model_{number}": folder / f"model-{number}" for number in (1, 2, 3)},
    )
    flags = [("--model", str(path)) for path in inputs.models.values()]
    arguments = (
        "--rule", "ties", "--density", "0.4", "--unscored", "base", "--base", str(inputs.base),
        *(text for flag in flags for text in flag),
    )  # fmt: skip
    return Scenario(
        folder,
        inputs,
        FusionOptions(rule="ties", density=0.4),
        MergeOptions(unscored="base"),
        arguments,
    )


def linear_in_new_files(folder: Path) -> Scenario:
    """Weights alone, in smaller files and another dtype than the inputs'."""
    for number, state in enumerate(states(2), 1):
        folders.save(folder / f"model-{number}", state)
    models = {f"model_{number}": folder / f"model-{number}" for number in (1, 2)}
    flags = [("--model", str(path)) for path in models.values()]
    arguments = (
        "--rule", "linear", "--shard-size", "5KB", "--dtype", "bfloat16",
        *(text for flag in flags for text in flag),
    )  # fmt: skip
    return Scenario(
        folder,
        MergeInputs(base=None, models=models),
        FusionOptions(rule="linear"),
        MergeOptions(shard_bytes=5_000, dtype="bfloat16"),
        arguments,
    )


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "recurrent-kif": recurrent_kif,
    "ties": ties,
    "kif": kif_with_units,
    "linear": linear_in_new_files,
}


def weight_files(content: Iterable[str]) -> list[str]:
    """Those names that are of files of weights."""
    return sorted(name for name in content if name.endswith(".safetensors"))


def check_whole(out: Path) -> None:
    """The checkpoint is what its kifmerge.json says, and loads by another tool than ours."""
    recorded = json.loads((out / "kifmerge.json").read_text())["files"]
    files = {path.name: path for path in out.glob("*.safetensors")}
    assert recorded.keys() == files.keys()
    for name, path in files.items():
        found = path.read_bytes()
        assert recorded[name] == {
            "sha256": hashlib.sha256(found).hexdigest(),
            "bytes": len(found),
        }
        assert safetensors.torch.load_file(path)
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
