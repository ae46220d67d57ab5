"""Files of tensors that several processes hold parts of, written by all of them in parallel.

A tensor is gathered whole, one at a time, and one process writes it, into a file of its own. What
is on the disk afterwards is an ordinary artifact: STEM.safetensors, or shards with their index.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from kifmerge.checkpoint.atomic import whole_file, write_json
from kifmerge.checkpoint.header import TensorInfo, bytes_of, header_of
from kifmerge.checkpoint.ranks import Ranks, shares
from kifmerge.checkpoint.source import FolderSource, index_name, read_whole
from kifmerge.errors import CheckpointError, problem_list

# Of a file: what is smaller is not worth another.
LEAST_FILE_BYTES = 1 << 26
# Elements that are converted, and brought from a device, at a time.
_PIECE_NUMEL = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors that are gathered together, and lie in one file.

    Attributes:
        infos: key -> dtype and shape in the file.
        gather: gives the tensors by key, whole; all processes call it together.
    """

    infos: Mapping[str, TensorInfo]
    gather: Callable[[], Mapping[str, Tensor]]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return sum(info.nbytes for info in self.infos.values())


def write_parts(
    directory: Path,
    stem: str,
    parts: Sequence[Part],
    ranks: Ranks,
    *,
    most_files: int | None = None,
) -> None:
    """Write ``STEM.safetensors``, or shards and their index; all processes call it together.

    Args:
        directory: that all processes see; made if need be.
        stem: of the files.
        parts: in the order in which they are gathered; the same on all processes.
        ranks: the processes.
        most_files: that may be written; None: as many as there are processes.

    Raises:
        CheckpointError: a process could not write; nothing new is under the files' names then.
    """
    total = sum(part.num_bytes for part in parts)
    num_files = min(most_files or ranks.size, ranks.size, total // LEAST_FILE_BYTES, len(parts))
    num_files = max(num_files, 1)
    dealt = shares(list(range(len(parts))), lambda number: parts[number].num_bytes, num_files)
    names = [
        f"{stem}-{number:05d}-of-{num_files:05d}.safetensors" if num_files > 1
        else f"{stem}.safetensors"
        for number in range(1, num_files + 1)
    ]  # fmt: skip
    own = dealt[ranks.rank] if ranks.rank < num_files else []
    own_path = directory / names[ranks.rank] if ranks.rank < num_files else None
    with _own_file(own_path, {k: i for n in own for k, i in parts[n].infos.items()}) as file:
        problem = _write(file, parts, set(own))
        problems = [found for found in ranks.gather(problem) if found]
        if problems:
            raise CheckpointError(problem_list(f"{directory} could not be written", problems))
    ranks.meet()
    if ranks.is_first:
        held = zip(names, dealt, strict=True)
        _finish(directory, stem, {name: [parts[n] for n in numbers] for name, numbers in held})
    ranks.meet()


@contextlib.contextmanager
def _own_file(path: Path | None, infos: Mapping[str, TensorInfo]) -> Iterator[BinaryIO | None]:
    if path is None:
        yield None
        return
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(header_of(infos.items())[0])
        yield file


def _write(file: BinaryIO | None, parts: Sequence[Part], own: set[int]) -> str | None:
    """Gather all parts and write one's own while others are gathered; what went wrong, if it did.

    An error must wait: the other processes count on this one to gather with them.
    """
    problem: str | None = None
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, "kifmerge-write") as pool:
        for number, part in enumerate(parts):
            tensors = part.gather()
            if file is None or number not in own:
                continue
            problem = _outcome(pending) or problem
            pending = None if problem else pool.submit(_write_part, file, part, tensors)
        return _outcome(pending) or problem


def _outcome(pending: Future[None] | None) -> str | None:
    error = None if pending is None else pending.exception()
    return None if error is None else f"{type(error).__name__}: {error}"


def _write_part(file: BinaryIO, part: Part, tensors: Mapping[str, Tensor]) -> None:
    for key, info in part.infos.items():
        write_tensor(file, tensors[key], info)


def write_tensor(file: BinaryIO, tensor: Tensor, info: TensorInfo) -> None:
    """Write the bytes of a tensor in the dtype of a file, a piece at a time."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE_NUMEL):
        piece = flat[start : start + _PIECE_NUMEL].to("cpu", info.dtype)
        file.write(bytes_of(piece))


def _finish(directory: Path, stem: str, files: Mapping[str, Sequence[Part]]) -> None:
    """Take away what an earlier artifact left, and write the index."""
    for left in (*directory.glob(f"{stem}-*-of-*.safetensors"), directory / f"{stem}.safetensors"):
        if left.name not in files:
            left.unlink(missing_ok=True)
    (directory / index_name(stem)).unlink(missing_ok=True)
    if len(files) > 1:
        weight_map = {key: name for name, of in files.items() for part in of for key in part.infos}
        num_bytes = sum(part.num_bytes for of in files.values() for part in of)
        content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_json(directory / index_name(stem), content)


class KeptTensors(Mapping[str, Tensor]):
    """The tensors of STEM.safetensors, or of shards, each read when it is asked for.

    Args:
        directory: of the files.
        stem: of their names.

    Raises:
        CheckpointError: no such files, or damaged ones.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        self._source = FolderSource(directory, stem)
        self._names = self._source.names()

    def without(self, names: Container[str]) -> KeptTensors:
        """The same, but for some."""
        others = copy.copy(self)
        others._names = [name for name in self._names if name not in names]
        return others

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._names:
            raise KeyError(key)
        return read_whole(self._source, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
