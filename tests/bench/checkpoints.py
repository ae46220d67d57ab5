"""Synthetic checkpoints, masks and score snapshots of any size, made in little memory.

    python tests/bench/checkpoints.py WORK [--size 2.2] [--models 2] [--masks] [--scores bfloat16]

A Llama-shaped base, variants of it with noise on every weight, a random mask for each variant, and
scores. All random, all the same for the same options; what is there already is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process that only measures others must stay small: see processes.py
    from torch import Generator, Tensor

SCORE_DTYPES = ("bfloat16", "float32")
IMPORTANT_FRACTION = 0.2
VOCABULARY = 32000
HEADS = 32

_CHUNK_NUMEL = 1 << 22
_COPIED_BYTES = 1 << 22
_BFLOAT16_BYTES = 2
_INDEXED = "model.safetensors.index.json"
_DTYPE_NAMES = {"bfloat16": "BF16", "float32": "F32"}
TINY = 1_000_000  # bytes of a checkpoint that costs nothing beside starting
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

NamedShapes = list[tuple[str, tuple[int, ...]]]


def parse_bytes(text: str) -> int:
    """500MB as 500,000,000."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, found {text}")
    return int(float(number) * _UNITS[unit])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama of bfloat16 weights of about a size.

    Attributes:
        size_bytes: of the weights; 2.2 GB gives TinyLlama's shape, 1.1 billion parameters.
        largest_bytes: of the embedding and of the head; None for a vocabulary of 32,000.
        shard_bytes: the most that a file holds.
        seed: of all random numbers.
    """

    size_bytes: int = 2_200_000_000
    largest_bytes: int | None = None
    shard_bytes: int = 500_000_000
    seed: int = 0

    @property
    def hidden(self) -> int:
        """As wide as leaves room for some layers."""
        wide = {2048: 1e9, 1024: 2e8, 512: 8e7, 256: 4e7}
        return next((hidden for hidden, least in wide.items() if self.size_bytes >= least), 128)

    @property
    def vocabulary(self) -> int:
        if self.largest_bytes is None:
            return VOCABULARY
        return self.largest_bytes // (_BFLOAT16_BYTES * self.hidden)

    @property
    def num_layers(self) -> int:
        layer = sum(math.prod(shape) for _, shape in self._layer(0)) * _BFLOAT16_BYTES
        outside = 2 * self.vocabulary * self.hidden * _BFLOAT16_BYTES
        return max(1, round((self.size_bytes - outside) / layer))

    @property
    def _intermediate(self) -> int:
        return self.hidden * 11 // 4

    def tensors(self) -> NamedShapes:
        """Names and shapes, in the order of the model."""
        layers = [tensor for number in range(self.num_layers) for tensor in self._layer(number)]
        return [
            ("model.embed_tokens.weight", (self.vocabulary, self.hidden)),
            *layers,
            ("model.norm.weight", (self.hidden,)),
            ("lm_head.weight", (self.vocabulary, self.hidden)),
        ]

    def _layer(self, number: int) -> NamedShapes:
        hidden, key, wide = self.hidden, self.hidden // 8, self._intermediate
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, wide),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (key, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (key, hidden),
        }
        return [(f"model.layers.{number}.{name}.weight", s) for name, s in shapes.items()]

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self._intermediate,
            "num_hidden_layers": self.num_layers, "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // 8, "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "initializer_range": 0.02, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    @property
    def folder(self) -> str:
        """A name that differs where the weights or their files do."""
        largest = max(math.prod(shape) for _, shape in self.tensors()) * _BFLOAT16_BYTES
        sizes = {"llama": self.size_bytes, "largest": largest, "shards": self.shard_bytes}
        words = [f"{word}-{number / 1e6:.0f}MB" for word, number in sizes.items()]
        return "-".join([*words, f"seed-{self.seed}"])


def add_shape_options(parser: argparse.ArgumentParser, size: float = 2.2) -> None:
    """The options that :func:`shape_of` reads."""
    parser.add_argument("--size", type=float, default=size, help="GB of one checkpoint")
    parser.add_argument("--largest-tensor", type=parse_bytes, help="such as 272MB")
    parser.add_argument("--shard-size", type=parse_bytes, default=parse_bytes("500MB"))
    parser.add_argument("--seed", type=int, default=0)


def shape_of(arguments: argparse.Namespace) -> Shape:
    return Shape(
        size_bytes=round(arguments.size * 1e9),
        largest_bytes=arguments.largest_tensor,
        shard_bytes=arguments.shard_size,
        seed=arguments.seed,
    )


@dataclass(frozen=True, slots=True)
class Built:
    """Where the parts of a set lie.

    Attributes:
        base: checkpoint.
        models: its variants.
        masks: of each variant, in the same order.
        scores: snapshots by dtype.
    """

    base: Path
    models: tuple[Path, ...]
    masks: tuple[Path, ...]
    scores: dict[str, Path]


def built(work: Path, shape: Shape, num_models: int) -> Built:
    folder, numbers = work / shape.folder, range(1, num_models + 1)
    return Built(
        folder / "base",
        tuple(folder / f"model-{number}" for number in numbers),
        tuple(folder / f"mask-{number}" for number in numbers),
        {dtype: folder / f"scores-{dtype}" for dtype in SCORE_DTYPES},
    )


def build(work: Path, shape: Shape, num_models: int, *extra: str) -> Built:
    """Make what is not there, in a process of its own; ``extra`` as on the command line."""
    options: dict[str, object] = {
        "--size": shape.size_bytes / 1e9,
        "--seed": shape.seed,
        "--models": num_models,
    }
    options["--shard-size"] = f"{shape.shard_bytes / 1e6}MB"
    if shape.largest_bytes is not None:
        options["--largest-tensor"] = f"{shape.largest_bytes / 1e6}MB"
    flags = [str(text) for option in options.items() for text in option]
    subprocess.run([sys.executable, __file__, str(work), *flags, *extra], check=True)
    return built(work, shape, num_models)


def tiny_shape(seed: int = 0) -> Shape:
    """Of what a merge costs that moves next to nothing."""
    return Shape(size_bytes=TINY, largest_bytes=TINY // 8, seed=seed)


def single_file(checkpoint: Path) -> Path:
    """The checkpoint's file, or a copy of its shards in one, made beside it where it is missing."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    if len(shards) == 1:
        return shards[0]
    folder = checkpoint.with_name(f"{checkpoint.name}-in-one")
    _make(folder, partial(_join, shards))
    return folder / "model.safetensors"


def _join(shards: Sequence[Path], folder: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, offset = [], 0
    for shard in shards:
        with shard.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            tensors = json.loads(file.read(header_bytes))
        tensors.pop("__metadata__", None)
        for name, facts in tensors.items():
            offsets = [offset + place for place in facts["data_offsets"]]
            header[name] = {**facts, "data_offsets": offsets}
        starts.append(8 + header_bytes)
        offset += shard.stat().st_size - starts[-1]
    with (folder / "model.safetensors").open("wb") as joined:
        joined.write(_header_bytes(header))
        for shard, start in zip(shards, starts, strict=True):
            with shard.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, joined, _COPIED_BYTES)


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _build_here(
    work: Path, shape: Shape, num_models: int, *, masks: bool, scores: Sequence[str]
) -> None:
    import torch

    torch.set_num_threads(1)
    paths = built(work, shape, num_models)
    for number, path in enumerate([paths.base, *paths.models] if num_models else ()):
        _make(path, partial(_write_model, shape=shape, number=number))
    for number, path in enumerate(paths.masks if masks else (), 1):
        _make(path, partial(_write_mask, shape=shape, number=number))
    for dtype in scores:
        _make(paths.scores[dtype], partial(_write_scores, shape=shape, dtype=dtype))


def _make(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under another name and rename it, so that one that is there is whole."""
    if path.exists():
        return
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    print(f"making {path}", file=sys.stderr, flush=True)
    write(unfinished)
    unfinished.rename(path)


def _generator(shape: Shape, part: str, name: str) -> Generator:
    import torch

    text = hashlib.sha256(f"{shape.seed}/{part}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(text[:7], "little"))


def _chunk_sizes(numel: int) -> Iterator[int]:
    for start in range(0, numel, _CHUNK_NUMEL):
        yield min(_CHUNK_NUMEL, numel - start)


def _model_chunks(shape: Shape, number: int, name: str, numel: int) -> Iterator[Tensor]:
    """The base is number 0; a variant differs from it by a tenth of a weight's usual size."""
    import torch

    is_norm = name.endswith("norm.weight")
    scale, mean = (0.1, 1.0) if is_norm else (0.02, 0.0)
    drawn, noise = _generator(shape, "base", name), _generator(shape, f"model-{number}", name)
    for size in _chunk_sizes(numel):
        values = torch.randn(size, generator=drawn).mul_(scale).add_(mean).to(torch.bfloat16)
        if number:
            change = torch.randn(size, generator=noise).mul_(0.1 * scale)
            values = change.add_(values).to(torch.bfloat16)
        yield values


def _write_model(folder: Path, shape: Shape, number: int) -> None:
    shards: list[NamedShapes] = [[]]
    filled = 0
    for name, size in shape.tensors():
        num_bytes = math.prod(size) * _BFLOAT16_BYTES
        if shards[-1] and filled + num_bytes > shape.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += num_bytes
    total = len(shards)
    file_names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
    if total == 1:
        file_names = ["model.safetensors"]
    for file_name, tensors in zip(file_names, shards, strict=True):
        write_safetensors(
            folder / file_name,
            tensors,
            "bfloat16",
            partial(_model_chunks, shape, number),
        )
    if total > 1:
        weight_map = {
            name: file_name
            for file_name, tensors in zip(file_names, shards, strict=True)
            for name, _ in tensors
        }
        num_bytes = sum(math.prod(size) for _, size in shape.tensors()) * _BFLOAT16_BYTES
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / _INDEXED).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def _write_mask(folder: Path, shape: Shape, number: int) -> None:
    import torch

    from kifmerge.checkpoint.mask import MaskSink

    sink = MaskSink(folder, shape.tensors(), {"fraction": IMPORTANT_FRACTION, "scope": "global"})
    for name, size in shape.tensors():
        generator, start = _generator(shape, f"mask-{number}", name), 0
        for numel in _chunk_sizes(math.prod(size)):
            drawn = torch.rand(numel, generator=generator)
            sink.add(name, start, drawn < IMPORTANT_FRACTION)
            start += numel
    sink.commit()


def _write_scores(folder: Path, shape: Shape, dtype: str) -> None:
    """|w * g| of normal weights and gradients, each tensor's gradients of a size of their own."""
    import torch

    def chunks(key: str, numel: int) -> Iterator[Tensor]:
        generator = _generator(shape, "scores", key)
        size = 10.0 ** torch.empty(1).uniform_(-7, -4, generator=generator)
        for count in _chunk_sizes(numel):
            weight, gradient = (torch.randn(count, generator=generator) for _ in range(2))
            yield weight.mul_(gradient).abs_().mul_(size).to(getattr(torch, dtype))

    keys = [(f"score/{name}", size) for name, size in shape.tensors()]
    write_safetensors(folder / "importance.safetensors", keys, dtype, chunks)
    details = {"format": "kifmerge.importance", "version": 1, "role": "new"}
    (folder / "importance.json").write_text(json.dumps(details))


def write_safetensors(
    path: Path,
    tensors: NamedShapes,
    dtype: str,
    chunks: Callable[[str, int], Iterator[Tensor]],
) -> None:
    """Write a file from the chunks of each tensor: no tensor is ever whole in memory."""
    import torch

    itemsize = getattr(torch, dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        stop = offset + math.prod(shape) * itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop],
        }  # fmt: skip
        offset = stop
    with path.open("wb") as file:
        file.write(_header_bytes(header))
        for name, shape in tensors:
            for chunk in chunks(name, math.prod(shape)):
                file.write(chunk.view(torch.uint8).numpy().data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--models", type=int, default=2, help="0: no base either")
    parser.add_argument("--masks", action="store_true")
    parser.add_argument("--scores", action="append", choices=SCORE_DTYPES, default=[])
    add_shape_options(parser)
    arguments = parser.parse_args()
    _build_here(
        arguments.work,
        shape_of(arguments),
        arguments.models,
        masks=arguments.masks,
        scores=arguments.scores,
    )


if __name__ == "__main__":
    main()
