"""Publishing folders to the server on loopback: what is sent, what stays, what the card says."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folders
import merges
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from loopback import Fault, LoopbackHub
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kifmerge.checkpoint.journal import unfinished_folder
from kifmerge.errors import CheckpointError
from kifmerge.fusion.rules import FusionOptions
from kifmerge.hub import client
from kifmerge.hub.target import Target
from kifmerge.phases.card import MARK
from kifmerge.phases.parcel import open_parcel
from kifmerge.phases.publish import Publication, PublishOptions
from kifmerge.phases.report import Report

REPO = "org/made"
TARGET = Target(repo_id=REPO)
SHA = "a" * 40
BESIDE = {
    "config.json": '{"model_type": "none", "architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": "{}",
    "tokenizer.model": "sentences",
    "chat_template.jinja": "{{ x }}",
    "modeling_own.py": "x = 1",
    "LICENSE": "free",
    "additional_chat_templates/tools.jinja": "{{ y }}",
}
LEFT = {
    ".hidden": "hidden",
    "pytorch_model.bin": "run code",
    "optimizer.pt": "run code",
    "other.safetensors": "no part of it",
    "old.safetensors.index.json": "no part of it",
    "trainer_state.json": "training goes on",
    "work.lock": "a lock",
    "train.jsonl": "not known",
    "state/": "training goes on",
    "out.0123456789ab.training/": "interrupted training",
    ".cache/": "hidden",
    "checkpoint/": "folder of its own",
    "additional_chat_templates/notes.txt": "not known",
}


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)


def write(directory: Path, contents: Mapping[str, str]) -> Path:
    for name, content in contents.items():
        path = directory / name
        if name.endswith("/"):
            (path / "inside").mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return directory


def recorded(directory: Path) -> dict[str, Any]:
    """What ``kifmerge.json`` says of the weight files there."""
    return {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(directory.glob("*.safetensors"))
    }


def checkpoint(directory: Path, seed: int = 1, num_shards: int = 0, **provenance: Any) -> Path:
    """A checkpoint with all that may lie beside it."""
    folders.save(directory, folders.random_tensors(seed), num_shards=num_shards)
    write(directory, BESIDE)
    made = {"files": recorded(directory), **folders.made_by("merge"), **provenance}
    if "made_by" not in provenance:
        made["made_by"]["options"] = {"rule": "average"}
    folders.write_provenance(directory, made)
    return directory


def made_by(command: str = "merge", **parents: str) -> dict[str, Any]:
    told = {r: {"reference": reference, "digest": None} for r, reference in parents.items()}
    return {"command": command, "options": {"rule": "average"}, "parents": told}


def push(directory: Path, say: Any = None, **options: Any) -> tuple[dict[str, Any], bool]:
    publication = Publication(
        directory, TARGET, PublishOptions(**options), **({} if say is None else {"say": say})
    )
    return publication.run()


def front(hub: LoopbackHub, revision: str = "main") -> dict[str, Any]:
    text = hub.read(REPO, "README.md", revision).decode()
    return yaml.safe_load(text.split("---\n")[1])


def paths(hub: LoopbackHub) -> set[str]:
    return set(hub.paths(REPO)) - {".gitattributes"}


class TestWhatIsSent:
    @pytest.mark.parametrize("num_shards", [0, 3])
    def test_a_checkpoint_with_all_that_belongs_to_it(
        self, hub: LoopbackHub, tmp_path: Path, num_shards: int
    ) -> None:
        directory = checkpoint(tmp_path / "made", num_shards=num_shards)
        weights = {path.name for path in directory.glob("model*")}
        write(directory, dict.fromkeys(LEFT, "x"))
        figures, is_new = push(directory, private=True)
        sent = {*weights, *BESIDE, "kifmerge.json"}
        assert paths(hub) == {*sent, "README.md"}
        assert {n: hub.read(REPO, n) for n in sent} == {
            n: (directory / n).read_bytes() for n in sent
        }
        assert is_new
        assert hub.is_private(REPO)
        assert len(hub.commits(REPO)) == 2
        assert hub.commits(REPO)[0].title == "Push checkpoint with kifmerge"
        card = len(hub.read(REPO, "README.md"))
        assert figures == {
            "repository": REPO,
            "branch": "main",
            "commit": hub.head(REPO),
            "url": f"{hub.endpoint}/{REPO}/commit/{hub.head(REPO)}",
            "num_files": len(sent) + 1,
            "num_bytes": card + sum((directory / name).stat().st_size for name in sent),
        }
        left_out = open_parcel(directory).left_out
        assert left_out.keys() == LEFT.keys()
        assert [name for name, why in LEFT.items() if why not in left_out[name]] == []

    def test_the_folder_is_not_changed(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        before = {path: folders.state(path) for path in directory.rglob("*")}
        push(directory)
        assert {path: folders.state(path) for path in directory.rglob("*")} == before

    def test_twice_is_once(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        first, _ = push(directory)
        hub.clear_log()
        again, is_new = push(directory)
        assert (again["commit"], again["num_files"], is_new) == (first["commit"], 0, False)
        assert len(hub.commits(REPO)) == 2
        assert not [row for row in hub.log if row.kind in ("put", "preupload", "batch", "commit")]

    def test_the_snapshot_of_a_training(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        folders.snapshot(directory / "importance", 1, folders.random_tensors(1), num_shards=2)
        write(directory / "importance", {"notes.txt": "x"})
        push(directory)
        inner = {n for n in paths(hub) if n.startswith("importance/")}
        assert inner == {
            "importance/importance.json",
            "importance/importance.safetensors.index.json",
            "importance/importance-00001-of-00002.safetensors",
            "importance/importance-00002-of-00002.safetensors",
        }
        assert f"`hf://{REPO}/importance`" in hub.read(REPO, "README.md").decode()
        assert "importance/notes.txt" in open_parcel(directory).left_out

    def test_another_branch_and_a_message(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.add_repo(REPO, {"kept.txt": b"1"})
        directory = checkpoint(tmp_path / "made")
        target = Target(repo_id=REPO, branch="v2")
        figures, _ = Publication(directory, target, PublishOptions(message="Two\n\nof it")).run()
        assert figures["branch"] == "v2"
        assert paths(hub) == {"kept.txt"}
        assert {"kept.txt", "model.safetensors"} <= set(hub.paths(REPO, "v2"))
        assert (hub.commits(REPO, "v2")[0].title, hub.commits(REPO, "v2")[0].message) == (
            "Two", "of it",
        )  # fmt: skip
        assert f"kifmerge pull {REPO}@v2" in hub.read(REPO, "README.md", "v2").decode()

    def test_a_pull_request(self, hub: LoopbackHub, tmp_path: Path) -> None:
        head = hub.add_repo(REPO, {"kept.txt": b"1"})
        figures, _ = push(checkpoint(tmp_path / "made"), pull_request=True)
        assert hub.head(REPO) == head
        assert figures["url"] == f"{hub.endpoint}/{REPO}/discussions/1"
        assert "model.safetensors" in hub.paths(REPO, "refs/pr/1")

    def test_notes_on_what_is_missing(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = folders.save(tmp_path / "made", folders.random_tensors(1))
        said: list[str] = []
        push(directory, said.append)
        assert [line for line in said if "tokenizer" in line]
        assert not [line for line in said if "config.json" in line]
        (directory / "config.json").unlink()
        push(directory, said.append)
        assert [line for line in said if "no config.json" in line]


class TestWhatWasThere:
    @pytest.mark.parametrize(("before", "after"), [(3, 2), (3, 0), (0, 2)])
    def test_weights_of_an_earlier_push_go_in_the_same_commit(
        self, hub: LoopbackHub, tmp_path: Path, before: int, after: int
    ) -> None:
        hub.add_repo(REPO, {"consolidated.safetensors": b"1" * 9, "kept.txt": b"1"})
        for number, num_shards in enumerate((before, after)):
            directory = checkpoint(tmp_path / str(number), seed=number, num_shards=num_shards)
            folders.snapshot(
                directory / "importance", 1, folders.random_tensors(1), num_shards=num_shards or 1
            )
            push(directory)
        own = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
        assert paths(hub) == own | {"README.md", "consolidated.safetensors", "kept.txt"}
        assert len(hub.commits(REPO)) == 3

    def test_a_snapshot_that_stays_is_told(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        folders.snapshot(directory / "importance", 1, folders.random_tensors(1))
        push(directory)
        shutil.rmtree(directory / "importance")
        said: list[str] = []
        push(directory, said.append)
        assert said[0] == f"importance/ of an earlier push stays in {REPO}"
        assert "importance/importance.json" in paths(hub)

    def test_another_kind_of_artifact(self, hub: LoopbackHub, tmp_path: Path) -> None:
        push(checkpoint(tmp_path / "made"))
        head = hub.head(REPO)
        snapshot = folders.snapshot(tmp_path / "snapshot", 1, folders.random_tensors(1))
        with pytest.raises(CheckpointError, match=r"another kind of artifact \(checkpoint\)"):
            push(snapshot)
        assert hub.head(REPO) == head

    def test_another_visibility(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.add_repo(REPO, {"kept.txt": b"1"})
        publication = Publication(
            checkpoint(tmp_path / "made"), TARGET, PublishOptions(private=True)
        )
        for act in (publication.plan, publication.run):
            with pytest.raises(CheckpointError, match="leave out --private"):
                act()
        assert len(hub.commits(REPO)) == 1


class TestPlan:
    def test_nothing_is_changed(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        plan = Publication(directory, TARGET, PublishOptions(private=True)).plan()
        assert not hub.has_repo(REPO)
        assert {row.method for row in hub.log} == {"GET"}
        assert (plan["exists"], plan["private"], plan["kind"]) == (False, True, "checkpoint")
        assert plan["keep"] == plan["remove"] == []
        assert plan["send"]["model.safetensors"] == (directory / "model.safetensors").stat().st_size
        assert plan["num_bytes"] == sum(plan["send"].values())
        figures, _ = push(directory, private=True)
        assert (figures["num_files"], figures["num_bytes"]) == (
            plan["num_files"],
            plan["num_bytes"],
        )

    @pytest.mark.parametrize("branch", [None, "v2"])
    def test_beside_what_is_there(
        self, hub: LoopbackHub, tmp_path: Path, branch: str | None
    ) -> None:
        push(checkpoint(tmp_path / "first", num_shards=2))
        head = hub.head(REPO)
        directory = checkpoint(tmp_path / "second", seed=2)
        target = Target(repo_id=REPO, branch=branch)
        plan = Publication(directory, target).plan()
        assert (plan["exists"], plan["private"], plan["branch"]) == (True, False, branch or "main")
        assert plan["send"].keys() == {"model.safetensors", "kifmerge.json"} | (
            set() if branch is None else {"README.md"}
        )
        assert set(plan["keep"]) == {*BESIDE, *(["README.md"] if branch is None else [])}
        assert plan["remove"] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ]
        assert (hub.head(REPO), hub.branches(REPO)) == (head, ["main"])


class TestRefused:
    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({"config.json": "{}"}, "holds no weights"),
            ({"config.json": "{}", "pytorch_model.bin": "x"}, "pickles only"),
            ({"state.json": "{}"}, "state of a training"),
            ({"manifest.json": "{}"}, "a whole run"),
            ({"notes.txt": "x"}, "no folder that kifmerge knows"),
            ({"model.safetensors": "short"}, "model.safetensors"),
        ],
    )
    def test_folders(
        self, hub: LoopbackHub, tmp_path: Path, files: dict[str, str], says: str
    ) -> None:
        with pytest.raises(CheckpointError, match=says):
            Publication(write(tmp_path / "made", files), TARGET)
        assert hub.log == []

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="expected a folder on this disk, found nothing"):
            Publication(tmp_path / "none", TARGET)
        (tmp_path / "file").write_text("x")
        with pytest.raises(CheckpointError, match="found a file"):
            Publication(tmp_path / "file", TARGET)

    @pytest.mark.parametrize(
        "name", [".unfinished-host-1", ".made.unfinished", "made.0123456789ab.training"]
    )
    def test_unfinished_work(self, tmp_path: Path, name: str) -> None:
        directory = checkpoint(tmp_path / name / "new")
        with pytest.raises(CheckpointError, match="which is unfinished work"):
            Publication(directory, TARGET)

    def test_a_folder_that_is_being_made_anew(self, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        unfinished_folder(directory).mkdir()
        with pytest.raises(CheckpointError, match="--resume"):
            Publication(directory, TARGET)

    def test_an_index_without_its_shards(self, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made", num_shards=2)
        (directory / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match="names shards that are missing"):
            Publication(directory, TARGET)

    def test_weights_of_another_size_than_recorded(self, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        folders.save(directory, {"a": torch.zeros(3)})
        with pytest.raises(CheckpointError, match=r"model.safetensors: expected \d+ bytes, found"):
            Publication(directory, TARGET)

    def test_weights_that_are_recorded_and_not_there(self, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made", num_shards=2)
        for path in directory.glob("model*"):
            path.unlink()
        folders.save(directory, folders.random_tensors(1))
        with pytest.raises(CheckpointError, match=r"expected .* found nothing"):
            Publication(directory, TARGET)

    def test_weights_that_have_changed_since(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.safetensors: SHA-256 .*, expected"):
            push(directory)
        assert not [row for row in hub.log if row.kind in ("put", "commit")]

    def test_records_of_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made", files={"model.safetensors": {"bytes": 3}})
        with pytest.raises(CheckpointError, match="expected sha256 and bytes of each file"):
            Publication(directory, TARGET)

    @pytest.mark.parametrize(
        "options",
        [
            {"base_models": ("name",)},
            {"base_models": ("org/name@v1",)},
            {"base_models": ("hf://org/name",)},
            {"message": " \ntext"},
        ],
    )
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"base model|no first line"):
            PublishOptions(**options)


class TestCard:
    def test_bases_and_licence_come_from_the_records(
        self, hub: LoopbackHub, tmp_path: Path
    ) -> None:
        card = b"---\nlicense: apache-2.0\n---\n# Base\n"
        heads = {name: hub.add_repo(f"org/{name}", {"README.md": card}) for name in ("a", "b")}
        hub.add_repo("org/a", {"README.md": b"---\nlicense: mit\n---\n"})  # not at that commit
        parents = {
            "base": f"org/a@{heads['a']}",
            "model_1": f"hf://org/b@{heads['b']}/sub",
            "model_1_importance": f"org/importance@{SHA}",
            "config_from": f"org/config@{SHA}",
        }
        push(checkpoint(tmp_path / "made", made_by=made_by(**parents)))
        assert front(hub) == {
            "base_model": ["org/a", "org/b"],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "license": "apache-2.0",
            "pipeline_tag": "text-generation",
            "tags": ["merge", "kifmerge"],
        }
        text = hub.read(REPO, "README.md").decode()
        assert MARK in text
        assert f"`{heads['a']}`" in text
        assert f"kifmerge pull {REPO} --out published" in text

    @pytest.mark.parametrize(
        ("licences", "found", "says"),
        [
            (("mit", "mit"), {"license": "mit"}, None),
            (("mit", "llama3"), {"license": "other"}, "differ: org/a: mit; org/b: llama3"),
            (("mit", None), {"license": "other"}, "differ: org/a: mit; org/b: none stated"),
            ((None, None), {}, "not known: org/a, org/b state none"),
        ],
    )
    def test_licences(
        self,
        hub: LoopbackHub,
        tmp_path: Path,
        licences: tuple[str | None, str | None],
        found: dict[str, str],
        says: str | None,
    ) -> None:
        parents = {}
        for role, name, licence in zip(("base", "model_1"), "ab", licences, strict=True):
            text = "# Card\n" if licence is None else f"---\nlicense: {licence}\n---\n# Card\n"
            parents[role] = (
                f"org/{name}@{hub.add_repo(f'org/{name}', {'README.md': text.encode()})}"
            )
        directory = checkpoint(tmp_path / "made", made_by=made_by(**parents))
        if says is None:
            push(directory)
        else:
            with pytest.warns(UserWarning, match=says):
                push(directory)
            assert says in hub.read(REPO, "README.md").decode()
        shown = front(hub)
        assert {key: shown[key] for key in shown if key.startswith("license")} == found
        push(directory, licence="apache-2.0")
        assert front(hub)["license"] == "apache-2.0"
        assert "differ" not in hub.read(REPO, "README.md").decode()

    def test_other_licences_are_the_same_only_by_name(
        self, hub: LoopbackHub, tmp_path: Path
    ) -> None:
        other = b"---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
        parents = {
            role: f"org/{role}@{hub.add_repo(f'org/{role}', {'README.md': other})}"
            for role in ("base", "model_1")
        }
        push(checkpoint(tmp_path / "made", made_by=made_by(**parents)))
        assert (front(hub)["license_name"], front(hub)["license_link"]) == ("own", "LICENSE")

    def test_bases_that_cannot_be_seen(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made", made_by=made_by(base=f"org/gone@{SHA}"))
        said: list[str] = []
        with pytest.warns(UserWarning, match="org/gone state none"):
            push(directory, said.append)
        assert front(hub)["base_model"] == ["org/gone"]
        assert any("looking up the licence of org/gone" in line for line in said)

    def test_parents_on_this_disk(self, hub: LoopbackHub, tmp_path: Path) -> None:
        parents = {"base": "runs/base", "model_1": "/home/me/tuned"}
        directory = checkpoint(tmp_path / "made", made_by=made_by(**parents))
        with pytest.warns(UserWarning, match="runs/base, /home/me/tuned: .* --base-model"):
            push(directory)
        assert front(hub).keys() == {"library_name", "pipeline_tag", "tags"}
        assert "`/home/me/tuned`" in hub.read(REPO, "README.md").decode()
        hub.add_repo("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
        push(directory, base_models=("org/base",))
        assert front(hub)["base_model"] == ["org/base"]
        assert front(hub)["base_model_relation"] == "merge"
        assert front(hub)["license"] == "mit"

    @pytest.mark.parametrize(
        ("command", "parents", "bases"),
        [
            ("train", {"model": f"org/a@{SHA}", "data": "rows.jsonl"}, ["org/a"]),
            ("replay", {"model": f"org/a@{SHA}", "memory": "m.jsonl"}, ["org/a"]),
            (
                "prune",
                {"importance": f"org/i@{SHA}", "model": f"org/b@{SHA}", "base": f"org/a@{SHA}"},
                ["org/a", "org/b"],
            ),
        ],
    )
    def test_other_commands(
        self,
        hub: LoopbackHub,
        tmp_path: Path,
        command: str,
        parents: dict[str, str],
        bases: list[str],
    ) -> None:
        made = made_by(command, **parents)
        push(checkpoint(tmp_path / "made", made_by=made), licence="mit")
        assert (front(hub)["base_model"], front(hub)["base_model_relation"]) == (bases, "finetune")
        text = hub.read(REPO, "README.md").decode()
        assert f"`kifmerge {command}`" in text
        assert "kifmerge pull" not in text
        assert front(hub)["tags"] == ["checkpoint", "kifmerge"]

    def test_of_a_run(self, hub: LoopbackHub, tmp_path: Path) -> None:
        own = {"made_by": None, "model": {"kind": "causal-lm", "reference": f"org/a@{SHA}"}}
        push(checkpoint(tmp_path / "made", **own), licence="mit")
        assert (front(hub)["base_model"], front(hub)["base_model_relation"]) == (
            ["org/a"], "finetune",
        )  # fmt: skip

    def test_of_a_checkpoint_of_somebody_else(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = folders.save(tmp_path / "made", folders.random_tensors(1))
        push(directory)
        assert front(hub).keys() == {"library_name", "tags"}
        assert "How it was made is not recorded." in hub.read(REPO, "README.md").decode()

    def test_scores_of_a_run(self, hub: LoopbackHub, tmp_path: Path) -> None:
        matrix = [[0.5, 0.0], [0.9, 0.1], [0.7, 0.8]]
        report = Report("two tasks", ["a", "b"], {"score": {"kif": {3: matrix}}}, {"kif": 12})
        content = json.dumps(report.as_dict())
        write(tmp_path / "run", {"results.json": content})
        directory = checkpoint(tmp_path / "made")
        push(directory, report_dir=tmp_path / "run")
        text = hub.read(REPO, "README.md").decode()
        assert "## Scores of two tasks" in text
        assert "| kif | 1 | 75.0 | -20.0 |" in text

    @pytest.mark.parametrize(
        ("content", "says"),
        [(None, "no report there"), ("{}", "no report there"), ('{"format": 1}', "not a report")],
    )
    def test_scores_that_are_none(self, tmp_path: Path, content: str | None, says: str) -> None:
        write(tmp_path / "run", {} if content is None else {"results.json": content})
        options = PublishOptions(report_dir=tmp_path / "run")
        with pytest.raises(CheckpointError, match=says):
            Publication(checkpoint(tmp_path / "made"), TARGET, options)

    def test_one_that_a_user_wrote_stays_as_it_is(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made", made_by=made_by(base="/home/me/base"))
        text = "---\nlicense: mit\n---\n# Mine\r\n\xa0no change"
        (directory / "README.md").write_bytes(text.encode())
        said: list[str] = []
        push(directory, said.append)
        assert hub.read(REPO, "README.md") == text.encode()
        assert f"{directory}/README.md is yours: sent as it is" in said
        with pytest.warns(UserWarning, match="says nothing of the options"):
            push(directory, licence="apache-2.0")

    def test_one_that_a_merge_wrote_is_written_anew(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        (directory / "README.md").write_text(f"---\ntags: [x]\n---\n{MARK}\n\n# Old\n")
        push(directory)
        assert front(hub)["tags"] == ["merge", "kifmerge"]
        assert (directory / "README.md").read_text().endswith("# Old\n")

    def test_one_that_was_edited_on_the_hub_stays(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.add_repo(REPO, {"README.md": b"---\nlicense: mit\n---\n# Edited there\n"})
        said: list[str] = []
        push(checkpoint(tmp_path / "made"), said.append)
        assert hub.read(REPO, "README.md").endswith(b"# Edited there\n")
        assert any("README.md of org/made is not kifmerge's: it stays" in line for line in said)
        assert "model.safetensors" in paths(hub)

    def test_front_matter_that_cannot_be_read(self, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made")
        (directory / "README.md").write_text("---\ntags: [x\n---\n# Mine\n")
        with pytest.raises(
            CheckpointError, match=r"README.md: its front matter is no YAML: .*line"
        ):
            Publication(directory, TARGET)


class TestEvidence:
    @pytest.fixture
    def files(self, tmp_path: Path) -> merges.Files:
        return merges.Files(tmp_path).write().make_masks().make_units()

    @pytest.mark.parametrize(
        ("name", "kind", "tag", "option"),
        [
            ("new-importance", "importance snapshot", "importance", "--new-importance"),
            (
                "historical-importance",
                "importance snapshot",
                "importance",
                "--historical-importance",
            ),
            ("new-mask", "mask", "mask", "--new-mask"),
            ("new-units", "skill units", "skill-units", "--new-units"),
        ],
    )
    def test_kinds(
        self, hub: LoopbackHub, files: merges.Files, name: str, kind: str, tag: str, option: str
    ) -> None:
        directory = files.folder / name
        _, is_new = push(directory)
        own = {path.name for path in directory.iterdir()}
        assert paths(hub) == {*own, "README.md"}
        assert {n: hub.read(REPO, n) for n in own} == {n: (directory / n).read_bytes() for n in own}
        assert is_new
        assert front(hub) == {"library_name": "kifmerge", "tags": [tag, "kifmerge"]}
        assert f"{option} {REPO} " in hub.read(REPO, "README.md").decode()
        assert hub.commits(REPO)[0].title == f"Push {kind} with kifmerge"
        assert not push(directory)[1]

    def test_how_a_mask_was_made(self, hub: LoopbackHub, files: merges.Files) -> None:
        push(files.folder / "new-mask")
        text = hub.read(REPO, "README.md").decode()
        assert "`kifmerge prune`" in text
        assert f"| importance | `{files.folder}/new-importance` |" in text
        assert "num_important: " in text

    def test_a_base_that_is_told(self, hub: LoopbackHub, files: merges.Files) -> None:
        hub.add_repo("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
        push(files.folder / "new-mask", base_models=("org/base",))
        assert front(hub) == {
            "base_model": ["org/base"],
            "library_name": "kifmerge",
            "license": "mit",
            "tags": ["mask", "kifmerge"],
        }

    def test_config_beside_it_is_none_of_it(self, hub: LoopbackHub, files: merges.Files) -> None:
        directory = write(files.folder / "new-mask", {"config.json": "{}", "LICENSE": "free"})
        push(directory)
        assert paths(hub) == {"mask.json", "mask.safetensors", "README.md", "LICENSE"}


class TestLoading:
    @pytest.fixture
    def merged(self, tmp_path: Path) -> Path:
        models = [tiny.llama(seed) for seed in range(3)]
        files = merges.Files(tmp_path).write(states=[tiny.trained(model) for model in models])
        for role, model in zip(("base", *merges.TWO), models, strict=True):
            model.save_pretrained(tmp_path / role)
        for seed, side in enumerate(merges.TWO):
            folders.snapshot(tmp_path / f"{side}-importance", seed, tiny.trained(models[0]))
        files.merge(FusionOptions())
        return tmp_path / "out"

    def test_what_transformers_loads_is_what_was_pushed(
        self, hub: LoopbackHub, merged: Path
    ) -> None:
        with pytest.warns(UserWarning, match="no repository on the Hub"):
            figures, _ = push(merged, private=True)
        local = AutoModelForCausalLM.from_pretrained(merged)
        pushed = AutoModelForCausalLM.from_pretrained(REPO, revision=figures["commit"])
        assert tiny.same(tiny.trained(pushed), tiny.trained(local))
        assert not tiny.same(tiny.trained(pushed), tiny.trained(tiny.llama(0)))
        assert "# made" in hub.read(REPO, "README.md").decode()

    def test_an_adapter(self, hub: LoopbackHub, tmp_path: Path) -> None:
        model = tiny.lora_llama()
        hub.add_repo("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
        model.peft_config["default"].base_model_name_or_path = "org/base"
        model.save_pretrained(tmp_path / "adapter")
        figures, _ = push(tmp_path / "adapter")
        assert paths(hub) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert front(hub) == {
            "base_model": ["org/base"],
            "base_model_relation": "adapter",
            "library_name": "peft",
            "license": "mit",
            "pipeline_tag": "text-generation",
            "tags": ["adapter", "kifmerge"],
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(tiny.llama(), REPO, revision=figures["commit"])
        kept = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
        found = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "lora" in n}
        assert merges.same_bits({n: found[n].detach() for n in kept}, kept)


class TestInterrupted:
    def test_run_again_only_what_is_missing_is_sent(self, hub: LoopbackHub, tmp_path: Path) -> None:
        directory = checkpoint(tmp_path / "made", num_shards=3)
        objects = {
            path.name: f"/{REPO}/{hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in directory.glob("*.safetensors")
        }
        missing = objects["model-00002-of-00003.safetensors"]
        hub.fail(Fault(kind="batch", skip=1, times=None, status=400))
        hub.fail(Fault(kind="put", match=missing, times=None, status=403))
        with pytest.raises(CheckpointError, match="uploading to org/made"):
            push(directory)
        assert paths(hub) == set()
        arrived = {row.path for row in hub.log if row.kind == "put" and row.status == 200}
        hub.mend()
        hub.clear_log()
        assert push(directory)[1]
        sent = [row.path for row in hub.log if row.kind == "put"]
        assert missing in sent
        assert sorted([*arrived, *sent]) == sorted(objects.values())
        assert len(hub.commits(REPO)) == 2

    @pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}])
    def test_a_lost_answer_is_a_success(
        self, hub: LoopbackHub, tmp_path: Path, fault: dict[str, Any]
    ) -> None:
        hub.fail(Fault(kind="commit", after_act=True, **fault))
        figures, is_new = push(checkpoint(tmp_path / "made"))
        assert (figures["commit"], is_new) == (hub.head(REPO), True)
        assert len(hub.commits(REPO)) == 2
