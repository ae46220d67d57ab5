"""What the recurrent loop costs, as ratios to plain training measured in the same run.

    python tests/bench/training_cost.py [--device cuda] [--repeats 3] [--json FILE]

1. Importance update: CPU (or device) seconds of one update over those of one plain training step,
   for LoRA (r 8 on q and v) and for all parameters of a T5-small-shaped model (60M).
2. Recurrent run: seconds of a run with inner and outer steps and fusion over those of a plain run
   with as many steps in all.

Runs are interleaved and medians are taken. On a CPU one thread is used and CPU seconds are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

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

    def __call__(self, work: Callable[[], Any]) -> float:
        if self._device == "cpu":
            start = time.process_time()
            work()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start


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


def run_cost(device: str, repeats: int, *, lora: bool, num_rounds: int = 1) -> dict[str, float]:
    """A recurrent run over a plain run with the same number of optimizer steps."""
    options = RecurrentOptions()
    inner = options.inner_steps * num_rounds
    total = inner + options.outer_steps * num_rounds
    stopwatch = Stopwatch(device)
    data, memory = rows(total * BATCH_SIZE), rows(4 * BATCH_SIZE)

    def seconds(steps: int, trainer_class: Any, **extra: Any) -> float:
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
            return stopwatch(trainer.train)

    pairs = [
        (
            seconds(total, Trainer),
            seconds(inner, RecurrentTrainer, memory=memory, recurrent=options),
        )
        for _ in range(repeats)
    ]
    return {
        "plain_seconds": statistics.median(pair[0] for pair in pairs),
        "recurrent_seconds": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(recurrent / plain for plain, recurrent in pairs),
        "steps": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for name, lora in (("lora", True), ("all parameters", False)):
        device, repeats = arguments.device, arguments.repeats
        for work, measure in (("importance update", update_cost), ("recurrent run", run_cost)):
            figures = measure(device, repeats, lora=lora)
            results[f"{work}, {name}"] = figures
            shown = ", ".join(f"{key} {value:.6g}" for key, value in figures.items())
            print(f"{work}, {name}: {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
