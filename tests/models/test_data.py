"""Rows in every form from every kind of file, and bad ones named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import synthetic
from hypothesis import given
from hypothesis import strategies as st

from kifmerge.errors import CheckpointError, DataError, KifmergeError, TryAgainError
from kifmerge.models.data import DataOptions, Example, labels_met, read_examples, write_examples
from kifmerge.models.tables import pinned_source

PLAIN = DataOptions(columns={})
ROW = {"text": "a", "label": "x"}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Tables are cached by the datasets library: not among the files of whoever runs the tests."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


def read(tmp_path: Path, *content, name: str = "rows.jsonl", **options):
    path = synthetic.write_rows(tmp_path / name, content)
    return read_examples(str(path), DataOptions(**{"columns": {}, **options}))


def refusal(tmp_path: Path, *content, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, *content, **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


class TestForms:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            (
                {"instruction": "do", "input": "this", "output": "done"},
                Example("1", "do", "this", "done"),
            ),
            ({"instruction": "do", "output": "done"}, Example("1", "do", "", "done")),
            (
                {"instruction": "do", "input": None, "output": "done"},
                Example("1", "do", "", "done"),
            ),
            ({"prompt": "2 + 2 =", "completion": "4"}, Example("1", "", "2 + 2 =", "4")),
            ({"text": "fine", "label": "good"}, Example("1", "", "fine", "good")),
            ({"text": "fine", "label": 3}, Example("1", "", "fine", "3")),
            (
                {"messages": [USER, {"role": "assistant", "content": "ho"}]},
                Example("1", "", "hi", "ho", (USER,)),
            ),
        ],
    )
    def test_each_is_recognised(self, tmp_path, row, expected):
        assert read(tmp_path, {"id": "1", **row}) == [expected]

    def test_messages_keep_all_earlier_turns(self, tmp_path):
        turns = [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "so"},
        ]
        (example,) = read(tmp_path, {"messages": turns})
        assert example.messages == tuple(turns[:-1])
        assert (example.input, example.output) == ("and?", "so")

    def test_further_keys_are_of_no_account(self, tmp_path):
        assert read(tmp_path, {**ROW, "id": "1", "source": None}) == [Example("1", "", "a", "x")]

    def test_row_without_id_is_named_by_its_line(self, tmp_path):
        found = read(tmp_path, ROW, "", {**ROW, "id": 7})
        assert [example.id for example in found] == ["rows.jsonl:1", "7"]

    def test_id_of_nought_is_kept(self, tmp_path):
        assert read(tmp_path, {**ROW, "id": 0})[0].id == "0"

    def test_blank_lines_are_passed_over(self, tmp_path):
        assert len(read(tmp_path, "", ROW, "   ", ROW)) == 2

    def test_labels_met_in_order(self):
        rows = [Example(str(n), "", "", label) for n, label in enumerate("bab")]
        assert labels_met(rows) == ["b", "a"]


class TestFiles:
    def test_json_list(self, tmp_path):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([ROW, {**ROW, "text": "b"}], indent=1))
        assert [e.input for e in read_examples(str(path), PLAIN)] == ["a", "b"]

    def test_csv_with_a_mapping(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("title,body,stars\nGood,Very,5\nBad,Quite,1\n")
        columns = {"text": "Title: {title}\nText: {body}", "label": "{stars} stars"}
        found = read_examples(str(path), DataOptions(columns=columns))
        assert [(e.input, e.output) for e in found] == [
            ("Title: Good\nText: Very", "5 stars"),
            ("Title: Bad\nText: Quite", "1 stars"),
        ]

    def test_parquet_class_numbers_become_names(self, tmp_path):
        features = datasets.Features(
            {
                "content": datasets.Value("string"),
                "topic": datasets.ClassLabel(names=["World", "Sports"]),
            }
        )
        table = datasets.Dataset.from_dict(
            {"content": ["a", "b", "c"], "topic": [1, 0, 1]}, features=features
        )
        path = tmp_path / "rows.parquet"
        table.to_parquet(path)
        columns = {"instruction": "Which?", "input": "{content}", "output": "{topic}"}
        found = read_examples(str(path), DataOptions(columns=columns))
        assert [(e.instruction, e.input, e.output) for e in found] == [
            ("Which?", "a", "Sports"),
            ("Which?", "b", "World"),
            ("Which?", "c", "Sports"),
        ]

    def test_parquet_whose_keys_fit_needs_no_mapping(self, tmp_path):
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]}).to_parquet(path)
        (found,) = read_examples(str(path), PLAIN)
        assert (found.input, found.output) == ("a", "x")

    def test_table_place_is_its_row(self, tmp_path):
        path = tmp_path / "rows.csv"
        path.write_text("text,label\na,x\nb,z\n")
        with pytest.raises(DataError, match=r"rows\.csv row 2: label 'z' is not among"):
            read_examples(str(path), DataOptions(columns={}, labels=["x"]))

    @pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
    def test_broken_table(self, tmp_path, name):
        path = tmp_path / name
        path.write_bytes(b'text,label\n"a\n' if name.endswith("csv") else b"PAR1 not really")
        with pytest.raises(DataError, match=name):
            read_examples(str(path), PLAIN)

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
    def test_empty(self, tmp_path, name):
        path = tmp_path / name
        path.write_bytes(b"")
        with pytest.raises(DataError, match=name):
            read_examples(str(path), PLAIN)

    def test_empty_list(self, tmp_path):
        (tmp_path / "rows.json").write_text("[]")
        with pytest.raises(DataError, match=r"rows\.json is empty: expected at least one row"):
            read_examples(str(tmp_path / "rows.json"), PLAIN)

    @pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet", "."])
    def test_missing(self, tmp_path, name):
        with pytest.raises(DataError, match="no such file"):
            read_examples(str(tmp_path / name), PLAIN)

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
    def test_not_utf8(self, tmp_path, name):
        path = tmp_path / name
        path.write_bytes('{"text": "café", "label": "x"}\n'.encode("latin-1"))
        with pytest.raises(DataError, match=name):
            read_examples(str(path), PLAIN)

    def test_json_that_is_no_list(self, tmp_path):
        (tmp_path / "rows.json").write_text('{"text": "a"}')
        with pytest.raises(DataError, match=r"rows\.json: expected a list of objects"):
            read_examples(str(tmp_path / "rows.json"), PLAIN)

    def test_invalid_json_list_names_the_line(self, tmp_path):
        (tmp_path / "rows.json").write_text('[\n{"text": "a"},\n{oops}\n]')
        with pytest.raises(DataError, match=r"rows\.json:3: invalid JSON"):
            read_examples(str(tmp_path / "rows.json"), PLAIN)


class TestHub:
    @pytest.mark.parametrize(
        "source",
        [
            "hf://datasets/org/name",
            "hf://datasets/name:train",
            "hf://org/name:train",
            "hf://datasets/org/name:",
            "hf://datasets/org/name@:train",
            "hf://datasets/org/name/config/more:train",
            "hf://datasets/org/name:tr ain",
        ],
    )
    def test_syntax(self, source):
        with pytest.raises(DataError, match="expected hf://datasets/ORG/NAME"):
            read_examples(source, PLAIN)

    @pytest.mark.parametrize(
        ("source", "arguments"),
        [
            ("org/name:train", {"path": "org/name", "split": "train"}),
            ("org/name@v1.0:test", {"path": "org/name", "revision": "v1.0", "split": "test"}),
            ("org/na.me/con_fig:train", {"path": "org/na.me", "name": "con_fig", "split": "train"}),
            (
                "org/name@main/config:train[:10%]",
                {"path": "org/name", "revision": "main", "name": "config", "split": "train[:10%]"},
            ),
        ],
    )
    def test_parts_are_passed_on(self, monkeypatch, source, arguments):
        seen = {}

        def load_dataset(**given):
            seen.update(given)
            return datasets.Dataset.from_list([{"q": "why", "a": "so"}])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        columns = {"prompt": "{q}?", "completion": "{a}"}
        (found,) = read_examples(f"hf://datasets/{source}", DataOptions(columns=columns))
        assert (found.input, found.output) == ("why?", "so")
        assert {key: value for key, value in seen.items() if value is not None} == arguments

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("org/rows:train", "org/rows@{main}:train"),
            ("org/rows/config:train[:10%]", "org/rows@{main}/config:train[:10%]"),
            ("org/rows@v1/config:test", "org/rows@{v1}/config:test"),
        ],
    )
    def test_is_pinned(self, hub, source, expected):
        commits = {
            "v1": hub.add_repo("org/rows", {"a.jsonl": b"{}"}, kind="dataset", branch="v1"),
            "main": hub.add_repo("org/rows", {"b.jsonl": b"{}"}, kind="dataset"),
        }
        found = pinned_source(f"hf://datasets/{source}")
        assert found == f"hf://datasets/{expected.format(**commits)}"
        hub.clear_log()
        assert pinned_source(found) == found
        assert pinned_source("rows.jsonl") == "rows.jsonl"
        assert hub.log == []

    def test_repository_that_is_not_there(self, hub):
        with pytest.raises(CheckpointError, match="no such repository"):
            pinned_source("hf://datasets/org/rows:train")
        with pytest.raises(DataError, match="expected hf://datasets/ORG/NAME"):
            pinned_source("hf://datasets/org/rows")

    def test_without_a_network(self):
        with pytest.raises(KifmergeError) as caught:
            read_examples("hf://datasets/org/name:train", PLAIN)
        assert "hf://datasets/org/name:train" in str(caught.value)
        assert isinstance(caught.value, (DataError, TryAgainError))


class TestBadRows:
    def test_invalid_json_names_file_line_and_column(self, tmp_path):
        text = refusal(tmp_path, ROW, '{"text": "a", "label"}', ROW, "[1]")
        assert f"{tmp_path}/rows.jsonl:2: invalid JSON, " in text
        assert "at column" in text
        assert f"{tmp_path}/rows.jsonl:4: expected an object, found list" in text

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"text": "a"}, "missing column: expected instruction/output or prompt/completion"),
            ({}, "missing column"),
            ({"text": "a", "label": None}, "label: expected text, found NoneType"),
            ({"text": ["a"], "label": "x"}, "text: expected text, found list"),
            ({"text": "a", "label": True}, "label: expected text, found bool"),
            ({"text": "a", "label": 1.5}, "label: expected text, found float"),
            ({"instruction": "a", "input": {}, "output": "b"}, "input: expected text, found dict"),
            ({"messages": "hi"}, "messages: expected a list"),
            ({"messages": [{"role": "assistant", "content": "a"}]}, "messages: expected a list"),
            (
                {"messages": [{"role": "assistant", "content": "a"}, {"role": "user"}]},
                "messages: expected a list",
            ),
            (
                {"messages": [{**USER, "content": ["hi"]}, {"role": "assistant", "content": "b"}]},
                "messages: ",
            ),
            (
                {"messages": [USER, {"role": "assistant", "content": None}]},
                "messages: ",
            ),
        ],
    )
    def test_each_says_what_was_expected(self, tmp_path, row, words):
        assert f"rows.jsonl:2: {words}" in refusal(tmp_path, ROW, row)

    def test_up_to_ten_are_gathered(self, tmp_path):
        text = refusal(tmp_path, *[{"text": "a"}] * 3, ROW, *[{"label": "x"}] * 20)
        lines = [line for line in text.splitlines() if "rows.jsonl:" in line and "- " in line]
        assert len(lines) == 10
        assert "rows.jsonl:5:" in text
        assert "more" in text

    def test_mapping_names_the_missing_column(self, tmp_path):
        text = refusal(tmp_path, {"a": "b"}, columns={"text": "{title}", "label": "{a}"})
        assert "rows.jsonl:1: missing column 'title': the mapping names it, the row has a" in text

    @pytest.mark.parametrize("template", ["{}", "{0}", "{a", "{a.b}", "{a[0]}", "{a:q}"])
    def test_template_that_cannot_be_filled(self, tmp_path, template):
        assert "rows.jsonl:1" in refusal(
            tmp_path, {"a": None}, columns={"text": template, "label": "x"}
        )


class TestLabels:
    def test_outside_the_declared(self, tmp_path):
        text = refusal(tmp_path, ROW, {**ROW, "label": "z"}, labels=["x", "y"])
        assert "rows.jsonl:2: label 'z' is not among the declared: x, y" in text

    def test_of_every_form(self, tmp_path):
        text = refusal(tmp_path, {"instruction": "a", "output": "z"}, labels=["x"])
        assert "label 'z' is not among" in text

    def test_whole_numbers_count_into_the_declared(self, tmp_path):
        rows = [{**ROW, "label": number} for number in (1, 0, 1)]
        found = read(tmp_path, *rows, labels=["no", "yes"])
        assert [e.output for e in found] == ["yes", "no", "yes"]

    def test_whole_numbers_count_through_a_mapping(self, tmp_path):
        rows = [{"content": "a", "class": number} for number in (1, 0)]
        columns = {"text": "{content}", "label": "{class}"}
        found = read(tmp_path, *rows, labels=["no", "yes"], columns=columns)
        assert [e.output for e in found] == ["yes", "no"]

    @pytest.mark.parametrize("number", [2, -1])
    def test_numbers_beyond_the_declared(self, tmp_path, number):
        text = refusal(tmp_path, {**ROW, "label": number}, labels=["no", "yes"])
        assert f"label '{number}' is not among" in text

    def test_declared_numbers_are_names_first(self, tmp_path):
        found = read(tmp_path, {**ROW, "label": 1}, labels=["1", "0"])
        assert found[0].output == "1"

    def test_are_trimmed(self, tmp_path):
        assert read(tmp_path, {**ROW, "label": " x\n"}, labels=["x"])[0].output == "x"


class TestSample:
    def test_is_stable_ordered_and_of_the_asked_size(self, tmp_path):
        rows = [{**ROW, "id": str(number)} for number in range(50)]
        found = [int(e.id) for e in read(tmp_path, *rows, num_rows=10)]
        assert len(found) == 10
        assert found == sorted(set(found))
        assert found != list(range(10))
        assert found == [int(e.id) for e in read(tmp_path, *rows, num_rows=10)]

    @pytest.mark.parametrize("num_rows", [None, 3, 4, 100])
    def test_no_more_than_there_are(self, tmp_path, num_rows):
        assert len(read(tmp_path, ROW, ROW, ROW, num_rows=num_rows)) == 3

    def test_rows_left_out_need_not_be_good(self, tmp_path):
        rows = [{**ROW, "id": str(number)} for number in range(20)]
        kept = {e.id for e in read(tmp_path, *rows, num_rows=5)}
        spoilt = [row if row["id"] in kept else {"id": row["id"]} for row in rows]
        assert {e.id for e in read(tmp_path, *spoilt, num_rows=5)} == kept


texts = st.text(max_size=20)
plain_examples = st.builds(Example, st.text(min_size=1, max_size=5), texts, texts, texts)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": texts}),
    min_size=1,
    max_size=3,
)
conversations = st.builds(
    lambda name, earlier, answer: Example(name, "", earlier[-1]["content"], answer, tuple(earlier)),
    st.text(min_size=1, max_size=5),
    turns,
    texts,
)


class TestRoundTrip:
    @given(st.lists(plain_examples | conversations, min_size=1, max_size=4))
    def test_any_examples(self, tmp_path_factory, examples):
        path = tmp_path_factory.mktemp("examples") / "memory.jsonl"
        write_examples(path, examples)
        assert read_examples(str(path), PLAIN) == examples

    def test_no_examples_make_an_empty_file(self, tmp_path):
        write_examples(tmp_path / "memory.jsonl", [])
        assert (tmp_path / "memory.jsonl").read_bytes() == b""
