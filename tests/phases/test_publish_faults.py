"""Pushes on which anything may go wrong: the branch holds the old model or the new one, whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import folders
import pytest
from loopback import Fault, LoopbackHub

from kifmerge.errors import CheckpointError, TryAgainError
from kifmerge.hub import client
from kifmerge.hub.target import Target
from kifmerge.phases.publish import Publication, PublishOptions

REPO = "org/made"
KINDS = (
    "create", "info", "tree", "branch", "paths-info", "discussions", "resolve", "preupload",
    "batch", "put", "verify", "yaml", "commit",
)  # fmt: skip
MOST_RUNS = 5


def any_fault(draw: random.Random) -> Fault:
    kind = draw.choice(KINDS)
    acts: list[dict[str, Any]] = [
        {"status": draw.choice((429, 500, 503))},
        {"status": 500, "after_act": True},
        {"reset": True},
        {"reset": True, "after_act": True},
        {"truncate_at": draw.randrange(1, 60)},
        {"status": draw.choice((400, 403, 404))},
    ]
    if kind == "put":
        acts += [{"reset_at": 300}, {"corrupt_at": 300}, {"expire": True}]
    act = draw.choice(acts)
    return Fault(kind=kind, skip=draw.randrange(3), times=draw.choice((1, 1, 2)), **act)


def schedule(seed: int, hub: LoopbackHub, tmp_path: Path) -> None:
    """Push a second model over a first one, with faults, until it is there."""
    draw = random.Random(seed)
    branch, pull_request = draw.choice((None, "v1")), draw.random() < 0.3
    target = Target(repo_id=REPO, branch=branch)
    files: list[dict[str, bytes]] = []
    for number, num_shards in enumerate((3, 2)):
        made = folders.save(
            tmp_path / str(number), folders.random_tensors(number), num_shards=num_shards
        )
        (made / "README.md").write_text(f"# Model {number}\n")
        files.append({path.name: path.read_bytes() for path in made.iterdir()})
    old, new = files
    is_first = draw.random() < 0.3
    if is_first:
        old = {}
    else:
        hub.add_repo(REPO, {**old, ".gitattributes": b""}, branch="main")
    publication = Publication(tmp_path / "1", target, PublishOptions(pull_request=pull_request))
    for _ in range(draw.randrange(1, 4)):
        hub.fail(any_fault(draw))
    for run in range(MOST_RUNS):
        if run == MOST_RUNS - 1:
            hub.mend()
        try:
            figures, _ = publication.run()
        except (CheckpointError, TryAgainError) as error:
            num_lines = len(str(error).splitlines())
            assert num_lines == 1
            if hub.has_repo(REPO):
                for name in hub.branches(REPO):
                    assert held(hub, name) in (old, new)
            continue
        break
    else:
        raise AssertionError("it never came about")
    assert held(hub, figures["commit"]) == new
    tip = branch or "main"
    assert held(hub, tip) == (old if pull_request else new)
    assert len(hub.commits(REPO, figures["commit"])) == 2
    acted = [
        row
        for row in hub.log
        if row.kind == "commit" and (row.status == 200 or "after act" in str(row.fault))
    ]
    assert len(acted) == 1


def held(hub: LoopbackHub, revision: str) -> dict[str, bytes]:
    paths = (path for path in hub.paths(REPO, revision) if path != ".gitattributes")
    return {path: hub.read(REPO, path, revision) for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_any_schedule_of_faults(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_SECONDS", 0.01)
    schedule(seed, hub, tmp_path)
