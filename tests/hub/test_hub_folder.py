"""Folders of repositories: pinned, listed, and taken from the cache where there is no network."""

from __future__ import annotations

import json
import threading
import time

import huggingface_hub
import pytest
import remote
from huggingface_hub import constants, snapshot_download
from loopback import OTHER_TOKEN, WRITE_TOKEN, Fault

from kifmerge.errors import CheckpointError, DamagedTransferError, TryAgainError
from kifmerge.hub import listing
from kifmerge.hub.background import abandoning
from kifmerge.hub.folder import open_hub_folder
from kifmerge.hub.reference import parse_remote

WEIGHTS = remote.noise("folder", 1_500_000)
FILES = {
    "config.json": b'{"model_type": "x"}',
    "README.md": b"# Card",
    "model.safetensors": WEIGHTS,
    "sub/config.json": b"{}",
    "sub/deeper/adapter_model.safetensors": remote.noise("adapter", 5000),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    remote.be_quick(monkeypatch)


@pytest.fixture
def commit(hub):
    found = hub.add_repo("org/a", FILES)
    hub.clear_log()
    return found


def opened(text="org/a", fetch="stream", **options):
    return open_hub_folder(parse_remote(text), fetch, **options)


def kinds(hub):
    return [row.kind for row in hub.log]


def read(file, start, stop):
    content = bytearray(stop - start)
    file.read_into(start, memoryview(content))
    return bytes(content)


def num_threads():
    return [thread.name for thread in threading.enumerate()].count("kifmerge-hub")


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


class TestOpening:
    def test_is_one_question(self, hub, commit):
        folder = opened()
        assert str(folder) == f"org/a@{commit}"
        assert kinds(hub) == ["info"]
        assert {n: f.size for n, f in folder.files.items()} == {n: len(c) for n, c in FILES.items()}
        weights = folder.files["model.safetensors"]
        assert weights.sha256 == hub.sha256("org/a", "model.safetensors")
        assert folder.files["config.json"].sha256 is None
        assert len(folder.files["config.json"].git_oid) == 40

    def test_a_folder_in_it(self, hub, commit):
        assert set(opened("hf://org/a/sub").files) == {
            "config.json", "deeper/adapter_model.safetensors",
        }  # fmt: skip
        folder = opened("hf://org/a/sub/deeper")
        assert str(folder) == f"hf://org/a@{commit}/sub/deeper"
        file = folder.open("adapter_model.safetensors")
        assert file.head(5000) == FILES["sub/deeper/adapter_model.safetensors"]

    def test_branches_tags_requests_and_commits(self, hub, commit):
        other = hub.add_repo("org/a", {"config.json": b"other"}, branch="feature/x")
        api = huggingface_hub.HfApi()
        hub._store.repo("org/a").refs["refs/tags/v1"] = other
        pull = api.create_pull_request("org/a", title="x")
        heads = {
            "org/a": commit,
            "org/a@main": commit,
            "org/a@feature/x": other,
            "hf://org/a@feature%2Fx": other,
            "org/a@v1": other,
            f"org/a@{pull.git_reference}": hub.head("org/a", pull.git_reference),
            f"org/a@{commit}": commit,
            f"org/a@{other[:8]}": other,
        }
        for text, head in heads.items():
            assert opened(text).reference.revision == head

    def test_datasets(self, hub):
        commit = hub.add_repo("org/d", {"memory.jsonl": b"{}\n"}, kind="dataset")
        folder = opened("hf://datasets/org/d")
        assert str(folder) == f"hf://datasets/org/d@{commit}"
        assert (folder / "memory.jsonl").read_bytes() == b"{}\n"
        with pytest.raises(CheckpointError, match="no such repository"):
            opened("org/d")

    def test_a_branch_that_moves_does_not_matter(self, hub, commit):
        folder = opened()
        hub.add_repo("org/a", {"config.json": b"other", "model.safetensors": WEIGHTS[::-1]})
        assert (folder / "config.json").read_bytes() == FILES["config.json"]
        assert read(folder.open("model.safetensors"), 70_000, 70_100) == WEIGHTS[70_000:70_100]

    @pytest.mark.parametrize("num_files", [3, 7])
    def test_very_many_files_are_listed_in_pages(self, hub, monkeypatch, num_files):
        monkeypatch.setattr(listing, "_MOST_AT_ONCE", 5)
        files = {f"sub/{n}.json": b"%d" % n for n in range(num_files)}
        hub.add_repo("org/many", files)
        hub.page_size = 2
        folder = opened("hf://org/many/sub")
        assert sorted(folder.files) == sorted(f"{n}.json" for n in range(num_files))
        assert (folder / "1.json").read_bytes() == b"1"
        assert ("tree" in kinds(hub)) == (num_files == 7)

    def test_pages_that_do_not_come(self, hub, commit, monkeypatch):
        monkeypatch.setattr(listing, "_MOST_AT_ONCE", 1)
        monkeypatch.setattr(listing, "_LISTING_SECONDS", 0.3)
        hub.fail(Fault(kind="tree", stall_at=0, stall_seconds=1))
        num_before = num_threads()
        with pytest.raises(TryAgainError, match="reading org/a: listing its files takes too long"):
            opened()
        while num_threads() > num_before:  # or it would disturb the next test
            time.sleep(0.02)


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("org/none", "no such repository, or a private one"),
            ("org/a@none", "no such branch, tag or commit"),
            (f"org/a@{'0' * 40}", "no such branch, tag or commit"),
            ("hf://org/a/none", "no such folder in the repository"),
            ("hf://org/a/config.json", "no such folder in the repository"),
            ("hf://org/a/su", "no such folder in the repository"),
        ],
    )
    def test_what_does_not_exist(self, hub, commit, text, words):
        with pytest.raises(CheckpointError) as caught:
            opened(text)
        assert str(caught.value).startswith(f"reading {text}: {words}")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("token", [None, OTHER_TOKEN, "a-token-of-nobody"])
    def test_a_private_one(self, hub, token, monkeypatch):
        hub.add_repo("org/a", FILES, private=True)
        assert opened().files
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(CheckpointError, match="token") as caught:
            opened()
        assert "\n" not in str(caught.value)
        assert str(token) not in str(caught.value)

    def test_a_gated_one_when_a_file_is_read(self, hub):
        hub.add_repo("org/a", FILES, gated=True)
        folder = opened()
        with pytest.raises(CheckpointError, match="gated: ask for access on its page"):
            folder / "config.json"
        with pytest.raises(CheckpointError, match="gated: ask for access on its page"):
            folder.open("model.safetensors").head(8)

    @pytest.mark.parametrize(
        "path", ["../x", "a/../../x", "/etc/x", "a//x", "a\\x", "./x", "a/", "a\0x"]
    )
    def test_a_path_that_is_none(self, hub, path):
        hub.add_repo("org/a", {"config.json": b"{}", path: b"hostile"})
        with pytest.raises(CheckpointError, match="is no path of a file in a repository"):
            opened()


class TestReading:
    @pytest.mark.parametrize("fetch", ["auto", "download", "stream"])
    def test_the_same_bytes(self, hub, commit, fetch):
        file = opened(fetch=fetch).open("model.safetensors")
        assert (file.size, file.is_here) == (len(WEIGHTS), False)
        assert file.label == f"org/a@{commit}/model.safetensors"
        assert file.head(8) == WEIGHTS[:8]
        hub.clear_log()
        file.expect([(1_000_000, 1_100_000)])
        assert read(file, 1_000_000, 1_100_000) == WEIGHTS[1_000_000:1_100_000]
        assert file.is_here == (fetch != "stream")
        assert hub.pulled_bytes() == (100_000 if fetch == "stream" else len(WEIGHTS))
        assert read(file, 0, len(WEIGHTS)) == WEIGHTS

    def test_from_the_cache_needs_no_network(self, hub, commit):
        snapshot_download("org/a")
        folder = opened()
        hub.clear_log()
        file = folder.open("model.safetensors")
        assert file.is_here
        assert file.head(10) == WEIGHTS[:10]
        assert read(file, 5, len(WEIGHTS)) == WEIGHTS[5:]
        assert (folder / "config.json").read_bytes() == FILES["config.json"]
        assert hub.log == []

    def test_what_the_folder_does_not_hold_is_nowhere(self, hub, commit):
        folder = opened()
        assert not (folder / "none.json").exists()
        assert kinds(hub) == ["info"]

    def test_a_cached_file_that_is_cut_is_not_taken(self, hub, commit):
        folder = opened(fetch="download")
        (folder / "model.safetensors").resolve().write_bytes(b"cut")
        file = opened(fetch="download").open("model.safetensors")
        assert not file.is_here
        assert read(file, 5, 50) == WEIGHTS[5:50]

    def test_a_cached_file_that_vanishes(self, hub, commit):
        folder = opened(fetch="download")
        path = folder / "model.safetensors"
        file = folder.open("model.safetensors")
        assert file.is_here
        path.unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(file, 5, 50)

    def test_settles_what_was_left_open_alone(self, hub, commit):
        for fetch, expected in (("auto", "stream"), ("download", "download")):
            folder = opened(fetch=fetch)
            folder.settle("stream")
            assert folder.fetch == expected

    def test_a_download_that_is_damaged(self, hub, commit):
        hub.fail(Fault(kind="cdn", method="GET", corrupt_file_at=700_000, times=None))
        file = opened(fetch="download").open("model.safetensors")
        with pytest.raises(DamagedTransferError):
            read(file, 5, 50)
        hub.mend()
        assert read(file, 5, 50) == WEIGHTS[5:50]

    def test_a_download_that_nobody_waits_for_any_more(self, hub, commit):
        hub.fail(Fault(kind="cdn", stall_at=10, stall_seconds=5, times=None))
        file, ended = opened(fetch="download").open("model.safetensors"), threading.Event()
        timer = threading.Timer(0.2, ended.set)
        timer.start()
        begun = time.monotonic()
        with abandoning(ended), pytest.raises(InterruptedError):
            read(file, 5, 50)
        assert time.monotonic() - begun < 2
        timer.join()

    @pytest.mark.parametrize("fetch", ["auto", "download", "stream"])
    def test_a_server_that_knows_no_ranges(self, hub, fetch):
        files = {f"{number}.safetensors": WEIGHTS[number:] for number in range(3)}
        hub.add_repo("org/b", files)
        hub.fail(Fault(kind="cdn", ignore_range=True, times=None))
        folder = opened("org/b", fetch)
        if fetch == "stream":
            with pytest.raises(TryAgainError, match=r"the whole file: .* --fetch download"):
                folder.open("0.safetensors").head(8)
            return
        for name, content in files.items():
            assert folder.open(name).head(8) == content[:8]
            assert read(folder.open(name), 5, 90_000) == content[5:90_000]
        # It is not asked for ranges again and again.
        assert len([row for row in hub.log if row.kind == "cdn" and row.range]) == 6

    def test_unchecked_files_are_told(self, hub, commit):
        folder = opened()
        folder.shelf.most_blocks = 1
        file = folder.open("model.safetensors")
        file.head(8)
        ranges = remote.pieces(65_536, len(WEIGHTS))[::-1]
        for one in ranges:
            file.expect([one])
            read(file, *one)
        assert folder.unchecked == ["model.safetensors"]
        assert opened().unchecked == []


class TestOffline:
    @pytest.mark.parametrize("text", ["org/a", "org/a@main", "hf://org/a/sub", "COMMIT"])
    def test_the_cache_is_all_there_is(self, hub, commit, monkeypatch, text):
        text = text.replace("COMMIT", f"org/a@{commit}")
        snapshot_download("org/a")
        online = opened(text)
        go_offline(monkeypatch)
        hub.clear_log()
        folder = opened(text)
        assert folder.reference == online.reference
        assert {n: f.size for n, f in folder.files.items()} == {
            n: f.size for n, f in online.files.items()
        }
        for name, file in folder.files.items():
            expected = online.files[name]
            assert file.sha256 == expected.sha256
            assert expected.sha256 or file.git_oid == expected.git_oid
            assert folder.open(name).head(10) == FILES[parse_remote(text).path(name)][:10]
        assert hub.log == []

    def test_after_a_download_by_name(self, hub, commit, monkeypatch):
        folder = opened(fetch="download")
        read(folder.open("model.safetensors"), 0, 10)
        folder / "config.json"
        go_offline(monkeypatch)
        assert set(opened().files) == {"model.safetensors", "config.json"}
        assert str(opened()) == f"org/a@{commit}"

    def test_a_stream_leaves_an_older_copy_in_its_place(self, hub, commit, monkeypatch):
        snapshot_download("org/a")
        hub.add_repo("org/a", {**FILES, "config.json": b"new", "model.safetensors": WEIGHTS[1:]})
        folder = opened()
        folder / "config.json"
        read(folder.open("model.safetensors"), 0, 10)
        go_offline(monkeypatch)
        assert str(opened()) == f"org/a@{commit}"

    def test_what_is_not_in_the_cache(self, hub, commit, monkeypatch):
        snapshot_download("org/a")
        go_offline(monkeypatch)
        hub.clear_log()
        for text in ("org/b", "org/a@v1", "hf://org/a/none"):
            with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and it is not in"):
                opened(text)
        assert hub.log == []

    def test_no_question_even_for_weights(self, hub, commit, monkeypatch):
        folder = opened()
        go_offline(monkeypatch)
        hub.clear_log()
        for fetch in ("stream", "download"):
            folder.fetch = fetch
            with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
                read(folder.open("model.safetensors"), 0, 10)
        assert hub.log == []


class TestNetworkDown:
    def test_a_cached_copy_is_taken_and_told(self, hub, commit):
        snapshot_download("org/a")
        hub.fail(Fault(reset=True, times=None))
        told = []
        folder = opened(say=told.append)
        assert str(folder) == f"org/a@{commit}"
        assert folder.open("model.safetensors").head(5) == WEIGHTS[:5]
        assert told == [
            f"reading org/a: no connection: taking what the cache holds, org/a@{commit}"
        ]
        assert [row.kind for row in hub.log if row.fault] == ["info"]

    def test_a_server_in_trouble_is_asked_again_first(self, hub, commit):
        snapshot_download("org/a")
        newer = hub.add_repo("org/a", {"config.json": b"new"})
        hub.fail(Fault(kind="info", status=503, times=3))
        assert opened().reference.revision == newer
        hub.fail(Fault(kind="info", status=503, times=None))
        told = []
        assert opened(say=told.append).reference.revision == commit
        assert "HTTP 503" in told[0]

    def test_nothing_in_the_cache(self, hub, commit):
        with (
            remote.closed(hub),
            pytest.raises(TryAgainError, match="reading org/a: the connection failed"),
        ):
            opened()

    def test_a_part_of_it_in_the_cache_is_not_taken_for_all(self, hub):
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        files = {
            "config.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-1.safetensors": b"1",
            "model-2.safetensors": b"2",
        }
        folder = remote.folder(hub, files, fetch="download")
        text = str(folder)
        folder / "config.json"
        hub.fail(Fault(kind="info", reset=True, times=None))
        for missing in (*files, None):
            if missing is not None:
                with pytest.raises(TryAgainError):
                    opened(text)
                folder / missing
        assert set(opened(text).files) == set(files)

    def test_a_refusal_is_no_network_that_is_down(self, hub, commit, monkeypatch):
        snapshot_download("org/a")
        hub.add_repo("org/a", {}, private=True)
        monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
        with pytest.raises(CheckpointError, match="no such repository"):
            opened()


def test_no_token_but_for_the_hub(hub, commit):
    folder = opened(fetch="stream")
    folder / "config.json"
    folder.open("model.safetensors").head(10)
    opened(fetch="download") / "model.safetensors"
    assert {row.has_token for row in hub.log if row.listener == "cdn"} == {False}
    assert WRITE_TOKEN not in str(folder)
