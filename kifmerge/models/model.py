"""Models to train: loaded or made from scratch, with tokenizer, head and adapter.

A checkpoint written here is an ordinary transformers or PEFT folder with one more file,
``kifmerge.json``, which says what kind of model it is, on what base, and for which labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kifmerge.checkpoint.folder import Folder
from kifmerge.checkpoint.provenance import read_details, read_provenance, write_provenance
from kifmerge.errors import CheckpointError, check_at_least
from kifmerge.models.classifier import (
    HEAD_NAME,
    MeanPooledClassifier,
    MeanPooledClassifierConfig,
    grow_head,
)
from kifmerge.models.naming import based, name_base, named
from kifmerge.models.origin import local_copy, opened, pinned
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.fusion.tokens import has_tokenizer

Kind = Literal["causal-lm", "seq2seq-lm", "classifier"]
Pooling = Literal["own", "mean", "normalised-mean"]

AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}
_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """A LoRA adapter, made by PEFT.

    Attributes:
        targets: names of modules to adapt, or one regular expression over their full names.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapter's input.
    """

    targets: Sequence[str] | str
    rank: int = 8
    alpha: float = 32
    dropout: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is used.

    Attributes:
        kind: ``causal-lm``, ``seq2seq-lm`` or ``classifier``.
        reference: of the base: a folder, or on the Hub; None makes one from ``config``.
        config: transformers configuration of a model from scratch, with its ``model_type``.
        tokenizer: reference if not the base's own, or how to train one from scratch.
        pooling: of a classifier: ``own`` as its family does, the ``mean`` over the tokens, or the
            ``normalised-mean``, layer-normalised without parameters.
        lora: adapter options; None trains all parameters.
        max_tokens: of an input; longer ones are cut at the end.
        max_output_tokens: of an answer in training and generation.
        template: ``plain`` (instruction and input as they are), ``alpaca``, or the tokenizer's
            ``chat`` template.
        dtype: of the loaded weights; ``auto`` takes the checkpoint's own.
        dropout: sets every dropout of the base's configuration; None leaves them.
    """

    kind: Kind
    reference: str | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: str | TokenizerOptions | None = None
    pooling: Pooling = "own"
    lora: LoraOptions | None = None
    max_tokens: int = 512
    max_output_tokens: int = 32
    template: Literal["plain", "alpaca", "chat"] = "plain"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dropout: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that hold nothing: an answer needs a token beside the end."""
        check_at_least(self, max_tokens=1, max_output_tokens=2)


@dataclass(slots=True)
class LoadedModel:
    """A live model with all that is needed to feed it and to read its answers.

    Attributes:
        model: a transformers model, or a PeftModel around one.
        tokenizer: with a pad and an end token.
        options: what it was loaded by.
        labels: of a classifier, in the order of its logits.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: ModelOptions
    labels: list[str] = field(default_factory=list)

    def grow_labels(self, labels: Sequence[str], *, seed: int) -> None:
        """Extend the head to further labels; the weights of known labels stay."""
        added = [label for label in labels if label not in self.labels]
        if self.options.kind == "classifier" and added:
            grow_head(self.model, len(self.labels) + len(added), seed=seed)
            self.labels += added
            _set_labels(self.model.config, self.labels)

    def save(self, directory: Path, made_by: Mapping[str, Any] | None = None) -> None:
        """Write the model (or its adapter), tokenizer and ``kifmerge.json``."""
        self.model.save_pretrained(directory)
        name_base(directory, self.options.reference)
        self.tokenizer.save_pretrained(directory)
        write_provenance(
            directory,
            {
                "model": dataclasses.asdict(self.options),
                "labels": self.labels,
                "made_by": made_by,
                "transformers": transformers.__version__,
            },
        )


def pinned_options(options: ModelOptions) -> ModelOptions:
    """The options with what they name on the Hub at a commit.

    Raises:
        CheckpointError: no such repository or revision, or no access.
        TryAgainError: network or server failed.
    """
    tokenizer = options.tokenizer
    return replace(
        options,
        reference=None if options.reference is None else pinned(options.reference),
        tokenizer=pinned(tokenizer) if isinstance(tokenizer, str) else tokenizer,
    )


def known_labels(folder: Folder) -> list[str]:
    """The labels that a classifier's checkpoint covers, in order; none of other models."""
    provenance = read_provenance(folder)
    if provenance:
        return list(provenance.get("labels", []))
    config = read_details(folder / "config.json")
    architectures = config.get("architectures") or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return [str(label) for label in config.get("id2label", {}).values()]
    return []


def load_model(
    options: ModelOptions,
    labels: Sequence[str],
    *,
    seed: int,
    checkpoint: Path | str | None = None,
) -> LoadedModel:
    """Load a base with a fresh head and adapter, or a checkpoint that training wrote.

    Args:
        options: with a reference; a model from scratch is first made by
            :func:`kifmerge.models.scratch.make_base`.
        labels: of a classifier; labels that the checkpoint does not know yet extend its head.
        seed: of everything that is initialised at random.
        checkpoint: written by :meth:`LoadedModel.save`: a folder, or on the Hub.

    Raises:
        CheckpointError: the model cannot be loaded, or LoRA targets match no module.
        TryAgainError: network or server failed, or what came is damaged.
    """
    options = pinned_options(options)
    reference = options.reference
    assert reference is not None
    known = known_labels(opened(checkpoint)) if checkpoint is not None else list(labels)
    transformers.set_seed(seed)
    with loading(reference):
        tokenizer = _load_tokenizer(options, checkpoint)
        whole = checkpoint if checkpoint is not None and options.lora is None else None
        model = _load_base(options, whole or reference, known, has_head=whole is not None)
    if options.lora is not None:
        model = _adapted(model, options, checkpoint)
    loaded = LoadedModel(model, tokenizer, options, known if options.kind == "classifier" else [])
    loaded.grow_labels(labels, seed=seed)
    return loaded


@contextlib.contextmanager
def loading(reference: str) -> Iterator[None]:
    """Turn what goes wrong while a model is loaded into a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"cannot load the model {reference}: {first_line}. Expected a folder with config.json, "
            "tokenizer and safetensors weights, or a Hub name such as org/name"
        ) from error


def load_tokenizer(reference: Path | str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or from the Hub; it runs no code that lies there."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        local_copy(reference, with_weights=False), trust_remote_code=False
    )
    return tokenizer


def load_config(reference: Path | str) -> Any:
    """Load a model's configuration from a folder or from the Hub; it runs no code there."""
    return AutoConfig.from_pretrained(
        local_copy(reference, with_weights=False), trust_remote_code=False
    )


def _load_tokenizer(
    options: ModelOptions, checkpoint: Path | str | None
) -> PreTrainedTokenizerBase:
    source = options.tokenizer if isinstance(options.tokenizer, str) else options.reference
    # An adapter of another's making often comes without one.
    own = checkpoint if checkpoint is not None and has_tokenizer(opened(checkpoint)) else None
    assert source is not None
    tokenizer = load_tokenizer(own or source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_base(
    options: ModelOptions, reference: Path | str, labels: Sequence[str], *, has_head: bool
) -> PreTrainedModel:
    config = load_config(reference)
    folder = local_copy(reference)
    if options.dropout is not None:
        set_dropout(config, options.dropout)
    if options.kind == "classifier" and options.pooling != "own" and not has_head:
        encoder = named(
            AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=options.dtype,
                use_safetensors=True,
                trust_remote_code=False,
            ),
            reference,
        )
        pooled = MeanPooledClassifierConfig(
            encoder=encoder.config.to_dict(), normalised=options.pooling == "normalised-mean"
        )
        _set_labels(pooled, labels)
        return named(MeanPooledClassifier(pooled, encoder), reference)
    if options.kind == "classifier":
        _set_labels(config, labels)
    model: PreTrainedModel = AUTO_CLASSES[options.kind].from_pretrained(
        folder,
        config=config,
        dtype=options.dtype,
        use_safetensors=True,
        trust_remote_code=False,
        # A published head for other labels is of no use here: it starts anew.
        ignore_mismatched_sizes=options.kind == "classifier" and not has_head,
    )
    return named(model, reference)


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout probability that a configuration has."""
    for name, value in config.to_dict().items():
        if "dropout" in name and (value is None or isinstance(value, (int, float))):
            setattr(config, name, dropout)


def _set_labels(config: Any, labels: Sequence[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def _adapted(
    model: PreTrainedModel, options: ModelOptions, checkpoint: Path | str | None
) -> PreTrainedModel:
    from peft import LoraConfig, PeftModel, get_peft_model

    lora, reference = options.lora, options.reference
    assert lora is not None
    assert reference is not None
    if checkpoint is not None:
        with loading(str(checkpoint)):
            trained: PreTrainedModel = PeftModel.from_pretrained(
                model, local_copy(checkpoint), is_trainable=True
            )
            return based(trained, reference)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        modules_to_save=_head_names(model) if options.kind == "classifier" else None,
        task_type=_TASK_TYPES[options.kind] if options.pooling == "own" else None,
    )
    try:
        adapted: PreTrainedModel = get_peft_model(model, config)
    except ValueError as error:
        raise CheckpointError(
            f"LoRA targets {lora.targets!r} match no module of {reference}. "
            f"Linear modules are named: {', '.join(_linear_names(model))}"
        ) from error
    return based(adapted, reference)


def _head_names(model: PreTrainedModel) -> list[str]:
    names = {name for name, _ in model.named_children()}
    return [name for name in (HEAD_NAME, "score", "classification_head") if name in names]


def _linear_names(model: PreTrainedModel) -> list[str]:
    import torch

    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )


def quieten_libraries() -> None:
    """Leave the terminal to our own progress display."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # PEFT asks transformers by an old name whenever an adapter is attached.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
