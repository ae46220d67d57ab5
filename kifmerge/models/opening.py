"""Opening a checkpoint to use it: as it says itself, or as its configuration tells.

A checkpoint of ours says in ``kifmerge.json`` what kind of model it is and how it was trained;
of any other the kind is read from its configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kifmerge.checkpoint.folder import Folder, has_file
from kifmerge.checkpoint.provenance import read_details, read_provenance
from kifmerge.checkpoint.source import ADAPTER_CONFIG
from kifmerge.errors import CheckpointError
from kifmerge.hub.client import Say, silent
from kifmerge.models.model import (
    LoadedModel,
    ModelOptions,
    known_labels,
    load_config,
    load_model,
    loading,
)
from kifmerge.models.origin import local_copy, on_hub, opened, pinned
from kifmerge.fusion.tokens import has_tokenizer

_TASK_KINDS = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "classifier"}
_ARCHITECTURE_KINDS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "classifier",
    "MeanPooledClassifier": "classifier",
}


def pinned_parts(reference: str, adapter: str | None, say: Say = silent) -> tuple[str, str | None]:
    """Base and adapter of what a user names, see :func:`parted`: on the Hub, each at a commit.

    Args:
        reference: base, whole model or adapter.
        adapter: on top of it.
        say: told of waits.

    Raises:
        CheckpointError: as parted; or no such repository or revision, or no access.
        TryAgainError: network or server failed.
    """
    adapter = None if adapter is None else pinned(adapter, say)
    base, adapter = parted(pinned(reference, say), adapter)
    return pinned(base, say), adapter


def parted(reference: str, adapter: str | None) -> tuple[str, str | None]:
    """Base and adapter of a reference: a folder that holds an adapter names its base itself.

    Raises:
        CheckpointError: an adapter that names no base, or two adapters.
    """
    folder = opened(reference)
    config = read_details(folder / ADAPTER_CONFIG)
    if not config:
        return reference, adapter
    if adapter is not None:
        raise CheckpointError(
            f"{reference} is an adapter itself: expected the base model, found {adapter} to put on "
            "top of it"
        )
    own = read_provenance(folder).get("model") or {}
    base = own.get("reference") or _named_base(config)
    if not base:
        raise CheckpointError(
            f"{reference}/{ADAPTER_CONFIG} names no base model: give that as --model and this "
            "folder as --adapter"
        )
    return str(base), reference


def _named_base(config: Mapping[str, Any]) -> str | None:
    """The base that an adapter's configuration names, at the revision that it was made for."""
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    on_the_hub = on_hub(base) if base else None
    if on_the_hub is None or not revision:
        return base
    return str(dataclasses.replace(on_the_hub, revision=revision))


def saved_section(reference: str, adapter: str | None) -> dict[str, Any]:
    """The ``model`` section of a recipe that says how to use a checkpoint, as far as it is known.

    Args:
        reference: base or whole model: a folder, or on the Hub.
        adapter: on top of it; likewise.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
    """
    trained = opened(adapter if adapter is not None else reference)
    if adapter is not None and not has_file(trained, ADAPTER_CONFIG):
        raise CheckpointError(f"{adapter} is no adapter: expected a folder with {ADAPTER_CONFIG}")
    section = dict(read_provenance(trained).get("model") or {})
    if not section:
        section = _guessed(reference)
    section.pop("config", None)
    if adapter is None and has_tokenizer(trained):
        # It is the one that the model was made with, which may be gone by now.
        section.pop("tokenizer", None)
    section["reference"] = reference
    section["lora"] = _lora_section(trained) if adapter is not None else None
    return section


def _guessed(reference: str) -> dict[str, Any]:
    own = read_provenance(opened(reference)).get("model")
    if own:
        return dict(own)
    with loading(reference):
        config = load_config(reference)
    for architecture in config.architectures or []:
        for ending, kind in _ARCHITECTURE_KINDS.items():
            if architecture.endswith(ending):
                return {"kind": kind}
    return {}


def _lora_section(adapter: Folder) -> dict[str, Any]:
    config = read_details(adapter / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{adapter}: expected a LoRA adapter, found {kind}")
    return {
        "targets": config["target_modules"],
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
    }


def open_model(
    options: ModelOptions, adapter: str | None = None, labels: Sequence[str] = (), *, seed: int = 0
) -> LoadedModel:
    """Load a model to train, score or evaluate it, with its adapter and head if it has them.

    Args:
        options: with a reference; see :func:`saved_section`.
        adapter: a trained one, in a folder or on the Hub; without one ``options.lora`` makes a
            fresh one.
        labels: of a classifier; those that its head does not know yet extend it.
        seed: of whatever is initialised at random: adapter, head.

    Raises:
        CheckpointError: the model or the adapter cannot be loaded.
    """
    reference = options.reference
    assert reference is not None
    checkpoint = adapter
    if checkpoint is None and options.lora is None and known_labels(opened(reference)):
        checkpoint = reference
    return load_model(options, labels, seed=seed, checkpoint=checkpoint)


def bring(options: ModelOptions, adapter: str | None, say: Say) -> None:
    """Bring all that a model is loaded from here, before anything is begun.

    Args:
        options: with a reference, or of a model from scratch.
        adapter: see :func:`open_model`.
        say: told what is fetched.

    Raises:
        CheckpointError: it cannot be had, or holds no weights to load, or damaged ones.
        TryAgainError: network or server failed, the disk is full, or what came is damaged.
    """
    for name in (options.reference, adapter):
        if on_hub(name) is not None:
            local_copy(str(name), say=say)
    if isinstance(options.tokenizer, str):
        local_copy(options.tokenizer, with_weights=False, say=say)
