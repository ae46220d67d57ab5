"""The demo: the same tasks for the same seed, a cure that is computed, and all of it kept."""

from __future__ import annotations

import json
import socket
from collections import Counter

import pytest
import synthetic

from kifmerge.demo import NUM_TEST_ROWS, NUM_TRAIN_ROWS, TASKS, run_demo, write_tasks
from kifmerge.errors import RunError
from kifmerge.recipe import load_recipe


def quietly(trial, moment):
    pass


class TestTasks:
    def test_are_the_same_for_the_same_seed(self, tmp_path):
        for name, seed in (("one", 3), ("two", 3), ("three", 4)):
            write_tasks(tmp_path / name, seed=seed)
        one, two, three = (synthetic.files(tmp_path / name) for name in ("one", "two", "three"))
        assert one == two
        assert one.keys() == three.keys()
        assert all(one[name] != three[name] for name in one)

    def test_are_balanced_and_their_parts_differ(self, tmp_path):
        write_tasks(tmp_path, seed=0)
        for task, labels in TASKS.items():
            parts = {}
            for part, num_rows in (("train", NUM_TRAIN_ROWS), ("test", NUM_TEST_ROWS)):
                lines = (tmp_path / f"{task}-{part}.jsonl").read_text().splitlines()
                parts[part] = [json.loads(line) for line in lines]
                counts = Counter(row["label"] for row in parts[part])
                assert counts == dict.fromkeys(labels, num_rows // len(labels))
            seen = {row["text"] for row in parts["train"]}
            overlap = sum(row["text"] in seen for row in parts["test"])
            assert overlap <= NUM_TEST_ROWS // 100

    def test_labels_and_telling_words_are_one_task_s_alone(self):
        labels = [label for task in TASKS.values() for label in task]
        assert len(labels) == len(set(labels)) == 16
        words = [word for task in TASKS.values() for text in task.values() for word in text.split()]
        assert len(words) == len(set(words))


class TestOut:
    @pytest.mark.parametrize("in_the_way", ["notes.txt", "tasks"])
    def test_folder_that_is_not_empty(self, tmp_path, in_the_way):
        (tmp_path / in_the_way).write_text("mine")
        with pytest.raises(RunError, match="is not empty: choose another folder for the demo"):
            run_demo(tmp_path, on_moment=quietly)
        assert [path.name for path in tmp_path.iterdir()] == [in_the_way]

    def test_file(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("mine")
        with pytest.raises(RunError, match=r"notes\.txt"):
            run_demo(path, on_moment=quietly)


@pytest.mark.slow
class TestWhole:
    """One demo, of another seed than the default, that nothing was tuned on."""

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        def refuse(*arguments):
            raise AssertionError("the demo asked for the network")

        out = tmp_path_factory.mktemp("demo") / "kept"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", refuse)
            patch.setattr(socket, "getaddrinfo", refuse)
            report = run_demo(out, seed=5, on_moment=quietly)
        return out, report

    def test_forgetting_and_its_cure_are_wide_apart(self, made):
        _, report = made
        op = {m: report.summary("score", m)["op"]["mean"] for m in report.matrices["score"]}
        assert op["recurrent-kif"] > op["sequential"] + 0.2
        assert op["multitask"] > op["sequential"] + 0.2

    def test_keeps_tasks_recipe_and_run(self, made):
        out, report = made
        assert {path.name for path in out.iterdir()} == {"tasks", "recipe.yaml", "run"}
        assert len(list((out / "tasks").iterdir())) == 2 * len(TASKS)
        kept = json.loads((out / "run/results.json").read_text())
        assert kept == json.loads(json.dumps(report.as_dict()))
        assert set(report.matrices["score"]["sequential"]) == {5}

    def test_its_recipe_runs_again(self, made, tmp_path):
        out, _ = made
        recipe = load_recipe(out / "recipe.yaml", ["methods=[sequential]", "training.max_steps=2"])
        assert recipe.seeds == [5]  # or the same recipe would give another run
        again = synthetic.run(
            out / "recipe.yaml",
            tmp_path / "run",
            ["methods=[sequential]", "training.max_steps=2"],
        )
        assert list(again.task_names) == list(TASKS)
