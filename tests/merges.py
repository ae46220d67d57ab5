"""Merges on disk: everything that they read, and ways to make and to look at what comes of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from torch import Tensor

from kifmerge.checkpoint import pieces as pieces_module
from kifmerge.checkpoint.snapshot import read_snapshot
from kifmerge.errors import CheckpointError
from kifmerge.fusion import selection as selection_module
from kifmerge.fusion.inputs import MergeInputs
from kifmerge.fusion.rules import RULES, FusionOptions
from kifmerge.fusion.unit_scores import GroupOptions
from kifmerge.phases import merge_plan as merge_plan_module
from kifmerge.phases.group import Group
from kifmerge.phases.merge import Merge, MergeOptions
from kifmerge.phases.prune import Prune, PruneInputs, PruneOptions
from kifmerge.training.recurrent import RecurrentRounds

# These models are too small to gain by threads.
torch.set_num_threads(1)

TWO = ("new", "historical")
SHAPES = {"z.weight": (11, 13), "a.weight": (5, 4), "a.bias": (7,), "m.weight": (3, 1, 9)}
# Of sizes that fill no whole bytes of a mask and no whole vector registers; many, for units.
VARIED = {
    **SHAPES, "b.weight": (2, 3), "b.bias": (3,), "c.empty": (0, 2), "d": (), "e.weight": (33,),
    "f.bias": (2,),
}  # fmt: skip
BY_DEFAULT = FusionOptions()
ENDS = {"importance": "importance", "masks": "mask", "units": "units"}


def roles_of(num_models: int) -> tuple[str, ...]:
    """Of a merge of any number of models."""
    return tuple(f"model_{number}" for number in range(1, num_models + 1))


def usual_evidence(rule: FusionOptions) -> str | None:
    """What most tests give a rule: snapshots, if it looks at importance at all."""
    return None if rule.needs in ("nothing", "largest") else "importance"


@dataclass
class Files:
    """A folder with everything that a merge reads: base, models, and what each finds important.

    ``ROLE-importance`` are snapshots, ``ROLE-mask`` and ``ROLE-units`` are made from them.
    """

    folder: Path
    roles: Sequence[str] = TWO
    states: list[dict[str, Tensor]] = field(default_factory=list)

    def write(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        shards: Sequence[int] = (),
        states: Sequence[Mapping[str, Tensor]] | None = None,
        shapes: Mapping[str, Sequence[int]] = SHAPES,
        snapshot_shards: int = 1,
        **save: Any,
    ) -> Files:
        """The base, the models, random unless given, and a random snapshot for each model."""
        seeds = range(1, len(self.roles) + 2)
        made = states or [folders.random_tensors(seed, shapes, dtype) for seed in seeds]
        self.states = [dict(state) for state in made]
        layouts = shards or [0] * len(self.states)
        for role, state, num_shards in zip(
            ("base", *self.roles), self.states, layouts, strict=True
        ):
            folders.save(self.folder / role, state, num_shards=num_shards, **save)
        for seed, role in enumerate(self.roles):
            folders.snapshot(
                self.folder / f"{role}-importance", seed, self.states[0],
                num_shards=snapshot_shards, role=role,
            )  # fmt: skip
        return self

    def make_masks(self, **options: Any) -> Files:
        """A mask for each model, from its snapshot."""
        for role in self.roles:
            inputs = PruneInputs(importance=self.folder / f"{role}-importance")
            Prune(inputs, PruneOptions(**options)).run(self.folder / f"{role}-mask")
        return self

    def make_units(self, kind: str = "tensor") -> Files:
        """Units for each model, from its snapshot; the historical ones after another task."""
        options = GroupOptions(unit=kind)
        for role in self.roles:
            before = None
            if role == "historical":
                folders.snapshot(self.folder / "first-importance", 77, self.states[0])
                before = self.folder / "first-units"
                Group(self.folder / "first-importance", options).run(before)
            group = Group(self.folder / f"{role}-importance", options, historical_units=before)
            group.run(self.folder / f"{role}-units")
        return self

    def inputs(
        self, evidence: str | None = "importance", *, base: bool = True, **more: Any
    ) -> MergeInputs:
        given = {}
        if evidence:
            given[evidence] = {r: self.folder / f"{r}-{ENDS[evidence]}" for r in self.roles}
        return MergeInputs(
            base=self.folder / "base" if base else None,
            models={role: self.folder / role for role in self.roles},
            **{**given, **more},
        )

    def open(self, rule: FusionOptions, evidence: str | None = "usual", **options: Any) -> Merge:
        """The merge, not run; ``base``, ``config_from`` and ``num_workers`` among the options."""
        kind = usual_evidence(rule) if evidence == "usual" else evidence
        of_inputs = {key: options.pop(key) for key in ("base", "config_from") if key in options}
        num_workers = options.pop("num_workers", 1)
        inputs = self.inputs(kind, **of_inputs)
        return Merge(inputs, rule, MergeOptions(**options), num_workers=num_workers)

    def merge(
        self,
        rule: FusionOptions,
        out: str = "out",
        *,
        overwrite: bool = False,
        **options: Any,
    ) -> tuple[dict[str, Any], bool]:
        """Make the merge."""
        return self.open(rule, **options).run(self.folder / out, overwrite=overwrite)

    def merged(self, out: str = "out") -> dict[str, Tensor]:
        return folders.load(self.folder / out)

    def scores(self, role: str) -> dict[str, Tensor]:
        """Of a snapshot."""
        return dict(read_snapshot(self.folder / f"{role}-importance").scores())

    def in_memory(self, options: Any) -> tuple[dict[str, Tensor], Any]:
        """One round of the recurrent loop over the same weights and importance."""
        parameters = {
            name: torch.nn.Parameter(value.clone()) for name, value in self.states[0].items()
        }
        rounds = RecurrentRounds(parameters, options)
        for role, accumulator in rounds.accumulators.items():
            kept = read_snapshot(self.folder / f"{role}-importance").tensors()
            accumulator.load_state_dict(kept, num_steps=1)
        for number in (1, 2):
            for name, parameter in parameters.items():
                parameter.data.copy_(self.states[number][name])
            if number == 1:
                rounds.begin_outer()
        done = rounds.fuse(inner_steps=1, outer_steps=1, outer_loss=0.0)
        return {name: parameter.detach() for name, parameter in parameters.items()}, done

    def refused(
        self,
        match: str,
        *more: object,
        rule: FusionOptions = BY_DEFAULT,
        error: type[Exception] = CheckpointError,
        **options: Any,
    ) -> str:
        """The merge fails with all of this in its message, and leaves nothing."""
        before = sorted(self.folder.rglob("*"))
        with pytest.raises(error, match=match) as caught:
            self.merge(rule, **options)
        assert sorted(self.folder.rglob("*")) == before
        message = str(caught.value)
        for text in more:
            assert str(text) in message
        return message


@dataclass(frozen=True)
class Variant:
    """A rule with options that matter, and what it is given.

    Attributes:
        rule: with its options.
        evidence: importance, masks, units or None.
        num_models: None for new and historical.
        base: whether there is one.
        parent: where the historical task vector starts.
        keeps_equal: whether models that are all the base's equal give just that.
    """

    rule: FusionOptions
    evidence: str | None = None
    num_models: int | None = None
    base: bool = True
    parent: str | None = None
    keeps_equal: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        return TWO if self.num_models is None else roles_of(self.num_models)

    def write(self, folder: Path, **how: Any) -> Files:
        """All that it reads."""
        files = Files(folder, self.roles).write(**{"shapes": VARIED, **how})
        if self.evidence == "masks":
            files.make_masks(important_fraction=0.4)
        if self.evidence == "units":
            files.make_units()
        return files

    def options(self) -> dict[str, Any]:
        """For :meth:`Files.merge`."""
        return {
            "rule": self.rule,
            "evidence": self.evidence,
            "base": self.base,
            "historical_parent": self.parent,
        }


def _variants() -> Iterator[tuple[str, Variant]]:
    def rule(name: str, **options: Any) -> FusionOptions:
        return FusionOptions(rule=name, **options)

    kif_r = rule("recurrent-kif")
    strict = rule(
        "recurrent-kif", scope="tensor", redundant="drop", important_fraction=0.5,
        shared_weights=(1.0, 0.75),
    )  # fmt: skip
    shares = rule("recurrent-kif", weights=(0.5, 2.0, 1.0), important_fraction=0.4)
    yield "recurrent-kif", Variant(kif_r, "importance", parent="new")
    yield "recurrent-kif, tensor, drop", Variant(strict, "importance", parent="base")
    yield "recurrent-kif, masks", Variant(kif_r, "masks", parent="new")
    yield "recurrent-kif, units", Variant(kif_r, "units", parent="base")
    yield "recurrent-kif of 3", Variant(shares, "importance", 3)
    yield "recurrent-kif of 3, masks", Variant(shares, "masks", 3)
    yield "recurrent-kif of 3, units", Variant(shares, "units", 3)
    dropping = rule("recurrent-kif", weights=(1.0,) * 4, redundant="drop", scope="tensor")
    yield "recurrent-kif of 4, tensor, drop", Variant(dropping, "importance", 4)
    adaptive = rule("recurrent-kif-adaptive", temperature=0.4)
    yield "recurrent-kif-adaptive", Variant(adaptive, "importance", parent="new")
    yield "recurrent-kif-adaptive of 3", Variant(adaptive, "importance", 3)
    yield "recurrent-kif-adaptive of 3, units", Variant(adaptive, "units", 3)
    yield "average", Variant(rule("average"), parent="new")
    yield "average of 3", Variant(rule("average"), num_models=3)
    kif = rule("kif", important_fraction=0.5)
    yield "kif", Variant(kif, "importance")
    yield "kif, masks", Variant(rule("kif", shared_weights=(0.25, 0.75)), "masks")
    yield "kif, units, no base", Variant(kif, "units", base=False)
    yield "kif-adaptive", Variant(rule("kif-adaptive"), "importance")
    yield "kif-adaptive, units", Variant(rule("kif-adaptive", temperature=1.5), "units")
    weights = (1.0, 0.3, 2.2)
    yield "linear", Variant(rule("linear"), num_models=2)
    yield "linear, no base", Variant(rule("linear", weights=weights), num_models=3, base=False)
    plain = rule("linear", weights=weights, normalise=False)
    yield "linear, plain sum", Variant(plain, num_models=3, keeps_equal=False)
    arithmetic = rule("task-arithmetic", weights=(1.0, -0.5, 0.3), scale=0.7)
    yield "task-arithmetic", Variant(arithmetic, num_models=3)
    yield "ties", Variant(rule("ties"), num_models=3)
    ties = rule("ties", density=0.35, scope="tensor", weights=weights, scale=0.6)
    yield "ties, tensor, weights", Variant(ties, num_models=3)
    yield "ties of two sides", Variant(rule("ties"), parent="new")
    yield "magmax", Variant(rule("magmax", scale=1.3), num_models=3)


VARIANTS: Mapping[str, Variant] = dict(_variants())

assert {variant.rule.rule for variant in VARIANTS.values()} == set(RULES)


def every_variant(test: Callable[..., None]) -> Callable[..., None]:
    """Parametrise a test by all of them."""
    return pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)(test)


def every_rule(test: Callable[..., None]) -> Callable[..., None]:
    """Parametrise a test by one or two variants of each rule: with all kinds of inputs."""
    first = {variant.rule.rule: name for name, variant in reversed(VARIANTS.items())}
    more = ("recurrent-kif of 3, masks", "kif, units, no base", "linear, no base")
    chosen = {name: VARIANTS[name] for name in [*reversed(first.values()), *more]}
    return pytest.mark.parametrize("variant", chosen.values(), ids=chosen)(test)


def cut_small(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Have all phases of a merge work in pieces of at most so many bytes."""
    patch.setattr(pieces_module, "CPU_PIECE_BYTES", num_bytes)
    patch.setattr(merge_plan_module, "MOST_PIECE_BYTES", num_bytes)
    patch.setattr(merge_plan_module, "LEAST_PIECE_BYTES", 1)
    patch.setattr(selection_module, "COUNTED_BYTES", num_bytes)
    patch.setattr(selection_module, "LEAST_COUNTED_BYTES", 1)


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names, dtypes, shapes and bits; 0.0 and -0.0 differ."""
    return left.keys() == right.keys() and all(
        (left[n].dtype, left[n].shape) == (right[n].dtype, right[n].shape)
        and torch.equal(
            left[n].contiguous().reshape(-1).view(torch.uint8),
            right[n].contiguous().reshape(-1).view(torch.uint8),
        )
        for n in left
    )


def loaded_without_a_word(auto_class: Any, directory: Path) -> Any:
    """A model that transformers loads and finds nothing to say of: no warning, nothing missing."""
    handler = _Kept()
    logger = logging.getLogger("transformers")  # which passes nothing on
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # commands of an earlier test have made it quieter
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = auto_class.from_pretrained(directory, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not handler.messages, handler.messages
    assert not any(info.values()), info
    return model


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
