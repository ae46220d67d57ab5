"""Gradients taken in while the backward pass makes them, each freed before the next one comes.

The gradients of a whole model are as large as the model. Taken in by a hook, parameter by
parameter, from the loss on downwards, they never exist all at once, and the memory of a
measurement is that of the model and of the accumulators.

The price: when a gradient that is not finite turns up, the parameters before it have been taken in,
and floating-point sums cannot be undone. :func:`take_in` keeps the promise of "all parameters alike
or none" in another way. It leaves that batch out and begins anew, and from then on a batch that was
not seen yet goes through a backward pass that takes nothing in first. A measurement with such
batches costs about twice the time, however many they are, and no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn

from kifmerge.errors import TrainingError
from kifmerge.tensor.importance import Sensitivity, largest_sensitivity


class Accumulator(Protocol):
    """Takes in one gradient at a time."""

    def begin(self) -> None:
        """Begin a batch."""
        ...

    def take(self, name: str, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Take in one parameter's part of the batch; returns its largest sensitivity."""
        ...

    def reset(self) -> None:
        """Forget all batches."""
        ...


class GradientIntake:
    """Hooks that take each gradient of some parameters in, and free it at once.

    A context: the hooks are there while it is entered, and no gradient is left afterwards.

    Args:
        parameters: by name; no other parameter of the model should require a gradient.
        accumulator: of the same names.
        sensitivity: by which :meth:`check` judges.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        accumulator: Accumulator,
        sensitivity: Sensitivity,
    ) -> None:
        self.accumulator = accumulator
        self._parameters = parameters
        self._sensitivity = sensitivity
        self._takes = True
        # Largest sensitivities, left on their devices until the batch is whole: reading one waits
        # for all the work before it.
        self._largest: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GradientIntake:
        self._free()
        for name, parameter in self._parameters.items():
            hook = functools.partial(self._on_gradient, name)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._free()

    def take(self, loss: Tensor) -> list[str]:
        """Take in the gradients of a batch; a parameter that the loss does not reach has none.

        Returns:
            Parameters whose gradient is not finite. If there is one the accumulators are spoilt.

        Raises:
            TrainingError: the loss reaches no parameter, or one gradient comes in parts.
        """
        self.accumulator.begin()
        self._backward(loss, takes=True)
        for name, parameter in self._parameters.items():
            if name not in self._largest:
                self.accumulator.take(name, parameter, None)
        return self._not_finite()

    def check(self, loss: Tensor) -> list[str]:
        """As :meth:`take`, but nothing is taken in."""
        self._backward(loss, takes=False)
        return self._not_finite()

    def _backward(self, loss: Tensor, *, takes: bool) -> None:
        self._takes = takes
        self._largest.clear()
        if loss.requires_grad:
            loss.backward()
        if not self._largest:
            raise TrainingError(
                "the loss depends on none of the parameters to be measured: no gradient came"
            )

    def _on_gradient(self, name: str, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if name in self._largest:
            raise TrainingError(
                f"the gradient of {name} comes in several parts, as under re-entrant gradient "
                "checkpointing: importance needs it whole"
            )
        if self._takes:
            self._largest[name] = self.accumulator.take(name, parameter, gradient)
        else:
            self._largest[name] = largest_sensitivity(parameter, gradient, self._sensitivity)

    def _not_finite(self) -> list[str]:
        """Look at what the hooks left, one device at a time."""
        names: dict[torch.device, list[str]] = {}
        for name, value in self._largest.items():
            names.setdefault(value.device, []).append(name)
        bad = set()
        for group in names.values():
            finite = torch.stack([self._largest[name] for name in group]).isfinite().tolist()
            bad |= {name for name, is_finite in zip(group, finite, strict=True) if not is_finite}
        return [name for name in self._parameters if name in bad]

    def _free(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def take_in(
    num_batches: int,
    loss_of: Callable[[int], Tensor],
    intake: GradientIntake,
    *,
    on_batch: Callable[[int], None] = lambda number: None,
    on_fault: Callable[[int, str, bool], None] = lambda number, fault, begins_anew: None,
) -> list[int]:
    """Take in batches, all parameters alike; one whose loss or gradient is not finite not at all.

    Args:
        num_batches: how many there are.
        loss_of: loss of a batch, by its number from 0. Asked for the same batch again it gives the
            same: no dropout.
        intake: entered.
        on_batch: told the number of each batch once, when it is known whether it can be used.
        on_fault: told the number of a batch that cannot, why, and whether all begins anew because
            some of it had been taken in. May raise.

    Returns:
        Numbers of the batches that were left out.
    """
    judged = _Judged(num_batches, loss_of, intake, on_batch, on_fault)
    while not judged.taken_in():
        intake.accumulator.reset()
    return [number for number, is_good in judged.is_good.items() if not is_good]


class _Judged:
    """What is known of the batches so far."""

    def __init__(
        self,
        num_batches: int,
        loss_of: Callable[[int], Tensor],
        intake: GradientIntake,
        on_batch: Callable[[int], None],
        on_fault: Callable[[int, str, bool], None],
    ) -> None:
        self.is_good: dict[int, bool] = {}
        self._num_batches = num_batches
        self._loss_of = loss_of
        self._intake = intake
        self._on_batch = on_batch
        self._on_fault = on_fault
        self._checks_first = False

    def taken_in(self) -> bool:
        """Take in all batches that are not known to be bad; False if one turned out to spoil it."""
        for number in range(self._num_batches):
            if self._checks_first and number not in self.is_good:
                self._judge(number, takes=False)
            if self.is_good.get(number, True) and self._judge(number, takes=True):
                self._checks_first = True
                return False
        return True

    def _judge(self, number: int, *, takes: bool) -> bool:
        """Take a batch in, or check it; True if it spoilt what was taken in before."""
        loss, names = self._loss_of(number), []
        if has_finite_loss := bool(loss.isfinite()):
            names = self._intake.take(loss) if takes else self._intake.check(loss)
        spoils = takes and bool(names)
        is_new = number not in self.is_good
        self.is_good[number] = has_finite_loss and not names
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self._on_fault(number, f"w*g is not finite in {', '.join(names[:3])}{more}", spoils)
        elif not has_finite_loss:
            self._on_fault(number, f"its loss is {loss.item():g}", False)
        if is_new:
            self._on_batch(number)
        return spoils
