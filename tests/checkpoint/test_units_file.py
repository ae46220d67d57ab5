"""Skill units on disk and as a source: written, read with distrust, spread over parameters."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.checkpoint.header import TensorInfo
from kifmerge.checkpoint.source import MemorySource
from kifmerge.checkpoint.units import (
    DETAIL_FILE,
    Member,
    Unit,
    Units,
    UnitSource,
    member_text,
    parse_member,
    read_units,
    write_units,
)
from kifmerge.errors import CheckpointError

A, B = "m.q.lora_A.weight", "m.q.lora_B.weight"
SHAPES = {B: (5, 3, 2), "m.norm": (4,), A: (3, 7), "m.scale": (), "frozen": (6,)}
LIKE = MemorySource({name: torch.zeros(shape) for name, shape in SHAPES.items()})
RANKS = tuple(
    Unit(f"m.q[{rank}]", (f"{A}[{rank},:]", f"{B}[:,{rank}]"), 0.5 + rank, 0.25)
    for rank in range(3)
)
UNITS = Units(
    "lora-rank",
    (*RANKS, Unit("m.norm", ("m.norm",), 9.0, 1.0), Unit("m.scale", ("m.scale",), 7.0, 0.0)),
    {"task": "colours", "made_by": {"command": "group"}},
)
VALUES = [10.0, 11.0, 12.0, 13.0, 14.0]
SPREAD = {
    A: torch.tensor([10.0, 11.0, 12.0]).view(3, 1).expand(3, 7),
    B: torch.tensor([10.0, 11.0, 12.0]).view(1, 3, 1).expand(5, 3, 2),
    "m.norm": torch.full((4,), 13.0),
    "m.scale": torch.tensor(14.0),
}


class TestMembers:
    @given(
        st.text(min_size=1).filter(lambda text: not text.endswith("]")),
        st.sampled_from([None, 0, 1]),
        st.integers(0, 10**9),
    )
    def test_are_read_as_they_were_written(self, tensor, axis, position):
        member = Member(tensor) if axis is None else Member(tensor, axis, position)
        assert parse_member(member_text(member)) == member

    @pytest.mark.parametrize("name", ["a[3]", "a[:,:]", "a[:,-1]", "a[3,:].weight", "[3,:]"])
    def test_other_brackets_are_part_of_a_name(self, name):
        assert parse_member(member_text(Member(name))) == Member(name)

    @pytest.mark.parametrize("name", ["a[3,:]", "a[:,0]"])
    def test_names_that_read_like_a_part_are_refused(self, name):
        with pytest.raises(CheckpointError, match="reads like a row or a column"):
            member_text(Member(name))


class TestFile:
    def test_is_read_as_it_was_written(self, tmp_path):
        write_units(tmp_path, UNITS)
        assert read_units(tmp_path) == UNITS

    def test_says_what_the_docs_say(self, tmp_path):
        write_units(tmp_path, UNITS, {"task": "sizes", "role": "new", "kind": "none", "units": 1})
        text = (tmp_path / DETAIL_FILE).read_text()
        content = json.loads(text)
        assert (content["format"], content["version"]) == ("kifmerge.units", 1)
        assert (content["kind"], content["task"], content["role"]) == ("lora-rank", "sizes", "new")
        assert content["units"][1] == {
            "name": "m.q[1]",
            "members": [f"{A}[1,:]", f"{B}[:,1]"],
            "score": 1.5,
            "cumulative": 0.25,
        }
        assert sum('"members"' in line for line in text.splitlines()) == len(UNITS.units)

    def test_every_bit_of_a_score_is_kept(self, tmp_path):
        scores = [sign * 10.0**exponent / 3 for sign in (1, -1) for exponent in range(-323, 308)]
        made = tuple(Unit(f"ä{n}", (f"ä{n}",), score, -score) for n, score in enumerate(scores))
        write_units(tmp_path, Units("tensor", made))
        assert read_units(tmp_path).units == made

    def test_scores_that_are_not_finite_are_not_written(self, tmp_path):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_units(tmp_path, Units("tensor", (Unit("a", ("a",), float("nan"), 0.0),)))
        assert list(tmp_path.iterdir()) == []

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no skill units"):
            read_units(tmp_path)

    @pytest.mark.parametrize("num_bytes", [1, 100, -3])
    def test_truncated(self, tmp_path, num_bytes):
        write_units(tmp_path, UNITS)
        path = tmp_path / DETAIL_FILE
        path.write_bytes(path.read_bytes()[:num_bytes])
        with pytest.raises(CheckpointError, match=rf"{path}: cannot be read"):
            read_units(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"version": 2}, "expected format kifmerge.units version 1.*version 2"),
            ({"format": "kifmerge.mask"}, "expected format .*, found kifmerge.mask"),
            ({"kind": "neuron"}, "kind: expected one of tensor, lora-rank, layer, found 'neuron'"),
            ({"kind": ["tensor"]}, "kind: expected one of"),
            ({"units": []}, "units: expected a list of at least one unit"),
            ({"units": {"a": 1}}, "units: expected a list"),
            ({"units": None}, "units: expected a list"),
        ],
    )
    def test_other_files(self, tmp_path, changes, words):
        write_units(tmp_path, UNITS)
        path = tmp_path / DETAIL_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        with pytest.raises(CheckpointError, match=f"{path}: {words}"):
            read_units(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"name": ""}, "name: expected text, found ''"),
            ({"name": 3}, "name: expected text, found 3"),
            ({"members": []}, r"u: members: expected names, found \[\]"),
            ({"members": "w"}, "u: members: expected names, found 'w'"),
            ({"members": ["w", ""]}, "u: members: expected names"),
            ({"members": ["w", 3]}, "u: members: expected names"),
            ({"score": float("nan")}, "u: score: expected a finite number, found nan"),
            ({"score": float("inf")}, "u: score: expected a finite number, found inf"),
            ({"score": 10**400}, "u: score: expected a finite number, found 1000"),
            ({"score": 1.7e308}, "u: score: expected a finite number, found 1.7e"),
            ({"score": True}, "u: score: expected a finite number, found True"),
            ({"cumulative": "1"}, "u: cumulative: expected a finite number, found '1'"),
            ({"cumulative": None}, "u: cumulative: expected a finite number, found None"),
        ],
    )
    def test_hostile_units(self, tmp_path, changes, words):
        unit = {"name": "u", "members": ["w"], "score": 1, "cumulative": 0.5}
        content = {"format": "kifmerge.units", "version": 1, "kind": "tensor", "units": [unit]}
        path = tmp_path / DETAIL_FILE
        path.write_text(json.dumps(content))
        assert read_units(tmp_path).units == (Unit("u", ("w",), 1.0, 0.5),)
        path.write_text(json.dumps({**content, "units": [unit, {**unit, **changes}]}))
        with pytest.raises(CheckpointError, match=rf"(?s){path} .*units\[1\]: {words}"):
            read_units(tmp_path)

    def test_deep_nesting(self, tmp_path):
        (tmp_path / DETAIL_FILE).write_text("[" * 100_000)
        with pytest.raises(CheckpointError, match=r"units\.json: cannot be read"):
            read_units(tmp_path)

    def test_problems_are_gathered(self, tmp_path):
        content = {"format": "kifmerge.units", "version": 1, "kind": "tensor", "units": [3] * 12}
        (tmp_path / DETAIL_FILE).write_text(json.dumps(content))
        with pytest.raises(
            CheckpointError, match=r"(?s)units\[9\]: expected an object.*and 2 more"
        ):
            read_units(tmp_path)

    @pytest.mark.parametrize(
        ("second", "words"),
        [
            (Unit("u", ("x",), 1.0, 1.0), "u: two units have this name"),
            (Unit("v", ("w[0,:]",), 1.0, 1.0), r"w\[0,:\]: belongs to u already"),
            (Unit("v", ("w[00,:]",), 1.0, 1.0), r"w\[00,:\]: belongs to u already"),
            (Unit("v", ("w[:,1]",), 1.0, 1.0), r"w\[:,1\]: other units have w in other parts"),
            (Unit("v", ("w",), 1.0, 1.0), "w: other units have w in other parts"),
        ],
    )
    def test_units_that_claim_the_same(self, tmp_path, second, words):
        write_units(tmp_path, Units("layer", (Unit("u", ("w[0,:]",), 1.0, 1.0), second)))
        with pytest.raises(CheckpointError, match=f"(?s)units.json cannot be used.*{words}"):
            read_units(tmp_path)


class TestSource:
    def test_elements_have_the_value_of_their_unit(self):
        source = UnitSource(UNITS, LIKE, VALUES, "units")
        for name, expected in SPREAD.items():
            assert source.info(name) == TensorInfo(torch.float32, SHAPES[name])
            flat = expected.reshape(-1)
            for start in range(flat.numel() + 1):
                for stop in range(start, flat.numel() + 1):
                    found = source.read(name, start, stop)
                    assert found.dtype == torch.float32
                    assert torch.equal(found, flat[start:stop])

    def test_truth_values_stay_such(self):
        important = [True, False, False, True, False]
        source = UnitSource(UNITS, LIKE, important, "units")
        assert source.info(A) == TensorInfo(torch.bool, SHAPES[A])
        expected = torch.tensor([True] * 7 + [False] * 14)
        assert torch.equal(source.read(A, 0, 21), expected)

    def test_names_are_those_of_members_in_the_other_source_s_order(self):
        assert UnitSource(UNITS, LIKE, VALUES, "x").names() == (B, "m.norm", A, "m.scale")

    def test_where_is_the_label(self):
        assert UnitSource(UNITS, LIKE, VALUES, "the units").where(A) == "the units"

    def test_fingerprint_tells_values_and_shapes(self):
        def source(values=VALUES, **shapes):
            tensors = {name: torch.zeros(shape) for name, shape in {**SHAPES, **shapes}.items()}
            return UnitSource(UNITS, MemorySource(tensors), values, "x").fingerprint()

        one = source()
        assert one == source(frozen=(1,))
        different = {
            one,
            source(values=[*VALUES[:-1], 15.0]),
            source(values=[True, False, True, False, True]),
            source(**{A: (3, 8)}),
            source(**{"m.norm": (2, 2)}),
        }
        assert len(different) == 5

    def test_parameters_in_no_unit(self):
        source = UnitSource(UNITS, LIKE, VALUES, "the units")
        for call in (source.info, lambda name: source.read(name, 0, 1)):
            with pytest.raises(CheckpointError, match="the units: frozen belongs to no skill unit"):
                call("frozen")

    @pytest.mark.parametrize("bounds", [(-1, 2), (3, 22), (4, 3)])
    def test_elements_that_are_not_there(self, bounds):
        with pytest.raises(IndexError, match="of 21"):
            UnitSource(UNITS, LIKE, VALUES, "x").read(A, *bounds)

    def test_one_value_for_each_unit(self):
        with pytest.raises(ValueError, match="4 values for 5 units"):
            UnitSource(UNITS, LIKE, VALUES[:-1], "x")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({A: (4, 7)}, r"lora_A\.weight: row 3 belongs to no unit, found \[4, 7\]"),
            ({A: (2, 7)}, r"lora_A\.weight: row 2 belongs to a unit, found \[2, 7\]"),
            ({B: (5, 4, 2)}, r"lora_B\.weight: column 3 belongs to no unit, found \[5, 4, 2\]"),
            ({B: (5,)}, r"lora_B\.weight: expected 2 dimensions or more, found \[5\]"),
            ({A: ()}, r"lora_A\.weight: expected 1 dimensions or more, found \[\]"),
            ({"m.norm": None}, r"m\.norm: no such tensor"),
        ],
    )
    def test_parameters_that_do_not_fit(self, changes, words):
        shapes = {name: s for name, s in {**SHAPES, **changes}.items() if s is not None}
        like = MemorySource({name: torch.zeros(shape) for name, shape in shapes.items()})
        with pytest.raises(
            CheckpointError, match=f"(?s)^the units holds units of another.*{words}"
        ):
            UnitSource(UNITS, like, VALUES, "the units")

    def test_what_two_units_claim(self):
        doubled = Units("tensor", (*UNITS.units, Unit("again", ("m.norm",), 1.0, 1.0)))
        with pytest.raises(CheckpointError, match=r"m\.norm: belongs to m\.norm already"):
            UnitSource(doubled, LIKE, [*VALUES, 1.0], "x")

    def test_whole_tensors_fit_any_shape(self):
        like = MemorySource({"m.norm": torch.zeros(0, 3), "n": torch.zeros(2, 2)})
        units = Units("layer", (Unit("m", ("m.norm", "n"), 1.0, 1.0),))
        source = UnitSource(units, like, [2.0], "x")
        assert source.read("m.norm", 0, 0).tolist() == []
        assert source.read("n", 1, 4).tolist() == [2.0] * 3
