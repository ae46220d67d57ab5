"""Merges shared by several ranks: the bytes of one process, whatever the rule."""

import faults
import folders
import merges
import pytest
import ranked
import safetensors.torch
import tiny
import torch
from merges import VARIANTS, Files

from kifmerge.checkpoint import digest as digest_module
from kifmerge.checkpoint.ranks import ALONE, shares
from kifmerge.checkpoint.source import FolderSource
from kifmerge.fusion.rules import FusionOptions
from kifmerge.phases.prune import Prune, PruneInputs, PruneOptions

FROZEN = {"z.step": (3,), "y.frozen": (4, 5)}


def opened(folder, variant, **options):
    """The merge of a variant, from what :func:`written` wrote."""
    files = Files(folder, variant.roles)
    return files.open(**{**variant.options(), **options})


def written(folder, variant, **how):
    """What a variant reads, the base in four files, the models in others."""
    shards = (4, 3, 1, 2, 5)[: 1 + len(variant.roles)]
    return variant.write(folder, shards=shards, snapshot_shards=2, **how)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Name -> merge, and what one process makes of it."""
    root = tmp_path_factory.mktemp("cases")
    found = {}
    for number, (name, variant) in enumerate(VARIANTS.items()):
        folder = root / str(number)
        written(folder, variant)
        options = ({}, {"shard_bytes": 200}, {"shard_bytes": 10**9})[number % 3]
        found[name] = (folder, variant, options)
        opened(folder, variant, **options).run(folder / "alone")
    return found


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_of_one_process(cases, num_ranks):
    def merge(ranks, say):
        for folder, variant, options in cases.values():
            out = folder / f"by-{ranks.size}"
            figures, is_new = opened(folder, variant, **options).run(out, ranks=ranks)
            say([figures, is_new])

    told = [end.text.splitlines() for end in ranked.together(num_ranks, merge)]
    assert len(told[0]) == len(cases)
    assert all(of_rank == told[0] for of_rank in told)
    for name, (folder, _, _) in cases.items():
        expected = faults.content(folder / "alone")
        assert len(expected) > 3, name
        assert faults.content(folder / f"by-{num_ranks}") == expected, name
        assert not list(folder.glob(".*")), name


def test_adapters_and_tensors_without_scores(tmp_path):
    for seed, role in enumerate(("base", *merges.TWO)):
        tiny.with_lora(tiny.llama(), seed).save_pretrained(tmp_path / f"lora/{role}")
    kept = safetensors.torch.load_file(tmp_path / "lora/base/adapter_model.safetensors")
    for seed, role in enumerate(merges.TWO):
        folders.snapshot(tmp_path / f"lora/{role}-importance", seed, kept)
    states = [
        {**folders.random_tensors(seed, merges.SHAPES), **folders.random_tensors(seed, FROZEN)}
        for seed in range(3)
    ]
    files = Files(tmp_path / "frozen").write(states=states, shards=(3, 2, 1))
    for seed, role in enumerate(merges.TWO):
        scored = {name: states[0][name] for name in merges.SHAPES}
        folders.snapshot(files.folder / f"{role}-importance", seed, scored)

    def both(ranks, out):
        adapters = Files(tmp_path / "lora").open(FusionOptions(), shard_bytes=200)
        frozen = Files(files.folder).open(FusionOptions(scope="tensor"), unscored="average")
        return [
            m.run(tmp_path / f"{out}-{n}", ranks=ranks) for n, m in enumerate((adapters, frozen))
        ]

    figures = both(ALONE, "alone")
    assert [found["num_unscored_tensors"] for found, _ in figures] == [0, 2]
    ranked.together(2, lambda ranks, say: both(ranks, "shared"))
    for number in (0, 1):
        expected = faults.content(tmp_path / f"alone-{number}")
        assert faults.content(tmp_path / f"shared-{number}") == expected
    assert len(list((tmp_path / "shared-0").glob("*.safetensors"))) > 1


def test_prunings(tmp_path):
    files = Files(tmp_path).write(
        torch.bfloat16, shards=(4, 2, 1), shapes=merges.VARIED, snapshot_shards=3
    )
    files.make_units()
    checkpoints = {"model": tmp_path / "new", "base": tmp_path / "base"}
    snapshot, units = tmp_path / "new-importance", tmp_path / "new-units"
    cases = [
        (PruneInputs(importance=snapshot), PruneOptions(important_fraction=0.4)),
        (PruneInputs(importance=snapshot, **checkpoints), PruneOptions(scope="tensor")),
        (PruneInputs(units=units, **checkpoints), PruneOptions(important_fraction=0.5)),
    ]

    def prune(ranks, out):
        return [
            Prune(inputs, options, num_workers=1).run(tmp_path / f"{out}-{number}", ranks=ranks)
            for number, (inputs, options) in enumerate(cases)
        ]

    figures = prune(ALONE, "alone")
    assert all(found["num_important"] > 0 for found, _ in figures)
    for num_ranks in (2, 3):
        ended = ranked.together(num_ranks, lambda ranks, say: say(prune(ranks, f"by-{ranks.size}")))
        assert [end.said() for end in ended] == [[list(found) for found in figures]] * num_ranks
        for number in range(len(cases)):
            expected = faults.content(tmp_path / f"alone-{number}")
            assert faults.content(tmp_path / f"by-{num_ranks}-{number}") == expected


def test_first_rank_tells_progress_of_all(tmp_path):
    variant = VARIANTS["recurrent-kif"]
    files = written(tmp_path, variant)

    def merge(ranks, say):
        told = []
        opened(tmp_path, variant).run(tmp_path / "out", ranks=ranks, on_progress=told.append)
        say(told)

    first, second = (end.said() for end in ranked.together(2, merge))
    assert sum(first) == sum(value.numel() for value in files.states[0].values())
    assert second == []


def count_reads(stems):
    """From now on, bytes read of each kind of files, by stem."""
    read = dict.fromkeys(stems, 0)
    whole = FolderSource.read

    def counted(self, name, start, stop):
        values = whole(self, name, start, stop)
        if self.stem in read:
            read[self.stem] += values.nbytes
        return values

    FolderSource.read = counted
    # What was not read whole is read again for its digest, past the source.
    read["digest"] = 0
    again = digest_module._tensor_digest

    def counted_again(file, tensor):
        read["digest"] += tensor.info.nbytes
        return again(file, tensor)

    digest_module._tensor_digest = counted_again
    return read


@pytest.mark.parametrize("name", ["recurrent-kif", "recurrent-kif, tensor, drop", "kif", "ties"])
def test_passes_are_shared_and_not_repeated(tmp_path, name):
    variant = VARIANTS[name]
    files = written(tmp_path, variant, shapes={f"{n}.weight": (20, 10 + n) for n in range(20)})
    num_bytes = sum(value.nbytes for value in files.states[0].values())

    def merge(ranks, say):
        read = count_reads(["importance", "model"])
        opened(tmp_path, variant).run(tmp_path / f"by-{ranks.size}", ranks=ranks)
        say(read)

    child = faults.fork(lambda say: merge(ALONE, say))
    alone = child.end().said()
    shared = [end.said() for end in ranked.together(2, merge)]
    for stem, total in alone.items():
        assert sum(read[stem] for read in shared) == total
        # What no rule looks at is read by the first rank alone.
        assert stem == "digest" or all(read[stem] <= 0.6 * total for read in shared)
    assert alone["model"] >= 2 * num_bytes


def test_finished_merge_is_not_made_again_and_another_is_refused(tmp_path):
    files = Files(tmp_path).write(shards=(3, 1, 1))
    files.merge(FusionOptions())
    before = {path: folders.state(path) for path in (tmp_path / "out").iterdir()}

    def again(ranks, say):
        say(files.open(FusionOptions()).run(tmp_path / "out", ranks=ranks))

    for end in ranked.together(2, again):
        assert end.said()[1] is False
    assert {path: folders.state(path) for path in (tmp_path / "out").iterdir()} == before
    told = ranked.command(2, ["merge", "--rule", "average", *paths(tmp_path)])
    assert [said.code for said in told] == [3, 3]
    assert "is not empty" in told[0].err
    assert told[1].err == ""


def paths(folder, out="out"):
    """Arguments that name base, models and output."""
    roles = [part for role in ("base", *merges.TWO) for part in (f"--{role}", folder / role)]
    return [*roles, "--out", folder / out]


def test_one_rank_that_torchrun_started_is_as_without(tmp_path):
    files = Files(tmp_path).write(shards=(3, 1, 1))
    files.merge(FusionOptions(rule="average"), "alone")
    (said,) = ranked.command(1, ["merge", "--rule", "average", *paths(tmp_path), "--quiet"])
    assert said.code == 0
    assert faults.content(tmp_path / "out") == faults.content(tmp_path / "alone")


@pytest.mark.parametrize("sizes", [[], [5], [1, 1, 1, 1], [3, 1, 4, 1, 5, 9, 2, 6], [0, 0, 7]])
@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_hold_all_in_order_and_are_about_as_large(sizes, num_shares):
    items = list(enumerate(sizes))
    dealt = shares(items, lambda item: item[1], num_shares)
    assert sorted(item for share in dealt for item in share) == items
    assert all(share == sorted(share) for share in dealt)
    totals = [sum(size for _, size in share) for share in dealt]
    assert max(totals) - min(totals) <= max(sizes, default=0)


def test_repository_is_made_by_one_process(tmp_path):
    Files(tmp_path).write()
    arguments = ["merge", "--rule", "average", *paths(tmp_path)[:-1], "hf://me/out"]
    told = ranked.command(2, arguments)
    assert [said.code for said in told] == [2, 2]
    assert "a repository is made by one process" in " ".join(ranked.told_once(told).split())
