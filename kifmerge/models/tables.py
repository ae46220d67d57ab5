"""Rows of tables that the datasets library loads: CSV, Parquet, and repositories on the Hub."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kifmerge.errors import DataError, TryAgainError
from kifmerge.hub.client import Say, hub_api, is_offline, patiently, silent
from kifmerge.hub.reference import SCHEME, Reference

_HUB_PATTERN = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+?))?"
    r"(/(?P<config>[\w.-]+))?:(?P<split>[\w\[\]%:+-]+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Row = dict[str, Any]


def is_on_hub(source: str) -> bool:
    """Whether a source of rows is a repository on the Hub."""
    return source.startswith(SCHEME)


def table_rows(source: str, num_rows: int | None) -> Iterator[tuple[str, Row]]:
    """Places and rows, class numbers turned into their names.

    Args:
        source: .csv or .parquet file, or ``hf://datasets/ORG/NAME[@REVISION][/CONFIG]:SPLIT``.
        num_rows: see :func:`sample`.

    Raises:
        DataError: it cannot be loaded, or is of no such form.
        TryAgainError: the Hub could not be reached.
    """
    import datasets

    table = _loaded(source)
    names = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    chosen = sample(len(table), num_rows)
    for number, row in zip(chosen, table.select(chosen), strict=True):
        named = {c: names[c][v] if c in names and v >= 0 else v for c, v in row.items()}
        yield f"{source} row {number + 1}", named


def sample(num_available: int, num_rows: int | None) -> Sequence[int]:
    """Ascending row numbers of the fixed random sample, or all."""
    if num_rows is None or num_rows >= num_available:
        return range(num_available)
    return sorted(random.Random(0).sample(range(num_available), num_rows))


def pinned_source(source: str, say: Say = silent) -> str:
    """A source on the Hub at the commit that it names now; a file as it is.

    Offline, and where the network fails, that of the rows which the cache holds.

    Raises:
        DataError: of no such form, or it cannot be loaded.
        CheckpointError: no such repository or revision, or no access.
        TryAgainError: network or server failed, and the cache does not help out.
    """
    if not is_on_hub(source):
        return source
    found = _hub_arguments(source)
    reference = Reference(repo_id=found["path"], kind="dataset", revision=found["revision"])
    commit = reference.revision if reference.is_pinned else _commit(source, reference, say)
    if commit is None:
        return source
    config = "" if found["name"] is None else f"/{found['name']}"
    return f"{reference.pinned(commit)}{config}:{found['split']}"


def _commit(source: str, reference: Reference, say: Say) -> str | None:
    if not is_offline():
        look_up = functools.partial(_ask_commit, reference)
        try:
            return patiently(look_up, f"looking up {reference}", say)
        except TryAgainError as error:
            say(f"{error}: taking what the cache holds")
    return _commit_of(_loaded(source))


def _ask_commit(reference: Reference) -> str | None:
    repo_id, revision = reference.repo_id, reference.revision
    return hub_api().repo_info(repo_id, repo_type=reference.kind, revision=revision).sha


def _loaded(source: str) -> Any:
    """A table of the datasets library, of the very commit if the source names one."""
    import datasets

    arguments = _hub_arguments(source) if is_on_hub(source) else _file_arguments(source)
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(**arguments)
    except ConnectionError as error:
        raise TryAgainError(f"{source}: the Hub could not be reached ({error})") from error
    except (datasets.exceptions.DatasetNotFoundError, OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be loaded ({error})") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"{source}: cannot be read ({error.__cause__ or error})") from error
    wanted, found = arguments.get("revision"), _commit_of(table)
    if wanted is not None and found is not None and _COMMIT.fullmatch(wanted) and found != wanted:
        # Without a network the library takes the latest it has, whatever revision was asked for.
        raise TryAgainError(
            f"{source}: the Hub could not be reached, and what the cache holds last is of another "
            f"commit, {found}"
        )
    return table


def _commit_of(table: Any) -> str | None:
    """The commit that a table came from: the library's cache is sorted by it. None if unknown."""
    folders = (Path(file["filename"]).parent.name for file in table.cache_files)
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def _file_arguments(source: str) -> dict[str, Any]:
    return {"path": Path(source).suffix[1:], "data_files": source, "split": "train"}


def _hub_arguments(source: str) -> dict[str, Any]:
    match = _HUB_PATTERN.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source}: expected hf://datasets/ORG/NAME[@REVISION][/CONFIG]:SPLIT, "
            "for example hf://datasets/org/name:train"
        )
    found = match.groupdict()
    return {
        "path": found["name"],
        "name": found["config"],
        "split": found["split"],
        "revision": found["revision"],
    }
