"""Importance scores as a source: read in slices from a snapshot, or from live accumulators."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kifmerge.checkpoint.folder import Folder, as_folder
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.provenance import check_format, read_details
from kifmerge.checkpoint.snapshot import DETAIL_FILE, FORMAT, TENSOR_FILE, VERSION
from kifmerge.checkpoint.source import FolderSource, Source, peek
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.tensor.importance import Score, score

_KINDS = ("score", "sensitivity", "uncertainty")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Scores:
    """Importance scores, from ``sensitivity/NAME`` and ``uncertainty/NAME``, or ``score/NAME``.

    A source whose names are those of the parameters.

    Args:
        source: of the tensors as a snapshot, or an accumulator, keeps them.
        kind: S*U, or S alone.
    """

    def __init__(self, source: Source, kind: Score) -> None:
        self._source = source
        self._kind = kind
        self._keys: dict[str, tuple[str, ...]] = {}
        for key in source.names():
            what, _, name = key.partition("/")
            if what == "score":
                self._keys[name] = (key,)
            elif what == "sensitivity":
                self._keys.setdefault(name, (key, f"uncertainty/{name}"))

    def names(self) -> Sequence[str]:
        """Names of the parameters, in the order of their files."""
        return tuple(self._keys)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a parameter's scores."""
        return self._source.info(self._find(name)[0])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Scores of a flat part of a parameter."""
        first, *second = self._find(name)
        values = self._source.read(first, start, stop)
        if not second:
            return values
        return score(values, self._source.read(second[0], start, stop), self._kind)

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """The same, out of turn."""
        keys = self._find(name)
        found = [v for key in keys if (v := peek(self._source, key, start, stop)) is not None]
        if len(found) < len(keys):
            return None
        return found[0] if len(keys) == 1 else score(found[0], found[1], self._kind)

    def where(self, name: str) -> str:
        """The file."""
        return self._source.where(self._find(name)[0])

    def fingerprint(self) -> str:
        """Of the tensors that the scores are made of."""
        return self._source.fingerprint()

    @property
    def stored(self) -> Source:
        """The tensors that scores are made of."""
        return self._source

    @property
    def num_bytes(self) -> int:
        """What reading all scores once reads."""
        infos = [self._source.info(key) for keys in self._keys.values() for key in keys]
        return sum(info.nbytes for info in infos)

    def _find(self, name: str) -> tuple[str, ...]:
        try:
            return self._keys[name]
        except KeyError:
            raise CheckpointError(f"no importance score of {name}") from None


def open_scores(directory: Folder | str) -> Scores:
    """Open an importance snapshot, by the score kind that its options recorded.

    Raises:
        CheckpointError: no snapshot there, one of a newer version, or a damaged file.
    """
    directory = as_folder(directory)
    details = read_details(directory / DETAIL_FILE)
    if not details:
        raise CheckpointError(f"{directory} holds no importance snapshot: no {DETAIL_FILE}")
    check_format(details, FORMAT, VERSION, directory / DETAIL_FILE)
    options: Any = details.get("options") or {}
    kind: Score = options.get("score", "product") if isinstance(options, dict) else "product"
    if kind not in typing.get_args(Score):
        raise CheckpointError(f"{directory / DETAIL_FILE}: score: {kind!r} is not known here")
    source = FolderSource(directory, Path(TENSOR_FILE).stem)
    found = {key: source.info(key) for key in source.names()}
    problems = [p for key, info in found.items() for p in _problems(key, info, found)]
    if problems or not found:
        problems = problems or ["expected at least one tensor, found none"]
        raise CheckpointError(problem_list(f"{directory} holds no importance snapshot", problems))
    return Scores(source, kind)


def _problems(key: str, info: TensorInfo, found: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What is wrong with a tensor of a snapshot."""
    what, _, name = key.partition("/")
    if what not in _KINDS or not name:
        yield f"{key}: expected one of {', '.join(f'{kind}/NAME' for kind in _KINDS)}"
    elif info.dtype not in _DTYPES:
        yield f"{key}: expected float32 or bfloat16, found {info}"
    elif what != "score":
        other = f"{'uncertainty' if what == 'sensitivity' else 'sensitivity'}/{name}"
        if other not in found or found[other].shape != info.shape:
            yield f"{other}: expected {list(info.shape)}, found {found.get(other, 'none')}"
