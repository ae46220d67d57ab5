"""The fusion rules by name: one pure function and one line in a table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kifmerge.phases.presets import RecurrentOptions
from kifmerge.tensor.fusion import add_vectors, recurrent_kif, recurrent_kif_adaptive

# base, task vector of the new task, of the earlier ones, what the rule needs of either side
# (nothing, or two tensors), options -> fused weights. All tensors are flat and of one length.
Fuse = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], RecurrentOptions], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How two task vectors become one update, element by element.

    Attributes:
        needs: what it is shown of each side: ``nothing``, ``masks`` of the important parameters, or
            ``scores`` brought to [0, 1] over the whole model.
        options: names of the options it depends on.
        fuse: the function.
    """

    needs: Literal["nothing", "masks", "scores"]
    options: tuple[str, ...]
    fuse: Fuse


def _recurrent_kif(
    base: Tensor,
    new_vector: Tensor,
    historical_vector: Tensor,
    shown: Sequence[Tensor],
    options: RecurrentOptions,
) -> Tensor:
    new_important, historical_important = shown
    return recurrent_kif(
        base, new_vector, historical_vector, new_important, historical_important,
        shared_weights=options.shared_weights, redundant=options.redundant,
    )  # fmt: skip


def _recurrent_kif_adaptive(
    base: Tensor,
    new_vector: Tensor,
    historical_vector: Tensor,
    shown: Sequence[Tensor],
    options: RecurrentOptions,
) -> Tensor:
    new_score, historical_score = shown
    return recurrent_kif_adaptive(
        base, new_vector, historical_vector, new_score, historical_score,
        temperature=options.temperature,
    )  # fmt: skip


RULES: Mapping[str, Rule] = {
    "recurrent-kif": Rule(
        needs="masks",
        options=("important_fraction", "scope", "shared_weights", "redundant"),
        fuse=_recurrent_kif,
    ),
    "recurrent-kif-adaptive": Rule(
        needs="scores", options=("temperature",), fuse=_recurrent_kif_adaptive
    ),
    "average": Rule(
        needs="nothing",
        options=(),
        fuse=lambda base, new, historical, shown, options: add_vectors(
            base, new, historical, 0.5, 0.5
        ),
    ),
}
