"""The evaluation script from end to end on a tiny model: stages, chunks in parallel, scores, matrix, repeating."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_llava import write_base, write_images, write_stage
from warm_python import warm_python

from llava.data.rows import question_row, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("abd", "chest")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cv805")
    base = write_base(folder / "tiny-base")
    write_stage(folder / "output" / "llava-tiny_abd", base, TASKS[:1])
    write_stage(folder / "output" / "llava-tiny_abd_chest", base, TASKS)
    write_images(folder / "images", [f"{number}.png" for number in range(4)])
    rows = [
        question_row(n, f"{n % 4}.png", f"is there a lesion {n}?", "yes", TASKS[n % 2], TASKS, answer_type="CLOSED")
        for n in range(7)
    ]
    write_jsonl(folder / "test.jsonl", rows)
    sequence = {
        "name": "tiny",
        "tasks": [{"name": task, "train": str(folder / "test.jsonl")} for task in TASKS],
        "test": str(folder / "test.jsonl"),
        "image_folder": str(folder / "images"),
        "metrics": ["exact_match", "rouge_l"],
    }
    (folder / "tiny.json").write_text(json.dumps(sequence))
    return folder


def run(place, cwd=ROOT, **settings):
    environment = {
        **os.environ,
        "SEQUENCE": str(place / "tiny.json"),
        "BASE_MODEL": str(place / "tiny-base"),
        "OUTPUT_DIR": str(place / "output"),
        "CUDA_VISIBLE_DEVICES": "",
        "MAX_NEW_TOKENS": "4",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{warm_python().parent}{os.pathsep}{os.environ['PATH']}",
        **settings,
    }
    return subprocess.run(
        ["bash", ROOT / "cv805.sh"], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
def test_the_whole_sequence_is_evaluated_and_repeating_changes_nothing(place):
    done = run(place, CHUNKS="2")
    assert done.returncode == 0, done.stderr
    folder = place / "output" / "eval" / "tiny"
    models = ["zero-shot", "llava-tiny_abd", "llava-tiny_abd_chest"]
    for model in models:
        answers = [json.loads(line) for line in (folder / model / "answers.jsonl").read_text().splitlines()]
        assert [answer["question_id"] for answer in answers] == list(range(7))
        assert sorted(path.name for path in (folder / model / "chunks").iterdir()) == ["2_0.jsonl", "2_1.jsonl"]
        assert json.loads((folder / model / "scores.json").read_text())["groups"].keys() == {"overall", *TASKS}
    matrix = json.loads((folder / "accuracy_matrix.json").read_text())
    assert matrix["stages"] == models[1:]
    assert matrix["zero_shot_model"] == "tiny-base"
    last = done.stdout[done.stdout.index("retrieval on tiny: 7 questions") :].splitlines()
    assert len(last) <= 40 and max(map(len, last[:-2])) <= 100
    assert any(line.startswith("  its majority") for line in last) and any("after chest" in line for line in last)
    assert last[-2] == f"every figure: {folder / 'accuracy_matrix.json'} and */scores.json beside it"
    assert last[-1].startswith(f"the page: {folder / 'report.html'}; ") and (folder / "report.html").is_file()

    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    (folder / "llava-tiny_abd" / "chunks" / "2_1.jsonl").unlink()  # a chunk that never finished
    again = run(place, CHUNKS="2")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is up to date") == 3
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


@pytest.mark.slow
def test_what_is_missing_is_named(place):
    done = run(place, METHOD="joint")
    assert done.returncode == 2
    assert "llava-tiny-joint_abd" in done.stderr
    assert "finetune_continual.sh" in done.stderr
    done = run(place, SEQUENCE="no-such-sequence")
    assert done.returncode == 2
    assert "no-such-sequence" in done.stderr


def test_settings_reach_the_command_and_empty_ones_are_left_to_it(place, tmp_path):
    """The sequence's suffix serves a model that keeps none; only the environment overrides what a stage keeps."""
    log, wrapper = tmp_path / "log", tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nprintf "<%s>" "$@" >> {log}\necho >> {log}\n')
    wrapper.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    asked = {"ANSWER_SUFFIX": "", "CONV_MODE": "llava_v0", "IMAGE_ASPECT_RATIO": "square", "ZERO_SHOT": "0"}
    asked["PICTURES"] = "real blank"
    for settings in ({}, asked):
        assert run(place, PATH=path, **settings).returncode == 0
    plain, told = log.read_text().splitlines()
    assert plain.startswith("<-m><llava.eval.evaluate_sequence><--sequence>")
    assert "<--answer_suffix>" not in plain and "<--conv_mode><><--image_aspect_ratio><>" in plain
    assert "<--conv_mode><llava_v0><--image_aspect_ratio><square>" in told and "<--answer_suffix><>" in told
    assert "<--follow_links><0>" in plain and plain.endswith("<--page><1>")
    assert "<--pictures><real><--picture_seed><0>" in plain and "<--pictures><real><blank><--picture_seed>" in told
    assert "<--zero_shot><0>" in told and "<--max_new_tokens><4>" in told


@pytest.mark.slow
def test_relative_paths_are_the_callers(place):
    settings = {"SEQUENCE": "tiny.json", "BASE_MODEL": "tiny-base", "OUTPUT_DIR": "nowhere"}
    done = run(place, cwd=place, **settings)
    assert done.returncode == 2
    assert done.stderr.startswith("error: stage checkpoint not found: nowhere/llava-tiny_abd ")
    done = run(place, cwd=place, **{**settings, "OUTPUT_DIR": "output", "CHUNKS": "0"})
    assert (done.returncode, done.stderr.splitlines()[-1][:27]) == (2, "error: CHUNKS is '0'; give ")


@pytest.mark.slow
def test_a_failing_worker_fails_the_script(place, tmp_path):
    """Two devices, so two processes; the stage's slots are no slots."""
    output = tmp_path / "output"
    for stage in ("llava-tiny_abd", "llava-tiny_abd_chest"):
        shutil.copytree(place / "output" / stage, output / stage)
    broken = output / "llava-tiny_abd_chest"
    shutil.copy(place / "tiny-base" / "config.json", broken / "adapter_config.json")  # a LoRA that is none
    done = run(place, OUTPUT_DIR=str(output), CUDA_VISIBLE_DEVICES="0,1", ZERO_SHOT="0")
    assert done.returncode == 2
    assert "answering failed on device 0, 1 (message above)" in done.stderr
    assert "adapter" in done.stderr
    assert not list((output / "eval").glob("*/*/answers.jsonl"))
    assert len(list((output / "eval" / "tiny" / "llava-tiny_abd" / "chunks").glob("2_*.jsonl"))) == 2
