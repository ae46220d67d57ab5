"""Checkpoints of the largest published shapes that take no room: true headers, then a hole.

    python tests/large_headers.py WORK llama-3-70b|deepseek-v3|deepseek-v3-fp8 [--models 3]

All that is known from headers alone is as in the published models: names, shapes, dtypes, the
number of files and their sizes. The weights read as zeros, and would fill a disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
_FP8_BLOCK = 128  # rows and columns that share a scale

# Name -> dtype and shape.
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeModel:
    """A model as its files describe it.

    Attributes:
        tensors: in the order of the files.
        num_shards: files.
        config: content of its ``config.json``.
    """

    tensors: Tensors
    num_shards: int
    config: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(map(_num_bytes, self.tensors.values()))

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    def shards(self) -> dict[str, Tensors]:
        """File name -> tensors, in files of about one size."""
        shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(self.num_shards)]
        filled, num_bytes = 0, self.num_bytes
        for name, tensor in self.tensors.items():
            number = filled * self.num_shards // num_bytes
            shards[number][name] = tensor
            filled += _num_bytes(tensor)
        total = self.num_shards
        return {f"model-{n:05d}-of-{total:06d}.safetensors": s for n, s in enumerate(shards, 1)}


def write(directory: Path, model: LargeModel) -> Path:
    """Write a model's folder: index, configuration, and files that are mostly a hole."""
    directory.mkdir(parents=True)
    weight_map = {}
    for file_name, tensors in model.shards().items():
        first = header_bytes(tensors)
        with (directory / file_name).open("wb") as file:
            file.write(first)
            os.truncate(file.fileno(), len(first) + sum(map(_num_bytes, tensors.values())))
        weight_map.update(dict.fromkeys(tensors, file_name))
    index = {"metadata": {"total_size": model.num_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(model.config, indent=2))
    return directory


def header_bytes(tensors: Tensors) -> bytes:
    """The first bytes of a file: those of the widest dtype first, then by name, as writers do."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors, key=lambda n: (-_ITEM_BYTES[tensors[n][0]], n)):
        dtype, shape = tensors[name]
        stop = offset + _num_bytes(tensors[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def llama_3_70b() -> LargeModel:
    """723 tensors, 70.6 billion parameters, 141 GB in 30 files."""
    hidden, wide, key, vocabulary, num_layers = 8192, 28672, 1024, 128256, 80
    layer = {
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
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{f"model.layers.{n}.{k}.weight": s for n in range(num_layers) for k, s in layer.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": num_layers,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocabulary,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000,
        "eos_token_id": 128001,
    }  # fmt: skip
    tensors = {name: ("BF16", shape) for name, shape in shapes.items()}
    return LargeModel(tensors=tensors, num_shards=30, config=config)


def deepseek_v3(*, fp8: bool = False) -> LargeModel:
    """684.5 billion parameters in 163 files, with the layer that predicts a second token.

    Args:
        fp8: as published, 91,991 tensors with the scales of float8 blocks; else 46,183 in bfloat16,
            as it is converted to be trained or merged.
    """
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
        }  # fmt: skip
    tensors = dict(_with_scales(_deepseek_shapes(config)) if fp8 else _plain(config))
    return LargeModel(tensors=tensors, num_shards=163, config=config)


def _plain(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, shape in _deepseek_shapes(config):
        yield name, ("F32" if name.endswith("_bias") else "BF16", shape)


def _with_scales(
    shapes: Iterator[tuple[str, tuple[int, ...]]],
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, shape in shapes:
        if (name.endswith("_proj.weight") and "eh_proj" not in name) or "_with_mqa" in name:
            yield name, ("F8_E4M3", shape)
            blocks = tuple(-(-size // _FP8_BLOCK) for size in shape)
            yield f"{name}_scale_inv", ("F32", blocks)
        else:
            yield name, ("F32" if name.endswith("_bias") else "BF16", shape)


def _deepseek_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    num_layers = config["num_hidden_layers"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(num_layers + config["num_nextn_predict_layers"]):
        start = f"model.layers.{number}"
        for name, shape in _deepseek_layer(config, number):
            yield f"{start}.{name}", shape
        if number >= num_layers:
            yield f"{start}.embed_tokens.weight", (vocabulary, hidden)
            yield f"{start}.enorm.weight", (hidden,)
            yield f"{start}.hnorm.weight", (hidden,)
            yield f"{start}.eh_proj.weight", (hidden, 2 * hidden)
            yield f"{start}.shared_head.norm.weight", (hidden,)
            yield f"{start}.shared_head.head.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _deepseek_layer(
    config: Mapping[str, Any], number: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query_rank, key_rank = config["q_lora_rank"], config["kv_lora_rank"]
    plain, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value = config["v_head_dim"]
    yield "self_attn.q_a_proj.weight", (query_rank, hidden)
    yield "self_attn.q_a_layernorm.weight", (query_rank,)
    yield "self_attn.q_b_proj.weight", (heads * (plain + turned), query_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (key_rank + turned, hidden)
    yield "self_attn.kv_a_layernorm.weight", (key_rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (plain + value), key_rank)
    yield "self_attn.o_proj.weight", (hidden, heads * value)
    if number < config["first_k_dense_replace"]:
        yield from _mlp("mlp", hidden, config["intermediate_size"])
    else:
        wide, num_experts = config["moe_intermediate_size"], config["n_routed_experts"]
        yield "mlp.gate.weight", (num_experts, hidden)
        yield "mlp.gate.e_score_correction_bias", (num_experts,)
        yield from _mlp("mlp.shared_experts", hidden, config["n_shared_experts"] * wide)
        for expert in range(num_experts):
            yield from _mlp(f"mlp.experts.{expert}", hidden, wide)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _mlp(start: str, hidden: int, wide: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{start}.gate_proj.weight", (wide, hidden)
    yield f"{start}.up_proj.weight", (wide, hidden)
    yield f"{start}.down_proj.weight", (hidden, wide)


def _num_bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = tensor
    return _ITEM_BYTES[dtype] * math.prod(shape)


MODELS = {
    "llama-3-70b": llama_3_70b,
    "deepseek-v3": deepseek_v3,
    "deepseek-v3-fp8": lambda: deepseek_v3(fp8=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--models", type=int, default=3)
    arguments = parser.parse_args()
    model = MODELS[arguments.model]()
    for number in range(arguments.models):
        write(arguments.work / f"{arguments.model}-{number}", model)


if __name__ == "__main__":
    main()
