"""The methods of KIF over a sequence of tasks: what a stage keeps, what is shared, kills."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import synthetic
import torch

from kifmerge.checkpoint.units import read_units
from kifmerge.errors import CheckpointError
from kifmerge.models.model import LoadedModel
from kifmerge.phases import stage
from kifmerge.phases.sequence import TaskSequence
from kifmerge.tensor.units import cumulative_scores, important_units
from kifmerge.training import resumable
from kifmerge.training.guard import GradientGuard
from kifmerge.training.kif_training import FrozenElements

pytestmark = pytest.mark.slow  # whole trainings

METHODS = ["kif", "kif-adaptive", "kif-m"]
LORA = {"targets": ["query", "value"], "rank": 2, "alpha": 4, "dropout": 0.1}
MODELS = {
    "full": {"model": {**synthetic.MODEL, "dropout": 0.1}, "kif": {"memory_steps": 4}},
    "lora": {"model": {**synthetic.MODEL, "lora": LORA}, "kif": {"unit": "lora-rank"}},
}
TASKS = ["colours", "sizes", "sounds"]
# A weight decay moves what is frozen unless that is undone; seven steps a task.
TRAINING = {
    "epochs": 1,
    "batch_size": 4,
    "learning_rate": 0.01,
    "device": "cpu",
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "save_steps": 3,
}


def recipe(folder, kind="full", tasks=TASKS, **changes):
    folder.mkdir(exist_ok=True)
    content = {"training": TRAINING, "methods": METHODS, **MODELS[kind], **changes}
    return synthetic.write_recipe(folder, tasks, **content)


def tensors(checkpoint):
    (path,) = checkpoint.glob("*.safetensors")
    return safetensors.torch.load_file(path)


def weights_of(stage_dir):
    (path,) = (stage_dir / "checkpoint").glob("*.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all methods that nothing interrupted."""
    folder = tmp_path_factory.mktemp("kif")
    path = recipe(folder)
    synthetic.run(path, folder / "run", ["methods=[sequential, kif, kif-adaptive, kif-m]"])
    return folder / "run"


class TestStages:
    def test_first_task_is_plain_training_but_scored(self, finished):
        shared = finished / "start/seed-0/01-colours"
        for method in METHODS:
            own = finished / method / "seed-0/01-colours"
            assert weights_of(own) == weights_of(shared)
            units = read_units(own).units
            assert all(unit.score == unit.cumulative > 0 for unit in units)
        assert not (shared / "units.json").exists()

    def test_orthogonality_makes_the_first_task_another(self, tmp_path):
        path = recipe(tmp_path, "lora", TASKS[:1], methods=["kif"])
        synthetic.run(path, tmp_path / "run")
        one = weights_of(tmp_path / "run/kif/seed-0/01-colours")
        assert one != weights_of(tmp_path / "run/start/seed-0/01-colours")

    @pytest.mark.parametrize("method", METHODS)
    def test_scores_cumulate(self, finished, method):
        before = None
        for number, task in enumerate(TASKS, start=1):
            units = read_units(finished / method / f"seed-0/{number:02d}-{task}")
            assert (units.kind, units.details["task"]) == ("tensor", task)
            scores = [unit.score for unit in units.units]
            found = [unit.cumulative for unit in units.units]
            assert found == cumulative_scores(scores, before)
            before = found

    def test_each_method_ends_with_weights_of_its_own(self, finished):
        ends = [weights_of(finished / m / "seed-0/03-sounds") for m in ("sequential", *METHODS)]
        assert len(set(ends)) == 4

    def test_what_was_done_is_recorded(self, finished):
        for method, num_outer in (("kif", 0), ("kif-m", 4)):
            details = json.loads((finished / method / "seed-0/02-sizes/stage.json").read_text())
            training = details["training"]
            assert (training["num_steps"], training["num_outer_steps"]) == (6, num_outer)
            shares = details["kif"]
            assert shares.pop("num_units") == 23
            assert sum(shares.values()) == pytest.approx(1.0)
        first = json.loads((finished / "kif/seed-0/01-colours/stage.json").read_text())
        assert first["kif"] == {"num_units": 23}

    def test_every_task_starts_from_the_fused_weights(self, tmp_path, monkeypatch):
        """Not from those of its training alone."""
        started = {}

        def watch(loaded, rows, *rest, **options):
            name = options["folders"].steps.name
            started[name] = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
            return train_task(loaded, rows, *rest, **options)

        train_task = stage.train_task
        monkeypatch.setattr(stage, "train_task", watch)
        path = recipe(tmp_path, methods=["kif"])
        synthetic.run(path, tmp_path / "run")
        fused = tensors(tmp_path / "run/kif/seed-0/02-sizes/checkpoint")
        assert all(torch.equal(started["03-sounds.training"][n], fused[n]) for n in fused)


class TestMemoryPass:
    def test_moves_nothing_but_units_important_to_earlier_tasks(self, finished):
        """The fused weights are those of KIF: up to the second task both learn alike."""
        fused = tensors(finished / "kif/seed-0/02-sizes/checkpoint")
        after = tensors(finished / "kif-m/seed-0/02-sizes/checkpoint")
        historical = read_units(finished / "kif-m/seed-0/01-colours").units
        marks = important_units([unit.cumulative for unit in historical])
        trained = {u.name for u, mark in zip(historical, marks, strict=True) if mark}
        assert 0 < len(trained) < len(historical)
        assert trained == {n for n in fused if not torch.equal(fused[n], after[n])}

    def test_without_memory_is_kif(self, tmp_path):
        path = recipe(tmp_path, methods=["kif", "kif-m"], memory={"fraction": 0})
        report = synthetic.run(path, tmp_path / "run")
        last = [weights_of(tmp_path / "run" / m / "seed-0/03-sounds") for m in ("kif", "kif-m")]
        assert last[0] == last[1]
        assert report.num_steps["kif"] == report.num_steps["kif-m"] == 18

    def test_once_through_memory_unless_steps_are_given(self, tmp_path):
        path = recipe(tmp_path, kif={}, methods=["kif-m"])
        report = synthetic.run(path, tmp_path / "run")
        # Four rows of each earlier task, four at once: 1 step, then 2.
        assert report.num_steps["kif-m"] == 18 + 1 + 2

    def test_has_a_learning_rate_of_its_own(self, finished, tmp_path):
        path = recipe(tmp_path, tasks=TASKS[:2], methods=["kif", "kif-m"])
        synthetic.run(path, tmp_path / "run", ["kif.memory_learning_rate=0"])
        last = [weights_of(tmp_path / "run" / m / "seed-0/02-sizes") for m in ("kif", "kif-m")]
        assert last[0] == last[1]


class TestHead:
    def test_covers_all_labels_from_the_start(self, finished):
        for number, task in enumerate(TASKS, start=1):
            folder = finished / f"kif/seed-0/{number:02d}-{task}/checkpoint"
            assert tensors(folder)["classifier.weight"].shape[0] == 6

    def test_that_grew_keeps_the_new_rows(self, tmp_path, monkeypatch):
        """A run that is given a further task: the rows of its labels have no history."""
        short = recipe(tmp_path, tasks=TASKS[:2], methods=["kif"])
        synthetic.run(short, tmp_path / "run")
        new = {}

        def watch(model, *rest):
            new.update({n: p.detach().clone() for n, p in model.named_parameters()})
            return fuse_task(model, *rest)

        fuse_task = stage.fuse_task
        monkeypatch.setattr(stage, "fuse_task", watch)
        longer = recipe(tmp_path, methods=["kif"])
        synthetic.run(longer, tmp_path / "run", resume=True)
        fused = tensors(tmp_path / "run/kif/seed-0/03-sounds/checkpoint")
        old = tensors(tmp_path / "run/kif/seed-0/02-sizes/checkpoint")
        for name in ("classifier.weight", "classifier.bias"):
            assert len(old[name]) == 4
            assert torch.equal(fused[name][4:], new[name][4:])
            assert not torch.equal(fused[name][:4], new[name][:4])


@pytest.mark.slow
class TestKeptOptimizer:
    def test_begins_where_the_training_of_the_task_before_ended(self, tmp_path):
        """The pass over memory has an optimizer of its own."""
        path = recipe(tmp_path, training={**TRAINING, "optimizer_state": "kept"})
        synthetic.run(path, tmp_path / "run", ["methods=[kif, kif-m]"])
        states = [
            tmp_path / "run" / m / "seed-0/02-sizes/optimizer/optimizer.safetensors"
            for m in ("kif", "kif-m")
        ]
        assert states[0].read_bytes() == states[1].read_bytes()
        step = safetensors.torch.load_file(states[0])["classifier.bias/step"]
        assert step.item() == 12


# Of kif-m alone. A task makes 6 steps; the passes over memory make 4 each (full), or 1 and 2.
MOMENTS = {
    "first task": (GradientGuard, "admits", 6 + 5),
    "second task": (GradientGuard, "admits", 6 + 6 + 5),
    "between training and fusion": (stage, "fuse_task", 2),
    "between fusion and pass": (stage, "important_elements", 1),
    "first step of a pass": (FrozenElements, "clear_gradients", 1),
    "last step of the second pass": (FrozenElements, "on_optimizer_step", {"full": 8, "lora": 3}),
    "saving weights of a pass": (stage, "_with_pass", 1),
    "saving state": (resumable, "write_state", 8),
    "saving the stage": (TaskSequence, "_predict", 13),
    "saving weights": (LoadedModel, "save", 10),
}


@pytest.fixture(scope="module", params=["full", "lora"])
def whole(request, tmp_path_factory):
    """Kind, recipe and weights of a run of KIF-M that nothing interrupted."""
    folder = tmp_path_factory.mktemp(request.param)
    path = recipe(folder, request.param, methods=["kif-m"])
    synthetic.run(path, folder / "run")
    return request.param, path, artifacts(folder / "run")


def artifacts(run):
    """Weights, and units with their scores."""
    units = {name: data for name, data in synthetic.files(run).items() if "units.json" in name}
    return synthetic.weights(run) | units


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_run_is_the_same(whole, tmp_path, moment):
    kind, path, expected = whole
    owner, name, call = MOMENTS[moment]
    call = call[kind] if isinstance(call, dict) else call
    assert synthetic.kill_run(path, tmp_path / "run", owner, name, call)
    synthetic.run(path, tmp_path / "run", resume=True)
    assert artifacts(tmp_path / "run") == expected
    assert not [f for f in tmp_path.rglob("*") if "unfinished" in f.name or "training" in f.suffix]


@pytest.mark.slow
def test_goes_on_inside_a_pass_where_it_stood(tmp_path, monkeypatch):
    path = recipe(tmp_path, tasks=TASKS[:2], methods=["kif-m"])
    synthetic.run(path, tmp_path / "whole")
    assert synthetic.kill_run(path, tmp_path / "run", FrozenElements, "on_optimizer_step", 4)
    (step,) = (tmp_path / "run/kif-m/seed-0").glob("*.training/memory/step-*")
    assert step.name == "step-00000003"
    steps = []
    undo = FrozenElements.on_optimizer_step
    monkeypatch.setattr(
        FrozenElements,
        "on_optimizer_step",
        lambda *args, **kwargs: steps.append(1) or undo(*args, **kwargs),
    )
    synthetic.run(path, tmp_path / "run", resume=True)
    assert len(steps) == 1
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")


def test_lost_units_are_an_error(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "kif/seed-0/03-sounds")
    (run / "kif/seed-0/02-sizes/units.json").unlink()
    path = finished.parent / "recipe.yaml"
    with pytest.raises(CheckpointError, match=r"02-sizes holds no skill units"):
        synthetic.run(path, run, ["methods=[sequential, kif, kif-adaptive, kif-m]"], resume=True)
