"""Names of bases on the Hub, in models that are loaded from the cache and in what is made of them.

What names its base, an adapter's configuration or a model card, names the repository: nobody else
has this machine's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kifmerge.checkpoint.atomic import write_json
from kifmerge.checkpoint.provenance import read_details
from kifmerge.checkpoint.source import ADAPTER_CONFIG
from kifmerge.models.origin import local_copy, on_hub


def named(model: PreTrainedModel, reference: Path | str) -> PreTrainedModel:
    """The model, from the Hub, under the name of its repository, which model cards take over."""
    on_the_hub = on_hub(reference)
    if on_the_hub is not None:
        model.name_or_path = model.config.name_or_path = on_the_hub.repo_id
    return model


def based(model: Any, reference: str) -> PreTrainedModel:
    """The PeftModel, told where its base is on this disk.

    PEFT looks at the base's configuration whenever it collects an adapter's weights. By the name
    of a repository it would ask the network for it, and for another commit.
    """
    on_the_hub = on_hub(reference)
    for config in model.peft_config.values():
        if on_the_hub is not None or config.base_model_name_or_path:
            config.base_model_name_or_path = local_copy(reference)
            config.revision = None if on_the_hub is None else on_the_hub.revision
    found: PreTrainedModel = model
    return found


def name_base(directory: Path, reference: str | None) -> None:
    """Name a base on the Hub in the configuration of an adapter that PEFT has just written."""
    on_the_hub, path = on_hub(reference), directory / ADAPTER_CONFIG
    if on_the_hub is not None and path.exists():
        base = {"base_model_name_or_path": on_the_hub.repo_id, "revision": on_the_hub.revision}
        write_json(path, {**read_details(path), **base})
