"""Which files of a folder on the Hub are pulled, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.source import MODEL_STEM, index_name
from kifmerge.errors import CheckpointError, problem_list
from kifmerge.hub.folder import HubFolder

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.tflite", "*.ot")
_WEIGHTS = "*.safetensors"
_COPIES = "consolidated*.safetensors"
_MOST_NAMED = 3

HIDDEN = "hidden"
_PICKLE = "a pickle, which may run code when it is loaded"


def left_out(folder: HubFolder, patterns: Sequence[str] = ()) -> dict[str, str]:
    """Name -> why, of the files that are not pulled.

    Args:
        folder: that is pulled.
        patterns: of the files that are wanted; a pickle only by one that ends as it does. Without
            any, all but pickles, weights in other formats than safetensors, other copies of the
            weights, and hidden files.

    Raises:
        CheckpointError: weights in pickles only, or a pattern that chooses nothing.
    """
    if patterns:
        return _not_asked_for(folder, patterns)
    found = {name: why for name in folder.files if (why := _of_other_kind(name))}
    found |= dict.fromkeys(_copies(folder), "another copy of the weights")
    pickles = [name for name in folder.files if is_pickle(name)]
    if pickles and not fnmatch.filter(folder.files, _WEIGHTS):
        raise CheckpointError(
            f"{folder}: expected safetensors, found pickles only ({named(pickles)}), which may run "
            "code when they are loaded. Load it with transformers or peft where you trust it, and "
            "save_pretrained(...) it again: that writes safetensors; or name the pickles with "
            "--file"
        )
    return found


def is_pickle(name: str) -> bool:
    """Whether a file is taken for a pickle, by its name.

    >>> is_pickle("pytorch_model.bin"), is_pickle("model.safetensors")
    (True, False)
    """
    return _is_any(name, _PICKLES)


def named(names: Sequence[str]) -> str:
    """The first few names.

    >>> named(["a", "b"]), named(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c and 2 more')
    """
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _of_other_kind(name: str) -> str | None:
    if any(part.startswith(".") for part in name.split("/")):
        return HIDDEN
    if is_pickle(name):
        return _PICKLE
    return "weights in another format" if _is_any(name, _OTHER_WEIGHTS) else None


def _copies(folder: HubFolder) -> list[str]:
    """Weights that lie, under another name, beside those that the index or the name tells of."""
    copies = [name for name in folder.files if fnmatch.fnmatchcase(name, _COPIES)]
    index = index_name(MODEL_STEM)
    if not copies or not {f"{MODEL_STEM}.safetensors", index} & folder.files.keys():
        return []
    weight_map = read_details(folder / index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    return [name for name in copies if name not in shards]


def _not_asked_for(folder: HubFolder, patterns: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in folder.files:
        matching = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        ending = name[name.rfind(".") :]
        if not matching:
            found[name] = "not asked for"
        elif is_pickle(name) and not any(pattern.endswith(ending) for pattern in matching):
            found[name] = _PICKLE
    problems = [
        f"--file {pattern}: {_why_nothing(folder, pattern)}"
        for pattern in patterns
        if not any(fnmatch.fnmatchcase(name, pattern) for name in folder.files if name not in found)
    ]
    if problems:
        raise CheckpointError(problem_list(str(folder), problems))
    return found


def _why_nothing(folder: HubFolder, pattern: str) -> str:
    pickles = [name for name in folder.files if fnmatch.fnmatchcase(name, pattern)]
    if pickles:
        return f"matches pickles only ({named(pickles)}): name them, or end the pattern as they do"
    return f"matches none of its {len(folder.files)} files"


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
