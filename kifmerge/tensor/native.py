"""The compiled part, declared: loops of ``native.c``, built when the package is installed.

Without a C compiler there is none, and torch does the same arithmetic, to the bit, in several
passes. A library that would round otherwise than torch does is not used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kifmerge.tensor.importance import all_finite
from kifmerge.tensor.sums import WeightedSum

Bits = npt.NDArray[np.uint32]

# Types that are read and written as they are stored; others go through float32.
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
# An element's masks are the bits of one byte.
MOST_MODELS = 8
NUM_BUCKETS = 1 << 16

_INT64, _INT32, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
# Of native.c, where it stands as well.
_VERSION = 3
_ARGUMENTS = {
    "kifmerge_weighted_sum": (
        _INT64, _POINTER, ctypes.c_char_p, _INT32, _POINTER, _POINTER, _POINTER, _INT32, _INT32,
        _INT32, _POINTER, _POINTER, _POINTER, _INT32,
    ),
    "kifmerge_sizes": (_INT64, _POINTER, ctypes.c_char_p, _POINTER),
    "kifmerge_within": (
        _INT64, _POINTER, ctypes.c_uint32, ctypes.c_uint32, _POINTER, _POINTER, _POINTER,
    ),
    "kifmerge_tally": (_INT64, _POINTER, _POINTER),
    "kifmerge_upper_counts": (_INT64, _POINTER, _INT32, _POINTER, _POINTER),
    "kifmerge_ties": (
        _INT64, _POINTER, ctypes.c_char_p, _INT32, _POINTER, _POINTER, _POINTER, _FLOAT,
        _FLOAT, _POINTER, _INT32,
    ),
}  # fmt: skip


def is_built() -> bool:
    """Whether the compiled part is there, and rounds as torch does."""
    return _library() is not None


class Summation:
    """A weighted sum that the compiled part, which must be there, makes of piece after piece.

    Args:
        wanted: what is to be added up.
    """

    def __init__(self, wanted: WeightedSum, library: ctypes.CDLL | None = None) -> None:
        found = library or _library()
        assert found is not None
        self._library = found
        self._wanted = wanted
        self._num_terms = len(wanted.pairs)
        index_array = _INT32 * self._num_terms
        self._xs = index_array(*(x for x, _ in wanted.pairs))
        self._ys = index_array(*(y for _, y in wanted.pairs))
        numbers = torch.as_tensor(wanted.weights, dtype=torch.float32, device="cpu")
        self._weights = numbers.contiguous()

    def add_up(
        self, tensors: Sequence[Tensor], masks: Sequence[Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None] | None:
        """Add up in one pass.

        Args:
            tensors: floating-point numbers, on the CPU, in one dimension and of one size.
            masks: bool, one byte for each element; at most MOST_MODELS.
            dtype: of the sum.

        Returns:
            The sum, and how many elements all masks hold, none of them, and each of them alone
            (None without masks); None where NaN or infinity is in the sum, as it is in float32.
        """
        num_weights = self._weights.numel()
        if num_weights != self._num_terms << len(masks) or len(masks) > MOST_MODELS:
            raise ValueError(
                f"{num_weights} weights of {self._num_terms} terms by {len(masks)} masks"
            )
        read, out = _prepared(tensors, dtype)
        numel = out.numel()
        bytes_of_masks = [mask.contiguous() for mask in masks]
        if any(mask.shape != out.shape for mask in bytes_of_masks):
            raise ValueError(f"expected masks of one size, {numel}")
        counts = torch.zeros(len(masks) + 2, dtype=torch.int64, device="cpu") if masks else None
        is_finite = self._library.kifmerge_weighted_sum(
            numel, _addresses(read), _kinds(read), self._num_terms, self._xs, self._ys,
            self._weights.data_ptr(), self._wanted.origin, self._wanted.origin_last,
            len(masks), _addresses(bytes_of_masks), None if counts is None else counts.data_ptr(),
            out.data_ptr(), _KINDS[out.dtype],
        )  # fmt: skip
        return (out.to(dtype), counts) if is_finite else None


def ties(
    starts: Sequence[int],
    weights: Sequence[float],
    scale: float,
    dtype: torch.dtype,
    smallest_kept: Sequence[float],
    tensors: Sequence[Tensor],
) -> Tensor | None:
    """TIES in one pass, by the compiled part, which must be there.

    Args:
        starts: of each model, where its task vector starts: 0 for the base, i for the i-th model.
        weights: of the models, at most MOST_MODELS.
        scale: of the merged task vector.
        dtype: of the result.
        smallest_kept: of each model, the smallest absolute value of its task vector that is kept.
        tensors: base and models; floating-point numbers, on the CPU, in one dimension, of one size.

    Returns:
        What :func:`kifmerge.tensor.baselines.ties` gives, in another dtype; None where NaN or
        infinity is in a task vector, or in the result as it is in float32.
    """
    library = _library()
    assert library is not None
    num_models = len(weights)
    read, out = _prepared(tensors, dtype)
    if not len(starts) == num_models == len(smallest_kept) == len(read) - 1 <= MOST_MODELS:
        raise ValueError(f"{num_models} weights and {len(smallest_kept)} bounds of {len(read) - 1}")
    sizes = [abs(weight) for weight in weights if weight]
    is_finite = library.kifmerge_ties(
        out.numel(), _addresses(read), _kinds(read), num_models, (_INT32 * num_models)(*starts),
        (_FLOAT * num_models)(*smallest_kept), (_FLOAT * num_models)(*weights), scale,
        min(sizes, default=1.0), out.data_ptr(), _KINDS[out.dtype],
    )  # fmt: skip
    return out.to(dtype) if is_finite else None


def sizes_of(model: Tensor, parent: Tensor) -> tuple[Tensor, bool]:
    """Absolute values of a task vector, ``|model - parent|``, in float32, and if all are finite.

    Args:
        model: floating-point numbers of any shape.
        parent: likewise, of the same shape and on the same device.

    >>> sizes_of(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
    (tensor([2., 1.]), True)
    """
    library = _library()
    if library is None or model.device.type != "cpu":
        sizes = (model.float() - parent.float()).abs_()
        return sizes, all_finite([sizes])
    read, out = _prepared([model.reshape(-1), parent.reshape(-1)], torch.float32)
    is_finite = library.kifmerge_sizes(out.numel(), _addresses(read), _kinds(read), out.data_ptr())
    return out.view(model.shape), bool(is_finite)


def count_upper_bits(values: Tensor, counts: Tensor) -> int | None:
    """Count how many numbers have which upper 16 bits, as float32, in the order of values.

    Args:
        values: floating-point numbers of any shape, fewer than 2 ** 32; -0.0 is taken for 0.0.
        counts: int64, NUM_BUCKETS, contiguous: added to.

    Returns:
        How many are NaN; None where nothing is counted, without the compiled part or on another
        device than the CPU.

    >>> counts = torch.zeros(NUM_BUCKETS, dtype=torch.int64)
    >>> num_nan = count_upper_bits(torch.tensor([-0.0, 0.0, 1.0]), counts)
    >>> num_nan is None or counts.nonzero()[:, 0].tolist() == [0x8000, 0x8000 + 0x3F80]
    True
    """
    library = _library()
    if library is None or values.device.type != "cpu":
        return None
    read = _readable(values.detach().reshape(-1))
    room = torch.empty(2 * NUM_BUCKETS, dtype=torch.int32, device="cpu")
    return int(
        library.kifmerge_upper_counts(
            read.numel(), read.data_ptr(), _KINDS[read.dtype], room.data_ptr(), counts.data_ptr()
        )
    )


def tally(places: Bits, counts: Tensor) -> None:
    """Count places: of each there is one counter.

    Args:
        places: one dimension, contiguous; each below the number of counters.
        counts: int64, contiguous, on the CPU: added to.

    >>> counts = torch.zeros(3, dtype=torch.int64)
    >>> tally(np.array([2, 0, 2], np.uint32), counts)
    >>> counts
    tensor([1, 0, 2])
    """
    library = _library()
    if library is None:
        counts += torch.from_numpy(np.bincount(places, minlength=len(counts)))
    else:
        library.kifmerge_tally(places.size, places.ctypes.data, counts.data_ptr())


def find_within(bits: Bits, first: int, width: int, room: Bits) -> tuple[Bits, int, int]:
    """Which numbers lie in a window, by the bits that order them as unsigned integers.

    Args:
        bits: one dimension, contiguous.
        first: smallest number of the window.
        width: how many numbers it holds; ``first + width`` is below 2 ** 32.
        room: for as many numbers, which is written to.

    Returns:
        How far from ``first`` each of those within lies, in their order: the beginning of the
        room; how many lie beyond the window; and the largest of all (0 of none).

    >>> room = np.empty(4, np.uint32)
    >>> places, num_above, largest = find_within(np.array([7, 1, 9, 5], np.uint32), 5, 3, room)
    >>> places.tolist(), num_above, int(largest)
    ([2, 0], 1, 9)
    """
    library = _library()
    if library is None:
        is_within = bits >= np.uint32(first + width)
        num_above = int(np.count_nonzero(is_within))
        # Of numbers below the window they wrap around.
        distances = np.subtract(bits, np.uint32(first), out=room[: bits.size])
        places = distances[np.flatnonzero(np.less(distances, np.uint32(width), out=is_within))]
        return places, num_above, int(bits.max(initial=0))
    above, largest = ctypes.c_int64(), ctypes.c_uint32()
    num_within = library.kifmerge_within(
        bits.size, bits.ctypes.data, first, width, room.ctypes.data,
        ctypes.byref(above), ctypes.byref(largest),
    )  # fmt: skip
    return room[:num_within], above.value, largest.value


def _prepared(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The same numbers as they can be read, and room for as many that become of a dtype."""
    read = [_readable(values) for values in tensors]
    numel = read[0].numel()
    out = torch.empty(numel, dtype=dtype if dtype in _KINDS else torch.float32, device="cpu")
    if any(values.shape != out.shape for values in read):
        raise ValueError(f"expected tensors of one size, {numel}")
    return read, out


def _readable(values: Tensor) -> Tensor:
    return (values if values.dtype in _KINDS else values.float()).contiguous()


def _kinds(tensors: Sequence[Tensor]) -> bytes:
    return bytes(_KINDS[values.dtype] for values in tensors)


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (_POINTER * len(tensors))(*(values.data_ptr() for values in tensors))


@functools.cache
def _library() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            return _opened(path)
    return None


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library, if it can be used; warns if not: torch does its work."""
    try:
        library = ctypes.CDLL(str(path))
        if library.kifmerge_native_version() != _VERSION:
            raise OSError("it was built from another version")
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT64
        if not _rounds_like_torch(library):
            raise OSError("it rounds otherwise than torch")
    except (OSError, AttributeError) as error:
        warnings.warn(f"{path} is not used, and fusing takes longer: {error}", stacklevel=4)
        return None
    return library


def _rounds_like_torch(library: ctypes.CDLL) -> bool:
    """Whether both give the same bits for numbers that tell fused or flushed operations apart."""
    numel = 4099  # whole blocks, and a rest
    rng = np.random.default_rng(0)
    scales = np.resize(np.array([1.0, 1e-3, 1e-38, 1e30], np.float32), numel)
    numbers = (rng.standard_normal(numel, np.float32) * scales for _ in range(3))
    x, y, z = map(torch.from_numpy, numbers)
    z = z.bfloat16()
    expected = (x - z.float()).mul_(0.3).add_(y).add_((y - x).mul_(0.7))
    wanted = WeightedSum(pairs=((0, 2), (1, 0)), weights=(0.3, 0.7), origin=1)
    summation = Summation(wanted, library)
    return all(
        found is not None and torch.equal(found[0].view(bits), expected.to(dtype).view(bits))
        for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16))
        for found in [summation.add_up((x, y, z), (), dtype)]
    )
