"""The figures of a report worked by hand, and the pages and tables that show them."""

from __future__ import annotations

import csv
import io
import json

import pytest

from kifmerge.display import print_tables
from kifmerge.phases.report import (
    Report,
    as_csv,
    as_markdown,
    mean_and_deviation,
    overview_table,
    report_tables,
)

TASKS = ["one", "two", "three"]
FORGETS = [[0.1, 0.0, 0.2], [0.9, 0.1, 0.2], [0.5, 0.8, 0.3], [0.2, 0.4, 0.7]]
KEEPS = [[0.1, 0.0, 0.2], [0.9, 0.1, 0.2], [0.8, 0.8, 0.3], [0.7, 0.8, 0.6]]
KEEPS_TOO = [[0.1, 0.0, 0.2], [0.9, 0.1, 0.2], [0.8, 0.8, 0.3], [0.9, 0.8, 0.7]]
AT_ONCE = [[None] * 3, [None] * 3, [None] * 3, [0.9, 0.9, 0.6]]


@pytest.fixture
def one_seed():
    return Report(
        "example",
        TASKS,
        {"score": {"sequential": {0: FORGETS}, "multitask": {0: AT_ONCE}}},
        {"sequential": 30, "multitask": 28},
    )


@pytest.fixture
def two_seeds():
    methods = {
        "sequential": {0: FORGETS, 1: FORGETS, 2: FORGETS},
        "recurrent-kif": {0: KEEPS, 1: KEEPS_TOO},
    }
    return Report("example", TASKS, {"score": methods}, {"sequential": 30, "recurrent-kif": 44})


def cells(table, method):
    (row,) = (row for row in table.rows if row[0] == method)
    return dict(zip(table.header, row, strict=True))


class TestMetrics:
    def test_by_hand(self, one_seed):
        # OP (.2+.4+.7)/3; BWT ((.2-.9)+(.4-.8))/2; FWT (.1+.3)/2; learning (.9+.8+.7)/3.
        assert cells(report_tables(one_seed)[0], "sequential") == {
            "method": "sequential",
            "seeds": "1",
            "OP": "43.3",
            "BWT": "-55.0",
            "FWT": "20.0",
            "forgetting": "55.0",
            "learning accuracy": "80.0",
            "steps": "30",
        }

    def test_what_was_not_measured_is_a_dash(self, one_seed):
        shown = cells(report_tables(one_seed)[0], "multitask")
        assert shown["OP"] == "80.0"
        assert [shown[k] for k in ("BWT", "FWT", "forgetting", "learning accuracy")] == ["-"] * 4

    def test_final_scores(self, one_seed):
        assert cells(report_tables(one_seed)[1], "sequential") == {
            "method": "sequential",
            "one": "20.0",
            "two": "40.0",
            "three": "70.0",
        }

    def test_over_seeds(self, two_seeds):
        # OP .7 and .8: mean .75, sample deviation .0707.
        shown = cells(report_tables(two_seeds)[0], "recurrent-kif")
        assert (shown["seeds"], shown["OP"]) == ("2", "75.0 ± 7.1")
        assert cells(report_tables(two_seeds)[1], "recurrent-kif")["one"] == "80.0 ± 14.1"

    def test_mean_and_deviation(self):
        assert mean_and_deviation([0.2, 0.4]) == {
            "mean": pytest.approx(0.3),
            "deviation": pytest.approx(0.1 * 2**0.5),
        }
        assert mean_and_deviation([0.2]) == {"mean": 0.2, "deviation": 0.0}
        assert mean_and_deviation([0.2, None]) is None
        assert mean_and_deviation([]) is None


class TestDifferences:
    def test_seed_by_seed(self, two_seeds):
        # Only seeds that both have: .7 - .4333 and .8 - .4333.
        (method,) = found = two_seeds.paired_differences()
        assert method == "sequential"
        assert found[method] == {0: pytest.approx(0.8 / 3), 1: pytest.approx(1.1 / 3)}

    def test_table(self, two_seeds):
        assert cells(report_tables(two_seeds)[-1], "sequential") == {
            "method": "sequential",
            "mean": "+31.7",
            "each seed": "+26.7 +36.7",
        }

    def test_are_left_out_for_one_seed(self, one_seed):
        assert one_seed.paired_differences() == {}
        assert len(report_tables(one_seed)) == 2


class TestContent:
    def test_own_labels_have_tables_of_their_own(self, one_seed):
        both = Report(
            "example",
            TASKS,
            {**one_seed.matrices, "own_labels_score": {"sequential": {0: KEEPS}}},
            one_seed.num_steps,
        )
        tables = report_tables(both)
        assert len(tables) == 4
        assert "own labels" in tables[2].title
        assert cells(tables[2], "sequential")["OP"] == "70.0"

    def test_csv(self, two_seeds):
        rows = list(csv.DictReader(io.StringIO(as_csv(two_seeds.metric_rows()))))
        assert [(r["method"], r["seed"]) for r in rows] == [
            ("sequential", "0"),
            ("sequential", "1"),
            ("sequential", "2"),
            ("recurrent-kif", "0"),
            ("recurrent-kif", "1"),
        ]
        assert float(rows[3]["op"]) == pytest.approx(0.7)
        assert float(rows[3]["final:three"]) == 0.6
        assert as_csv([]) == ""

    def test_csv_leaves_missing_ones_empty(self, one_seed):
        rows = list(csv.DictReader(io.StringIO(as_csv(one_seed.metric_rows()))))
        assert rows[1]["bwt"] == ""

    def test_markdown(self, two_seeds):
        page = as_markdown(two_seeds)
        assert page.startswith("# example\n")
        for table in report_tables(two_seeds):
            assert f"## {table.title}\n\n| method |" in page
        for name in ("op", "bwt", "fwt", "forgetting", "learning_accuracy"):
            assert f"- {name}: " in page
        bodies = [line for line in page.splitlines() if line.startswith("| sequential")]
        assert len(bodies) == 3

    def test_dict_survives_json_and_defines_its_words(self, two_seeds):
        content = json.loads(json.dumps(two_seeds.as_dict()))
        assert (content["format"], content["version"]) == ("kifmerge.report", 1)
        assert content["tasks"] == TASKS
        assert content["matrices"]["score"]["recurrent-kif"]["1"] == KEEPS_TOO
        assert content["metrics"]["score"]["recurrent-kif"]["op"]["mean"] == pytest.approx(0.75)
        assert set(content["definitions"]) == {
            "matrix",
            "op",
            "bwt",
            "fwt",
            "forgetting",
            "learning_accuracy",
        }

    def test_overview(self, one_seed):
        shown = cells(overview_table(one_seed), "sequential")
        assert shown == {
            "method": "sequential",
            "OP": "43.3",
            "BWT": "-55.0",
            "one": "20.0",
            "two": "40.0",
            "three": "70.0",
            "steps": "30",
        }

    def test_no_finished_trial(self):
        empty = Report("example", TASKS, {}, {})
        assert report_tables(empty) == []
        assert as_markdown(empty).startswith("# example\n")


class TestPrinted:
    def test_fifteen_tasks_are_not_cut(self, capsys):
        names = [f"a task called {n}" for n in range(15)]
        matrix = [[0.5] * 15 for _ in range(16)]
        report = Report("long", names, {"score": {"recurrent-kif": {0: matrix, 1: matrix}}}, {})
        print_tables(report_tables(report))
        printed = capsys.readouterr().out
        assert "…" not in printed
        assert all(name in printed for name in names)
