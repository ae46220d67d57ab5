"""The commands that are compared on the same tensors, and a home for the peers.

    python tests/bench/peers.py VENV

makes a virtual environment with mergekit and sd-mecha from PyPI. Their pins agree with each other
(mergekit: click 8.2.1, tqdm 4.67.1, safetensors 0.5, pydantic 2.10; sd-mecha: at least click 8.1.7,
tqdm 4.66.2, safetensors 0.4.2), so one environment holds both. mergekit asks for any transformers
from 4.45 on, and fails with 5: the last 4 is chosen. torch is that of constraints.txt, from where
pip is set up to find it; on a machine without a GPU let it find a build without CUDA.

mergekit reads the sharded checkpoints that we read, and writes shards of the same size. sd-mecha
merges files: it reads each checkpoint as one file, and writes one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints import Built, single_file
from processes import Job, weight_bytes

RULES = ("linear", "task-arithmetic", "ties", "recurrent-kif")
PEER_RULES = RULES[:3]
DENSITY = 0.2

# What our commands begin with. They end without a last look for garbage, and so does this.
IMPORT_TORCH = (sys.executable, "-c", "import gc, torch; gc.freeze()")

_REQUIREMENTS = ("mergekit==0.1.4", "transformers==4.57.6", "sd-mecha==1.1.8")
_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
_MECHA_PROGRAM = Path(__file__).with_name("mecha_merge.py")


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the peers are installed.

    Attributes:
        venv: virtual environment.
    """

    venv: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.venv / "bin" / "python"

    @property
    def mergekit(self) -> Path:
        """The command of mergekit."""
        return self.venv / "bin" / "mergekit-yaml"

    def versions(self) -> dict[str, str]:
        """Of all that is installed there."""
        command = [self.python, "-m", "pip", "list", "--format", "json"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {package["name"]: package["version"] for package in json.loads(done.stdout)}


def install_peers(folder: Path) -> Peers:
    """Make the environment, or take the one that this made there before.

    Raises:
        SystemExit: something else is there, or an environment that was not finished.
    """
    ready, wanted = folder / "ready", "\n".join([*_REQUIREMENTS, _torch()])
    peers = Peers(folder.absolute())
    if ready.exists() and ready.read_text() == wanted:
        return peers
    if folder.exists():
        raise SystemExit(f"{folder} holds no whole environment with {wanted.split()}: remove it")
    print(f"installing {', '.join(_REQUIREMENTS)} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    constraint = folder / "constraint.txt"
    constraint.write_text(_torch())
    install = [peers.python, "-m", "pip", "install", "--quiet", "--constraint", constraint]
    subprocess.run([*install, *_REQUIREMENTS], check=True, stdout=sys.stderr)
    subprocess.run([peers.python, "-m", "pip", "check"], check=True, stdout=sys.stderr)
    ready.write_text(wanted)
    return peers


def _torch() -> str:
    lines = _CONSTRAINTS.read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


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


def our_job(rule: str, inputs: Built, out: Path, *, name: str = "") -> Job:
    """A merge of models of equal weight, called by its rule if nothing else is said."""
    num_models = len(inputs.models)
    return Job(
        name=name or rule,
        command=our_command(rule, inputs, out, [1 / num_models] * num_models),
        out=out,
        inputs=read_by(rule, inputs),
        weight_bytes=weight_bytes(inputs.base),
    )


def read_by(rule: str, inputs: Built) -> list[Path]:
    """The folders that a rule reads."""
    masks = inputs.masks if rule == "recurrent-kif" else ()
    bases = () if rule == "linear" else (inputs.base,)
    return [*bases, *inputs.models, *masks]


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


def mergekit_config(rule: str, inputs: Built, weights: Sequence[float], *, dtype: str) -> str:
    """mergekit's YAML. Where ``dtype`` is float32 it computes in that, and writes bfloat16 too."""
    lines = [f"merge_method: {rule.replace('-', '_')}", f"dtype: {dtype}", "out_dtype: bfloat16"]
    if rule != "linear":
        lines.append(f"base_model: {inputs.base}")
    lines.append("models:")
    for model, weight in zip(inputs.models, weights, strict=True):
        lines += [f"  - model: {model}", "    parameters:", f"      weight: {weight!r}"]
        lines += [f"      density: {DENSITY}"] * (rule == "ties")
    return "\n".join(lines) + "\n"


def mergekit_command(
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
    config.write_text(mergekit_config(rule, inputs, weights, dtype=dtype))
    shard = f"{max(shard_bytes // 1_000_000, 1)}M"
    return [
        mergekit, config, out, "--no-copy-tokenizer", "--lazy-unpickle", "--out-shard-size", shard,
    ]  # fmt: skip


def mecha_command(
    peers: Peers, rule: str, inputs: Built, out: Path, weights: Sequence[float]
) -> list[str | Path]:
    """sd-mecha as its own README uses it: merge from a Python program. Files are made once."""
    command: list[str | Path] = [peers.python, _MECHA_PROGRAM, rule, out]
    for model, weight in zip(inputs.models, weights, strict=True):
        command += ["--model", single_file(model), "--weight", repr(weight)]
    if rule != "linear":
        command += ["--base", single_file(inputs.base)]
    return [*command, "--density", str(DENSITY)]


if __name__ == "__main__":
    print(install_peers(Path(sys.argv[1])).python)
