"""When a training on a CPU gives back the memory that its tensors have left free."""

from types import SimpleNamespace

import pytest

from llava.train import llava_trainer
from llava.train.llava_trainer import KEPT, _FreedMemory

GIB = 1 << 30


@pytest.fixture
def memory(monkeypatch):
    """Bytes that the process takes after each step; it gives back what is free down to 2 GiB."""
    found = SimpleNamespace(taken=0, returned=0)

    def give_back():
        found.taken, found.returned = min(found.taken, 2 * GIB), found.returned + 1

    monkeypatch.setattr(llava_trainer, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(llava_trainer, "own_bytes", lambda: found.taken)
    monkeypatch.setattr(llava_trainer, "return_freed_memory", give_back)
    return found


def steps(memory, taken, saved=()):
    """How often memory was given back after steps that leave so much with the process; some of them are saved."""
    callback = _FreedMemory()
    callback.on_train_begin(None, None, None)
    counts = []
    for number, memory.taken in enumerate(taken):
        callback.on_step_end(None, None, SimpleNamespace(should_save=number in saved))
        counts.append(memory.returned)
    return counts


def test_memory_is_kept_until_it_is_more_than_what_is_needed_by_the_bound(memory):
    full = 2 * GIB + KEPT
    assert steps(memory, [full - 1, full, full + 1, full, full + 1]) == [1, 1, 2, 2, 3]


def test_a_small_training_keeps_all(memory):
    assert steps(memory, [KEPT // 2, KEPT]) == [0, 0]


def test_where_nothing_is_told_nothing_is_given_back(memory):
    assert steps(memory, [0, 0]) == [0, 0]


def test_a_checkpoint_is_written_in_what_is_free(memory):
    assert steps(memory, [KEPT // 2, KEPT // 2, 1], saved={1}) == [0, 1, 1]
