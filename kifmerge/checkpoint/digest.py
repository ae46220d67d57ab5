"""What weights are, in one number: a digest of content, whatever the shards they lie in.

Each tensor has its XXH3-128, fast enough to take while tensors are read for something else; a
folder has the SHA-256 over the sorted lines "STEM/NAME DTYPE SHAPE DIGEST" of its tensors. It finds
what changed by accident, a bit in a shard or another training; it is no proof against forgery.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import xxhash

from kifmerge.checkpoint.folder import File, Folder, file_sizes, is_folder, open_file
from kifmerge.checkpoint.header import PlacedTensor, TensorInfo, read_header

BLOCK_BYTES = 1 << 20
# Parts that come before their turn are kept as long as they are few.
MOST_PENDING_BYTES = 1 << 26
CHECKPOINT_STEMS = ("adapter_model", "model")
_WHOLE_FILES = ("*.jsonl", "units.json")
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")


class TensorDigests:
    """Digests of tensors, taken while their parts are read, in about the order of their elements.

    Safe to feed from threads. A tensor whose parts came in no order, or not all, has none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, _RunningDigest] = {}
        self._finished: dict[str, str] = {}

    def feed(self, name: str, info: TensorInfo, start: int, content: memoryview) -> None:
        """Take in the bytes of a tensor from ``start`` on; what was taken in before is left out."""
        with self._lock:
            if name in self._finished:
                return
            running = self._running.get(name)
            if running is None:
                running = self._running[name] = _RunningDigest()
            running.feed(start, content)
            if running.position == info.nbytes:
                self._finished[name] = self._running.pop(name).hash.hexdigest()

    def know(self, digests: Mapping[str, str]) -> None:
        """Take over digests that are known from elsewhere."""
        with self._lock:
            self._finished.update(digests)

    def finished(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Name -> digest of those tensors, or of all, that came whole."""
        with self._lock:
            wanted = self._finished if names is None else names
            return {name: self._finished[name] for name in wanted if name in self._finished}


class _RunningDigest:
    """The digest of a tensor's bytes up to a position, and parts from beyond it."""

    def __init__(self) -> None:
        self.hash = xxhash.xxh3_128()
        self.position = 0
        self._pending: dict[int, memoryview] = {}
        self._pending_bytes = 0

    def feed(self, start: int, content: memoryview) -> None:
        if start > self.position:
            if self._pending_bytes + len(content) <= MOST_PENDING_BYTES:
                self._pending[start] = content
                self._pending_bytes += len(content)
            return
        if start < self.position or not len(content):
            return
        self._take(content)
        while (following := self._pending.pop(self.position, None)) is not None:
            self._pending_bytes -= len(following)
            self._take(following)

    def _take(self, content: memoryview) -> None:
        self.hash.update(content)
        self.position += len(content)


def digest(path: Folder, known: Mapping[str, str] | None = None) -> str | None:
    """SHA-256 of what a folder's tensors, memory rows and skill units are, or of one file.

    None if there is nothing of it.

    Args:
        path: folder, or file on this disk.
        known: ``FILE/NAME`` -> digest of tensors that need not be read again.

    Raises:
        CheckpointError: a safetensors file that is damaged.
    """
    if isinstance(path, Path) and path.is_file():
        return file_sha256(path)
    if not is_folder(path):
        return None
    names = list(file_sizes(path))
    whole = [name for pattern in _WHOLE_FILES for name in fnmatch.filter(names, pattern)]
    lines = [f"{name} {file_sha256(path / name)}" for name in whole]
    for file_name in _weight_files(names):
        stem, file = stem_of(file_name), open_file(path, file_name)
        lines += [
            f"{stem}/{name} {tensor.info} "
            + ((known or {}).get(f"{file_name}/{name}") or _tensor_digest(file, tensor))
            for name, tensor in read_header(file).items()
        ]
    if not lines:
        return None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _weight_files(names: Sequence[str]) -> list[str]:
    """Of a checkpoint its weights, and not other copies of them that lie beside; else all."""
    files = fnmatch.filter(names, "*.safetensors")
    for stem in CHECKPOINT_STEMS:
        found = [name for name in files if stem_of(name) == stem]
        if found:
            return found
    return files


def stem_of(file_name: str) -> str:
    """What an artifact's safetensors files are named after, without the number of a shard.

    >>> stem_of("model-00001-of-00003.safetensors"), stem_of("mask.safetensors")
    ('model', 'mask')
    """
    return _SHARD_NUMBER.sub("", file_name.removesuffix(".safetensors"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as it is."""
    content = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            content.update(block)
    return content.hexdigest()


def _tensor_digest(file: File, tensor: PlacedTensor) -> str:
    content = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    stop = tensor.offset + tensor.info.nbytes
    file.expect([(tensor.offset, stop)])
    for offset in range(tensor.offset, stop, BLOCK_BYTES):
        block = buffer[: min(stop - offset, BLOCK_BYTES)]
        file.read_into(offset, block)
        content.update(block)
    return content.hexdigest()
