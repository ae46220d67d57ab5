"""Pruning: masks against brute force, and checkpoints with only what is important changed."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import folders
import merges
import numpy as np
import oracles
import pytest
import synthetic
import torch

from kifmerge.checkpoint.digest import digest
from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.provenance import read_provenance
from kifmerge.checkpoint.snapshot import read_snapshot, write_snapshot
from kifmerge.errors import CheckpointError, RunError
from kifmerge.fusion import provisional
from kifmerge.fusion.unit_scores import GroupOptions
from kifmerge.phases import prune_plan
from kifmerge.phases.group import Group
from kifmerge.phases.prune import Prune, PruneInputs, PruneOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["once", "twice", "thrice"])
def reading(request, monkeypatch):
    """How often scores are read: those that are few once, and those near the threshold thrice."""
    if request.param != "once":
        monkeypatch.setattr(prune_plan, "_KEPT_BYTES", 0)
        most_aside = {"twice": 1.0, "thrice": -1.0}[request.param]
        monkeypatch.setattr(provisional, "_MOST_ASIDE_FRACTION", most_aside)
    return request.param


@pytest.fixture
def importance(tmp_path):
    return folders.snapshot(tmp_path / "importance", 0, folders.random_tensors(0), role="new")


def prune(importance, out, *, overwrite=False, num_workers=1, on_progress=None, **options):
    """The mask of a snapshot; its model and base too where they are given."""
    inputs = {key: options.pop(key) for key in ("model", "base", "units") if key in options}
    pruning = Prune(
        PruneInputs(importance=importance, **inputs), PruneOptions(**options),
        num_workers=num_workers,
    )  # fmt: skip
    more = {} if on_progress is None else {"on_progress": on_progress}
    return pruning.run(out, overwrite=overwrite, **more)


def masks_of(directory):
    source = MaskSource(directory)
    infos = {name: source.info(name) for name in source.names()}
    return {n: source.read(n, 0, info.numel).view(info.shape) for n, info in infos.items()}


def expected_masks(importance, fraction, scope):
    scores = dict(read_snapshot(importance).scores())
    if scope == "global":
        return dict(zip(scores, oracles.masks(list(scores.values()), fraction), strict=True))
    return {
        name: oracles.masks([score], fraction)[0] if score.numel() else score > 0
        for name, score in scores.items()
    }


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("fraction", ["0.2", "0.05", "0.5", "0", "1"])
def test_mask_is_the_oracle_s(importance, tmp_path, scope, fraction):
    figures, is_new = prune(
        importance, tmp_path / "mask", important_fraction=float(fraction), scope=scope
    )
    expected = expected_masks(importance, fraction, scope)
    found = masks_of(tmp_path / "mask")
    assert is_new
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert figures["num_important"] == sum(int(mask.sum()) for mask in found.values())
    assert figures["num_parameters"] == sum(mask.numel() for mask in found.values())


def test_details_say_how_it_was_made(importance, tmp_path):
    prune(importance, tmp_path / "mask", important_fraction=0.3)
    details = json.loads((tmp_path / "mask/mask.json").read_text())
    scores = [score for _, score in read_snapshot(importance).scores()]
    values = [value for score in scores for value in score.flatten().tolist()]
    assert details["threshold"] == oracles.threshold(values, "0.3")
    assert (details["fraction"], details["scope"]) == (0.3, "global")
    assert details["snapshot_digest"] == digest(importance)
    assert details["made_by"]["command"] == "prune"
    assert list(details["made_by"]["parents"]) == ["importance"]


def test_thresholds_of_each_tensor_are_kept(importance, tmp_path):
    figures, _ = prune(importance, tmp_path / "mask", scope="tensor")
    details = json.loads((tmp_path / "mask/mask.json").read_text())
    scores = dict(read_snapshot(importance).scores())
    assert details["threshold"] == {
        name: oracles.threshold(score.flatten().tolist(), "0.2")
        for name, score in scores.items()
        if score.numel()
    }
    assert "threshold" not in figures


class TestCheckpoint:
    def prune(self, importance, out, **options):
        folder = importance.parent
        return prune(importance, out, model=folder / "model", base=folder / "base", **options)

    def write(self, importance, dtype=torch.float32, **extra):
        made = {}
        for number, role in enumerate(("base", "model")):
            made[role] = {
                **folders.random_tensors(5 + number, dtype=dtype),
                **{name: values[number] for name, values in extra.items()},
            }
            provenance = {"labels": ["a"], "model": {"kind": "classifier"}}
            folders.save(
                importance.parent / role, made[role], num_shards=2 * (role == "base"),
                provenance=provenance,
            )  # fmt: skip
        return made

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_what_is_important_and_goes_back_elsewhere(self, importance, tmp_path, dtype):
        made = self.write(importance, dtype)
        self.prune(importance, tmp_path / "out", important_fraction=0.5)
        found, masks = folders.load(tmp_path / "out/checkpoint"), masks_of(tmp_path / "out")
        assert found.keys() == made["base"].keys()
        for name, value in found.items():
            expected = torch.where(masks[name], made["model"][name], made["base"][name])
            assert value.dtype == dtype
            assert torch.equal(value, expected)

    def test_is_laid_out_like_its_base(self, importance, tmp_path):
        self.write(importance)
        self.prune(importance, tmp_path / "out")
        assert sorted(p.name for p in (tmp_path / "out/checkpoint").iterdir()) == sorted(
            p.name for p in (tmp_path / "base").iterdir()
        )
        found = read_provenance(tmp_path / "out/checkpoint")
        assert (found["labels"], found["made_by"]["command"]) == (["a"], "prune")
        assert list(found["made_by"]["parents"]) == ["importance", "model", "base"]

    @pytest.mark.parametrize(("unscored", "expected"), [("base", 1.0), ("model", 2.0)])
    def test_tensors_without_scores(self, importance, tmp_path, unscored, expected):
        self.write(importance, frozen=[torch.full((3,), x) for x in (1.0, 2.0)])
        with pytest.raises(CheckpointError, match=r"(?s)frozen: float32 \[3\].*--unscored"):
            self.prune(importance, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        self.prune(importance, tmp_path / "out", unscored=unscored)
        assert folders.load(tmp_path / "out/checkpoint")["frozen"].tolist() == [expected] * 3

    def test_weights_that_are_not_finite(self, importance, tmp_path):
        made = self.write(importance)
        made["model"]["a.bias"][1] = float("nan")
        path = folders.save(tmp_path / "model", made["model"]) / "model.safetensors"
        with pytest.raises(CheckpointError, match=rf"{path}: a\.bias: element 1 is nan"):
            self.prune(importance, tmp_path / "out")

    def test_model_and_base_that_differ(self, importance, tmp_path):
        made = self.write(importance)
        folders.save(tmp_path / "model", {**made["model"], "d": torch.zeros(2)})
        with pytest.raises(CheckpointError, match=r"d: base float32 \[\], model float32 \[2\]"):
            self.prune(importance, tmp_path / "out")

    def test_snapshot_of_another_model(self, importance, tmp_path):
        self.write(importance)
        folders.snapshot(importance, 0, {"other": torch.zeros(2)})
        with pytest.raises(CheckpointError, match=r"(?s)is of another model.*other: \[2\]"):
            self.prune(importance, tmp_path / "out")

    @pytest.mark.parametrize("num_shards", [0, 3])
    @pytest.mark.parametrize("num_workers", [0, 3])
    @pytest.mark.parametrize("num_bytes", [1, 100])
    def test_pieces_workers_and_shards_never_change_a_bit(
        self, importance, tmp_path, monkeypatch, num_shards, num_workers, num_bytes
    ):
        made = self.write(importance, torch.bfloat16)
        self.prune(importance, tmp_path / "whole")
        merges.cut_small(monkeypatch, num_bytes)
        folders.snapshot(importance, 0, folders.random_tensors(0), num_shards=3, role="new")
        shutil.rmtree(tmp_path / "model")
        folders.save(
            tmp_path / "model", made["model"], num_shards=num_shards,
            provenance={"labels": ["a"], "model": {"kind": "classifier"}},
        )  # fmt: skip
        self.prune(importance, tmp_path / "cut", num_workers=num_workers)
        found, expected = (synthetic.files(tmp_path / d / "checkpoint") for d in ("cut", "whole"))
        assert found == expected
        # A mask lies in its file in the order of the snapshot's.
        assert digest(tmp_path / "cut") == digest(tmp_path / "whole")

    def test_what_it_says_of_inputs_and_files_is_so(self, importance, tmp_path):
        self.write(importance)
        self.prune(importance, tmp_path / "out")
        made = read_provenance(tmp_path / "out/checkpoint")
        assert {r: p["digest"] for r, p in made["made_by"]["parents"].items()} == {
            role: digest(tmp_path / role) for role in ("importance", "model", "base")
        }
        details = json.loads((tmp_path / "out/mask.json").read_text())
        assert details["made_by"] == made["made_by"]
        assert made["files"] == {
            path.name: {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in (tmp_path / "out/checkpoint").glob("*.safetensors")
        }

    def test_infinity_is_carried_on_where_that_is_meant(self, importance, tmp_path):
        made = self.write(importance)
        made["model"]["b.weight"].fill_(float("inf"))
        folders.save(tmp_path / "model", made["model"])
        self.prune(importance, tmp_path / "out", nonfinite="keep")
        mask = masks_of(tmp_path / "out")["b.weight"]
        found = folders.load(tmp_path / "out/checkpoint")["b.weight"]
        assert torch.equal(found.isinf(), mask)
        assert torch.equal(found[~mask], made["base"]["b.weight"][~mask])

    def test_model_of_another_dtype_by_permission(self, importance, tmp_path):
        made = self.write(importance)
        half = {n: t.to(torch.float8_e4m3fn if n == "a.bias" else torch.bfloat16)
                for n, t in made["model"].items()}  # fmt: skip
        folders.save(tmp_path / "model", half)
        with pytest.raises(CheckpointError, match="--allow dtype"):
            self.prune(importance, tmp_path / "out")
        self.prune(importance, tmp_path / "out", allowed=("dtype",))
        masks = masks_of(tmp_path / "out")
        for name, value in folders.load(tmp_path / "out/checkpoint").items():
            expected = torch.where(masks[name], half[name].float(), made["base"][name])
            assert torch.equal(value, expected)

    @pytest.mark.parametrize("given", ["model", "base"])
    def test_one_without_the_other(self, importance, given):
        with pytest.raises(ValueError, match="both a model and its base"):
            PruneInputs(importance=importance, **{given: importance})


def test_equal_scores_warn(tmp_path):
    write_snapshot(tmp_path / "s", {"score/w": torch.zeros(9)}, {"role": "historical"})
    with pytest.warns(UserWarning, match="the historical importance scores are all equal"):
        figures, _ = prune(tmp_path / "s", tmp_path / "mask")
    assert figures["num_important"] == 0


def test_scores_that_are_not_finite(tmp_path):
    write_snapshot(tmp_path / "s", {"score/w": torch.tensor([1.0, float("nan")])}, {})
    with pytest.raises(CheckpointError, match=r"importance\.safetensors: w: element 1 is nan"):
        prune(tmp_path / "s", tmp_path / "mask")


def test_made_again_does_nothing_and_other_options_are_refused(importance, tmp_path):
    figures, _ = prune(importance, tmp_path / "mask")
    before = folders.state(tmp_path / "mask")
    assert prune(importance, tmp_path / "mask") == (figures, False)
    with pytest.raises(RunError, match="made by another prune command"):
        prune(importance, tmp_path / "mask", important_fraction=0.5)
    assert folders.state(tmp_path / "mask") == before
    _, is_new = prune(importance, tmp_path / "mask", important_fraction=0.5, overwrite=True)
    assert is_new


def test_snapshot_that_has_changed_makes_another_mask(importance, tmp_path):
    prune(importance, tmp_path / "mask")
    folders.snapshot(importance, 9, folders.random_tensors(0), role="new")
    with pytest.raises(RunError, match="made by another prune command"):
        prune(importance, tmp_path / "mask")


def test_folder_of_somebody_else_is_left_alone(importance, tmp_path):
    (tmp_path / "mask").mkdir()
    (tmp_path / "mask/thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not of ours"):
        prune(importance, tmp_path / "mask")


@pytest.mark.parametrize("num_workers", [0, 3])
def test_interrupted_pruning_leaves_nothing(importance, tmp_path, num_workers):
    calls = itertools.count()

    def fail(num_marked):
        next(calls)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(importance, tmp_path / "mask", on_progress=fail, num_workers=num_workers)
    assert next(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_inputs_are_not_overwritten_with_their_folder(importance, tmp_path):
    with pytest.raises(RunError, match="holds an input"):
        prune(importance, tmp_path, overwrite=True)


@pytest.mark.parametrize("options", [{"important_fraction": 1.5}, {"scope": "tensors"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PruneOptions(**options)


class TestUnits:
    """Masks of skill units, which take the shapes of a model."""

    @pytest.fixture
    def units(self, importance, tmp_path):
        for number, role in enumerate(("base", "model")):
            folders.save(tmp_path / role, folders.random_tensors(5 + number))
        Group(importance, GroupOptions(unit="tensor")).run(tmp_path / "units")
        return tmp_path / "units"

    @pytest.mark.parametrize("fraction", [0.2, 0.5])
    def test_mask_is_that_of_the_units_above_the_percentile(self, units, tmp_path, fraction):
        figures, _ = prune(
            None, tmp_path / "out", units=units, model=tmp_path / "model", base=tmp_path / "base",
            important_fraction=fraction,
        )  # fmt: skip
        scores = dict(read_snapshot(tmp_path / "importance").scores())
        means = {n: s.double().mean().item() for n, s in scores.items() if s.numel()}
        threshold = np.quantile(list(means.values()), 1 - fraction)
        masks = masks_of(tmp_path / "out")
        assert {n: bool(m.all()) for n, m in masks.items()} == {
            name: mean > threshold for name, mean in means.items()
        }
        assert all(m.all() or not m.any() for m in masks.values())
        base, model = (folders.load(tmp_path / role) for role in ("base", "model"))
        for name, value in folders.load(tmp_path / "out/checkpoint").items():
            whose = model if name in masks and masks[name].all() else base
            assert torch.equal(value, whose[name])
        assert figures["scope"] == "units"
        assert figures["num_important"] == sum(int(mask.sum()) for mask in masks.values())

    def test_record_names_them(self, units, tmp_path):
        prune(None, tmp_path / "out", units=units, model=tmp_path / "model", base=tmp_path / "base")
        details = json.loads((tmp_path / "out/mask.json").read_text())
        assert details["made_by"]["parents"]["units"]["digest"] == digest(units)
        assert details["snapshot_digest"] == digest(units)

    def test_thresholds_of_tensors_mean_nothing(self, units, tmp_path):
        with pytest.raises(ValueError, match="units have one threshold"):
            prune(None, tmp_path / "out", units=units, model=tmp_path / "model",
                  base=tmp_path / "base", scope="tensor")  # fmt: skip


class TestInputs:
    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ((), "from an importance snapshot or from skill units"),
            (("importance", "units"), "from an importance snapshot or from skill units"),
            (("importance", "model"), "both a model and its base"),
            (("units",), "units tell no shapes: a mask of them takes a model and its base"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_does_not_fit_together(self, tmp_path, given, match):
        with pytest.raises(ValueError, match=match):
            PruneInputs(**dict.fromkeys(given, tmp_path))

    def test_tensors_without_scores_are_those_of_a_model(self, importance):
        with pytest.raises(ValueError, match="only where a model is pruned"):
            Prune(PruneInputs(importance=importance), PruneOptions(unscored="base"))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts bytes")
@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("num_unscored", [0, 1])
def test_plan_counts_what_is_truly_read_and_written(tmp_path, with_model, num_unscored, reading):
    if reading == "thrice":
        pytest.skip("known only when the scores are read")
    shapes = {"a.weight": (700, 301), "b.weight": (500, 300)}
    made = [folders.random_tensors(seed, shapes) for seed in (1, 2)]
    made[1]["b.weight"] = made[1]["b.weight"] if not num_unscored else made[0]["b.weight"]
    for role, tensors in zip(("base", "model"), made, strict=True):
        folders.save(tmp_path / role, tensors, num_shards=2)
    scored = dict(list(made[0].items())[: 2 - num_unscored])
    folders.snapshot(tmp_path / "importance", 0, scored)
    given = {"model": tmp_path / "model", "base": tmp_path / "base"} if with_model else {}
    inputs = PruneInputs(importance=tmp_path / "importance", **given)
    pruning = Prune(inputs, PruneOptions(), num_workers=2)
    plan, before = pruning.plan(), counted()
    pruning.run(tmp_path / "out")
    read, written = (after - earlier for after, earlier in zip(counted(), before, strict=True))
    # Headers, JSON and provisional marks; one pass more would be millions.
    assert plan.read_bytes <= read <= plan.read_bytes + 300_000
    assert plan.write_bytes <= written <= plan.write_bytes + 300_000


def counted():
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    counters = {name: int(value) for name, value in lines}
    return counters["rchar"], counters["wchar"]


def test_plan_counts_bytes(importance, reading):
    numel = sum(value.numel() for value in folders.random_tensors(0).values())
    plan = Prune(PruneInputs(importance=importance), PruneOptions()).plan()
    assert plan.num_parameters == numel
    assert plan.read_bytes == (1 if reading == "once" else 2) * 8 * numel
    assert plan.write_bytes == 5 + 2 + 1 + 0 + 1
