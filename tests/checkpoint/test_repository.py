"""A repository that is filled file by file, and changes once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import hub_merges
import pytest
from huggingface_hub import HfApi, hf_hub_download
from loopback import READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub

from kifmerge.checkpoint import work_branch as work_branch_module
from kifmerge.checkpoint.repository import RepositoryDestination, stale_files, stale_weights
from kifmerge.checkpoint.work_branch import RepositoryWork, work_branch
from kifmerge.errors import CheckpointError, DamagedTransferError, KifmergeError, TryAgainError
from kifmerge.hub.target import Target

OUT = "org/out"
TARGET = Target(repo_id=OUT)
WORK = {"command": "merge", "inputs": ["a"]}
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
MADE_BY = {"command": "merge", "options": {}, "parents": {}}


@pytest.fixture(autouse=True)
def _small(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_merges.be_small(monkeypatch)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


class Told:
    """A destination, and what it said."""

    def __init__(self, target: Target = TARGET, **options: Any) -> None:
        self.lines: list[str] = []
        self.to = RepositoryDestination(target=target, say=self.lines.append, **options)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def content(name: str, version: str = "new") -> bytes:
    return hashlib.shake_256(f"{name} {version}".encode()).digest(3000)


def record_of(name: str, version: str = "new") -> dict[str, Any]:
    found = content(name, version)
    return {
        "name": name,
        "num_bytes": len(found),
        "sha256": hashlib.sha256(found).hexdigest(),
        "more": 1,
    }


def add(work: RepositoryWork, name: str, version: str = "new") -> None:
    (work.directory / name).write_bytes(content(name, version))
    work.note(record_of(name, version))


def make(
    told: Told, work: Mapping[str, Any] = WORK, version: str = "new", *, stop_after: int = 2
) -> None:
    """Make a model of two files; or stop, as Ctrl-C does."""
    with told.to.begin(work) as making:
        for number, name in enumerate(NAMES):
            if number == stop_after:
                raise KeyboardInterrupt
            if name not in making.finished:
                add(making, name, version)
        for name, text in small(version).items():
            (making.directory / name).write_text(text)


def fill(action: Callable[[RepositoryWork], object]) -> None:
    """Do as told while a model is made, which does not become whole."""
    with Told().to.begin(WORK) as making:
        action(making)
        raise KeyboardInterrupt


def small(version: str) -> dict[str, str]:
    files = {name: {"sha256": record_of(name, version)["sha256"], "bytes": 1} for name in NAMES}
    made = {"made_by": {**MADE_BY, "options": {"version": version}}, "files": files}
    return {INDEX: "{}", "config.json": f'"{version}"', "kifmerge.json": json.dumps(made)}


def whole(version: str = "new") -> dict[str, bytes]:
    weights = {name: content(name, version) for name in NAMES}
    return {**weights, **{name: text.encode() for name, text in small(version).items()}}


def stopped(told: Told, num: int, work: Mapping[str, Any] = WORK, version: str = "new") -> str:
    """Stop after some files; returns what was said of it."""
    with pytest.raises(KeyboardInterrupt) as caught:
        make(told, work, version, stop_after=num)
    return str(caught.value)


def branch_of(work: Mapping[str, Any] = WORK, target: Target = TARGET) -> str:
    return work_branch(target, work).revision


class TestMade:
    def test_in_one_commit(self, hub: LoopbackHub) -> None:
        told = Told()
        make(told)
        assert hub_merges.content_of(hub, OUT) == whole()
        assert [commit.title for commit in hub.commits(OUT)] == [
            "Merge with kifmerge",
            "initial commit",
        ]
        assert hub.branches(OUT) == ["main"]
        assert f"committed to {OUT}: {hub.endpoint}/{OUT}/commit/{hub.head(OUT)}" in told.lines
        assert hub_merges.temporary_names() == []

    def test_a_file_leaves_the_disk_when_it_is_noted(self, hub: LoopbackHub) -> None:
        def look(making: RepositoryWork) -> None:
            assert making.holds_one
            add(making, NAMES[0])
            assert list(making.directory.iterdir()) == []
            assert hub.read(OUT, NAMES[0], branch_of()) == content(NAMES[0])
            assert making.finished == {NAMES[0]: record_of(NAMES[0])}

        with pytest.raises(KeyboardInterrupt):
            fill(look)

    def test_a_branch_comes_with_its_model(self, hub: LoopbackHub) -> None:
        head = hub.add_repo(OUT, whole("old"))
        target = Target(repo_id=OUT, branch="v2")
        told = Told(target)
        assert "kept" in stopped(told, 1)
        assert hub.branches(OUT) == [branch_of(target=target), "main"]
        make(told)
        assert hub.branches(OUT) == ["main", "v2"]
        assert hub_merges.content_of(hub, OUT, "v2") == whole()
        assert hub.head(OUT) == head

    def test_nothing_to_change(self, hub: LoopbackHub) -> None:
        hub.add_repo(OUT, whole())
        head = hub.head(OUT)
        make(Told())
        assert hub.head(OUT) == head
        assert hub.branches(OUT) == ["main"]

    def test_a_branch_that_cannot_be_deleted_is_told_of(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(kind="branch", method="DELETE", status=403, times=None))
        told = Told()
        make(told)
        assert hub_merges.content_of(hub, OUT) == whole()
        assert f"`hf repos branch delete {OUT} {branch_of()}` does it" in told.lines[-1]

    def test_a_deletion_that_hangs_is_not_waited_for(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(work_branch_module, "_TIDYING_SECONDS", 0.1)
        hub.fail(Fault(kind="branch", method="DELETE", stall_at=0, stall_seconds=3))
        told = Told()
        start = time.monotonic()
        make(told)
        assert time.monotonic() - start < 2
        assert "could not be deleted" in told.lines[-1]


class TestFound:
    @pytest.mark.parametrize("target", [TARGET, Target(repo_id=OUT, branch="v2")], ids=str)
    def test_what_is_there(self, hub: LoopbackHub, target: Target) -> None:
        told = Told(target)
        wanted = {**MADE_BY, "options": {"version": "new"}}
        assert told.to.find_made("kifmerge.json", lambda: wanted) is None
        make(told)
        found = told.to.find_made("kifmerge.json", lambda: wanted)
        assert found == json.loads(small("new")["kifmerge.json"])
        assert told.to.find_made("kifmerge.json", lambda: MADE_BY) is None

    @pytest.mark.parametrize(
        "kifmerge_json", [None, b"", b"[]", b"no JSON", b'{"made_by": 3}', b'{"made_by": {}}']
    )
    def test_not_what_is_none_of_ours(self, hub: LoopbackHub, kifmerge_json: bytes | None) -> None:
        files = {"config.json": b"{}"}
        if kifmerge_json is not None:
            files["kifmerge.json"] = kifmerge_json
        hub.add_repo(OUT, files)
        assert Told().to.find_made("kifmerge.json", lambda: MADE_BY) is None

    @pytest.mark.parametrize("change", ["other", "none", "no record"])
    def test_not_what_has_been_changed(self, hub: LoopbackHub, change: str) -> None:
        files = whole()
        if change == "other":
            files[NAMES[1]] = b"other"
        elif change == "none":
            del files[NAMES[1]]
        else:
            record = json.loads(files["kifmerge.json"])
            files["kifmerge.json"] = json.dumps({**record, "files": {NAMES[0]: 3}}).encode()
        hub.add_repo(OUT, files)
        wanted = {**MADE_BY, "options": {"version": "new"}}
        assert Told().to.find_made("kifmerge.json", lambda: wanted) is None

    def test_the_branch_of_a_finished_work_goes(self, hub: LoopbackHub) -> None:
        """A process was killed when it had changed the branch, or just before."""
        hub.fail(Fault(kind="branch", method="DELETE", status=403, times=None))
        make(Told())
        other = {**WORK, "inputs": ["b"]}
        hub.mend()
        stopped(Told(), 1, other, "other")
        wanted = {**MADE_BY, "options": {"version": "new"}}
        begun = f"{branch_of()}-begun"
        hub.add_repo(OUT, {"config.json": b"{}"}, branch=begun)
        hub.fail(Fault(kind="refs", status=403))
        assert Told().to.find_made("kifmerge.json", lambda: wanted) is not None
        assert hub.branches(OUT) == sorted([branch_of(), branch_of(other), begun, "main"])
        assert Told().to.find_made("kifmerge.json", lambda: wanted) is not None
        assert hub.branches(OUT) == sorted([branch_of(other), begun, "main"])

    def test_the_cache_is_left_alone(self, hub: LoopbackHub) -> None:
        told = Told()
        make(told)
        stopped(told, 1, {"other": 1}, "other")
        make(told, {"other": 1}, "other")
        told.to.find_made("kifmerge.json", lambda: MADE_BY)
        assert not Path(hub.env["HF_HUB_CACHE"]).exists()


class TestGoingOn:
    @pytest.mark.parametrize("num", [0, 1, 2])
    def test_from_what_is_finished(self, hub: LoopbackHub, num: int) -> None:
        before = stopped(Told(), num) if num < 2 else fail_at_the_end(hub)
        assert hub.paths(OUT) == [".gitattributes"]
        work = f"{OUT}@{branch_of()}"
        if num == 0:
            assert before == f"nothing is kept, {OUT} is as it was"
            assert hub.branches(OUT) == ["main"]
        else:
            kept = f"{num} finished files are kept in {work}: the same command goes on from them"
            assert before.endswith(kept)
        hub.clear_log()
        told = Told()
        make(told)
        assert hub_merges.content_of(hub, OUT) == whole()
        assert hub.pushed_bytes() == (2 - num) * 3000
        there = ", ".join(NAMES[:num])
        going_on = f"going on from {work}: {there} are there already, and not made or sent again"
        assert (going_on in told.lines) == (num > 0)

    def test_as_told_of_files_that_are_there(self, hub: LoopbackHub) -> None:
        """What the journal says otherwise than the branch does not count."""
        stopped(Told(), 1)
        branch = branch_of()
        files = {path: hub.read(OUT, path, branch) for path in hub.paths(OUT, branch)}
        hub.add_repo(OUT, {**files, NAMES[0]: b"other"}, branch=branch)
        make(Told())
        assert hub_merges.content_of(hub, OUT) == whole()

    @pytest.mark.parametrize("text", [b"", b"no JSON\n", b'{"name": 3}\n', b"\xff\xfe"])
    def test_from_a_journal_that_is_none(self, hub: LoopbackHub, text: bytes) -> None:
        hub.add_repo(OUT, {"config.json": b"{}"})
        hub.add_repo(OUT, {f".kifmerge/{branch_of()}.jsonl": text}, branch=branch_of())
        make(Told())
        assert hub_merges.content_of(hub, OUT) == whole()

    def test_not_from_the_work_of_another(self, hub: LoopbackHub) -> None:
        """Somebody has merged an unfinished branch into the main one, where branches begin."""
        stopped(Told(), 1, {"other": 1}, "other")
        other = branch_of({"other": 1})
        files = {path: hub.read(OUT, path, other) for path in hub.paths(OUT, other)}
        hub.add_repo(OUT, files)
        told = Told()
        make(told)
        assert "going on" not in told.text
        assert whole().items() <= hub_merges.content_of(hub, OUT).items()

    def test_others_are_told_of(self, hub: LoopbackHub) -> None:
        for number in (1, 2):
            stopped(Told(), 1, {"other": number}, "other")
        told = Told()
        stopped(told, 1)
        names = sorted(f"{OUT}@{branch_of({'other': number})}" for number in (1, 2))
        assert f"unfinished merges of other inputs or options are kept in {', '.join(names)}:" in (
            told.text
        )
        make(Told())
        assert hub.branches(OUT) == sorted([*(n.removeprefix(f"{OUT}@") for n in names), "main"])

    @pytest.mark.parametrize("fault", [{"status": 403}, {"stall_at": 0, "stall_seconds": 3}])
    def test_nobody_waits_to_tell_of_others(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(work_branch_module, "_TIDYING_SECONDS", 0.5)
        hub.fail(Fault(kind="refs", **fault))
        start = time.monotonic()
        make(Told())
        assert time.monotonic() - start < 2.5
        assert hub_merges.content_of(hub, OUT) == whole()

    def test_one_work_per_branch(self) -> None:
        other = Target(repo_id=OUT, branch="v2")
        names = {branch_of(), branch_of({"other": 1}), branch_of(target=other)}
        assert len(names) == 3
        assert branch_of() == branch_of(dict(reversed(WORK.items())))

    def test_in_a_new_place_after_a_kill(self, hub: LoopbackHub) -> None:
        """What killed processes have left goes; what others are at work with stays."""
        folder = Path(tempfile.gettempdir())
        for name in ("dead", "young", "busy"):
            (folder / f"kifmerge-unfinished-{name}/new").mkdir(parents=True)
            (folder / f"kifmerge-unfinished-{name}/new/{NAMES[0]}").write_bytes(b"half")
        (folder / "another").mkdir()
        (folder / "kifmerge-unfinished-file").touch()
        for path in folder.iterdir():
            if path.name != "kifmerge-unfinished-young":
                os.utime(path, (time.time() - 120,) * 2)
        lock = folder / "kifmerge-unfinished-busy/lock"
        lock.touch()
        os.utime(lock.parent, (time.time() - 120,) * 2)
        with filelock.FileLock(lock):
            assert Told().to.find_made("kifmerge.json", lambda: MADE_BY) is None
        assert hub_merges.temporary_names() == [
            "another", "kifmerge-unfinished-busy", "kifmerge-unfinished-file",
            "kifmerge-unfinished-young",
        ]  # fmt: skip

    def test_not_the_folder_of_one_at_work(self, hub: LoopbackHub) -> None:
        def look(making: RepositoryWork) -> None:
            os.utime(making.directory.parent, (time.time() - 3600,) * 2)
            Told().to.find_made("kifmerge.json", lambda: MADE_BY)
            add(making, NAMES[0])

        with pytest.raises(KeyboardInterrupt):
            fill(look)


def fail_at_the_end(hub: LoopbackHub) -> str:
    """All files are finished, and the branch cannot change; returns what was said of it."""
    hub.fail(Fault(kind="commit", match="*/commit/main", status=503, times=None))
    with pytest.raises(TryAgainError) as caught:
        make(Told())
    hub.mend()
    return str(caught.value)


class TestSpoilt:
    @pytest.mark.parametrize(
        "error", [CheckpointError("NaN"), DamagedTransferError("other bytes")], ids=repr
    )
    def test_wrong_inputs_leave_nothing(self, hub: LoopbackHub, error: KifmergeError) -> None:
        head = hub.add_repo(OUT, whole("old"))

        def find_out(making: RepositoryWork) -> None:
            add(making, NAMES[0])
            raise error

        with pytest.raises(type(error)) as caught:
            fill(find_out)
        assert caught.value is error
        assert (hub.head(OUT), hub.branches(OUT)) == (head, ["main"])
        assert hub_merges.temporary_names() == []

    def test_a_failure_to_send_leaves_the_others(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose_access(making: RepositoryWork) -> None:
            add(making, NAMES[0])
            monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
            add(making, NAMES[1])

        with pytest.raises(CheckpointError) as caught:
            fill(lose_access)
        message = str(caught.value)
        assert "does not allow it" in message
        assert "1 finished files are kept" in message
        assert READ_TOKEN not in message
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        told = Told()
        make(told)
        assert NAMES[0] in told.text

    def test_a_file_that_changed_on_this_disk(self, hub: LoopbackHub) -> None:
        def damage(making: RepositoryWork) -> None:
            add(making, NAMES[0])
            (making.directory / NAMES[1]).write_bytes(b"other")
            making.note(record_of(NAMES[1]))

        with pytest.raises(CheckpointError, match="1 finished files are kept") as caught:
            fill(damage)
        assert NAMES[1] in str(caught.value)
        make(Told())
        assert hub_merges.content_of(hub, OUT) == whole()

    @pytest.mark.parametrize("num", [0, 1])
    def test_a_full_disk(self, hub: LoopbackHub, num: int) -> None:
        def fill_the_disk(making: RepositoryWork) -> None:
            for name in NAMES[:num]:
                add(making, name)
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(TryAgainError, match="disk full") as caught:
            fill(fill_the_disk)
        kept = "1 finished files are kept" if num else f"nothing is kept, {OUT} is as it was"
        assert kept in str(caught.value)
        assert hub.branches(OUT) == sorted([*([branch_of()] if num else []), "main"])

    def test_too_little_room_for_one_file(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tempfile.gettempdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8))

        def ask(making: RepositoryWork) -> None:
            making.refuse_full_disk([])
            making.refuse_full_disk([50_000_000] * 5)
            making.refuse_full_disk([100_000_000, 1])

        with pytest.raises(TryAgainError, match=r"0\.12 GB are needed.*set TMPDIR"):
            fill(ask)

    def test_a_bug_keeps_what_is_finished(self, hub: LoopbackHub) -> None:
        with pytest.raises(ZeroDivisionError):
            fill(lambda making: add(making, NAMES[0]) or 1 / 0)
        assert hub.branches(OUT) == sorted([branch_of(), "main"])


class TestOthersAtWork:
    def test_a_commit_to_the_branch_in_between(self, hub: LoopbackHub) -> None:
        hub.add_repo(OUT, whole("old"))
        with pytest.raises(CheckpointError) as caught, committing(hub):
            make(Told())
        message = str(caught.value)
        assert "somebody else has changed the branch in between" in message
        assert f"2 finished files are kept in {OUT}@{branch_of()}" in message
        assert hub.read(OUT, "theirs.txt") == b"theirs"
        hub.clear_log()
        make(Told())
        assert hub_merges.content_of(hub, OUT) == {**whole(), "theirs.txt": b"theirs"}
        assert hub.pushed_bytes() == 0

    def test_the_same_work_elsewhere(self, hub: LoopbackHub) -> None:
        """One of them gives way, and leaves the branch to the other."""
        with Told().to.begin(WORK) as first:
            with pytest.raises(CheckpointError, match="somebody else"):
                fill(lambda second: (add(first, NAMES[0]), add(second, NAMES[1])))
            add(first, NAMES[1])
            for name, text in small("new").items():
                (first.directory / name).write_text(text)
        assert hub_merges.content_of(hub, OUT) == whole()
        assert hub.branches(OUT) == ["main"]


@contextlib.contextmanager
def committing(hub: LoopbackHub) -> Iterator[None]:
    """Somebody else adds a file when the first one has been sent."""

    def commit(row: object) -> None:
        if getattr(row, "kind", "") == "put" and "theirs.txt" not in hub.paths(OUT):
            hub.add_repo(OUT, {**whole("old"), "theirs.txt": b"theirs"})

    with hub_merges.at_each_request(hub, commit):
        yield


class TestStale:
    def test_what_the_hub_lists_counts_and_not_the_cache(self, hub: LoopbackHub) -> None:
        """The cache holds a part of the earlier model, which seems whole, and nobody answers."""
        more = {"model-00003-of-00003.safetensors": b"old"}
        old = {name: text for name, text in whole("old").items() if name != INDEX}
        head = hub.add_repo(OUT, {**old, **more})
        for name in ("config.json", NAMES[0]):
            hf_hub_download(OUT, name)
        hub.fail(Fault(kind="info", match=f"*/revision/{head}", skip=1, status=503, times=None))
        with pytest.raises(TryAgainError, match="2 finished files are kept"):
            make(Told())
        assert hub.head(OUT) == head
        hub.mend()
        make(Told())
        assert hub_merges.content_of(hub, OUT) == whole()

    @pytest.mark.parametrize(
        ("there", "new", "gone"),
        [
            ((*NAMES, INDEX, "a.txt"), ("model.safetensors",), (*NAMES, INDEX)),
            (("model.safetensors",), (*NAMES, INDEX), ("model.safetensors",)),
            (("adapter_model.safetensors", "mask.safetensors"), ("model.safetensors",), ()),
            (("model-00001-of-00002.safetensors",), ("config.json",), ()),
            (("inner/model-00001-of-00002.safetensors",), ("model.safetensors",), ()),
        ],
    )
    def test_weights_of_the_same_name(
        self, there: tuple[str, ...], new: tuple[str, ...], gone: tuple[str, ...]
    ) -> None:
        assert stale_weights(there, new) == sorted(gone)

    def test_all_that_is_read_with_weights(self) -> None:
        new = ["model.safetensors", "config.json", "tokenizer.json", "README.md"]
        stale = [
            "adapter_config.json", "adapter_model.safetensors", "pytorch_model-1-of-2.bin",
            "pytorch_model.bin.index.json", INDEX, *NAMES, "importance.json",
            "importance.safetensors", "tokenizer.model", "chat_template.jinja",
            "additional_chat_templates/tools.jinja", "generation_config.json",
        ]  # fmt: skip
        stays = [
            "LICENSE", "eval.json", "training_args.bin", "picture.png", "inner/model.safetensors",
            ".gitattributes", "notes.txt", "model.gguf",
        ]  # fmt: skip
        assert stale_files([*new, *stale, *stays], new) == sorted(stale)


def test_private_on_request(hub: LoopbackHub) -> None:
    make(Told(private=True))
    assert hub.is_private(OUT)
    assert HfApi().model_info(OUT).private
