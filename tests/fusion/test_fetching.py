"""How weights on the Hub are read where the user leaves it open: the choice, and its reason."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import folders
import hub_merges
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from loopback import LoopbackHub

from kifmerge.checkpoint.folder import Fetch
from kifmerge.checkpoint.source import FolderSource, open_source
from kifmerge.fusion.fetching import Reading, Settled, settle
from kifmerge.hub.folder import HubFolder, open_hub_folder
from kifmerge.hub.reference import Reference
from kifmerge.hub.stream import stream_bytes

SHAPES = {"a": (1000, 250), "b": (1000, 250), "c": (1000, 250), "d": (10,)}
TENSOR_BYTES = 1_000_000
ALL_BYTES = 3 * TENSOR_BYTES + 40


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_merges.be_small(monkeypatch)


@pytest.fixture
def model(tmp_path: Path, hub: LoopbackHub) -> Path:
    """In two files: a and c, b and d."""
    path = folders.save(tmp_path / "model", folders.random_tensors(1, SHAPES), num_shards=2)
    hub.add_repo("org/model", path)
    return path


def opened(
    hub: LoopbackHub, repo_id: str = "org/model", stem: str = "model", fetch: Fetch = "auto"
) -> FolderSource:
    reference = Reference(repo_id=repo_id, revision=hub.head(repo_id))
    return FolderSource(open_hub_folder(reference, fetch), stem)


def settled(
    source: FolderSource, names: Sequence[str] | None = None, passes: int = 1, **options: object
) -> Settled:
    """Of one reading."""
    reading = Reading(
        source=source, names=source.names() if names is None else names, num_passes=passes
    )
    (found,) = settle([reading], **options)  # type: ignore[arg-type]
    assert found.reference == str(source.directory)
    if isinstance(source.directory, HubFolder) and found.fetch != "cache":
        assert source.directory.fetch == found.fetch
    return found


def with_room(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> list[Path]:
    """Let every disk have so much room; returns the paths that are asked for."""
    usage = shutil.disk_usage("/")
    asked: list[Path] = []

    def tell(path: Path) -> object:
        asked.append(path)
        return usage._replace(free=num_bytes)

    monkeypatch.setattr(shutil, "disk_usage", tell)
    return asked


@pytest.mark.usefixtures("model")
class TestChoice:
    def test_all_of_it_once(self, hub: LoopbackHub) -> None:
        found = settled(opened(hub))
        assert (found.fetch, found.reason) == (
            "download",
            "all of it is needed, and the disk of the cache has room",
        )
        files = [hub.file_path("org/model", name) for name in hub.paths("org/model")]
        whole = sum(path.stat().st_size for path in files if path.stat().st_size > 10_000)
        assert found.pulled_bytes == whole
        assert str(found) == f"org/model@{hub.head('org/model')}: download, {found.reason}"

    def test_a_part_of_it(self, hub: LoopbackHub) -> None:
        found = settled(opened(hub), ["a", "d"])
        assert (found.fetch, found.reason) == ("stream", "only 2 of 4 tensors are needed")
        assert found.pulled_bytes == TENSOR_BYTES + 40

    def test_all_of_one_file(self, hub: LoopbackHub) -> None:
        """The other file need not come."""
        found = settled(opened(hub), ["a", "c"])
        assert (found.fetch, "all of it" in found.reason) == ("download", True)
        assert 2 * TENSOR_BYTES < found.pulled_bytes < 2 * TENSOR_BYTES + 1000

    @pytest.mark.parametrize(("passes", "fetch"), [(2, "stream"), (3, "stream"), (4, "download")])
    def test_a_part_of_it_many_times(self, hub: LoopbackHub, passes: int, fetch: str) -> None:
        """Whatever pulls less."""
        found = settled(opened(hub), ["a", "d"], passes)
        expected = {
            "stream": ("only 2 of 4 tensors are needed", passes * (TENSOR_BYTES + 40)),
            "download": (f"it is read {passes} times", found.pulled_bytes),
        }
        assert (found.fetch, (found.reason, found.pulled_bytes)) == (fetch, expected[fetch])

    def test_more_than_once(self, hub: LoopbackHub) -> None:
        found = settled(opened(hub), passes=3)
        assert (found.fetch, found.reason) == ("download", "it is read 3 times")

    def test_a_little_more_than_once(self, hub: LoopbackHub) -> None:
        """As where a base holds some tensors without scores."""
        for more, fetch, reason in [
            ("d", "download", "all of it is needed, and the disk of the cache has room"),
            ("a", "download", "it is read 1.33 times"),
        ]:
            source = opened(hub)
            readings = [
                Reading(source=source, names=source.names()),
                Reading(source=source, names=[more]),
            ]
            (found,) = settle(readings)
            assert (found.fetch, found.reason) == (fetch, reason)

    def test_in_another_order(self, hub: LoopbackHub) -> None:
        found = settled(opened(hub), ["c", "a", "b", "d"])
        assert (found.fetch, found.reason) == (
            "download",
            "it is read in another order than it is stored in",
        )

    def test_files_in_any_order(self, hub: LoopbackHub) -> None:
        source = opened(hub)
        assert [*source.names()] == ["a", "c", "b", "d"]
        assert "all of it is needed" in settled(source, ["b", "d", "a", "c"]).reason

    @pytest.mark.parametrize(("passes", "times"), [(1, "once"), (3, "3 times")])
    def test_a_disk_that_is_too_small(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, passes: int, times: str
    ) -> None:
        with_room(monkeypatch, 2_500_000)
        found = settled(opened(hub), passes=passes)
        assert (found.fetch, found.reason) == (
            "stream",
            f"the disk of the cache has 0.00 GB for its 0.00 GB; it is pulled {times}",
        )
        assert found.pulled_bytes == passes * ALL_BYTES

    def test_room_for_the_output(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
        with_room(monkeypatch, 5_000_000)
        assert settled(opened(hub), write_bytes=1_900_000).fetch == "download"
        assert settled(opened(hub), write_bytes=2_100_000).fetch == "stream"
        assert settled(opened(hub), write_bytes=9_100_000).fetch == "stream"

    def test_room_for_one_of_two(
        self, hub: LoopbackHub, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add_repo("org/other", model)
        with_room(monkeypatch, 5_000_000)
        sources = [opened(hub), opened(hub, "org/other")]
        found = settle([Reading(source=source, names=source.names()) for source in sources])
        assert [one.fetch for one in found] == ["download", "stream"]

    def test_the_disk_of_the_cache_is_asked(
        self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = opened(hub)
        asked = with_room(monkeypatch, 10**9)
        settled(source)
        cache = Path(hub.env["HF_HUB_CACHE"])
        assert asked == [cache]
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "not/there/yet"))
        settled(source)
        assert asked == [cache, cache]

    @pytest.mark.parametrize("fetch", ["download", "stream"])
    def test_as_told(self, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, fetch: Fetch) -> None:
        with_room(monkeypatch, 10_000 if fetch == "download" else 10**9)
        found = settled(opened(hub, fetch=fetch), passes=2)
        assert (found.fetch, found.reason) == (fetch, "as asked")
        assert (found.pulled_bytes > 2 * ALL_BYTES - 1) == (fetch == "stream")


@pytest.mark.usefixtures("model")
class TestSparingTheDisk:
    @pytest.mark.parametrize(("passes", "times"), [(1, "once"), (3, "3 times")])
    def test_a_model_is_streamed(self, hub: LoopbackHub, passes: int, times: str) -> None:
        found = settled(opened(hub), passes=passes, spare_disk=True)
        assert (found.fetch, found.reason) == (
            "stream",
            f"no model is kept on this disk; it is pulled {times}",
        )

    def test_memory_of_a_stream(self, hub: LoopbackHub, model: Path) -> None:
        source = opened(hub)
        found = settled(source, spare_disk=True)
        assert isinstance(source.directory, HubFolder)
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        block_bytes = source.directory.shelf.block_bytes
        assert found.buffer_bytes == stream_bytes(num_bytes, block_bytes) > 4 * block_bytes
        assert settled(opened(hub)).buffer_bytes == 0

    def test_even_in_another_order(self, hub: LoopbackHub) -> None:
        assert settled(opened(hub), ["c", "a", "d", "b"], spare_disk=True).fetch == "stream"

    @pytest.mark.parametrize(
        ("passes", "in_order", "fetch"),
        [(1, True, "stream"), (1, False, "download"), (3, True, "download")],
    )
    def test_a_snapshot_only_if_that_costs_nothing(
        self, tmp_path: Path, hub: LoopbackHub, passes: int, in_order: bool, fetch: str
    ) -> None:
        folders.snapshot(tmp_path / "snapshot", 1, {"a": torch.zeros(1000), "b": torch.zeros(5)})
        hub.add_repo("org/snapshot", tmp_path / "snapshot")
        source = opened(hub, "org/snapshot", "importance")
        names = list(source.names())
        found = settled(source, names if in_order else names[::-1], passes, spare_disk=True)
        assert found.fetch == fetch


class TestWhatIsHere:
    def test_folders_of_this_disk_are_left_alone(self, model: Path) -> None:
        source = open_source(model)
        assert settle([Reading(source=source, names=source.names())]) == []

    @pytest.mark.parametrize("fetch", ["auto", "download", "stream"])
    def test_all_of_it(self, hub: LoopbackHub, model: Path, fetch: Fetch) -> None:
        for name in hub.paths("org/model"):
            hf_hub_download("org/model", name)
        hub.clear_log()
        found = settled(opened(hub, fetch=fetch))
        assert (found.fetch, found.reason) == ("cache", "all of it is there")
        assert found.pulled_bytes == 0
        assert hub.pulled_bytes() == 0

    def test_a_part_of_it(self, hub: LoopbackHub, model: Path) -> None:
        """Only what is missing counts."""
        hf_hub_download("org/model", "model-00001-of-00002.safetensors")
        found = settled(opened(hub))
        assert found.fetch == "download"
        assert TENSOR_BYTES < found.pulled_bytes < TENSOR_BYTES + 1000
        assert settled(opened(hub), ["a", "c"]).fetch == "cache"
        found = settled(opened(hub), ["a", "d"])
        assert (found.fetch, found.reason) == ("stream", "only 1 of 2 tensors are needed")
        assert found.pulled_bytes == 40

    def test_nothing_is_pulled_to_find_out(self, hub: LoopbackHub, model: Path) -> None:
        source = opened(hub)
        hub.clear_log()
        settled(source)
        assert hub.log == []


def test_what_is_told_is_pulled_in_few_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    """Small tensors that follow one another come together."""
    state = folders.random_tensors(1, {f"t{number:03}": (20,) for number in range(100)})
    hub.add_repo("org/model", folders.save(tmp_path / "model", state))
    source = opened(hub)
    hub.clear_log()
    settled(source, spare_disk=True)
    for name in source.names():
        assert torch.equal(source.read(name, 0, 20), state[name])
    assert hub.pulled_bytes() == 8000
    assert sum(row.kind == "cdn" for row in hub.log) == 4
