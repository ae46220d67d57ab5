"""The replay memory: a small, fixed sample of each finished task.

References:
    Recurrent-KIF, arXiv 2502.17510, keeps 2 % of each task; balanced over labels as in the
    released code, so that 14 labels keep 14 rows even where 2 % is 6.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

from kifmerge.phases.data import Example

MOST_LABELS = 100


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
