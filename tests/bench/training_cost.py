"""What the recurrent loop costs, as ratios to plain training measured in the same run.

    python tests/bench/training_cost.py [--device cuda] [--repeats 3] [--rounds 2] [--json FILE]

1. Importance update: CPU (or device) seconds of one update over those of one plain training step,
   for LoRA (r 8 on q and v) and for all parameters of a T5-small-shaped model (60M).
2. Recurrent run: seconds of the steps of a run with inner and outer steps and fusion over those of
   a plain run with as many steps in all. What a run spends once, before its first step (the copy of
   the weights and the accumulators), is told apart.

Runs are interleaved and medians are taken. On a CPU one thread is used and CPU seconds are counted;
--threads takes more, and says what becomes of the wall time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from processes import write_results
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kifmerge import ImportanceAccumulator, RecurrentOptions, RecurrentTrainer

BATCH_SIZE, INPUT_TOKENS, OUTPUT_TOKENS = 8, 128, 16


def t5_small(*, lora: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128)
    )
    model.config.decoder_start_token_id = 0
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=["q", "v"]))


def rows(number: int) -> list[dict[str, list[int]]]:
    def tokens(length: int) -> list[int]:
        return torch.randint(5, 32000, (length,)).tolist()

    return [
        {"input_ids": tokens(INPUT_TOKENS), "labels": tokens(OUTPUT_TOKENS)} for _ in range(number)
    ]


class Stopwatch:
    """CPU seconds on a CPU; wall seconds between synchronisations on a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, work: Callable[[], Any]) -> float:
        start = self.now()
        work()
        return self.now() - start


class Beginning(TrainerCallback):
    """Notes when the first step of a training begins."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self.first_step = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.first_step = self.first_step or self._stopwatch.now()


def update_cost(device: str, repeats: int, *, lora: bool) -> dict[str, float]:
    """One importance update over one plain step; both repeated in turn."""
    model = t5_small(lora=lora).to(device)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    batch = {k: torch.tensor([r[k] for r in rows(BATCH_SIZE)], device=device) for k in rows(1)[0]}
    accumulator = ImportanceAccumulator(parameters)
    stopwatch = Stopwatch(device)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

    def update() -> None:
        accumulator.update(list(parameters.values()), [p.grad for p in parameters.values()])

    step(), update()
    pairs = [(stopwatch(step), stopwatch(update)) for _ in range(repeats)]
    step_seconds = statistics.median(pair[0] for pair in pairs)
    update_seconds = statistics.median(pair[1] for pair in pairs)
    return {
        "trained_parameters": sum(p.numel() for p in parameters.values()),
        "step_seconds": step_seconds,
        "update_seconds": update_seconds,
        "ratio": update_seconds / step_seconds,
    }


def run_cost(device: str, repeats: int, *, lora: bool, num_rounds: int) -> dict[str, float]:
    """A recurrent run over a plain run with the same number of optimizer steps."""
    options = RecurrentOptions()
    inner = options.inner_steps * num_rounds
    total = inner + options.outer_steps * num_rounds
    stopwatch = Stopwatch(device)
    data, memory = rows(total * BATCH_SIZE), rows(4 * BATCH_SIZE)

    def seconds(steps: int, trainer_class: Any, **extra: Any) -> tuple[float, float, float]:
        """Of all steps, of what comes before them, and the wall seconds of both."""
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = trainer_class(
                t5_small(lora=lora),
                TrainingArguments(
                    output_dir,
                    max_steps=steps,
                    per_device_train_batch_size=BATCH_SIZE,
                    use_cpu=device == "cpu",
                    report_to="none",
                    disable_tqdm=True,
                    save_strategy="no",
                    logging_strategy="no",
                    dataloader_pin_memory=False,
                    optim="adamw_torch",
                ),
                train_dataset=data,
                **extra,
            )
            beginning = Beginning(stopwatch)
            trainer.add_callback(beginning)
            start, wall_start = stopwatch.now(), time.perf_counter()
            trainer.train()
            end, wall = stopwatch.now(), time.perf_counter() - wall_start
            return end - beginning.first_step, beginning.first_step - start, wall

    pairs = [
        (
            seconds(total, Trainer),
            seconds(inner, RecurrentTrainer, memory=memory, recurrent=options),
        )
        for _ in range(repeats)
    ]
    return {
        "plain_seconds": statistics.median(plain[0] for plain, _ in pairs),
        "recurrent_seconds": statistics.median(recurrent[0] for _, recurrent in pairs),
        "ratio": statistics.median(recurrent[0] / plain[0] for plain, recurrent in pairs),
        "least_ratio": min(recurrent[0] / plain[0] for plain, recurrent in pairs),
        "most_ratio": max(recurrent[0] / plain[0] for plain, recurrent in pairs),
        "begin_seconds": statistics.median(recurrent[1] - plain[1] for plain, recurrent in pairs),
        "wall_ratio": statistics.median(recurrent[2] / plain[2] for plain, recurrent in pairs),
        "steps": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["lora", "all parameters"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, float]] = {}
    for name, lora in (("lora", True), ("all parameters", False)):
        device, repeats = arguments.device, arguments.repeats
        if arguments.only not in (None, name):
            continue
        run = functools.partial(run_cost, num_rounds=arguments.rounds)
        for work, measure in (("importance update", update_cost), ("recurrent run", run)):
            figures = measure(device, repeats, lora=lora)
            results[f"{work}, {name}"] = figures
            shown = ", ".join(f"{key} {value:.6g}" for key, value in figures.items())
            print(f"{work}, {name}: {shown}", flush=True)
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
