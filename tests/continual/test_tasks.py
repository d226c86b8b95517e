"""Task sequence files: read, checked and expanded; and the command that shell scripts read them with."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from llava.continual import tasks
from llava.continual.places import Places
from llava.continual.sequence import choose_sequence, load_sequence
from llava.continual.settings import BaseSettings, KeySettings, TrainSettings
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


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch):
    """Settings of the machine that runs the tests do not count."""
    monkeypatch.delenv("OUTPUT_DIR", raising=False)
    monkeypatch.delenv("SLOTS_PER_TASK", raising=False)
    for block in (KeySettings, TrainSettings, BaseSettings):
        for entry in fields(block):
            monkeypatch.delenv(block.VARIABLES + entry.name.upper(), raising=False)


def printed(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["tasks", *map(str, words)])
    tasks.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name, slots", [("vqa-rad", 8), ("slake", 8), ("phantom", 8)])
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
        ({"tasks": [{"name": 1, "train": "x"}]}, "task 1: name is 1; write it in quotes"),
        ({"tasks": [{"name": "abd", "train": 3}]}, "task 1: train is 3; write a file's name, or a list of them"),
        (
            {"tasks": [{"name": "abd", "train": "x", "tran": "y"}]},
            "task 1: unknown field 'tran'; did you mean 'train'?",
        ),
        ({"test": ["t.jsonl"]}, r"test is \['t.jsonl'\]; write one text in quotes"),
        ({"answer_sufix": "Briefly."}, "unknown field 'answer_sufix'; did you mean 'answer_suffix'?"),
        ({"slots_per_tasks": 16}, "unknown field 'slots_per_tasks'; did you mean 'slots_per_task'?"),
        ({"stated": []}, "unknown field 'stated'"),
        ({"metrics": "exact_match"}, "metrics is 'exact_match'; write a list of names"),
        ({"metrics": ["closed_acuracy"]}, "metrics: unknown metric 'closed_acuracy'; did you mean 'closed_accuracy'?"),
        ({"keys": {"ranks": 4}}, "keys: unknown field 'ranks'; did you mean 'rank'?"),
        ({"keys": {"rank": "4"}}, "keys.rank is '4'; write an integer"),
        ({"keys": {"rank": 0}}, "keys.rank is 0; write an integer of 1 or more"),
        ({"keys": {"targets": "o_proj"}}, "keys.targets is 'o_proj'; write a list of words"),
        ({"keys": {"query_mode": "txt"}}, "keys.query_mode is 'txt'; known: text, image, "),
        ({"train": {"epoch": 3}}, "train: unknown field 'epoch'; did you mean 'epochs'?"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate is 'fast'; write a number"),
        ({"train": {"batch_size": True}}, "train.batch_size is True; write an integer"),
        ({"train": [1]}, r"train is \[1\]; write a JSON object"),
        ({"base": {"recipe": "cardiac"}}, "base.recipe is 'cardiac'; known: phantom, medical"),
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
    with pytest.raises(UserError, match="list.json: expected a JSON object, found a list"):
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


def test_files_as_editors_save_them(tmp_path):
    text = sequence_file(tmp_path, dataset="hôpital").read_text()
    (tmp_path / "mark.json").write_bytes(text.encode("utf-8-sig"))
    assert load_sequence(tmp_path / "mark.json").dataset == "hôpital"
    raw = json.dumps(json.loads(text), ensure_ascii=False)
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "other.json").write_bytes(raw.encode(encoding))
        with pytest.raises(UserError, match=r"other.json: byte \d+ is not UTF-8 text; save the file as UTF-8"):
            load_sequence(tmp_path / "other.json")


def test_a_task_may_have_several_files_and_a_suffix_may_be_null(tmp_path, monkeypatch, capsys):
    entries = [{"name": "abd", "train": ["a.jsonl", "$MORE/b.jsonl"]}, {"name": "chest", "train": "c.jsonl"}]
    monkeypatch.setenv("MORE", "more")
    path = sequence_file(tmp_path, tasks=entries)
    path.write_text(path.read_text().replace('"name": "mine"', '"name": "mine", "answer_suffix": null'))
    sequence = load_sequence(path)
    assert sequence.answer_suffix == ""
    assert [task.files for task in sequence.tasks] == [("a.jsonl", "more/b.jsonl"), ("c.jsonl",)]
    assert sequence.task("chest").train == "c.jsonl"
    with pytest.raises(UserError, match="task 'abd' has 2 training files"):
        sequence.task("abd").train  # noqa: B018
    assert printed(monkeypatch, capsys, "get", path, "train:abd") == ["a.jsonl", "more/b.jsonl"]
    assert printed(monkeypatch, capsys, "get", path, "train") == ["a.jsonl", "more/b.jsonl", "c.jsonl"]


def test_blocks_have_defaults_and_the_environment_goes_before_the_file(tmp_path, monkeypatch):
    assert load_sequence(sequence_file(tmp_path)).keys == KeySettings()
    path = sequence_file(tmp_path, keys={"rank": 2, "tau": 1}, train={"epochs": 3, "zero": None}, base={"model": "x"})
    sequence = load_sequence(path)
    assert sequence.keys == KeySettings(rank=2, tau=1.0) and sequence.train == TrainSettings(epochs=3.0)
    assert sequence.base == BaseSettings(model="x") and sequence.stated == {"epochs"}
    set_here = {"EPOCHS": "5", "BATCH_SIZE": "7", "ZERO": "none", "KEY_RANK": "9", "KEY_TARGETS": "q_proj v_proj"}
    set_here |= {"SLOTS_PER_TASK": "3", "BASE_MODEL": "", "LEARNING_RATE": ""}
    for name, value in set_here.items():
        monkeypatch.setenv(name, value)
    sequence = load_sequence(path)
    assert sequence.train == TrainSettings(epochs=5.0, batch_size=7, zero="none")
    assert sequence.stated == {"epochs", "batch_size", "zero"}
    assert sequence.keys == KeySettings(rank=9, tau=1.0, targets=("q_proj", "v_proj"))
    assert sequence.slots_per_task == 3 and sequence.base.model == "x"
    monkeypatch.setenv("EPOCHS", "many")
    with pytest.raises(UserError, match="EPOCHS is 'many'; write a number"):
        load_sequence(path)


def test_a_sequence_may_name_no_base(tmp_path):
    path = sequence_file(tmp_path)
    path.write_text(path.read_text().replace('"name": "mine"', '"name": "mine", "base": null'))
    assert load_sequence(path).base == BaseSettings(recipe=None)
    with pytest.raises(UserError, match="no base model for sequence 'mine'"):
        Places(tmp_path, load_sequence(path)).base_model()


def test_the_command_prints_settings_flags_and_places(tmp_path, monkeypatch, capsys):
    path = sequence_file(tmp_path, train={"learning_rate": 2e-2}, keys={"targets": ["q_proj", "o_proj"]})
    assert printed(monkeypatch, capsys, "get", path, "keys.targets") == ["q_proj", "o_proj"]
    assert printed(monkeypatch, capsys, "get", path, "train.zero") == [""]
    assert printed(monkeypatch, capsys, "get", path, "merged_keys") == ["output/prompt-key/mine/merged_prompt_key.pth"]
    words = printed(monkeypatch, capsys, "flags", path)
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert flags["--learning_rate"] == "0.02" and flags["--per_device_train_batch_size"] == "4"
    assert len(flags) == len(fields(TrainSettings)) - 2  # DeepSpeed's file is the launcher's, bf16 not asked for
    with pytest.raises(UserError, match="unknown field 'keys.ranks'; known: query_mode"):
        printed(monkeypatch, capsys, "get", path, "keys.ranks")


def test_the_quick_start_chooses_a_sequence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(choose_sequence(name, {}) == name for name in ("slake", "phantom", "mine"))
    assert choose_sequence("auto", {}) == "phantom"
    (tmp_path / "VQA_RAD Dataset Public.json").write_text("[]")
    assert choose_sequence("auto", {"VQA_RAD_DIR": str(tmp_path)}) == "vqa-rad"


def test_shell_scripts_ask_once_for_all_they_need(tmp_path, monkeypatch, capsys):
    """Texts, lists and what a shell would take for its own arrive as they stand."""
    entries = [{"name": "abd", "train": "a.jsonl"}, {"name": "chest", "train": "it's `b`.jsonl"}]
    path = sequence_file(tmp_path, tasks=entries, answer_suffix="in `one`\nword; echo $HOME", train={"epochs": 2})
    words = ["variables", path, "tasks", "train", "suffix=answer_suffix", "zero=train.zero", "more=flags", "stages"]
    told = "\n".join(printed(monkeypatch, capsys, *words, "--method", "joint"))
    shown = 'for part in "${tasks[@]}" "${train[@]}" "$suffix" "[$zero]" "${more[@]:0:2}" "${stages[1]}"; do'
    script = f'set -eu; eval "$1"; {shown} printf "%s\\0" "$part"; done'
    done = subprocess.run(["bash", "-c", script, "bash", told], capture_output=True, text=True, check=True)
    last = ["in `one`\nword; echo $HOME", "[]", "--num_train_epochs", "2.0"]
    stages = ["output/llava-mine-joint_abd_chest", ""]
    assert done.stdout.split("\0") == ["abd", "chest", "a.jsonl", "it's `b`.jsonl", *last, *stages]
    for wrong in ("a b=tasks", "=tasks", "keys.rank", "1=tasks"):
        with pytest.raises(UserError, match="is no name of a variable; write NAME=FIELD"):
            printed(monkeypatch, capsys, "variables", path, wrong)


def test_the_sequences_ship_with_an_installed_package():
    """Installed without -e there is no scripts folder beside the package."""
    from llava.continual import sequence

    root = Path(__file__).resolve().parents[2]
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    shipped = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    (pattern,) = shipped["share/llava/tasks"]
    assert sorted(root.glob(pattern)) == sorted(sequence.SEQUENCE_FOLDER.glob("*.json"))
