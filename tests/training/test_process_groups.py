"""The recurrent loop under torchrun: two processes on the CPU, talking through gloo."""

import json
from types import SimpleNamespace

import pytest
import ranked
import safetensors.torch
import tiny
import torch
import torchrun_script
from torchrun_script import MODELS, SPLIT, split_run

from kifmerge.errors import TrainingError
from kifmerge.training.loop import MemoryBatches, share_of_rank
from kifmerge.training.trainer import refuse_sharded


class Group:
    """What both ranks wrote."""

    def __init__(self, out):
        self.out = out

    def tensors(self, name, rank=0):
        return safetensors.torch.load_file(self.out / f"{name}-{rank}.safetensors")

    def weights(self, name):
        found = self.tensors(name).items()
        return {
            key.removeprefix("weights/"): value
            for key, value in found
            if key.startswith("weights/")
        }

    def figures(self, name, rank=0):
        return json.loads((self.out / f"{name}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    out = tmp_path_factory.mktemp("group")
    done = ranked.torchrun(out, torchrun_script.__file__, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return Group(out)


RUNS = [
    *(f"{kind}-{run}" for kind in MODELS for run in ("straight", "resumed")),
    *(f"split-{case}" for case in SPLIT),
    "nonfinite-inner",
    "nonfinite-outer",
    "folder",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_hold_the_same_bits(group, name):
    assert tiny.same(group.tensors(name, 0), group.tensors(name, 1))
    first, second = (group.figures(name, rank) for rank in (0, 1))
    assert first["world_size"] == 2
    assert first["rounds"] == second["rounds"]
    assert first["rounds"]
    assert first["rounds"][0]["new_threshold"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODELS))
def test_resumed_group_ends_at_the_same_bits(group, kind):
    straight, resumed = (f"{kind}-{run}" for run in ("straight", "resumed"))
    assert tiny.same(group.tensors(straight), group.tensors(resumed))
    assert group.figures(straight)["rounds"] == group.figures(resumed)["rounds"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SPLIT)
def test_two_ranks_train_as_one_with_the_whole_batch(group, tmp_path, case):
    alone = split_run(case, tmp_path, num_ranks=1)
    start = tiny.trained(alone.model)
    alone.train()
    found, end = group.weights(f"split-{case}"), tiny.trained(alone.model)
    assert found.keys() == end.keys()
    for name, value in end.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)
    moved = max(float((end[name] - start[name]).abs().max()) for name in end)
    assert moved > 1e-3
    for together, by_itself in zip(
        group.figures(f"split-{case}")["rounds"], alone.rounds, strict=True
    ):
        assert together["outer_loss"] == pytest.approx(by_itself.outer_loss, abs=1e-5)
        assert together["both"] == pytest.approx(by_itself.both, abs=1e-2)


@pytest.mark.slow
def test_ranks_read_their_shares_of_each_memory_batch(group):
    batches = MemoryBatches(8, 5, seed=42)
    read = [group.figures("folder", rank)["read"] for rank in (0, 1)]
    for rank in (0, 1):
        expected = [share_of_rank(batches[step], rank, 2) for step in (0, 1)]
        assert read[rank] == [*expected[0], *expected[1]]
    assert {*read[0][:3], *read[1][:3]} == set(batches[0])


@pytest.mark.parametrize(
    ("num_rows", "num_ranks", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 2], [1, 3]]),
        (5, 2, [[0, 2, 4], [1, 3, 0]]),
        (1, 3, [[0], [0], [0]]),
        (2, 5, [[0], [1], [0], [1], [0]]),
    ],
)
def test_every_rank_gets_as_many_rows(num_rows, num_ranks, expected):
    rows = list(range(num_rows))
    assert [share_of_rank(rows, rank, num_ranks) for rank in range(num_ranks)] == expected


@pytest.mark.slow
def test_only_the_first_rank_writes(group):
    folders = [group.out / f"folder-of-{rank}" for rank in (0, 1)]
    written = [{path.name for path in folder.rglob("*") if path.is_file()} for folder in folders]
    ours = {"recurrent.safetensors", "recurrent.json", "importance.safetensors", "importance.json"}
    assert ours <= written[0]
    # The Trainer itself keeps every rank's random generators.
    assert written[1] == {"rng_state_1.pth"}


@pytest.mark.slow
def test_only_the_first_rank_warns(group):
    said = ["importance scores are all equal" in str(group.figures("warned", r)) for r in (0, 1)]
    assert said == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["inner", "outer"])
def test_gradient_that_one_rank_spoils_is_left_out_by_all(group, role):
    for rank in (0, 1):
        assert group.figures(f"nonfinite-{role}", rank)["num_nonfinite_steps"] == 1
    assert all(value.isfinite().all() for value in group.weights(f"nonfinite-{role}").values())


@pytest.mark.slow
def test_fsdp_asked_for_without_gpus_is_plain_data_parallelism(group):
    assert tiny.same(group.tensors("fsdp-as-ddp"), group.tensors("split-causal LM"))


def whole(**changes):
    """The parts of a Trainer that tell how its model lies on the processes."""
    return SimpleNamespace(
        **{
            "accelerator": SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_GPU")),
            "model": SimpleNamespace(config=SimpleNamespace(distributed_config=None)),
            "is_deepspeed_enabled": False,
            "is_fsdp_enabled": False,
            "is_fsdp_xla_enabled": False,
            "get_tp_size": lambda: 1,
            "get_cp_size": lambda: 1,
            "get_sp_size": lambda: 1,
            **changes,
        }
    )


def engine(name, **more):
    return SimpleNamespace(distributed_type=SimpleNamespace(value=name), **more)


def loaded_by(**sizes):
    """A model that transformers divided while it loaded it."""
    return SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**sizes)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"is_fsdp_enabled": True}, "FSDP1"),
        ({"is_fsdp_xla_enabled": True}, "FSDP through XLA"),
        ({"accelerator": engine("FSDP")}, "FSDP1"),
        ({"accelerator": engine("FSDP", is_fsdp2=False)}, "FSDP1"),
        ({"accelerator": engine("MEGATRON_LM")}, "Megatron"),
        ({"model": loaded_by(fsdp_size=2, pp_size=2)}, "pipeline or expert parallelism"),
        ({"model": loaded_by(fsdp_size=2, ep_size=2)}, "pipeline or expert parallelism"),
        ({"get_cp_size": lambda: 2}, "tensor, context or sequence parallelism"),
    ],
)
def test_engine_that_cuts_the_model_into_pieces_is_refused_by_name(changes, name):
    refuse_sharded(whole())
    with pytest.raises(TrainingError, match=name):
        refuse_sharded(whole(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"is_fsdp_enabled": True, "accelerator": engine("FSDP", is_fsdp2=True)},
        {"model": loaded_by(fsdp_size=2, pp_size=1, ep_size=None)},
    ],
)
def test_fsdp2_is_followed(changes):
    refuse_sharded(whole(**changes))
