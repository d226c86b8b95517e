"""The evaluation script from end to end on a tiny model: stages, chunks in parallel, scores, matrix, repeating."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_llava import write_base, write_images, write_stage

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


def run(place, **settings):
    environment = {
        **os.environ,
        "SEQUENCE": str(place / "tiny.json"),
        "BASE_MODEL": str(place / "tiny-base"),
        "OUTPUT_DIR": str(place / "output"),
        "CUDA_VISIBLE_DEVICES": "",
        "MAX_NEW_TOKENS": "4",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    return subprocess.run(
        ["bash", "cv805.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
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
    assert "majority_closed_accuracy" in done.stdout
    assert "after chest" in done.stdout

    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    (folder / "llava-tiny_abd" / "chunks" / "2_1.jsonl").unlink()  # a chunk that never finished
    again = run(place, CHUNKS="2")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is up to date") == 3
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before


def test_what_is_missing_is_named(place):
    done = run(place, METHOD="replay")
    assert done.returncode == 2
    assert "llava-tiny-replay_abd" in done.stderr
    assert "finetune_continual.sh" in done.stderr
    done = run(place, SEQUENCE="no-such-sequence")
    assert done.returncode == 2
    assert "no-such-sequence" in done.stderr


def test_a_stages_own_prompt_wins_unless_the_user_says_otherwise(place, tmp_path):
    """The sequence's suffix serves a model that keeps none; only the environment overrides what a stage keeps."""
    real, log = shutil.which("python"), tmp_path / "log"
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ncase "$2" in *loader) echo "$@" >> {log}; exit 2;; esac\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    sequence = json.loads((place / "tiny.json").read_text()) | {"answer_suffix": "Briefly."}
    (tmp_path / "tiny.json").write_text(json.dumps(sequence))
    run(place, PATH=path, SEQUENCE=str(tmp_path / "tiny.json"))
    asked = {"ANSWER_SUFFIX": "", "CONV_MODE": "llava_v0", "IMAGE_ASPECT_RATIO": "square"}
    run(place, PATH=path, SEQUENCE=str(tmp_path / "tiny.json"), **asked)
    plain, told = log.read_text().splitlines()
    assert "--default-answer-suffix Briefly." in plain and "--default-answer-suffix Briefly." in told
    assert not any(flag in plain for flag in (" --answer-suffix", "--conv-mode", "--image_aspect_ratio"))
    assert "--answer-suffix  --conv-mode llava_v0 --image_aspect_ratio square" in told


@pytest.mark.slow
def test_a_failing_chunk_fails_the_script(place):
    done = run(place, CHUNKS="2", BASE_MODEL=str(place / "absent"), OUTPUT_DIR=str(place / "output"), ROUTE="keys")
    assert done.returncode == 2
    assert "chunk 0" in done.stderr
    assert "absent" in done.stderr
    assert not list((place / "output" / "eval").glob("tiny-keys/*/answers.jsonl"))
