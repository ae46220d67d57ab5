"""Whether checkpoints mean the same: what differs is listed, and refused or allowed by name.

Two models of one shape always merge into a third one. It is nonsense when row 17 of the embeddings
is another word in each, or when one turns its queries by other angles; nothing later would tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kifmerge.checkpoint.folder import Folder, is_folder
from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import MOST_PROBLEMS_SHOWN, CheckpointError, problem_list
from kifmerge.fusion.agreement import Checkpoint
from kifmerge.fusion.config import config_differences, label_names, meant
from kifmerge.fusion.tokens import (
    chat_templates,
    has_tokenizer,
    template_differences,
    tokenizer_differences,
)

Difference = Literal[
    "config", "labels", "vocab", "tokenizer", "chat-template", "adapter", "adapter-base", "dtype"
]

# What allowing a difference means.
MEANINGS: Mapping[Difference, str] = {
    "config": "all weights are read by the config.json that the output gets",
    "labels": "outputs of classifiers are mixed by number, whatever they are called",
    "vocab": "rows of the embeddings are mixed by number, whatever tokens they stand for",
    "tokenizer": "text is cut into the same tokens by the tokenizer that the output gets",
    "chat-template": "chats are written by the template that the output gets",
    "adapter": "all factors are scaled and placed by the settings that the output gets",
    "adapter-base": "the base models that the adapters name are one and the same",
    "dtype": "all are computed with as float32, and written in the dtypes that the output gets",
}

# What an adapter's configuration says of its training, or of the software that wrote it.
_ADAPTER_HISTORY = (
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_dropout", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config", "task_type",
)  # fmt: skip
_ADAPTER_BASE = "base_model_name_or_path"
# Weights that are one with the embeddings where a model ties them, by the end of their names.
_TIED = (
    "lm_head.weight", "embed_out.weight", "output_projection.weight", "shared.weight",
    "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.decoder.weight",
    "lm_head.decoder.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Found:
    """A difference: its name, None for one that cannot be allowed, and both sides in words."""

    kind: Difference | None
    text: str


def check_meaning(checkpoints: Sequence[Checkpoint], allowed: Collection[Difference] = ()) -> None:
    """Refuse checkpoints that do not mean the same.

    Each is compared with the first, or where the first says nothing, as without a tokenizer, with
    the first that does. What only one of two says is no difference: adapters and bare tensors need
    no tokenizer and no ``config.json``, and names and shapes are compared anyway.

    Args:
        checkpoints: two or more, first the one whose files the output gets.
        allowed: names of differences that are meant.

    Raises:
        CheckpointError: a model beside an adapter, other names or shapes, or a difference that is
            not allowed. Up to ten are listed with both sides, and the names that allow them.
    """
    first, *others = checkpoints
    problems = [found for other in others for found in _kind_differences(first, other)]
    if not problems:
        problems = [f for f in _differences(checkpoints) if f.kind not in allowed]
    if problems:
        folders = ", ".join(f"{c.role} {c.directory}" for c in checkpoints)
        heading = f"these are different models ({folders})"
        listed = problem_list(heading, [found.text for found in _each_kind_first(problems)])
        raise CheckpointError("\n".join([listed, *_advice(problems)]))


def check_config(like: Checkpoint, directory: Folder, allowed: Collection[Difference] = ()) -> None:
    """Refuse a folder whose configuration reads the weights of a checkpoint otherwise.

    Args:
        like: the checkpoint.
        directory: with the configuration and tokenizer that the output is to get.
        allowed: names of differences that are meant.

    Raises:
        CheckpointError: no such folder, or its ``config.json`` says otherwise.
    """
    if not is_folder(directory):
        raise CheckpointError(f"{directory}: no such folder to take the configuration from")
    differing = config_differences(_config(like), read_details(directory / "config.json"))
    if differing and "config" not in allowed:
        problems = [f"{key}: {ours!r}, {theirs!r}" for key, (ours, theirs) in differing.items()]
        raise CheckpointError(
            problem_list(f"{directory} configures another model than {like.directory}", problems)
            + "\n--allow config if that is meant: its config.json is taken as it is"
        )


def _differences(checkpoints: Sequence[Checkpoint]) -> Iterator[_Found]:
    first, *others = checkpoints
    for other in others:
        yield from _setting_differences(first, other)
    for compared, said in (
        (_config_differences, _config),
        (_label_differences, _labels),
        (_tokenizer_differences, lambda c: has_tokenizer(c.directory)),
        (_template_differences, lambda c: chat_templates(c.directory)),
    ):
        speaking = [checkpoint for checkpoint in checkpoints if said(checkpoint)]
        for other in speaking[1:]:
            yield from compared(speaking[0], other)
    for other in others:
        yield from _tensor_differences(first, other)


def _kind_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    kinds = {True: "an adapter", False: "a whole model"}
    if first.is_adapter != other.is_adapter:
        yield _found(
            None, "", first, f"is {kinds[first.is_adapter]}", other, kinds[other.is_adapter]
        )


def _setting_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    """Of adapters, what their factors mean; of our own models, how they are used."""
    ours, theirs = (_settings(side.adapter_config) for side in (first, other))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            kind: Difference = "adapter-base" if key == _ADAPTER_BASE else "adapter"
            yield _found(kind, key, first, repr(ours.get(key)), other, repr(theirs.get(key)))
    ours, theirs = (side.provenance.get("model") or {} for side in (first, other))
    for key in ("kind", "pooling"):
        if key in ours and key in theirs and ours[key] != theirs[key]:
            yield _found("config", key, first, repr(ours[key]), other, repr(theirs[key]))


def _settings(adapter_config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's factors mean, in a form that compares: lists of modules have no order.

    A setting that is off is as one that an older version of peft does not know.
    """
    settings = {
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in adapter_config.items()
        if key not in _ADAPTER_HISTORY and value and value != "none"
    }
    base = settings.get(_ADAPTER_BASE)
    if isinstance(base, str) and Path(base).is_dir():
        settings[_ADAPTER_BASE] = str(Path(base).resolve())
    return settings


def _config_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    for key, (ours, theirs) in config_differences(_config(first), _config(other)).items():
        yield _found("config", key, first, _word(ours), other, _word(theirs))


def _label_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    ours, theirs = _labels(first), _labels(other)
    if ours != theirs:
        yield _found("labels", "labels", first, repr(ours), other, repr(theirs))


def _labels(checkpoint: Checkpoint) -> list[str] | None:
    return checkpoint.provenance.get("labels") or label_names(_config(checkpoint))


def _tokenizer_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    for found in tokenizer_differences(first.directory, other.directory):
        yield _found(found.kind, found.what, first, found.first, other, found.other)


def _template_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    for found in template_differences(first.directory, other.directory):
        yield _found(found.kind, found.what, first, found.first, other, found.other)


def _tensor_differences(first: Checkpoint, other: Checkpoint) -> Iterator[_Found]:
    ours = {name: first.source.info(name) for name in first.source.names()}
    theirs = {name: other.source.info(name) for name in other.source.names()}
    for name in sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            words = [_tensor_word(side, name, info) for side, info in ((first, a), (other, b))]
            yield _found(None, name, first, words[0], other, words[1])
        else:
            floating = a.dtype.is_floating_point and b.dtype.is_floating_point
            kind: Difference | None = "dtype" if a.shape == b.shape and floating else None
            yield _found(kind, name, first, str(a), other, str(b))


def _tensor_word(checkpoint: Checkpoint, name: str, info: TensorInfo | None) -> str:
    """A tensor that only one side keeps; tied weights are kept once, or in two copies."""
    config = _config(checkpoint)
    if not name.endswith(_TIED) or not config:
        return str(info or "none")
    is_tied = meant(config).get("tie_word_embeddings")
    if info is None:
        tied = "none, since its config.json ties it to the embeddings (tie_word_embeddings)"
        return tied if is_tied else "none"
    tied = f"{info}, a copy of the embeddings that its config.json ties it to: transformers leaves "
    return f"{tied}it out where it saves the model again" if is_tied else f"{info} of its own"


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_details(checkpoint.directory / "config.json")


def _word(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _found(
    kind: Difference | None, what: str, first: Checkpoint, ours: str, other: Checkpoint, theirs: str
) -> _Found:
    start = f"{what}: " if what else ""
    return _Found(kind, f"{start}{first.role} {ours}, {other.role} {theirs}")


def _each_kind_first(found: Sequence[_Found]) -> list[_Found]:
    """A few of each kind at the front, so that no kind hides the others by its number."""
    seen: dict[Difference | None, int] = {}
    rank = []
    for difference in found:
        seen[difference.kind] = seen.get(difference.kind, 0) + 1
        rank.append(seen[difference.kind])
    order = sorted(range(len(found)), key=rank.__getitem__)
    shown = sorted(order[:MOST_PROBLEMS_SHOWN])
    return [found[n] for n in (*shown, *sorted(order[MOST_PROBLEMS_SHOWN:]))]


def _advice(found: Sequence[_Found]) -> Iterator[str]:
    """What can be done about differences, by their names."""
    kinds = {difference.kind for difference in found}
    if None in kinds:
        yield "Names, shapes and kinds that differ cannot be merged."
    for kind, meaning in MEANINGS.items():
        if kind in kinds:
            yield f"--allow {kind} if that is meant: {meaning}."
