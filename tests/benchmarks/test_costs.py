"""What slots may cost a 7B model: gates on ``benchmarks/costs.py``, which counts shapes and needs no weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks import costs
from llava.slots.offsets import TARGETS


@pytest.fixture(scope="module")
def cost():
    """What a step costs with so many tasks; each is counted once."""
    found = {}

    def of(step, tasks):
        if (step, tasks) not in found:
            found[step, tasks] = costs.count(step, tasks)
        return found[step, tasks]

    return of


def test_what_is_counted_is_what_kernels_read_and_write():
    x, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with costs.Counting() as counting:
        y = (x @ weight.T).unsqueeze(0).expand(2, 3, 5)
        y.add(1.0)
    assert counting.cost.operators == 2 and counting.cost.flops == 2 * 3 * 4 * 5
    assert counting.cost.written == 4 * (15 + 30) and counting.cost.largest == 4 * 30
    assert counting.cost.bytes == 4 * (12 + 20 + 15) + 4 * (15 + 30)  # what is expanded is read once


def test_a_training_step_costs_little_over_the_frozen_base(cost):
    base, ours = cost("training step", 0), cost("training step", 3)
    flops, moved, _ = ours.over(base)
    assert 1 < flops <= 1.004 and 1 < moved <= 1.036
    assert ours.largest == base.largest


@pytest.mark.parametrize(("step", "most"), [("prefill", (1.008, 1.036, 3.3)), ("decoding step", (1.008, 1.016, 3))])
def test_an_answer_costs_three_operators_a_layer_and_little_more(cost, step, most):
    for tasks in (3, 1000):
        found = cost(step, tasks).over(cost(step, 0))
        assert all(1 < value <= limit for value, limit in zip(found, most)), found


def test_a_decoding_step_reads_the_weights_and_what_is_cached_once(cost):
    weights = 2 * (costs.LAYERS * (4 * 4096 * 4096 + 3 * 4096 * 11008) + costs.VOCABULARY * 4096)
    cached = 2 * 2 * costs.LAYERS * 16 * costs.POSITIONS * 4096
    assert cost("decoding step", 0).bytes <= 1.03 * (weights + cached)  # half of the cache more where it is made anew


def test_a_thousand_stored_tasks_cost_a_training_step_what_three_do(cost):
    few, many = cost("training step", 3), cost("training step", 1000)
    assert many.operators == few.operators and many.largest == few.largest
    assert many.bytes <= 1.0001 * few.bytes  # which slots are whose, on the host


@pytest.mark.thorough
@pytest.mark.parametrize("step", costs.STEPS)
def test_layers_cost_alike(step):
    assert costs.count_with(6, step, 3) == costs.count_with(2, step, 3).deeper(2, costs.count_with(4, step, 3), 4, 6)


@pytest.mark.parametrize("targets", [("o_proj",), TARGETS])
@pytest.mark.parametrize("tasks", [1, 1000])
def test_slots_of_a_question_lie_there_once(targets, tasks):
    read, written = costs.slot_bytes(tasks, targets)
    width = 2 * 4096 if len(targets) == 1 else 8 * 4096 + 3 * (4096 + 11008)
    slot = costs.LAYERS * 8 * width * 2  # layers, rank, bytes of bfloat16
    assert read == slot * (costs.SLOTS / 16 if tasks == 1 else costs.TOP_K)
    assert written <= 1.1
