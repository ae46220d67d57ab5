"""Merges from the Hub to the Hub: one change of the branch, from the old model to the new one."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import hub_merges
import pytest
import safetensors.torch
from hub_merges import Published, Result, Watched
from huggingface_hub import constants
from loopback import OTHER_TOKEN, READ_TOKEN, Fault, LoopbackHub

from kifmerge.hub import stream

pytestmark = pytest.mark.slow  # hundreds of requests

OUT = "org/out"
OLD = {
    "model-00001-of-00002.safetensors": b"old 1",
    "model-00002-of-00002.safetensors": b"old 2",
    "model.safetensors.index.json": b"{}",
    "config.json": b'{"old": 1}',
    "chat_template.jinja": b"old",
    "pytorch_model.bin": b"old",
    "adapter_config.json": b"{}",
    "picture.png": b"png",
    "inner/model.safetensors": b"somebody's",
}
STAYS = {name: OLD[name] for name in ("picture.png", "inner/model.safetensors")}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_merges.be_small(monkeypatch)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.005)))


@pytest.fixture(autouse=True)
def temporary(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where merges keep what is not sent yet."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def two(tmp_path: Path, hub: LoopbackHub) -> Published:
    return hub_merges.two_sided(tmp_path, hub)


class Clean:
    """What an uninterrupted merge does, and makes."""

    def __init__(self, published: Published) -> None:
        self.published = published
        self.hub = published.hub
        self.hub.clear_log()
        self.result = published.run("hf://org/clean", "--fetch", "stream")
        assert self.result.code == 0, self.result.err
        self.rows = self.hub.log
        self.pushed_bytes = self.hub.pushed_bytes()
        self.content = hub_merges.content_of(self.hub, "org/clean")
        self.shard_bytes = [
            len(content) for name, content in self.content.items() if name.endswith(".safetensors")
        ]
        self.num_changes = sum(map(hub_merges.is_change, self.rows))

    def run(self, repo_id: str = OUT) -> Result:
        return self.published.run(f"hf://{repo_id}", "--fetch", "stream")

    def made(self, repo_id: str) -> dict[str, bytes]:
        """What it makes there: the card names the repository."""
        card = self.content["README.md"].replace(b"org/clean", repo_id.encode())
        return {**self.content, "README.md": card}

    def command(self) -> subprocess.Popen[bytes]:
        """The same in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "kifmerge", *map(str, self.published.arguments()),
             "--out", f"hf://{OUT}", "--fetch", "stream"],
            env={**os.environ, **self.hub.env, "TMPDIR": tempfile.gettempdir()},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def interrupted(self, number: int, repo_id: str = OUT) -> Result:
        """By Ctrl-C when it asks for a change."""
        ctrl_c = hub_merges.at_change(self.hub, number, hub_merges.press_ctrl_c)
        with hub_merges.nothing_left_running(), ctrl_c:
            return self.run(repo_id)

    def check_nothing_new(self, repo_id: str = OUT) -> None:
        """A reader finds no part of the new model."""
        if self.hub.has_repo(repo_id):
            found = hub_merges.content_of(self.hub, repo_id)
            assert found in ({}, self.made(repo_id))

    def check_finished(
        self, result: Result, repo_id: str = OUT, *, most_bytes: int | None = None
    ) -> None:
        """As if nothing had happened, and nothing sent twice but for one file."""
        assert result.code == 0, result.err
        assert hub_merges.content_of(self.hub, repo_id) == self.made(repo_id)
        assert self.hub.branches(repo_id) == ["main"]
        assert len(self.hub.commits(repo_id)) == 2
        sent = sum(
            row.received_bytes
            for row in self.hub.log
            if row.kind == "put" and row.path.startswith(f"/{repo_id}/")
        )
        assert sent <= (most_bytes or self.pushed_bytes + max(self.shard_bytes))
        assert hub_merges.temporary_names() == []


@pytest.fixture
def clean(two: Published) -> Clean:
    return Clean(two)


class TestOneChange:
    def test_of_an_empty_repository(self, two: Published, hub: LoopbackHub) -> None:
        assert two.run(two.folder / "out", "--fetch", "stream").code == 0
        expected = faults.content(two.folder / "out")
        hub.clear_log()
        watched = Watched(hub, OUT)
        with hub_merges.at_each_request(hub, watched.see):
            result = two.run(f"hf://{OUT}", "--fetch", "stream", "--json")
        watched.see()
        assert result.code == 0, result.err
        found = hub_merges.content_of(hub, OUT)
        assert hub_merges.but_for_card(found) == hub_merges.but_for_card(expected)
        assert f"kifmerge pull {OUT} --out".encode() in found["README.md"]
        assert len(watched.heads) == len(hub.commits(OUT)) == 2
        assert hub.branches(OUT) == ["main"]
        assert not hub.is_private(OUT)
        shards = [len(c) for name, c in expected.items() if name.endswith(".safetensors")]
        assert len(shards) == hub_merges.NUM_SHARDS
        assert 0 < watched.most_bytes <= max(shards)
        assert hub_merges.temporary_names() == []
        models = ("base", "new", "historical")
        assert two.pulled(*models) == two.weight_bytes(*models)
        assert hub.pushed_bytes() == sum(shards)
        assert two.run(two.folder / "out", "--fetch", "stream", "--json").json() == {
            **result.json(),
            "out": str(two.folder / "out"),
        }

    @pytest.mark.parametrize("branch", ["main", "v2", "new"])
    def test_over_an_earlier_model(self, two: Published, hub: LoopbackHub, branch: str) -> None:
        hub.add_repo(OUT, OLD)
        hub.add_repo(OUT, {**OLD, "picture.png": b"other"}, branch="v2")
        before = {name: hub.head(OUT, name) for name in hub.branches(OUT)}
        suffix = "" if branch == "main" else f"@{branch}"
        watched = Watched(hub, OUT, branch)
        with hub_merges.at_each_request(hub, watched.see):
            result = two.run(f"hf://{OUT}{suffix}")
        watched.see()
        assert result.code == 0, result.err
        assert watched.heads == [before.get(branch, before["main"]), hub.head(OUT, branch)]
        found = hub_merges.content_of(hub, OUT, branch)
        stays = {**STAYS, **({"picture.png": b"other"} if branch == "v2" else {})}
        assert {name: found.pop(name) for name in stays} == stays
        hub_merges.same_model(found, two.local())
        assert set(hub.branches(OUT)) == {*before, branch}
        assert {name: hub.head(OUT, name) for name in before if name != branch} == {
            name: head for name, head in before.items() if name != branch
        }
        gone = sorted(OLD.keys() - found.keys() - stays.keys())
        assert f"removing from {OUT}{suffix}, with the same commit: {', '.join(gone)}" in result.err

    def test_over_itself(self, two: Published, hub: LoopbackHub) -> None:
        """The inputs are pinned: they may be what is replaced."""
        expected = two.local()
        result = two.run("hf://org/new")
        assert result.code == 0, result.err
        hub_merges.same_model(hub_merges.content_of(hub, "org/new"), expected)

    @pytest.mark.parametrize("flags", [("--private",), ("--no-private",), ()])
    def test_private_on_request(
        self, two: Published, hub: LoopbackHub, flags: tuple[str, ...]
    ) -> None:
        assert two.run(f"hf://{OUT}", *flags).code == 0
        assert hub.is_private(OUT) == (flags == ("--private",))

    def test_not_where_it_is_less_private(self, two: Published, hub: LoopbackHub) -> None:
        head = hub.add_repo(OUT, OLD)
        result = two.run(f"hf://{OUT}", "--private")
        assert (result.code, len(result.lines)) == (3, 1)
        assert "is there already and public, not private" in result.err
        assert (hub.head(OUT), hub.branches(OUT)) == (head, ["main"])

    def test_a_plan_changes_nothing(self, two: Published, hub: LoopbackHub) -> None:
        plan = two.run(f"hf://{OUT}", "--dry-run", "--json").json()
        assert not hub.has_repo(OUT)
        assert not any(map(hub_merges.is_change, hub.log))
        assert sum("no model is kept on this disk" in reason for reason in plan["fetch"]) == 3

    def test_made_already(self, two: Published, hub: LoopbackHub) -> None:
        first = two.run(f"hf://{OUT}", "--fetch", "stream", "--json")
        head = hub.head(OUT)
        hub.clear_log()
        again = two.run(f"hf://{OUT}", "--fetch", "stream", "--json")
        assert (again.code, again.json()) == (0, first.json())
        assert f"hf://{OUT} is already made: nothing to do" in again.err
        assert two.pulled() < 0.1 * two.weight_bytes()
        assert hub.head(OUT) == head
        assert not any(map(hub_merges.is_change, hub.log))

    def test_made_otherwise(self, two: Published, hub: LoopbackHub) -> None:
        """Files that are not those that kifmerge.json tells of are made again."""
        assert two.run(f"hf://{OUT}").code == 0
        made = hub_merges.content_of(hub, OUT)
        hub.add_repo(OUT, {**made, "model-00002-of-00003.safetensors": b"other"})
        assert two.run(f"hf://{OUT}").code == 0
        assert hub_merges.content_of(hub, OUT) == made

    def test_smaller_files_of_another_dtype(self, two: Published, hub: LoopbackHub) -> None:
        options = ("--shard-size", "4KB", "--dtype", "bfloat16", "--workers", "3")
        result = two.run(f"hf://{OUT}", *options, "--fetch", "stream")
        assert result.code == 0, result.err
        hub_merges.same_model(hub_merges.content_of(hub, OUT), two.local(*options))

    def test_one_file(self, tmp_path: Path, hub: LoopbackHub) -> None:
        several = hub_merges.several(tmp_path, hub, num=2)
        assert several.run(f"hf://{OUT}").code == 0
        hub_merges.same_model(hub_merges.content_of(hub, OUT), several.local())
        assert "model.safetensors" in hub.paths(OUT)

    def test_rebuilt_from_what_was_published(self, two: Published, hub: LoopbackHub) -> None:
        assert two.run(f"hf://{OUT}").code == 0
        record = two.folder / "record.json"
        record.write_bytes(hub.read(OUT, "kifmerge.json"))
        arguments = ("merge", record, "--out", two.folder / "again")
        assert hub_merges.kifmerge(*arguments, "--fetch", "stream").code == 0
        published = hub_merges.but_for_card(hub_merges.content_of(hub, OUT))
        assert hub_merges.but_for_card(faults.content(two.folder / "again")) == published
        arguments = ("merge", record, "--out", "hf://org/again")
        assert hub_merges.kifmerge(*arguments, "--fetch", "stream").code == 0
        assert hub_merges.but_for_card(hub_merges.content_of(hub, "org/again")) == published
        told = json.loads(record.read_text())
        told["files"]["model-00001-of-00003.safetensors"]["sha256"] = "0" * 64
        record.write_text(json.dumps(told))
        refused = hub_merges.kifmerge("merge", record, "--out", "hf://org/other")
        assert (refused.code, "not what came of them" in refused.err) == (3, True)
        assert (hub.branches("org/other"), len(hub.commits("org/other"))) == (["main"], 1)


class TestInterrupted:
    """And run again: it goes on, and comes to the same bytes."""

    def test_by_ctrl_c(self, clean: Clean, hub: LoopbackHub) -> None:
        hub.clear_log()
        puts = [row.kind for row in clean.rows if hub_merges.is_change(row)]
        # While the second file is sent, which goes on as long as the process lives.
        result = clean.interrupted(puts.index("put", puts.index("put") + 1) + 1)
        clean.check_nothing_new()
        (work,) = (name for name in hub.branches(OUT) if name != "main")
        kept = f"1 finished files are kept in {OUT}@{work}: the same command goes on from them"
        assert (result.code, result.lines[-1]) == (130, f"kifmerge: interrupted; {kept}")
        hub.clear_log()
        again = clean.run()
        clean.check_finished(again)
        assert f"going on from {OUT}@{work}: model-00001-of-00003" in again.err
        # The only one that is not read whole, shard by shard, for one file of the output.
        historical = f"org/historical@{clean.published.commits['historical']}/model.safetensors"
        assert f"kifmerge: {historical}: pulling again what the interrupted merge used" in again.err
        assert again.err.count("pulling again") == 1
        assert "not compared with" not in again.err

    @pytest.mark.slow
    def test_by_ctrl_c_at_each_change(self, clean: Clean, hub: LoopbackHub) -> None:
        hub.clear_log()
        for number in range(1, clean.num_changes + 1):
            repo_id = f"{OUT}-{number}"
            result = clean.interrupted(number, repo_id)
            assert result.code == 130, number
            assert result.lines[-1].startswith("kifmerge: interrupted; ")
            clean.check_nothing_new(repo_id)
            assert hub_merges.temporary_names() == []
            clean.check_finished(clean.run(repo_id), repo_id)
        assert clean.num_changes >= 12

    @pytest.mark.slow
    def test_by_a_kill_at_each_change(self, clean: Clean, hub: LoopbackHub) -> None:
        hub.clear_log()
        for number in range(1, clean.num_changes + 1):
            repo_id = f"{OUT}-{number}"
            killed = kill_at(clean, number, repo_id)
            assert killed
            clean.check_nothing_new(repo_id)
            age(Path(tempfile.gettempdir()))
            clean.check_finished(clean.run(repo_id), repo_id)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [3, 8])
    def test_by_a_kill_of_the_command(self, clean: Clean, hub: LoopbackHub, number: int) -> None:
        hub.clear_log()
        process = clean.command()
        with hub_merges.at_change(hub, number, process.kill):
            told = process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGKILL, told
        clean.check_nothing_new()
        age(Path(tempfile.gettempdir()))
        clean.check_finished(clean.run())

    @pytest.mark.slow
    @pytest.mark.parametrize("part_bytes", [None, 5000])
    def test_ctrl_c_does_not_wait_for_a_slow_line(
        self, clean: Clean, hub: LoopbackHub, part_bytes: int | None
    ) -> None:
        hub.part_bytes = part_bytes
        hub.fail(Fault(kind="put", rate=500.0))
        process = clean.command()
        faults.wait_for(lambda: any(row.path.startswith(f"/{OUT}/") for row in hub.log))
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[0]
        assert time.monotonic() - started < 8, "it would take half a minute"
        assert process.returncode == 130
        assert f"interrupted; nothing is kept, {OUT} is as it was\n" in told.decode()
        hub.mend()
        clean.check_finished(clean.run(), most_bytes=3 * clean.pushed_bytes)

    @pytest.mark.parametrize("after_act", [False, True], ids=["before", "after"])
    def test_by_a_network_that_goes(self, clean: Clean, hub: LoopbackHub, after_act: bool) -> None:
        """In the middle of the second file."""
        puts = [n for n, row in enumerate(clean.rows) if row.kind == "put"]
        check_lost(clean, OUT, puts[1], after_act=after_act)

    @pytest.mark.slow
    @pytest.mark.parametrize("after_act", [False, True], ids=["before", "after"])
    def test_by_a_network_that_goes_at_each_change(
        self, clean: Clean, hub: LoopbackHub, after_act: bool
    ) -> None:
        changes = [n for n, row in enumerate(clean.rows) if hub_merges.is_change(row)]
        for number in changes:
            check_lost(clean, f"{OUT}-{number}", number, after_act=after_act)

    @pytest.mark.slow
    def test_by_refusals_of_each_change(self, clean: Clean, hub: LoopbackHub) -> None:
        """The token is not accepted any more, say: what is there stays there."""
        changes = [row for row in clean.rows if hub_merges.is_change(row)]
        for number, row in enumerate(changes):
            repo_id = f"{OUT}-{number}"
            before = [one for one in changes[:number] if one.kind == row.kind]
            hub.fail(Fault(kind=row.kind, method=row.method, times=None, status=403,
                           skip=sum(one.method == row.method for one in before)))  # fmt: skip
            result = clean.run(repo_id)
            is_last = number == len(changes) - 1
            assert result.code == (0 if is_last else 3 if row.kind != "put" else 4), result.err
            hub.mend()
            if is_last:
                assert "could not be deleted: `hf repos branch delete" in result.err
            clean.check_nothing_new(repo_id)
            # The client asks the store, where signed addresses expire, again and again.
            clean.check_finished(clean.run(repo_id), repo_id, most_bytes=10 * clean.pushed_bytes)


class TestSpoilt:
    """What was made of wrong inputs goes, and the branch stays as it was."""

    @pytest.fixture
    def old(self, hub: LoopbackHub) -> str:
        return hub.add_repo(OUT, OLD)

    def check(self, hub: LoopbackHub, result: Result, code: int, says: str, old: str) -> None:
        assert result.code == code
        assert says in result.lines[-1]
        assert any(row.kind == "put" for row in hub.log), "some of it had been sent"
        assert (hub.head(OUT), hub.branches(OUT)) == (old, ["main"])
        assert hub_merges.temporary_names() == []

    def test_not_finite(self, two: Published, hub: LoopbackHub, old: str) -> None:
        path = two.folder / "new/model-00003-of-00003.safetensors"
        tensors = safetensors.torch.load_file(path)
        next(iter(tensors.values())).view(-1)[-1] = math.nan
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        hub.add_repo("org/new", two.folder / "new")
        result = two.run(f"hf://{OUT}", "--fetch", "stream", "--workers", "1")
        self.check(hub, result, 3, "is nan: a merge would carry it on", old)

    def test_damaged_on_the_way(self, two: Published, hub: LoopbackHub, old: str) -> None:
        """In a file that is whole only when most of the output has been sent."""
        hub.fail(Fault(match="org/historical/*", kind="cdn", corrupt_file_at=3000, times=None))
        result = two.run(f"hf://{OUT}", "--fetch", "stream")
        self.check(hub, result, 4, "bytes that came are not those of the repository", old)
        hub.mend()
        again = two.run(f"hf://{OUT}", "--fetch", "stream")
        assert (again.code, "going on" in again.err) == (0, False)

    @pytest.mark.parametrize("damaged", ["historical", "historical-mask"])
    @pytest.mark.parametrize("out", [f"hf://{OUT}", "here"])
    @pytest.mark.parametrize("then", ["streamed", "downloaded", "in the cache"])
    def test_damaged_before_it_was_interrupted(
        self, tmp_path: Path, hub: LoopbackHub, old: str, damaged: str, out: str, then: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """In a file that was not whole then: what was made of it does not come into the result.

        However it is read when the merge goes on.
        """
        monkeypatch.setattr(stream, "BLOCK_BYTES", 64)
        masks = hub_merges.two_sided(tmp_path / "files", hub, "masks")
        expected = masks.local()
        place = out if out.startswith("hf://") else tmp_path / out
        arguments = [place, "--fetch", "stream", "--workers", "1"]
        # In a.weight, which comes after the 60 elements of a.bias.
        (path,) = (tmp_path / f"files/{damaged}").glob("*.safetensors")
        data = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        at = data + (60 // 8 + 1 + 100 if "mask" in damaged else 60 * 4 + 100)
        hub.fail(Fault(kind="cdn", match=f"org/{damaged}/*", corrupt_file_at=at))
        # The second file of the output cannot be made.
        hub.fail(Fault(kind="cdn", match="org/new/*00002*", skip=2, times=None, status=503))
        result = masks.run(*arguments)
        assert (result.code, "1 finished files are kept" in result.err) == (4, True)
        hub.mend()
        if then == "in the cache":
            assert hub_merges.kifmerge("pull", f"org/{damaged}").code == 0
        fetch = ["--fetch", "download"] if then == "downloaded" else []
        again = masks.run(*arguments, *fetch, *(["--resume"] if place != out else []))
        assert again.code == 4
        assert "came otherwise than to the interrupted merge" in again.lines[-1]
        assert (hub.head(OUT), hub.branches(OUT)) == (old, ["main"])
        assert not (tmp_path / "here").exists()
        assert masks.run(*arguments).code == 0
        found = hub_merges.content_of(hub, OUT) if place == out else faults.content(place)
        for name in STAYS if place == out else ():
            del found[name]
        hub_merges.same_model(found, expected)

    def test_a_full_disk(
        self, two: Published, hub: LoopbackHub, old: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is wrong with what has been sent."""
        write = os.pwrite

        def fill(descriptor: int, *arguments: Any) -> int:
            if "00002-of" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fill)
            result = two.run(f"hf://{OUT}", "--fetch", "stream")
        assert (result.code, hub.head(OUT)) == (4, old)
        assert "disk full while writing" in result.lines[-1]
        assert "1 finished files are kept" in result.lines[-1]
        again = two.run(f"hf://{OUT}", "--fetch", "stream")
        assert (again.code, "going on from" in again.err) == (0, True)

    @pytest.mark.parametrize(
        ("token", "says"),
        [
            (READ_TOKEN, "your token does not allow it"),
            (OTHER_TOKEN, "your token does not allow it"),
            ("loopback-token-unheard-of", "your token is not accepted"),
        ],
    )
    def test_without_the_right_token(
        self, two: Published, hub: LoopbackHub, old: str, token: str, says: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("HF_TOKEN", token)
        result = two.run(f"hf://{OUT}")
        assert (result.code, len(result.lines)) == (3, 1)
        assert says in result.err
        assert (hub.head(OUT), hub.branches(OUT)) == (old, ["main"])

    @pytest.mark.parametrize("out", ["hf://out", f"hf://{OUT}/inner", f"hf://{OUT}@{'a' * 40}"])
    def test_no_place_for_it(self, two: Published, hub: LoopbackHub, out: str) -> None:
        result = two.run(out)
        assert (result.code, len(result.lines)) == (3, 1)
        assert f"{out}: expected" in result.err

    def test_offline(
        self, two: Published, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert two.run(two.folder / "out", "--fetch", "download").code == 0
        hub.clear_log()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        result = two.run(f"hf://{OUT}")
        assert (result.code, len(result.lines), hub.log) == (3, 1, [])
        assert "HF_HUB_OFFLINE is set: unset it to reach the Hub" in result.err


def test_no_token_anywhere(clean: Clean, hub: LoopbackHub) -> None:
    """In what is published, or kept in a work branch."""
    assert clean.interrupted(clean.num_changes - 2).code == 130
    (work,) = (name for name in hub.branches(OUT) if name != "main")
    files = {**clean.content, **hub_merges.content_of(hub, OUT, work)}
    assert f".kifmerge/{work}.jsonl" in files
    assert hub_merges.TOKENS.encode() not in b"".join(files.values())


def kill_at(clean: Clean, number: int, repo_id: str) -> bool:
    """Kill a process that merges when it asks for a change; False if it does not get that far."""
    children: list[faults.Child] = []

    def work(say: Callable[[object], None]) -> None:
        clean.run(repo_id)

    def kill() -> None:
        children[0].kill()

    with hub_merges.at_change(clean.hub, number, kill):
        children.append(faults.fork(work))
        ended = children[0].end()
    assert ended.code in (0, -signal.SIGKILL), ended.text
    return ended.code != 0


def age(folder: Path) -> None:
    """Have all that lies there lie there for an hour."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def check_lost(clean: Clean, repo_id: str, number: int, *, after_act: bool) -> None:
    """No answer comes any more from the request of that number on; then all is well again."""
    hub = clean.hub
    hub.clear_log()
    hub.fail(Fault(skip=number, times=None, reset=True, after_act=after_act))
    result = clean.run(repo_id)
    clean.check_nothing_new(repo_id)
    assert len([line for line in result.lines if "created" not in line]) >= 1
    hub.mend()
    done = hub_merges.content_of(hub, repo_id) if hub.has_repo(repo_id) else {}
    if done != clean.made(repo_id):
        assert result.code == 4, result.err
    assert hub_merges.temporary_names() == []
    clean.check_finished(clean.run(repo_id), repo_id)
