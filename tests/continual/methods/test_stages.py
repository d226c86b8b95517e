"""Methods beside those of ``test_methods.py``: their stages, trained, killed and asked with the real commands."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import EACH_STEP, in_a_process_of_its_own, kill_while_saving_step
from tiny_world import TASKS, same_slots

from llava.continual.methods import METHODS
from llava.continual.run import Run
from llava.data.rows import read_rows
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation
from llava.slots.pool import Pool
from llava.utils import UserError

OWN = ("individual", "o_lora", "keeplora", "contextual")
"""Methods that give each task slots of its own."""


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """Trains the first stage of a method, once; ``lwf`` goes on from a stage of ``sequential``."""
    folder, made = tmp_path_factory.mktemp("first"), {}

    def train(method):
        method = "sequential" if method == "lwf" else method
        if method not in made:
            made[method] = folder / f"llava-{method}_abd"
            world.train("abd", made[method], None, "--method", method)
        return made[method]

    return train


@pytest.fixture(scope="module")
def second(world, first, tmp_path_factory):
    """Trains the second stage of a method, once."""
    folder, made = tmp_path_factory.mktemp("second"), {}

    def train(method):
        if method not in made:
            made[method] = folder / f"llava-{method}_abd_chest"
            world.train("chest", made[method], first(method), "--method", method, *EACH_STEP)
        return made[method]

    return train


@pytest.fixture(scope="module")
def answerer(world):
    return Answerer(str(world.base))


def answers(answerer, world, stage):
    """Text and route of the test rows of three tasks, of which a stage knows two."""
    rows = [row for row in read_rows(world.folder / "test.jsonl") if row.domain in TASKS[:3]]
    answerer.use(None if stage is None else str(stage))
    replies = answerer.answer(rows, Generation(max_new_tokens=4, batch_size=9), str(world.folder / "images"))
    return [(reply.row.domain, reply.text, reply.route) for reply in replies]


@pytest.mark.parametrize("method", OWN)
def test_earlier_tasks_stay_as_they_were_and_the_new_one_learns(first, second, method):
    before, after = Pool.read(first(method) / "slots.pth"), Pool.read(second(method) / "slots.pth")
    assert after.names == ["abd", "chest"] and after.adapter == method
    assert same_slots(before.task("abd"), after.task("abd"))
    for task in after.tasks:
        assert task.trained and all(side.any() for kind in (task.A, task.B) for side in kind.values())


def test_individual_stages_take_each_rows_own_task(world, second, answerer):
    known = {"abd": [0], "chest": [1]}
    base = answers(answerer, world, None)
    for (domain, text, route), (_, plain, _) in zip(answers(answerer, world, second("individual")), base, strict=True):
        told = domain in known
        assert route["weights"] == [float(told)] and route.get("task_given", False) == told
        assert route["slots"] == known[domain] if told else text == plain


def test_zero_shot_stages_are_the_base(world, tmp_path, answerer, capsys):
    stage = tmp_path / "llava-zero_shot_abd"
    world.train("abd", stage, None, "--method", "zero_shot")
    written = (stage / "slots.pth").read_bytes()
    assert "nothing is trained" in capsys.readouterr().out
    assert answers(answerer, world, stage) == answers(answerer, world, None)
    world.train("chest", tmp_path / "llava-zero_shot_abd_chest", stage, "--method", "zero_shot")
    world.train("abd", stage, None, "--method", "zero_shot")
    assert "is finished already; skipped" in capsys.readouterr().out and (stage / "slots.pth").read_bytes() == written


@pytest.mark.parametrize("method", ["lwf", "o_lora", "keeplora", "contextual"])
def test_a_stage_answers_without_being_told_the_task(world, second, answerer, method):
    found = answers(answerer, world, second(method))
    assert len(found) == 9 and all(route["weights"] for _, _, route in found)
    if method in ("o_lora", "keeplora"):
        assert all(route["slots"] == [0, 1] and route["weights"] == [1.0, 1.0] for _, _, route in found)


def test_lwf_learns_otherwise_than_sequential(world, second, first, tmp_path):
    plain = world.train("chest", tmp_path / "llava-s", first("sequential"), "--method", "sequential", *EACH_STEP)
    assert not same_slots(plain.tasks[0], Pool.read(second("lwf") / "slots.pth").tasks[0])


def test_keeplora_keeps_out_of_what_the_base_and_the_first_task_need(first, second):
    before, after = Run.open(first("keeplora")), Run.open(second("keeplora"))
    side = after.pool.task("chest").B["o_proj"][0]  # [layers, rank, in]
    assert len(after.memory) == len(side)
    for layer, rows in enumerate(side):
        kept, now = (run.memory[f"kept.o_proj.{layer}"] for run in (before, after))
        assert (rows @ kept).abs().max() < 1e-5
        assert torch.equal(now[:, : kept.shape[1]], kept) and now.shape[1] >= kept.shape[1]
        torch.testing.assert_close(now.T @ now, torch.eye(now.shape[1]), atol=1e-5, rtol=0)


def test_contextual_learns_how_much_earlier_tasks_lend(first, second):
    assert Run.open(first("contextual")).memory["mix"].tolist() == [[0.0]]
    mix = Run.open(second("contextual")).memory["mix"]
    assert mix[1, 0] != 0 and not mix[0].any() and mix[1, 1] == 0


@pytest.mark.parametrize(
    "method",
    ["keeplora", *(pytest.param(name, marks=pytest.mark.thorough) for name in (*OWN, "lwf") if name != "keeplora")],
)
def test_a_killed_run_ends_with_the_same_bytes(world, first, second, tmp_path, capsys, method):
    target, previous, wanted = tmp_path / second(method).name, first(method), second(method)

    def killed():
        kill_while_saving_step(3)
        world.train("chest", target, previous, "--method", method, *EACH_STEP)

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL and not target.exists()
    capsys.readouterr()
    world.train("chest", target, previous, "--method", method, *EACH_STEP)
    assert "going on from" in capsys.readouterr().out
    for name in ("slots.pth", "memory.pth"):
        assert (target / name).is_file() == (wanted / name).is_file()
        if (wanted / name).is_file():
            assert (target / name).read_bytes() == (wanted / name).read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["individual", "o_lora", "keeplora", "contextual", "lwf"])
def test_the_first_stage_of_it_is_reproduced_to_the_byte(world, first, tmp_path, method):
    again = tmp_path / first(method).name
    world.train("abd", again, None, "--method", "sequential" if method == "lwf" else method)
    assert (again / "slots.pth").read_bytes() == (first(method) / "slots.pth").read_bytes()


@pytest.mark.thorough
def test_individual_tasks_do_not_depend_on_those_before(world, second, tmp_path):
    alone = world.train("chest", tmp_path / "llava-x", None, "--method", "individual", *EACH_STEP)
    assert same_slots(alone.task("chest"), Pool.read(second("individual") / "slots.pth").task("chest"))


@pytest.mark.thorough
def test_lwf_without_distillation_is_sequential(world, first, tmp_path):
    plain = world.train("chest", tmp_path / "llava-s", first("sequential"), "--method", "sequential")
    free = world.train("chest", tmp_path / "llava-l", first("lwf"), "--method", "lwf", "--lwf_lambda", 0)
    torch.testing.assert_close(free.tasks[0].A["o_proj"], plain.tasks[0].A["o_proj"])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["individual", "keeplora", "contextual"])
def test_a_stage_before_of_another_method_is_refused(world, first, method):
    keys = Pool.read(world.keys)
    stage = SimpleNamespace(
        previous=Run.open(first("o_lora")), keys=keys, task="chest", sequence=SimpleNamespace(task_names=list(TASKS))
    )
    with pytest.raises(UserError, match="was trained with --method o_lora; train it with this method"):
        METHODS.get(method)().pool(stage)


def test_a_task_is_not_trained_twice(world, first):
    stage = SimpleNamespace(
        previous=Run.open(first("o_lora")),
        keys=Pool.read(world.keys),
        task="abd",
        sequence=SimpleNamespace(task_names=list(TASKS)),
    )
    with pytest.raises(UserError, match="the stage before this one and the merged keys both hold task 'abd'"):
        METHODS.get("o_lora")().pool(stage)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("lwf", {"lwf_temperature": 0.0}, "--lwf_temperature is 0.0; give more than 0"),
        ("keeplora", {"keeplora_weights": 2.0}, "--keeplora_weights is 2.0; give a share between 0 and 1"),
        ("keeplora", {"keeplora_features": -0.1}, "--keeplora_features is -0.1; give a share between 0 and 1"),
        ("keeplora", {"keeplora_rows": -1}, "--keeplora_rows is -1; give 0 or more"),
    ],
)
def test_bad_options_are_one_line(method, options, message):
    recipe = METHODS.get(method)()
    stage = SimpleNamespace(options=recipe.Options(**options), previous=None)
    with pytest.raises(UserError, match=message):
        recipe.rows(stage, [])
        recipe.pool(stage)
