"""Many tensors, small or huge, in groups of about one size, for a few foreach calls each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kifmerge.tensor.sharding import local_part

# Elements updated in one foreach call: the scratch tensors of a call stay in cache on a CPU, and
# the extra memory of an update does not grow with the model.
CPU_GROUP_NUMEL = 1 << 18
ACCELERATOR_GROUP_NUMEL = 1 << 25

# Tensors of S, U, w and g that are updated together.
Group = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def groups_of(
    sensitivity: Sequence[Tensor],
    uncertainty: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> Iterator[Group]:
    """Bundle small tensors, and cut large ones along their flat view, into groups of one size."""
    group: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    numel = 0
    for s, u, weight, gradient in zip(sensitivity, uncertainty, weights, gradients, strict=True):
        w = local_part(weight)
        g = torch.zeros_like(w) if gradient is None else local_part(gradient)
        limit = CPU_GROUP_NUMEL if w.device.type == "cpu" else ACCELERATOR_GROUP_NUMEL
        for piece in _pieces(s, u, w, g, limit):
            if group and numel + piece[0].numel() > limit:
                yield _columns(group)
                group, numel = [], 0
            group.append(piece)
            numel += piece[0].numel()
    if group:
        yield _columns(group)


def _columns(group: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Group:
    s, u, w, g = zip(*group, strict=True)
    return list(s), list(u), list(w), list(g)


def _pieces(
    s: Tensor, u: Tensor, w: Tensor, g: Tensor, limit: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    if w.numel() <= limit:
        yield s, u, w, g
        return
    flat_w, flat_g = w.detach().reshape(-1), g.detach().reshape(-1)
    flat_s, flat_u = s.view(-1), u.view(-1)
    for start in range(0, flat_w.numel(), limit):
        cut = slice(start, start + limit)
        yield flat_s[cut], flat_u[cut], flat_w[cut], flat_g[cut]


def step_sensitivity(weights: list[Tensor], gradients: list[Tensor], kind: str) -> list[Tensor]:
    """Sensitivity of a group in one step, as new float32 tensors; see ``ImportanceOptions``."""
    if any(tensor.dtype != torch.float32 for tensor in (*weights, *gradients)):
        weights = [weight.float() for weight in weights]
        gradients = [gradient.float() for gradient in gradients]
    scratch: list[Tensor] = list(torch._foreach_mul(weights, gradients))
    if kind == "second":
        torch._foreach_mul_(scratch, scratch)
    elif kind == "mixed":
        halved_squares = torch._foreach_mul(scratch, scratch)
        torch._foreach_mul_(halved_squares, 0.5)
        torch._foreach_sub_(scratch, halved_squares)
    torch._foreach_abs_(scratch)
    return scratch
