"""Model cards: README.md as the Hub reads it, front matter for programs and text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kifmerge.errors import CheckpointError
from kifmerge.fusion.inputs import EVIDENCE_ENDS
from kifmerge.hub.reference import SCHEME, Reference, parse_reference, parse_remote
from kifmerge.phases.equations import equation
from kifmerge.phases.licence import Licence
from kifmerge.phases.report import Report, report_tables

MARK = (
    "<!-- Written by kifmerge, which writes it anew with each push. Remove this line, and what you "
    "write here is left as it is. -->"
)
# Of the template that PEFT leaves with every adapter, as long as nobody has filled it in.
_TEMPLATE_TITLE = "# Model Card for Model ID"
_TEMPLATE_BLANK = "[More Information Needed]"
_NUM_BLANKS = 39
_PROJECT = "kifmerge"
# Of a list in a table of facts; longer ones are counted.
_MOST_SHOWN = 20
_DIGEST_SHOWN = 12


def model_card(
    *,
    base_models: Sequence[str],
    library_name: str,
    made_by: Mapping[str, Any],
    figures: Mapping[str, Any],
    repository: str | None = None,
    licence: Licence | None = None,
) -> str:
    """The card of a merge, as it stands in the folder or the repository that was made.

    Args:
        base_models: references of the models that it derives from; those on the Hub are named in
            front, where it takes no others.
        library_name: ``transformers`` or ``peft``.
        made_by: of the merge, see :func:`kifmerge.checkpoint.provenance.made_by`.
        figures: thresholds, shares and counts.
        repository: that it goes to; None for a folder, of which push writes the whole card.
        licence: of what goes there.
    """
    repositories = dict.fromkeys(filter(None, map(_repository, base_models)))
    relation = "adapter" if library_name == "peft" else "merge"
    front = {
        "base_model": list(repositories),
        "base_model_relation": relation if repositories else None,
        "library_name": library_name,
        **({} if licence is None else licence.front),
        "tags": ["merge", "kifmerge"],
    }
    sections = [
        merge_section(made_by, figures),
        f"## Licence\n\n{licence.note}" if licence is not None and licence.note else "",
        "" if repository is None else rebuild_section(repository, made_by),
    ]
    return card(front, title_of(made_by), sections)


def card(front: Mapping[str, Any], title: str, sections: Sequence[str]) -> str:
    """Text of a card.

    Args:
        front: what programs read; empty values are left out.
        title: heading.
        sections: Markdown; empty ones are left out.
    """
    kept = {key: value for key, value in front.items() if value}
    head = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    body = "\n\n".join(section.strip() for section in sections if section)
    return f"---\n{head}---\n{MARK}\n\n# {title}\n\n{body}\n"


def is_ours(text: str) -> bool:
    """Whether a card is one that may be written anew: nobody's words are in it.

    >>> is_ours("# My model"), is_ours(card({"license": "mit"}, "Title", ["Text"]))
    (False, True)
    """
    is_blank = _TEMPLATE_TITLE in text and text.count(_TEMPLATE_BLANK) >= _NUM_BLANKS
    return is_blank or MARK in text


def title_of(made_by: Mapping[str, Any]) -> str:
    """Heading of a card: what was done.

    >>> title_of({"command": "merge", "options": {"rule": "ties"}}), title_of({"command": "prune"})
    ('Merged by ties', 'Made by kifmerge prune')
    """
    if made_by["command"] == "merge":
        return f"Merged by {made_by['options']['rule']}"
    return f"Made by kifmerge {made_by['command']}"


def merge_section(made_by: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """How a merge was made: of what, by which rule, with what options, and what the rule found."""
    options = made_by["options"]
    parents = made_by["parents"]
    evidence = {role: parent for role, parent in parents.items() if role.endswith(EVIDENCE_ENDS)}
    models = {role: parent for role, parent in parents.items() if role not in evidence}
    importance = f"Importance comes from\n\n{parent_table(evidence)}\n\n" if evidence else ""
    return f"""Made by {_PROJECT}, element by element, from

{parent_table(models)}

{importance}by the rule **{options["rule"]}**

```text
{equation(options)}
```

with the options

{_fenced(options)}

which found

{_fenced(figures)}

`kifmerge.json` holds all of this, with whole digests."""


def command_section(made_by: Mapping[str, Any], record: str) -> str:
    """How something else than a merge was made.

    Args:
        made_by: as recorded.
        record: name of the file that holds all of it.
    """
    parents = made_by["parents"]
    origin = f", from\n\n{parent_table(parents)}\n\nwith the options" if parents else " with"
    return f"""Made by `kifmerge {made_by["command"]}` of {_PROJECT}{origin}

{_fenced(made_by["options"])}

`{record}` holds all of this, with whole digests."""


def facts_section(facts: Mapping[str, Any]) -> str:
    """What an artifact says of itself, long lists counted."""
    shown = {
        key: f"{len(value)} in all"
        if isinstance(value, list | dict) and len(value) > _MOST_SHOWN
        else value
        for key, value in facts.items()
        if value not in (None, [], {})
    }
    return f"## What it says of itself\n\n{_fenced(shown)}" if shown else ""


def score_section(report: Report) -> str:
    """What a run measured, in tables."""
    tables = []
    for table in report_tables(report):
        rows = [table.header, ["---"] * len(table.header), *table.rows]
        lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        tables.append(f"### {table.title}\n\n{lines}")
    return f"## Scores of {report.name}\n\n" + "\n\n".join(tables)


def rebuild_section(repo_id: str, made_by: Mapping[str, Any]) -> str:
    """How to come to the same bytes again."""
    local = [p["reference"] for p in made_by["parents"].values() if hub_reference(p) is None]
    needed = (
        "\n\nIt needs what was there where it was made: "
        + ", ".join(f"`{name}`" for name in local)
        + "."
        if local
        else ""
    )
    return f"""## The same again

```sh
kifmerge pull {repo_id} --out published
kifmerge merge published/kifmerge.json --out rebuilt
```

The second command compares inputs and result with what `kifmerge.json` records.{needed}"""


def parent_table(parents: Mapping[str, Mapping[str, Any]]) -> str:
    """What something was made from, as recorded: role -> reference and digest."""
    rows = ["| role | reference | commit | SHA-256 begins with |", "|---|---|---|---|"]
    for role, parent in parents.items():
        found = hub_reference(parent)
        name, commit = (str(parent["reference"]), "") if found is None else _named(found)
        digest = str(parent.get("digest") or "")[:_DIGEST_SHOWN]
        cells = [role.replace("_", " "), _code(name), _code(commit), _code(digest)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def hub_reference(parent: Mapping[str, Any]) -> Reference | None:
    """Where on the Hub a recorded parent is; None of a path, which may look like a name there."""
    text = str(parent["reference"])
    try:
        found = parse_remote(text)
    except CheckpointError:
        return None
    return found if text.startswith(SCHEME) or found.is_pinned else None


def _repository(text: str) -> str | None:
    """The repository that a reference is in; None of a path."""
    found = hub_reference({"reference": text}) or parse_reference(text)
    return found.repo_id if isinstance(found, Reference) else None


def _named(reference: Reference) -> tuple[str, str]:
    """Reference without its commit, and the commit."""
    commit = reference.revision or ""
    return str(reference).replace(f"@{commit}", "") if commit else str(reference), commit


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _fenced(content: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)}```"
