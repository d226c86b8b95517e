"""A run: which changes make a stage another one, and that a finished stage is what its record says."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from tiny_world import refusal

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.manifest import CHECKSUMS_FILE
from llava.continual.places import Places
from llava.continual.record import difference
from llava.continual.run import Run
from llava.slots.edit import remove
from llava.slots.pool import Pool
from llava.utils import UserError


@pytest.fixture
def stage(world, tmp_path):
    folder = tmp_path / "llava-tiny_abd"
    world.train("abd", folder)
    return folder


def with_changes(world, path, **changes):
    """Another task sequence file."""
    path.write_text(json.dumps({**json.loads(world.sequence.read_text()), **changes}))
    return path


def refused(world, capsys, stage, *more):
    return refusal(world, capsys, world.train_arguments("abd", stage, None, *more))


def test_another_answer_suffix_is_another_run(world, stage, capsys, tmp_path):
    suffix = with_changes(world, tmp_path / "suffix.json", answer_suffix="Answer with one word.")
    assert "prompt.answer_suffix = , now it is Answer with one word." in refused(
        world, capsys, stage, "--sequence", suffix
    )


def test_other_pictures_are_another_run(world, stage, capsys, tmp_path):
    shutil.copytree(world.folder / "images", tmp_path / "same")
    world.train("abd", stage, None, "--image_folder", tmp_path / "same")  # only moved
    assert "is finished already" in capsys.readouterr().out
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "same" / "abd0.png")
    assert "was trained with pictures = " in refused(world, capsys, stage, "--image_folder", tmp_path / "same")


@pytest.mark.parametrize(
    "more, message",
    [
        (("--optim", "sgd"), "optim = adamw_torch, now it is sgd"),
        (("--weight_decay", "0.1"), "weight_decay = 0.0, now it is 0.1"),
        (("--label_smoothing_factor", "0.1"), "label_smoothing_factor = 0.0, now it is 0.1"),
        (("--lora_enable", "True"), "lora_enable = False, now it is True"),
    ],
)
def test_other_settings_are_another_run(world, stage, capsys, more, message):
    assert message in refused(world, capsys, stage, *more)


def test_what_changes_no_weight_changes_no_run(world, stage, capsys):
    world.train("abd", stage, None, "--logging_steps", 3, "--dataloader_num_workers", 0, "--save_total_limit", 5)
    assert "is finished already" in capsys.readouterr().out


def test_another_number_of_processes_is_another_run(stage):
    run = Run.open(stage)
    assert run.record["world_size"] == 1
    assert "world_size = 1, now it is 2" in difference(run.record, {**run.record, "world_size": 2}, {})


def test_joint_files_of_one_name_are_told_apart(world, capsys, tmp_path):
    tasks = []
    for task in ("abd", "chest"):
        (tmp_path / task).mkdir()
        shutil.copyfile(world.folder / f"train_{task}.jsonl", tmp_path / task / "train.jsonl")
        tasks.append({"name": task, "train": str(tmp_path / task / "train.jsonl")})
    joint = with_changes(world, tmp_path / "joint.json", tasks=tasks)
    stage = tmp_path / "llava-joint"
    words = ("--sequence", joint, "--method", "joint")
    world.train("chest", stage, None, *words)
    lines = (tmp_path / "abd" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "abd" / "train.jsonl").write_text("".join(lines[:3]))
    line = refusal(world, capsys, world.train_arguments("chest", stage, None, *words))
    assert "was trained with" in line and "training_files = " in line or "pictures = " in line


def test_a_task_removed_in_place_is_not_finished(world, stage, capsys):
    second = stage.with_name("llava-tiny_abd_chest")
    world.train("chest", second, stage)
    remove(Pool.read(second / "slots.pth"), ["chest"]).write(second / "slots.pth")
    line = refusal(world, capsys, world.train_arguments("chest", second, stage))
    assert "slots.pth: task 'chest' was removed since the stage was trained" in line and "or evaluate it" in line


def test_a_stage_links_the_files_of_the_tasks_before_and_reads_like_one_that_has_them_whole(world, stage, tmp_path):
    second, alone = stage.with_name("llava-tiny_abd_chest"), tmp_path / "alone" / "llava-tiny_abd_chest"
    world.train("chest", second, stage)
    assert (second / "slots" / "abd.safetensors").samefile(stage / "slots" / "abd.safetensors")
    assert (second / "slots" / "chest.safetensors").stat().st_nlink == 1
    Pool.read(stage / "slots.pth").write(stage / "slots.pth")  # as earlier versions wrote it: one file
    shutil.rmtree(stage / "slots")
    world.train("chest", alone, stage)
    assert (alone / "slots.pth").read_bytes() == (second / "slots.pth").read_bytes()
    for name in ("abd.safetensors", "chest.safetensors"):
        assert (alone / "slots" / name).read_bytes() == (second / "slots" / name).read_bytes()
    assert Run.open(alone).contents() == Run.open(second).contents()


def test_slots_that_changed_in_place_are_not_finished(world, stage, capsys):
    pool = Pool.read(stage / "slots.pth")
    pool.task("abd").A["o_proj"].data += 1
    pool.write(stage / "slots.pth")
    assert "task 'abd' has changed since the stage was trained" in refused(world, capsys, stage)


@pytest.fixture
def old(stage, world):
    """A stage whose record is of the first version: settings by hand-picked names, no checksums of its slots."""
    kept = json.loads((stage / "training.json").read_text())
    names = ("task", "method", "seed", "base", "learning_rate", "weight_decay", "max_steps")
    own = {"version": None, "image_aspect_ratio": None, "model_max_length": 2048, "answer_style": "as_is"}
    data = {"train_abd.jsonl": kept["training_files"][0]}
    record = {name: kept[name] for name in names} | own | {"data": data, "earlier_tasks": {}}
    (stage / "training.json").write_text(json.dumps(record))
    (stage / CHECKSUMS_FILE).unlink()
    return stage


def test_a_stage_of_the_first_version_is_still_finished(world, old, capsys):
    world.train("abd", old)
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (("--learning_rate", "0.1"), "learning_rate = 0.02, now it is 0.1"),
        (("--version", "llava_v0"), "version = None, now it is llava_v0"),
        (("--image_aspect_ratio", "square"), "image_aspect_ratio = None, now it is square"),
        (("--model_max_length", "200"), "model_max_length = 2048, now it is 200"),
        (("--lora_enable", "True"), "lora_enable = False, now it is True"),
    ],
)
def test_a_stage_of_the_first_version_with_other_settings_is_refused(world, old, capsys, more, message):
    assert message in refused(world, capsys, old, *more)


def test_a_stage_of_the_first_version_on_other_data_is_refused(world, old, capsys, tmp_path):
    lines = (world.folder / "train_abd.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train_abd.jsonl").write_text("".join(lines[:6]))
    assert "was trained with data = " in refused(world, capsys, old, "--data_path", tmp_path / "train_abd.jsonl")


def test_a_task_removed_in_place_from_a_stage_of_the_first_version_is_not_finished(world, old, capsys):
    second = old.with_name("llava-tiny_abd_chest")
    world.train("chest", second, old)
    record = json.loads((second / "training.json").read_text())
    names = ("task", "method", "seed", "earlier_tasks")
    (second / "training.json").write_text(json.dumps({name: record[name] for name in names}))
    (second / CHECKSUMS_FILE).unlink()
    world.train("chest", second, old)
    assert "is finished already" in capsys.readouterr().out
    whole = Pool.read(second / "slots.pth")
    for task in ("chest", "abd"):
        remove(whole, [task]).write(second / "slots.pth")
        line = refusal(world, capsys, world.train_arguments("chest", second, old))
        assert f"task '{task}' was removed since the stage was trained" in line


def test_work_that_the_first_version_began_is_refused_before_it_is_touched(tmp_path):
    run = Run(tmp_path / "llava-tiny_abd", {"record": 2, "task": "abd"})
    (run.work / "checkpoint-1").mkdir(parents=True)
    (run.work / "run.json").write_text('{"task": "abd"}')
    with pytest.raises(UserError, match=r"begun by an earlier version.*remove .*checkpoints/llava-tiny_abd to start"):
        run.check_work()


def test_a_run_opens_with_what_it_wrote(stage):
    run = Run.open(stage)
    assert run.pool.names == ["abd"] and run.record["task"] == "abd"
    assert run.record["slots"] == {"abd": run.pool.task("abd").checksum()}
    assert run.contents() == {"earlier_tasks": run.record["slots"]}
    assert run.work == Places.work(stage) == stage.parent / "checkpoints" / stage.name
    assert replace(run, kept_rows=[]).memory == {} and not (stage / "memory.pth").exists()


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])
def test_a_folder_that_holds_something_else_is_not_replaced(world, capsys, tmp_path, name):
    folder = tmp_path / "llava-mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    assert f"holds '{name}' and is no stage" in refused(world, capsys, folder)
    assert [entry.name for entry in folder.iterdir()] == [name] and (folder / name).read_text() == "mine"


def test_the_base_is_not_replaced_by_the_stage(world, capsys, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "llava-base")
    assert "is no stage" in refused(world, capsys, base, "--model_name_or_path", base)
    assert (base / "model.safetensors").is_file()


def test_a_stage_is_not_written_over_a_link_or_a_file(world, capsys, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "llava-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "llava-file").write_text("")
    for name in ("llava-link", "llava-file"):
        assert "is no folder of its own" in refused(world, capsys, tmp_path / name)


def test_a_stage_is_not_written_over_the_one_before(world, stage, capsys):
    before = (stage / "slots.pth").read_bytes()
    words = world.train_arguments("chest", stage, stage)
    assert "is the stage before" in refusal(world, capsys, words)
    assert (stage / "slots.pth").read_bytes() == before


def test_a_stage_of_another_kind_is_not_replaced(world, stage, capsys):
    (stage / "slots.pth").unlink()  # as in the folder of a recipe that leaves no slots
    record = json.loads((stage / "training.json").read_text())
    (stage / "training.json").write_text(json.dumps({**record, "method": "instruct"}))
    assert "was trained with method = instruct" in refused(world, capsys, stage)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_file_of_a_finished_stage_is_named(stage, damage):
    """A flipped bit in a stage was trained on, and its slots, tokenizer or log passed for finished."""
    files = sorted(path for path in stage.rglob("*.*") if path.name not in ("README.md", CHECKSUMS_FILE))
    names = {"slots.pth", "abd.safetensors", "training.json", "config.json", "tokenizer.json", "log_history.json"}
    assert names <= {file.name for file in files}
    run = Run(stage, Run.open(stage).record)
    del run.record["slots"]
    assert run.finished()
    for file in files:
        data = file.read_bytes()
        middle = len(data) // 2
        changed = {"flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], "cut": data[:middle]}
        file.unlink() if damage == "remove" else file.write_bytes(changed.get(damage, b""))
        told = (lambda: Checkpoint(stage).kind) if file.parent == stage else (lambda: Pool.read(stage / "slots.pth"))
        for look in (lambda: Run.open(stage), run.finished, told):
            if damage == "remove" and file.name == "slots.pth":  # no stage any more, which is trained
                continue
            with pytest.raises(UserError, match=rf"{stage.name}/{file.relative_to(stage)}"):
                look()
        file.write_bytes(data)
    assert run.finished()


def test_a_folder_without_a_stage_is_named(tmp_path):
    with pytest.raises(UserError, match="stage checkpoint not found"):
        Run.open(tmp_path)


@pytest.mark.parametrize("content", [b"half", b""])
def test_a_damaged_memory_is_one_line(stage, content):
    (stage / "memory.pth").write_bytes(content)
    with pytest.raises(UserError, match="memory.pth: cannot be read as a file of plain tensors"):
        Run.open(stage)
