"""Which checkpoint a killed run goes on from: the newest whole one."""

from __future__ import annotations

import pytest

from llava.train import checkpoint_mark
from llava.train.checkpoint_mark import COMPLETE, last_complete_checkpoint, mark_complete

FILES = ("optimizer.pt", "scheduler.pt", "trained_slots.pt", "trainer_state.json")


def write(folder, steps, marked=True):
    for step in steps:
        place = folder / f"checkpoint-{step}"
        (place / "deep").mkdir(parents=True)
        for name in (*FILES, "deep/rng.pth"):
            (place / name).write_bytes(f"{name} of step {step}".encode())
        if marked:
            mark_complete(place)


@pytest.mark.parametrize("name", [*FILES, "deep/rng.pth", COMPLETE])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "swap"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, name, damage, capsys):
    """A flipped bit in the trained slots, or a lost optimizer, was gone on from, to other weights."""
    write(tmp_path, [2, 9, 10])
    file = tmp_path / "checkpoint-10" / name
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "swap":
        file.write_bytes((tmp_path / "checkpoint-2" / name).read_bytes())
    else:
        middle = len(data) // 2
        changed = {"flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "cut": data[:middle]}
        file.write_bytes(changed.get(damage, b""))
    if name == COMPLETE and damage == "empty":  # an earlier version's mark
        assert last_complete_checkpoint(tmp_path, 1) == str(tmp_path / "checkpoint-10")
        return
    assert last_complete_checkpoint(tmp_path, 1) == str(tmp_path / "checkpoint-9")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]
    said = capsys.readouterr().out
    assert "and the one before taken" in said or (name, damage) == (COMPLETE, "remove")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_without_optimizer_or_scheduler_nothing_is_gone_on_from(tmp_path, name):
    write(tmp_path, [1], marked=False)
    (tmp_path / "checkpoint-1" / COMPLETE).touch()  # an earlier version's
    assert last_complete_checkpoint(tmp_path, 1) == str(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / name).unlink()
    mark_complete(tmp_path / "checkpoint-1")  # --save_only_model
    assert last_complete_checkpoint(tmp_path, 1) is None


def test_what_a_killed_run_left_is_removed(tmp_path):
    write(tmp_path, [1])
    write(tmp_path, [2], marked=False)
    assert last_complete_checkpoint(tmp_path, 1) == str(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_another_process_may_remove_a_damaged_checkpoint_meanwhile(tmp_path, monkeypatch):
    """The main process does, while the others look through it too."""
    write(tmp_path, [1, 2])
    read = checkpoint_mark.weights_sha256

    def removed_meanwhile(file):
        if file.parent.name == "checkpoint-2":
            file.unlink(missing_ok=True)
        return read(file)

    monkeypatch.setattr(checkpoint_mark, "weights_sha256", removed_meanwhile)
    assert last_complete_checkpoint(tmp_path, 1) == str(tmp_path / "checkpoint-1")
