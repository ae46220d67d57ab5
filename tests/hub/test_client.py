"""Errors of the client in our words, and patience with what may pass."""

from __future__ import annotations

import errno
import json
import time

import huggingface_hub
import pytest
import remote
from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError
from loopback import OTHER_TOKEN, Fault

from kifmerge.errors import CheckpointError, TryAgainError
from kifmerge.hub import client
from kifmerge.hub.client import PassingError, asked_seconds, hub_api, hub_errors, patiently


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    remote.be_quick(monkeypatch)


def look_up(repo_id="org/a", say=client.silent, **options):
    call = lambda: hub_api().repo_info(repo_id, **options)  # noqa: E731
    return patiently(call, f"reading {repo_id}", say)


def in_our_words(error):
    with pytest.raises((CheckpointError, TryAgainError)) as caught, hub_errors("reading x"):
        raise error
    return caught.value


class TestWhatStays:
    def test_no_such_repository(self, hub):
        with pytest.raises(CheckpointError, match="reading org/a: no such repository, or a priv"):
            look_up()
        assert len(hub.log) == 1

    def test_no_such_revision(self, hub):
        hub.add_repo("org/a", {"a": b""})
        with pytest.raises(CheckpointError, match="no such branch, tag or commit"):
            look_up(revision="none")

    def test_private_without_and_with_a_token_of_somebody_else(self, hub, monkeypatch):
        hub.add_repo("org/a", {"a": b""}, private=True)
        assert look_up().private
        for token in (OTHER_TOKEN, None):
            use_token(monkeypatch, token)
            with pytest.raises(CheckpointError, match="private one that your token does not open"):
                look_up()

    def test_a_token_that_is_none(self, hub, monkeypatch):
        hub.add_repo("org/a", {"a": b""})
        use_token(monkeypatch, "a-token-of-nobody")
        with pytest.raises(CheckpointError, match="your token is not accepted") as caught:
            look_up()
        assert "hf auth login" in str(caught.value)
        assert "a-token-of-nobody" not in str(caught.value)

    def test_gated(self, hub):
        hub.add_repo("org/a", {"a": b"1"}, gated=True)
        with pytest.raises(CheckpointError, match="gated: ask for access"), hub_errors("reading"):
            huggingface_hub.hf_hub_download("org/a", "a")

    def test_no_such_file(self, hub):
        hub.add_repo("org/a", {"a": b"1"})
        with pytest.raises(CheckpointError, match="no such file"), hub_errors("reading"):
            huggingface_hub.hf_hub_download("org/a", "b")

    def test_forbidden_where_the_client_speaks_of_the_connection(self, hub):
        hub.add_repo("org/a", {"a": b"1"})
        hub.fail(Fault(kind="resolve", status=403, times=None))
        with pytest.raises(CheckpointError, match="does not allow it"), hub_errors("reading"):
            huggingface_hub.hf_hub_download("org/a", "a", force_download=True)

    def test_no_name_of_a_repository(self):
        with pytest.raises(CheckpointError, match="no name that a repository can have"):
            look_up("a/b/c")

    def test_headers_that_a_proxy_drops(self):
        error = LocalEntryNotFoundError("...")
        error.__cause__ = FileMetadataError("...")
        assert "a proxy may drop headers" in str(in_our_words(error))

    def test_offline(self, hub, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            look_up()
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"), hub_errors("reading"):
            huggingface_hub.hf_hub_download("org/a", "a")
        assert hub.log == []

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
    def test_a_cache_that_cannot_be_written(self, code):
        found = in_our_words(OSError(code, "denied", "/cache/blobs"))
        assert isinstance(found, CheckpointError)
        assert "/cache/blobs cannot be written (denied): set HF_HOME" in str(found)

    def test_what_is_not_of_the_hub_is_left_alone(self):
        for error in (ZeroDivisionError(), ValueError("x"), FileNotFoundError(2, "no", "x")):
            with pytest.raises(type(error)), hub_errors("reading x"):
                raise error


class TestWhatMayPass:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_a_status(self, hub, status):
        hub.add_repo("org/a", {"a": b""})
        hub.fail(Fault(status=status, times=5))
        assert look_up().id == "org/a"
        assert len(hub.log) == 6

    def test_it_does_not_for_ever(self, hub):
        hub.fail(Fault(status=500, times=None))
        with pytest.raises(TryAgainError, match="reading org/a: the Hub answers HTTP 500"):
            look_up()
        assert len(hub.log) == 6

    def test_the_number_of_tries_is_read_when_it_is_used(self, hub, monkeypatch):
        remote.be_quick(monkeypatch, tries=2)
        hub.fail(Fault(status=500, times=None))
        with pytest.raises(TryAgainError):
            look_up()
        assert len(hub.log) == 2

    def test_connections(self, hub):
        hub.add_repo("org/a", {"a": b""})
        hub.fail(Fault(reset=True, times=2))
        hub.fail(Fault(truncate_at=10, times=2))
        assert look_up().id == "org/a"
        assert len(hub.log) == 5

    def test_an_answer_that_never_ends(self, hub):
        hub.add_repo("org/a", {"a": b""})
        hub.fail(Fault(stall_at=3, stall_seconds=9))
        assert look_up(timeout=0.3).id == "org/a"

    def test_nobody_there(self, hub):
        with (
            remote.closed(hub),
            pytest.raises(TryAgainError, match=r"the connection failed \(ConnectError\)"),
        ):
            look_up()

    def test_an_answer_of_somebody_else(self):
        with pytest.raises(json.JSONDecodeError) as caught:
            json.loads("<html>")
        assert "a log-in page may stand in between" in str(in_our_words(caught.value))

    def test_a_full_disk(self):
        found = in_our_words(OSError(errno.ENOSPC, "full"))
        assert isinstance(found, TryAgainError)
        assert not isinstance(found, PassingError)


class TestWaits:
    def test_are_as_long_as_the_server_asks(self, hub):
        hub.add_repo("org/a", {"a": b""})
        hub.fail(Fault(status=429, retry_after=1))
        begun = time.monotonic()
        look_up()
        assert 1 <= time.monotonic() - begun < 3

    def test_are_told_when_they_are_long(self, hub, monkeypatch):
        hub.add_repo("org/a", {"a": b""})
        hub.fail(Fault(status=429, retry_after=7))
        slept, told = [], []
        monkeypatch.setattr(client.time, "sleep", slept.append)
        look_up(say=told.append)
        assert slept == [7.0]
        answer = "the Hub answers HTTP 429, loopback fault: status 429"
        assert told == [f"reading org/a: {answer}; waiting 7 s"]

    def test_are_not_endless(self, hub):
        hub.fail(Fault(status=429, retry_after=3600))
        with pytest.raises(PassingError, match="429"):
            look_up()
        assert len(hub.log) == 1

    def test_grow(self, monkeypatch):
        slept = []
        monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.5)
        monkeypatch.setattr(client.time, "sleep", slept.append)
        error = PassingError("x")
        for attempt in range(1, 9):
            client.pause(attempt, error, client.silent)
        assert all(0.75 * least <= wait <= 1.25 * least for wait, least in zip(
            slept, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True))  # fmt: skip

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({}, None),
            ({"retry-after": "12"}, 12),
            ({"retry-after": " 0.5 "}, 0.5),
            ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
            ({"retry-after": "-3"}, None),
            ({"ratelimit": '"api";r=0;t=55'}, 55),
            ({"ratelimit": '"api";r=3;t=55'}, None),
            ({"ratelimit": '"api";r=0;t=55', "retry-after": "2"}, 2),
        ],
    )
    def test_asked_for(self, headers, seconds):
        assert asked_seconds(headers) == seconds


def test_no_token_in_what_a_server_tells(hub, monkeypatch):
    use_token(monkeypatch, "secret-token")
    hub.fail(Fault(status=400, times=None))

    class Told(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self, error):
            self.response, self.server_message = error.response, "you sent secret-token\n..."

    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as caught:
        hub_api().repo_info("org/a")
    found = str(in_our_words(Told(caught.value)))
    assert found == "reading x: the Hub answers HTTP 400, you sent ***"


def use_token(monkeypatch, token):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
