"""Tiny random models, rows and Trainers: nothing is downloaded, a step takes milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kifmerge.models.model import ModelOptions
from kifmerge.models.tokenizer import TokenizerOptions
from kifmerge.training.presets import RecurrentOptions
from kifmerge.training.trainer import RecurrentTrainer

VOCABULARY = 40
ROW_TOKENS = 6
LABELS = 3

# These models are too small to gain by threads, and one thread adds up in one order.
torch.set_num_threads(1)

BYTE_LLAMA = ModelOptions(
    kind="causal-lm",
    config={
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    },
    tokenizer=TokenizerOptions(kind="bytes", vocabulary_size=280),
)  # fmt: skip


def llama(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A causal language model of one layer."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 32,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **config,
            }
        )
    )


def t5(seed: int = 0) -> PreTrainedModel:
    """A sequence-to-sequence model of one layer on each side."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def bert(seed: int = 0) -> PreTrainedModel:
    """A sequence classifier of one layer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=LABELS,
    )
    return BertForSequenceClassification(config)


def with_lora(model: PreTrainedModel, seed: int = 0, **config: Any) -> PeftModel:
    """LoRA on q and v; B starts random, so that every parameter has a gradient from step one."""
    torch.manual_seed(seed)
    targets = ["q", "v"] if model.config.is_encoder_decoder else ["q_proj", "v_proj"]
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    settings = {"r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": task_type}
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **{**settings, **config}))


def lora_llama(seed: int = 0, **config: Any) -> PeftModel:
    """The model that most tests train."""
    return with_lora(llama(seed), seed, **config)


def rows(num_rows: int, seed: int = 0, *, classes: bool = False) -> list[dict[str, Any]]:
    """Random rows for any of the models; with ``classes`` their label is a class."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(high: int, *shape: int) -> Any:
        return torch.randint(3 if shape else 0, high, shape, generator=generator).tolist()

    made = []
    for _ in range(num_rows):
        tokens = draw(VOCABULARY, ROW_TOKENS)
        made.append({"input_ids": tokens, "labels": draw(LABELS) if classes else tokens})
    return made


def arguments(output_dir: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a short, silent training on the CPU, rows in their order."""
    return TrainingArguments(
        output_dir=str(output_dir),
        **{
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "max_steps": 6,
            "weight_decay": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": [],
            **changes,
        },
    )


def trainer(
    model: nn.Module,
    output_dir: Path,
    *,
    new: list[dict[str, Any]] | None = None,
    memory: Any = None,
    options: RecurrentOptions | None = None,
    memory_batches: Any = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    eval_dataset: Any = None,
    **changes: Any,
) -> RecurrentTrainer:
    """A recurrent Trainer; ``callbacks`` come after its own, so that they see fused weights."""
    made = RecurrentTrainer(
        model,
        arguments(output_dir, **changes),
        train_dataset=rows(40) if new is None else new,
        eval_dataset=eval_dataset,
        memory=memory,
        recurrent=options,
        memory_batches=memory_batches,
    )
    for callback in callbacks:
        made.add_callback(callback)
    return made


def plain_trainer(
    model: nn.Module,
    output_dir: Path,
    *,
    new: list[dict[str, Any]] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **changes: Any,
) -> Trainer:
    """A stock Trainer with the same arguments."""
    return Trainer(
        model,
        arguments(output_dir, **changes),
        train_dataset=rows(40) if new is None else new,
        callbacks=list(callbacks),
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that training changes, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether both hold the same names and, bit for bit, the same values."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


class Weights(TrainerCallback):
    """Remembers the trained parameters at the end of every step, by its number; 0 is the start."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}
        self.evaluated: dict[int, dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = trained(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = trained(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated[state.global_step] = trained(kwargs["model"])


class Gradients(TrainerCallback):
    """Remembers each step's gradients, and the weights before and after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor | None]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(trained(kwargs["model"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(trained(kwargs["model"]))
        self.gradients.append(
            {
                name: None if p.grad is None else p.grad.clone()
                for name, p in kwargs["model"].named_parameters()
                if p.requires_grad
            }
        )


def spoil_gradient(model: nn.Module, name: str, backward: int, value: float) -> None:
    """Make one element of one parameter's gradient ``value`` in the given backward pass, from 1."""
    calls = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls != backward:
            return gradient
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    dict(model.named_parameters())[name].register_hook(hook)
