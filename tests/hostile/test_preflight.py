"""What can be known from flags, files and configs is said before a model is loaded, in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from llava import cli
from llava.continual import preflight, tasks
from llava.continual.places import places_of
from llava.continual.preflight import check_base, check_space, check_training
from llava.devices import check_device, default_device
from llava.eval import accuracy_matrix, model_vqa_loader, run_llava
from llava.eval.evaluation import Settings
from llava.slots.pool import Pool
from llava.train.arguments import parse_arguments
from llava.utils import UserError

COMMANDS = {
    model_vqa_loader.Arguments: "--model-path m --question-file q.jsonl",
    run_llava.Arguments: "--model-path m --image-file a.png --query q",
    accuracy_matrix.Arguments: "--scores s.json --tasks abd --output_dir out",
    Settings: "",
}
VALUES = ("-1", "-5", "nan", "inf", "-inf", "99999999999")


def refused(call, *said) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in said), line


NUMBERS = [
    (kind, entry.name, value)
    for kind in COMMANDS
    for entry in dataclasses.fields(kind)
    if type(entry.default) in (int, float)
    for value in VALUES
    if type(entry.default) is float or value.lstrip("-").isdigit()
]


@pytest.mark.parametrize("kind, name, value", NUMBERS, ids=lambda one: getattr(one, "__module__", one))
def test_numbers_that_cannot_be_meant_are_refused_by_the_flag(kind, name, value):
    words = [*COMMANDS[kind].split(), f"--{name}={value}"]
    if value == "99999999999" and type(kind.__dataclass_fields__[name].default) is float:
        return
    refused(lambda: cli.parse(kind, words), f"--{name} is ", "; give ")


def test_ranges_hold_from_python_too_and_a_usual_line_passes():
    from types import SimpleNamespace

    asked = SimpleNamespace(model_path="m", question_file="q", batch_size=0)
    refused(lambda: cli.filled(model_vqa_loader.Arguments, asked), "--batch_size is 0; give an integer of 1 or more")
    refused(lambda: cli.parse(run_llava.Arguments, [*COMMANDS[run_llava.Arguments].split(), "--top_p", "0"]), "--top_p")
    for kind, words in COMMANDS.items():
        cli.parse(kind, words.split())


TRAIN = "--task abd --model_name_or_path base --output_dir llava-x --use_cpu True --sequence phantom"


@pytest.mark.parametrize(
    "more",
    [
        "--learning_rate nan",
        "--learning_rate inf",
        "--learning_rate -1",
        "--learning_rate 1e9",
        "--num_train_epochs nan",
        "--num_train_epochs 1e12",
        "--max_steps 0 --num_train_epochs 0",
        "--per_device_train_batch_size 0",
        "--per_device_train_batch_size 99999999",
        "--gradient_accumulation_steps 0",
        "--weight_decay nan",
        "--max_grad_norm -1",
        "--adam_beta1 1",
        "--adam_beta2 -0.1",
        "--adam_epsilon nan",
        "--warmup_steps -3",
        "--lora_r 0",
        "--lora_dropout 2",
        "--seed -1",
        "--seed 99999999999",
        "--dataloader_num_workers -1",
        "--dataloader_num_workers 100000",
        "--model_max_length 0",
        "--feature_cache_mb -1",
        "--label_smoothing_factor nan",
        "--mm_projector_lr nan",
        "--optim lomo",
        "--optim galore_adamw",
        "--optim nope",
    ],
)
def test_flags_of_training_are_refused_before_anything_is_read(more):
    name, _ = more.split()[:2]
    with pytest.raises(UserError) as caught:
        parse_arguments([*TRAIN.split(), *more.split()])
    line = str(caught.value)
    assert "\n" not in line and (name in line or "is not a valid" in line or "num_train_epochs" in line), line


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cuda:-1", "meta", "cpu:3", "", "0", "cuda:x", "quantum"])
def test_a_device_that_is_not_here_is_refused(name):
    if name:
        refused(lambda: default_device(name), "--device")
    else:
        assert default_device(name, use_cpu=True) == "cpu"
    check_device("cpu")


def test_too_small_a_disk_is_said_before_it_is_full(tmp_path, monkeypatch):
    check_space(tmp_path / "a" / "b", 1, "the stages")
    refused(
        lambda: check_space(tmp_path / "a", 10**18, "the stages"), "the stages take about", "MB are free; make room"
    )

    def fails(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", fails)
    check_space(tmp_path, 10**18, "the stages")


@pytest.fixture
def places(world, monkeypatch, tmp_path):
    """The places of a sequence like the world's, with some of its fields changed."""
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "out"))

    def make(**changes):
        values = {**json.loads(world.sequence.read_text()), **changes}
        (tmp_path / "s.json").write_text(json.dumps(values))
        return places_of(tmp_path / "s.json")

    return make


def test_all_tasks_are_looked_at_before_the_first_is_trained(world, places, tmp_path, monkeypatch):
    folder, base, keys = world.folder / "images", str(world.base), str(world.keys)
    check_training(places(), base, keys, folder)
    entries = json.loads(world.sequence.read_text())["tasks"]

    def last(**changes):
        return places(tasks=[*entries[:-1], {**entries[-1], **changes}])

    (tmp_path / "broken.jsonl").write_text('{"question_id": 1}\n')
    of_abd = json.loads((world.folder / "train_abd.jsonl").read_text().splitlines()[0])
    row = {name: value for name, value in of_abd.items() if name != "domain"}
    (tmp_path / "plain.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "of_abd.jsonl").write_text(json.dumps(of_abd) + "\n")
    (tmp_path / "pictures.jsonl").write_text(json.dumps({**row, "image": "gone.png"}) + "\n")
    (tmp_path / "out.jsonl").write_text(json.dumps({**row, "image": "../keys/abd.pth"}) + "\n")
    unanswered = {name: value for name, value in row.items() if name != "gpt4_answer"}
    (tmp_path / "unanswered.jsonl").write_text(json.dumps(unanswered) + "\n")
    for name, said in (
        ("absent.jsonl", "row file not found"),
        ("broken.jsonl", "field 'text' is missing"),
        ("pictures.jsonl", "image file not found"),
        ("out.jsonl", "leads out of its folder"),
        ("unanswered.jsonl", "a training row needs an answer"),
        ("of_abd.jsonl", "the row is of 'abd', but the file trains"),
    ):
        refused(lambda: check_training(last(train=str(tmp_path / name)), base, keys, folder), said)  # noqa: B023
    foot = last(name="foot", train=str(tmp_path / "plain.jsonl"))
    refused(lambda: check_training(foot, base, keys, folder), "no keys of task 'foot'")
    refused(lambda: check_training(places(), base, "absent.pth", folder), "slot file not found: absent.pth")
    refused(lambda: check_training(places(), "./absent", keys, folder), "checkpoint folder not found: ./absent")
    refused(lambda: check_training(places(), base, keys, tmp_path / "absent"), "image folder not found")
    with pytest.raises(UserError, match="unknown method 'magic'"):
        check_training(dataclasses.replace(places(), method="magic"), base, keys, folder)
    monkeypatch.setattr(preflight, "_bytes_of", lambda _: 10**18)
    refused(lambda: check_training(places(), base, keys, folder), "the stages take about")


def test_keys_of_another_base_and_a_damaged_base_are_named(world, places, tmp_path):
    folder, keys = world.folder / "images", str(world.keys)
    other = tmp_path / "llava-other"
    shutil.copytree(world.base, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "intermediate_size": 65}))
    refused(lambda: check_training(places(), str(other), keys, folder), "the slots were trained on base")
    (other / "tokenizer_config.json").write_text("[]")
    refused(lambda: check_base(str(other)), "tokenizer_config.json: expected a JSON object")
    pool = Pool.read(world.keys)
    assert check_base(str(world.base)).fingerprint == pool.base["fingerprint"]


def test_the_scripts_command_is_the_same_look(world, monkeypatch, capsys):
    from tiny_world import run_main

    monkeypatch.setenv("BASE_MODEL", str(world.base))
    words = ["check", world.sequence, "--keys", world.keys]
    run_main(tasks.main, *words)
    for more, said in (
        (["--method", "magic"], "unknown method 'magic'"),
        (["--zero", "absent.json"], "DeepSpeed settings not found"),
    ):
        refused(lambda: run_main(tasks.main, *words, *more), said)  # noqa: B023
