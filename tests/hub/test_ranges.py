"""Ranges of files: what is checked, what is asked again, and where the token goes."""

from __future__ import annotations

import dataclasses
import http.server
import threading
import time
from typing import ClassVar

import pytest
import remote
from huggingface_hub import constants
from loopback import WRITE_TOKEN, Fault

from kifmerge.errors import CheckpointError, DamagedTransferError, TryAgainError
from kifmerge.hub import client, ranges
from kifmerge.hub.client import FIRST_WAIT_SECONDS, PassingError
from kifmerge.hub.ranges import RangeReader, file_address

pytestmark = pytest.mark.slow  # hundreds of requests

CONTENT = remote.noise("ranges", 3_000_000)
START, STOP = 100_000, 2_900_000


@pytest.fixture
def reader(hub, monkeypatch):
    remote.be_quick(monkeypatch)
    return RangeReader(remote.one_file(hub, CONTENT))


def read(reader, start=START, stop=STOP):
    found = reader.read(start, stop)
    assert found == CONTENT[start:stop]


def asked(hub):
    return [row.range for row in hub.log if row.kind == "cdn"]


def test_a_range(hub, reader):
    read(reader)
    read(reader, 0, len(CONTENT))
    read(reader, len(CONTENT) - 1, len(CONTENT))
    assert reader.read(5, 5) == b""
    assert asked(hub) == [(START, STOP), (0, len(CONTENT)), (len(CONTENT) - 1, len(CONTENT))]
    assert [row.kind for row in hub.log].count("resolve") == 1


def test_the_token_goes_to_the_hub_alone(hub, reader):
    read(reader)
    assert {(row.listener, row.has_token) for row in hub.log} == {("hub", True), ("cdn", False)}


def test_files_that_are_not_large_come_from_the_hub_itself(hub):
    reader = RangeReader(remote.one_file(hub, b"0123456789", "config.json"))
    assert reader.read(2, 5) == b"234"
    assert [(row.method, row.has_token) for row in hub.log] == [("HEAD", True), ("GET", True)]


def test_no_token_where_none_is_to_be_sent(hub, reader, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    read(reader)
    assert not any(row.has_token for row in hub.log)


def test_offline_nothing_is_sent(hub, reader, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        read(reader)
    assert hub.log == []


class TestGoingOn:
    @pytest.mark.parametrize("act", ["truncate_at", "reset_at"])
    @pytest.mark.parametrize("times", [1, 4])
    def test_from_where_it_broke(self, hub, reader, act, times):
        hub.fail(Fault(kind="cdn", times=times, **{act: 600_000}))
        read(reader)
        assert asked(hub)[:2] == [(START, STOP), (START + 600_000, STOP)]
        assert len(asked(hub)) == times + 1
        # What did come is not pulled again.
        assert hub.pulled_bytes() == STOP - START

    def test_as_often_as_there_is_progress(self, hub, reader, monkeypatch):
        remote.be_quick(monkeypatch, tries=2)
        hub.fail(Fault(kind="cdn", truncate_at=300_000, times=None))
        read(reader)
        assert len(asked(hub)) == 10

    def test_after_a_stall(self, hub, reader, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
        hub.fail(Fault(kind="cdn", stall_at=600_000, stall_seconds=20))
        begun = time.monotonic()
        read(reader)
        assert time.monotonic() - begun < 5
        assert asked(hub)[1][0] >= START + 500_000

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_after_a_refusal_that_passes(self, hub, reader, status):
        hub.fail(Fault(kind="cdn", status=status, times=5))
        read(reader)

    def test_after_as_long_as_the_server_asks(self, hub, reader):
        hub.fail(Fault(kind="cdn", status=429, retry_after=1))
        begun = time.monotonic()
        read(reader)
        assert 1 <= time.monotonic() - begun < 3

    @pytest.mark.parametrize("act", ["wrong_range", "ignore_range"])
    def test_after_another_part_than_asked(self, hub, reader, act):
        hub.fail(Fault(kind="cdn", times=5, **{act: True}))
        read(reader)

    def test_slow_is_not_broken(self, hub, reader):
        hub.fail(Fault(kind="cdn", rate=4_000_000))
        read(reader)
        assert len(asked(hub)) == 1

    def test_after_resets_while_its_address_is_asked_for(self, hub, reader):
        hub.fail(Fault(kind="resolve", reset=True, times=2))
        hub.fail(Fault(kind="resolve", status=503, times=2))
        read(reader)


class Proxy(http.server.BaseHTTPRequestHandler):
    """Says that it sends the range asked for, and sends so many bytes more, or less."""

    num_more: ClassVar[list[int]] = []

    def do_GET(self):
        start, stop = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        stop += 1
        more = self.num_more.pop(0) if self.num_more else 0
        body = CONTENT[start : stop + more]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("more", [[-7], [-1000, -7, -7], [7], [7, -7, 100]])
def test_another_length_than_is_said(reader, monkeypatch, more):
    monkeypatch.setattr(Proxy, "num_more", more)
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        serving = threading.Thread(target=proxy.serve_forever)
        serving.start()
        address = f"http://127.0.0.1:{proxy.server_port}/"
        monkeypatch.setattr(ranges, "file_address", lambda file, say: address)
        try:
            read(reader)
        finally:
            proxy.shutdown()
            serving.join()
    assert more == []


class TestGivingUp:
    @pytest.mark.parametrize(
        ("act", "words"),
        [
            ({"status": 503}, "HTTP 503"),
            ({"reset": True}, "the connection failed"),
            ({"truncate_at": 0}, "the connection failed|ended too soon"),
            ({"expire": True}, r"address is not accepted \(HTTP 403\)"),
            ({"wrong_range": True}, r"asked for bytes 100000-2899999/3000000, the answer is bytes"),
            ({"ignore_range": True}, "the answer is the whole file: .* --fetch download"),
        ],
    )
    def test_without_progress(self, hub, reader, act, words):
        hub.fail(Fault(kind="cdn", times=None, **act))
        pattern = rf"reading org/a@\w{{40}}/model.safetensors: .*({words})"
        with pytest.raises(PassingError, match=pattern) as caught:
            read(reader)
        # An address that has expired is no failure the first time.
        assert len(asked(hub)) == 6 + ("expire" in act)
        assert "signature" not in str(caught.value)
        assert WRITE_TOKEN not in str(caught.value)

    @pytest.mark.parametrize("act", ["truncate_at", "reset_at"])
    def test_with_hardly_any_progress(self, hub, reader, act):
        hub.fail(Fault(kind="cdn", times=50, **{act: 7}))
        with pytest.raises(PassingError, match=r"the connection failed|ended too soon"):
            read(reader)
        assert len(asked(hub)) == 6

    def test_at_once_where_it_is_told_to_stay(self, hub, reader):
        hub.fail(Fault(kind="cdn", status=400, times=None))
        with pytest.raises(CheckpointError, match=r"model.safetensors: HTTP 400"):
            read(reader)
        assert len(asked(hub)) == 1

    @pytest.mark.slow
    def test_takes_no_minutes(self, hub, reader, monkeypatch):
        monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", FIRST_WAIT_SECONDS)
        hub.fail(Fault(kind="cdn", status=503, times=None))
        begun = time.monotonic()
        with pytest.raises(TryAgainError):
            read(reader)
        assert 5 < time.monotonic() - begun < 30


class TestAddress:
    def test_that_has_expired_is_asked_for_again(self, hub, reader):
        read(reader, 0, 10)
        hub.fail(Fault(kind="cdn", expire=True))
        read(reader)
        assert [row.kind for row in hub.log].count("resolve") == 2

    def test_that_lives_shortly(self, hub, reader):
        hub._signer.seconds = 0.15
        for start in range(0, 2_000_000, 400_000):
            read(reader, start, start + 400_000)
            time.sleep(0.06)
        assert any(row.status == 403 for row in hub.log)

    def test_after_access_was_taken_away(self, hub, reader):
        read(reader, 0, 10)
        hub.add_repo("org/a", {}, gated=True)
        hub.fail(Fault(kind="cdn", expire=True, times=None))
        with pytest.raises(CheckpointError, match="the repository is gated"):
            read(reader)

    @pytest.mark.parametrize("change", [{"size": 2_999_999}, {"sha256": "0" * 64}])
    def test_of_another_file_than_listed(self, hub, reader, change):
        other = dataclasses.replace(reader.file, **change)
        with pytest.raises(DamagedTransferError, match=r"the listing says \d+ bytes"):
            file_address(other)

    def test_of_a_mirror_with_tags_of_its_own(self, hub, reader):
        other = dataclasses.replace(reader.file, sha256="0" * 40)
        assert file_address(other)
