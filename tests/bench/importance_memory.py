"""Memory and time of measuring importance: gradients freed one by one, or all of a batch at once.

    python tests/bench/importance_memory.py [--device cuda] [--repeats 3] [--json FILE]

1. Memory: the peak above the loaded model, in a process of its own for each way, on a Llama-shaped
   model (134M parameters). What the accumulators take (4 bytes a parameter under ``mean``, 8 under
   ``ema``) is part of it; what is above that comes from gradients and activations.
2. Time: CPU (or device) seconds, on a T5-small-shaped model (60M), of a batch in each way, of its
   forward and backward pass alone, and of taking in gradients that are there already. Runs are
   interleaved; on a CPU one thread is used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import write_results

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kifmerge.tensor.importance import ImportanceAccumulator, MeanAccumulator

WAYS = ("one by one", "at once")
DTYPES = ("float32", "bfloat16")
AVERAGES = ("mean", "ema")
NUM_BATCHES = 3


def llama(dtype: str, device: str, num_layers: int = 12, vocabulary: int = 32000) -> nn.Module:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=768, intermediate_size=2048,
        num_hidden_layers=num_layers, num_attention_heads=12,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval()


def t5_small(device: str) -> nn.Module:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).to(device).eval()


def accumulator_of(
    parameters: dict[str, nn.Parameter], average: str
) -> MeanAccumulator | ImportanceAccumulator:
    from kifmerge.tensor.importance import ImportanceAccumulator, MeanAccumulator

    if average == "mean":
        return MeanAccumulator(parameters, "first")
    return ImportanceAccumulator(parameters)


class Measuring:
    """One batch after another into an accumulator, in either way."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor], average: str) -> None:
        from kifmerge.training.intake import GradientIntake

        self.model = model
        self.batch = batch
        self.parameters = dict(model.named_parameters())
        self.accumulator = accumulator_of(self.parameters, average)
        self.intake = GradientIntake(self.parameters, self.accumulator, "first")

    def backward(self) -> None:
        self.model.zero_grad()
        self.model(**self.batch).loss.backward()

    def at_once(self) -> None:
        self.backward()
        weights = list(self.parameters.values())
        assert self.accumulator.update(weights, [weight.grad for weight in weights])

    def one_by_one(self) -> None:
        with self.intake:
            loss = self.model(**self.batch).loss
            assert bool(loss.isfinite())
            assert self.intake.take(loss) == []

    def of(self, way: str) -> Callable[[], None]:
        return self.one_by_one if way == "one by one" else self.at_once

    def update_of(self, way: str) -> Callable[[], None]:
        """The accumulator's part alone, of gradients that are kept."""
        kept = {name: weight.grad.clone() for name, weight in self.parameters.items()}

        def at_once() -> None:
            assert self.accumulator.update([*self.parameters.values()], [*kept.values()])

        def one_by_one() -> None:
            import torch

            self.accumulator.begin()
            taken = [
                self.accumulator.take(name, weight, kept[name])
                for name, weight in self.parameters.items()
            ]
            assert bool(torch.stack(taken).isfinite().all())

        return one_by_one if way == "one by one" else at_once


def memory(way: str, dtype: str, average: str, device: str) -> dict[str, int]:
    """Peak bytes above the loaded model; to be called in a process of its own."""
    import torch

    model = llama(dtype, device)
    tokens = torch.randint(3, 500, (1, 32), device=device)
    # What the libraries take for themselves at first use is no part of a measurement.
    small = llama(dtype, device, num_layers=1, vocabulary=500)
    Measuring(small, {"input_ids": tokens, "labels": tokens}, average).of(way)()
    model_bytes = sum(p.nbytes for p in model.parameters())
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making the model
        before = _status_bytes("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    measuring = Measuring(model, {"input_ids": tokens, "labels": tokens}, average)
    for _ in range(NUM_BATCHES):
        measuring.of(way)()
    peak = _status_bytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    accumulator_bytes = sum(v.nbytes for v in measuring.accumulator.state_dict().values())
    return {
        "model_bytes": model_bytes,
        "accumulator_bytes": accumulator_bytes,
        "rest_bytes": peak - before - accumulator_bytes,
    }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def seconds(device: str, average: str, repeats: int) -> dict[str, float]:
    """Medians of one batch: backward alone, and with the accumulator in either way."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    inputs = torch.randint(5, 32000, (8, 128), device=device)
    batch = {"input_ids": inputs, "labels": inputs[:, :16].contiguous()}
    measuring = Measuring(t5_small(device), batch, average)
    measuring.backward()
    works = {
        "backward alone": measuring.backward,
        **{f"batch {way}": measuring.of(way) for way in WAYS},
        **{f"update {way}": measuring.update_of(way) for way in WAYS},
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            measuring.model.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
            clock = time.process_time if device == "cpu" else time.perf_counter
            start = clock()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                found[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def in_own_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, *rest = arguments.one
        one = memory(*rest) if what == "memory" else seconds(rest[0], rest[1], int(rest[2]))
        print(json.dumps(one))
        return
    device, results = arguments.device, {}
    for dtype in DTYPES:
        for average in AVERAGES:
            for way in WAYS:
                found = in_own_process("--one", "memory", way, dtype, average, device)
                name = f"memory, {dtype}, {average}, {way}"
                results[name] = found
                shown = ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in found.items())
                print(f"{name}: {shown}", flush=True)
    for average in AVERAGES:
        name = f"seconds, {average}"
        results[name] = in_own_process("--one", "seconds", device, average, str(arguments.repeats))
        print(f"{name}: {', '.join(f'{k} {v:.4f}' for k, v in results[name].items())}")
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
