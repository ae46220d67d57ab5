"""A base from scratch: written once as an ordinary checkpoint, then loaded like any other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel

from kifmerge.checkpoint.atomic import whole_folder
from kifmerge.errors import CheckpointError
from kifmerge.models.model import (
    AUTO_CLASSES,
    ModelOptions,
    load_tokenizer,
    loading,
    set_dropout,
)
from kifmerge.models.tokenizer import TokenizerOptions, train_tokenizer


def make_base(
    options: ModelOptions, texts: Iterable[str], directory: Path, *, seed: int
) -> ModelOptions:
    """Write a randomly initialised base to ``directory`` unless one is there already.

    Args:
        options: with ``config`` and ``tokenizer``.
        texts: to train the tokenizer on, if one is to be trained.
        directory: becomes the base's reference.
        seed: of the weights.

    Returns:
        The options with the folder as reference, to load it by.

    Raises:
        CheckpointError: a configuration that transformers does not know or cannot build.
    """
    made = replace(options, reference=str(directory), tokenizer=None)
    if directory.exists():
        return made
    if isinstance(options.tokenizer, str):
        with loading(options.tokenizer):
            tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer(
            texts, options.tokenizer or TokenizerOptions(), max_tokens=options.max_tokens
        )
    settings = _with_token_ids(dict(options.config or {}), tokenizer)
    transformers.set_seed(seed)
    try:
        config = AutoConfig.for_model(**settings)
        if options.dropout is not None:
            set_dropout(config, options.dropout)
        is_encoder = options.kind == "classifier"  # its head is made when the labels are known
        model = (AutoModel if is_encoder else AUTO_CLASSES[options.kind]).from_config(config)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"cannot make a model from {settings}: {error}") from error
    with whole_folder(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return made


def _with_token_ids(settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        **settings,
    }
