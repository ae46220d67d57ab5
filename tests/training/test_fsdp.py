"""The recurrent rounds under ``fully_shard`` (FSDP2): two processes on the CPU, through gloo."""

import json

import fsdp_script
import pytest
import ranked
import safetensors.torch
import tiny
import torch
from fsdp_script import CASES, Training
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.checkpoint.source import FolderSource
from kifmerge.training.importance import write_accumulator


class Group:
    """What both ranks wrote."""

    def __init__(self, out):
        self.out = out

    def tensors(self, name, rank=0):
        return safetensors.torch.load_file(self.out / f"{name}-{rank}.safetensors")

    def figures(self, name, rank=0):
        return json.loads((self.out / f"{name}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    out = tmp_path_factory.mktemp("group")
    done = ranked.torchrun(out, fsdp_script.__file__, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return Group(out)


@pytest.fixture(scope="module")
def alone():
    """The same trainings on one process, with the whole batch."""
    made = {}

    def training(name):
        if name not in made:
            case = CASES[name]
            model = case.model()
            start = tiny.trained(model)
            made[name] = Training(model, case, 0, 1), start
            made[name][0].run()
        return made[name]

    return training


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_train_as_one_with_the_whole_batch(group, alone, name):
    training, start = alone(name)
    expected, found = training.tensors(), group.tensors(name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # One rounding of bfloat16 may go the other way.
        most = 8e-3 if value.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found[key], value, rtol=most, atol=1e-6, msg=key)
    moved = max(
        float((expected[f"weights/{key}"] - value).abs().max()) for key, value in start.items()
    )
    assert moved > 1e-3
    figures = training.figures()
    for together, by_itself in zip(group.figures(name)["rounds"], figures["rounds"], strict=True):
        assert together.keys() == by_itself.keys()
        for key in ("new_threshold", "both", "new_only", "historical_only", "neither"):
            assert (together[key] is None) == (by_itself[key] is None)
            if together[key] is not None:
                assert together[key] == pytest.approx(by_itself[key], rel=1e-3, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_both_processes_find_the_same(group, name):
    assert tiny.same(group.tensors(name, 0), group.tensors(name, 1))
    first, second = (group.figures(name, rank) for rank in (0, 1))
    assert len(first["rounds"]) == fsdp_script.NUM_ROUNDS
    for figures in (first, second):
        for done in figures["rounds"]:
            del done["outer_loss"]  # of each process's own rows
    assert first == second
    assert first["num_nonfinite_steps"] == (1 if name == "spoilt" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "average"])
@pytest.mark.parametrize("role", ["new", "historical"])
def test_snapshot_is_an_ordinary_one(group, alone, tmp_path, name, role):
    training, _ = alone(name)
    write_accumulator(tmp_path, training.rounds.accumulators[role], training.model, {"role": role})
    expected, found = read_snapshot(tmp_path), read_snapshot(group.out / name / role)
    assert found.details == expected.details
    assert found.names == expected.names
    whole = group.tensors(name)
    for key, value in found.tensors().items():
        assert value.dtype == torch.float32
        kind, _, parameter = key.partition("/")
        live = parameter.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        assert torch.equal(value, whole[f"scores/{role}/{kind}/{live}"].float())


@pytest.mark.slow
def test_each_process_writes_a_file_of_its_own(group):
    folder = group.out / "all" / "new"
    assert {path.name for path in folder.iterdir()} == {
        "importance-00001-of-00002.safetensors",
        "importance-00002-of-00002.safetensors",
        "importance.safetensors.index.json",
        "importance.json",
    }
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.slow
def test_stock_trainer_trains_what_transformers_sharded(group, tmp_path):
    """A model loaded with a ``DistributedConfig``, next to one process with the whole batch."""
    alone = fsdp_script.trainer_run(fsdp_script.llama(), tmp_path, 1)
    alone.train()
    assert alone.loop is not None
    expected = {
        **{f"weights/{name}": value for name, value in tiny.trained(alone.model).items()},
        **{f"scores/{name}": value for name, value in alone.loop.rounds.state_dict().items()},
    }
    assert tiny.same(group.tensors("trainer", 0), group.tensors("trainer", 1))
    found = group.tensors("trainer")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6, msg=key)
    for together, by_itself in zip(group.figures("trainer")["rounds"], alone.rounds, strict=True):
        assert together["both"] == pytest.approx(by_itself.both, abs=1e-9)
        assert together["outer_loss"] == pytest.approx(by_itself.outer_loss, rel=1e-5)
    written, own = (
        read_snapshot(group.out / "trainer/importance"),
        read_snapshot(tmp_path / "importance"),
    )
    assert written.details == own.details
    for key, value in own.tensors().items():
        torch.testing.assert_close(written.tensors()[key], value, rtol=1e-3, atol=1e-9, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["state_is_same", "distributed_checkpoint_is_same"])
def test_state_of_sharded_rounds_comes_back(group, what):
    assert [group.figures("trainer", rank)[what] for rank in (0, 1)] == [True, True]


@pytest.mark.slow
def test_snapshot_of_stacked_experts_is_in_the_pieces_of_the_files(group, tmp_path):
    model = fsdp_script.mixtral()
    write_accumulator(tmp_path, fsdp_script.scored(model), model, {})
    expected, found = read_snapshot(tmp_path), read_snapshot(group.out / "mixtral")
    assert found.details == expected.details
    assert any("experts.2." in name for name in found.names)
    assert tiny.same(found.tensors(), expected.tensors())


@pytest.mark.slow
def test_checkpoint_of_a_sharded_model_is_that_of_a_whole_one(group, tmp_path):
    model = fsdp_script.mixtral()
    model.save_pretrained(tmp_path)
    folder = group.out / "mixtral-checkpoint"
    expected, found = (
        {key: source.read(key, 0, source.info(key).numel) for key in source.names()}
        for source in (FolderSource(tmp_path, "model"), FolderSource(folder, "model"))
    )
    assert tiny.same(found, expected)
    assert len(list(folder.glob("model-*.safetensors"))) == 2
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert tiny.same(loaded.state_dict(), model.state_dict())
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_adapter_of_a_sharded_model_is_that_of_a_whole_one(group, tmp_path):
    model = fsdp_script.lora_llama()
    model.save_pretrained(tmp_path)
    folder = group.out / "lora-checkpoint"
    expected, found = (
        safetensors.torch.load_file(path / "adapter_model.safetensors")
        for path in (tmp_path, folder)
    )
    assert tiny.same(found, expected)
    configs = [
        json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path)
    ]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [("FSDP1", "belongs to FSDP1"), ("no model", "RecurrentRounds needs their model too")],
)
def test_what_cannot_be_followed_is_refused(group, what, message):
    for rank in (0, 1):
        assert message in group.figures("refusals", rank)[what]
