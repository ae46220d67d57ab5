"""Commits by the real client to the server on loopback: whole, once, and known to be there."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from loopback import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub
from loopback.store import Store

from kifmerge.errors import CheckpointError, TryAgainError
from kifmerge.hub import client
from kifmerge.hub.commit import (
    Change,
    Committed,
    Target,
    commit_change,
    open_target,
    parse_target,
)
from kifmerge.hub.target import Standing, look_up

pytestmark = pytest.mark.slow  # hundreds of requests

REPO = "org/made"
TARGET = Target(repo_id=REPO)
BIG = {f"model-{n}.safetensors": hashlib.shake_256(b"%d" % n).digest(200_000) for n in (1, 2, 3)}
SMALL = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n# Card\n"}
FILES = {**BIG, **SMALL}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def there(hub: LoopbackHub) -> str:
    """A repository that holds something; its head."""
    head = hub.add_repo(
        REPO, {"old.safetensors": b"0" * 10, "config.json": b"{}", "kept.txt": b"k"}
    )
    hub.clear_log()
    return head


def push(additions: dict[str, Path | bytes] | None = None, **options: object) -> Committed:
    """All files, unless told otherwise, to the main branch as it stands."""
    parent = options.pop("parent", None) or open_target(TARGET)
    of_change = {k: options.pop(k) for k in ("copies", "removals", "sha256") if k in options}
    change = Change(additions=FILES if additions is None else additions, **of_change)
    return commit_change(TARGET, change, "Add files", parent=parent, **options)


def kinds(hub: LoopbackHub, kind: str) -> int:
    return sum(row.kind == kind for row in hub.log)


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "target"),
        [
            ("org/name", Target(repo_id="org/name")),
            ("org/name@v2", Target(repo_id="org/name", branch="v2")),
            ("org/name@work/1", Target(repo_id="org/name", branch="work/1")),
            ("hf://org/name@work%2F1", Target(repo_id="org/name", branch="work/1")),
            ("hf://datasets/org/name", Target(repo_id="org/name", kind="dataset")),
        ],
    )
    def test_parsed(self, text: str, target: Target) -> None:
        assert parse_target(text) == target

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("name", "expected ORG/NAME"),
            ("org/name/sub", "expected ORG/NAME"),
            ("hf://org/name/sub", "without a folder"),
            ("hf://org/name@v1/sub", "without a folder"),
            (f"org/name@{'a' * 40}", "expected a branch"),
            ("org/na me", "expected ORG/NAME"),
            ("../name", "expected ORG/NAME"),
            ("", "expected ORG/NAME"),
        ],
    )
    def test_refused(self, text: str, says: str) -> None:
        with pytest.raises(CheckpointError, match=says):
            parse_target(text)

    def test_a_folder_of_that_name_here_is_not_meant(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "org/name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert parse_target("org/name") == Target(repo_id="org/name")


class TestOpening:
    @pytest.mark.parametrize("private", [True, False, None])
    def test_creates_what_is_missing(self, hub: LoopbackHub, private: bool | None) -> None:
        said: list[str] = []
        assert look_up(TARGET) == Standing()
        assert open_target(TARGET, private=private, say=said.append) == hub.head(REPO)
        assert hub.is_private(REPO) is bool(private)
        assert said == [f"created {REPO}" + {True: ", private", False: ", public"}.get(private, "")]
        assert look_up(TARGET) == Standing(is_private=bool(private), head=hub.head(REPO))

    def test_creates_nothing_that_is_there(self, hub: LoopbackHub, there: str) -> None:
        assert open_target(TARGET, private=False) == there
        assert {row.method for row in hub.log} == {"GET"}

    @pytest.mark.parametrize("private", [True, False])
    def test_refuses_another_visibility(self, hub: LoopbackHub, private: bool) -> None:
        hub.add_repo(REPO, SMALL, private=not private)
        word = "--private" if private else "--public"
        with pytest.raises(CheckpointError, match=f"is there already.*leave out {word}"):
            open_target(TARGET, private=private)
        assert hub.is_private(REPO) is not private

    def test_a_branch_starts_at_main(self, hub: LoopbackHub, there: str) -> None:
        branch = Target(repo_id=REPO, branch="work/1")
        assert look_up(branch) == Standing(is_private=False)
        assert open_target(branch) == there
        assert hub.branches(REPO) == ["main", "work/1"]
        commit_change(branch, Change(removals=["kept.txt"]), "Less", parent=there)
        assert open_target(branch) == hub.head(REPO, "work/1") != there
        assert hub.head(REPO) == there

    def test_a_dataset(self, hub: LoopbackHub) -> None:
        target = Target(repo_id=REPO, kind="dataset")
        change = Change(additions=SMALL)
        commit_change(target, change, "Add", parent=open_target(target))
        made = commit_change(target, change, "Add", parent=open_target(target))
        assert hub.read(REPO, "config.json", kind="dataset") == b"{}"
        assert made.url == f"{hub.endpoint}/datasets/{REPO}/commit/{made.commit}"
        assert not hub.has_repo(REPO)

    def test_waits_for_what_passes(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(kind="info", status=503))
        hub.fail(Fault(kind="create", status=500, after_act=True))
        hub.fail(Fault(kind="branch", reset=True, after_act=True))
        branch = Target(repo_id=REPO, branch="v1")
        assert open_target(branch, private=True) == hub.head(REPO, "v1")
        assert hub.is_private(REPO)

    @pytest.mark.parametrize(
        ("token", "says"),
        [
            ("hf_unheard_of", "your token is not accepted"),
            (READ_TOKEN, "your token does not allow it"),
            (OTHER_TOKEN, "your token does not allow it"),
        ],
    )
    def test_without_the_right(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, token: str, says: str
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(CheckpointError, match=says) as caught:
            open_target(TARGET)
        assert token not in str(caught.value)
        assert not hub.has_repo(REPO)

    def test_nothing_is_asked_offline(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            open_target(TARGET)
        assert hub.log == []


class TestCommits:
    @pytest.mark.parametrize("part_bytes", [None, 60_000])
    def test_one_commit_with_all_files(
        self, hub: LoopbackHub, tmp_path: Path, part_bytes: int | None
    ) -> None:
        hub.part_bytes = part_bytes
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
        made = push({name: tmp_path / name for name in FILES}, sha256=SHA256)
        assert {name: hub.read(REPO, name) for name in FILES} == FILES
        first, second = hub.commits(REPO)
        assert (first.title, first.id, first.parent) == ("Add files", made.commit, second.id)
        assert made.is_new
        assert made.url == f"{hub.endpoint}/{REPO}/commit/{made.commit}"
        assert (made.num_files, made.num_bytes) == (5, sum(map(len, FILES.values())))
        assert hub.pushed_bytes() == 600_000

    def test_the_first_line_is_the_title(self, hub: LoopbackHub, there: str) -> None:
        commit_change(TARGET, Change(removals=["kept.txt"]), "One\n\ntwo\nthree", parent=there)
        assert (hub.commits(REPO)[0].title, hub.commits(REPO)[0].message) == ("One", "two\nthree")

    def test_what_is_there_is_left_out(self, hub: LoopbackHub) -> None:
        first = push()
        hub.clear_log()
        again = push()
        assert again == Committed(commit=first.commit, url=first.url, is_new=False)
        assert len(hub.commits(REPO)) == 2
        assert {row.kind for row in hub.log} == {"info", "paths-info"}
        other = {**FILES, "config.json": b"[]", "model-2.safetensors": BIG["model-3.safetensors"]}
        changed = push(other)
        assert (changed.num_files, changed.num_bytes) == (2, 200_002)
        assert {name: hub.read(REPO, name) for name in other} == other
        assert hub.pushed_bytes() == 0  # the object is there, under another name

    def test_removals(self, hub: LoopbackHub, there: str) -> None:
        made = push(SMALL, removals=["old.safetensors", "never-there.safetensors"])
        assert hub.paths(REPO) == ["README.md", "config.json", "kept.txt"]
        assert (made.num_files, made.num_bytes) == (2, len(SMALL["README.md"]))
        assert not push(SMALL, removals=["old.safetensors"]).is_new

    def test_many_paths_are_asked_for_in_parts(self, hub: LoopbackHub, there: str) -> None:
        files = {f"part/{number:04}.txt": b"%d" % number for number in range(501)}
        push(files)
        assert hub.paths(REPO)[-501:] == sorted(files)
        assert kinds(hub, "paths-info") == 4
        assert not push(files).is_new

    def test_copies_of_a_work_branch(self, hub: LoopbackHub, there: str) -> None:
        work = Target(repo_id=REPO, branch="work")
        head = open_target(work)
        for name, content in BIG.items():
            head = commit_change(work, Change(additions={name: content}), name, parent=head).commit
        assert hub.head(REPO) == there
        hub.clear_log()
        copies = dict.fromkeys(BIG, head)
        made = push(SMALL, copies=copies, removals=["old.safetensors"])
        assert hub.paths(REPO) == sorted([*FILES, "kept.txt"])
        assert {name: hub.read(REPO, name) for name in FILES} == FILES
        assert (made.num_files, made.num_bytes) == (5, 600_000 + len(SMALL["README.md"]))
        assert (hub.pushed_bytes(), hub.pulled_bytes()) == (0, 0)
        assert len(hub.commits(REPO)) == 2
        assert not push(SMALL, copies=copies).is_new

    def test_a_commit_is_compared_with_what_was_sent(
        self, hub: LoopbackHub, there: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that keeps something else."""
        add = Store.add_regular
        monkeypatch.setattr(Store, "add_regular", lambda store, data: add(store, data + b" "))
        with pytest.raises(CheckpointError) as caught:
            push({"config.json": b"[]", **BIG}, removals=["kept.txt"])
        first, *problems = str(caught.value).splitlines()
        assert f"/commit/{hub.head(REPO)} is not what was sent" in first
        assert problems == ["  - config.json: another content"]

    def test_copies_over_another_of_the_same_size(self, hub: LoopbackHub) -> None:
        first, second = (BIG[f"model-{number}.safetensors"] for number in (1, 2))
        head = hub.add_repo(REPO, {"model.safetensors": first})
        work = hub.add_repo(REPO, {"model.safetensors": second}, branch="work")
        assert hub.head(REPO) == head
        assert push({}, copies={"model.safetensors": work}).is_new
        assert hub.read(REPO, "model.safetensors") == second

    @pytest.mark.parametrize(
        ("name", "says"), [("config.json", "kept in git itself"), ("none", "there is none")]
    )
    def test_copies_of_what_cannot_be_copied(
        self, hub: LoopbackHub, there: str, name: str, says: str
    ) -> None:
        with pytest.raises(CheckpointError, match=f"copying {name} .*{says}"):
            push({}, copies={name: there})

    def test_files_other_than_recorded(self, hub: LoopbackHub, there: str, tmp_path: Path) -> None:
        path = tmp_path / "model-1.safetensors"
        path.write_bytes(BIG["model-2.safetensors"])
        with pytest.raises(CheckpointError, match=r"model-1.safetensors: SHA-256 .*, expected"):
            push({**FILES, path.name: path}, sha256=SHA256)
        assert {row.kind for row in hub.log} == {"info"}
        assert hub.head(REPO) == there

    def test_a_file_that_is_not_there(self, hub: LoopbackHub, there: str, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"gone.safetensors: cannot be sent"):
            push({"gone.safetensors": tmp_path / "gone.safetensors"})

    def test_a_pull_request(self, hub: LoopbackHub, there: str) -> None:
        made = push(pull_request=True)
        assert hub.head(REPO) == there
        assert made.url == f"{hub.endpoint}/{REPO}/discussions/1"
        assert made.commit == hub.head(REPO, "refs/pr/1")
        assert {name: hub.read(REPO, name, "refs/pr/1") for name in FILES} == FILES
        again = push(pull_request=True)
        assert (again.commit, again.is_new) == (made.commit, False)
        assert kinds(hub, "commit") == 1
        other = push({**FILES, "config.json": b"[]"}, pull_request=True)
        assert other.url.endswith("/discussions/2")

    def test_a_pull_request_of_another_title_is_not_ours(
        self, hub: LoopbackHub, there: str
    ) -> None:
        change = Change(additions=SMALL)
        commit_change(TARGET, change, "Theirs", parent=there, pull_request=True)
        made = push(SMALL, pull_request=True)
        assert (made.is_new, made.url.rpartition("/")[2]) == (True, "2")


class TestLostAnswers:
    @pytest.mark.parametrize(
        "fault", [{"status": 500}, {"status": 504}, {"reset": True}, {"status": 524}]
    )
    @pytest.mark.parametrize("pull_request", [False, True])
    def test_a_commit_that_came_about(
        self, hub: LoopbackHub, there: str, fault: dict[str, object], pull_request: bool
    ) -> None:
        hub.fail(Fault(kind="commit", after_act=True, **fault))
        made = push(pull_request=pull_request, removals=["old.safetensors"])
        assert made.is_new
        assert (made.num_files, made.num_bytes) == (5, 600_000 + len(SMALL["README.md"]))
        assert kinds(hub, "commit") == 1
        branch = "refs/pr/1" if pull_request else "main"
        assert made.commit == hub.head(REPO, branch)
        assert hub.paths(REPO, branch) == sorted([*FILES, "kept.txt"])
        word = "discussions/1" if pull_request else f"commit/{made.commit}"
        assert made.url == f"{hub.endpoint}/{REPO}/{word}"

    def test_an_answer_that_is_cut(self, hub: LoopbackHub, there: str) -> None:
        hub.fail(Fault(kind="commit", truncate_at=10))
        assert push().commit == hub.head(REPO)
        assert kinds(hub, "commit") == 1

    @pytest.mark.parametrize("fault", [{"status": 503}, {"reset": True}])
    @pytest.mark.parametrize("pull_request", [False, True])
    def test_a_commit_that_did_not(
        self, hub: LoopbackHub, there: str, fault: dict[str, object], pull_request: bool
    ) -> None:
        hub.fail(Fault(kind="commit", times=2, **fault))
        made = push(pull_request=pull_request)
        assert made.is_new
        assert kinds(hub, "commit") == 3
        assert len(hub.commits(REPO, made.commit)) == 2
        assert hub.pushed_bytes() == 600_000

    def test_a_commit_that_never_comes_about(self, hub: LoopbackHub, there: str) -> None:
        hub.fail(Fault(kind="commit", times=None, status=503))
        with pytest.raises(TryAgainError, match="committing to org/made: the Hub answers HTTP 503"):
            push()
        assert hub.head(REPO) == there
        hub.mend()
        hub.clear_log()
        assert push().is_new
        assert hub.pushed_bytes() == 0

    def test_only_the_same_content_counts_as_ours(self, hub: LoopbackHub, there: str) -> None:
        """Another's pull request of the same title."""
        commit_change(
            TARGET, Change(additions={"x": b"1"}), "Add files", parent=there, pull_request=True
        )
        hub.fail(Fault(kind="commit", status=500, after_act=True))
        made = push(pull_request=True)
        assert made.url.endswith("/discussions/2")


class TestOthers:
    def test_who_commit_in_between(self, hub: LoopbackHub, there: str) -> None:
        theirs = hub.add_repo(REPO, {"other.txt": b"1"})
        with pytest.raises(CheckpointError, match=f"expected it at {there}, found it at {theirs}"):
            push(parent=there)
        assert hub.paths(REPO) == ["other.txt"]
        assert push().is_new

    def test_who_commit_the_same(self, hub: LoopbackHub, there: str) -> None:
        theirs = hub.add_repo(REPO, FILES)
        made = push(parent=there)
        assert made.commit == theirs
        assert len(hub.commits(REPO)) == 2

    def test_who_delete_the_branch(self, hub: LoopbackHub, there: str) -> None:
        from huggingface_hub import delete_branch

        branch = Target(repo_id=REPO, branch="v1")
        head = open_target(branch)
        change = Change(removals=["kept.txt"])
        delete_branch(REPO, branch="v1")
        with pytest.raises(CheckpointError, match="no such branch"):
            commit_change(branch, change, "Less", parent=head)


class TestUploads:
    def test_what_is_asked_to_wait_waits(self, hub: LoopbackHub, there: str) -> None:
        hub.fail(Fault(kind="commit", status=429, retry_after=1))
        start = time.monotonic()
        assert push(SMALL).is_new
        assert time.monotonic() - start >= 1

    def test_too_long_a_wait_is_left_to_the_user(self, hub: LoopbackHub, there: str) -> None:
        hub.fail(Fault(kind="commit", status=429, retry_after=3600))
        with pytest.raises(TryAgainError, match="HTTP 429"):
            push(SMALL)

    @pytest.mark.parametrize(
        "fault",
        [
            {"reset_at": 100_000},
            {"status": 500},
            {"expire": True},
            {"corrupt_at": 5},
            {"reset": True, "after_act": True},
        ],
    )
    def test_a_broken_upload_is_sent_again(
        self,
        hub: LoopbackHub,
        there: str,
        caplog: pytest.LogCaptureFixture,
        fault: dict[str, object],
    ) -> None:
        hub.fail(Fault(kind="put", **fault))
        assert push().is_new
        assert "signature" not in caplog.text
        assert {name: hub.read(REPO, name) for name in FILES} == FILES
        assert len(hub.commits(REPO)) == 2

    @pytest.mark.parametrize(
        "fault",
        [
            {"kind": "put", "corrupt_at": 5},
            {"kind": "complete", "status": 503, "after_act": True},
            {"kind": "complete", "reset": True, "after_act": True},
        ],
    )
    def test_parts_that_were_not_joined_are_sent_again(
        self, hub: LoopbackHub, there: str, fault: dict[str, object]
    ) -> None:
        """Or were, and the answer was lost: then they are there."""
        hub.part_bytes = 60_000
        hub.fail(Fault(**fault))
        assert push().is_new
        assert {name: hub.read(REPO, name) for name in FILES} == FILES
        assert len(hub.commits(REPO)) == 2

    @pytest.mark.parametrize("kind", ["preupload", "batch", "verify", "yaml", "paths-info"])
    @pytest.mark.parametrize("fault", [{"status": 502}, {"reset": True}])
    def test_failures_on_the_way(
        self, hub: LoopbackHub, there: str, kind: str, fault: dict[str, object]
    ) -> None:
        hub.fail(Fault(kind=kind, **fault))
        assert push().is_new
        assert {name: hub.read(REPO, name) for name in FILES} == FILES
        assert len(hub.commits(REPO)) == 2

    def test_interrupted_and_run_again(self, hub: LoopbackHub, there: str) -> None:
        missing = f"/{REPO}/{SHA256['model-2.safetensors']}"
        hub.fail(Fault(kind="batch", skip=1, times=None, status=400))
        hub.fail(Fault(kind="put", match=missing, times=None, status=403))
        with pytest.raises(CheckpointError, match="uploading to org/made"):
            push()
        assert hub.head(REPO) == there
        arrived = {row.path for row in hub.log if row.kind == "put" and row.status == 200}
        hub.mend()
        hub.clear_log()
        assert push().is_new
        sent = [row.path for row in hub.log if row.kind == "put"]
        assert missing in sent
        assert sorted([*arrived, *sent]) == sorted(f"/{REPO}/{SHA256[name]}" for name in BIG)
        assert {name: hub.read(REPO, name) for name in FILES} == FILES

    @pytest.mark.parametrize("token", ["hf_unheard_of", READ_TOKEN, OTHER_TOKEN])
    def test_without_the_right(
        self,
        hub: LoopbackHub,
        there: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        token: str,
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(CheckpointError, match="your token") as caught:
            push(parent=there)
        shown = f"{caught.value} {caught.value.__cause__} {caplog.text}"
        assert token not in shown
        assert WRITE_TOKEN not in shown
        assert hub.head(REPO) == there

    def test_a_server_without_xet(
        self, hub: LoopbackHub, there: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        with pytest.raises(CheckpointError, match="set HF_HUB_DISABLE_XET=1"):
            push()
        assert hub.head(REPO) == there

    def test_a_card_that_the_hub_does_not_take(self, hub: LoopbackHub, there: str) -> None:
        hub.fail(Fault(kind="yaml", status=400))
        with pytest.raises(CheckpointError, match="committing to org/made"):
            push()
        assert hub.head(REPO) == there
