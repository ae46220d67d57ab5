"""What lies beside the weights of a checkpoint: configuration, tokenizer, templates, code."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kifmerge.checkpoint.atomic import write_json
from kifmerge.checkpoint.folder import Folder, file_sizes
from kifmerge.checkpoint.provenance import PROVENANCE_FILE, read_details

# Not part of what a checkpoint's users load beside its weights: the weights themselves, in any
# format, their indexes, what trainers keep, and descriptions of the checkpoint they lie beside.
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf",
    "*.index.json", "trainer_state.json", "importance.json", "mask.json", "units.json", "README.md",
    "recurrent.json", PROVENANCE_FILE, ".*",
)  # fmt: skip
_COPIED_FOLDERS = ("additional_chat_templates",)


def copy_companions(folder: Folder, directory: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: config, tokenizer, templates, code."""
    names = [
        *(f"{inner}/{name}" for inner in _COPIED_FOLDERS for name in file_sizes(folder, inner)),
        *(n for n in file_sizes(folder) if not any(fnmatch.fnmatch(n, p) for p in _NOT_COPIED)),
    ]
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, directory / name)


def tell_dtype(config_path: Path, dtype: str) -> None:
    """Have a configuration say which dtype the weights have: transformers loads them in that."""

    def told(config: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(config)
        for key, value in config.items():
            if key in ("dtype", "torch_dtype") and isinstance(value, str):
                changed[key] = dtype
            elif key.endswith("_config") and isinstance(value, dict):
                changed[key] = told(value)
        return changed

    config = read_details(config_path)
    if config:
        write_json(config_path, told(config))
