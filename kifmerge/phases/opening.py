"""Opening a checkpoint to use it: as it says itself, or as its configuration tells.

A checkpoint of ours says in ``kifmerge.json`` what kind of model it is and how it was trained;
of any other the kind is read from its configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from kifmerge.checkpoint.provenance import read_details, read_provenance
from kifmerge.errors import CheckpointError
from kifmerge.phases.model import LoadedModel, ModelOptions, known_labels, load_model, loading

ADAPTER_CONFIG = "adapter_config.json"

_TASK_KINDS = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "classifier"}
_ARCHITECTURE_KINDS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "classifier",
    "MeanPooledClassifier": "classifier",
}


def parted(reference: str, adapter: str | None) -> tuple[str, str | None]:
    """Base and adapter of a reference: a folder that holds an adapter names its base itself.

    Raises:
        CheckpointError: an adapter that names no base, or two adapters.
    """
    config = read_details(Path(reference) / ADAPTER_CONFIG)
    if not config:
        return reference, adapter
    if adapter is not None:
        raise CheckpointError(
            f"{reference} is an adapter itself: expected the base model, found {adapter} to put on "
            "top of it"
        )
    own = read_provenance(Path(reference)).get("model") or {}
    base = own.get("reference") or config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{reference}/{ADAPTER_CONFIG} names no base model: give that as --model and this "
            "folder as --adapter"
        )
    return str(base), reference


def saved_section(reference: str, adapter: str | None) -> dict[str, Any]:
    """The ``model`` section of a recipe that says how to use a checkpoint, as far as it is known.

    Args:
        reference: base or whole model: a folder or Hub name.
        adapter: folder of an adapter on top of it.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
    """
    trained = Path(adapter if adapter is not None else reference)
    if adapter is not None and not (trained / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{adapter} is no adapter: expected a folder with {ADAPTER_CONFIG}")
    section = dict(read_provenance(trained).get("model") or {})
    if not section:
        section = _guessed(reference)
    section.pop("config", None)
    section["reference"] = reference
    section["lora"] = _lora_section(trained) if adapter is not None else None
    return section


def _guessed(reference: str) -> dict[str, Any]:
    own = read_provenance(Path(reference)).get("model") if Path(reference).is_dir() else None
    if own:
        return dict(own)
    with loading(reference):
        config = AutoConfig.from_pretrained(reference)
    for architecture in config.architectures or []:
        for ending, kind in _ARCHITECTURE_KINDS.items():
            if architecture.endswith(ending):
                return {"kind": kind}
    return {}


def _lora_section(adapter: Path) -> dict[str, Any]:
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
        adapter: folder of a trained adapter; without one ``options.lora`` makes a fresh one.
        labels: of a classifier; those that its head does not know yet extend it.
        seed: of whatever is initialised at random: adapter, head.

    Raises:
        CheckpointError: the model or the adapter cannot be loaded.
    """
    reference = options.reference
    assert reference is not None
    checkpoint = Path(adapter) if adapter is not None else None
    if checkpoint is None and options.lora is None and known_labels(Path(reference)):
        checkpoint = Path(reference)
    return load_model(options, labels, seed=seed, checkpoint=checkpoint)
