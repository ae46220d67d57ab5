"""Numbers by their bits: 65,536 buckets of as many float32 values each, in the order of values.

The upper 16 bits choose a bucket, the lower 16 bits a value in it. -0.0 is taken for 0.0; numbers
of other types count as the float32 that they are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kifmerge.tensor.native import NUM_BUCKETS, Bits, count_upper_bits, find_within, tally

# Of 0.0; those of negative numbers lie before.
ZERO_BUCKET = NUM_BUCKETS // 2
# Infinity and NaN are in the buckets from here on, where they have no sign.
_MOST_FINITE = ZERO_BUCKET + 0x7F80


def count_buckets(values: Tensor, counts: Tensor) -> Tensor | int:
    """Count how many numbers are in which bucket; returns how many of them are NaN.

    Args:
        values: of any shape.
        counts: int64, NUM_BUCKETS, on the same device: added to.
    """
    num_nan = count_upper_bits(values, counts)
    if num_nan is not None:
        return num_nan
    found = _upper_counts_of_positive(values) if values.device.type == "cpu" else None
    if found is not None:
        counts[ZERO_BUCKET:] += found
        return values.isnan().sum() if found[_MOST_FINITE - ZERO_BUCKET :].any() else 0
    buckets = (_ordered_bits(values) >> 16).add_(ZERO_BUCKET)
    counts += torch.bincount(buckets, minlength=NUM_BUCKETS)
    return values.isnan().sum()


def low_bits(values: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
    """Where in a flat tensor the numbers of a bucket are, and their lower 16 bits as int32.

    >>> low_bits(torch.tensor([2.0, 1.001]), ZERO_BUCKET + 0x3F80)
    (tensor([1]), tensor([8389], dtype=torch.int32))
    """
    if _is_in_order(values, bucket):
        low = bits_of(values) - np.uint32(_first_bits(bucket))
        found = np.flatnonzero(low < NUM_BUCKETS)
        return torch.from_numpy(found), torch.from_numpy(low[found].view(np.int32))
    keys = _ordered_bits(values)
    places = ((keys >> 16) == bucket - ZERO_BUCKET).nonzero()[:, 0]
    return places, keys[places] & 0xFFFF


def add_low_counts(values: Tensor, bucket: int, counts: Tensor) -> None:
    """Count how many numbers of a bucket have which lower 16 bits.

    Args:
        values: of one dimension.
        bucket: of them.
        counts: int64, NUM_BUCKETS, on the same device: added to.
    """
    if not _is_in_order(values, bucket):
        counts += count_low_bits(low_bits(values, bucket)[1])
        return
    bits = bits_of(values)
    room = np.empty(bits.size, np.uint32)
    low, _, _ = find_within(bits, _first_bits(bucket), NUM_BUCKETS, room)
    tally(low, counts)


def count_low_bits(found: Tensor) -> Tensor:
    """How many of some numbers of a bucket have which lower 16 bits, which are given as int32."""
    return torch.bincount(found, minlength=NUM_BUCKETS)


def value_at(bucket: int, low_bits: int) -> float:
    """The number of a bucket with these lower bits.

    >>> value_at(ZERO_BUCKET + 0x3F80, 0), value_at(ZERO_BUCKET - 0x4001, 0xFFFF)
    (1.0, -2.0)
    """
    key = _first_bits(bucket) | low_bits
    return value_of(key if key >= 0 else (key ^ 0x7FFFFFFF) & 0xFFFFFFFF)


def bits_of(values: Tensor) -> Bits:
    """The bits of numbers on a CPU, as the float32 that they are: numpy.uint32, of one shape."""
    return values.detach().float().contiguous().numpy().view(np.uint32)


def value_of(bits: int) -> float:
    """The float32 number of these bits.

    >>> value_of(0x3F800000), value_of(0xC0000000)
    (1.0, -2.0)
    """
    return float(np.uint32(bits).view(np.float32))


def _upper_counts_of_positive(values: Tensor) -> Tensor | None:
    """Half of the buckets, in half the time, where no number has a sign, -0.0 included."""
    if values.dtype == torch.bfloat16:
        upper = values.contiguous().view(torch.int16)
    else:
        upper = values.float().contiguous().view(torch.int32) >> 16
    if not upper.numel() or int(upper.amin()) < 0:
        return None
    return torch.bincount(upper, minlength=ZERO_BUCKET)


def _is_in_order(values: Tensor, bucket: int) -> bool:
    """Whether bits tell at once what is in a bucket: of numbers above 0 they are in order.

    Measured on a CPU: a fifth of the time.
    """
    return values.device.type == "cpu" and bucket > ZERO_BUCKET


def _first_bits(bucket: int) -> int:
    return (bucket - ZERO_BUCKET) << 16


def _ordered_bits(values: Tensor) -> Tensor:
    """int32 keys that order as the float32 values do, with -0.0 equal to 0.0."""
    bits = (values.float() + 0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
