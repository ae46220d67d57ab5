"""Stages of a sequence: what each method starts from, what is remembered, what is made anew."""

from __future__ import annotations

import json
import shutil
import typing

import pytest
import synthetic
import yaml

from kifmerge.errors import DataError
from kifmerge.phases.sequence import (
    TaskSequence,
    at_once_folder,
    method_stages,
    prediction_path,
)
from kifmerge.phases.tasks import Task, TaskOptions
from kifmerge.recipe import load_recipe
from kifmerge.tensor.metrics import continual_metrics
from kifmerge.training.methods import METHODS, MethodName

pytestmark = pytest.mark.slow  # whole trainings

LORA = {"targets": ["query", "value"], "rank": 2, "alpha": 4, "dropout": 0.1}
LAST = "seed-0/02-sizes/checkpoint/model.safetensors"


def task(tmp_path, train, test, **options):
    paths = [
        str(synthetic.write_rows(tmp_path / f"{part}.jsonl", content))
        for part, content in (("train", train), ("test", test))
    ]
    return Task(TaskOptions(name="one", train=paths[0], test=paths[1], **options))


class TestTask:
    def test_labels_met_are_sorted(self, tmp_path):
        rows = [{"text": "t", "label": label} for label in "cab"]
        assert task(tmp_path, rows, rows).labels == ["a", "b", "c"]

    def test_declared_labels_keep_their_order(self, tmp_path):
        rows = [{"text": "t", "label": "a"}]
        assert task(tmp_path, rows, rows, labels=["b", "a"]).labels == ["b", "a"]

    def test_samples(self, tmp_path):
        rows = synthetic.rows("colours", 20)
        made = task(tmp_path, rows, rows, train_rows=5, test_rows=3)
        assert (len(made.train), len(made.test)) == (5, 3)

    def test_is_not_read_before_it_is_needed(self, tmp_path):
        made = Task(TaskOptions(name="one", train="none.jsonl", test="none.jsonl"))
        with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
            _ = made.train


def test_label_that_a_classifier_s_training_never_shows(tmp_path):
    """A row that cannot be answered right is a mistake in the files, not a wrong answer."""
    recipe_path = synthetic.write_recipe(tmp_path)
    rows = [*synthetic.rows("sizes", 4), {"text": "middling", "label": "Large"}]
    synthetic.write_rows(tmp_path / "sizes-test.jsonl", rows)
    with pytest.raises(DataError, match=r"sizes-test\.jsonl.*'Large'"):
        synthetic.run(recipe_path, tmp_path / "run")


class TestFolders:
    def test_names(self, tmp_path):
        tasks = [Task(TaskOptions(name=n, train="", test="")) for n in ("one", "two", "three")]
        stages = method_stages(tmp_path / "start", tmp_path / "own", tasks, METHODS["sequential"])
        assert [str(stage.relative_to(tmp_path)) for stage in stages] == [
            "start/00-before",
            "start/01-one",
            "own/02-two",
            "own/03-three",
        ]
        assert at_once_folder(tmp_path, tasks) == tmp_path / "03-all-tasks"
        assert prediction_path(tmp_path, "two") == tmp_path / "predictions/two.jsonl"

    def test_every_method_has_its_name(self):
        assert set(typing.get_args(MethodName)) == set(METHODS)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return synthetic.write_recipe(tmp_path_factory.mktemp("recipe"))


class TestMethods:
    def test_without_memory_all_are_sequential(self, recipe_path, tmp_path):
        methods = ["sequential", "replay-mixed", "replay-interleaved", "recurrent-kif"]
        settings = ["memory.fraction=0", f"methods=[{', '.join(methods)}]"]
        synthetic.run(recipe_path, tmp_path, settings)
        assert len({(tmp_path / method / LAST).read_bytes() for method in methods}) == 1

    def test_one_task_needs_no_more_than_the_start(self, recipe_path, tmp_path):
        tasks = yaml.safe_load(recipe_path.read_text())["tasks"][:1]
        report = synthetic.run(recipe_path, tmp_path, [f"tasks={json.dumps(tasks)}"])
        scores = report.matrices["score"]
        assert scores["sequential"] == scores["recurrent-kif"]
        assert [len(row) for row in scores["sequential"][0]] == [1, 1]
        assert continual_metrics(scores["sequential"][0]).op is not None

    def test_moments_tell_where_it_is(self, recipe_path, tmp_path):
        moments = []
        recipe = load_recipe(recipe_path)
        sequence = TaskSequence(recipe.sequence(), 0, tmp_path / "start", moments.append)
        sequence.run_start()
        sequence.run_method(METHODS["recurrent-kif"], tmp_path / "method")
        training = [m for m in moments if m.activity == "training" and m.task == "sizes"]
        assert [(m.done, m.total) for m in training] == [(step, 6) for step in range(1, 7)]
        assert training[-1].num_rounds >= 2
        ends = [m.task for m in moments if m.activity == "evaluating" and m.done == m.total]
        assert ends == ["colours", "sizes"] * 3


class TestAdapter:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("lora")
        model = {**synthetic.MODEL, "lora": LORA}
        recipe_path = synthetic.write_recipe(folder, ["colours", "sizes", "sounds"], model=model)
        synthetic.run(recipe_path, folder / "run", ["methods=[recurrent-kif]"])
        return recipe_path, folder / "run"

    def test_stages_hold_the_adapter_alone(self, finished):
        _, out = finished
        names = {name.rpartition("/")[2] for name in synthetic.weights(out)}
        assert names == {"adapter_model.safetensors", "model.safetensors"}
        whole = [name for name in synthetic.weights(out) if name.endswith("/model.safetensors")]
        assert whole == ["start/seed-0/base/model.safetensors"]

    def test_resumes_to_the_same_bytes(self, finished, tmp_path):
        recipe_path, out = finished
        copied = tmp_path / "run"
        shutil.copytree(out, copied)
        # The base stays where the adapters say it is.
        shutil.rmtree(copied / "recurrent-kif/seed-0/03-sounds")
        synthetic.run(recipe_path, copied, ["methods=[recurrent-kif]"], resume=True)
        assert synthetic.weights(copied) == synthetic.weights(out)


class TestMemory:
    @pytest.mark.slow
    def test_earlier_training_files_may_disappear(self, tmp_path):
        """The memory keeps what is needed of them, where labels are declared."""
        recipe_path = synthetic.write_recipe(tmp_path, ["colours", "sizes", "sounds"])
        content = yaml.safe_load(recipe_path.read_text())
        for entry in content["tasks"]:
            entry["labels"] = list(synthetic.TASKS[entry["name"]])
        recipe_path.write_text(yaml.safe_dump(content))
        synthetic.run(recipe_path, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        for method in ("sequential", "recurrent-kif"):
            shutil.rmtree(tmp_path / "run" / method / "seed-0/03-sounds")
        for name in ("colours", "sizes"):
            (tmp_path / f"{name}-train.jsonl").unlink()
        synthetic.run(recipe_path, tmp_path / "run", resume=True)
        assert synthetic.weights(tmp_path / "run") == synthetic.weights(tmp_path / "whole")

    def test_comes_from_all_earlier_tasks(self, tmp_path, monkeypatch):
        seen = {}

        def watch(loaded, examples, memory, *rest, **options):
            seen[options["seed"]] = [example.output for example in memory]
            return train_task(loaded, examples, memory, *rest, **options)

        from kifmerge.phases.stage import train_task

        monkeypatch.setattr("kifmerge.phases.stage.train_task", watch)
        recipe_path = synthetic.write_recipe(tmp_path, ["colours", "sizes", "sounds"])
        synthetic.run(recipe_path, tmp_path / "run", ["methods=[recurrent-kif]"])
        # A fifth of 24 rows: two of each label, task after task.
        assert seen[1] == []
        assert sorted(seen[2]) == ["cold", "cold", "warm", "warm"]
        assert sorted(seen[3]) == sorted(
            ["cold", "cold", "warm", "warm", "large", "large", "little", "little"]
        )


class TestExtension:
    def test_multitask_learns_all_anew(self, tmp_path):
        recipe_path = synthetic.write_recipe(tmp_path, methods=["multitask"])
        synthetic.run(recipe_path, tmp_path / "run")
        extended = synthetic.write_recipe(
            tmp_path, ["colours", "sizes", "sounds"], methods=["multitask"]
        )
        report = synthetic.run(extended, tmp_path / "run", resume=True)
        assert None not in report.matrices["score"]["multitask"][0][3]
        folders = sorted(p.name for p in (tmp_path / "run/multitask/seed-0").iterdir())
        assert folders == ["02-all-tasks", "03-all-tasks"]

    def test_interrupted_filling_in_goes_on(self, tmp_path):
        recipe_path = synthetic.write_recipe(tmp_path)
        synthetic.run(recipe_path, tmp_path / "run")
        lost = tmp_path / "run/start/seed-0/01-colours/predictions/sizes.jsonl"
        before = lost.read_bytes()
        lost.unlink()
        synthetic.run(recipe_path, tmp_path / "run", resume=True)
        assert lost.read_bytes() == before
