"""Where an artifact came from: the command that made it, its options, its parents by digest.

Every artifact of a command is a folder (or a file with a folder's manners) whose JSON holds

    "made_by": {"command": NAME, "options": {...},
                "parents": {ROLE: {"reference": REF, "digest": DIGEST}}}

A reference to the Hub is pinned to a commit: two that are equal name the same bytes.


so that the same command, run again, sees that its work is done; so that an artifact of another
model is refused; and so that a checkpoint can be rebuilt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import write_json
from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.folder import Folder
from kifmerge.errors import CheckpointError, RunError
from kifmerge.hub.folder import HubFolder

PROVENANCE_FILE = "kifmerge.json"
CHECKPOINT_FORMAT = "kifmerge.checkpoint"
VERSION = 1


def made_by(
    command: str,
    options: Mapping[str, Any],
    parents: Mapping[str, Folder | str | None],
    digests: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Describe how an artifact is made, its local parents by the digest of what they hold.

    Args:
        command: name of the command.
        options: all that its result depends on, as plain JSON values.
        parents: role -> folder or file, or None where a role is not filled.
        digests: role -> digest, where it is known already; those of the Hub are not asked for.
    """
    known = digests or {}
    described = {
        role: {
            "reference": str(parent),
            "digest": known[role] if role in known else _local_digest(parent),
        }
        for role, parent in parents.items()
        if parent is not None
    }
    plain: Mapping[str, Any] = json.loads(json.dumps(options))
    return {"command": command, "options": plain, "parents": described}


def is_made(path: Path, detail_file: str, wanted: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether ``path`` already holds what a command is about to make.

    Args:
        path: output folder of the command.
        detail_file: its JSON, written last.
        wanted: result of :func:`made_by`.
        overwrite: something else in the folder may go.

    Raises:
        RunError: the folder holds something else, and is not to be overwritten.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    found = read_details(path / detail_file).get("made_by") if path.is_dir() else None
    if found is not None and is_same(found, wanted):
        return True
    if overwrite:
        return False
    made = f"made by another {found['command']} command" if found else "not of ours"
    raise RunError(
        f"{path} is not empty ({made}): choose another folder, or --overwrite to replace it"
    )


def is_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two artifacts are made alike; a digest that is not known matches any."""
    parents = found.get("parents")
    known = {
        role: {**parent, "digest": parents[role].get("digest")}
        if parent["digest"] is None and isinstance(parents, dict) and role in parents
        else parent
        for role, parent in wanted["parents"].items()
    }
    return {**wanted, "parents": known} == dict(found)


def _local_digest(parent: Folder | str) -> str | None:
    return None if isinstance(parent, HubFolder) else digest(Path(parent))


def refuse_inputs_inside(out_dir: Path, parents: Iterable[Folder | None]) -> None:
    """Refuse an output folder that is one of the inputs, or holds one.

    Raises:
        RunError: naming both.
    """
    for path in parents:
        if isinstance(path, Path) and out_dir.resolve() in (
            path.resolve(),
            *path.resolve().parents,
        ):
            raise RunError(f"{out_dir} holds an input, {path}: choose another folder")


def read_details(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is no such file.

    Raises:
        CheckpointError: not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def read_provenance(directory: Folder) -> dict[str, Any]:
    """Content of a checkpoint's ``kifmerge.json``; empty for a checkpoint that is not ours.

    Raises:
        CheckpointError: damaged, or of a newer version.
    """
    content = read_details(directory / PROVENANCE_FILE)
    if content:
        check_format(content, CHECKPOINT_FORMAT, VERSION, directory / PROVENANCE_FILE)
    return content


def write_provenance(directory: Path, content: Mapping[str, Any]) -> None:
    """Write ``kifmerge.json``, format and version first."""
    header = {"format": CHECKPOINT_FORMAT, "version": VERSION}
    write_json(directory / PROVENANCE_FILE, {**header, **content, **header})


def check_format(content: Mapping[str, Any], name: str, version: int, path: Path) -> None:
    """Refuse JSON of another format or of a newer version.

    Raises:
        CheckpointError: naming what was found and expected.
    """
    if content.get("format") != name or content.get("version") != version:
        raise CheckpointError(
            f"{path}: expected format {name} version {version}, "
            f"found {content.get('format')} version {content.get('version')}"
        )
