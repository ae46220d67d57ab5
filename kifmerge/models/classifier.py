"""A sequence classifier for encoders: mean over the tokens, one linear head.

Stock ``AutoModelForSequenceClassification`` classes pool as their family does (BERT: the first
token). Sentence encoders are trained for the mean instead; this class gives any encoder that.
Importing this module registers it with transformers' auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

HEAD_NAME = "classifier"


class MeanPooledClassifierConfig(PreTrainedConfig):
    """Configuration: the encoder's own, labels, and whether the mean is normalised."""

    model_type = "mean_pooled_classifier"
    has_no_defaults_at_init = True

    def __init__(
        self, encoder: dict[str, Any] | None = None, normalised: bool = False, **kwargs: Any
    ) -> None:
        self.encoder = encoder or {}
        self.normalised = normalised
        super().__init__(**kwargs)


class MeanPooledClassifier(PreTrainedModel):
    """Encoder, mean of the last hidden states over the attended tokens, one linear layer.

    With ``normalised`` the mean is brought to mean 0 and variance 1 over its features (layer
    normalisation without parameters) before the linear layer, so that the head learns at the same
    pace whatever the scale of the encoder's features.

    Args:
        config: with the encoder's configuration as a dictionary.
        encoder: the encoder itself; built with random weights if left out.
    """

    config_class = MeanPooledClassifierConfig
    base_model_prefix = "encoder"
    # The loss is a mean over rows: the Trainer has to average micro-batches itself.
    accepts_loss_kwargs = False

    def __init__(
        self, config: MeanPooledClassifierConfig, encoder: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if encoder is None:
            encoder = AutoModel.from_config(AutoConfig.for_model(**config.encoder))
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # its output is not used: it would only add dead parameters
        self.encoder = encoder
        self.classifier = nn.Linear(int(encoder.config.hidden_size), int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits of shape (rows, labels) and, with labels, their mean cross-entropy."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden: Tensor = output.last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        if self.config.normalised:
            pooled = nn.functional.layer_norm(pooled, pooled.shape[-1:])
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(MeanPooledClassifierConfig.model_type, MeanPooledClassifierConfig)
AutoModelForSequenceClassification.register(MeanPooledClassifierConfig, MeanPooledClassifier)


@torch.no_grad()
def grow_head(model: PreTrainedModel, num_labels: int, *, seed: int) -> None:
    """Extend every classification head of a model to more labels; old rows keep their weights.

    New rows are drawn from N(0, 0.02^2) with the given seed, new biases are 0. Works on stock and
    mean-pooled classifiers, bare or under PEFT (where the head is kept twice).
    """
    old_num_labels = int(model.config.num_labels or 0)
    if num_labels == old_num_labels:
        return
    for name, module in model.named_modules():
        is_head = any(part in _HEAD_PARTS for part in name.split("."))
        if is_head and isinstance(module, nn.Linear) and module.out_features == old_num_labels:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randn(
                num_labels - old_num_labels, module.in_features, generator=generator
            ).to(module.weight)
            module.weight = _extended(module.weight, 0.02 * rows)
            if module.bias is not None:
                module.bias = _extended(module.bias, module.bias.new_zeros(len(rows)))
            module.out_features = num_labels
    for module in model.modules():
        if isinstance(getattr(module, "num_labels", None), int):
            setattr(module, "num_labels", num_labels)  # noqa: B010 - the loss of stock classifiers


_HEAD_PARTS = ("classifier", "score", "classification_head", "logits_proj")


def _extended(parameter: Tensor, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter.data, rows]), requires_grad=parameter.requires_grad)
