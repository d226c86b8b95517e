"""What a training shows of itself, and what it reports to a tracker under which name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback

from llava import progress
from llava.continual.sequence import TaskSequence
from llava.train import trackers
from llava.train.step_progress import StepProgress
from llava.train.trackers import check_board, name_run
from llava.utils import UserError


def test_a_line_has_the_step_and_the_last_loss_and_a_validation_is_told(monkeypatch, capsys):
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    shown, state = StepProgress("task abd", lines=True), SimpleNamespace(global_step=4, max_steps=12)
    shown.on_train_begin(None, state, None)
    for step in range(5, 13):
        state.global_step = step
        shown.on_step_end(None, state, None)
        shown.on_log(None, state, None, logs={"loss": 1 / step, "grad_norm": 1.0})
    shown.on_prediction_step(None, state, None, eval_dataloader=[1, 2])
    shown.on_evaluate(None, state, None)
    shown.on_log(None, state, None, logs={"eval_loss": 0.5})
    shown.on_log(None, state, None, logs={"train_runtime": 9.0})
    shown.on_train_end(None, state, None)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and lines[0] == "task abd: 7 of 12 steps, loss 0.1667, 13.3 s a step, about 1 min 07 s left"
    assert lines[-2] == "task abd: validation loss 0.5 after step 12"
    assert lines[-1].startswith("task abd: 12 of 12 steps, loss 0.08333, took ")


@pytest.mark.parametrize(
    "task, method, run_name, name",
    [
        ("abd", "retrieval", None, "tiny/abd"),
        ("abd", "ewc", None, "tiny-ewc/abd"),
        ("abd", "ewc", "mine", "mine/abd"),
        ("", "align", None, "llava-stage"),
        ("", "align", "mine", "mine"),
    ],
)
def test_a_stage_is_called_after_its_task(tmp_path, monkeypatch, task, method, run_name, name):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trainer, context = reporting(tmp_path, task, method)
    board, args = trainer.callback_handler.callbacks[0], context.args

    def told(checkpoint=None):
        args.run_name = run_name
        name_run(trainer, context, checkpoint)
        return Path(board.logging_dir)

    assert told() == tmp_path / trackers.FOLDER / name and args.run_name == name
    told().mkdir(parents=True)
    assert told("llava-stage/checkpoint-3") == tmp_path / trackers.FOLDER / name  # the curves of what it goes on from
    assert told() == tmp_path / trackers.FOLDER / f"{name}-2"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert told() == tmp_path / "board" / name


def reporting(folder, task="abd", method="retrieval"):
    """What ``name_run`` looks at: a trainer that reports to TensorBoard, and the stage that it trains."""
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[TensorBoardCallback()]))
    args = SimpleNamespace(method=method, run_name=None, report_to=["tensorboard"], process_index=0)
    run = SimpleNamespace(folder=folder / "llava-stage", work=folder / "checkpoints" / "llava-stage")
    sequence = TaskSequence("tiny", "tiny", (), "test.jsonl", "images")
    return trainer, SimpleNamespace(run=run, task=task, args=args, sequence=sequence)


def test_a_run_that_goes_on_takes_its_own_curves_up_to_its_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    def started(folder, checkpoint, steps):
        trainer, context = reporting(folder)
        board, state = trainer.callback_handler.callbacks[0], SimpleNamespace(is_world_process_zero=True)
        name_run(trainer, context, checkpoint)
        for state.global_step in steps:
            board.on_log(None, state, None, logs={"loss": float(len(steps))})
        return board.logging_dir

    mine = started(tmp_path, None, range(1, 6))  # killed after the fifth step: the writer is not closed
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / trackers.FOLDER))
    assert started(tmp_path / "another", None, [1]) == f"{mine}-2"
    assert started(tmp_path, "llava-stage/checkpoint-3", range(4, 7)) == mine
    losses = EventAccumulator(mine).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in losses] == [(1, 5), (2, 5), (3, 5), (4, 3), (5, 3), (6, 3)]


def test_where_tensorboard_cannot_write_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    _, context = reporting(tmp_path)
    check_board(context)
    assert [path.name for path in tmp_path.rglob("*")] == [trackers.FOLDER, "tiny"]
    for name in ("../up", str(tmp_path)):
        context.args.run_name = name
        with pytest.raises(UserError, match="give no path"):
            check_board(context)
    context.args.run_name = None
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write to .*set TENSORBOARD_LOGGING_DIR to another"):
        check_board(context)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "s3://bucket/curves")
    with pytest.raises(UserError, match="give a folder of this machine"):
        check_board(context)
    context.args.report_to = ["wandb"]
    check_board(context)


def test_tensorboard_reads_the_losses_of_a_stage_and_a_log_file_its_steps(world, tmp_path, capfd, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(progress, "SECONDS", 0)
    stage = tmp_path / "llava-stage"
    world.train("abd", stage, None, "--report_to", "tensorboard", "--logging_steps", 1, "--max_steps", 2)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").rglob("*"))
    board = tmp_path / "runs" / world.sequence.stem / "abd"
    found = EventAccumulator(str(board)).Reload()
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2] and "train/learning_rate" in found.Tags()["scalars"]
    said = capfd.readouterr()
    bars = [line for line in said.err.splitlines() if "%|" in line and "Loading weights" not in line]
    assert "{'" not in said.out and not bars  # transformers' own are switched off by its commands
    steps = [line for line in said.err.splitlines() if line.startswith("task abd: ")]
    assert steps[0].startswith("task abd: 1 of 2 steps, ") and f"2 of 2 steps, loss {losses[0].value:.4g}, " in steps[1]
    assert f"task abd: 2 of 2 steps, loss {losses[1].value:.4g}, took 0 min 0" in steps[2]
