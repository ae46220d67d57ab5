"""How the tokenizers of two folders differ: in the vocabulary, or in how text is cut into it.

Files that are equal byte by byte, which is the rule, cost nothing but reading them.
"""

from __future__ import annotations

import filecmp
import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kifmerge.checkpoint.digest import file_sha256
from kifmerge.checkpoint.folder import Folder, file_sizes, has_file
from kifmerge.checkpoint.provenance import read_details
from kifmerge.errors import MOST_PROBLEMS_SHOWN, CheckpointError

TokenDifference = Literal["vocab", "tokenizer", "chat-template"]

TOKENIZER_FILE = "tokenizer.json"
_VOCAB_JSON, _VOCAB_TEXT, _MERGES = "vocab.json", "vocab.txt", "merges.txt"
_ADDED_TOKENS, _SPECIAL_TOKENS = "added_tokens.json", "special_tokens_map.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# What is not read here, but equal or not.
_OPAQUE_FILES = (
    "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "target.spm", "tekken.json",
)  # fmt: skip
_TOKENIZER_FILES = (TOKENIZER_FILE, _VOCAB_JSON, _VOCAB_TEXT, *_OPAQUE_FILES)
_SPECIAL_KEYS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens",
)  # fmt: skip
_TEMPLATE_FILE, _TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
_TEMPLATE_FOLDER = "additional_chat_templates"
# What a tokenizer does beside cutting words; how it writes text does not bear on the weights.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor")
_SHOWN_DIGITS = 12
_MOST_SHOWN = 80


@dataclass(frozen=True, slots=True)
class TokenizerDifference:
    """Something that two tokenizers do not share.

    Attributes:
        kind: what it bears on.
        what: the token, setting or file.
        first: how the first has it.
        other: how the other has it.
    """

    kind: TokenDifference
    what: str
    first: str
    other: str


def has_tokenizer(directory: Folder) -> bool:
    """Whether a folder holds a file that tells how text becomes tokens."""
    return any(has_file(directory, name) for name in _TOKENIZER_FILES)


def tokenizer_differences(first: Folder, other: Folder) -> Iterator[TokenizerDifference]:
    """What the tokenizers of two folders do not share.

    Args:
        first: a folder with a tokenizer.
        other: likewise.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    yield from _cutting_differences(first, other)
    ours, theirs = _special_tokens(first), _special_tokens(other)
    for key in [key for key in ours if key in theirs and ours[key] != theirs[key]]:
        yield TokenizerDifference("tokenizer", key, _shown(ours[key]), _shown(theirs[key]))


def template_differences(first: Folder, other: Folder) -> Iterator[TokenizerDifference]:
    """Chat templates of one name, in two folders, that differ.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    ours, theirs = chat_templates(first), chat_templates(other)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            lines = _first_differing_line(ours[name], theirs[name])
            yield TokenizerDifference("chat-template", f"chat template {name}", *lines)


def chat_templates(directory: Folder) -> dict[str, str]:
    """Name -> text of a folder's chat templates, from the files of any version of transformers."""
    found = read_details(directory / _TOKENIZER_CONFIG).get("chat_template")
    found = read_details(directory / _TEMPLATE_JSON).get("chat_template", found)
    named = found if isinstance(found, list) else [{"name": "default", "template": found}]
    templates = {
        str(entry.get("name")): entry["template"]
        for entry in named
        if isinstance(entry, dict) and isinstance(entry.get("template"), str)
    }
    if has_file(directory, _TEMPLATE_FILE):
        templates["default"] = _read_text(directory / _TEMPLATE_FILE)
    for name in fnmatch.filter(file_sizes(directory, _TEMPLATE_FOLDER), "*.jinja"):
        text = _read_text(directory / f"{_TEMPLATE_FOLDER}/{name}")
        templates[name.removesuffix(".jinja")] = text
    return templates


def _cutting_differences(first: Folder, other: Folder) -> Iterator[TokenizerDifference]:
    both = [name for name in _files(first) if has_file(other, name)]
    if both and both[0] == TOKENIZER_FILE and _same_file(first, other, TOKENIZER_FILE):
        return
    ours, theirs = _read_tokenizer(first), _read_tokenizer(other)
    if ours is not None and theirs is not None:
        yield from _vocab_differences(ours.vocab, theirs.vocab)
        for name in sorted(ours.parts.keys() & theirs.parts.keys()):
            part, other_part = ours.parts[name], theirs.parts[name]
            if part != other_part:
                yield TokenizerDifference("tokenizer", name, part.shown, other_part.shown)
        return
    if not both:
        found = [", ".join(_files(folder)) for folder in (first, other)]
        yield TokenizerDifference("vocab", "tokenizer files, which do not compare", *found)
        return
    if not _same_file(first, other, both[0]):
        digests = [file_sha256(folder / both[0])[:_SHOWN_DIGITS] for folder in (first, other)]
        yield TokenizerDifference("vocab", both[0], *[f"sha256 {digest}" for digest in digests])
    yield from _vocab_differences(*[_numbered(folder / _ADDED_TOKENS) for folder in (first, other)])


class _Part(NamedTuple):
    """A part of a tokenizer: its digest, and what a message shows of it."""

    digest: str
    shown: str


@dataclass(frozen=True, slots=True)
class _Tokenizer:
    """A vocabulary, and all else that decides how text is cut into it."""

    vocab: Mapping[str, int]
    parts: Mapping[str, _Part]


def _read_tokenizer(directory: Folder) -> _Tokenizer | None:
    """The tokenizer of a folder; None if only files that are not read here hold it."""
    if has_file(directory, TOKENIZER_FILE):
        return _fast_tokenizer(directory / TOKENIZER_FILE)
    added = _numbered(directory / _ADDED_TOKENS)
    if has_file(directory, _VOCAB_JSON):
        merges = directory / _MERGES
        parts = {"merges": _part(_merge_lines(_read_text(merges)))} if merges.exists() else {}
        return _Tokenizer({**_numbered(directory / _VOCAB_JSON), **added}, parts)
    if has_file(directory, _VOCAB_TEXT):
        tokens = _read_text(directory / _VOCAB_TEXT).splitlines()
        return _Tokenizer({**{token: n for n, token in enumerate(tokens)}, **added}, {})
    return None


def _fast_tokenizer(path: Path) -> _Tokenizer:
    content = read_details(path)
    try:
        model = dict(content.pop("model", None) or {})
        vocab = model.pop("vocab", None) or {}
        parts: dict[str, Any] = {}
        if not isinstance(vocab, dict):  # a unigram model: token and score, in order
            parts["scores"] = [value for _, value in vocab]
            vocab = {token: number for number, (token, _) in enumerate(vocab)}
        added = {entry["content"]: dict(entry) for entry in content.get("added_tokens") or []}
        vocab |= {token: entry.pop("id") for token, entry in added.items()}
        # An older form has the two halves of a merge in one string.
        merges = (m if isinstance(m, str) else " ".join(m) for m in model.pop("merges", None) or [])
        parts["merges"] = list(merges)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a tokenizer of the tokenizers library") from error
    if not parts["merges"]:
        del parts["merges"]
    parts["model"] = {k: v for k, v in model.items() if v is not None and v is not False}
    parts |= {f"added token {token!r}": entry for token, entry in added.items()}
    steps = _canonical({key: content.get(key) for key in _STEPS})
    parts |= {key: steps.get(key) for key in _STEPS}
    return _Tokenizer(_checked(vocab, path), {name: _part(part) for name, part in parts.items()})


def _numbered(path: Path) -> dict[str, int]:
    """Token -> id of a JSON file; empty if there is no such file."""
    return _checked(read_details(path), path)


def _checked(vocab: dict[Any, Any], path: Path) -> dict[str, int]:
    for token, number in vocab.items():
        if not isinstance(token, str) or type(number) is not int:
            raise CheckpointError(f"{path}: expected the id of token {token!r}, found {number!r}")
    return vocab


def _canonical(steps: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a tokenizer does before and after cutting, in the words of the installed library.

    As it stands where the library cannot read it.
    """
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": model, **steps})
    try:
        canonical: dict[str, Any] = json.loads(Tokenizer.from_str(text).to_str())
    except Exception:  # noqa: BLE001 - the library raises nothing narrower
        return steps
    return canonical


def _vocab_differences(
    ours: Mapping[str, int], theirs: Mapping[str, int]
) -> Iterator[TokenizerDifference]:
    differing = sorted(
        (token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token, 0)), token),
    )
    if len(differing) >= MOST_PROBLEMS_SHOWN:
        what = f"{len(differing):,} tokens of the vocabulary"
        counts = [f"{len(vocab):,} in all" for vocab in (ours, theirs)]
        yield TokenizerDifference("vocab", what, *counts)
    for token in differing[: MOST_PROBLEMS_SHOWN - 1]:
        numbers = [str(vocab.get(token, "none")) for vocab in (ours, theirs)]
        yield TokenizerDifference("vocab", f"token {token!r}", *numbers)


def _special_tokens(directory: Folder) -> dict[str, str | list[str]]:
    """Special tokens by their role, as far as files beside the tokenizer name them."""
    named = read_details(directory / _TOKENIZER_CONFIG)
    named = {**named, **read_details(directory / _SPECIAL_TOKENS)}
    found: dict[str, str | list[str]] = {}
    for key in _SPECIAL_KEYS:
        value = named.get(key)
        if isinstance(value, list) and value:
            found[key] = sorted(str(_content(token)) for token in value)
        elif isinstance(_content(value), str):
            found[key] = _content(value)
    return found


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _merge_lines(text: str) -> list[str]:
    lines = text.splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def _first_differing_line(ours: str, theirs: str) -> tuple[str, str]:
    sides = [text.splitlines() for text in (ours, theirs)]
    number = next(
        (n for n, (a, b) in enumerate(zip(*sides, strict=False)) if a != b),
        min(map(len, sides)),
    )
    first, other = (
        f"line {number + 1} {_shown(side[number])}" if number < len(side) else "ends before it"
        for side in sides
    )
    return first, other


def _shown(value: Any) -> str:
    return _part(value).shown


def _part(value: Any) -> _Part:
    """A value as it is compared, and in a message: as it is where that is short."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(text) <= _MOST_SHOWN:
        return _Part(digest, text)
    size = f"{len(value):,} entries" if isinstance(value, list) else f"{len(text):,} characters"
    return _Part(digest, f"{size} (sha256 {digest[:_SHOWN_DIGITS]})")


def _files(directory: Folder) -> list[str]:
    return [name for name in _TOKENIZER_FILES if has_file(directory, name)]


def _same_file(first: Folder, other: Folder, name: str) -> bool:
    return filecmp.cmp(first / name, other / name, shallow=False)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
