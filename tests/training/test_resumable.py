"""A run that was killed at any moment, and resumed, ends with the same weights, bit for bit."""

from __future__ import annotations

import json

import pytest
import synthetic

from kifmerge.checkpoint import atomic
from kifmerge.errors import CheckpointError
from kifmerge.models.model import LoadedModel
from kifmerge.training import resumable
from kifmerge.training.guard import GradientGuard
from kifmerge.training.loop import RecurrentLoop
from kifmerge.training.recurrent import RecurrentRounds
from kifmerge.training.state import read_state

pytestmark = pytest.mark.slow  # whole trainings

MODEL = {**synthetic.MODEL, "dropout": 0.1}
LORA = {"targets": ["query", "value"], "rank": 2, "alpha": 4, "dropout": 0.1}
TRAINING = {
    "epochs": 3,
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 0.01,
    "device": "cpu",
    "save_steps": 3,
}
METHODS = ["sequential", "recurrent-kif"]


def recipe(folder, **changes):
    """Nine steps a task: plain on the first one, rounds of two and a tail on the second."""
    return synthetic.write_recipe(
        folder, **{"model": MODEL, "training": TRAINING, "methods": METHODS, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resumable")


@pytest.fixture(scope="module")
def full(folder):
    """Recipe that trains everything, and the weights of a run that nothing interrupted."""
    path = recipe(folder)
    synthetic.run(path, folder / "full")
    return path, synthetic.weights(folder / "full")


@pytest.fixture(scope="module")
def lora(folder):
    (folder / "adapter").mkdir()
    path = recipe(folder / "adapter", model={**MODEL, "lora": LORA})
    synthetic.run(path, folder / "lora")
    return path, synthetic.weights(folder / "lora")


MOMENTS = {
    "optimizer step of the first task": (GradientGuard, "admits", 5),
    "inner step of the first round": (RecurrentLoop, "count_inner_step", 1),
    "inner step of a later round": (RecurrentLoop, "count_inner_step", 6),
    "outer step": (RecurrentLoop, "_outer_step", 3),
    "begin of a fusion": (RecurrentRounds, "fuse", 3),
    "end of a fusion": (RecurrentRounds, "empty_scores", 4),
    "saving the first weights": (LoadedModel, "save", 1),
    "saving weights": (LoadedModel, "save", 3),
    "saving state": (resumable, "write_state", 4),
    "flushing a file": (atomic, "flush", 60),
    "removing the checkpoint before": (resumable.shutil, "rmtree", 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_and_resumed_run_is_the_same(request, tmp_path, kind, moment):
    path, expected = request.getfixturevalue(kind)
    assert synthetic.kill_run(path, tmp_path / "run", *MOMENTS[moment])
    synthetic.run(path, tmp_path / "run", resume=True)
    assert synthetic.weights(tmp_path / "run") == expected
    assert not [f for f in tmp_path.rglob("*") if "unfinished" in f.name or "training" in f.suffix]


@pytest.mark.slow
def test_killed_again_and_again(full, tmp_path):
    path, expected = full
    num_kills = 0
    for call in range(1, 20):
        if not synthetic.kill_run(path, tmp_path / "run", GradientGuard, "admits", call % 5 + 3):
            break
        num_kills += 1
    assert num_kills > 3
    assert synthetic.weights(tmp_path / "run") == expected


def test_goes_on_where_it_stood(full, tmp_path, monkeypatch):
    path, _ = full
    assert synthetic.kill_run(path, tmp_path / "run", RecurrentLoop, "count_inner_step", 8)
    counted = []
    original = RecurrentLoop.count_inner_step
    monkeypatch.setattr(
        RecurrentLoop, "count_inner_step", lambda loop: counted.append(1) or original(loop)
    )
    synthetic.run(path, tmp_path / "run", ["seeds=[0]"], resume=True)
    # Saving was due at steps 3 and 6; the first was put off to the end of the round, step 4.
    assert len(counted) == 9 - 6
    record = json.loads((tmp_path / "run/recurrent-kif/seed-0/02-sizes/stage.json").read_text())
    assert record["training"]["num_steps"] == 9
    assert [done["inner_steps"] for done in record["training"]["rounds"]] == [2, 2, 2, 2, 1]
    assert record["training"]["num_outer_steps"] == 5


def test_training_that_only_lacks_its_evaluation_is_not_repeated(full, tmp_path, monkeypatch):
    path, expected = full
    # Saves: base, two stages of the start, three step folders of the first task...
    with monkeypatch.context() as patch:
        patch.setattr("kifmerge.phases.sequence.select_memory", _fail)
        with pytest.raises(RuntimeError, match="stop here"):
            synthetic.run(path, tmp_path / "run")
    assert (tmp_path / "run/start/seed-0/01-colours.training/step-00000009").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(GradientGuard, "admits", _fail)
        patch.setattr("kifmerge.phases.sequence.METHODS", {})
        with pytest.raises(KeyError):
            synthetic.run(path, tmp_path / "run", resume=True)
    synthetic.run(path, tmp_path / "run", resume=True)
    assert synthetic.weights(tmp_path / "run") == expected


def _fail(*args, **kwargs):
    raise RuntimeError("stop here")


@pytest.mark.slow
class TestKeptOptimizer:
    def test_begins_where_the_task_before_ended(self, full, tmp_path):
        path, fresh = full
        settings = ["training.optimizer_state=kept"]
        synthetic.run(path, tmp_path / "kept", settings)
        kept = synthetic.weights(tmp_path / "kept")
        first, second = "start/seed-0/01-colours", "recurrent-kif/seed-0/02-sizes"
        model = "checkpoint/model.safetensors"
        assert kept[f"{first}/{model}"] == fresh[f"{first}/{model}"]
        assert kept[f"{second}/{model}"] != fresh[f"{second}/{model}"]
        assert f"{first}/optimizer/optimizer.safetensors" in kept

    @pytest.mark.slow
    def test_is_the_same_after_a_kill(self, full, tmp_path):
        path = recipe(tmp_path, training={**TRAINING, "optimizer_state": "kept"})
        synthetic.run(path, tmp_path / "whole")
        assert synthetic.kill_run(path, tmp_path / "run", RecurrentLoop, "count_inner_step", 7)
        synthetic.run(path, tmp_path / "run", resume=True)
        assert synthetic.weights(tmp_path / "run") == synthetic.weights(tmp_path / "whole")

    def test_of_a_head_that_grew_begins_afresh(self, tmp_path):
        training = {**TRAINING, "optimizer_state": "kept"}
        path = recipe(tmp_path, training=training, methods=["sequential"])
        synthetic.run(path, tmp_path / "run")
        longer = synthetic.write_recipe(
            tmp_path,
            ["colours", "sizes", "sounds"],
            model=MODEL,
            training=training,
            methods=["sequential"],
        )
        report = synthetic.run(longer, tmp_path / "run", resume=True)
        assert None not in report.matrices["score"]["sequential"][0][3]


@pytest.mark.slow
class TestState:
    def test_of_another_training_is_refused(self, full, folder, tmp_path):
        path, _ = full
        assert synthetic.kill_run(path, tmp_path / "run", RecurrentLoop, "count_inner_step", 5)
        (state,) = (tmp_path / "run").rglob("state.json")
        identity = json.loads(state.read_text())["identity"]
        assert read_state(state.parent, identity)["step"] == 4
        other = {**identity, "seed": 77}
        with pytest.raises(CheckpointError, match=r"another run:\n  - seed was \d+ and is now 77"):
            read_state(state.parent, other)

    @pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "state.json"])
    def test_damaged_file_is_named(self, full, tmp_path, name):
        path, _ = full
        assert synthetic.kill_run(path, tmp_path / "run", RecurrentLoop, "count_inner_step", 5)
        (state,) = (tmp_path / "run").rglob("state.json")
        whole = (state.parent / name).read_bytes()
        (state.parent / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=name):
            synthetic.run(path, tmp_path / "run", resume=True)

    def test_of_a_newer_version_is_refused(self, full, tmp_path):
        path, _ = full
        assert synthetic.kill_run(path, tmp_path / "run", RecurrentLoop, "count_inner_step", 5)
        (state,) = (tmp_path / "run").rglob("state.json")
        content = json.loads(state.read_text())
        state.write_text(json.dumps({**content, "version": 2}))
        with pytest.raises(CheckpointError, match=r"expected format kifmerge.state version 1"):
            synthetic.run(path, tmp_path / "run", resume=True)
