import pytest

from kifmerge.tensor.metrics import DEFINITIONS, ContinualMetrics, continual_metrics

# Rows: before training, after task 1, 2, 3. Columns: tasks 1, 2, 3.
MATRIX = [
    [0.10, 0.20, 0.30],
    [0.90, 0.25, 0.15],
    [0.70, 0.80, 0.35],
    [0.60, 0.85, 0.75],
]


def without(row, column):
    """MATRIX with one cell not measured; rows and columns count from 0."""
    return [
        [None if (i, j) == (row, column) else cell for j, cell in enumerate(cells)]
        for i, cells in enumerate(MATRIX)
    ]


def test_three_tasks_by_hand():
    found = continual_metrics(MATRIX)
    assert found.op == pytest.approx((0.60 + 0.85 + 0.75) / 3)
    assert found.bwt == pytest.approx(((0.60 - 0.90) + (0.85 - 0.80)) / 2)
    assert found.fwt == pytest.approx((0.25 + 0.35) / 2)
    assert found.forgetting == pytest.approx(((0.90 - 0.60) + (0.85 - 0.85)) / 2)
    assert found.learning_accuracy == pytest.approx((0.90 + 0.80 + 0.75) / 3)


def test_forgetting_counts_from_the_best_row_even_before_training():
    assert continual_metrics([[0.9, 0.0], [0.5, 0.0], [0.4, 0.6]]).forgetting == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("cell", "undefined"),
    [
        ((3, 2), {"op", "learning_accuracy"}),
        ((3, 0), {"op", "bwt", "forgetting"}),
        ((1, 0), {"bwt", "forgetting", "learning_accuracy"}),
        ((1, 1), {"fwt"}),
        ((2, 2), {"fwt"}),
        ((0, 2), set()),
    ],
)
def test_a_cell_not_measured_makes_undefined_just_what_needs_it(cell, undefined):
    found, whole = continual_metrics(without(*cell)).as_dict(), continual_metrics(MATRIX).as_dict()
    assert {name for name, value in found.items() if value is None} == undefined
    assert all(found[name] == whole[name] for name in found.keys() - undefined)


def test_a_zero_is_a_measurement():
    found = continual_metrics([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert found == ContinualMetrics(0.0, 0.0, 0.0, 0.0, 0.0)


def test_one_task_has_no_transfer_to_speak_of():
    found = continual_metrics([[0.1], [0.8]])
    assert found == ContinualMetrics(0.8, None, None, None, 0.8)


@pytest.mark.parametrize("matrix", [[], MATRIX[1:], MATRIX[:-1], [*MATRIX[:3], [0.1, 0.2]]])
def test_a_matrix_of_another_shape_is_refused(matrix):
    with pytest.raises(ValueError, match=r"expected T\+1 rows of T scores"):
        continual_metrics(matrix)


def test_every_metric_is_defined_in_words_in_the_same_order():
    assert list(continual_metrics(MATRIX).as_dict()) == list(DEFINITIONS)
