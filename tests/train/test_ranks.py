"""Stage 2 on several processes of a launcher (DDP over gloo): the slots that one process trains."""

import pytest
from tiny_runs import in_processes

from llava.slots.pool import Pool

PLAIN = ("--optim", "sgd", "--learning_rate", "5e-1", "--lr_scheduler_type", "constant")
BATCH = 4  # of a step, over all processes


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_several_processes_train_the_slots_that_one_does(world, tmp_path, count):
    def train(folder, share):
        return world.train(
            "abd", tmp_path / folder / "llava-tiny_abd", None, *PLAIN, "--per_device_train_batch_size", share
        )

    assert in_processes(count, lambda: train("several", BATCH // count)) == [0] * count
    one = train("one", BATCH).tasks[0]
    several = Pool.read(tmp_path / "several" / "llava-tiny_abd" / "slots.pth").tasks[0]
    for side in "AB":
        found, expected = (getattr(task, side)["o_proj"] for task in (several, one))
        assert (found - expected).abs().max() <= 1e-5 and expected.abs().max() > 1e-3
