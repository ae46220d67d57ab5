"""The licence of what derives from models on the Hub: theirs, where they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kifmerge.errors import CheckpointError
from kifmerge.hub.client import Say, hub_api, patiently, silent
from kifmerge.hub.reference import Reference

# Keys of front matter; with `other` the last two say which one.
_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What a card says of the licence.

    Attributes:
        front: keys of its front matter; none where nothing is known.
        note: a sentence for people; empty where there is nothing to add.
        is_doubtful: whether somebody has to look at it.
    """

    front: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    is_doubtful: bool = False


def find_licence(bases: Sequence[Reference], say: Say = silent) -> Licence:
    """What the cards of all bases say, together.

    Args:
        bases: on the Hub.
        say: told of long waits.

    Raises:
        TryAgainError: network or server failed.
    """
    found = {str(base.repo_id): _of_base(base, say) for base in bases}
    kinds = list({tuple(keys.items()): keys for keys in found.values()}.values())
    if not any(kinds):
        names = ", ".join(found)
        note = f"The licence is not known: {names} state none." if found else ""
        return Licence(note=note, is_doubtful=bool(found))
    if len(kinds) == 1:
        return Licence(front=kinds[0])
    told = "; ".join(f"{name}: {_word(keys)}" for name, keys in found.items())
    note = f"The licences of the models that it derives from differ: {told}. All of them hold."
    return Licence(front={"license": "other"}, note=note, is_doubtful=True)


def _of_base(base: Reference, say: Say) -> dict[str, Any]:
    """Keys of a base's card; none of one that cannot be seen."""

    def ask() -> Any:
        return hub_api().repo_info(base.repo_id, repo_type=base.kind, revision=base.revision)

    try:
        info = patiently(ask, f"looking up the licence of {base}", say)
    except CheckpointError as error:
        say(str(error))
        return {}
    card = getattr(info, "card_data", None)
    content = {} if card is None else card.to_dict()
    return {key: content[key] for key in _KEYS if content.get(key)}


def _word(keys: Mapping[str, Any]) -> str:
    return str(keys.get("license_name") or keys.get("license") or "none stated")
