"""Pulling: what is chosen, that it is right, and that nothing half has a final name."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import faults
import folders
import pytest
import remote
from huggingface_hub import constants, snapshot_download
from loopback import Fault

from kifmerge.checkpoint import records
from kifmerge.errors import CheckpointError, RunError, TryAgainError
from kifmerge.phases.choosing import is_pickle, left_out
from kifmerge.phases.pull import Pull

pytestmark = pytest.mark.slow  # hundreds of requests

WEIGHTS = remote.noise("pull", 9_500_000)
WANTED = {
    "README.md": b"# Card\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": WEIGHTS,
    "sub/100%.json": b"1",
    "sub/deeper/vectors.safetensors": remote.noise("vectors", 100_000),
    "tokenizer.json": remote.noise("tokenizer", 70_000),
}
OTHERS = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "sub/.hidden/x.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "sub/model.ckpt": b"pickle",
    "tf_model.h5": b"tf",
    "flax_model.msgpack": b"flax",
    "model-q4.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "consolidated.safetensors": remote.noise("copy", 1000),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    remote.be_quick(monkeypatch)


@pytest.fixture
def commit(hub):
    found = hub.add_repo("org/a", {**WANTED, **OTHERS})
    hub.clear_log()
    return found


def content(directory):
    return faults.content(directory)


def hidden(out):
    return out.parent / f".{out.name}.unfinished"


def noted(out):
    return records.parse_journal((hidden(out) / "journal.jsonl").read_text())


class TestChoice:
    def test_all_but_what_is_of_other_kinds(self, hub, commit):
        told = []
        pull = Pull("org/a", say=told.append)
        assert set(pull.files) == set(WANTED)
        assert set(pull.left_out) == set(OTHERS)
        assert pull.left_out[".gitattributes"] == pull.left_out["sub/.hidden/x.json"] == "hidden"
        assert "pickle" in pull.left_out["sub/model.ckpt"]
        assert "format" in pull.left_out["onnx/model.onnx"]
        assert "copy" in pull.left_out["consolidated.safetensors"]
        (line,) = told
        assert line.startswith("left out, for --file to ask for: ")
        assert line.endswith(" and 6 more")
        assert ".gitattributes" not in line

    def test_a_copy_that_the_index_names_is_none(self, hub):
        index = {"weight_map": {"a": "consolidated-1.safetensors"}}
        files = {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "consolidated-1.safetensors": b"1",
            "consolidated-2.safetensors": b"2",
        }
        hub.add_repo("org/b", files)
        assert list(Pull("org/b").left_out) == ["consolidated-2.safetensors"]

    def test_copies_alone_are_the_weights(self, hub):
        hub.add_repo("org/b", {"consolidated.safetensors": b"1", "params.json": b"{}"})
        assert not Pull("org/b").left_out

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            (["*.json"], {"config.json", "tokenizer.json", "sub/100%.json", "sub/.hidden/x.json"}),
            (["config.json", "sub/*"], {
                "config.json", "sub/100%.json", "sub/deeper/vectors.safetensors",
                "sub/.hidden/x.json",
            }),
            (["*.bin"], {"pytorch_model.bin", "training_args.bin"}),
            (["optimizer.pt"], {"optimizer.pt"}),
            (["*.gguf", ".git*"], {"model-q4.gguf", ".gitattributes"}),
            (["*"], {n for n in {**WANTED, **OTHERS} if not is_pickle(n)}),
            (["consolidated.safetensors"], {"consolidated.safetensors"}),
        ],
    )  # fmt: skip
    def test_by_patterns(self, hub, commit, patterns, expected):
        assert set(Pull("org/a", patterns=patterns).files) == expected

    def test_patterns_that_choose_nothing(self, hub, commit):
        with pytest.raises(CheckpointError) as caught:
            Pull("org/a", patterns=["*.jsn", "config.json", "pytorch*"])
        advice = "name them, or end the pattern as they do"
        assert str(caught.value).splitlines() == [
            f"org/a@{commit}:",
            "  - --file *.jsn: matches none of its 18 files",
            f"  - --file pytorch*: matches pickles only (pytorch_model.bin): {advice}",
        ]

    def test_pickles_only(self, hub):
        files = {"config.json": b"{}", "pytorch_model.bin": b"1", "training_args.bin": b"2"}
        hub.add_repo("org/b", files)
        with pytest.raises(CheckpointError) as caught:
            Pull("org/b")
        assert "found pickles only (pytorch_model.bin, training_args.bin)" in str(caught.value)
        assert "save_pretrained(...)" in str(caught.value)
        assert set(Pull("org/b", patterns=["*.bin"]).files) == set(files) - {"config.json"}

    def test_nothing(self, hub):
        hub.add_repo("org/b", {".gitattributes": b"x"})
        with pytest.raises(CheckpointError, match="holds no files to pull"):
            Pull("org/b")

    def test_what_is_left_out_is_not_asked_for(self, hub, commit):
        assert left_out(Pull("org/a").folder, ["*.md"])["config.json"] == "not asked for"

    def test_a_reference_is_never_a_path(self, hub, commit, tmp_path, monkeypatch):
        (tmp_path / "org/a").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert str(Pull("org/a").folder) == f"org/a@{commit}"
        with pytest.raises(CheckpointError, match="expected ORG/NAME"):
            Pull("./org/a")

    def test_a_pickle_that_is_asked_for_is_warned_of(self, hub, commit, tmp_path):
        pull = Pull("org/a", patterns=["pytorch_model.bin"])
        with pytest.warns(UserWarning, match=r"may run code .*: pytorch_model.bin"):
            pull.run(tmp_path / "out")
        assert content(tmp_path / "out") == {"pytorch_model.bin": b"pickle"}


class TestPlan:
    def test_says_what_is_to_come(self, hub, commit):
        plan = Pull("org/a").plan()
        num_bytes = sum(map(len, WANTED.values()))
        assert plan["reference"] == f"org/a@{commit}"
        assert plan["commit"] == commit
        assert plan["files"] == {name: len(value) for name, value in WANTED.items()}
        assert (plan["num_files"], plan["num_bytes"]) == (len(WANTED), num_bytes)
        assert (plan["cached_bytes"], plan["pulled_bytes"]) == (0, num_bytes)
        json.dumps(plan)

    def test_and_what_is_there(self, hub, commit):
        snapshot_download("org/a", allow_patterns=["model.safetensors", "config.json"])
        plan = Pull("org/a").plan()
        assert plan["cached_bytes"] == len(WEIGHTS) + 2
        assert plan["pulled_bytes"] == plan["num_bytes"] - plan["cached_bytes"]


@pytest.mark.parametrize("where", ["cache", "folder"])
class TestPull:
    """What holds wherever files go."""

    def run(self, where, tmp_path, reference="org/a", **options):
        pull = Pull(reference, **options)
        return pull.run(None if where == "cache" else tmp_path / "out")

    def test_all_of_it_and_again(self, hub, commit, tmp_path, where):
        directory, figures, is_new = self.run(where, tmp_path)
        assert is_new
        assert content(directory) == WANTED
        assert figures == {
            "reference": f"org/a@{commit}",
            "commit": commit,
            "num_files": len(WANTED),
            "num_bytes": sum(map(len, WANTED.values())),
            "left_out": figures["left_out"],
        }
        # The index that tells copies of the weights from others is none of this repository.
        assert hub.pulled_bytes() == figures["num_bytes"]
        hub.clear_log()
        assert self.run(where, tmp_path) == (directory, figures, False)
        assert hub.pulled_bytes() == 0

    def test_a_folder_in_a_dataset(self, hub, tmp_path, where):
        hub.add_repo(
            "org/d", {"a/b/c.jsonl": b"1", "a/b/d/e.jsonl": b"2", "x": b""}, kind="dataset"
        )
        directory, figures, _ = self.run(where, tmp_path, "hf://datasets/org/d@main/a/b")
        assert content(directory) == {"c.jsonl": b"1", "d/e.jsonl": b"2"}
        commit = hub.head("org/d", kind="dataset")
        assert figures["reference"] == f"hf://datasets/org/d@{commit}/a/b"

    def test_a_branch_that_moves(self, hub, commit, tmp_path, where):
        pull = Pull("org/a")
        hub.add_repo("org/a", {"config.json": b"new", "model.safetensors": b"new"})
        directory, _, _ = pull.run(None if where == "cache" else tmp_path / "out")
        assert content(directory) == WANTED

    def test_damage_on_the_way_is_mended_once(self, hub, commit, tmp_path, where):
        hub.fail(Fault(match="model.safetensors", method="GET", corrupt_file_at=8_000_000))
        told = []
        directory, figures, _ = self.run(where, tmp_path, say=told.append)
        assert content(directory) == WANTED
        assert told[1:] == [
            f"org/a@{commit}/model.safetensors: damaged on the way, fetching it again"
        ]
        assert figures["num_bytes"] < hub.pulled_bytes() <= figures["num_bytes"] + len(WEIGHTS)

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    def test_damage_for_ever(self, hub, commit, tmp_path, where, name):
        hub.fail(Fault(match=name, method="GET", corrupt_file_at=60_000, times=None))
        with pytest.raises(TryAgainError, match=rf"{name}: the bytes that came are not those"):
            self.run(where, tmp_path)
        assert not (tmp_path / "out").exists()
        cached = [p for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.name == name]
        assert cached == []
        hub.mend()
        assert content(self.run(where, tmp_path)[0]) == WANTED

    @pytest.mark.parametrize("act", [
        {"status": 503}, {"reset": True}, {"truncate_at": 3}, {"expire": True},
        {"reset_at": 40_000}, {"status": 429, "retry_after": 0.05},
    ], ids=str)  # fmt: skip
    def test_faults_once(self, hub, commit, tmp_path, where, act):
        for kind in ("cdn", "resolve"):
            if kind == "cdn" or "expire" not in act:
                hub.fail(Fault(kind=kind, **act))
        directory, _, _ = self.run(where, tmp_path)
        assert content(directory) == WANTED
        assert any(row.fault for row in hub.log)

    def test_faults_for_ever(self, hub, commit, tmp_path, where):
        hub.fail(Fault(kind="cdn", match="model.safetensors", status=503, times=None))
        with pytest.raises(TryAgainError, match=r"model.safetensors: .*503"):
            self.run(where, tmp_path)
        assert not (tmp_path / "out").exists()

    def test_damage_in_the_cache_is_found(self, hub, commit, tmp_path, where):
        root = Path(snapshot_download("org/a"))
        path = (root / "model.safetensors").resolve()
        path.write_bytes(WEIGHTS[:-1] + b"\0")
        told = []
        directory, _, is_new = self.run(where, tmp_path, say=told.append)
        assert is_new
        assert content(directory).items() >= WANTED.items()
        assert told[-1].endswith("model.safetensors: damaged in the cache, fetching it again")

    def test_offline_from_the_cache(self, hub, commit, tmp_path, where, monkeypatch):
        Pull("org/a").run()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.clear_log()
        directory, figures, is_new = self.run(where, tmp_path)
        assert is_new == (where == "folder")
        assert figures["commit"] == commit
        assert content(directory) == WANTED
        assert hub.log == []

    def test_no_room(self, hub, commit, tmp_path, where, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
        with pytest.raises(TryAgainError, match=r"0.03 GB are needed, 0.02 GB are free"):
            self.run(where, tmp_path)
        assert hub.pulled_bytes() == 0
        assert not (tmp_path / "out").exists()

    def test_a_gated_one(self, hub, tmp_path, where):
        hub.add_repo("org/g", WANTED, gated=True)
        with pytest.raises(CheckpointError, match="gated: ask for access"):
            self.run(where, tmp_path, "org/g")
        assert not (tmp_path / "out").exists()

    def test_progress_reaches_the_end_and_no_further(self, hub, commit, tmp_path, where):
        root = Path(snapshot_download("org/a"))
        (root / "model.safetensors").resolve().write_bytes(WEIGHTS[:-1] + b"\0")
        steps = []
        pull = Pull("org/a")
        pull.run(None if where == "cache" else tmp_path / "out", on_progress=steps.append)
        assert sum(steps) == pull.plan()["num_bytes"]
        assert min(steps) >= 0


class TestCache:
    def test_others_find_it_offline_by_its_name(self, hub, commit, monkeypatch):
        directory, _, _ = Pull("org/a").run()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert Path(snapshot_download("org/a", local_files_only=True)) == directory

    def test_what_others_brought_is_not_pulled_again(self, hub, commit):
        snapshot_download("org/a", allow_patterns="*.safetensors")
        hub.clear_log()
        Pull("org/a").run()
        assert hub.pulled_bytes("model.safetensors") == 0


class TestFolder:
    def test_what_kifmerge_made_comes_back_as_it_was(self, hub, tmp_path):
        made = folders.save(
            tmp_path / "made", folders.random_tensors(4), num_shards=3, provenance={"files": {}}
        )
        (made / "tokenizer").mkdir()
        (made / "tokenizer/vocab.txt").write_text("a\n")
        hub.add_repo("org/m", made)
        Pull("org/m").run(tmp_path / "out")
        assert content(tmp_path / "out") == content(made)

    def test_files_in_git_may_come_without_ranges(self, hub, tmp_path):
        files = {"merges.txt": remote.noise("merges", 6_000_000), "model.safetensors": WEIGHTS}
        hub.add_repo("org/b", files)
        hub.fail(Fault(kind="resolve", ignore_range=True, times=None))
        Pull("org/b").run(tmp_path / "out")
        assert content(tmp_path / "out") == files

    def test_files_of_the_cache_are_copied(self, hub, commit, tmp_path):
        snapshot_download("org/a")
        hub.clear_log()
        Pull("org/a").run(tmp_path / "out")
        assert hub.pulled_bytes() == 0
        assert content(tmp_path / "out") == WANTED
        assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))

    def test_nothing_is_kept_in_the_cache(self, hub, commit, tmp_path):
        Pull("org/a").run(tmp_path / "out")
        assert not any(p.is_file() for p in Path(constants.HF_HUB_CACHE).rglob("model.safetensors"))

    @pytest.mark.parametrize("change", ["other", "more", "less"])
    def test_another_folder_is_in_the_way(self, hub, commit, tmp_path, change):
        out = tmp_path / "out"
        Pull("org/a").run(out)
        if change == "other":
            (out / "config.json").write_bytes(b"[]")
        elif change == "more":
            (out / "more.json").write_bytes(b"{}")
        else:
            (out / "config.json").unlink()
        before = content(out)
        with pytest.raises(RunError, match="exists already: it will not be overwritten"):
            Pull("org/a").run(out)
        assert content(out) == before
        assert Pull("org/a").run(out, overwrite=True)[2]
        assert content(out) == WANTED

    def test_an_empty_folder_is_none(self, hub, commit, tmp_path):
        (tmp_path / "out").mkdir()
        Pull("org/a").run(tmp_path / "out")
        assert content(tmp_path / "out") == WANTED

    def test_resume_pulls_what_is_missing(self, hub, commit, tmp_path):
        out = tmp_path / "out"
        hub.fail(Fault(match="tokenizer.json", status=503, times=None))
        with pytest.raises(TryAgainError, match=r"6 finished files are kept: --resume"):
            Pull("org/a").run(out)
        assert {record["name"] for record in noted(out)} == {
            *(name.replace("/", "%2F") for name in WANTED if "%" not in name), "sub%2F100%25.json",
        } - {"tokenizer.json"}  # fmt: skip
        hub.mend()
        hub.clear_log()
        steps = []
        Pull("org/a").run(out, resume=True, on_progress=steps.append)
        assert content(out) == WANTED
        assert hub.pulled_bytes() == len(WANTED["tokenizer.json"])
        assert sum(steps) == sum(map(len, WANTED.values()))
        assert not hidden(out).exists()

    def test_without_resume_all_of_it_comes_again(self, hub, commit, tmp_path):
        out = tmp_path / "out"
        hub.fail(Fault(match="tokenizer.json", status=503, times=None))
        with pytest.raises(TryAgainError):
            Pull("org/a").run(out)
        hub.mend()
        hub.clear_log()
        Pull("org/a").run(out)
        assert hub.pulled_bytes() == sum(map(len, WANTED.values()))

    def test_resume_of_another_commit_is_refused(self, hub, commit, tmp_path):
        out = tmp_path / "out"
        hub.fail(Fault(match="tokenizer.json", status=503, times=None))
        with pytest.raises(TryAgainError):
            Pull("org/a").run(out)
        hub.mend()
        hub.add_repo("org/a", {**WANTED, "config.json": b"new"})
        with pytest.raises(RunError, match=r"was begun otherwise:\n(.*\n)*.*reference"):
            Pull("org/a").run(out, resume=True)
        Pull(f"org/a@{commit}").run(out, resume=True)
        assert content(out) == WANTED

    def test_damage_keeps_the_files_that_are_right(self, hub, commit, tmp_path):
        hub.fail(Fault(match="tokenizer.json", method="GET", corrupt_file_at=5, times=None))
        with pytest.raises(TryAgainError, match="6 finished files are kept"):
            Pull("org/a").run(tmp_path / "out")

    def test_memory_is_bounded(self, hub, tmp_path):
        path = tmp_path / "model.safetensors"
        with path.open("wb") as file:
            for _ in range(16):
                file.write(WEIGHTS)
        hub.add_repo("org/b", {"model.safetensors": path})
        pull = Pull("org/b")
        before, most = resident_bytes(), 0

        def look(_):
            nonlocal most
            most = max(most, resident_bytes())

        pull.run(tmp_path / "out", on_progress=look)
        assert most - before < 48 << 20

    def test_kills_at_any_change_of_the_disk(self, hub, commit, tmp_path, monkeypatch):
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
        out, chance = tmp_path / "out", random.Random(1)

        def pull(say):
            Pull("org/a").run(out, resume=True)

        num_killed = 0
        while kill_at(chance.randrange(1, 25), pull) == -signal.SIGKILL:
            num_killed += 1
            assert not out.exists() or content(out) == WANTED
        assert num_killed > 5
        assert content(out) == WANTED
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_ctrl_c_keeps_what_is_finished(self, hub, commit, tmp_path):
        out = tmp_path / "out"
        hub.fail(Fault(match="tokenizer.json", kind="resolve", stall_at=1, stall_seconds=30))
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt, match="6 finished files are kept"):
            Pull("org/a").run(out)
        assert time.monotonic() - begun < 5
        assert not out.exists()


def kill_at(number, work):
    left = [number]

    def count(what, arguments):
        left[0] -= 1
        if left[0] == 0:
            faults.die()

    return faults.fork(work, count).end().code


def resident_bytes():
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def test_no_warning_where_there_is_none(hub, commit, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pull("org/a").run(tmp_path / "out")
