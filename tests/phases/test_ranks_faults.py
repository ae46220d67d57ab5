"""Ranks that die, fail or disagree: all end, one tells why, finished files stay."""

import os
import platform
import signal
import time
from pathlib import Path

import faults
import folders
import merges
import pytest
import ranked
import torch
from merges import Files

from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.fusion.rules import FusionOptions

SHAPES = {f"{number}.weight": (30, 20) for number in range(8)}
ROLES = ("base", *merges.TWO)


@pytest.fixture
def files(tmp_path):
    """Models in four files each, so that each of two ranks makes two."""
    return Files(tmp_path).write(torch.bfloat16, shards=(4, 4, 4), shapes=SHAPES)


def arguments(folder, *more, out="out"):
    inputs = [part for role in ROLES for part in (f"--{role}", Path(folder) / role)]
    scores = [
        part
        for role in merges.TWO
        for part in (f"--{role}-importance", folder / f"{role}-importance")
    ]
    return [
        "merge", "--rule", "recurrent-kif", *inputs, *scores, "--out", Path(folder) / out,
        "--workers", 1, *more,
    ]  # fmt: skip


def expected(files):
    """What one process makes."""
    files.merge(FusionOptions(), "alone")
    return faults.content(files.folder / "alone")


def hidden(folder, out="out"):
    return folder / f".{out}.unfinished"


def when(fault, what, *, number=1, path=""):
    """What calls ``fault`` at the so manieth change of a kind to a path that holds some text."""
    seen = 0

    def on_change(kind, change):
        nonlocal seen
        if kind == what and path in str(change[0]):
            seen += 1
            if seen == number:
                fault()

    return on_change


def spoil(folder, role, name, value):
    """Put one bad value into a tensor."""
    state = folders.load(folder / role)
    state[name][3, 4] = value
    folders.save(folder / role, {key: state[key] for key in SHAPES}, num_shards=4)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
def test_bad_weight_in_a_share_ends_all_with_the_error_of_one_process(files, name, num_ranks):
    spoil(files.folder, "new", name, float("nan"))
    code, _, err = ranked.in_process(arguments(files.folder))
    told = ranked.command(num_ranks, arguments(files.folder))
    assert [said.code for said in told] == [code] * num_ranks == [3] * num_ranks
    assert f"{name}: element 64 is nan" in err
    assert [said.err for said in told] == [err, *[""] * (num_ranks - 1)]
    assert all(said.out == "" for said in told)
    assert not hidden(files.folder).exists()
    assert not (files.folder / "out").exists()


@pytest.mark.parametrize("again", [1, 2, 3])
def test_killed_rank_ends_all_and_the_merge_goes_on(files, again):
    wanted = expected(files)
    # As soon as its first file is noted.
    dying = {1: when(faults.die, "rename", number=2, path="rank-00001")}
    told = ranked.command(2, arguments(files.folder), on_change=dying)
    assert [said.code for said in told] == [4, -signal.SIGKILL]
    assert "rank 1 on " in told[0].err
    assert "has not been heard of for" in told[0].err
    assert "finished files are kept: --resume goes on from them" in told[0].err
    assert told[0].err.count("\n") == 1
    kept = {path.name: folders.state(path) for path in (hidden(files.folder) / "new").iterdir()}
    assert len(kept) == 3
    resumed = ranked.command(again, arguments(files.folder, "--resume"))
    assert [said.code for said in resumed] == [0] * again
    assert faults.content(files.folder / "out") == wanted
    for name, state in kept.items():
        # A renaming of a folder on the way changes the times of none of its files.
        assert folders.state(files.folder / "out" / name)[:3] == state[:3]
    assert not hidden(files.folder).exists()


def test_killed_first_rank_ends_all_and_the_merge_goes_on(files):
    wanted = expected(files)
    dying = {0: when(faults.die, "flush", number=12)}
    told = ranked.command(2, arguments(files.folder), on_change=dying)
    assert [said.code for said in told] == [-signal.SIGKILL, 4]
    assert "kifmerge: " in told[1].err
    assert told[1].err.count("\n") == 1
    assert any((hidden(files.folder) / "new").iterdir())
    resumed = ranked.command(2, arguments(files.folder, "--resume"))
    assert [said.code for said in resumed] == [0, 0]
    assert faults.content(files.folder / "out") == wanted


def test_rank_that_outlives_the_others_spoils_nothing(files):
    """Another merge has just written all its files when a rank of an earlier one writes on."""

    def merge(rank, say):
        os._exit(ranked.in_process(arguments(files.folder))[0])

    def merge_otherwise(say):
        os._exit(ranked.in_process([*arguments(files.folder), "--redundant", "drop"])[0])

    def stop():
        os.kill(os.getpid(), signal.SIGSTOP)

    files.merge(FusionOptions(redundant="drop"), "alone")
    first, second = ranked.start(2, merge, on_change={1: when(stop, "write", number=2)})
    with first, second:
        second.wait_for_stop()
        first.kill()
        first.end()
        with faults.fork(merge_otherwise, when(stop, "rename", path="index.json")) as other:
            other.wait_for_stop()
            assert len(list((hidden(files.folder) / "new").glob("*.safetensors"))) == 4
            second.kill(signal.SIGCONT)
            assert second.end().code in (3, 4)  # it has lost its folder, and the others
            other.kill(signal.SIGCONT)
            assert other.end().code == 0
    assert faults.content(files.folder / "out") == faults.content(files.folder / "alone")
    assert not hidden(files.folder).exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_full_disk_of_one_rank(files, rank):
    def full():
        raise OSError(28, "No space left on device")

    wanted = expected(files)
    failing = {rank: when(full, "write", number=4)}
    told = ranked.command(2, arguments(files.folder), on_change=failing)
    assert [said.code for said in told] == [4, 4]
    assert f"disk full while writing {files.folder / 'out'}: " in told[0].err
    assert "finished files are kept: --resume goes on from them" in told[0].err
    assert (told[0].err.count("\n"), told[1].err) == (1, "")
    assert ranked.command(1, arguments(files.folder, "--resume"))[0].code == 0
    assert faults.content(files.folder / "out") == wanted


@pytest.mark.parametrize("rank", [0, 1])
def test_bug_is_told_where_it_is(files, rank):
    def broken():
        raise LookupError("a bug")

    told = ranked.command(
        2, arguments(files.folder), on_change={rank: when(broken, "write", number=2)}
    )
    assert [said.code for said in told] == [1, 1]
    assert told[rank].err.rstrip().endswith("LookupError: a bug")
    assert told[1 - rank].err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_from_outside_keeps_finished_files(files, number):
    def slowly():
        time.sleep(0.3)

    def interrupt(children):
        faults.wait_for(lambda: list(hidden(files.folder).glob("new/*.safetensors")))
        faults.wait_for(lambda: list(hidden(files.folder).glob("journal*")))
        for child in children:
            child.kill(number)

    wanted = expected(files)
    slow = {rank: when(slowly, "flush", number=8 - 2 * rank) for rank in (0, 1)}
    told = ranked.command(2, arguments(files.folder), on_change=slow, on_start=interrupt)
    assert [said.code for said in told] == [130, 130]
    assert told[0].err.startswith("kifmerge: interrupted; ")
    assert "finished files are kept: --resume goes on from them" in told[0].err
    assert told[1].err == ""
    ranked.command(2, arguments(files.folder, "--resume"))
    assert faults.content(files.folder / "out") == wanted


def on_hosts(folder):
    """Give each rank a machine of its own: another name, home, temporary and working folder."""

    def prepare(rank):
        host = folder / f"host-{rank}"
        for name in ("home", "tmp", "cwd"):
            (host / name).mkdir(parents=True, exist_ok=True)
        os.environ.update(HOME=str(host / "home"), TMPDIR=str(host / "tmp"))
        os.chdir(host / "cwd")
        platform.node = lambda: f"machine-{rank}"

    return prepare


def test_hosts_that_share_a_file_system(files):
    wanted = expected(files)
    told = ranked.command(3, arguments(files.folder), prepare=on_hosts(files.folder / "hosts"))
    assert [said.code for said in told] == [0, 0, 0]
    assert faults.content(files.folder / "out") == wanted
    assert not [path for path in (files.folder / "hosts").rglob("*") if path.is_file()]


def test_output_that_ranks_do_not_share_is_refused(files):
    relative = [str(a) for a in arguments(files.folder)]
    relative[relative.index("--out") + 1] = "out"
    told = ranked.command(2, relative, prepare=on_hosts(files.folder / "hosts"))
    assert [said.code for said in told] == [3, 3]
    assert "rank 1 on machine-1 does not see" in told[0].err
    assert "written on machine-0" in told[0].err
    assert "on a file system that they share" in told[0].err
    assert told[1].err == ""
    assert not list((files.folder / "hosts").rglob("*unfinished*"))


def test_inputs_that_differ_between_ranks_are_refused(files):
    other = Files(files.folder / "other").write(torch.bfloat16, shards=(4, 4, 4), shapes=SHAPES)
    os.utime(other.folder / "new/model-00001-of-00004.safetensors")

    def relative(rank):
        given = [str(argument) for argument in arguments(files.folder)]
        root = [files.folder, other.folder][rank]
        os.chdir(root)
        return [
            part.removeprefix(f"{files.folder}/") if part != str(files.folder / "out") else part
            for part in given
        ]

    told = ranked.command(2, relative)
    assert [said.code for said in told] == [3, 3]
    assert "rank 1 on" in told[0].err
    assert "would make something else than rank 0" in told[0].err
    assert "inputs, new, files" in told[0].err
    assert not hidden(files.folder).exists()


def test_missing_input_is_told_once(files):
    told = ranked.command(2, ["merge", "--rule", "linear", "--model", "nowhere", "--out", "out"])
    assert [said.code for said in told] == [3, 3]
    assert "nowhere" in told[0].err
    assert told[1].err == ""


def test_occupied_output_is_told_once(files):
    (files.folder / "out").mkdir()
    (files.folder / "out/notes.txt").write_text("mine")
    told = ranked.command(2, arguments(files.folder))
    assert [said.code for said in told] == [3, 3]
    assert "is not empty" in told[0].err
    assert told[1].err == ""


def test_what_would_be_done_is_told_by_rank_0_alone(files):
    told = ranked.command(2, arguments(files.folder, "--dry-run", "--json"))
    assert [said.code for said in told] == [0, 0]
    assert '"num_files": 4' in told[0].out
    assert told[1] == ranked.Said(0, "", "")


def test_warnings_and_results_are_told_once(files):
    for role in merges.TWO:
        zeros = {f"score/{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
        write_snapshot(files.folder / f"{role}-importance", zeros, {})
    told = ranked.command(2, arguments(files.folder, "--json"))
    assert [said.code for said in told] == [0, 0]
    assert '"rule": "recurrent-kif"' in told[0].out
    assert told[0].err.count("the new importance scores are all equal") == 1
    assert (told[1].out, told[1].err) == ("", "")
