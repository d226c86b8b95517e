"""Where a sequence's files lie: the names that scripts, commands and documents rely on."""

from pathlib import Path

import pytest

from llava.continual.places import Places
from llava.continual.sequence import load_sequence
from llava.utils import UserError


def test_stages_and_their_work():
    places = Places(Path("out"), load_sequence("phantom", {}), "sequential")
    assert list(map(str, places.stages)) == [
        "out/llava-phantom-sequential_abd",
        "out/llava-phantom-sequential_abd_chest",
        "out/llava-phantom-sequential_abd_chest_head",
    ]
    assert places.stage("chest") == places.stages[1]
    assert places.stage_before("chest") == places.stages[0] and places.stage_before("abd") is None
    assert str(places.work(places.stage("abd"))) == "out/checkpoints/llava-phantom-sequential_abd"
    with pytest.raises(UserError, match="unknown task 'knee'"):
        places.stage("knee")


def test_keys_have_a_folder_for_each_sequence_but_the_first():
    first, other = (Places(Path("out"), load_sequence(name, {})) for name in ("vqa-rad", "slake"))
    assert str(first.key_file("abd")) == "out/prompt-key/abd.pth"
    assert str(first.merged_keys) == "out/prompt-key/merged_prompt_key.pth"
    assert str(other.key_file("ct")) == "out/prompt-key/slake/ct.pth"
    assert str(other.merged_keys) == "out/prompt-key/slake/merged_prompt_key.pth"


def test_evaluation_names_what_is_not_usual():
    sequence = load_sequence("slake", {})
    assert str(Places(Path("out"), sequence).evaluation()) == "out/eval/slake"
    assert str(Places(Path("out"), sequence).evaluation("oracle")) == "out/eval/slake-oracle"
    assert str(Places(Path("out"), sequence, "joint").evaluation("keys")) == "out/eval/slake-joint-keys"
    assert str(Places(Path("out"), sequence).report("oracle")) == "out/eval/slake-oracle/report.html"


@pytest.mark.parametrize(
    "name, folder, command",
    [
        ("vqa-rad", "llava-medical-base", "bash scripts/make_medical_base.sh"),
        ("slake", "llava-medical-base", "bash scripts/make_medical_base.sh"),
        ("phantom", "tiny-base", "python scripts/make_tiny_base.py"),
    ],
)
def test_the_base_is_the_flag_the_sequences_or_the_one_made_here(tmp_path, name, folder, command):
    places = Places(tmp_path, load_sequence(name, {}))
    assert places.made_base == tmp_path / folder
    with pytest.raises(UserError, match=f"no base model for sequence '{name}': .*or make one with {command}"):
        places.base_model()
    places.made_base.mkdir()
    (places.made_base / "config.json").write_text("{}")
    assert places.base_model() == str(places.made_base)
    assert places.base_model("given") == "given"
    given = Places(tmp_path, load_sequence(name, {"BASE_MODEL": "hub/name"}))
    assert given.base_model() == "hub/name" and given.made_base is None


def test_the_root_is_output_dir():
    sequence = load_sequence("phantom", {})
    assert Places.of(sequence, environ={}).root == Path("output")
    assert Places.of(sequence, environ={"OUTPUT_DIR": "elsewhere"}).root == Path("elsewhere")
    assert str(Places.of(sequence, environ={}).query_cache) == "output/cache/queries"
