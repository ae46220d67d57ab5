"""References: what is on this disk, what is on the Hub, and what is neither."""

from pathlib import Path

import pytest

from kifmerge.errors import CheckpointError
from kifmerge.hub.reference import Reference, parse_reference, parse_remote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def reference(repo_id="org/name", **more):
    return Reference(repo_id=repo_id, **more)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", reference()),
        ("org/name@v1.0", reference(revision="v1.0")),
        (f"org/name@{COMMIT}", reference(revision=COMMIT)),
        ("org/name@refs/pr/12", reference(revision="refs/pr/12")),
        ("org/name@feature/x", reference(revision="feature/x")),
        ("A-1/b_c.d-e", reference("A-1/b_c.d-e")),
        ("hf://org/name", reference()),
        ("hf://models/org/name", reference()),
        ("hf://org/name/", reference()),
        ("hf://org/name@v1/sub/folder/", reference(revision="v1", folder="sub/folder")),
        ("hf://org/name/sub", reference(folder="sub")),
        ("hf://org/name@refs/pr/12/sub", reference(revision="refs/pr/12", folder="sub")),
        ("hf://org/name@refs%2Fpr%2F12/sub", reference(revision="refs/pr/12", folder="sub")),
        ("hf://org/name@feature%2Fx/sub", reference(revision="feature/x", folder="sub")),
        ("hf://datasets/org/name@v1", reference(kind="dataset", revision="v1")),
        ("hf://datasets/org/name/sub", reference(kind="dataset", folder="sub")),
    ],
)
def test_a_reference_is_what_it_says(text, expected):
    assert parse_reference(text) == parse_remote(text) == expected
    # What is recorded means the same.
    assert parse_remote(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://org", "hf://org/name@", "hf://org/name//sub", "hf://org/name/../other",
        "hf://org/name/./sub", "hf://org/name@v1@v2", "hf://org/name@../../x", "hf://org/na--me",
        "hf://org/name@a..b", "hf://org/name.git", "hf://spaces/org/name", "hf://org/name/a\\b",
        "hf://-org/name", "hf://org/name@v 1", "hf:///etc/passwd",
    ],
)  # fmt: skip
def test_what_only_looks_like_one_is_refused(text):
    for parse in (parse_reference, parse_remote):
        with pytest.raises(CheckpointError) as caught:
            parse(text)
        assert str(caught.value).startswith(f"{text}: expected ORG/NAME")


@pytest.mark.parametrize(
    "text",
    [
        "name", "a/b/c", "./a/b", "../b", "/a/b", "a/b/", "~/a", ".a/b", "org/name@../../x",
        "org/na--me", "a" * 300, "a/" + "b" * 300,
    ],
)  # fmt: skip
def test_all_else_is_a_path(text):
    assert parse_reference(text) == Path(text)
    with pytest.raises(CheckpointError, match="expected ORG/NAME"):
        parse_remote(text)


def test_what_is_on_this_disk_comes_first(tmp_path, monkeypatch):
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_reference("org/name") == Path("org/name")
    assert parse_reference("hf://org/name") == parse_remote("org/name") == reference()
    assert parse_reference(Path("other/name")) == Path("other/name")


def test_pinned():
    found = reference(revision="v1", folder="sub", kind="dataset")
    assert not found.is_pinned
    pinned = found.pinned(COMMIT)
    assert pinned.is_pinned
    assert str(pinned) == f"hf://datasets/org/name@{COMMIT}/sub"
    assert pinned.path("config.json") == "sub/config.json"
    assert reference().path("config.json") == "config.json"
