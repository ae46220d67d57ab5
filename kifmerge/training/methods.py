"""The methods that can learn a sequence of tasks, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kifmerge.training.kif import KifRule
from kifmerge.training.presets import Rule


@dataclass(frozen=True, slots=True)
class Method:
    """How a method treats a new task.

    Attributes:
        memory: ``unused``; ``mixed`` into the training rows; ``outer``: in outer steps; or
            ``after``: once more when the task is fused (KIF-M, a reconstruction).
        rule: how rounds are fused where memory is used in outer steps; None takes the recipe's.
        kif: how the task is fused with all earlier ones when it is learnt; None does not.
        at_once: all tasks together instead of one after the other.
    """

    memory: Literal["unused", "mixed", "outer", "after"]
    rule: Rule | None = None
    kif: KifRule | None = None
    at_once: bool = False

    @property
    def num_shared_stages(self) -> int:
        """Stages that the method takes from the shared start."""
        return 2 if self.kif is None else 1


MethodName = Literal[
    "sequential",
    "replay-mixed",
    "replay-interleaved",
    "recurrent-average",
    "recurrent-kif",
    "recurrent-kif-adaptive",
    "kif",
    "kif-adaptive",
    "kif-m",
    "multitask",
]

METHODS: Mapping[str, Method] = {
    "sequential": Method("unused"),
    "replay-mixed": Method("mixed"),
    "replay-interleaved": Method("outer", "none"),
    "recurrent-average": Method("outer", "average"),
    "recurrent-kif": Method("outer", "recurrent-kif"),
    "recurrent-kif-adaptive": Method("outer", "recurrent-kif-adaptive"),
    "kif": Method("unused", kif="kif"),
    "kif-adaptive": Method("unused", kif="kif-adaptive"),
    "kif-m": Method("after", kif="kif"),
    "multitask": Method("unused", at_once=True),
}
