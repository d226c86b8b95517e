"""Continual-learning metrics on matrices worked out by hand."""

import numpy as np
import pytest

from llava.continual import matrix as metrics

# Three tasks. After the last stage: .5, .6, .9; on the diagonal: .8, .7, .9.
MATRIX = [[0.8, 0.3, 0.2], [0.9, 0.7, 0.1], [0.5, 0.6, 0.9]]
ZERO_SHOT = [0.25, 0.2, 0.3]


def test_by_hand():
    found = metrics.summary(MATRIX, ZERO_SHOT)
    assert found["average_final"] == pytest.approx((0.5 + 0.6 + 0.9) / 3)
    assert found["learning_accuracy"] == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    curve = [0.8, (0.9 + 0.7) / 2, (0.5 + 0.6 + 0.9) / 3]
    assert metrics.learning_curve(MATRIX).tolist() == pytest.approx(curve)
    assert found["average_over_stages"] == pytest.approx(sum(curve) / 3)
    assert found["bwt"] == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    # the best earlier stage of task 1 is stage 2 (.9), of task 2 also stage 2 (.7)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    # task 2 before its training: .3 against .2; task 3: .1 against .3
    assert found["fwt"] == pytest.approx(((0.3 - 0.2) + (0.1 - 0.3)) / 2)


def test_gaps_to_references_by_hand():
    found = metrics.summary(MATRIX, references={"joint": [0.7, 0.7, 0.9], "oracle": [0.5, 0.6, 0.9]})
    assert found["gap_to_joint"] == pytest.approx((0.2 + 0.1 + 0.0) / 3)
    assert found["gap_to_oracle"] == 0
    with pytest.raises(ValueError, match="the reference has 2 tasks, the matrix 3"):
        metrics.gap_to(MATRIX, [0.1, 0.2])


def test_nothing_is_forgotten_when_columns_stay():
    matrix = [[0.8, 0.1], [0.8, 0.6]]
    assert metrics.backward_transfer(matrix) == 0
    assert metrics.forgetting(matrix) == 0


def test_a_gain_on_an_old_task_is_negative_forgetting():
    matrix = [[0.5, 0.1], [0.7, 0.6]]
    assert metrics.backward_transfer(matrix) == pytest.approx(0.2)
    assert metrics.forgetting(matrix) == pytest.approx(-0.2)


def test_one_task_defines_no_transfer():
    found = metrics.summary([[0.5]], [0.1])
    assert found["average_final"] == found["learning_accuracy"] == 0.5
    assert all(np.isnan(found[name]) for name in ("bwt", "forgetting", "fwt"))
    assert np.isnan(metrics.summary(MATRIX)["fwt"])


def test_replicates_are_one_call():
    stack = np.stack([MATRIX, np.zeros((3, 3)), np.ones((3, 3))])
    goals = np.stack([ZERO_SHOT, np.ones(3), np.ones(3)])
    found = metrics.summary(stack, np.stack([ZERO_SHOT, np.zeros(3), np.zeros(3)]), {"joint": goals})
    single = metrics.summary(MATRIX, ZERO_SHOT, {"joint": goals[0]})
    assert found["gap_to_joint"].tolist()[1:] == [1.0, 0.0]
    assert metrics.learning_curve(stack).shape == (3, 3)
    for name, values in found.items():
        assert values.shape == (3,)
        assert values[0] == pytest.approx(single[name])
    assert found["fwt"][2] == 1.0
    assert found["bwt"].tolist()[1:] == [0.0, 0.0]


@pytest.mark.parametrize("bad", [[[0.1, 0.2]], [], [0.5], np.zeros((0, 0))])
def test_a_matrix_that_is_not_square_is_refused(bad):
    with pytest.raises(ValueError, match="one row per stage"):
        metrics.summary(bad)
    with pytest.raises(ValueError, match="zero-shot row has 2 tasks"):
        metrics.forward_transfer(MATRIX, [0.1, 0.2])
