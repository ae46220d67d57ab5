"""What the recurrent loop costs, as ratios to plain training measured in the same run.

    python tests/bench/training_cost.py [--device cuda] [--repeats 3] [--rounds 4] [--json FILE]

1. Importance update: CPU (or device) seconds of one update over those of one plain training step,
   for LoRA (r 8 on q and v) and for all parameters of a T5-small-shaped model (60M).
2. Recurrent run: seconds of a round, its fusion included, over those of as many plain steps. Two
   trainings take turns, a round each, so that both meet the same moods of the machine. The first
   round of both is told apart: in it a system hands out the memory that is kept from then on.

Medians are taken. On a CPU one thread is used and CPU seconds are counted; --threads takes more,
and says what becomes of the wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    TrainerState,
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


class Turns(TrainerCallback):
    """Lets a training go on for some steps, then another one, and notes the seconds of each turn.

    Args:
        stopwatch: that measures.
        num_steps: of a turn.
        own: released when it is this training's turn.
        other: likewise, the other training's.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        num_steps: int,
        own: threading.Semaphore,
        other: threading.Semaphore,
    ) -> None:
        self._stopwatch = stopwatch
        self._num_steps = num_steps
        self._own, self._other = own, other
        self._began = (0.0, 0.0)
        self.seconds: list[float] = []
        self.wall_seconds: list[float] = []

    def on_step_begin(self, args: Any, state: TrainerState, *others: Any, **named: Any) -> None:
        if state.global_step % self._num_steps == 0:
            self._own.acquire()
            self._began = (self._stopwatch.now(), time.perf_counter())

    def on_step_end(self, args: Any, state: TrainerState, *others: Any, **named: Any) -> None:
        if state.global_step % self._num_steps == 0:
            self.seconds.append(self._stopwatch.now() - self._began[0])
            self.wall_seconds.append(time.perf_counter() - self._began[1])
            self._other.release()


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


def run_cost(device: str, num_rounds: int, *, lora: bool) -> dict[str, float]:
    """Rounds of a recurrent run over as many optimizer steps of a plain run, in turn."""
    options = RecurrentOptions()
    inner, total = options.inner_steps, options.inner_steps + options.outer_steps
    num_threads = torch.get_num_threads()
    stopwatch = Stopwatch(device)
    turns = threading.Semaphore(1), threading.Semaphore(0)

    def train(trainer_class: Any, steps: int, clock: Turns, **extra: Any) -> None:
        torch.set_num_threads(num_threads)  # each thread has a number of its own
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = trainer_class(
                t5_small(lora=lora),
                TrainingArguments(
                    output_dir,
                    max_steps=steps * (1 + num_rounds),
                    per_device_train_batch_size=BATCH_SIZE,
                    use_cpu=device == "cpu",
                    report_to="none",
                    disable_tqdm=True,
                    save_strategy="no",
                    logging_strategy="no",
                    dataloader_pin_memory=False,
                    optim="adamw_torch",
                ),
                train_dataset=rows(steps * (1 + num_rounds) * BATCH_SIZE),
                **extra,
            )
            trainer.add_callback(clock)
            trainer.train()

    plain = Turns(stopwatch, total, *turns)
    recurrent = Turns(stopwatch, inner, *reversed(turns))
    extra = {"memory": rows(4 * BATCH_SIZE), "recurrent": options}
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(train, Trainer, total, plain),
            pool.submit(train, RecurrentTrainer, inner, recurrent, **extra),
        ]
        for run in runs:
            run.result()
    pairs = list(zip(plain.seconds, recurrent.seconds, strict=True))[1:]
    walls = list(zip(plain.wall_seconds, recurrent.wall_seconds, strict=True))[1:]
    ratios = [found / expected for expected, found in pairs]
    return {
        "plain_seconds": statistics.median(expected for expected, _ in pairs),
        "recurrent_seconds": statistics.median(found for _, found in pairs),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "most_ratio": max(ratios),
        "wall_ratio": statistics.median(found / expected for expected, found in walls),
        "first_round_ratio": recurrent.seconds[0] / plain.seconds[0],
        "steps": total,
        "rounds": num_rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["lora", "all parameters"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, float]] = {}
    for name, lora in (("lora", True), ("all parameters", False)):
        if arguments.only not in (None, name):
            continue
        for work, measure, number in (
            ("importance update", update_cost, arguments.repeats),
            ("recurrent run", run_cost, arguments.rounds),
        ):
            figures = measure(arguments.device, number, lora=lora)
            results[f"{work}, {name}"] = figures
            shown = ", ".join(f"{key} {value:.6g}" for key, value in figures.items())
            print(f"{work}, {name}: {shown}", flush=True)
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
