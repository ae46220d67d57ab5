"""The commands memory, evaluate and importance: files, streams, exit codes, what is in the way."""

from __future__ import annotations

import json
import shutil

import folders
import pytest
import safetensors.torch
import synthetic
import torch
import yaml
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
)
from typer.testing import CliRunner

from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.cli import app
from kifmerge.models.data import DataOptions, read_examples
from kifmerge.phases.evaluate import (
    DEFINITIONS,
    predictions_dir,
    read_predictions,
    score_predictions,
    source_names,
)

COMMANDS = ("memory", "evaluate", "importance")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_lines(result) -> list[str]:
    """Lines of stderr, which must be a message and no traceback."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.stderr.splitlines()


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """A finished run with its data: copy what is to be changed."""
    folder = tmp_path_factory.mktemp("work")
    recipe = synthetic.write_recipe(folder, methods=["sequential", "recurrent-kif"], seeds=[1])
    synthetic.run(recipe, folder / "run", ["training.max_steps=4"])
    adapted = yaml.safe_load(recipe.read_text())
    adapted["model"]["lora"] = {"targets": ["query", "value"], "rank": 2, "dropout": 0.5}
    adapted["methods"] = ["sequential"]
    path = folder / "adapted.yaml"
    path.write_text(yaml.safe_dump(adapted))
    synthetic.run(path, folder / "adapted", ["training.max_steps=4"])
    return folder


@pytest.fixture
def stage_dir(work_dir):
    return work_dir / "run/sequential/seed-1/02-sizes"


@pytest.fixture
def model_dir(stage_dir):
    return stage_dir / "checkpoint"


@pytest.fixture
def adapter_dir(work_dir):
    return work_dir / "adapted/sequential/seed-1/02-sizes/checkpoint"


@pytest.fixture
def data(work_dir):
    return [work_dir / "colours-test.jsonl", work_dir / "sizes-test.jsonl"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_of_every_option(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    for option in ("--data", "--out", "--overwrite", "--json", "--quiet", "--column", "--label"):
        assert option in result.stdout


class TestMemory:
    def draw(self, out, *arguments, fraction=0.25):
        return invoke("memory", "--fraction", fraction, "--out", out, *arguments)

    def test_is_that_of_a_run(self, work_dir, stage_dir, tmp_path):
        # Stage 2 under seed 1 is drawn with seed 1002.
        data = work_dir / "sizes-train.jsonl"
        result = self.draw(tmp_path / "m.jsonl", "--data", data, "--seed", 1002, fraction=0.2)
        assert result.exit_code == 0
        assert (tmp_path / "m.jsonl").read_bytes() == (stage_dir / "memory.jsonl").read_bytes()

    def test_file_k_is_drawn_with_seed_and_k(self, work_dir, tmp_path):
        files = [work_dir / "colours-train.jsonl", work_dir / "sizes-train.jsonl"]
        both = self.draw(tmp_path / "m.jsonl", "--data", files[0], "--data", files[1], "--seed", 5)
        assert both.exit_code == 0
        content = b""
        for number, file in enumerate(files):
            self.draw(tmp_path / f"{number}.jsonl", "--data", file, "--seed", 5 + number)
            content += (tmp_path / f"{number}.jsonl").read_bytes()
        assert (tmp_path / "m.jsonl").read_bytes() == content
        # Another seed would have kept other rows.
        self.draw(tmp_path / "other.jsonl", "--data", files[1], "--seed", 5)
        assert not content.endswith((tmp_path / "other.jsonl").read_bytes())

    def test_prints_rows_of_each_file_and_of_all(self, work_dir, tmp_path):
        files = [work_dir / "colours-train.jsonl", work_dir / "sizes-train.jsonl"]
        out = tmp_path / "m.jsonl"
        result = self.draw(out, "--data", files[0], "--data", files[1])
        rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
        assert cells == [
            [str(files[0]), "24", "6", "0"],
            [str(files[1]), "24", "6", "1"],
            ["total", "48", "12", ""],
        ]
        assert f"{out.stat().st_size:,} bytes" in result.stdout
        assert result.stderr == ""

    def test_json(self, work_dir, tmp_path):
        file, out = work_dir / "sizes-train.jsonl", tmp_path / "m.jsonl"
        content = json.loads(self.draw(out, "--data", file, "--json", "--seed", 3).stdout)
        assert content == {
            "out": str(out),
            "files": [{"source": str(file), "num_rows": 24, "num_kept": 6, "seed": 3}],
            "num_rows": 24,
            "num_kept": 6,
            "num_bytes": out.stat().st_size,
            "is_new": True,
        }
        again = self.draw(out, "--data", file, "--json", "--seed", 3)
        assert json.loads(again.stdout) == {**content, "is_new": False}

    def test_columns_labels_and_rows(self, tmp_path):
        rows = [{"title": f"t{n}", "kind": n % 2} for n in range(40)]
        file = synthetic.write_rows(tmp_path / "table.jsonl", rows)
        options = ("--column", "text={title}!", "--column", "label={kind}", "--label", "no")
        out = tmp_path / "m.jsonl"
        result = self.draw(out, "--data", file, *options, "--label", "yes", "--rows", 20, "--json")
        assert json.loads(result.stdout)["num_rows"] == 20
        kept = read_examples(str(out), DataOptions(columns={}))
        assert len(kept) == 5
        assert {(int(e.input[1:-1]) % 2, e.output) for e in kept} == {(0, "no"), (1, "yes")}

    def test_same_rows_are_left_alone(self, work_dir, tmp_path):
        file, out = work_dir / "sizes-train.jsonl", tmp_path / "m.jsonl"
        self.draw(out, "--data", file)
        before = out.stat().st_mtime_ns
        result = self.draw(out, "--data", file)
        assert result.exit_code == 0
        assert error_lines(result) == [f"done already: {out} holds these rows"]
        assert out.stat().st_mtime_ns == before
        assert self.draw(out, "--data", file, "--quiet").stderr == ""

    def test_other_rows_are_not_overwritten(self, work_dir, tmp_path):
        file, out = work_dir / "sizes-train.jsonl", tmp_path / "m.jsonl"
        out.write_text("precious")
        result = self.draw(out, "--data", file)
        assert (result.exit_code, result.stdout) == (3, "")
        assert error_lines(result) == [
            f"kifmerge: {out} holds other rows: choose another file, or --overwrite it"
        ]
        assert out.read_text() == "precious"
        assert self.draw(out, "--data", file, "--overwrite").exit_code == 0
        assert len(read_examples(str(out), DataOptions(columns={}))) == 6
        assert self.draw(tmp_path, "--data", file, "--overwrite").exit_code == 3

    def test_none_kept_is_said(self, work_dir, tmp_path):
        out = tmp_path / "m.jsonl"
        result = self.draw(out, "--data", work_dir / "sizes-train.jsonl", fraction=0)
        assert result.exit_code == 0
        assert error_lines(result) == [f"a fraction of 0.0 of these rows is none: {out} is empty"]
        assert out.read_text() == ""

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            ((), 2),
            (("--data", "none.jsonl"), 3),
            (("--data", "FILE", "--data", "FILE"), 2),
            (("--data", "FILE", "--fraction", "1.5"), 2),
            (("--data", "FILE", "--fraction", "much"), 2),
            (("--data", "FILE", "--rows", "0"), 2),
            (("--data", "FILE", "--column", "text"), 2),
            (("--data", "FILE", "--column", "=x"), 2),
            (("--data", "FILE", "--column", "text=a", "--column", "text=b"), 2),
            (("--data", "FILE", "--column", "text={no such}"), 3),
            (("--data", "FILE", "--label", "large"), 3),
        ],
    )
    def test_mistakes(self, work_dir, tmp_path, arguments, code):
        file, out = str(work_dir / "sizes-train.jsonl"), tmp_path / "m.jsonl"
        result = self.draw(out, *(file if a == "FILE" else a for a in arguments))
        assert (result.exit_code, result.stdout) == (code, "")
        assert error_lines(result)
        assert not out.exists()

    def test_bad_row_is_named(self, tmp_path):
        file = synthetic.write_rows(tmp_path / "bad.jsonl", [{"text": "a", "label": "x"}, "{"])
        result = self.draw(tmp_path / "m.jsonl", "--data", file)
        assert result.exit_code == 3
        assert f"{file}:2: invalid JSON" in result.stderr


class TestNames:
    @pytest.mark.parametrize(
        ("sources", "names"),
        [
            (["a/test.jsonl"], ["test"]),
            (["a/test.jsonl", "b/dev.csv"], ["test", "dev"]),
            (["a/test.jsonl", "b/test.jsonl"], ["a-test", "b-test"]),
            (["x/a/test.json", "y/a/test.json"], ["x-a-test", "y-a-test"]),
            (["t.json", "t.jsonl"], ["t-0", "t-1"]),
            (["hf://datasets/o/n@main:test[:10%]"], ["10-]"]),
            (["..jsonl"], ["rows"]),
        ],
    )
    def test_tell_sources_apart(self, sources, names):
        assert source_names(sources) == [name.replace("]", "-") for name in names]


class TestEvaluate:
    def evaluate(self, model, out, data, *arguments):
        sources = [part for file in data for part in ("--data", file)]
        return invoke("evaluate", "--model", model, "--out", out, *sources, *arguments)

    def test_scores_are_those_of_the_run(self, model_dir, stage_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        result = self.evaluate(model_dir, out, data)
        assert result.exit_code == 0, result.stderr
        content = json.loads(out.read_text())
        assert list(content["files"]) == ["colours-test", "sizes-test"]
        kept = predictions_dir(out)
        assert sorted(path.name for path in kept.iterdir()) == [
            "colours-test.jsonl",
            "sizes-test.jsonl",
        ]
        for task in ("colours", "sizes"):
            ours = kept / f"{task}-test.jsonl"
            assert ours.read_bytes() == (stage_dir / f"predictions/{task}.jsonl").read_bytes()
            row = content["files"][f"{task}-test"]
            again = score_predictions(read_predictions(ours), "exact-match")
            assert {key: row[key] for key in again} == again
            assert (row["num_rows"], row["unknown_labels"]) == (8, [])
        for kind in ("score", "own_labels_score"):
            each = [row[kind] for row in content["files"].values()]
            assert content["mean"][kind] == sum(each) / 2
        assert content["predictions"] == "scores.predictions"
        assert content["definitions"] == DEFINITIONS
        assert content["metric"] == "exact-match"

    def test_where_it_came_from(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, data, "--batch-size", 3)
        made_by = json.loads(out.read_text())["made_by"]
        assert made_by["command"] == "evaluate"
        assert made_by["options"]["batch_size"] == 3
        assert made_by["parents"].keys() == {"model", "data/colours-test", "data/sizes-test"}
        assert made_by["parents"]["data/sizes-test"]["reference"] == str(data[1])
        assert all(len(parent["digest"]) == 64 for parent in made_by["parents"].values())

    def test_people_see_a_table(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        result = self.evaluate(model_dir, out, data)
        assert result.stderr == ""
        rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
        content = json.loads(out.read_text())
        mean = content["mean"]
        assert cells[-1] == [
            "mean", "", f"{100 * mean['score']:.1f}", f"{100 * mean['own_labels_score']:.1f}",
        ]  # fmt: skip
        assert [row[:2] for row in cells[:-1]] == [["colours-test", "8"], ["sizes-test", "8"]]

    def test_json_is_all_there_is_on_stdout(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        result = self.evaluate(model_dir, out, data, "--json", "--quiet")
        assert result.stderr == ""
        assert json.loads(result.stdout) == {"out": str(out), **json.loads(out.read_text())}

    @pytest.mark.parametrize("by_itself", [True, False])
    def test_adapter(self, adapter_dir, work_dir, data, tmp_path, by_itself):
        base = work_dir / "adapted/start/seed-1/base"
        model, more = (adapter_dir, ()) if by_itself else (base, ("--adapter", adapter_dir))
        result = self.evaluate(model, tmp_path / "s.json", data, *more)
        assert result.exit_code == 0, result.stderr
        kept = adapter_dir.parent / "predictions/sizes.jsonl"
        assert (tmp_path / "s.predictions/sizes-test.jsonl").read_bytes() == kept.read_bytes()

    def test_done_already(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        first = self.evaluate(model_dir, out, data)
        before = synthetic.files(tmp_path)
        times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        again = self.evaluate(model_dir, out, data)
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert "nothing to do" in again.stderr
        assert synthetic.files(tmp_path) == before
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times

    def test_another_evaluation_is_in_the_way(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, data[:1])
        before = synthetic.files(tmp_path)
        result = self.evaluate(model_dir, out, data)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "holds something else" in result.stderr
        assert synthetic.files(tmp_path) == before
        assert self.evaluate(model_dir, out, data, "--overwrite").exit_code == 0
        assert len(json.loads(out.read_text())["files"]) == 2
        assert len(list(predictions_dir(out).iterdir())) == 2

    @pytest.mark.parametrize("text", ["precious", "{}", '{"format": "kifmerge.evaluation"}'])
    def test_foreign_file_is_in_the_way(self, model_dir, data, tmp_path, text):
        out = tmp_path / "scores.json"
        out.write_text(text)
        assert self.evaluate(model_dir, out, data).exit_code == 3
        assert out.read_text() == text
        assert self.evaluate(model_dir, out, data, "--overwrite").exit_code == 0

    def test_predictions_without_scores_are_in_the_way(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, data)
        out.unlink()
        result = self.evaluate(model_dir, out, data)
        assert result.exit_code == 3
        assert str(predictions_dir(out)) in result.stderr

    def test_missing_predictions_are_made_again_only_if_asked_to(self, model_dir, data, tmp_path):
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, data)
        shutil.rmtree(predictions_dir(out))
        assert self.evaluate(model_dir, out, data).exit_code == 3
        assert self.evaluate(model_dir, out, data, "--overwrite").exit_code == 0
        assert len(list(predictions_dir(out).iterdir())) == 2

    def test_failure_leaves_earlier_scores(self, model_dir, data, tmp_path, monkeypatch):
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, data[:1])
        before = synthetic.files(tmp_path)
        monkeypatch.setattr("kifmerge.phases.evaluate.score_predictions", lambda *_: 1 / 0)
        result = self.evaluate(model_dir, out, data, "--overwrite")
        assert isinstance(result.exception, ZeroDivisionError)
        assert synthetic.files(tmp_path) == before

    def test_scores_never_lie_beside_predictions_of_another(
        self, model_dir, data, tmp_path, monkeypatch
    ):
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, data[:1])
        with monkeypatch.context() as patched:
            patched.setattr("kifmerge.phases.evaluate.write_json", lambda *_: 1 / 0)
            self.evaluate(model_dir, out, data, "--overwrite")
        assert len(list(predictions_dir(out).iterdir())) == 2
        # The first command again: what it wrote is no longer there.
        assert self.evaluate(model_dir, out, data[:1]).exit_code == 3

    def test_batch_size_reaches_the_model(self, model_dir, data, tmp_path, monkeypatch):
        counts = []
        pad = PreTrainedTokenizerBase.pad

        def counted(self, features, *arguments, **options):
            counts.append(len(features))
            return pad(self, features, *arguments, **options)

        monkeypatch.setattr(PreTrainedTokenizerBase, "pad", counted)
        self.evaluate(model_dir, tmp_path / "s.json", data, "--batch-size", 3)
        assert counts == [3, 3, 2] * 2

    def test_same_file_names_in_two_folders(self, model_dir, data, tmp_path):
        copies = []
        for file in data:
            folder = tmp_path / file.stem
            folder.mkdir()
            copies.append(shutil.copy(file, folder / "test.jsonl"))
        out = tmp_path / "scores.json"
        self.evaluate(model_dir, out, copies)
        assert list(json.loads(out.read_text())["files"]) == [
            "colours-test-test",
            "sizes-test-test",
        ]

    def test_labels_that_the_model_does_not_know_are_said(self, model_dir, data, tmp_path):
        rows = [{"text": "hum", "label": "soft"}, {"text": "huge", "label": "large"}]
        file = synthetic.write_rows(tmp_path / "mixed.jsonl", rows)
        result = self.evaluate(model_dir, tmp_path / "s.json", [file])
        assert result.exit_code == 0
        assert error_lines(result) == ["mixed: the model has no label 'soft': such rows score 0"]
        row = json.loads((tmp_path / "s.json").read_text())["files"]["mixed"]
        assert row["unknown_labels"] == ["soft"]

    def test_mean_is_over_scores_that_all_files_have(self, model_dir, data, tmp_path):
        rows = [{"text": "hum", "label": "soft"}]
        file = synthetic.write_rows(tmp_path / "strange.jsonl", rows)
        result = self.evaluate(model_dir, tmp_path / "s.json", [data[0], file])
        assert result.exit_code == 0
        content = json.loads((tmp_path / "s.json").read_text())
        assert "own_labels_score" not in content["files"]["strange"]
        assert content["mean"] == {"score": content["files"]["colours-test"]["score"] / 2}

    def test_declared_labels_widen_the_choice(self, model_dir, data, tmp_path):
        rows = [{"text": "huge", "label": "large"}] * 3
        file = synthetic.write_rows(tmp_path / "one.jsonl", rows)
        names = ("--label", "large", "--label", "little", "--label", "warm", "--label", "cold")
        self.evaluate(model_dir, tmp_path / "a.json", [file])
        self.evaluate(model_dir, tmp_path / "b.json", [file], *names)
        own = [json.loads((tmp_path / f"{n}.json").read_text())["files"]["one"] for n in "ab"]
        assert own[0]["own_labels_score"] == 1.0  # nothing else to choose from
        assert own[1]["own_labels_score"] == own[1]["score"]

    def test_rows(self, model_dir, data, tmp_path):
        self.evaluate(model_dir, tmp_path / "s.json", data, "--rows", 3)
        rows = json.loads((tmp_path / "s.json").read_text())["files"].values()
        assert [row["num_rows"] for row in rows] == [3, 3]

    def test_dry_run_writes_nothing(self, model_dir, data, tmp_path):
        result = self.evaluate(model_dir, tmp_path / "s.json", data, "--dry-run", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["options"]["model"]["kind"] == "classifier"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (("--metric", "bleu"), 2),
            (("--batch-size", "0"), 2),
            (("--data", "none.jsonl"), 3),
            (("--adapter", "nowhere"), 3),
            (("--set", "model.kind=poet"), 3),
            (("--set", "modle.kind=classifier"), 3),
        ],
    )
    def test_mistakes(self, model_dir, data, tmp_path, arguments, code):
        result = self.evaluate(model_dir, tmp_path / "s.json", data, *arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        assert error_lines(result)
        assert list(tmp_path.iterdir()) == []

    def test_no_such_model(self, data, tmp_path):
        result = self.evaluate(tmp_path / "none", tmp_path / "s.json", data)
        assert (result.exit_code, result.stdout) == (3, "")
        assert str(tmp_path / "none") in result.stderr

    def test_name_of_the_predictions_folder_is_refused(self, model_dir, data, tmp_path):
        result = self.evaluate(model_dir, tmp_path / "s.predictions", data)
        assert (result.exit_code, result.stdout) == (3, "")
        assert list(tmp_path.iterdir()) == []

    @pytest.fixture
    def stock_dir(self, model_dir, tmp_path):
        """A classifier that is not of ours."""
        torch.manual_seed(0)
        words = json.loads((model_dir / "tokenizer.json").read_text())["model"]["vocab"]
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16,
            id2label={0: "warm", 1: "cold"}, label2id={"warm": 0, "cold": 1},
        )  # fmt: skip
        directory = tmp_path / "stock"
        BertForSequenceClassification(config).save_pretrained(directory)
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
        return directory

    def test_stock_classifier(self, stock_dir, data, tmp_path):
        settings = ("--set", "model.max_tokens=12")
        out = tmp_path / "s.json"
        result = self.evaluate(stock_dir, out, data[:1], *settings)
        assert (result.exit_code, result.stderr) == (0, "")
        content = json.loads(out.read_text())
        assert content["made_by"]["options"]["model"]["max_tokens"] == 12
        assert content["files"]["colours-test"]["unknown_labels"] == []
        answers = {
            p.prediction for p in read_predictions(tmp_path / "s.predictions/colours-test.jsonl")
        }
        assert answers <= {"warm", "cold"}

    def test_encoder_without_a_head_needs_to_be_told(self, stock_dir, data, tmp_path):
        BertModel.from_pretrained(stock_dir).save_pretrained(stock_dir)
        result = self.evaluate(stock_dir, tmp_path / "s.json", data)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "model.kind" in result.stderr
        more = ("--set", "model.kind=classifier")
        result = self.evaluate(stock_dir, tmp_path / "s.json", data, *more)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "no classifier whose labels are known" in result.stderr
        assert not (tmp_path / "s.json").exists()


class TestImportance:
    def measure(self, model, out, data, *arguments):
        return invoke("importance", "--model", model, "--data", data, "--out", out, *arguments)

    def test_snapshot_of_a_checkpoint_that_stays_as_it_is(self, model_dir, data, tmp_path):
        before = synthetic.files(model_dir)
        out = tmp_path / "importance"
        result = self.measure(model_dir, out, data[1], "--batch-size", 3)
        assert (result.exit_code, result.stderr) == (0, "")
        assert synthetic.files(model_dir) == before
        found = read_snapshot(out)
        kept = safetensors.torch.load_file(model_dir / "model.safetensors")
        assert set(found.names) == set(kept)
        scores = dict(found.scores())
        assert {n: s.shape for n, s in scores.items()} == {n: t.shape for n, t in kept.items()}
        assert sum(float(s.sum()) for s in scores.values()) > 0
        details = found.details
        assert details["model"] == str(model_dir)
        assert (details["batch_size"], details["samples"], details["batches"]) == (3, 8, 3)
        assert details["options"] == {"average": "mean", "sensitivity": "first"}
        assert details["made_by"]["command"] == "importance"
        assert details["made_by"]["parents"]["data"]["reference"] == str(data[1])
        assert details["made_by"]["options"]["batch_size"] == 3
        assert yaml.safe_load(result.stdout)["samples"] == 8

    def test_of_an_adapter(self, adapter_dir, data, tmp_path):
        before = synthetic.files(adapter_dir)
        result = self.measure(adapter_dir, tmp_path / "s", data[0], "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["out"] == str(tmp_path / "s")
        assert synthetic.files(adapter_dir) == before
        kept = safetensors.torch.load_file(adapter_dir / "adapter_model.safetensors")
        found = read_snapshot(tmp_path / "s")
        assert set(found.names) == set(kept)
        assert found.details["adapter"] == str(adapter_dir)

    def test_smoothed(self, model_dir, data, tmp_path):
        options = ("--average", "ema", "--order", "mixed", "--samples", 4)
        self.measure(model_dir, tmp_path / "s", data[0], *options, "--batch-size", 1)
        found = read_snapshot(tmp_path / "s")
        assert {key.partition("/")[0] for key in found.tensors()} == {"sensitivity", "uncertainty"}
        assert (found.details["samples"], found.details["batches"]) == (4, 4)
        assert found.details["options"]["sensitivity"] == "mixed"

    def test_done_already(self, model_dir, data, tmp_path):
        out = tmp_path / "s"
        first = self.measure(model_dir, out, data[0])
        times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        again = self.measure(model_dir, out, data[0])
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert "nothing to do" in again.stderr
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times

    def test_another_snapshot_is_in_the_way(self, model_dir, data, tmp_path):
        out = tmp_path / "s"
        self.measure(model_dir, out, data[0])
        before = synthetic.files(out)
        result = self.measure(model_dir, out, data[1])
        assert (result.exit_code, result.stdout) == (3, "")
        assert synthetic.files(out) == before
        assert self.measure(model_dir, out, data[1], "--overwrite").exit_code == 0
        assert synthetic.files(out) != before

    def test_dry_run_writes_nothing(self, model_dir, data, tmp_path):
        result = self.measure(model_dir, tmp_path / "s", data[0], "--dry-run", "--json")
        assert json.loads(result.stdout)["options"]["nonfinite"] == "skip"
        assert list(tmp_path.iterdir()) == []

    def test_batches_that_are_not_finite(self, model_dir, data, tmp_path):
        spoilt = tmp_path / "model"
        shutil.copytree(model_dir, spoilt)
        tensors = safetensors.torch.load_file(spoilt / "model.safetensors")
        vocabulary = json.loads((spoilt / "tokenizer.json").read_text())["model"]["vocab"]
        rows = [json.loads(line) for line in data[0].read_text().splitlines()]
        word = next(w for w in rows[0]["text"].split() if w not in ("the", "a"))
        num_spoilt = sum(word in row["text"].split() for row in rows)
        name = "encoder.embeddings.word_embeddings.weight"
        tensors[name][vocabulary[word], 0] = 3e38  # finite, but its variance is not
        safetensors.torch.save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
        result = self.measure(spoilt, tmp_path / "s", data[0], "--batch-size", 1)
        assert result.exit_code == 0, result.stderr
        assert 0 < num_spoilt < 8
        assert error_lines(result) == [
            f"{num_spoilt} batches left out: a loss or gradient was not finite"
        ]
        found = read_snapshot(tmp_path / "s")
        assert found.details["samples"] == 8 - num_spoilt
        assert all(bool(score.isfinite().all()) for _, score in found.scores())
        more = ("--batch-size", 1, "--nonfinite", "raise")
        result = self.measure(spoilt, tmp_path / "r", data[0], *more)
        assert (result.exit_code, result.stdout) == (3, "")
        assert "batch 1 cannot be used: its loss is nan" in result.stderr
        assert not (tmp_path / "r").exists()

    def test_weights_that_are_not_finite(self, model_dir, data, tmp_path):
        spoilt = tmp_path / "model"
        shutil.copytree(model_dir, spoilt)
        tensors = safetensors.torch.load_file(spoilt / "model.safetensors")
        tensors["classifier.bias"][0] = torch.nan
        safetensors.torch.save_file(tensors, spoilt / "model.safetensors", {"format": "pt"})
        result = self.measure(spoilt, tmp_path / "s", data[0])
        assert (result.exit_code, result.stdout) == (3, "")
        assert f"classifier.bias in {spoilt}/model.safetensors" in result.stderr
        assert not (tmp_path / "s").exists()

    def test_targets_and_dtype(self, model_dir, data, tmp_path):
        options = ("--target", "*.query.weight", "--target", "classifier.*", "--dtype", "bfloat16")
        result = self.measure(model_dir, tmp_path / "s", data[0], *options, "--json")
        assert result.exit_code == 0, result.stderr
        content = json.loads(result.stdout)
        assert content["targets"] == ["*.query.weight", "classifier.*"]
        assert (content["dtype"], content["model_dtype"]) == ("bfloat16", "float32")
        kept = safetensors.torch.load_file(tmp_path / "s/importance.safetensors")
        names = safetensors.torch.load_file(model_dir / "model.safetensors")
        expected = {
            f"score/{n}" for n in names if n.endswith(".query.weight") or n.startswith("classifier")
        }
        assert kept.keys() == expected
        assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
        # All of them, measured and rounded, are the same.
        self.measure(model_dir, tmp_path / "all", data[0])
        every = read_snapshot(tmp_path / "all").tensors()
        assert all(torch.equal(kept[key], every[key].bfloat16()) for key in kept)
        # Other targets are another snapshot.
        assert self.measure(model_dir, tmp_path / "s", data[0], *options[2:]).exit_code == 3

    def test_sharded_model_gives_a_sharded_snapshot(self, model_dir, data, tmp_path):
        sharded = tmp_path / "model"
        shutil.copytree(model_dir, sharded)
        tensors = safetensors.torch.load_file(sharded / "model.safetensors")
        (sharded / "model.safetensors").unlink()
        folders.save(
            sharded,
            tensors,
            num_shards=3,
            config=json.loads((model_dir / "config.json").read_text()),
        )
        assert self.measure(model_dir, tmp_path / "one", data[0]).exit_code == 0
        result = self.measure(sharded, tmp_path / "s", data[0])
        assert result.exit_code == 0, result.stderr
        assert sorted(path.name for path in (tmp_path / "s").glob("*.safetensors")) == [
            f"importance-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)
        ]
        one, other = (dict(read_snapshot(tmp_path / n).scores()) for n in ("one", "s"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        pruned = invoke("prune", "--importance", tmp_path / "s", "--out", tmp_path / "mask")
        assert pruned.exit_code == 0, pruned.stderr

    def test_parameters_that_the_files_lack_are_said(self, model_dir, data, tmp_path):
        model = tmp_path / "model"
        shutil.copytree(model_dir, model)
        tensors = safetensors.torch.load_file(model / "model.safetensors")
        del tensors["classifier.bias"]
        safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})
        result = self.measure(model, tmp_path / "s", data[0])
        assert result.exit_code == 0
        assert error_lines(result) == [
            "not in the checkpoint's files, kept under their own names: classifier.bias"
        ]
        assert read_snapshot(tmp_path / "s").details["not_in_files"] == ["classifier.bias"]

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (("--average", "median"), 2),
            (("--order", "third"), 2),
            (("--sensitivity", "first"), 2),
            (("--dtype", "float16"), 2),
            (("--target", "query"), 3),
            (("--nonfinite", "keep"), 2),
            (("--batch-size", "0"), 2),
            (("--samples", "0"), 2),
            (("--adapter", "nowhere"), 3),
            (("--label", "warm"), 3),
        ],
    )
    def test_mistakes(self, model_dir, data, tmp_path, arguments, code):
        result = self.measure(model_dir, tmp_path / "s", data[0], *arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        assert error_lines(result)
        assert list(tmp_path.iterdir()) == []

    def test_labels_that_the_model_does_not_know(self, model_dir, tmp_path):
        file = synthetic.write_rows(tmp_path / "x.jsonl", [{"text": "hum", "label": "soft"}])
        result = self.measure(model_dir, tmp_path / "s", file)
        assert result.exit_code == 3
        assert "labels 'soft' are not among those of the model" in result.stderr
        assert not (tmp_path / "s").exists()
