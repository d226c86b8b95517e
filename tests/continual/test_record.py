"""The record of a run holds every setting that decides what is learned; one that is left out says why."""

from dataclasses import fields

import pytest

from llava.continual.methods import METHODS
from llava.continual.record import (
    IGNORED,
    checksums,
    deepspeed_record,
    defaults,
    difference,
    plain,
    read_record,
    settings_record,
)
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.utils import UserError

GROUPS = (ModelArguments, DataArguments, TrainingArguments)
OPTIONS = [METHODS.get(name).Options for name in METHODS.names()]
RECORDED = [(kind, item.name) for kind in (*GROUPS, *OPTIONS) for item in fields(kind) if item.name not in IGNORED]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    return (ModelArguments(), DataArguments(task="abd"), TrainingArguments(folder, use_cpu=True, report_to="none"))


@pytest.fixture(scope="module")
def record(groups):
    return settings_record(*groups)


def test_every_setting_is_recorded_or_left_out_with_a_reason(groups, record):
    names = {item.name for group in groups for item in fields(group)}
    assert names == set(record) | (names & set(IGNORED)) and not set(record) & set(IGNORED)
    for reason in IGNORED.values():
        assert len(reason.split()) >= 4


@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "optim", "adam_epsilon", "lr_scheduler_type", "max_grad_norm", "seed",
             "per_device_train_batch_size", "lora_r", "bits", "label_smoothing_factor", "task", "method"]
)  # fmt: skip
def test_what_shapes_the_weights_is_recorded(record, name):
    assert name in record


@pytest.mark.parametrize("kind, name", RECORDED, ids=lambda part: getattr(part, "__name__", part))
def test_any_other_value_is_a_difference(kind, name):
    kept = {"record": 2, name: "then"}
    assert difference(kept, {"record": 2, name: "now"}, {}) == f"{name} = then, now it is now"
    assert difference(kept, dict(kept), {}) is None


def test_no_option_of_a_method_hides_behind_an_ignored_name():
    taken = {item.name for kind in GROUPS for item in fields(kind)} | set(IGNORED)
    for options in OPTIONS:
        assert not taken & {item.name for item in fields(options)}, options


def test_plain_values_come_back_from_json_as_they_are(record):
    import json

    assert json.loads(json.dumps(record)) == record
    assert record["lr_scheduler_type"] == "linear" and record["task"] == "abd"
    assert plain({"a": (1, 2), "b": {3}}) == {"a": [1, 2], "b": [3]}


def test_a_setting_that_another_version_of_a_library_does_not_know_agrees_with_its_default(groups, record):
    unset = defaults(*groups)
    older = {name: value for name, value in record.items() if name != "label_smoothing_factor"} | {"record": 2}
    now = record | {"record": 2}
    assert difference(older, now, unset) is None and difference(now, older, unset) is None
    now["label_smoothing_factor"] = 0.1
    assert "label_smoothing_factor = None, now it is 0.1" in difference(older, now, unset)


def test_records_of_the_first_version_are_compared_as_far_as_they_go(record):
    old = {"task": "abd", "learning_rate": record["learning_rate"], "data": {"train_abd.jsonl": "0" * 16}}
    assert difference(old, record | {"record": 2}, {}) is None
    assert difference(old | {"learning_rate": 7}, record | {"record": 2}, {}).startswith("learning_rate = 7")


def test_a_message_names_the_prompts_setting_that_differs():
    kept = {"record": 2, "prompt": {"conv_mode": "plain", "answer_suffix": ""}}
    now = {"record": 2, "prompt": {"conv_mode": "plain", "answer_suffix": "Briefly."}}
    assert difference(kept, now, {}) == "prompt.answer_suffix = , now it is Briefly."


def test_files_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(name)
    files = [tmp_path / "a" / "train.jsonl", tmp_path / "b" / "train.jsonl"]
    first = checksums(files)
    assert len(set(first)) == 2
    files[0].write_text("changed")
    assert checksums(files)[0] != first[0] and checksums(files)[1] == first[1]


def test_deepspeeds_own_optimiser_is_recorded_and_its_buckets_are_not(tmp_path):
    (tmp_path / "zero.json").write_text(
        '{"optimizer": {"type": "Lion"}, "gradient_clipping": "auto", "zero_optimization": {"stage": 2}}'
    )
    assert deepspeed_record(tmp_path / "zero.json") == {"optimizer": {"type": "Lion"}}
    assert deepspeed_record(None) == {}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": '])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(UserError, match="training.json: the run's record is damaged"):
        read_record(tmp_path / "training.json")
