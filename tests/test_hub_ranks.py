"""Merges of models on the Hub by several ranks: the bytes of one process."""

import faults
import hub_merges
import pytest
import ranked
from huggingface_hub import close_session
from test_hub_merge import KINDS

pytestmark = pytest.mark.slow  # hundreds of requests


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    hub_merges.be_small(monkeypatch)


@pytest.mark.parametrize("kind", ["snapshots", "ties"])
@pytest.mark.parametrize("fetch", ["auto", "download"])
def test_bytes_of_one_process(tmp_path, hub, kind, fetch):
    published = KINDS[kind](tmp_path, hub)
    close_session()  # a connection is not to be forked
    arguments = [*published.arguments(), "--fetch", fetch, "--out", tmp_path / "out"]
    told = ranked.command(2, arguments)
    assert [said.code for said in told] == [0, 0], told
    assert told[1].err == ""
    # Each file came once, whichever rank asked for it.
    assert published.pulled() < 1.2 * published.weight_bytes()
    assert published.run(tmp_path / "alone", "--fetch", fetch).code == 0
    assert faults.content(tmp_path / "out") == faults.content(tmp_path / "alone")


def test_parts_of_files_are_not_streamed(tmp_path, hub):
    """Of which no rank could tell whether they are the repository's."""
    published = KINDS["ties"](tmp_path, hub)
    close_session()
    arguments = [*published.arguments(), "--fetch", "stream", "--out", tmp_path / "out"]
    told = ranked.command(2, arguments)
    assert {said.code for said in told} == {2}, told
    assert "--fetch stream is for one" in "".join(said.err for said in told)
    assert not (tmp_path / "out").exists()
