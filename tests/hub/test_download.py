"""Files in the standard cache: whole, right, and resumed by nobody's luck."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import remote
from huggingface_hub import constants
from loopback import WRITE_TOKEN, Fault

from kifmerge.errors import CheckpointError, DamagedTransferError, TryAgainError
from kifmerge.hub import client
from kifmerge.hub.client import FIRST_WAIT_SECONDS, PassingError
from kifmerge.hub.download import (
    cached_file,
    cached_path,
    download,
    download_checked,
    hashes_of_cached,
    note_revision,
)
from kifmerge.hub.reference import parse_remote

pytestmark = pytest.mark.slow  # hundreds of requests

CONTENT = remote.noise("download", 2_000_000)


@pytest.fixture
def file(hub, monkeypatch):
    remote.be_quick(monkeypatch)
    return remote.one_file(hub, CONTENT)


@pytest.fixture
def small(hub, monkeypatch):
    remote.be_quick(monkeypatch)
    return remote.one_file(hub, b'{"a": 1}', "config.json")


def cached_contents(hub):
    """All that the cache holds of contents, whatever its name."""
    root = Path(hub.env["HF_HUB_CACHE"])
    return [p for p in root.rglob("*") if p.is_file() and "blobs" in p.parts]


def test_is_brought_once(hub, file):
    assert cached_file(file) is None
    path = download(file)
    assert path.read_bytes() == CONTENT
    assert path == cached_file(file) == cached_path(file.reference, file.name)
    hub.clear_log()
    assert download(file) == path
    assert hub.log == []


def test_what_others_have_brought_is_taken(hub, file):
    reference = file.reference
    huggingface_hub.hf_hub_download(reference.repo_id, file.name)
    hub.clear_log()
    assert download(file).read_bytes() == CONTENT
    assert hub.log == []


def test_and_others_take_what_we_have_brought(hub, file):
    path = download(file)
    hub.clear_log()
    found = huggingface_hub.hf_hub_download(
        file.reference.repo_id, file.name, revision=file.reference.revision
    )
    assert Path(found) == path
    assert hub.log == []


def test_threads_share_one_transfer(hub, file):
    threads = [threading.Thread(target=download, args=(file,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.pulled_bytes() == len(CONTENT)
    assert len(hub.log) == 3


def test_the_token_goes_to_the_hub_alone(hub, file):
    download(file)
    assert {(row.listener, row.has_token) for row in hub.log} == {("hub", True), ("cdn", False)}


@pytest.mark.parametrize("name", ["file", "small"])
class TestDamage:
    def test_once_is_mended(self, hub, name, request):
        file = request.getfixturevalue(name)
        hub.fail(Fault(method="GET", corrupt_file_at=file.size - 1))
        told = []
        path = download(file, told.append)
        assert path.read_bytes() == hub.read("org/a", file.name)
        assert hub.pulled_bytes() == 2 * file.size
        assert told == [f"{file}: damaged on the way, fetching it again"]

    def test_for_ever_leaves_nothing(self, hub, name, request):
        file = request.getfixturevalue(name)
        hub.fail(Fault(method="GET", corrupt_file_at=1, times=None))
        with pytest.raises(DamagedTransferError, match=rf"{file}: .* hash"):
            download(file)
        assert cached_file(file) is None
        assert cached_contents(hub) == []
        assert hub.pulled_bytes() == 2 * file.size
        hub.mend()
        assert download(file).read_bytes() == hub.read("org/a", file.name)

    def test_in_the_cache_is_found_where_it_is_looked_for(self, hub, name, request):
        file = request.getfixturevalue(name)
        path = download(file)
        right = path.read_bytes()
        path.resolve().write_bytes(b"x" + right[1:])
        hub.clear_log()
        assert download(file) == path
        assert hub.log == []
        told = []
        assert download_checked(file, told.append).read_bytes() == right
        assert told == [f"{file}: damaged in the cache, fetching it again"]
        hub.clear_log()
        assert download_checked(file).read_bytes() == right
        assert hub.log == []

    def test_of_the_size_is_seen_at_once(self, hub, name, request):
        file = request.getfixturevalue(name)
        path = download(file)
        path.resolve().write_bytes(b"cut")
        assert cached_file(file) is None
        assert download(file).stat().st_size == file.size
        # The bytes that another commit left under the same hash.
        other = hub.add_repo("org/a", {"README.md": b"new", file.name: path.read_bytes()})
        path.resolve().write_bytes(b"cut")
        again = remote.folder(hub, {"new": b"", file.name: hub.read("org/a", file.name)})
        assert other != again.reference.revision
        assert download(again.files[file.name]).stat().st_size == file.size


class TestFaults:
    @pytest.mark.parametrize(
        "act",
        [
            {"status": 503}, {"status": 429, "retry_after": 0.1}, {"reset": True}, {"expire": True},
            {"truncate_at": 600_000}, {"reset_at": 600_000},
        ],
        ids=str,
    )  # fmt: skip
    def test_once_do_not_show(self, hub, file, act):
        hub.fail(Fault(kind="cdn", **act))
        assert download(file).read_bytes() == CONTENT

    @pytest.mark.parametrize("times", [1, 4])
    def test_of_its_address_do_not_show(self, hub, file, times):
        hub.fail(Fault(kind="resolve", status=500, times=times))
        assert download(file).read_bytes() == CONTENT

    @pytest.mark.parametrize("kind", ["resolve", "cdn"])
    def test_for_ever_name_the_file(self, hub, file, kind):
        hub.fail(Fault(kind=kind, status=500, times=None))
        with pytest.raises(PassingError, match=r"org/a@\w{40}/model.safetensors: .* 500") as caught:
            download(file)
        assert len([row for row in hub.log if row.kind == kind]) == 6
        assert "signature" not in str(caught.value)

    def test_an_address_that_is_never_accepted(self, hub, file):
        hub.fail(Fault(kind="cdn", expire=True, times=None))
        with pytest.raises(PassingError, match=r"its address is not accepted \(HTTP 403\)"):
            download(file)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["resolve", "cdn"])
    def test_for_ever_take_no_minutes(self, hub, file, kind, monkeypatch):
        monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", FIRST_WAIT_SECONDS)
        hub.fail(Fault(kind=kind, status=500, times=None))
        begun = time.monotonic()
        with pytest.raises(TryAgainError):
            download(file)
        assert 5 < time.monotonic() - begun < 30

    @pytest.mark.slow
    def test_a_connection_that_stands_still_is_given_up_once(self, hub, file, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        hub.fail(Fault(kind="cdn", stall_at=0, stall_seconds=60, times=None))
        begun = time.monotonic()
        with pytest.raises(PassingError, match="the connection stands still"):
            download(file)
        assert time.monotonic() - begun < 15

    def test_are_told_by_us_alone(self, hub, file):
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logger = logging.getLogger("huggingface_hub")
        logger.addHandler(handler)
        try:
            hub.fail(Fault(kind="cdn", truncate_at=600_000))
            download(file)
            assert records == []
            logging.getLogger("huggingface_hub.file_download").warning("of another caller")
            assert len(records) == 1
        finally:
            logger.removeHandler(handler)

    def test_access_that_is_refused(self, hub, file):
        hub.add_repo("org/a", {}, gated=True)
        with pytest.raises(CheckpointError, match="gated") as caught:
            download(file)
        assert WRITE_TOKEN not in str(caught.value)
        assert len(hub.log) == 1


class TestRevision:
    def opened(self, hub):
        return remote.folder(hub, {"config.json": b"{}"}, fetch="download")

    def test_is_known_offline_afterwards(self, hub, monkeypatch):
        folder = self.opened(hub)
        asked = parse_remote("org/a")
        folder / "config.json"
        assert cached_path(asked, "config.json") is None
        note_revision(asked, folder.reference, "config.json")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert cached_path(asked, "config.json") == folder / "config.json"

    def test_is_asked_for_once(self, hub):
        folder = self.opened(hub)
        folder / "config.json"
        for _ in range(2):
            note_revision(parse_remote("org/a"), folder.reference, "config.json")
        assert [row.kind for row in hub.log].count("info") == 1
        note_revision(folder.reference, folder.reference, "config.json")
        assert [row.kind for row in hub.log].count("info") == 1

    def test_that_moved_on_is_left_alone(self, hub):
        folder = self.opened(hub)
        folder / "config.json"
        hub.add_repo("org/a", {"config.json": b"other"})
        note_revision(parse_remote("org/a"), folder.reference, "config.json")
        assert cached_path(parse_remote("org/a"), "config.json") is None

    def test_that_cannot_be_asked_for_is_no_error(self, hub):
        folder = self.opened(hub)
        folder / "config.json"
        hub.fail(Fault(status=500, times=None))
        note_revision(parse_remote("org/a"), folder.reference, "config.json")
        assert cached_path(parse_remote("org/a"), "config.json") is None


def test_hashes_are_known_from_the_cache(hub, file):
    assert hashes_of_cached(download(file)) == {"sha256": file.sha256, "git_oid": None}
    small = remote.one_file(hub, b"{}", "config.json")
    assert hashes_of_cached(download(small)) == {"sha256": None, "git_oid": small.git_oid}
    assert hashes_of_cached(Path("elsewhere/config.json")) == {"sha256": None, "git_oid": None}
