"""What a ``config.json`` says of how weights are read, in a form in which two of them compare.

Versions of transformers write the same model in different words: a default left out or written,
``rope_theta`` or ``rope_parameters``. Where two files differ in their words, transformers is asked
what they mean; it is not imported otherwise.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

# What no reader of the weights looks at: where they came from, how to train, run and generate.
_IGNORED = (
    "_*", "name_or_path", "transformers_version", "unsloth*", "auto_map", "tokenizer_class",
    "dtype", "torch_dtype", "use_bfloat16", "torchscript", "tf_legacy_loss",
    "use_cache", "attn_implementation", "output_attentions", "output_hidden_states",
    "output_scores", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward",
    "gradient_checkpointing", "pretraining_tp", "router_aux_loss_coef", "output_router_logits",
    "*dropout", "dropout*", "*_pdrop", "*_dropout_prob", "*layerdrop", "initializer_*", "init_std",
    "problem_type", "finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels",
    "bos_token_id", "eos_token_id", "forced_*_token_id", "prefix", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "remove_invalid_values",
    "exponential_decay_length_penalty",
)  # fmt: skip
_IGNORED_PATTERN = re.compile("|".join(map(fnmatch.translate, _IGNORED)))
_SAYS_NOTHING = 100  # above every level of logging
# A side that does not say leaves it to the other: many models are published without.
_OPTIONAL = ("architectures", "pad_token_id", "sep_token_id", "decoder_start_token_id")


def config_differences(
    first: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What two configurations say differently of how weights are read.

    Args:
        first: content of a ``config.json``; empty where there is none, which differs from nothing.
        other: likewise.

    Returns:
        Dotted key -> what the first says and what the other says.

    >>> config_differences({"a": {"x": 1, "use_cache": True}}, {"a": {"x": 2}, "dtype": "float16"})
    {'a.x': (1, 2)}
    """
    if not first or not other:
        return {}
    in_words = _compared(first, other)
    if not in_words:
        return {}
    ours, theirs = _completed(first), _completed(other)
    return in_words if ours is None or theirs is None else _compared(ours, theirs)


def label_names(config: Mapping[str, Any]) -> list[str] | None:
    """Names of a classifier's outputs, in their order; None where they are only numbered.

    >>> label_names({"id2label": {"1": "bad", "0": "good"}})
    ['good', 'bad']
    >>> label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    """
    found = config.get("id2label")
    if not isinstance(found, dict) or not all(str(key).isdecimal() for key in found):
        return None
    names = {int(key): str(value) for key, value in found.items()}
    if all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return [names[number] for number in sorted(names)]


def meant(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with all that it leaves unsaid, as transformers reads it.

    As it is where transformers does not know the model.
    """
    return _completed(config) or config


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    with _silent():
        from transformers import CONFIG_MAPPING

        try:
            complete: dict[str, Any] = (
                CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
            )
        except Exception:  # noqa: BLE001 - whatever a strange value makes its class raise
            return None
    return complete


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from talking of a configuration that is only compared."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(_SAYS_NOTHING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _compared(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    ours, theirs = dict(_flat(first)), dict(_flat(other))
    differing = {}
    for key in sorted({*ours, *theirs}):
        values = (ours.get(key), theirs.get(key))
        unsaid = None in values and key.rpartition(".")[2] in _OPTIONAL
        if values[0] != values[1] and not unsaid:
            differing[key] = values
    return differing


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what counts; what is null is left out."""
    for key, value in config.items():
        is_old_word = key == "type" and "rope_type" in config
        if value is None or is_old_word or _IGNORED_PATTERN.match(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
