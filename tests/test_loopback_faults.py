"""What the server that stands in for the Hub does wrong on purpose, and as a process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session
from loopback import WRITE_TOKEN, Fault, LoopbackHub

pytestmark = pytest.mark.slow  # hundreds of requests

WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}"}
RESET = "reset by peer"


@pytest.fixture(autouse=True)
def _repository(hub: LoopbackHub) -> None:
    hub.add_repo("org/a", FILES)


def get(hub: LoopbackHub, path: str = "model.safetensors", **headers: str) -> Any:
    """Read a file with one request to the hub, no retries; redirects are followed."""
    url = f"{hub.endpoint}/org/a/resolve/main/{path}"
    token = {"Authorization": f"Bearer {WRITE_TOKEN}"}
    return get_session().get(url, headers=token | headers, follow_redirects=True)


def part(hub: LoopbackHub, start: int, stop: int) -> Any:
    return get(hub, Range=f"bytes={start}-{stop - 1}")


@contextmanager
def broken_off(how: str = r".") -> Iterator[None]:
    """Expect an error of the HTTP library, whichever the client has, and of that alone."""
    library = type(get_session()).__module__
    begin = time.monotonic()
    with pytest.raises(Exception, match=how) as caught:
        yield
    assert time.monotonic() - begin < 2
    assert type(caught.value).__module__ == library, repr(caught.value)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def upload(data: bytes = WEIGHTS[1:]) -> None:
    HfApi().upload_file(repo_id="org/a", path_or_fileobj=data, path_in_repo="new.safetensors")


class TestRequests:
    def test_status(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(match="*config.json", status=503, retry_after=0.5, skip=1, times=2))
        answers = [get(hub, "config.json") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 503, 503, 200]
        assert answers[1].headers["Retry-After"] == "0.5"
        assert [row.fault for row in hub.log] == [None, "status 503", "status 503", None]

    def test_who_is_hit(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(match="org/a/*.safetensors", method="GET", status=500))
        assert get(hub, "config.json").status_code == 200
        assert HfApi().get_hf_file_metadata(url=url(hub)).size == len(WEIGHTS)
        assert get(hub).status_code == 500
        hub.fail(Fault(kind="cdn", status=500))
        assert get(hub).status_code == 500
        assert [row.kind for row in hub.log if row.fault] == ["resolve", "cdn"]
        hub.fail(Fault(status=500, times=None))
        assert [get(hub).status_code for _ in range(3)] == [500] * 3
        hub.mend()
        assert get(hub).content == WEIGHTS

    def test_a_lost_answer(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(kind="commit", status=502, after_act=True))
        with pytest.raises(HfHubHTTPError, match="502"):
            upload()
        assert hub.read("org/a", "new.safetensors") == WEIGHTS[1:]
        hub.fail(Fault(kind="commit", reset=True, after_act=True))
        with broken_off(RESET):
            upload(WEIGHTS[2:])
        assert hub.read("org/a", "new.safetensors") == WEIGHTS[2:]
        hub.fail(Fault(kind="commit", reset=True))
        with broken_off(RESET):
            upload(WEIGHTS[3:])
        assert hub.read("org/a", "new.safetensors") == WEIGHTS[2:]

    def test_reset(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(kind="info", reset=True))
        with broken_off(RESET):
            HfApi().model_info("org/a")
        assert [(row.status, row.fault) for row in hub.log] == [(None, "reset")]

    def test_expire(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(expire=True))
        answer = get(hub)
        assert (answer.status_code, b"expired" in answer.content) == (403, True)
        assert [(row.kind, row.status) for row in hub.log] == [("resolve", 302), ("cdn", 403)]


class TestRanges:
    def test_ignored(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(ignore_range=True))
        assert get(hub).content == WEIGHTS  # nothing asked for: nothing ignored
        answer = part(hub, 5, 9)
        assert (answer.status_code, answer.content) == (200, WEIGHTS)
        assert part(hub, 5, 9).content == WEIGHTS[5:9]

    @pytest.mark.parametrize(
        ("asked", "given"),
        [((5, 9), (6, 10)), ((5, 300_000), (4, 299_999)), ((0, 300_000), (1, 300_000))],
    )
    def test_wrong(self, hub: LoopbackHub, asked: tuple[int, int], given: tuple[int, int]) -> None:
        hub.fail(Fault(wrong_range=True))
        answer = part(hub, *asked)
        assert (answer.status_code, answer.content) == (206, WEIGHTS[slice(*given)])
        assert answer.headers["Content-Range"] == f"bytes {given[0]}-{given[1] - 1}/300000"


class TestBodies:
    def test_truncated_and_resumed(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(truncate_at=100_000))
        path = hf_hub_download("org/a", "model.safetensors")
        assert Path(path).read_bytes() == WEIGHTS
        rows = [row for row in hub.log if row.kind == "cdn"]
        assert [(row.sent_bytes, row.fault) for row in rows] == [
            (100_000, "truncate_at 100000"),
            (300_000, None),
        ]

    def test_reset(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(reset_at=100_000))
        seen = b""
        request = get_session().stream(
            "GET", HfApi().get_hf_file_metadata(url=url(hub)).location, headers={}
        )
        with broken_off(RESET), request as answer:
            for block in answer.iter_bytes():
                seen += block
        assert seen == WEIGHTS[: len(seen)]
        assert 0 < len(seen) <= 100_000
        assert hub.pulled_bytes() == 100_000

    def test_corrupt_byte_of_the_body(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(corrupt_at=7))
        assert part(hub, 0, 7).content == WEIGHTS[:7]  # has no byte 7: the fault waits
        assert part(hub, 100, 200).content == flipped(WEIGHTS[100:200], 7)

    def test_corrupt_byte_of_the_file(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(corrupt_file_at=150, times=2))
        assert part(hub, 0, 150).content == WEIGHTS[:150]
        assert part(hub, 151, 160).content == WEIGHTS[151:160]
        assert part(hub, 100, 200).content == flipped(WEIGHTS[100:200], 50)
        assert get(hub).content == flipped(WEIGHTS, 150)
        assert get(hub).content == WEIGHTS

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(kind="cdn", stall_at=200_000, stall_seconds=0.4),
            Fault(kind="cdn", rate=750_000),
        ],
    )
    def test_slow(self, hub: LoopbackHub, fault: Fault) -> None:
        hub.fail(fault)
        begin = time.monotonic()
        assert get(hub).content == WEIGHTS
        assert 0.35 < time.monotonic() - begin < 2
        assert get(hub).content == WEIGHTS
        assert [row.fault is None for row in hub.log if row.kind == "cdn"] == [False, True]

    def test_a_stall_ends_with_the_server(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(kind="cdn", stall_at=1, stall_seconds=60))
        location = HfApi().get_hf_file_metadata(url=url(hub)).location
        with broken_off(), get_session().stream("GET", location) as answer:
            begin = time.monotonic()
            hub.close()
            assert time.monotonic() - begin < 2
            answer.read()

    def test_uploads(self, hub: LoopbackHub) -> None:
        hub.fail(Fault(kind="put", reset_at=100_000))
        upload()  # the client tries again
        puts = [row for row in hub.log if row.kind == "put"]
        assert [(row.status, row.fault) for row in puts] == [(None, "reset_at 100000"), (200, None)]
        assert 100_000 <= puts[0].received_bytes < len(WEIGHTS)
        assert hub.read("org/a", "new.safetensors") == WEIGHTS[1:]

    def test_link_rate(self) -> None:
        with LoopbackHub(link_rate=1_000_000) as slow:
            slow.add_repo("org/a", FILES)
            begin = time.monotonic()
            assert get(slow).content == WEIGHTS
            assert 0.28 < time.monotonic() - begin < 2


class TestFault:
    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {"status": 500, "reset": True},
            {"kind": "range", "reset": True},
            {"rate": 5.0, "after_act": True},
        ],
    )
    def test_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"is one of|is none of|goes with"):
            Fault(**wrong)


def url(hub: LoopbackHub) -> str:
    return f"{hub.endpoint}/org/a/resolve/main/model.safetensors"


def test_signed_addresses_end() -> None:
    with LoopbackHub(url_seconds=0) as short:
        short.add_repo("org/a", FILES)
        answer = get(short)
        assert (answer.status_code, b"expired" in answer.content) == (403, True)


def test_many_writers(hub: LoopbackHub) -> None:
    def push(number: int) -> None:
        name = f"{number}.safetensors"
        HfApi().upload_file(repo_id="org/a", path_or_fileobj=WEIGHTS[number:], path_in_repo=name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(push, range(1, 17)))
    assert len(hub.commits("org/a")) == 17
    assert all(hub.read("org/a", f"{n}.safetensors") == WEIGHTS[n:] for n in range(1, 17))


def test_the_store_survives_a_restart(hub: LoopbackHub, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path) as first:
        api = HfApi(endpoint=first.endpoint)
        api.create_repo("org/b", private=True)
        content = {"path_or_fileobj": WEIGHTS, "path_in_repo": "b.safetensors"}
        oid = api.upload_file(repo_id="org/b", **content).oid
        api.upload_file(repo_id="org/b", path_or_fileobj=b"1", path_in_repo="x", create_pr=True)
        early = [CommitOperationAdd("early.safetensors", WEIGHTS[1:])]
        api.preupload_lfs_files("org/b", early)
    with LoopbackHub(tmp_path) as second:
        assert second.head("org/b") == oid
        assert second.is_private("org/b")
        assert second.read("org/b", "b.safetensors") == WEIGHTS
        assert second.paths("org/b", "refs/pr/1") == [".gitattributes", "b.safetensors", "x"]
        api = HfApi(endpoint=second.endpoint)
        assert [one.num for one in api.get_repo_discussions("org/b")] == [1]
        for name, data in {"c.safetensors": WEIGHTS, "early.safetensors": WEIGHTS[1:]}.items():
            api.upload_file(repo_id="org/b", path_or_fileobj=data, path_in_repo=name)
            assert second.read("org/b", name) == data
        assert second.pushed_bytes() == 0


def test_a_second_add_replaces_the_files(hub: LoopbackHub, tmp_path: Path) -> None:
    first = hub.head("org/a")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model.safetensors").write_bytes(bytes(2_000_000))
    (tmp_path / "x").write_bytes(b"1")
    second = hub.add_repo("org/a", tmp_path)
    assert hub.paths("org/a") == ["deep/model.safetensors", "x"]
    assert [one.id for one in hub.commits("org/a")] == [second, first]
    assert hub.paths("org/a", first) == sorted(FILES)
    assert hub.read("org/a", "deep/model.safetensors") == bytes(2_000_000)


def test_a_crash_of_the_server_does_not_pass_unseen() -> None:
    broken = LoopbackHub()
    broken.add_repo("org/a", FILES)
    broken.file_path("org/a", "config.json").unlink()
    with broken_off():
        get(broken, "config.json")
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        broken.__exit__(None, None, None)
    assert not broken.store_dir.exists()


def test_a_subprocess_takes_it_for_the_hub(hub: LoopbackHub) -> None:
    code = "from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "tester\n"
    assert [row.kind for row in hub.log] == ["whoami"]


def test_a_process_of_its_own_with_flat_memory(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    size = 100_000_000
    with (tmp_path / "repo" / "model.safetensors").open("wb") as file:
        file.truncate(size)
    command = [sys.executable, "-m", "loopback", "--store", str(tmp_path / "store")]
    command += ["--repo", f"org/big={tmp_path / 'repo'}"]
    folder = Path(__file__).parent
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = json.loads(process.stdout.readline())["endpoint"]
            before = peak_bytes(process.pid)
            api = HfApi(endpoint=endpoint)
            path = api.hf_hub_download("org/big", "model.safetensors")
            assert Path(path).stat().st_size == size
            api.create_repo("org/copy")
            api.upload_file(repo_id="org/copy", path_or_fileobj=path, path_in_repo="x.safetensors")
            assert peak_bytes(process.pid) - before < 20_000_000
            fault = {"match": "*whoami*", "status": 418}
            get_session().post(f"{endpoint}/_faults", json=fault).raise_for_status()
            with pytest.raises(HfHubHTTPError, match="418"):
                api.whoami()
            totals = get_session().get(f"{endpoint}/_log/summary").json()
            assert (totals["pulled_bytes"], totals["pushed_bytes"]) == (size, size)
            assert totals["faults"] == {"status 418": 1}
            assert get_session().post(f"{endpoint}/_faults", json={}).status_code == 400
        finally:
            process.terminate()
    assert process.returncode == 0


def peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
