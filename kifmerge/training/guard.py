"""Gradients that are not finite: a step with one is left out whole, or ends the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import nn

from kifmerge.errors import TrainingError
from kifmerge.tensor.importance import all_finite
from kifmerge.tensor.sharding import local_part, true_everywhere
from kifmerge.training.threads import training_workers


class GradientGuard:
    """Lets a step pass only if all its gradients are finite.

    Attributes:
        num_skipped: steps left out so far.
    """

    def __init__(self, nonfinite: Literal["skip", "raise"]) -> None:
        self.num_skipped = 0
        self._nonfinite = nonfinite

    def admits(self, parameters: Mapping[str, nn.Parameter], step: str, *, scaled: bool) -> bool:
        """Whether the optimizer step to come may be made.

        If not, all gradients are taken away, so that the step changes nothing at all.

        Args:
            parameters: with their clipped gradients.
            step: what to call the step in an error.
            scaled: under a gradient scaler, whose search for a scale makes gradients overflow at
                times: such steps are skipped even under ``raise``.

        Raises:
            TrainingError: under ``raise``, naming the parameters concerned.
        """
        if _all_finite(parameters.values()):
            return True
        if self._nonfinite == "raise" and not scaled:
            raise nonfinite_error(parameters, step)
        self.num_skipped += 1
        for parameter in parameters.values():
            parameter.grad = None
        return False


def _all_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all gradients are finite, on all processes that hold parts of them."""
    parameters = list(parameters)
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    with training_workers(gradients) as workers:
        num_shares = max(workers.num, 1)
        shares = [gradients[start::num_shares] for start in range(num_shares)]
        own = all(list(workers.map(all_finite, shares)))
    return true_everywhere(own, parameters)


def nonfinite_error(parameters: Mapping[str, nn.Parameter], step: str) -> TrainingError:
    """The error for a step with non-finite gradients, naming the first parameters concerned."""
    bad = [name for name, parameter in parameters.items() if not _all_finite([parameter])]
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    if len(bad) == len(parameters):
        shown = "every parameter (clipping spreads a NaN from one to all)"
    return TrainingError(
        f"the gradient of {step} is not finite, in {shown}. "
        "Lower the learning rate, or let such steps be left out with nonfinite: skip"
    )
