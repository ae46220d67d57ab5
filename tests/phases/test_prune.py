import itertools
import json

import folders
import oracles
import pytest
import torch

from kifmerge.checkpoint.mask import MaskSource
from kifmerge.checkpoint.provenance import digest, read_provenance
from kifmerge.checkpoint.snapshot import read_snapshot, write_snapshot
from kifmerge.errors import CheckpointError, RunError
from kifmerge.phases.prune import Prune, PruneOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def importance(tmp_path):
    return folders.snapshot(tmp_path / "importance", 0, folders.random_tensors(0), role="new")


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
    options = PruneOptions(important_fraction=float(fraction), scope=scope)
    figures, is_new = Prune(importance, options).run(tmp_path / "mask")
    expected = expected_masks(importance, fraction, scope)
    found = masks_of(tmp_path / "mask")
    assert is_new
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert figures["num_important"] == sum(int(mask.sum()) for mask in found.values())
    assert figures["num_parameters"] == sum(mask.numel() for mask in found.values())


def test_details_say_how_it_was_made(importance, tmp_path):
    Prune(importance, PruneOptions(important_fraction=0.3)).run(tmp_path / "mask")
    details = json.loads((tmp_path / "mask/mask.json").read_text())
    scores = [score for _, score in read_snapshot(importance).scores()]
    values = [value for score in scores for value in score.flatten().tolist()]
    assert details["threshold"] == oracles.threshold(values, "0.3")
    assert (details["fraction"], details["scope"]) == (0.3, "global")
    assert details["snapshot_digest"] == digest(importance)
    assert details["made_by"]["command"] == "prune"
    assert list(details["made_by"]["parents"]) == ["importance"]


def test_thresholds_of_each_tensor_are_kept(importance, tmp_path):
    figures, _ = Prune(importance, PruneOptions(scope="tensor")).run(tmp_path / "mask")
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
        pruning = Prune(
            importance, PruneOptions(**options), model=folder / "model", base=folder / "base"
        )
        return pruning.run(out)

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

    @pytest.mark.parametrize("given", ["model", "base"])
    def test_one_without_the_other(self, importance, given):
        with pytest.raises(ValueError, match="both a model and its base"):
            Prune(importance, PruneOptions(), **{given: importance})


def test_equal_scores_warn(tmp_path):
    write_snapshot(tmp_path / "s", {"score/w": torch.zeros(9)}, {"role": "historical"})
    with pytest.warns(UserWarning, match="the historical importance scores are all equal"):
        figures, _ = Prune(tmp_path / "s", PruneOptions()).run(tmp_path / "mask")
    assert figures["num_important"] == 0


def test_scores_that_are_not_finite(tmp_path):
    write_snapshot(tmp_path / "s", {"score/w": torch.tensor([1.0, float("nan")])}, {})
    with pytest.raises(CheckpointError, match=r"importance\.safetensors: w: element 1 is nan"):
        Prune(tmp_path / "s", PruneOptions()).run(tmp_path / "mask")


def test_made_again_does_nothing_and_other_options_are_refused(importance, tmp_path):
    figures, _ = Prune(importance, PruneOptions()).run(tmp_path / "mask")
    before = (tmp_path / "mask").stat()
    assert Prune(importance, PruneOptions()).run(tmp_path / "mask") == (figures, False)
    other = Prune(importance, PruneOptions(important_fraction=0.5))
    with pytest.raises(RunError, match="made by another prune command"):
        other.run(tmp_path / "mask")
    assert (tmp_path / "mask").stat() == before
    assert other.run(tmp_path / "mask", overwrite=True)[1]


def test_interrupted_pruning_leaves_nothing(importance, tmp_path):
    calls = itertools.count()

    def fail(num_marked):
        next(calls)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Prune(importance, PruneOptions()).run(tmp_path / "mask", on_progress=fail)
    assert next(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_inputs_are_not_overwritten_with_their_folder(importance, tmp_path):
    with pytest.raises(RunError, match="holds an input"):
        Prune(importance, PruneOptions()).run(tmp_path, overwrite=True)


@pytest.mark.parametrize("options", [{"important_fraction": 1.5}, {"scope": "tensors"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PruneOptions(**options)


def test_plan_counts_bytes(importance):
    numel = sum(value.numel() for value in folders.random_tensors(0).values())
    plan = Prune(importance, PruneOptions()).plan()
    assert plan["num_parameters"] == numel
    assert plan["read_bytes"] == 4 * 8 * numel
    assert plan["write_bytes"] == 5 + 2 + 1 + 0 + 1
