"""Pulling: the files of a folder on the Hub, every one compared with the repository's hash of it.

They go into the standard cache, or straight into a folder of the user's.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from kifmerge.checkpoint.folder import LocalFile
from kifmerge.checkpoint.journal import (
    Journal,
    refuse_full_disk,
    remove_finished,
    resumable_folder,
)
from kifmerge.errors import CheckpointError, DamagedTransferError, TryAgainError
from kifmerge.hub.client import Say, silent
from kifmerge.hub.content import check_content
from kifmerge.hub.download import cached_file, download_checked
from kifmerge.hub.folder import HubFolder, open_hub_folder
from kifmerge.hub.ranges import HubFile, RangeReader
from kifmerge.hub.reference import parse_remote
from kifmerge.hub.stream import BLOCK_BYTES, FileStream
from kifmerge.phases.choosing import HIDDEN, is_pickle, left_out, named

OnProgress = Callable[[int], None]

# The Hub keeps no larger files in git.
_MOST_AT_ONCE_BYTES = 1 << 24


class Pull:
    """Chosen files of a folder on the Hub, at one commit.

    Args:
        reference: of the folder; never a path on this disk.
        patterns: of the files that are wanted; see :func:`kifmerge.phases.choosing.left_out`.
        say: told what is worth knowing.

    Attributes:
        folder: that is pulled.
        left_out: name -> why, of files that are not.
        files: name -> file, of the others.

    Raises:
        CheckpointError: no such folder, no access, pickles only, or patterns that choose nothing.
        TryAgainError: network or server failed.
    """

    def __init__(self, reference: str, *, patterns: Sequence[str] = (), say: Say = silent) -> None:
        self._say = say
        self.folder: HubFolder = open_hub_folder(parse_remote(reference), "stream", say)
        self.left_out = left_out(self.folder, patterns)
        self.files = {n: f for n, f in self.folder.files.items() if n not in self.left_out}
        if not self.files:
            raise CheckpointError(f"{self.folder} holds no files to pull")
        worth_telling = [name for name, why in self.left_out.items() if why != HIDDEN]
        if worth_telling and not patterns:
            say(f"left out, for --file to ask for: {named(worth_telling)}")

    def plan(self) -> dict[str, Any]:
        """What would be pulled, and what is in the cache already, in bytes."""
        cached = {name for name, file in self.files.items() if cached_file(file) is not None}
        return {
            **self._figures(),
            "cached_bytes": _num_bytes(f for name, f in self.files.items() if name in cached),
            "pulled_bytes": _num_bytes(f for name, f in self.files.items() if name not in cached),
            "files": {name: file.size for name, file in self.files.items()},
        }

    def _figures(self) -> dict[str, Any]:
        return {
            "reference": str(self.folder),
            "commit": self.folder.reference.revision,
            "num_files": len(self.files),
            "num_bytes": _num_bytes(self.files.values()),
            "left_out": self.left_out,
        }

    def run(
        self,
        out_dir: Path | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
        on_progress: OnProgress = lambda num_bytes: None,
    ) -> tuple[Path, dict[str, Any], bool]:
        """Pull the files.

        Args:
            out_dir: becomes a folder of these files and no others; None takes the cache.
            overwrite: what it holds may go, once the new folder is whole.
            resume: go on from the files that an interrupted pull has finished.
            on_progress: told how many bytes are there, beside those told before.

        Returns:
            The folder, what was found, and whether anything was pulled: False if all was there.

        Raises:
            RunError: the folder holds something else, or is being made by another process.
            CheckpointError: no access to a file.
            TryAgainError: network or server failed, the disk has no room, or what comes is
                damaged.
        """
        pickles = [name for name in self.files if is_pickle(name)]
        if pickles:
            warning = "may run code when they are loaded: load them only where you trust them"
            warnings.warn(f"pickles, which {warning}: {named(pickles)}", stacklevel=2)
        if out_dir is None:
            directory, is_new = self._into_cache(on_progress)
            return directory, self._figures(), is_new
        if self._is_there(out_dir):
            remove_finished(out_dir)
            return out_dir, self._figures(), False
        work = {
            "command": "pull",
            "reference": str(self.folder),
            "files": [[n, f.size, f.sha256 or f.git_oid] for n, f in self.files.items()],
        }
        with resumable_folder(out_dir, work, resume=resume, overwrite=overwrite) as journal:
            self._fill(journal, on_progress)
        return out_dir, self._figures(), True

    def _into_cache(self, on_progress: OnProgress) -> tuple[Path, bool]:
        before = {name: _state(cached_file(file)) for name, file in self.files.items()}
        missing = [file for name, file in self.files.items() if before[name] is None]
        refuse_full_disk(
            Path(constants.HF_HUB_CACHE) / "models",
            _num_bytes(missing),
            "take --out on another disk",
        )
        paths = {}
        try:
            for name, file in self.files.items():
                paths[name] = download_checked(file, self._say)
                on_progress(file.size)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("finished files are in the cache") from error
        name, path = next(iter(paths.items()))
        self.folder.note_revision(name)
        is_new = any(_state(path) != before[name] for name, path in paths.items())
        return path.parents[name.count("/")], is_new

    def _is_there(self, out_dir: Path) -> bool:
        """Whether a folder holds exactly these files."""
        if not out_dir.is_dir():
            return False
        found = {p.relative_to(out_dir).as_posix(): p for p in out_dir.rglob("*") if p.is_file()}
        sizes = {name: path.stat().st_size for name, path in found.items()}
        if sizes != {name: file.size for name, file in self.files.items()}:
            return False
        try:
            for name, file in self.files.items():
                _check(found[name], file)
        except DamagedTransferError:
            return False
        return True

    def _fill(self, journal: Journal, on_progress: OnProgress) -> None:
        flat = {name: _flat_name(name) for name in self.files}
        left = {n: f for n, f in self.files.items() if flat[n] not in journal.finished}
        journal.refuse_full_disk(file.size for file in left.values())
        on_progress(_num_bytes(f for n, f in self.files.items() if n not in left))
        for name, file in left.items():
            sha256 = self._write(file, journal.directory / flat[name], _Progress(on_progress))
            journal.note({"name": flat[name], "num_bytes": file.size, "sha256": sha256})
        for name in self.files:
            if flat[name] != name:
                (journal.directory / name).parent.mkdir(parents=True, exist_ok=True)
                (journal.directory / flat[name]).rename(journal.directory / name)

    def _write(self, file: HubFile, path: Path, progress: _Progress) -> str:
        """Bring a file to the disk, and once more if it comes damaged; returns its SHA-256."""
        cached = cached_file(file)
        try:
            return _copy(file, cached, path, progress, self._say)
        except DamagedTransferError:
            where = "on the way" if cached is None else "in the cache"
            self._say(f"{file}: damaged {where}, fetching it again")
        try:
            return _copy(file, None, path, progress, self._say)
        except DamagedTransferError as error:
            # The files that are finished have been compared, each by itself: they may stay.
            raise TryAgainError(str(error)) from error


class _Progress:
    """Tells of each byte of a file once, even if it comes again."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._told = 0

    def reach(self, position: int) -> None:
        """All bytes before a position are there."""
        if position > self._told:
            self._on_progress(position - self._told)
            self._told = position


def _copy(file: HubFile, cached: Path | None, path: Path, progress: _Progress, say: Say) -> str:
    """Write a file, from the cache or from the Hub, and check it; returns its SHA-256."""
    read_into = _from_hub(file, say) if cached is None else LocalFile(cached).read_into
    buffer, content = memoryview(bytearray(BLOCK_BYTES)), hashlib.sha256()
    with path.open("wb") as out:
        for start in range(0, file.size, BLOCK_BYTES):
            view = buffer[: min(BLOCK_BYTES, file.size - start)]
            read_into(start, view)
            out.write(view)
            content.update(view)
            progress.reach(start + len(view))
        out.flush()
        os.fsync(out.fileno())
    if file.sha256 != content.hexdigest():
        _check(path, file)
    return content.hexdigest()


def _from_hub(file: HubFile, say: Say) -> Callable[[int, memoryview], None]:
    if file.sha256 is None and file.size <= _MOST_AT_ONCE_BYTES:
        # What is kept in git comes whole: its server need not know ranges.
        content = RangeReader(file, say).read(0, file.size)

        def read_into(offset: int, view: memoryview) -> None:
            view[:] = content[offset : offset + len(view)]

        return read_into
    stream = FileStream(file, say)
    stream.expect([(0, file.size)])
    return stream.read_into


def _check(path: Path, file: HubFile) -> None:
    check_content(path, str(file), file.size, file.sha256, file.git_oid)


def _flat_name(name: str) -> str:
    """A name without folders: those are made when all files are there.

    >>> _flat_name("model.safetensors"), _flat_name("sub/100%.json")
    ('model.safetensors', 'sub%2F100%25.json')
    """
    return name.replace("%", "%25").replace("/", "%2F")


def _state(path: Path | None) -> tuple[int, int] | None:
    """What changes when a file is fetched."""
    if path is None:
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _num_bytes(files: Iterable[HubFile]) -> int:
    return sum(file.size for file in files)
