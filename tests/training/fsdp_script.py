"""What test_fsdp.py runs under torchrun: models sharded by ``fully_shard``, on every rank.

The same training runs in the test itself, on one process with the whole batch.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
from torch import Tensor, nn
from torchrun_script import refusal

from kifmerge import (
    ImportanceAccumulator,
    ImportanceCallback,
    RecurrentRounds,
    RecurrentTrainer,
    trained_parameters,
    write_accumulator,
    write_checkpoint,
)
from kifmerge.checkpoint import gathering
from kifmerge.tensor.sharding import gathered
from kifmerge.training.guard import GradientGuard
from kifmerge.training.loop import share_of_rank
from kifmerge.training.presets import RecurrentOptions

SHORT = RecurrentOptions(inner_steps=2, outer_steps=2)
BATCH_SIZE, NUM_ROUNDS = 4, 2


def llama() -> nn.Module:
    """Its 41 tokens make shards of 21 and of 20 rows."""
    return tiny.llama(vocab_size=41)


def lora_llama() -> nn.Module:
    """With one rank, A is one row: the second process holds nothing of it."""
    return tiny.with_lora(llama(), r=1)


@dataclass(frozen=True)
class Case:
    """A training: of which model, under which options, sharded how."""

    model: Callable[[], nn.Module]
    options: RecurrentOptions = SHORT
    mesh: tuple[int, ...] = (2,)
    whole: str = ""  # a module whose parameters are not sharded
    spoilt: int = 0  # backward pass whose gradient is not finite


CASES = {
    "all": Case(llama),
    "lora": Case(lora_llama),
    "one threshold per tensor": Case(llama, replace(SHORT, scope="tensor")),
    "adaptive": Case(llama, replace(SHORT, rule="recurrent-kif-adaptive")),
    "average": Case(llama, replace(SHORT, rule="average")),
    "bfloat16": Case(llama, replace(SHORT, accumulator_dtype="bfloat16")),
    "replicated": Case(llama, mesh=(2, 1)),
    "partly whole": Case(llama, whole="lm_head"),
    "spoilt": Case(llama, spoilt=2),
}


def shard(model: nn.Module, case: Case) -> nn.Module:
    """Shard a model layer by layer, as FSDP2 is used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("replicate", "shard")[-len(case.mesh) :]
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=names)
    ignored = set(model.get_submodule(case.whole).parameters()) if case.whole else set()
    for name, module in model.named_modules():
        if name.endswith("layers.0"):
            fully_shard(module, mesh=mesh, ignored_params=ignored)
    return fully_shard(model, mesh=mesh, ignored_params=ignored)


class Training:
    """A loop of one's own: what a user of ``fully_shard`` writes.

    Attributes:
        rounds: of the training.
        done: what each round did.
    """

    def __init__(self, model: nn.Module, case: Case, rank: int, num_ranks: int) -> None:
        self.model = model
        self.done: list[Any] = []
        self.guard = GradientGuard("skip")
        self._case = case
        self._rank, self._num_ranks = rank, num_ranks
        self._parameters = trained_parameters(model)
        # Plain SGD: Adam blows up rounding where a gradient is next to nothing.
        self._optimizer = torch.optim.SGD(self._parameters.values(), lr=0.3)
        self.rounds = RecurrentRounds(self._parameters, case.options, model=model)
        self._num_steps = 0

    def run(self) -> None:
        """All rounds."""
        for number in range(NUM_ROUNDS):
            for _ in range(2):
                self._step("new", seed=0)
            self.rounds.begin_outer()
            for _ in range(2):
                loss = self._step("historical", seed=1)
            with torch.no_grad():  # a forward pass alone leaves the root gathered
                self.model(**self._batch(number, 2))
            self.done.append(self.rounds.fuse(inner_steps=2, outer_steps=2, outer_loss=loss))

    def _batch(self, start: int, seed: int) -> dict[str, Tensor]:
        rows = tiny.rows(20, seed)[start : start + BATCH_SIZE]
        own = share_of_rank(range(len(rows)), self._rank, self._num_ranks)
        return {key: torch.tensor([rows[n][key] for n in own]) for key in rows[0]}

    def _step(self, role: Any, seed: int) -> float:
        self._num_steps += 1
        loss = self.model(**self._batch(self._num_steps, seed)).loss
        loss.backward()
        self._average_what_is_whole()
        self._spoil()
        if self.guard.admits(self._parameters, f"step {self._num_steps}", scaled=False):
            self._optimizer.step()
            self.rounds.observe(role)
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _average_what_is_whole(self) -> None:
        """``fully_shard`` reduces the gradients of what it shards, and no others."""
        for parameter in self._parameters.values() if self._case.whole else ():
            if self._num_ranks > 1 and not hasattr(parameter, "device_mesh"):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self._num_ranks

    def _spoil(self) -> None:
        """The last element of a gradient: of a sharded one only the last process holds it."""
        if self._num_steps == self._case.spoilt:
            gradient = self._parameters["model.embed_tokens.weight"].grad
            own = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            if self._rank == self._num_ranks - 1:
                own[-1, -1] = math.nan

    def figures(self) -> dict[str, Any]:
        """What was done."""
        return {
            "rounds": [asdict(done) for done in self.done],
            "num_nonfinite_steps": self.guard.num_skipped,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights and accumulators, whole."""
        weights = {f"weights/{n}": p for n, p in trained_parameters(self.model).items()}
        scores = {f"scores/{n}": value for n, value in self.rounds.state_dict().items()}
        return {
            key: gathered(value).detach().clone().contiguous()
            for key, value in {**weights, **scores}.items()
        }

    def write(self, out: Path) -> None:
        """An importance snapshot, and the state of the rounds."""
        for role, accumulator in self.rounds.accumulators.items():
            write_accumulator(out / role, accumulator, self.model, {"role": role})


def trainer_run(model: nn.Module, out: Path, num_ranks: int) -> RecurrentTrainer:
    """A Trainer's training whose steps see the same rows whatever the number of ranks."""
    return tiny.trainer(
        model, out, memory=tiny.rows(8, seed=1), options=SHORT, optim="sgd", learning_rate=0.3,
        per_device_train_batch_size=4 // num_ranks, max_steps=5,
        ddp_backend="gloo" if num_ranks > 1 else None,
        gradient_accumulation_steps=2, num_train_epochs=1, callbacks=(ImportanceCallback(),),
    )  # fmt: skip


def through_the_trainer(out: Path, rank: int) -> dict[str, Any]:
    """A model that transformers shards while it loads it, in a Trainer; its state kept and read."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    if rank == 0:
        llama().save_pretrained(out / "start")
    torch.distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(
        out / "start", distributed_config=DistributedConfig(fsdp_size=2)
    )
    trainer = trainer_run(model, out / "trainer", 2)
    trainer.train()
    assert trainer.loop is not None
    rounds = trainer.loop.rounds
    tensors = {f"weights/{n}": p for n, p in trained_parameters(model).items()}
    tensors |= {f"scores/{name}": value for name, value in rounds.state_dict().items()}
    whole = {key: gathered(value).detach().clone() for key, value in tensors.items()}
    safetensors.torch.save_file(whole, out / f"trainer-{rank}.safetensors")

    state_dir = out / "state"
    state_dir.mkdir(exist_ok=True)
    trainer.loop.save(state_dir)
    torch.distributed.barrier()
    before = {key: value.to_local().clone() for key, value in rounds.state_dict().items()}
    for accumulator in rounds.accumulators.values():
        accumulator.reset()
    trainer.loop.resume_from = state_dir
    trainer.loop.begin()
    after = {k: v.to_local() for k, v in trainer.loop.rounds.state_dict().items()}
    is_same = tiny.same(before, after) and any(value.any() for value in after.values())
    return {"rounds": [asdict(done) for done in trainer.rounds], "state_is_same": is_same}


def distributed_checkpoint_is_same(out: Path) -> bool:
    """Whether accumulators come back from a checkpoint of torch's own."""
    import torch.distributed.checkpoint as dcp

    case = CASES["all"]
    training = Training(shard(case.model(), case), case, 0, 2)
    training.run()
    before = {k: v.to_local().clone() for k, v in training.rounds.state_dict().items()}
    dcp.save(training.rounds.state_dict(), checkpoint_id=out / "dcp")
    counters = training.rounds.counters()
    training.rounds.accumulators["historical"].reset()
    kept = training.rounds.state_dict()
    dcp.load(kept, checkpoint_id=out / "dcp")
    training.rounds.load_state(kept, counters)
    after = {k: v.to_local() for k, v in training.rounds.state_dict().items()}
    same_counters = training.rounds.counters() == counters
    return same_counters and tiny.same(before, after) and any(v.any() for v in after.values())


def converted(out: Path) -> None:
    """Snapshot and checkpoint of a family whose experts are stacked in memory, single in files."""
    sharded = shard(mixtral(), Case(mixtral))
    write_accumulator(out / "mixtral", scored(sharded), sharded, {})
    write_checkpoint(out / "mixtral-checkpoint", sharded)
    adapted = shard(lora_llama(), Case(lora_llama))
    write_checkpoint(out / "lora-checkpoint", adapted)


def mixtral() -> nn.Module:
    """Of three experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        )
    )  # fmt: skip


def scored(model: nn.Module) -> ImportanceAccumulator:
    """Importance that follows from the weights alone, element by element."""
    parameters = trained_parameters(model)
    accumulator = ImportanceAccumulator(parameters)
    weights = list(parameters.values())
    assert accumulator.update(weights, [weight.detach() for weight in weights])
    return accumulator


def refusals() -> dict[str, str]:
    """What is said of models divided otherwise."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel(llama(), use_orig_params=True, device_id=torch.device("cpu"))
    sharded = trained_parameters(shard(llama(), Case(llama)))
    return {
        "FSDP1": refusal(lambda: trained_parameters(flat)),
        "no model": refusal(lambda: RecurrentRounds(sharded, SHORT)),
    }


def main(out: Path) -> None:
    """Every case on this rank."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    gathering.LEAST_FILE_BYTES = 1 << 10
    figures = through_the_trainer(out, rank)
    figures["distributed_checkpoint_is_same"] = distributed_checkpoint_is_same(out)
    (out / f"trainer-{rank}.json").write_text(json.dumps(figures))
    converted(out)
    (out / f"refusals-{rank}.json").write_text(json.dumps(refusals()))
    for name, case in CASES.items():
        training = Training(shard(case.model(), case), case, rank, 2)
        training.run()
        tensors = training.tensors()
        safetensors.torch.save_file(tensors, out / f"{name}-{rank}.safetensors")
        (out / f"{name}-{rank}.json").write_text(json.dumps(training.figures()))
        training.write(out / name)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # every Trainer ends with a whole garbage collection
    main(Path(sys.argv[1]))
