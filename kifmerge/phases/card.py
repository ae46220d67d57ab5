"""The model card of a merge: README.md, as the Hub reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml


def model_card(
    *,
    base_models: Sequence[str],
    library_name: str,
    made_by: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> str:
    """Text of the card: front matter, how the model was made, and what the rule found.

    Args:
        base_models: references of the models that it derives from.
        library_name: ``transformers`` or ``peft``.
        made_by: of the merge, see :func:`kifmerge.checkpoint.provenance.made_by`.
        figures: thresholds, shares and counts.
    """
    front = {
        "base_model": list(base_models),
        "base_model_relation": "merge",
        "library_name": library_name,
        "tags": ["merge", "kifmerge"],
    }
    options = made_by["options"]
    parents = "\n".join(
        f"| {role.replace('_', ' ')} | `{parent['reference']}` | `{str(parent['digest'])[:12]}` |"
        for role, parent in made_by["parents"].items()
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# Merged by {options["rule"]}

Made by [kifmerge](https://pypi.org/project/kifmerge/), element by element, from

| role | reference | SHA-256 begins with |
|---|---|---|
{parents}

by the rule

```yaml
{yaml.safe_dump(dict(options), sort_keys=False)}```

which found

```yaml
{yaml.safe_dump(dict(figures), sort_keys=False)}```

`kifmerge.json` holds all of this, with whole digests.
"""
