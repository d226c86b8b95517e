"""What an evaluation was asked, as its folder keeps it: the command, the machine, and what a broken file is told."""

import json

import pytest

from llava.eval.evaluation import Evaluation, Settings
from llava.eval.evaluation_record import command_of, machine_in_words, read_evaluation_record, write_evaluation_record
from llava.utils import UserError


def test_the_command_says_what_is_not_the_default():
    asked = Settings(sequence="phantom", base_model="output/my base", route="oracle", zero_shot=False, chunks="4")
    words = "--sequence phantom --base_model 'output/my base' --route oracle --zero_shot False"
    assert command_of(asked) == f"python -m llava.eval.evaluate_sequence {words}"


def test_what_is_written_is_read_again_whatever_the_order_of_the_pictures(tmp_path):
    found = []
    for kinds in (["blank", "real"], ["real", "blank"]):
        asked = Settings(sequence="phantom", base_model="a/base", output_dir=str(tmp_path), pictures=kinds)
        found.append(read_evaluation_record(write_evaluation_record(Evaluation.of(asked, 1))))
    assert found[0] == found[1]
    assert found[0]["base"] == "base" and found[0]["pictures"] == ["real", "blank"]
    assert found[0]["command"].endswith("--pictures real blank")
    assert found[0]["image_folder"] == "data/phantom/images" and found[0]["versions"]["torch"]


def test_the_machine_is_told_in_words():
    assert " CPU core" in machine_in_words()


@pytest.mark.parametrize(
    "change, message", [({"method": None}, "'method' is missing"), ({"follow_links": 1}, "follow_links")]
)
def test_a_broken_record_is_named(tmp_path, change, message):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"format_version": 1, "sequence": "tiny", "method": "ewc", **change}))
    with pytest.raises(UserError, match=message):
        read_evaluation_record(file)
