"""What changed between two folders: figures against their definitions, and what is said."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import folders
import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kifmerge.checkpoint import pieces as pieces_module
from kifmerge.checkpoint.mask import MaskSink
from kifmerge.checkpoint.snapshot import write_snapshot
from kifmerge.cli import app
from kifmerge.errors import CheckpointError
from kifmerge.phases import diff as diff_module
from kifmerge.phases.diff import FolderDiff

SHAPES = {"h.10.w": (40, 9), "h.2.w": (30, 11), "h.2.b": (5,), "head.weight": (3, 7), "scale": ()}


def diff(*arguments):
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


def found(folder, first="a", second="b", **options):
    return FolderDiff(str(folder / first), str(folder / second), **options).run()


def of(changes):
    return {change.name: change for change in changes}


def write(folder, first, second, **save):
    """Two checkpoints of given tensors."""
    for name, tensors in (("a", first), ("b", second)):
        folders.save(folder / name, {k: torch.as_tensor(v) for k, v in tensors.items()}, **save)


def expected(pairs):
    """Figures of tensors taken together, from their definitions."""
    first = torch.cat([a.double().reshape(-1) for a, _ in pairs])
    second = torch.cat([b.double().reshape(-1) for _, b in pairs])
    change = second - first
    return {
        "num_tensors": len(pairs),
        "num_values": first.numel(),
        "num_changed": int((first != second).sum()),
        "max_change": float(change.abs().max()),
        "mean_change": float(change.abs().mean()),
        "cosine": float(first @ second / first.norm() / second.norm()),
        "relative_change": float(change.norm() / first.norm()),
    }


def assert_figures(change, figures):
    for name, value in figures.items():
        assert getattr(change, name) == pytest.approx(value, rel=1e-12, abs=1e-15), name


@pytest.fixture
def states():
    first, second = (folders.random_tensors(seed, SHAPES) for seed in (1, 2))
    second["h.2.w"] = first["h.2.w"].clone()
    second["h.2.w"][3, 4:9] += 0.25
    second["h.2.b"] = first["h.2.b"].clone()
    return first, second


class TestFigures:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_of_tensors_layers_and_all(self, tmp_path, states, dtype):
        first, second = ({n: t.to(dtype) for n, t in state.items()} for state in states)
        write(tmp_path, first, second)
        diff = found(tmp_path)
        pairs = {name: (first[name], second[name]) for name in SHAPES}
        for name, change in of(diff.tensors).items():
            assert_figures(change, expected([pairs[name]]))
        layers = {"h.2": ["h.2.w", "h.2.b"], "h.10": ["h.10.w"], "head": ["head.weight"],
                  "scale": ["scale"]}  # fmt: skip
        assert of(diff.layers).keys() == layers.keys()
        for name, change in of(diff.layers).items():
            assert_figures(change, expected([pairs[tensor] for tensor in layers[name]]))
        assert_figures(diff.total, expected(list(pairs.values())))
        assert of(diff.tensors)["h.2.w"].num_changed == 5
        assert of(diff.tensors)["h.2.w"].changed_fraction == 5 / 330
        assert not diff.is_same

    def test_order_is_natural(self, tmp_path, states):
        write(tmp_path, *states)
        diff = found(tmp_path)
        assert [c.name for c in diff.layers] == ["h.2", "h.10", "head", "scale"]
        assert [c.name for c in diff.tensors] == [
            "h.2.b",
            "h.2.w",
            "h.10.w",
            "head.weight",
            "scale",
        ]

    def test_same_folder(self, tmp_path, states):
        # The square of its norm is 2, and 2 / sqrt(2) / sqrt(2) is not 1.
        same = {**states[0], "head.weight": torch.ones(2)}
        write(tmp_path, same, same)
        diff = found(tmp_path)
        assert diff.is_same
        for change in (*diff.tensors, *diff.layers, diff.total):
            assert (change.num_changed, change.max_change, change.relative_change) == (0, 0.0, 0.0)
            assert change.cosine == 1.0

    def test_opposite_and_zero(self, tmp_path):
        write(
            tmp_path,
            {"minus": [1.0, 2.0], "from": [0.0, 0.0], "to": [3.0, 4.0], "zero": [0.0, -0.0]},
            {"minus": [-1.0, -2.0], "from": [3.0, 4.0], "to": [0.0, 0.0], "zero": [-0.0, 0.0]},
        )
        changes = of(found(tmp_path).tensors)
        assert (changes["minus"].cosine, changes["minus"].relative_change) == (-1.0, 2.0)
        assert (changes["from"].cosine, changes["from"].relative_change) == (None, None)
        assert (changes["to"].cosine, changes["to"].relative_change) == (None, 1.0)
        assert (changes["zero"].num_changed, changes["zero"].relative_change) == (0, 0.0)

    def test_small_change_of_large_numbers_is_not_lost(self, tmp_path):
        """In float32 the difference of two sums of squares would be rounding alone."""
        first = torch.full((100_000,), 1000.0)
        second = first.clone()
        second[77] = math.nextafter(1000.0, 2000.0)
        second[78] = 1000.0001
        write(tmp_path, {"w": first}, {"w": second})
        change = found(tmp_path).total
        size = float(second[78].double() - 1000)
        assert (change.num_changed, change.max_change) == (1, size)
        assert change.mean_change == pytest.approx(size / 100_000, rel=1e-12)
        assert change.relative_change == pytest.approx(size / (1000 * 100_000**0.5), rel=1e-12)
        assert 1 - 1e-12 < change.cosine <= 1.0

    @given(
        numel=st.integers(1, 300),
        block=st.integers(1, 99),
        shards=st.tuples(st.integers(0, 4), st.integers(0, 4)),
        num_workers=st.integers(0, 3),
    )
    @settings(max_examples=25)
    def test_pieces_shards_and_workers_do_not_matter(
        self, tmp_path_factory, numel, block, shards, num_workers
    ):
        folder = tmp_path_factory.mktemp("pieces")
        states = [folders.random_tensors(seed, SHAPES) for seed in (1, 2)]
        for name, state, number in zip("ab", states, shards, strict=True):
            folders.save(folder / name, state, num_shards=number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_module, "CPU_PIECE_BYTES", 4 * numel)
            patch.setattr(diff_module, "_BLOCK_NUMEL", block)
            diff = found(folder, num_workers=num_workers)
        for name, change in of(diff.tensors).items():
            assert_figures(change, expected([(states[0][name], states[1][name])]))
        assert_figures(diff.total, expected([(states[0][n], states[1][n]) for n in SHAPES]))

    def test_progress_counts_every_element(self, tmp_path, states, monkeypatch):
        monkeypatch.setattr(pieces_module, "CPU_PIECE_BYTES", 64)
        write(tmp_path, *states)
        told = []
        comparing = FolderDiff(str(tmp_path / "a"), str(tmp_path / "b"))
        comparing.run(on_progress=told.append)
        assert sum(told) == comparing.num_values == sum(t.numel() for t in states[0].values())
        assert len(told) > 10


class TestNonfinite:
    def test_counted_and_left_out(self, tmp_path):
        nan, inf = math.nan, math.inf
        write(
            tmp_path,
            {"w": [1.0, nan, 3.0, nan, inf, inf, inf, 2.0]},
            {"w": [2.0, nan, 3.0, 1.0, inf, -inf, 0.0, -inf]},
        )
        change = found(tmp_path).total
        # nan and inf that stay are no change; what became of others is one.
        assert (change.num_values, change.num_changed) == (8, 5)
        assert change.num_nonfinite == (5, 4)
        rest = (torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
        figures = expected([rest])
        for name in ("max_change", "mean_change", "cosine", "relative_change"):
            assert getattr(change, name) == pytest.approx(figures[name], rel=1e-12)

    def test_nothing_but_nan(self, tmp_path):
        write(tmp_path, {"w": [math.nan] * 3}, {"w": [math.nan, 1.0, 2.0]})
        change = found(tmp_path).total
        assert (change.num_changed, change.max_change, change.mean_change) == (2, 0.0, 0.0)
        assert (change.cosine, change.num_nonfinite) == (None, (3, 1))

    def test_huge_numbers_are_finite(self, tmp_path):
        """Their squares are not."""
        huge = torch.tensor([1e200, 2.0], dtype=torch.float64)
        write(tmp_path, {"w": huge}, {"w": huge * 2})
        change = found(tmp_path).total
        assert (change.num_nonfinite, change.max_change) == ((0, 0), 1e200)
        assert change.cosine is None

    def test_json_is_json(self, tmp_path):
        """NaN and Infinity are none; figures never hold them."""
        write(tmp_path, {"w": [math.nan, 1.0], "v": [0.0]}, {"w": [1.0, math.inf], "v": [1.0]})

        def refuse(word):
            raise AssertionError(word)

        content = json.loads(
            diff(tmp_path / "a", tmp_path / "b", "--json").stdout, parse_constant=refuse
        )
        assert content["total"]["num_nonfinite"] == [1, 1]


class TestTensors:
    def test_those_that_are_not_alike(self, tmp_path):
        first = {"gone": [1.0], "h.2.gone": [1.0], "flat": [1.0, 2.0, 3.0, 4.0], "same": [1.0]}
        flat = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()
        second = {"came": [1.0], "flat": flat, "same": [1.0]}
        write(tmp_path, first, second)
        diff = found(tmp_path)
        assert diff.only_first == ["gone", "h.2.gone"]
        assert diff.only_second == ["came"]
        assert diff.other_shape == {"flat": ("float32 [4]", "float16 [2, 2]")}
        assert diff.other_dtype == {}
        assert [change.name for change in diff.tensors] == ["same"]
        assert diff.total.num_changed == 0
        assert not diff.is_same

    @pytest.mark.parametrize("num_elements", [2, 70_000])
    def test_other_dtypes_are_compared_as_numbers(self, tmp_path, num_elements):
        values = torch.randn(num_elements, generator=torch.Generator().manual_seed(0))
        values[0] = 0.5
        write(tmp_path, {"w": values}, {"w": values.bfloat16()})
        diff = found(tmp_path)
        sides = (f"float32 [{num_elements}]", f"bfloat16 [{num_elements}]")
        assert diff.other_dtype == {"w": sides}
        assert not diff.is_same
        assert_figures(diff.total, expected([(values, values.bfloat16())]))

    def test_same_numbers_in_another_dtype_are_not_the_same(self, tmp_path):
        write(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2).half()})
        diff = found(tmp_path)
        assert (diff.total.num_changed, diff.is_same) == (0, False)

    def test_nothing_in_common(self, tmp_path):
        write(tmp_path, {"x": [1.0]}, {"y": [1.0]})
        diff = found(tmp_path)
        assert (diff.tensors, diff.layers, diff.total.num_values) == ([], [], 0)
        assert diff.total.changed_fraction == 0.0

    def test_empty_tensors(self, tmp_path):
        write(tmp_path, {"x": torch.zeros(0, 3)}, {"x": torch.zeros(0, 3)})
        diff = found(tmp_path)
        assert diff.is_same
        assert (diff.total.num_tensors, diff.total.num_values, diff.total.mean_change) == (
            1,
            0,
            0.0,
        )

    @pytest.mark.parametrize(
        "dtype",
        [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
         torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2],
        ids=str,
    )  # fmt: skip
    def test_all_dtypes(self, tmp_path, dtype):
        first = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
        second = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
        write(tmp_path, {"w": first}, {"w": second})
        assert_figures(found(tmp_path).total, expected([(first, second)]))

    def test_8_bit_nan(self, tmp_path):
        first = torch.tensor([1.0, math.nan, 2.0]).to(torch.float8_e4m3fn)
        write(tmp_path, {"w": first}, {"w": torch.ones(3).to(torch.float8_e4m3fn)})
        change = found(tmp_path).total
        assert (change.num_nonfinite, change.num_changed, change.max_change) == ((1, 0), 2, 1.0)

    def test_large_whole_numbers(self, tmp_path):
        """float64 holds no difference of 1 there."""
        write(tmp_path, {"w": torch.tensor([2**60])}, {"w": torch.tensor([2**60 + 1])})
        assert found(tmp_path).total.num_changed == 1

    def test_complex_numbers(self, tmp_path):
        first = torch.tensor([1 + 1j, 2 - 1j], dtype=torch.complex64)
        write(tmp_path, {"w": first}, {"w": first + torch.tensor([3 + 4j, 0])})
        change = found(tmp_path).total
        assert (change.num_values, change.num_changed, change.max_change) == (2, 1, 5.0)
        assert change.relative_change == pytest.approx(5 / math.sqrt(7))
        assert change.cosine == pytest.approx((7 + 7) / math.sqrt(7) / math.sqrt(16 + 25 + 5))


class TestKinds:
    def test_models_and_shards(self, tmp_path):
        tiny.llama(0).save_pretrained(tmp_path / "a")
        tiny.llama(0).save_pretrained(tmp_path / "b", max_shard_size="8KB")
        assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
        diff = found(tmp_path)
        assert (diff.kind, diff.is_same) == ("checkpoint", True)

    def test_adapters(self, tmp_path):
        for seed, name in enumerate("ab"):
            tiny.lora_llama(seed).save_pretrained(tmp_path / name)
        diff = found(tmp_path)
        assert diff.kind == "adapter"
        assert [layer.name for layer in diff.layers] == ["base_model.model.model.layers.0"]
        pair = [
            safetensors.torch.load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab"
        ]
        assert_figures(diff.total, expected([(pair[0][n], pair[1][n]) for n in pair[0]]))

    def test_snapshots(self, tmp_path):
        tensors = [
            {f"{kind}/h.{n}.w": torch.rand(4, generator=torch.Generator().manual_seed(seed + n))
             for kind in ("sensitivity", "uncertainty") for n in range(2)}
            for seed in (0, 10)
        ]  # fmt: skip
        write_snapshot(tmp_path / "a", tensors[0], {})
        keys = list(tensors[1])
        write_snapshot(tmp_path / "b", tensors[1], {}, shards=[keys[:1], keys[1:]])
        diff = found(tmp_path)
        assert diff.kind == "importance snapshot"
        assert [layer.name for layer in diff.layers] == [
            "sensitivity/h.0", "sensitivity/h.1", "uncertainty/h.0", "uncertainty/h.1",
        ]  # fmt: skip
        assert_figures(diff.total, expected([(tensors[0][k], tensors[1][k]) for k in keys]))

    def test_masks(self, tmp_path):
        """Their bits, not their bytes, and no padding."""
        for name, bits in (("a", [1, 0, 1] * 3), ("b", [1, 1, 1] * 3)):
            (tmp_path / name).mkdir()
            sink = MaskSink(tmp_path / name, [("h.0.w", (3, 3))], {})
            sink.add("h.0.w", 0, torch.tensor(bits, dtype=torch.bool))
            sink.commit()
        change = found(tmp_path).total
        assert (change.num_values, change.num_changed, change.mean_change) == (9, 3, 3 / 9)

    def test_quantised_models_can_be_looked_at(self, tmp_path):
        config = {"model_type": "x", "quantization_config": {"quant_method": "gptq"}}
        write(tmp_path, {"w": torch.arange(3)}, {"w": torch.arange(3)}, config=config)
        assert found(tmp_path).is_same

    def refused(self, tmp_path, match):
        with pytest.raises(CheckpointError, match=match):
            found(tmp_path)
        result = diff(tmp_path / "a", tmp_path / "b")
        assert (result.exit_code, result.stdout) == (3, "")

    def test_two_kinds(self, tmp_path, states):
        folders.save(tmp_path / "a", states[0])
        folders.snapshot(tmp_path / "b", 0, states[0])
        self.refused(
            tmp_path, "a is a checkpoint, .*b an importance snapshot: only two of one kind"
        )

    def test_kinds_that_hold_no_such_tensors(self, tmp_path, states):
        folders.save(tmp_path / "a", states[0])
        (tmp_path / "b").mkdir()
        (tmp_path / "b/manifest.json").write_text("{}")
        self.refused(tmp_path, "b is a run folder: expected one of checkpoint")

    def test_missing_folder(self, tmp_path, states):
        folders.save(tmp_path / "a", states[0])
        self.refused(tmp_path, "b: expected a folder, found nothing")

    def test_damaged_file(self, tmp_path, states):
        write(tmp_path, *states)
        path = tmp_path / "b/model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(tmp_path, "truncated")

    def test_damaged_snapshot(self, tmp_path, states):
        for name in "ab":
            folders.snapshot(tmp_path / name, 0, states[0])
        (tmp_path / "b/importance.json").write_text('{"format": "other"}')
        self.refused(tmp_path, "expected format kifmerge.importance")


def cells(result, start):
    line = next(line for line in result.stdout.splitlines() if f"│ {start} " in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


class TestCommand:
    @pytest.fixture
    def pair(self, tmp_path):
        first = {"h.0.w": torch.ones(20_000), "h.0.v": torch.ones(3), "n": torch.ones(4)}
        second = {name: value.clone() for name, value in first.items()}
        second["h.0.w"][7] = 3.0
        second["n"] += 1.0
        write(tmp_path, {**first, "x": [1.0]}, {**second, "x": torch.ones(1, 1)})
        return tmp_path / "a", tmp_path / "b"

    def test_layers_and_their_total(self, pair):
        result = diff(*pair)
        assert (result.exit_code, result.stderr) == (0, "")
        assert cells(result, "h.0") == [
            "h.0", "2", "20,003", "<0.01%", "2", "9.999e-05", "0.01414", "0.999900",
        ]  # fmt: skip
        assert cells(result, "n")[3] == "100.00%"
        assert cells(result, "total")[:4] == ["total", "3", "20,007", "0.02%"]
        assert cells(result, "x") == ["x", "float32 [1]", "float32 [1, 1]"]
        assert "not finite" not in result.stdout
        assert "is_same: false" in result.stdout

    def test_tensors(self, pair):
        result = diff(*pair, "--tensors")
        assert cells(result, "h.0.v") == ["h.0.v", "3", "none", "0", "0", "0", "1.000000"]
        assert "h.0 " not in result.stdout

    def test_json_holds_all(self, pair):
        result = diff(*pair, "--json")
        content = json.loads(result.stdout)
        first, second = pair
        assert content == json.loads(
            json.dumps(FolderDiff(str(first), str(second)).run().as_dict())
        )
        assert {c["name"] for c in content["tensors"]} == {"h.0.w", "h.0.v", "n"}
        assert content["total"]["changed_fraction"] == 5 / 20_007
        assert content["other_shape"] == {"x": ["float32 [1]", "float32 [1, 1]"]}

    def test_not_finite_is_shown_where_there_is_any(self, tmp_path):
        write(tmp_path, {"w": [math.nan, 1.0]}, {"w": [1.0, 1.0]})
        result = diff(tmp_path / "a", tmp_path / "b")
        assert "not finite" in result.stdout
        assert cells(result, "w")[-1] == "1 / 0"

    def test_same_folders(self, tmp_path, states):
        write(tmp_path, states[0], states[0])
        result = diff(tmp_path / "a", tmp_path / "b")
        assert result.exit_code == 0
        assert "is_same: true" in result.stdout
        assert "Not alike" not in result.stdout

    def test_two_folders_are_needed(self, pair):
        assert diff(pair[0]).exit_code == 2


PEAK = """
import resource, sys
from kifmerge.phases.diff import FolderDiff
from kifmerge.phases.verify import verify_folder
import torch
torch.ones(9).double().sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "diff":
    assert FolderDiff(*sys.argv[2:]).run().total.num_changed == 1
else:
    assert verify_folder(sys.argv[2]).problems == []
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["diff", "verify"])
def test_memory_does_not_grow_with_the_tensor(tmp_path, command):
    """A file of holes, half a gigabyte that takes no room on the disk."""
    numel = 1 << 28
    tensors = {"w": {"dtype": "BF16", "shape": [numel], "data_offsets": [0, 2 * numel]}}
    for name in "ab":
        path = folders.raw_file(tmp_path / name / "model.safetensors", tensors)
        os.truncate(path, path.stat().st_size + 2 * numel)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3f")
    arguments = [command, tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024  # kilobytes
