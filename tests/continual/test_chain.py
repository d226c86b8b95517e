"""A stage given as the base of the next task: the prototype's way to chain, with what the project's own chain gives."""

import json
import shutil

import pytest
from tiny_world import arguments, refusal, write_sequence

from llava.slots.pool import Pool
from llava.train.train import train

KEEPING = ("l2p", "moelora", "ewc")
SAME_FILES = ("slots.pth", "training.json", "config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """The stage after the first task."""
    folder = tmp_path_factory.mktemp("first") / "llava-tiny_abd"
    world.train("abd", folder)
    return folder


def over(stage, *more):
    return ("--model_name_or_path", stage, *more)


def test_three_tasks_chained_by_the_base_are_those_chained_by_the_stage_before(world, first, tmp_path, capsys):
    before = {"own": first, "prototype": first}
    for task in ("chest", "head"):
        for way, previous in before.items():
            folder = tmp_path / way / f"llava-tiny_{task}"
            words = over(previous) if way == "prototype" else ("--previous_stage", previous)
            world.train(task, folder, None, *words)
            before[way] = folder
        for file in SAME_FILES:
            assert (before["own"] / file).read_bytes() == (before["prototype"] / file).read_bytes(), (task, file)
    assert Pool.read(before["prototype"] / "slots.pth").names == ["abd", "chest", "head"]
    assert f"{first} is a stage: it is the stage before; base model: {world.base}" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sequential", *(pytest.param(m, marks=pytest.mark.slow) for m in KEEPING)])
def test_other_methods_chain_likewise(world, tmp_path, method):
    more = ("--method", method, "--max_steps", "1")
    world.train("abd", tmp_path / "llava-one", None, *more)
    one = tmp_path / "llava-one"
    world.train("chest", tmp_path / "a" / "llava-two", one, *more)
    world.train("chest", tmp_path / "b" / "llava-two", None, *over(one, *more))
    for file in (*SAME_FILES, "memory.pth"):
        a, b = tmp_path / "a" / "llava-two" / file, tmp_path / "b" / "llava-two" / file
        assert a.is_file() == b.is_file() and (not a.is_file() or a.read_bytes() == b.read_bytes()), file


def test_the_same_command_again_skips_and_the_order_is_free(world, first, tmp_path, capsys):
    """The prototype trained chest before abd; a task's slots are the sequence's wherever it comes."""
    head = tmp_path / "llava-tiny_head"
    world.train("head", head)
    for _ in range(2):
        world.train("abd", tmp_path / "llava-tiny_head_abd", None, *over(head))
    assert "is finished already; skipped" in capsys.readouterr().out
    found = Pool.read(tmp_path / "llava-tiny_head_abd" / "slots.pth")
    assert found.names == ["abd", "head"] and found.task("abd").checksum() == _only(first, "abd").checksum()


def _only(stage, task):
    return Pool.read(stage / "slots.pth").task(task)


def test_without_an_output_dir_the_stage_given_is_the_one_before(world, first, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "output"))
    words = world.train_arguments("chest", "unused", None, *over(first))
    at = words.index("--output_dir")
    with arguments([*words[:at], *words[at + 2 :]]):
        train()
    assert Pool.read(tmp_path / "output" / "llava-tiny_abd_chest" / "slots.pth").names == ["abd", "chest"]


@pytest.mark.parametrize(
    "change, message",
    [
        ("sequence", "holds task 'abd', which sequence 'other' does not have (chest, knee); give --sequence, or"),
        ("order", "holds task 'abd' in slots 0:2, which are 2:4 in sequence 'turned'; it was trained on another"),
        ("base", "were made for different base models"),
        ("method", "was trained with --method retrieval, not sequential; go on with its method"),
        ("previous", "is a stage, but --previous_stage is elsewhere; give one of them, or both alike"),
        ("gone", "names /nowhere/base as its base model, which is not there; give the base as --model_name_or_path"),
        ("task", "both hold task 'abd'"),
    ],
)
def test_a_stage_that_does_not_belong_is_refused_in_one_line(world, first, tmp_path, capsys, change, message):
    stage, task, more = tmp_path / "llava-before", "chest", ()
    shutil.copytree(first, stage)
    (stage / "checksums.json").unlink()
    slots = Pool.read(stage / "slots.pth")
    if change == "sequence":
        more = ("--sequence", write_sequence(tmp_path, ("chest", "knee"), "other"))
    elif change == "order":
        more = ("--sequence", write_sequence(tmp_path, ("chest", "abd"), "turned"))
    elif change == "base":
        slots.base = {**slots.base, "fingerprint": "f" * 16}
        slots.write(stage / "slots.pth")
    elif change == "method":
        more = ("--method", "sequential")
    elif change == "previous":
        more = ("--previous_stage", "elsewhere")
    elif change == "gone":
        slots.base = {**slots.base, "path": "/nowhere/base"}
        slots.write(stage / "slots.pth")
        config = json.loads((stage / "config.json").read_text())
        (stage / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere/base"}))
    else:
        task = "abd"
    line = refusal(world, capsys, world.train_arguments(task, tmp_path / "llava-x", None, *over(stage, *more)))
    assert message in line and not (tmp_path / "llava-x").exists()
