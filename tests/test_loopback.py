"""The server that stands in for the Hub, driven by the real client."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_safetensors_metadata,
    hf_hub_download,
    list_repo_tree,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from loopback import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub

WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)
CARD = b"---\nlicense: mit\nbase_model:\n- org/x\n- org/y\ntags: [merge, kif]\n---\n# Card\n"
FILES = {"model.safetensors": WEIGHTS, "README.md": CARD, "sub/config.json": b"{}"}


def get(hub: LoopbackHub, path: str, token: str | None = WRITE_TOKEN, **headers: str) -> Any:
    """Ask the hub once, as the client's session does and no retries; redirects are followed."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        named["Authorization"] = f"Bearer {token}"
    return get_session().get(f"{hub.endpoint}{path}", headers=named, follow_redirects=True)


def weights(hub: LoopbackHub, repo_id: str = "org/a", **headers: str) -> Any:
    return get(hub, f"/{repo_id}/resolve/main/model.safetensors", **headers)


def kinds(hub: LoopbackHub) -> list[str]:
    return [row.kind for row in hub.log]


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    hub.add_repo("org/a", FILES)
    hub.clear_log()
    return HfApi()


class TestReads:
    def test_info(self, hub: LoopbackHub, api: HfApi) -> None:
        info = api.model_info("org/a", files_metadata=True)
        assert (info.id, info.sha, info.private, info.gated) == (
            *("org/a", hub.head("org/a"), False),
            False,
        )
        assert info.card_data.to_dict() == {
            "license": "mit",
            "base_model": ["org/x", "org/y"],
            "tags": ["merge", "kif"],
        }
        sha256 = hashlib.sha256(WEIGHTS).hexdigest()
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 300000\n"
        siblings = {one.rfilename: one for one in info.siblings}
        assert sorted(siblings) == sorted(FILES)
        big, small = siblings["model.safetensors"], siblings["sub/config.json"]
        assert dict(big.lfs) == {
            "size": len(WEIGHTS),
            "sha256": sha256,
            "pointer_size": len(text),
        }
        assert small.lfs is None
        assert small.blob_id == hashlib.sha1(b"blob 2\0{}").hexdigest()
        pointer = text.encode()
        assert big.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()

    def test_tree_in_pages(self, hub: LoopbackHub, api: HfApi) -> None:
        hub.page_size = 2
        found = list(list_repo_tree("org/a", recursive=True, expand=True))
        assert [one.path for one in found] == [
            *("README.md", "model.safetensors", "sub", "sub/config.json")
        ]
        assert {one.last_commit.oid for one in found} == {hub.head("org/a")}
        assert kinds(hub) == ["tree", "tree"]
        assert [one.path for one in list_repo_tree("org/a", "sub")] == ["sub/config.json"]
        with pytest.raises(EntryNotFoundError):
            list(list_repo_tree("org/a", "none"))

    def test_last_commits(self, hub: LoopbackHub, api: HfApi) -> None:
        second = hub.add_repo("org/a", FILES | {"sub/config.json": b"{1}"})
        third = hub.add_repo("org/a", FILES | {"sub/config.json": b"{1}", "x": b"1"})
        first = hub.commits("org/a")[-1].id
        found = list_repo_tree("org/a", recursive=True, expand=True)
        assert [(one.path, one.last_commit.oid) for one in found] == [
            *(("README.md", first), ("model.safetensors", first)),
            *(("sub", second), ("sub/config.json", second), ("x", third)),
        ]

    def test_paths_refs_and_commits(self, hub: LoopbackHub, api: HfApi) -> None:
        found = api.get_paths_info("org/a", ["model.safetensors", "sub", "none"])
        assert [one.path for one in found] == ["model.safetensors", "sub"]
        assert found[0].lfs.sha256 == hub.sha256("org/a", "model.safetensors")
        second = hub.add_repo("org/a", {"x": b"1"}, branch="other")
        refs = {ref.name: ref.target_commit for ref in api.list_repo_refs("org/a").branches}
        assert refs == {"main": hub.head("org/a"), "other": second}
        commits = [one.commit_id for one in api.list_repo_commits("org/a", revision="other")]
        assert commits == [second, hub.head("org/a")]
        assert hub.commits("org/a", "other")[0].parent == hub.head("org/a")

    def test_a_snapshot_pulls_each_byte_once(self, hub: LoopbackHub, api: HfApi) -> None:
        folder = Path(snapshot_download("org/a"))
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
        assert hub.pulled_bytes() == sum(map(len, FILES.values()))
        assert hub.pulled_bytes("*.safetensors") == len(WEIGHTS)
        assert hub.pulled_bytes("org/a/sub/*") == 2
        assert folder.is_relative_to(hub.env["HF_HOME"])
        tokens = {(row.listener, row.has_token) for row in hub.log}
        assert tokens == {("hub", True), ("cdn", False)}

    def test_datasets_apart_from_models(self, hub: LoopbackHub, api: HfApi) -> None:
        hub.add_repo("org/a", {"data.txt": b"rows"}, kind="dataset")
        path = hf_hub_download("org/a", "data.txt", repo_type="dataset")
        assert Path(path).read_bytes() == b"rows"
        assert api.dataset_info("org/a").sha == hub.head("org/a", kind="dataset")
        assert hub.paths("org/a") == sorted(FILES)

    def test_ranges_through_the_file_system_and_safetensors(self, hub: LoopbackHub) -> None:
        header = json.dumps(
            {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {}}
        ).encode()
        whole = len(header).to_bytes(8, "little") + header + bytes(8)
        hub.add_repo("org/b", {"model.safetensors": whole})
        tensors = get_safetensors_metadata("org/b").files_metadata["model.safetensors"].tensors
        assert tensors["w"].shape == [2]
        assert HfFileSystem().cat_file("org/b/model.safetensors", start=3, end=20) == whole[3:20]

    @pytest.mark.parametrize("path", ["model.safetensors", "README.md"])
    @pytest.mark.parametrize(
        ("asked", "part"),
        [
            *(("0-9", slice(0, 10)), ("5-", slice(5, None)), ("-7", slice(-7, None))),
            ("10-999999999", slice(10, None)),
        ],
    )
    def test_range(self, hub: LoopbackHub, api: HfApi, path: str, asked: str, part: slice) -> None:
        answer = get(hub, f"/org/a/resolve/main/{path}", Range=f"bytes={asked}")
        start, stop, _ = part.indices(len(FILES[path]))
        assert (answer.status_code, answer.content) == (206, FILES[path][part])
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(FILES[path])}"
        assert {row.range for row in hub.log} == {(start, stop)}

    def test_range_behind_the_end(self, hub: LoopbackHub, api: HfApi) -> None:
        answer = weights(hub, Range="bytes=300000-")
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */300000")

    def test_heads(self, hub: LoopbackHub, api: HfApi) -> None:
        url = f"{hub.endpoint}/org/a/resolve/main/"
        big = get_session().head(url + "model.safetensors", follow_redirects=False)
        assert big.status_code == 302
        assert big.headers["X-Linked-Size"] == "300000"
        assert big.headers["X-Linked-Etag"] == f'"{hub.sha256("org/a", "model.safetensors")}"'
        assert big.headers["X-Repo-Commit"] == hub.head("org/a")
        assert big.headers["Location"].startswith("http://localhost:")
        small = get_session().head(url + "sub/config.json", follow_redirects=False)
        assert (small.status_code, small.headers["Content-Length"]) == (200, "2")
        assert (
            small.headers["ETag"] == f'"{hashlib.sha1(b"blob 2" + bytes(1) + b"{}").hexdigest()}"'
        )


class TestAccess:
    @pytest.mark.parametrize(
        ("token", "status", "error"),
        [
            (False, 401, RepositoryNotFoundError),
            (OTHER_TOKEN, 404, RepositoryNotFoundError),
            ("wrong", 401, HfHubHTTPError),
            (READ_TOKEN, None, None),
            (WRITE_TOKEN, None, None),
        ],
    )
    def test_private(
        self, hub: LoopbackHub, token: Any, status: int | None, error: type | None
    ) -> None:
        hub.add_repo("org/secret", FILES, private=True)
        if error is None:
            assert HfApi(token=token).model_info("org/secret").private
            return
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(token=token).model_info("org/secret")
        assert type(caught.value) is error
        assert caught.value.response.status_code == status

    def test_missing(self, hub: LoopbackHub, api: HfApi) -> None:
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info("org/none")
        assert caught.value.response.status_code == 404
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info("org/none", token=False)
        assert caught.value.response.status_code == 401
        with pytest.raises(RevisionNotFoundError):
            api.model_info("org/a", revision="none")
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download("org/a", "none")

    @pytest.mark.parametrize(("token", "status"), [(False, 401), (WRITE_TOKEN, 403)])
    def test_gated(self, hub: LoopbackHub, token: Any, status: int) -> None:
        hub.add_repo("org/gated", FILES, gated=True)
        assert HfApi(token=token).model_info("org/gated").gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            HfFileSystem(token=token).cat_file("org/gated/README.md")
        assert caught.value.response.status_code == status

    def test_writing_without_the_right(self, hub: LoopbackHub, api: HfApi) -> None:
        for token in (READ_TOKEN, OTHER_TOKEN):
            theirs = HfApi(token=token)
            with pytest.raises(HfHubHTTPError, match="403"):
                theirs.create_repo("org/new")
            with pytest.raises(HfHubHTTPError, match="403"):
                theirs.upload_file(repo_id="org/a", path_or_fileobj=b"1", path_in_repo="x")
        assert hub.paths("org/a") == sorted(FILES)
        assert not hub.has_repo("org/new")
        assert [api.whoami(t)["name"] for t in (READ_TOKEN, OTHER_TOKEN)] == ["tester", "other"]

    def test_the_cdn_refuses_tokens_and_other_signatures(
        self, hub: LoopbackHub, api: HfApi
    ) -> None:
        url = f"{hub.endpoint}/org/a/resolve/main/model.safetensors"
        location = api.get_hf_file_metadata(url=url).location
        assert get_session().get(location).content == WEIGHTS
        token = {"Authorization": f"Bearer {WRITE_TOKEN}"}
        assert get_session().get(location, headers=token).status_code == 400
        assert get_session().get(location.replace("expires=", "expires=9")).status_code == 403


class TestWrites:
    @pytest.mark.parametrize("part_bytes", [None, 100_000, 99_999])
    def test_upload(self, hub: LoopbackHub, part_bytes: int | None, tmp_path: Path) -> None:
        hub.part_bytes = part_bytes
        api = HfApi()
        url = api.create_repo("org/new", private=True)
        assert (url.repo_id, hub.is_private("org/new")) == ("org/new", True)
        assert api.create_repo("org/new", exist_ok=True).repo_id == "org/new"
        (tmp_path / "big").write_bytes(WEIGHTS)
        operations = [
            CommitOperationAdd("a.safetensors", tmp_path / "big"),
            CommitOperationAdd("README.md", CARD),
            CommitOperationAdd("d/empty.safetensors", b""),
        ]
        info = api.create_commit("org/new", operations, commit_message="One")
        assert info.oid == hub.head("org/new")
        assert hub.paths("org/new") == [
            *(".gitattributes", "README.md", "a.safetensors", "d/empty.safetensors")
        ]
        assert hub.read("org/new", "a.safetensors") == WEIGHTS
        assert hub.read("org/new", "README.md") == CARD
        assert hub.pushed_bytes() == len(WEIGHTS)
        assert kinds(hub).count("put") == {None: 1, 100_000: 3, 99_999: 4}[part_bytes]
        assert not any(row.has_token for row in hub.log if row.listener == "cdn")
        assert not list((hub.store_dir / "incoming").iterdir())

    def test_an_object_is_put_once(self, hub: LoopbackHub, api: HfApi) -> None:
        for name in ("b.safetensors", "model.safetensors"):
            api.upload_file(repo_id="org/a", path_or_fileobj=WEIGHTS, path_in_repo=name)
        assert hub.pushed_bytes() == 0  # it came with add_repo
        assert hub.sha256("org/a", "b.safetensors") == hub.sha256("org/a", "model.safetensors")
        names = [one.title for one in hub.commits("org/a")]
        assert names == ["Upload b.safetensors with huggingface_hub", "Add files"]  # and no more
        api.create_repo("org/b")
        api.upload_file(repo_id="org/b", path_or_fileobj=WEIGHTS, path_in_repo="b.safetensors")
        assert hub.pushed_bytes() == len(WEIGHTS)  # of another repository

    def test_the_hash_of_what_arrives_is_checked(self, hub: LoopbackHub, api: HfApi) -> None:
        hub.fail(Fault(kind="put", corrupt_at=5))
        upload = {"repo_id": "org/a", "path_in_repo": "b.safetensors"}
        with pytest.raises(RuntimeError, match="uploading") as caught:
            api.upload_file(path_or_fileobj=WEIGHTS[1:], **upload)
        assert "the content has sha256" in str(caught.value.__cause__)
        assert not list((hub.store_dir / "incoming").iterdir())
        assert hub.paths("org/a") == sorted(FILES)
        api.upload_file(path_or_fileobj=WEIGHTS[1:], **upload)
        assert hub.read("org/a", "b.safetensors") == WEIGHTS[1:]

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ({"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64}}, "never uploaded"),
            (
                {
                    "key": "file",
                    "value": {"path": "x.safetensors", "content": "MQ==", "encoding": "base64"},
                },
                "must be uploaded",
            ),
            ({"key": "file", "value": {"path": "x"}}, "bad line"),
            ({"key": "unknown", "value": {}}, "bad line"),
        ],
    )
    def test_a_commit_is_refused_as_a_whole(
        self, hub: LoopbackHub, api: HfApi, line: dict[str, Any], says: str
    ) -> None:
        head = hub.head("org/a")
        good = {"path": "y", "content": "MQ==", "encoding": "base64"}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "file", "value": good}, line]
        answer = get_session().post(
            f"{hub.endpoint}/api/models/org/a/commit/main",
            content="\n".join(map(json.dumps, lines)).encode(),
            headers={"Authorization": f"Bearer {WRITE_TOKEN}"},
        )
        assert (answer.status_code, says in answer.text) == (400, True)
        assert hub.head("org/a") == head

    def test_parent_commit(self, hub: LoopbackHub, api: HfApi) -> None:
        old = hub.head("org/a")
        delete = [CommitOperationDelete("sub/")]
        new = api.create_commit("org/a", delete, commit_message="1", parent_commit=old).oid
        assert hub.paths("org/a") == ["README.md", "model.safetensors"]
        with pytest.raises(HfHubHTTPError, match="412"):
            api.create_commit(
                "org/a",
                [CommitOperationDelete("README.md")],
                commit_message="2",
                parent_commit=old,
            )
        with pytest.raises(EntryNotFoundError):
            api.create_commit("org/a", delete, commit_message="3")
        assert hub.head("org/a") == new

    def test_copies_from_a_branch(self, hub: LoopbackHub, api: HfApi) -> None:
        api.create_branch("org/a", branch="work/1")
        api.upload_file(
            repo_id="org/a",
            path_or_fileobj=WEIGHTS[5:],
            path_in_repo="b.safetensors",
            revision="work/1",
        )
        api.upload_file(
            repo_id="org/a", path_or_fileobj=b"{1}", path_in_repo="b.json", revision="work/1"
        )
        assert hub.paths("org/a") == sorted(FILES)
        hub.clear_log()
        copies = [
            CommitOperationCopy(name, f"c/{name}", src_revision="work/1")
            for name in ("b.safetensors", "b.json")
        ]
        api.create_commit("org/a", copies, commit_message="Copy", parent_commit=hub.head("org/a"))
        assert hub.paths("org/a") == sorted([*FILES, "c/b.safetensors", "c/b.json"])
        assert hub.read("org/a", "c/b.safetensors") == WEIGHTS[5:]
        assert hub.read("org/a", "c/b.json") == b"{1}"
        assert (hub.pushed_bytes(), hub.pulled_bytes("*.safetensors")) == (0, 0)
        assert hub.branches("org/a") == ["main", "work/1"]
        api.delete_branch("org/a", branch="work/1")
        assert hub.branches("org/a") == ["main"]
        with pytest.raises(RevisionNotFoundError):
            api.create_branch("org/a", branch="x", revision="work/1")

    def test_pull_requests(self, hub: LoopbackHub, api: HfApi) -> None:
        head = hub.head("org/a")
        info = api.create_commit(
            "org/a", [CommitOperationDelete("README.md")], commit_message="No card", create_pr=True
        )
        assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
        assert hub.head("org/a") == head
        assert hub.paths("org/a", "refs/pr/1") == ["model.safetensors", "sub/config.json"]
        more = {"path_or_fileobj": b"1", "path_in_repo": "x"}
        api.upload_file(repo_id="org/a", revision="refs/pr/1", **more)
        found = list(api.get_repo_discussions("org/a", discussion_type="pull_request"))
        assert [(one.num, one.title, one.status) for one in found] == [(1, "No card", "open")]
        assert api.get_discussion_details("org/a", 1).target_branch == "refs/heads/main"
        api.merge_pull_request("org/a", 1)
        assert hub.paths("org/a") == ["model.safetensors", "sub/config.json", "x"]
        assert not list(api.get_repo_discussions("org/a", discussion_status="open"))
        refs = api.list_repo_refs("org/a", include_pull_requests=True).pull_requests
        assert [ref.ref for ref in refs] == ["refs/pr/1"]

    def test_a_deleted_repository_is_gone(self, hub: LoopbackHub, api: HfApi) -> None:
        api.delete_repo("org/a")
        assert not hub.has_repo("org/a")
        with pytest.raises(RepositoryNotFoundError):
            api.delete_repo("org/a")
        api.create_repo("org/a")
        assert hub.paths("org/a") == [".gitattributes"]
