"""Task sequence files: read, checked and expanded; and the command that shell scripts read them with."""

import json
import sys
from pathlib import Path

import pytest

from llava.continual import tasks
from llava.continual.tasks import load_sequence
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]


def sequence_file(folder, **changes):
    values = {
        "name": "mine",
        "tasks": [{"name": "abd", "train": "a.jsonl"}, {"name": "chest", "train": "c.jsonl"}],
        "test": "test.jsonl",
        "image_folder": "pictures",
        **changes,
    }
    path = folder / "mine.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return path


def printed(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["tasks", *map(str, words)])
    tasks.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name, slots", [("vqa-rad", 8), ("vqa-rad-tiny", 128), ("slake", 8), ("phantom", 8)])
def test_shipped_sequences_load_by_name_from_anywhere(name, slots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sequence = load_sequence(name)
    assert sequence.name == name and len(sequence.tasks) == 3 and sequence.slots_per_task == slots
    assert load_sequence(ROOT / "scripts" / "tasks" / f"{name}.json") == sequence


def test_slot_ranges_follow_the_order_of_the_file(tmp_path):
    sequence = load_sequence(sequence_file(tmp_path, slots_per_task=5))
    assert [sequence.slot_range(task) for task in sequence.task_names] == [(0, 5), (5, 10)]
    with pytest.raises(UserError, match="unknown task 'head'; sequence 'mine' has abd, chest"):
        sequence.slot_range("head")


def test_stages_are_named_as_the_seed_names_them():
    sequence = load_sequence("vqa-rad")
    assert [sequence.stage_name(n) for n in (1, 2, 3)] == [
        "llava-vqa-rad_abd",
        "llava-vqa-rad_abd_chest",
        "llava-vqa-rad_abd_chest_head",
    ]
    assert sequence.stage_name(1, "sequential") == "llava-vqa-rad-sequential_abd"


def test_environment_variables_have_defaults(tmp_path, monkeypatch):
    path = sequence_file(tmp_path, image_folder="${MY_PICTURES:-data/mine}/images", test="$MY_TEST/t.jsonl")
    monkeypatch.delenv("MY_PICTURES", raising=False)
    monkeypatch.setenv("MY_TEST", "here")
    assert load_sequence(path).image_folder == "data/mine/images"
    assert load_sequence(path).test == "here/t.jsonl"
    monkeypatch.setenv("MY_PICTURES", "elsewhere")
    assert load_sequence(path).image_folder == "elsewhere/images"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": None}, "field 'tasks' is missing or empty"),
        ({"tasks": []}, "field 'tasks' is missing or empty"),
        ({"test": ""}, "field 'test' is missing or empty"),
        ({"tasks": ["abd"]}, "task 1 needs a name and a training file"),
        ({"tasks": [{"name": "abd", "train": "x"}, {"name": "b"}]}, "task 2 needs a name and a training file"),
        ({"tasks": [{"name": "Abd Pelvis", "train": "x"}]}, "task name 'Abd Pelvis': use lower-case"),
        ({"tasks": [{"name": "../abd", "train": "x"}]}, "task name '../abd': use lower-case"),
        ({"tasks": [{"name": "abd", "train": "x"}] * 2}, "a task name occurs twice"),
        ({"slots_per_task": 2.5}, "slots_per_task is 2.5; write an integer"),
        ({"slots_per_task": 0}, "slots_per_task is 0; write an integer"),
        ({"slots_per_task": True}, "slots_per_task is True; write an integer"),
        ({"tasks": {"abd": "x"}}, "a JSON object with a list of tasks"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"mine.json: .*{message}"):
        load_sequence(sequence_file(tmp_path, **changes))


def test_broken_json_and_missing_files(tmp_path):
    (tmp_path / "broken.json").write_text('{\n "name": "x",\n oops')
    with pytest.raises(UserError, match="broken.json, line 3: broken JSON"):
        load_sequence(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="list.json: a task sequence is a JSON object"):
        load_sequence(tmp_path / "list.json")
    with pytest.raises(
        UserError, match="task sequence not found: .*give a JSON file, or one of phantom, slake, vqa-rad"
    ):
        load_sequence("absent")


def test_the_command_prints_fields_and_stages(tmp_path, monkeypatch, capsys):
    path = sequence_file(tmp_path, metrics=["exact_match", "cider"])
    assert printed(monkeypatch, capsys, "get", path, "tasks") == ["abd", "chest"]
    assert printed(monkeypatch, capsys, "get", path, "train") == ["a.jsonl", "c.jsonl"]
    assert printed(monkeypatch, capsys, "get", path, "train:chest") == ["c.jsonl"]
    assert printed(monkeypatch, capsys, "get", path, "metrics") == ["exact_match", "cider"]
    assert printed(monkeypatch, capsys, "get", path, "slots_per_task") == ["8"]
    stages = printed(monkeypatch, capsys, "stages", path, "--output_dir", "out", "--method", "joint")
    assert stages == ["out/llava-mine-joint_abd", "out/llava-mine-joint_abd_chest"]
    for field in ("colour", "stage_name"):
        with pytest.raises(UserError, match=f"unknown field '{field}'; known: name, dataset"):
            printed(monkeypatch, capsys, "get", path, field)
