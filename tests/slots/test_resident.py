"""Tables of the slots in use: the numbers of the slots, whatever is kept, driven out and changed meanwhile."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava.slots.pool import Pool
from llava.slots.resident import Resident
from llava.slots.settings import RetrieverSettings

LAYERS, RANK, IN, OUT, SLOTS = 3, 2, 4, 6, 2
CPU = torch.device("cpu")
SETTINGS = RetrieverSettings(num_layers=LAYERS, features={"gate_proj": (IN, OUT)}, rank=RANK)
SLOT_BYTES = LAYERS * RANK * (IN + OUT) * 4


@pytest.fixture
def pool():
    made = Pool(SETTINGS)
    for number in range(6):
        for parameter in made.append(f"t{number}", SLOTS).parameters():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return made


def check(pool, table, places, dtype=torch.float32):
    """That ``places`` are given as they are in the pool."""
    found = table.take({name: pool.task(name) for name, _ in places}, places, CPU, dtype)["gate_proj"]
    for side, name in zip(found, "BA"):
        expected = [getattr(pool.task(task), name)["gate_proj"][number] for task, number in places]
        assert side.dtype == dtype and side.is_contiguous()
        assert torch.equal(side, torch.stack(expected, 1).to(dtype))


def test_slots_come_in_the_order_asked_and_may_repeat(pool):
    table = Resident(SETTINGS, pool.size)
    check(pool, table, [("t3", 1), ("t0", 0), ("t3", 1), ("t5", 1)])
    check(pool, table, [("t0", 0)])
    check(pool, table, [("t0", 0), ("t1", 1)], torch.bfloat16)


def test_only_tasks_that_are_used_lie_in_the_tables_and_old_ones_make_room(pool):
    table = Resident(SETTINGS, pool.size, limit=3 * SLOTS * SLOT_BYTES)
    for number in (0, 1, 2, 0, 3, 4, 1, 5):
        check(pool, table, [(f"t{number}", 0), (f"t{number}", 1)])
        assert table._tables["gate_proj"][0].shape[1] == 3 * SLOTS and len(table._rows) <= 3
    assert list(table._rows) == ["t4", "t1", "t5"]
    check(pool, table, [(f"t{number}", number % 2) for number in range(5)])  # more than the limit has room for


def test_what_is_written_into_a_slot_is_seen(pool):
    table = Resident(SETTINGS, pool.size)
    check(pool, table, [("t0", 0)])
    with torch.no_grad():
        pool.task("t0").A["gate_proj"].mul_(2)
    check(pool, table, [("t0", 0)])


def test_a_copy_begins_empty(pool):
    table = Resident(SETTINGS, pool.size)
    check(pool, table, [("t0", 0)])
    other = copy.deepcopy(table)
    assert not other._rows
    check(pool, other, [("t0", 1)])


def test_slots_and_keys_stay_exact_where_a_model_moves_and_a_training_task_goes_along(pool):
    before = {name: value.clone() for name, value in pool.named_parameters()}
    pool.half().to("meta")
    assert pool.device == torch.device("meta")
    assert all(torch.equal(value, before[name]) for name, value in pool.named_parameters())
    pool.task("t0").text_keys = torch.ones(4, SLOTS, 2)
    pool.train_only("t0")
    assert {value.device.type for value in pool.task("t0").parameters()} == {"meta"}
    assert pool.task("t0").text_keys.device.type == "cpu"


def test_what_is_written_for_a_batch_is_what_it_takes(pool):
    """One new tensor a side and target, of the slots taken, whatever the pool holds."""
    tasks = {name: pool.task(name) for name in ("t1", "t4")}
    places = [("t1", 0), ("t4", 1), ("t4", 0)]
    table = Resident(SETTINGS, pool.size)
    table.take(tasks, places, CPU, torch.bfloat16)
    written = []

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.is_floating_point():
                written.append(made.nbytes)
            return made

    with Written():
        table.take(tasks, places, CPU, torch.bfloat16)
    assert sum(written) == len(places) * SLOT_BYTES // 2


def test_large_numbers_whose_sum_is_infinite_are_finite(pool):
    task = pool.task("t0")
    task.A["gate_proj"].data.fill_(3e38)
    assert task.not_finite() == []
    task.A["gate_proj"].data[0, 0, 0, 0] = -torch.inf
    task.B["gate_proj"].data[0, 0, 0, 0] = torch.nan
    assert task.not_finite() == ["A.gate_proj", "B.gate_proj"]
