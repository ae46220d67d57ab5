"""What test_process_groups.py runs under torchrun: every case on every rank, results into files.

One launch makes all the runs, because starting the processes costs more than the training.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
from torch import nn

from kifmerge.errors import TrainingError
from kifmerge.training.importance import ImportanceCallback
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.trainer import RecurrentTrainer

SHORT = RecurrentOptions(inner_steps=2, outer_steps=2)
MEMORY = tiny.rows(8, seed=1)
RESUMED_STEP = 4  # the first checkpoint: of step 3, but saved once its round is over


class WatchedMemory(list[dict[str, Any]]):
    """Remembers which rows were read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.read: list[int] = []

    def __getitem__(self, number: Any) -> Any:
        self.read.append(number)
        return super().__getitem__(number)


def classifier() -> nn.Module:
    """A classifier without dropout, whose masks would be each rank's own.

    Its loss is a mean over rows, which a stock Trainer has to be told: believing that the loss is
    divided by the rows of all ranks, it multiplies it by the number of ranks.
    """
    model = tiny.bert()
    model.accepts_loss_kwargs = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def split_run(case: str, output_dir: Path, num_ranks: int) -> RecurrentTrainer:
    """A run whose optimizer steps see the same rows whatever the number of ranks."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 4 // num_ranks, "max_steps": 5}
    if case == "classifier":
        # Plain SGD: Adam blows up rounding where a gradient is zero, as of BERT's key biases.
        return tiny.trainer(
            classifier(), output_dir, new=tiny.rows(40, classes=True),
            memory=tiny.rows(8, seed=1, classes=True), options=SHORT,
            optim="sgd", learning_rate=0.1, **settings,
        )  # fmt: skip
    if case == "accumulated":
        settings.update(gradient_accumulation_steps=2, num_train_epochs=1)
    return tiny.trainer(tiny.lora_llama(), output_dir, memory=MEMORY, options=SHORT, **settings)


SPLIT = ("causal LM", "accumulated", "classifier")

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: tiny.lora_llama(lora_dropout=0.2),
    "all": tiny.llama,
}


def group_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a training in a process group on CPUs."""
    return {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, **changes}


class Results:
    """Writes what a rank found, for the test to compare."""

    def __init__(self, out: Path, rank: int) -> None:
        self._out = out
        self._rank = rank

    def keep(self, name: str, trainer: RecurrentTrainer, **more: Any) -> None:
        """Weights, accumulators and rounds of a training."""
        tensors = {f"weights/{key}": value for key, value in tiny.trained(trainer.model).items()}
        assert trainer.loop is not None
        tensors.update(
            {f"scores/{key}": value for key, value in trainer.loop.rounds.state_dict().items()}
        )
        safetensors.torch.save_file(tensors, self._out / f"{name}-{self._rank}.safetensors")
        figures = {
            "rounds": [asdict(done) for done in trainer.rounds],
            "num_nonfinite_steps": trainer.num_nonfinite_steps,
            "world_size": trainer.args.world_size,
            **more,
        }
        self.note(name, figures)

    def note(self, name: str, figures: Any) -> None:
        """JSON alone."""
        (self._out / f"{name}-{self._rank}.json").write_text(json.dumps(figures))


def refusal(call: Callable[[], Any]) -> str:
    """The message of the TrainingError that the call raises, or nothing."""
    try:
        call()
    except TrainingError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    """Make every run on this rank."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = Results(out, rank)
    settings = group_arguments(max_steps=7, save_strategy="steps", save_steps=3)
    for kind, make in MODELS.items():
        straight = tiny.trainer(make(), out / kind, memory=MEMORY, options=SHORT, **settings)
        straight.train()
        results.keep(f"{kind}-straight", straight)
        resumed = tiny.trainer(
            make(), out / f"{kind}-resumed", memory=MEMORY, options=SHORT, **settings
        )
        resumed.train(resume_from_checkpoint=str(out / kind / f"checkpoint-{RESUMED_STEP}"))
        results.keep(f"{kind}-resumed", resumed)

    for case in SPLIT:
        run = split_run(case, out / f"split-{case}", 2)
        run.train()
        results.keep(f"split-{case}", run)

    watched = WatchedMemory(MEMORY)
    own_folder = tiny.trainer(
        tiny.lora_llama(), out / f"folder-of-{rank}", memory=watched,
        options=replace(SHORT, outer_batch_size=5), callbacks=(ImportanceCallback(),),
        **group_arguments(max_steps=2, save_strategy="steps", save_steps=2),
    )  # fmt: skip
    own_folder.train()
    results.keep("folder", own_folder, read=watched.read)

    for name, backward in [("inner", 2), ("outer", 3)]:
        model = tiny.lora_llama()
        if rank == 1:
            tiny.spoil_gradient(model, list(tiny.trained(model))[-1], backward, math.nan)
        run = tiny.trainer(
            model, out / name, memory=MEMORY, options=SHORT, **group_arguments(max_steps=3)
        )
        run.train()
        results.keep(f"nonfinite-{name}", run)

    # Gradients clipped to nothing make every score zero, which is worth a warning.
    run = tiny.trainer(
        tiny.lora_llama(), out / "warned", memory=MEMORY, options=SHORT,
        **group_arguments(max_steps=2, max_grad_norm=1e-44),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    results.note("warned", [str(warning.message) for warning in caught])

    # Without GPUs the Trainer runs plain DDP where FSDP was asked for.
    run = tiny.trainer(
        tiny.lora_llama(), out / "fsdp", memory=MEMORY, options=SHORT,
        **group_arguments(max_steps=5, fsdp=True, fsdp_config={"version": 2}),
    )  # fmt: skip
    run.train()
    results.keep("fsdp-as-ddp", run)

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # every Trainer ends with a whole garbage collection
    main(Path(sys.argv[1]))
