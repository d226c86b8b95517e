"""Stage 2: what a run writes, and that a killed run ends as an undisturbed one."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import EACH_STEP, held_by_another, in_a_process_of_its_own, kill_this_process, kill_while_saving_step
from tiny_world import RANK, SLOTS, refusal, same, write_sequence

from llava.continual.record import checksums
from llava.data.rows import write_jsonl
from llava.slots.pool import Pool
from llava.train import llava_trainer
from llava.train import train as train_module
from llava.train.checkpoint_mark import COMPLETE, last_complete_checkpoint
from llava.train.llava_trainer import LLaVATrainer
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]


# -- what a run does ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(world, tmp_path_factory):
    """One task, five steps, undisturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "llava-tiny_abd"
    world.train("abd", folder, None, *EACH_STEP)
    return folder


def test_a_stage_is_light_and_whole(stage, world):
    assert {"slots.pth", "config.json", "training.json", "log_history.json", "tokenizer.json"} <= set(os.listdir(stage))
    assert not list(stage.glob("*.safetensors")) and (stage / "slots.pth").stat().st_size < 600_000
    config = json.loads((stage / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base) and config["model_type"] == "llava_llama"
    assert json.loads((stage / "training.json").read_text())["task"] == "abd"
    assert not (stage.parent / "checkpoints" / stage.name).exists()
    assert [path.name for path in stage.parent.iterdir() if path.name.startswith(".")] == []


def test_only_the_tasks_slots_are_optimised(world, tmp_path, monkeypatch):
    sizes = []
    create = LLaVATrainer.create_optimizer

    def spy(self, *args, **kwargs):
        optimizer = create(self, *args, **kwargs)
        sizes.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        return optimizer

    monkeypatch.setattr(LLaVATrainer, "create_optimizer", spy)
    previous = None
    for number, task in enumerate(("abd", "chest", "head")):
        world.train(task, tmp_path / f"llava-{number}", previous)
        previous = tmp_path / f"llava-{number}"
    assert sizes == [SLOTS * 2 * RANK * (32 + 32)] * 3  # the third task costs what the first did


def test_the_same_seed_gives_the_same_bytes_and_another_others(stage, world, tmp_path):
    world.train("abd", tmp_path / "llava-again", None, *EACH_STEP)
    assert (tmp_path / "llava-again" / "slots.pth").read_bytes() == (stage / "slots.pth").read_bytes()
    other = world.train("abd", tmp_path / "llava-other", None, *EACH_STEP, "--seed", "7")
    assert not same(other.tasks[0].A, Pool.read(stage / "slots.pth").tasks[0].A)


def test_the_loss_falls(world, tmp_path):
    more = ("--max_steps", "60", "--logging_steps", "1", "--learning_rate", "3e-2")
    world.train("abd", tmp_path / "llava-long", None, *more)
    losses = [entry["loss"] for entry in json.loads((tmp_path / "llava-long" / "log_history.json").read_text())[:-1]]
    assert len(losses) == 60 and sum(losses[-6:]) < 0.7 * sum(losses[:6])


@pytest.mark.parametrize(
    "more",
    [
        ("--gradient_checkpointing", "True"),
        ("--feature_cache_mb", "0"),
        ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
    ],
)
def test_ways_to_save_memory_train_the_same(stage, world, tmp_path, more):
    found = world.train("abd", tmp_path / "llava-other", None, *EACH_STEP, *more).tasks[0]
    expected = Pool.read(stage / "slots.pth").tasks[0]
    for kind in ("A", "B"):
        one, other = getattr(found, kind)["o_proj"], getattr(expected, kind)["o_proj"]
        assert (one - other).norm() / other.norm() < 0.02


def test_rows_without_pictures_train_too(world, tmp_path):
    rows = [
        {"id": n, "conversations": [{"from": "human", "value": f"is {n} odd?"}, {"from": "gpt", "value": "yes"}]}
        for n in range(4)
    ]
    write_jsonl(tmp_path / "text.jsonl", rows)
    more = ("--data_path", tmp_path / "text.jsonl", "--per_device_train_batch_size", "1")
    task = world.train("abd", tmp_path / "llava-text", None, *more).tasks[0]
    assert task.A["o_proj"].abs().max() > 0


@pytest.mark.parametrize("method", ["sequential", "joint"])
def test_the_baselines_run_through_the_same_loop(world, tmp_path, method):
    more = ("--method", method)
    first = world.train("abd", tmp_path / f"llava-{method}_1", None, *more)
    second = world.train("chest", tmp_path / f"llava-{method}_2", tmp_path / f"llava-{method}_1", *more)
    for slots in (first, second):
        (shared,) = slots.tasks
        assert shared.name == "shared" and shared.trained and shared.count == 1
    assert not same(first.tasks[0].A, second.tasks[0].A)
    seen = json.loads((tmp_path / f"llava-{method}_2" / "training.json").read_text())["training_files"]
    names = ["train_chest.jsonl"] if method == "sequential" else ["train_abd.jsonl", "train_chest.jsonl"]
    assert seen == checksums([world.folder / name for name in names])


# -- run again ---------------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_skipped_without_loading_anything(stage, world, monkeypatch, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in stage.iterdir()}
    monkeypatch.setattr(train_module, "load_for_training", lambda *_, **__: pytest.fail("nothing needs to be loaded"))
    world.train("abd", stage, None, *EACH_STEP)
    assert "is finished already; skipped" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in stage.iterdir()} == before


@pytest.mark.parametrize(
    "more, message",
    [
        (("--learning_rate", "1e-3"), "learning_rate = 0.02, now it is 0.001"),
        (("--seed", "3"), "seed = 42, now it is 3"),
        (("--max_steps", "9"), "max_steps = 5, now it is 9"),
        (("--method", "joint"), "method = retrieval, now it is joint"),
        (("--adam_beta2", "0.9"), "adam_beta2 = 0.999, now it is 0.9"),
        (("--version", "plain"), "prompt.conv_mode = vicuna_v1, now it is plain"),
        (("--image_aspect_ratio", "square"), "prompt.aspect_ratio = pad, now it is square"),
    ],
)
def test_a_finished_stage_with_other_settings_is_refused(stage, world, capsys, more, message):
    words = world.train_arguments("abd", stage, None, *EACH_STEP, *more)
    line = refusal(world, capsys, words)
    assert message in line and f"remove {stage} to train again" in line


def test_a_finished_stage_on_other_data_is_refused(stage, world, capsys, tmp_path):
    data = tmp_path / "train_abd.jsonl"
    data.write_text((world.folder / "train_abd.jsonl").read_text().replace("lesion", "shadow"))
    line = refusal(world, capsys, world.train_arguments("abd", stage, None, *EACH_STEP, "--data_path", data))
    assert "was trained with training_files = " in line


def test_a_stage_over_earlier_slots_that_have_changed_is_refused(world, capsys, tmp_path):
    first, second = tmp_path / "llava-1", tmp_path / "llava-2"
    world.train("abd", first)
    world.train("chest", second, first)
    shutil.rmtree(first)
    world.train("abd", first, None, "--seed", "5")  # trained anew, otherwise
    line = refusal(world, capsys, world.train_arguments("chest", second, first))
    assert "was trained with earlier_tasks = " in line and f"remove {second} to train again" in line


def kill_before_the_stage_appears(*_):
    def write(pool, path, earlier):
        path.write_bytes(b"half")
        kill_this_process()

    Pool.write_stage = write


def logged(stage):
    """A stage's log, as it stands there, without the times that were measured."""
    lines = (stage / "log_history.json").read_text().splitlines()
    return [line for line in lines if not re.search(r'"train_(runtime|samples_per_second|steps_per_second)"', line)]


@pytest.mark.parametrize("moment", ["in the first checkpoint", "in the third checkpoint", "in writing the stage"])
def test_a_killed_run_ends_as_an_undisturbed_one(stage, world, tmp_path, moment, capsys):
    target = tmp_path / stage.name

    def killed():
        if "stage" in moment:
            kill_before_the_stage_appears()
        else:
            kill_while_saving_step(1 if "first" in moment else 3)
        world.train("abd", target, None, *EACH_STEP)

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    assert not target.exists()
    work = tmp_path / "checkpoints" / stage.name
    kept = sorted(path.name for path in work.glob("checkpoint-*") if (path / COMPLETE).exists())
    expected = {"first": [], "third": ["checkpoint-2"], "stage": ["checkpoint-4", "checkpoint-5"]}  # two are kept
    assert kept == next(names for word, names in expected.items() if word in moment)
    capsys.readouterr()
    world.train("abd", target, None, *EACH_STEP)
    assert ("going on from" in capsys.readouterr().out) == bool(kept)
    assert (target / "slots.pth").read_bytes() == (stage / "slots.pth").read_bytes()
    assert logged(target) == logged(stage)
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == [] and not work.exists()


@pytest.mark.parametrize("unlogged, own", [([1.0, 3.0], 3.0), ([1.0, 2.0, 6.0], 3.0), (2.0, 2.0)])
def test_a_process_goes_on_with_its_own_loss(tmp_path, unlogged, own):
    """Or with the average: of another number of processes, and of an earlier version, which kept no more."""
    (tmp_path / "losses.json").write_text(json.dumps({"unlogged": unlogged, "logged": 5.0, "last": 4}))
    trainer = SimpleNamespace(_tr_loss=torch.zeros(()), args=SimpleNamespace(process_index=1, world_size=2))
    state = SimpleNamespace(global_step=5, max_steps=9)
    llava_trainer._TakeUp(trainer, tmp_path / "losses.json").on_train_begin(None, state, None)
    assert (trainer._tr_loss.item(), trainer._total_loss_scalar, trainer._globalstep_last_logged) == (own, 5.0, 4)


def test_an_interrupted_run_is_not_continued_with_other_settings(world, tmp_path, capsys):
    target = tmp_path / "llava-x"

    def killed():
        kill_while_saving_step(2)
        world.train("abd", target, None, *EACH_STEP)

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    line = refusal(world, capsys, world.train_arguments("abd", target, None, *EACH_STEP, "--learning_rate", "1e-3"))
    assert "learning_rate = 0.02, now it is 0.001" in line and "checkpoints/llava-x to start the task anew" in line


def test_a_second_training_of_a_stage_is_told_who_holds_it_and_takes_it_over_from_the_dead(world, tmp_path, capsys):
    with held_by_another(tmp_path / "llava-x") as (child, kill):
        line = refusal(world, capsys, world.train_arguments("abd", tmp_path / "llava-x"))
        assert f"llava-x is being written by process {child} on " in line
        kill()
        assert [path.name for path in tmp_path.iterdir()] == [".llava-x.lock"]  # as it was left
        assert list(world.train("abd", tmp_path / "llava-x").names) == ["abd"]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_run_that_ended_before_its_first_checkpoint_is_no_obstacle(world, tmp_path, monkeypatch):
    target = tmp_path / "llava-x"
    monkeypatch.setattr(LLaVATrainer, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.train("abd", target, None, "--learning_rate", "1e-3")
    monkeypatch.undo()
    assert list(world.train("abd", target).names) == ["abd"]


def test_a_checkpoint_of_two_processes_is_not_resumed_with_one(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    (checkpoint / "global_step7").mkdir(parents=True)
    for rank in range(2):
        (checkpoint / "global_step7" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (checkpoint / COMPLETE).touch()
    (tmp_path / "checkpoint-10").mkdir()  # half-written
    with pytest.raises(UserError, match="checkpoint-7 was written by 2 processes, this run has 1; use 2, or remove"):
        last_complete_checkpoint(tmp_path, 1)
    assert last_complete_checkpoint(tmp_path, 2) == str(checkpoint)
    assert not (tmp_path / "checkpoint-10").exists()


# -- bad input and a bad disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        (("--task", "foot"), "unknown task 'foot'; sequence 'tiny' has abd, chest, head, knee"),
        (("--sequence", "absent"), "task sequence not found"),
        (
            ("--method", "magic"),
            "unknown method 'magic'; known: align, contextual, ewc, individual, ",
        ),
        (("--model_name_or_path", "./absent"), "checkpoint folder not found: ./absent"),
        (("--retriever_state_dict", "absent.pth"), "slot file not found: absent.pth"),
        (("--previous_stage", "llava-absent"), "stage checkpoint not found: llava-absent"),
        (("--data_path", "absent.jsonl"), "absent.jsonl"),
        (("--image_folder", "absent"), "image folder not found: absent"),
        (("--output_dir", "somewhere"), "must contain 'llava'"),
        (("--learning_rate", "-1"), "--learning_rate is -1.0; give 0 or more"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size is 0; give 1 or more"),
        (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps is 0; give 1 or more"),
        (("--max_steps", "0", "--num_train_epochs", "0"), "--num_train_epochs is 0.0; give more than 0"),
        (("--optim", "nope"), "nope is not a valid OptimizerNames"),
        (("--warmup_steps", "-1"), "warmup_steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_stage(world, tmp_path, capsys, more, message):
    target = tmp_path / "llava-x"
    line = refusal(world, capsys, world.train_arguments("abd", target, None, *more))
    assert message in line
    assert not target.exists()


def test_a_loss_that_is_no_number_is_refused(world, tmp_path, capsys, monkeypatch):
    compute = LLaVATrainer.compute_loss
    monkeypatch.setattr(LLaVATrainer, "compute_loss", lambda *args, **more: compute(*args, **more) * torch.nan)
    line = refusal(world, capsys, world.train_arguments("abd", tmp_path / "llava-x"))
    assert "the training loss is nan; lower --learning_rate" in line
    assert not (tmp_path / "llava-x").exists()


def test_a_stage_that_holds_the_task_already_is_refused(stage, world, capsys, tmp_path):
    line = refusal(world, capsys, world.train_arguments("abd", tmp_path / "llava-x", stage))
    assert "the stage before this one and the merged keys both hold task 'abd'" in line


@pytest.mark.parametrize("change, message", [("tau", "differ in tau: 0.7 and 0.1"), ("base", "different base models")])
def test_a_previous_stage_that_does_not_fit_is_refused(stage, world, capsys, tmp_path, change, message):
    slots = Pool.read(stage / "slots.pth")
    if change == "tau":
        slots.settings.tau = 0.7
    else:
        slots.base = {"path": "other", "fingerprint": "f" * 16}
    (tmp_path / "llava-before").mkdir()
    slots.write(tmp_path / "llava-before" / "slots.pth")
    line = refusal(world, capsys, world.train_arguments("chest", tmp_path / "llava-x", tmp_path / "llava-before"))
    assert "the stage before this one and the merged keys" in line and message in line


def test_bad_rows_are_named(world, capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question_id": 1, "text": "is')
    words = world.train_arguments("abd", tmp_path / "llava-x", None, "--data_path", tmp_path / "bad.jsonl")
    assert "bad.jsonl" in refusal(world, capsys, words)
    sequence = write_sequence(tmp_path)
    (tmp_path / "images" / "abd2.png").unlink()
    words = world.train_arguments("abd", tmp_path / "llava-x", None, "--sequence", sequence)
    assert "abd2.png" in refusal(world, capsys, words)
    assert not (tmp_path / "llava-x").exists()


@pytest.mark.parametrize("place", ["in a checkpoint", "in the stage"])
def test_a_full_disk_is_one_line_and_the_next_run_completes(stage, world, tmp_path, capsys, monkeypatch, place):
    target = tmp_path / stage.name
    save = torch.save

    def full(data, file, *args, **kwargs):  # by path: torch hides the system's error; by stream: it comes through
        if place == "in a checkpoint" and str(file).endswith("checkpoint-2/optimizer.pt"):
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0")
        if place == "in the stage" and isinstance(data, dict) and "settings" in data:
            raise OSError(28, "No space left on device")
        return save(data, file, *args, **kwargs)

    words = world.train_arguments("abd", target, None, *EACH_STEP)
    monkeypatch.setattr(torch, "save", full)
    assert "the disk is full; free some space and run the same command again" in refusal(world, capsys, words)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    monkeypatch.undo()
    world.train("abd", target, None, *EACH_STEP)
    assert (target / "slots.pth").read_bytes() == (stage / "slots.pth").read_bytes()


def test_a_place_one_may_not_write_to(world, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "checkpoints"))

    monkeypatch.setattr(llava_trainer.LLaVATrainer, "train", lambda *_, **__: pytest.fail("found out too late"))
    monkeypatch.setattr("llava.files.os.open", refuse)
    line = refusal(world, capsys, world.train_arguments("abd", tmp_path / "llava-x"))
    assert "checkpoints: permission denied; choose a place you may write to" in line
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    line = refusal(world, capsys, world.train_arguments("abd", tmp_path / "file" / "llava-x"))
    assert "a file stands where a folder is needed" in line
