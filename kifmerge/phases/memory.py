"""The replay memory: a small, fixed sample of each finished task.

References:
    Recurrent-KIF, arXiv 2502.17510, keeps 2 % of each task; balanced over labels as in the
    released code, so that 14 labels keep 14 rows even where 2 % is 6.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import whole_file
from kifmerge.errors import RunError
from kifmerge.models.data import DataOptions, Example, as_jsonl, read_examples

MOST_LABELS = 100


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """What the memory keeps of one source: ``num_kept`` of ``num_rows`` rows, drawn by ``seed``."""

    source: str
    num_rows: int
    num_kept: int
    seed: int


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """A memory on disk.

    Attributes:
        path: JSONL file, the parts' rows one part after the other.
        parts: in the order of the sources.
        num_bytes: size of the file.
        is_new: False if the very same rows were there already.
    """

    path: Path
    parts: Sequence[MemoryPart]
    num_bytes: int
    is_new: bool

    @property
    def num_kept(self) -> int:
        """Rows in the file."""
        return sum(part.num_kept for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {
            "out": str(self.path),
            "files": [asdict(part) for part in self.parts],
            "num_rows": sum(part.num_rows for part in self.parts),
            "num_kept": self.num_kept,
            "num_bytes": self.num_bytes,
            "is_new": self.is_new,
        }


def write_memory(
    sources: Sequence[str],
    fraction: float | str,
    out: Path,
    options: DataOptions,
    *,
    seed: int,
    overwrite: bool = False,
) -> MemoryFile:
    """Draw the memory of several tasks, one source each, and write it as one file.

    Args:
        sources: training rows, see :func:`kifmerge.models.data.read_examples`.
        fraction: see :func:`select_memory`.
        out: JSONL file to write.
        options: how the rows of every source are read.
        seed: number k of the sources, from 0, is drawn with ``seed + k``.
        overwrite: another file of this name may go.

    Raises:
        DataError: a source cannot be used.
        RunError: ``out`` holds something else, and is not to be overwritten.
    """
    kept: list[Example] = []
    parts = []
    for number, source in enumerate(sources):
        examples = read_examples(source, options)
        chosen = select_memory(examples, fraction, seed=seed + number)
        kept += chosen
        parts.append(MemoryPart(source, len(examples), len(chosen), seed + number))
    content = as_jsonl(kept).encode()
    is_there = out.is_file() and out.read_bytes() == content
    if not is_there:
        if out.is_dir():
            raise RunError(f"{out} is a folder: expected a file, or nothing yet")
        if out.exists() and not overwrite:
            raise RunError(f"{out} holds other rows: choose another file, or --overwrite it")
        with whole_file(out) as temporary:
            temporary.write_bytes(content)
    return MemoryFile(out, parts, len(content), is_new=not is_there)


def select_memory(
    examples: Sequence[Example], fraction: float | str, *, seed: int
) -> list[Example]:
    """Draw the rows of one task that the memory keeps.

    n = floor(fraction * rows). With at most 100 distinct outputs these are taken as labels:
    max(1, n // labels) rows of each, and the rest at random up to n. With more (free text), n rows
    uniformly.

    Args:
        examples: the task's training rows.
        fraction: share to keep, in [0, 1], taken as the decimal it is written as.
        seed: of the draw.

    Returns:
        The kept rows in their original order; none if the fraction is 0.

    >>> rows = [Example(str(i), "", "text", "ab"[i % 2]) for i in range(100)]
    >>> sorted(e.output for e in select_memory(rows, 0.04, seed=0))
    ['a', 'a', 'b', 'b']
    """
    share = Fraction(str(fraction))
    if not 0 <= share <= 1:
        raise ValueError(f"memory fraction must lie in [0, 1], found {fraction}")
    if share == 0:
        return []
    num_rows = math.floor(share * len(examples))
    generator = random.Random(seed)
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.output, []).append(index)
    chosen: set[int] = set()
    if len(by_label) <= MOST_LABELS:
        per_label = max(1, num_rows // len(by_label))
        for indices in by_label.values():
            chosen.update(generator.sample(indices, min(per_label, len(indices))))
    remaining = sorted(set(range(len(examples))) - chosen)
    missing = max(0, num_rows - len(chosen))
    chosen.update(generator.sample(remaining, missing))
    return [examples[index] for index in sorted(chosen)]
