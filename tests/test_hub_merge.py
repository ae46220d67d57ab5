"""Merges of models on the Hub: the bytes of a merge of the same folders, and no more pulled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import faults
import folders
import hub_merges
import merges
import pytest
import torch
from hub_merges import Published, kifmerge
from huggingface_hub import constants
from loopback import OTHER_TOKEN, Fault, LoopbackHub
from phases import test_merge_adapters as adapters

pytestmark = pytest.mark.slow  # hundreds of requests

FETCHES = ("auto", "download", "stream")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_merges.be_small(monkeypatch)


@pytest.fixture
def two(tmp_path: Path, hub: LoopbackHub) -> Published:
    return hub_merges.two_sided(tmp_path, hub)


def of_adapters(folder: Path, hub: LoopbackHub) -> Published:
    adapters.write(folder)
    roles = [("--base", "base"), *((f"--{role}", role) for role in merges.TWO)]
    roles += [(f"--{role}-importance", f"{role}-importance") for role in merges.TWO]
    return Published(folder, hub, ("--rule", "recurrent-kif"), roles)


def unscored(folder: Path, hub: LoopbackHub) -> Published:
    """Models with whole numbers, which differ, and a tensor without scores, which does not."""
    files = merges.Files(folder).write(shapes=hub_merges.SHAPES, shards=(3, 2, 0))
    for number, role in enumerate(("base", *merges.TWO)):
        state = {**files.states[number], "whole": torch.arange(1000) + number}
        state["f.weight"] = files.states[0]["a.weight"] * 2
        shutil.rmtree(folder / role)
        folders.save(folder / role, state, num_shards=3)
    roles = [("--base", "base"), *((f"--{role}", role) for role in merges.TWO)]
    roles += [(f"--{role}-importance", f"{role}-importance") for role in merges.TWO]
    return Published(folder, hub, ("--rule", "kif", "--unscored", "base"), roles)


KINDS = {
    "snapshots": hub_merges.two_sided,
    "masks": lambda folder, hub: hub_merges.two_sided(folder, hub, "masks"),
    "units": lambda folder, hub: hub_merges.two_sided(folder, hub, "units"),
    "linear": hub_merges.several,
    "task-arithmetic": lambda folder, hub: hub_merges.several(folder, hub, "task-arithmetic"),
    "ties": lambda folder, hub: hub_merges.several(folder, hub, "ties", "--density", "0.3"),
    "adapters": of_adapters,
    "unscored": unscored,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fetch", FETCHES)
def test_the_bytes_of_a_merge_of_the_same_folders(
    tmp_path: Path, hub: LoopbackHub, kind: str, fetch: str
) -> None:
    published = KINDS[kind](tmp_path, hub)
    result = published.run(tmp_path / "out", "--fetch", fetch, "--json")
    assert result.code == 0, result.err
    if (kind, fetch) == ("unscored", "stream"):
        # One pass, over sensitivity and uncertainty at a time.
        assert result.err.count("warning: streamed in another order than they are stored in") == 1
    else:
        assert "warning" not in result.err
    found = faults.content(tmp_path / "out")
    by_commit = ("new_units", "historical_units") if kind == "units" else ()
    hub_merges.same_model(found, published.local(), by_commit=by_commit)
    parents = json.loads(found["kifmerge.json"])["made_by"]["parents"]
    expected = {f"org/{name}@{commit}" for name, commit in published.commits.items()}
    assert {parent["reference"] for parent in parents.values()} == expected
    assert hub_merges.TOKENS.encode() not in b"".join(found.values())
    cached = list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    assert bool(cached) == (fetch != "stream")


class TestPulled:
    """Bytes of weights, by the server's log."""

    def test_streamed_once(self, two: Published, tmp_path: Path) -> None:
        assert two.run(tmp_path / "out", "--fetch", "stream").code == 0
        models = ("base", "new", "historical")
        assert two.pulled(*models) == two.weight_bytes(*models)
        # Twice for the threshold, and once to fuse; the headers once.
        for role in merges.TWO:
            times = two.pulled(f"{role}-importance") / two.weight_bytes(f"{role}-importance")
            assert 2.9 < times < 3.1

    @pytest.mark.parametrize("rule", ["linear", "task-arithmetic"])
    def test_streamed_once_of_many(self, tmp_path: Path, hub: LoopbackHub, rule: str) -> None:
        several = hub_merges.several(tmp_path, hub, rule)
        assert several.run(tmp_path / "out", "--fetch", "stream").code == 0
        assert several.pulled() == several.weight_bytes()

    def test_downloaded_once(self, two: Published, tmp_path: Path) -> None:
        assert two.run(tmp_path / "out", "--fetch", "download").code == 0
        headers = two.pulled() - two.weight_bytes()
        assert 0 <= headers < 0.1 * two.weight_bytes()
        two.hub.clear_log()
        assert two.run(tmp_path / "again", "--fetch", "download").code == 0
        assert two.pulled() == 0
        assert faults.content(tmp_path / "again") == faults.content(tmp_path / "out")

    def test_nothing_of_a_base_that_says_only_what_it_is(
        self, tmp_path: Path, hub: LoopbackHub
    ) -> None:
        """Adapters of a whole model start at zero: its shards stay where they are."""
        files = adapters.on_a_whole_model(adapters.write(tmp_path))
        roles = [("--base", "base"), *((f"--{role}", role) for role in merges.TWO)]
        roles += [(f"--{role}-importance", f"{role}-importance") for role in merges.TWO]
        options = ("--rule", "recurrent-kif", "--space", "factor", "--allow", "adapter-base")
        published = Published(files.folder, hub, options, roles)
        for fetch in FETCHES:
            result = published.run(tmp_path / f"out-{fetch}", "--fetch", fetch)
            assert result.code == 0, result.err
        found = faults.content(tmp_path / "out-auto")
        hub_merges.same_model(found, published.local(), by_commit=["base"])
        header = (tmp_path / "base/model.safetensors").read_bytes()[:8]
        assert published.pulled("base") == len(FETCHES) * (8 + int.from_bytes(header, "little"))

    def test_only_headers_to_plan(self, two: Published, tmp_path: Path) -> None:
        result = two.run(tmp_path / "out", "--dry-run", "--json")
        plan = result.json()
        assert two.pulled() < 0.1 * two.weight_bytes()
        assert 0.9 * two.weight_bytes() < plan["pulled_bytes"] <= two.weight_bytes()
        assert len(plan["fetch"]) == 5
        assert not (tmp_path / "out").exists()
        streamed = two.run(tmp_path / "out", "--dry-run", "--json", "--fetch", "stream").json()
        importance = two.weight_bytes("new-importance", "historical-importance")
        assert 0.9 < (streamed["pulled_bytes"] - plan["pulled_bytes"]) / (2 * importance) < 1.1


class TestReferences:
    def test_folders_branches_and_tags(self, two: Published, tmp_path: Path) -> None:
        """One repository with all of it in folders, at a branch that is not the main one."""
        hub = two.hub
        files = {
            f"all/{name}/{path.relative_to(tmp_path / name)}": path
            for _, name in two.roles
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        hub.add_repo("org/all", {"README.md": b"nothing here"})
        commit = hub.add_repo("org/all", files, branch="work/1")
        hub.clear_log()
        for fetch in FETCHES:
            out = tmp_path / f"out-{fetch}"
            result = two.run(out, "--fetch", fetch, place="hf://org/all@work%2F1/all/")
            assert result.code == 0, result.err
            hub_merges.same_model(faults.content(out), two.local())
            parents = json.loads((out / "kifmerge.json").read_text())["made_by"]["parents"]
            assert parents["base"]["reference"] == f"hf://org/all@{commit}/all/base"
        again = two.run(tmp_path / "pinned", place=f"hf://org/all@{commit}/all/")
        assert again.code == 0
        assert faults.content(tmp_path / "pinned") == faults.content(tmp_path / "out-auto")

    def test_local_and_remote_side_by_side(self, two: Published, tmp_path: Path) -> None:
        arguments = two.arguments()
        arguments[arguments.index("org/new")] = tmp_path / "new"
        arguments[arguments.index("org/new-importance")] = tmp_path / "new-importance"
        result = kifmerge(*arguments, "--out", tmp_path / "out", "--fetch", "stream")
        assert result.code == 0, result.err
        hub_merges.same_model(faults.content(tmp_path / "out"), two.local())
        assert two.pulled("new", "new-importance") == 0

    def test_configuration_of_another(self, two: Published, tmp_path: Path) -> None:
        files = {"config.json": b'{"model_type": "none", "more": 1}', "vocab.txt": b"a",
                 "model.safetensors": b"never looked at"}  # fmt: skip
        commit = two.hub.add_repo("org/config", files)
        result = two.run(tmp_path / "out", "--config-from", "org/config", "--allow", "config")
        assert result.code == 0, result.err
        found = faults.content(tmp_path / "out")
        assert (found["config.json"], found["vocab.txt"]) == (
            files["config.json"],
            files["vocab.txt"],
        )
        parents = json.loads(found["kifmerge.json"])["made_by"]["parents"]
        assert parents["config_from"]["reference"] == f"org/config@{commit}"
        assert two.pulled("config") == 0

    def test_the_same_model_twice(self, tmp_path: Path, hub: LoopbackHub) -> None:
        several = hub_merges.several(tmp_path, hub, num=2)
        several.roles = [("--model", "model_1"), ("--model", "model_1")]
        for fetch in FETCHES:
            result = several.run(tmp_path / f"out-{fetch}", "--fetch", fetch)
            assert result.code == 0, result.err
            merged = folders.load(tmp_path / f"out-{fetch}")
            expected = folders.load(tmp_path / "model_1")
            assert merges.same_bits(merged, expected)


class TestWithoutNetwork:
    def test_what_was_downloaded_is_enough(
        self, two: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert two.run(tmp_path / "out", "--fetch", "download").code == 0
        two.hub.clear_log()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        result = two.run(tmp_path / "again")
        assert result.code == 0, result.err
        assert faults.content(tmp_path / "again") == faults.content(tmp_path / "out")
        assert two.hub.log == []

    def test_what_was_streamed_is_not(
        self, two: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert two.run(tmp_path / "out", "--fetch", "stream").code == 0
        two.hub.clear_log()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        result = two.run(tmp_path / "again")
        assert (result.code, len(result.lines)) == (3, 1)
        assert "HF_HUB_OFFLINE is set" in result.err
        assert two.hub.log == []
        assert not (tmp_path / "again").exists()


class TestOccupied:
    def test_made_of_the_same_commits(self, two: Published, tmp_path: Path) -> None:
        first = two.run(tmp_path / "out", "--fetch", "stream", "--json")
        before = {path: folders.state(path) for path in sorted((tmp_path / "out").rglob("*"))}
        two.hub.clear_log()
        again = two.run(tmp_path / "out", "--fetch", "stream", "--json")
        assert (again.code, again.json()) == (0, first.json())
        assert "is already made: nothing to do" in again.err
        assert two.pulled() < 0.1 * two.weight_bytes()  # headers
        assert {path: folders.state(path) for path in sorted((tmp_path / "out").rglob("*"))} == (
            before
        )

    def test_of_a_branch_that_has_moved(self, two: Published, tmp_path: Path) -> None:
        assert two.run(tmp_path / "out").code == 0
        old = faults.content(tmp_path / "out")
        folders.save(tmp_path / "new", folders.random_tensors(99, hub_merges.SHAPES), num_shards=3)
        moved = two.hub.add_repo("org/new", tmp_path / "new")
        refused = two.run(tmp_path / "out")
        assert (refused.code, len(refused.lines)) == (3, 1)
        assert "is not empty (made by another merge command)" in refused.err
        assert faults.content(tmp_path / "out") == old
        result = two.run(tmp_path / "out", "--overwrite")
        assert result.code == 0, result.err
        found = faults.content(tmp_path / "out")
        hub_merges.same_model(found, two.local())
        assert f"org/new@{moved}".encode() in found["kifmerge.json"]


class TestRebuilt:
    @pytest.mark.parametrize("fetch", FETCHES)
    def test_byte_for_byte(self, two: Published, tmp_path: Path, fetch: str) -> None:
        """From the commits of then, wherever the branches are now."""
        assert two.run(tmp_path / "out").code == 0
        two.hub.add_repo("org/new", {"README.md": b"gone"})
        shutil.rmtree(constants.HF_HUB_CACHE)
        record = tmp_path / "out/kifmerge.json"
        result = kifmerge("merge", record, "--out", tmp_path / "again", "--fetch", fetch)
        assert result.code == 0, result.err
        assert faults.content(tmp_path / "again") == faults.content(tmp_path / "out")

    def test_not_of_what_is_gone(self, two: Published, tmp_path: Path) -> None:
        assert two.run(tmp_path / "out", "--fetch", "stream").code == 0
        record = json.loads((tmp_path / "out/kifmerge.json").read_text())
        parents = record["made_by"]["parents"]
        parents["new"]["reference"] = f"org/new@{'0' * 40}"
        (tmp_path / "record.json").write_text(json.dumps(record))
        result = kifmerge("merge", tmp_path / "record.json", "--out", tmp_path / "again")
        assert (result.code, len(result.lines)) == (3, 1)
        assert "no such branch, tag or commit" in result.err
        assert not (tmp_path / "again").exists()


class TestRefused:
    """Each in one line, and nothing under the name of the output."""

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("org/nothing", "no such repository"),
            ("org/new@v9", "no such branch, tag or commit"),
            ("hf://org/new/inner", "no such folder"),
            ("org/pickles", "found pickles only"),
            ("org/gated", "the repository is gated"),
            ("org/half", "names shards that are missing"),
            ("org/outside", "is no file name of a shard"),
        ],
    )
    def test_what_cannot_be_read(
        self, two: Published, tmp_path: Path, name: str, says: str
    ) -> None:
        hub = two.hub
        config = {"config.json": b"{}"}
        hub.add_repo("org/pickles", {**config, "pytorch_model.bin": b"0"})
        hub.add_repo("org/gated", tmp_path / "new", gated=True)
        index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
        hub.add_repo("org/half", {**config, "model.safetensors.index.json": index})
        index = json.dumps({"weight_map": {"a": "../model.safetensors"}}).encode()
        hub.add_repo("org/outside", {**config, "model.safetensors.index.json": index})
        arguments = two.arguments()
        arguments[arguments.index("org/new")] = name
        result = kifmerge(*arguments, "--out", tmp_path / "out")
        assert result.code == 3
        assert says in result.err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("fetch", ["stream", "download"])
    @pytest.mark.parametrize("at", [0, 7, 100])
    def test_a_header_that_came_damaged(
        self, two: Published, tmp_path: Path, hub: LoopbackHub, fetch: str, at: int
    ) -> None:
        """Which says nothing against the file."""
        hub.fail(Fault(kind="cdn", match="org/new/*", corrupt_file_at=at))
        result = two.run(tmp_path / "out", "--fetch", fetch)
        assert result.code == 4
        assert "org/new@" in result.lines[-1]
        assert "came twice, and not alike" in result.lines[-1]
        assert two.run(tmp_path / "out", "--fetch", fetch).code == 0

    def test_a_private_one_of_somebody_else(
        self, two: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two.hub.add_repo("org/new", tmp_path / "new", private=True)
        monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
        result = two.run(tmp_path / "out")
        assert (result.code, len(result.lines)) == (3, 1)
        assert "no such repository, or a private one" in result.err
