"""The two commands of stage 1: what they print and write, and one clear line for bad input, with nothing written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llava import write_base
from tiny_world import RANK, SLOTS, TASKS, TOP_K, fit, run_main, same_slots

import merge_prompt_key
import train_prompt_key
from llava.slots.pool import Pool
from llava.utils import run_cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def words(world, tmp_path):
    """A good command line of ``train_prompt_key.py``, as a dict to be changed."""
    return {
        "--task": "chest",
        "--sequence": world.sequence,
        "--model-base": world.base,
        "--save_path": tmp_path / "out" / "chest.pth",
        "--cache_dir": tmp_path / "cache",
        "--top_k": TOP_K,
        "--rank": RANK,
        "--text_encoder": "base",
    }


def command_line(words):
    return [str(part) for pair in words.items() for part in pair]


def refusal(main, command, capsys):
    """The one line on standard error of a command that is refused with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run_cli(main), *command)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


# -- train_prompt_key.py -----------------------------------------------------------------------------------------------


def test_a_key_file_holds_one_tasks_part_of_the_sequence(words, world, capsys):
    run_main(train_prompt_key.main, *command_line(words))
    slots = Pool.read(words["--save_path"])
    (task,) = slots.tasks
    assert (task.name, task.start, task.stop) == ("chest", SLOTS, 2 * SLOTS)
    assert not task.trained and not task.A and task.statistics.count < task.info["rows"] == 12
    assert slots.settings.rank == RANK and slots.settings.encoder["kind"] == "base"
    assert slots.base["fingerprint"] and slots.base["path"] == str(world.base)
    out = capsys.readouterr().out
    assert "task chest: slots 2-3, 12 rows, queries text+image (text encoder base)" in out
    assert "similarity of the selected keys:" in out and "before" in out and "after" in out
    assert "slots are selected by at least 5 % of the questions, selection entropy" in out
    assert "measurable once another task's key file stands beside this one" in out
    assert f"written to {words['--save_path']}" in out


def test_the_keys_really_come_from_the_questions_and_pictures(words, world, tmp_path, capsys):
    run_main(train_prompt_key.main, *command_line(words))
    first = Pool.read(words["--save_path"]).tasks[0]
    run_main(train_prompt_key.main, *command_line(words))
    assert same_slots(first, Pool.read(words["--save_path"]).tasks[0])  # from the cache, and the same
    lines = (world.folder / "train_chest.jsonl").read_text().replace("lesion", "side")
    (tmp_path / "other.jsonl").write_text(lines)
    run_main(train_prompt_key.main, *command_line({**words, "--data_paths": tmp_path / "other.jsonl"}))
    other = Pool.read(words["--save_path"]).tasks[0]
    assert not torch.equal(other.text_keys, first.text_keys)
    heads = {**words, "--data_paths": world.folder / "train_head.jsonl"}
    assert "line 1: field 'domain': the row is of 'head', but the file trains 'chest'" in refusal(
        train_prompt_key.main, command_line(heads), capsys
    )
    lines = (world.folder / "train_head.jsonl").read_text().replace('"head": true', '"head": false')
    (tmp_path / "heads.jsonl").write_text(lines.replace('"chest": false', '"chest": true'))
    run_main(train_prompt_key.main, *command_line({**words, "--data_paths": tmp_path / "heads.jsonl"}))
    assert not torch.equal(Pool.read(words["--save_path"]).tasks[0].image_keys, first.image_keys)


@pytest.mark.parametrize("mode", ["text", "image"])
def test_one_modality_alone(words, mode):
    run_main(train_prompt_key.main, *command_line({**words, "--query_mode": mode}))
    (task,) = Pool.read(words["--save_path"]).tasks
    assert (task.text_keys is None) == (mode == "image") and (task.image_keys is None) == (mode == "text")


def test_routing_is_measured_against_the_key_files_beside_it(words, world, capsys):
    folder = words["--save_path"].parent
    folder.mkdir()
    for task in ("abd", "head"):
        shutil.copyfile(world.folder / "keys" / f"{task}.pth", folder / f"{task}.pth")
    (folder / "notes.pth").write_text("not a key file")
    run_main(train_prompt_key.main, *command_line(words))
    assert "go to chest" in (out := capsys.readouterr().out) and "against abd, head" in out


BAD = {
    "missing file": ({"--data_paths": "absent.jsonl"}, "absent.jsonl"),
    "unknown task": ({"--task": "foot"}, "unknown task 'foot'; sequence 'tiny' has abd, chest, head, knee"),
    "unknown sequence": ({"--sequence": "absent"}, "task sequence not found"),
    "missing base": ({"--model-base": "./absent"}, "checkpoint folder not found: ./absent"),
    "missing pictures": ({"--image_folder": "absent"}, "image folder not found: absent"),
    "unknown router": ({"--router": "compass"}, "unknown router 'compass'; known: batch_vote, gaussian, keys"),
    "unknown target": ({"--targets": "z_proj"}, "z_proj"),
    "groups": ({"--groups": 5}, "32 dimensions, which 5 groups do not divide"),
    "top_k": ({"--top_k": 3}, "top_k is 3, but task 'chest' has 2 slots"),
    "held out": ({"--held_out": 1.5}, "--held_out is 1.5; give a number of 0 or more, 1 at most"),
    "all held out": ({"--held_out": 1.0}, "--held_out is 1.0; give a share of 0 or more and below 1"),
    "encoder": ({"--text_encoder": "./absent"}, "'./absent' cannot be loaded"),
    "negative rank": ({"--rank": -1}, "rank"),
    "zero groups": ({"--groups": 0}, "groups"),
    "zero top_k": ({"--top_k": 0}, "top_k"),
    "zero tau": ({"--tau": 0}, "tau"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(words, case, capsys, tmp_path):
    changes, message = BAD[case]
    line = refusal(train_prompt_key.main, command_line({**words, **changes}), capsys)
    assert message in line
    assert not words["--save_path"].parent.exists()


@pytest.mark.parametrize("content", ["", '{"question_id": 1, "image"', '{"question_id": 1}\n'])
def test_bad_data_is_named_with_its_line(words, content, capsys, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    line = refusal(train_prompt_key.main, command_line({**words, "--data_paths": tmp_path / "bad.jsonl"}), capsys)
    assert "bad.jsonl" in line
    assert not words["--save_path"].parent.exists()


def test_a_missing_picture_is_named(words, world, capsys, tmp_path):
    shutil.copytree(world.folder / "images", tmp_path / "images")
    (tmp_path / "images" / "chest3.png").unlink()
    line = refusal(train_prompt_key.main, command_line({**words, "--image_folder": tmp_path / "images"}), capsys)
    assert "chest3.png" in line and "chest-3" in line
    assert not words["--save_path"].parent.exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device"), "the disk is full; free some space"),
        (PermissionError(13, "Permission denied", "out/chest.pth"), "out/chest.pth: permission denied"),
        (OSError(30, "Read-only file system"), "the file system is read-only"),
    ],
)
def test_a_disk_that_takes_nothing(words, capsys, monkeypatch, error, said, tmp_path):
    def refuse(*_, **__):
        raise error

    words["--save_path"].parent.mkdir()
    words["--save_path"].write_text("what was there before")
    monkeypatch.setattr(torch, "save", refuse)
    assert said in refusal(train_prompt_key.main, command_line({**words, "--cache_dir": ""}), capsys)
    assert words["--save_path"].read_text() == "what was there before"
    assert [path.name for path in words["--save_path"].parent.iterdir()] == ["chest.pth"]


def test_a_file_where_a_folder_should_be(words, capsys, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert "out" in refusal(train_prompt_key.main, command_line(words), capsys)


# -- merge_prompt_key.py -----------------------------------------------------------------------------------------------


def test_the_merged_file_holds_all_tasks_and_their_initial_offsets(world):
    merged = Pool.read(world.keys)
    assert [(task.name, task.start, task.stop) for task in merged.tasks] == [
        (task, n * SLOTS, (n + 1) * SLOTS) for n, task in enumerate(TASKS)
    ]
    for task in merged.tasks:
        single = Pool.read(world.folder / "keys" / f"{task.name}.pth").tasks[0]
        assert torch.equal(task.text_keys, single.text_keys) and torch.equal(task.image_keys, single.image_keys)
        assert task.A["o_proj"].abs().max() == 0 and task.B["o_proj"].abs().min() > 0
        assert not task.trained and task.held_out is None
    assert len({float(task.B["o_proj"].sum()) for task in merged.tasks}) == len(TASKS)


def test_merging_prints_tasks_slots_and_routing(world, tmp_path, capsys):
    out = tmp_path / "merged.pth"
    run_main(
        merge_prompt_key.main, "--sequence", world.sequence, "--key_dir", world.folder / "keys", "--save_path", out
    )
    assert out.read_bytes() == world.keys.read_bytes()
    printed = capsys.readouterr().out
    assert "merged 4 tasks, 8 slots" in printed and "routing accuracy (gaussian):" in printed
    for task in TASKS:
        assert f"  {task} " in printed
    assert f"written to {out}" in printed


def test_files_may_be_named_in_any_order(world, tmp_path):
    files = [world.folder / "keys" / f"{task}.pth" for task in TASKS]
    run_main(merge_prompt_key.main, *files[::-1], "--save_path", tmp_path / "merged.pth")
    assert (tmp_path / "merged.pth").read_bytes() == world.keys.read_bytes()


def merge_refusal(capsys, tmp_path, *files):
    target = tmp_path / "merged" / "merged.pth"
    line = refusal(merge_prompt_key.main, [*files, "--save_path", target], capsys)
    assert not target.parent.exists()
    return line


@pytest.fixture()
def keys(world, tmp_path):
    """Copies of the key files, to be changed."""
    shutil.copytree(world.folder / "keys", tmp_path / "keys")
    return tmp_path / "keys"


def test_missing_key_files_say_how_to_make_them(world, keys, capsys):
    (keys / "head.pth").unlink()
    line = refusal(merge_prompt_key.main, ["--sequence", world.sequence, "--key_dir", keys], capsys)
    assert "head.pth" in line and "train_prompt_key.py --task head" in line
    assert "absent.pth" in refusal(merge_prompt_key.main, [keys / "absent.pth"], capsys)


def test_overlapping_slots_name_both_files(keys, capsys, tmp_path):
    slots = Pool.read(keys / "chest.pth")
    slots.tasks[0].start, slots.tasks[0].stop = 1, 3
    slots.write(keys / "chest.pth")
    line = merge_refusal(capsys, tmp_path, keys / "abd.pth", keys / "chest.pth")
    assert f"{keys / 'abd.pth'} and {keys / 'chest.pth'}: slots overlap (abd 0:2, chest 1:3)" in line


def test_the_same_task_twice_names_both_files(keys, capsys, tmp_path):
    shutil.copyfile(keys / "abd.pth", keys / "again.pth")
    line = merge_refusal(capsys, tmp_path, keys / "abd.pth", keys / "again.pth")
    assert "abd.pth and" in line and "again.pth both hold task 'abd'" in line


def test_keys_of_another_encoder_name_both_files(keys, capsys, tmp_path):
    slots = Pool.read(keys / "chest.pth")
    slots.settings.encoder = {**slots.settings.encoder, "name": "other", "fingerprint": "1" * 16}
    slots.write(keys / "chest.pth")
    line = merge_refusal(capsys, tmp_path, keys / "abd.pth", keys / "chest.pth")
    assert "abd.pth and" in line and "chest.pth used different text encoders" in line and "'other'" in line


def test_keys_for_another_base_name_both_files(world, keys, capsys, tmp_path):
    other = write_base(tmp_path / "tiny-llava-other", seed=3)
    fit(tmp_path, other, world.sequence, "head")
    line = merge_refusal(capsys, tmp_path, keys / "abd.pth", keys / "head.pth")
    assert "abd.pth and" in line and "head.pth" in line and "different" in line


@pytest.mark.parametrize(
    "flag, value, field", [("--rank", 4, "rank"), ("--groups", 2, "groups"), ("--tau", 0.5, "tau")]
)
def test_other_settings_or_dimensions_name_both_values(world, keys, capsys, tmp_path, flag, value, field):
    fit(tmp_path, world.base, world.sequence, "head", flag, value)
    line = merge_refusal(capsys, tmp_path, keys / "abd.pth", keys / "head.pth")
    assert f"differ in {field}: " in line and str(value) in line


def test_broken_key_files_are_named(keys, capsys, tmp_path):
    (keys / "chest.pth").write_bytes((keys / "chest.pth").read_bytes()[:500])
    assert "chest.pth: cannot be read" in merge_refusal(capsys, tmp_path, keys / "abd.pth", keys / "chest.pth")
    slots = Pool.read(keys / "head.pth")
    slots.tasks[0].text_keys[0, 0, 0] = torch.nan
    slots.write(keys / "head.pth")
    assert "text_keys of task 'head' holds NaN" in merge_refusal(capsys, tmp_path, keys / "head.pth", keys / "abd.pth")


# -- as a user runs them -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_scripts_exit_with_code_2_and_one_line():
    command = [sys.executable, "train_prompt_key.py", "--task", "foot", "--sequence", "phantom"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: unknown task 'foot'; sequence 'phantom' has abd, chest, head\n"


# -- the prototype's command line --------------------------------------------------------------------------------------

PROTOTYPE = "-g 8 --epochs 3 --lr_step_size 1 --log_interval 50 --lr 1e-3 --num_workers 4 --master_port 8889"
PROTOTYPE += " --local-rank -1 --checkpoint old.pth --batch_size 128"


def test_the_prototypes_flags_give_the_same_file_and_one_line_each(words, capsys):
    run_main(train_prompt_key.main, *command_line(words))
    own = Path(words["--save_path"]).read_bytes()
    capsys.readouterr()
    run_main(train_prompt_key.main, *command_line(words), *PROTOTYPE.split())
    assert Path(words["--save_path"]).read_bytes() == own
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    names = "gpus epochs lr lr_step_size log_interval num_workers master_port local_rank checkpoint batch_size".split()
    assert sorted(note.split()[1] for note in notes) == sorted(f"--{name}" for name in names)
    assert "note: --lr is accepted and ignored: keys are fitted by clustering, without gradients" in "\n".join(notes)
    assert "--gpus is accepted and ignored: stage 1 runs in one process" in "\n".join(notes)


def test_the_prototypes_configuration_shapes_the_keys(words, tmp_path, capsys):
    config = {"weight_topk": 1, "low_rank": 3, "groups": 2, "pool_size": 24, "similarity_type": "cosine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    del words["--top_k"], words["--rank"]
    words["--config_path"] = tmp_path / "config.json"
    run_main(train_prompt_key.main, *command_line(words))
    settings = Pool.read(words["--save_path"]).settings
    assert (settings.top_k, settings.rank, settings.groups) == (1, 3, 2)
    told = "note: --config_path gives top_k 1, rank 3, groups 2; the task sequence says what pool_size, similarity_type"
    assert told in capsys.readouterr().out
    run_main(train_prompt_key.main, *command_line(words), "--rank", RANK)  # a flag goes before the file
    assert Pool.read(words["--save_path"]).settings.rank == RANK


@pytest.mark.parametrize(
    "text, message",
    [("{", "line 1: broken JSON"), ("[]", "expected a JSON object"), ('{"low_rank": "8"}', "low_rank is '8'; write")],
)
def test_a_broken_configuration_is_one_line(words, tmp_path, capsys, text, message):
    (tmp_path / "config.json").write_text(text)
    line = refusal(train_prompt_key.main, [*command_line(words), "--config_path", tmp_path / "config.json"], capsys)
    assert message in line
