"""Every stage and export says what it is: base, tasks, rows, settings, figures, licences, and not for clinical use."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_world import TASKS, make_world, run_main

from llava.checkpoints.card import (
    front_matter,
    licence_fields,
    licence_of,
    public_name,
    with_section,
    write_card,
    write_merged_card,
)
from llava.continual import slots as slots_command
from llava.continual.model_card import SUMMARY, figures, refresh_figures
from llava.continual.sequence import load_sequence, shipped_names
from llava.model.builder import load_pretrained_model
from llava.model.consolidate import consolidate_ckpt
from llava.model.convert import convert
from llava.slots.card import task_table
from llava.slots.pool import Pool


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a card of its own, and two stages, the last of which is trained twice."""
    world = make_world(tmp_path_factory.mktemp("card"), TASKS[:2])
    (world.base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    values = json.loads(world.sequence.read_text())
    world.sequence.write_text(json.dumps({**values, "licence": "CC0 1.0 (tiny)"}))
    world.train("abd", world.folder / "llava-tiny_abd")
    for name in ("llava-tiny_abd_chest", "again/llava-tiny_abd_chest"):
        world.train("chest", world.folder / name, world.folder / "llava-tiny_abd")
    return world


def card(folder):
    return (Path(folder) / "README.md").read_text(encoding="utf-8")


def section(text, name):
    return re.search(rf"<!-- llava: {name} -->\n(.*?)<!-- llava: end -->", text, re.DOTALL)[1]


def assert_no_place(text, world):
    assert str(world.folder) not in text and "/tmp" not in text and world.folder.parent.name not in text


def test_a_stage_has_a_card_that_the_hub_reads(world):
    stage = world.folder / "llava-tiny_abd_chest"
    text = card(stage)
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == ("tiny-llava-base", "apache-2.0", "llava")
    assert data.pipeline_tag == "image-text-to-text" and "medical" in data.tags
    pool = Pool.read(stage / "slots.pth")
    assert "Not for clinical use" in text and f"| tiny-llava-base | {pool.base['fingerprint']} |" in text
    for task in ("abd", "chest"):
        assert f"| {task} | {pool.task(task).info['rows']} | 2 | trained |" in section(text, "about")
    training = section(text, "training")
    assert "| tasks so far | abd, chest |" in training and "| training rows of this stage | 12 |" in training
    assert "| method | retrieval |" in training and "| learning_rate | 0.02 |" in training
    licence = section(text, "licence")
    assert "`apache-2.0`" in licence and "CC0 1.0 (tiny)" in licence
    assert_no_place(text, world)


def test_equal_runs_write_equal_cards_and_other_files_stay_as_they_are(world):
    one, other = (world.folder / name for name in ("llava-tiny_abd_chest", "again/llava-tiny_abd_chest"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir()) and "README.md" in names
    for name in ("README.md", "slots.pth", "training.json", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


MATRIX = {
    "tasks": ["abd", "chest"],
    "stages": ["llava-tiny_abd", "llava-tiny_abd_chest"],
    "metrics": {
        "exact_match": {
            "n": [30, 40],
            "matrix": [[0.5, 0.1], [0.5, 0.75]],
            "summary": {"average_final": {"value": 0.625}, "bwt": {"value": 0.0}, "forgetting": {"value": 0.0}},
        },
        "open_recall": {
            "n": [30, 40],
            "matrix": [[None, 0.1], [0.25, None]],
            "summary": {"average_final": {"value": None}, "bwt": {"value": None}, "forgetting": {"value": None}},
        },
    },
}


def test_figures_go_into_their_section_and_a_users_text_stays(world):
    stages = [world.folder / name for name in MATRIX["stages"]]
    mine = card(stages[1]).replace("# llava-tiny", "A note of mine.\n\n# llava-tiny", 1)
    mine = "\n".join([*mine.splitlines(), "", "## Mine", "kept to the letter  "])
    (stages[1] / "README.md").write_text(mine)
    refresh_figures(stages, MATRIX, "tiny")
    refresh_figures(stages, MATRIX, "tiny-oracle")
    first = card(stages[1])
    refresh_figures(stages, MATRIX, "tiny")
    assert card(stages[1]) == first and first.startswith(mine.rstrip())
    assert "| exact_match | 0.500 | 0.750 | 0.625 | 0.625 | 0.000 | 0.000 |" in section(first, "figures tiny")
    assert "| open_recall | 0.250 | – | 0.250 | – | – | – |" in section(first, "figures tiny")
    assert "| exact_match | 0.500 | 0.100 | 0.500 |" in section(card(stages[0]), "figures tiny-oracle")
    assert "abd 30, chest 40" in first
    changed = json.loads(json.dumps(MATRIX).replace("0.75", "0.8"))
    refresh_figures(stages, changed, "tiny")
    assert "0.800" in section(card(stages[1]), "figures tiny")
    assert "0.750" in section(card(stages[1]), "figures tiny-oracle")


def test_an_older_stage_gets_a_card_with_its_figures(world, tmp_path):
    stage = tmp_path / "llava-tiny_abd"
    stage.mkdir()
    for name in ("training.json", "config.json"):
        (stage / name).write_bytes((world.folder / "llava-tiny_abd" / name).read_bytes())
    Pool.read(world.folder / "llava-tiny_abd" / "slots.pth").write(stage / "slots.pth")
    refresh_figures([stage], MATRIX, "tiny")
    assert "Not for clinical use" in card(stage) and "0.500" in section(card(stage), "figures tiny")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EISDIR], ids=["denied", "read-only", "a folder"])
def test_a_stage_that_cannot_be_written_is_named_and_nothing_fails(world, monkeypatch, capsys, number):
    def refuse(*_, **__):
        raise OSError(number, "reason", "elsewhere")

    monkeypatch.setattr("llava.continual.model_card.write_card", refuse)
    refresh_figures([world.folder / "llava-tiny_abd"], MATRIX, "tiny")
    assert "README.md cannot be written (reason)" in capsys.readouterr().out


def test_taking_a_task_out_refreshes_the_card(world, tmp_path):
    stage = world.folder / "again" / "llava-tiny_abd_chest"
    refresh_figures([world.folder / "llava-tiny_abd", stage], MATRIX, "tiny")
    run_main(slots_command.main, "remove", stage, "chest", "--output", tmp_path / "llava-less")
    text = card(tmp_path / "llava-less")
    assert "| chest |" not in text and "| abd | 12 | 2 | trained |" in text and text.count("# llava-less") == 1
    assert "figures" not in text and "llava: training" not in text and "CC0 1.0 (tiny)" in text
    run_main(slots_command.main, "rename", tmp_path / "llava-less", "abd", "abdomen")
    assert "| abdomen | 12 |" in card(tmp_path / "llava-less")


def test_a_saved_stage_an_adapter_and_a_converted_base_have_cards(world, tmp_path):
    stage = world.folder / "llava-tiny_abd_chest"
    load_pretrained_model(str(stage), None, device="cpu")[1].save_pretrained(tmp_path / "llava-saved")
    saved = card(tmp_path / "llava-saved")
    assert "# llava-saved" in saved and "`apache-2.0`" in saved and "| chest | 12 |" in saved
    run_main(slots_command.main, "export-peft", stage, "chest", "--output", tmp_path / "chest-lora")
    adapter = card(tmp_path / "chest-lora")
    assert ModelCard(adapter).data.library_name == "peft" and "Task `chest`" in adapter
    assert ModelCard(adapter).data.base_model == "tiny-llava-base" and "Not for clinical use" in adapter
    convert(world.base, tmp_path / "base-hf", "to_hf")
    converted = card(tmp_path / "base-hf")
    assert converted.startswith("---\nlicense: apache-2.0\n---\n# The base\n") and "tensors renamed" in converted
    convert(tmp_path / "base-hf", tmp_path / "back", "from_hf")
    assert card(tmp_path / "back").count("llava: conversion") == 1
    consolidate_ckpt(str(world.base), str(tmp_path / "whole"))
    whole = card(tmp_path / "whole")
    assert ModelCard(whole).data.base_model == "tiny-llava-base" and "Not for clinical use" in whole
    for text in (saved, adapter, converted, whole):
        assert_no_place(text, world)
        assert str(tmp_path) not in text


def test_the_evaluation_writes_the_figures(world):
    from llava.eval import evaluate_sequence

    words = ["--sequence", world.sequence, "--base_model", world.base, "--output_dir", world.folder]
    run_main(evaluate_sequence.main, *words, "--max_new_tokens", 2)
    matrix = json.loads((world.folder / "eval" / "tiny" / "accuracy_matrix.json").read_text())
    for number, name in enumerate(("llava-tiny_abd", "llava-tiny_abd_chest")):
        text = section(card(world.folder / name), "figures tiny")
        assert text.strip() == figures(matrix, number, "tiny").strip()


def test_a_broken_block_in_a_bases_card_is_said_and_not_read(tmp_path, capsys):
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert front_matter(tmp_path) == {} and "is no YAML" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("# no block\n")
    assert front_matter(tmp_path) == front_matter(None) == {}


def test_names_say_nothing_of_the_machine(tmp_path):
    (tmp_path / "llava-med").mkdir()
    assert public_name(tmp_path / "llava-med") == "llava-med"
    assert public_name("liuhaotian/llava-v1.5-7b") == "liuhaotian/llava-v1.5-7b"
    assert public_name("output/tiny-base") == public_name("./tiny-base") == "tiny-base"
    assert public_name("~/models/llava") == "llava" and public_name(None) == ""
    assert public_name("/cache/hub/models--liuhaotian--llava-v1.5-7b/snapshots/4481d2/") == "liuhaotian/llava-v1.5-7b"


def test_a_text_encoder_of_ones_own_is_named_without_its_place(world):
    pool = Pool.read(world.folder / "llava-tiny_abd" / "slots.pth")
    pool.settings.encoder["name"] = "/srv/models/minilm"
    assert "question encoder `minilm`" in task_table(pool)


def test_a_licence_with_a_name_of_its_own_stays_one_that_the_hub_reads(tmp_path):
    fields = "license: other\nlicense_name: med-licence\nlicense_link: https://example.org"
    (tmp_path / "README.md").write_text(f"---\n{fields}\n---\n", encoding="utf-8-sig")
    assert licence_of(tmp_path) == "med-licence" and licence_fields(tmp_path) == yaml.safe_load(fields)
    write_merged_card(tmp_path / "whole", "whole", tmp_path)
    text = card(tmp_path / "whole")
    assert ModelCard(text).data.license == "other" and ModelCard(text).data.license_name == "med-licence"
    assert "`med-licence`, as its card states" in text


def test_a_card_that_a_user_has_broken_loses_nothing(tmp_path):
    for name in ("about", "training", "figures tiny"):
        write_card(tmp_path, {"base_model": "b"}, {name: f"{name} 1"})
    path = tmp_path / "README.md"
    broken = (
        path.read_text().replace("about 1\n<!-- llava: end -->", "mine").replace("figures tiny 1", "Gr\u00f6\u00dfe")
    )
    path.write_bytes(broken.replace("\n", "\r\n").encode("latin-1"))
    write_card(tmp_path, {}, {"about": "about 2"}, drop=["figures"])
    data = path.read_bytes()
    assert b"about 2\n<!-- llava: end -->\nmine" in data and b"training 1\r\n" in data and b"figures" not in data
    path.write_bytes(data + "Gr\u00f6\u00dfe".encode("latin-1"))
    write_card(tmp_path, {}, {"about": "about 3"})
    assert path.read_bytes().endswith("Gr\u00f6\u00dfe".encode("latin-1")) and b"about 2" not in path.read_bytes()


def test_sections_hold_what_looks_like_a_pattern(tmp_path):
    text = with_section(with_section("mine", "about", r"\1 \g<0>"), "about", r"\2 again")
    assert text == "mine\n\n<!-- llava: about -->\n\\2 again\n<!-- llava: end -->\n"
    write_card(tmp_path, {"license": "", "base_model": "a: b"}, {"about": "x"})
    assert yaml.safe_load(card(tmp_path).split("---")[1]) == {"base_model": "a: b"}


def test_shipped_sequences_say_their_datas_licence():
    assert all(load_sequence(name).licence for name in shipped_names())


def test_a_metric_that_is_missing_has_no_figures_but_leaves_the_others():
    """As METEOR without Java: the matrix then has neither value nor summary for it."""
    summary = {name: {"value": 0.5, "ci95": None} for name in SUMMARY}
    metrics = {
        "exact_match": {"matrix": [[0.25]], "summary": summary, "n": [4]},
        "meteor": {"matrix": [[None]], "summary": None, "n": [0]},
    }
    text = figures({"tasks": ["abd"], "stages": ["llava-tiny_abd"], "metrics": metrics}, 0, "tiny")
    rows = {
        line.split("|")[1].strip(): set(line.split("|")[2:-1]) for line in text.splitlines() if line.startswith("|")
    }
    assert {cell.strip() for cell in rows["meteor"]} == {"–"}
    assert {cell.strip() for cell in rows["exact_match"]} == {"0.250", "0.500"}
