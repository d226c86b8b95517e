"""The quick start: its headings, what it gives beside the same steps by hand, and scripts started from elsewhere."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from faults.disturb import comparable, contents
from tiny_llava import write_base
from warm_python import warm_python

from llava.data.rows import read_rows
from llava.slots.pool import Pool
from llava.toy.phantom import PhantomConfig, make_phantom

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("abd", "chest")
STAGES = ("llava-mini_abd", "llava-mini_abd_chest")
HEADINGS = (
    "== 1/6 environment",
    "== 2/6 base model",
    "== 3/6 data: mini",
    "== 4/6 stage 1: prompt keys",
    "== 5/6 stage 2: the tasks one after the other",
    "== 6/6 evaluation",
)


def environment(**more):
    """Of a user who has set nothing; this process's python is the active one."""
    drop = {
        "SEQUENCE",
        "DATASET",
        "BASE_MODEL",
        "OUTPUT_DIR",
        "METHOD",
        "KEYS",
        "KEY_ARGS",
        "ZERO",
        "EPOCHS",
        "PYTHONPATH",
    }
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    kept |= {"MAX_NEW_TOKENS": "4", "ZERO_SHOT": "0"}
    return {**kept, "PATH": f"{warm_python().parent}{os.pathsep}{kept['PATH']}", **more}


def run(*words, cwd, **more):
    words = list(map(str, words))
    done = subprocess.run(words, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_setting_up_leaves_the_callers_names_alone(tmp_path):
    script = f"""set -euo pipefail
        say() {{ echo "== $*"; }}
        root=mine
        before=$(declare -F)
        source "{ROOT}/scripts/setup_env.sh"
        [ "$(declare -F)" = "$before" ]
        say "2/6 base model, $root, in $PWD"
        set +u; echo "left: $(compgen -v setup_)"; python -c "import llava; print(llava.__file__)"
    """
    lines = run("bash", "-c", script, cwd=tmp_path, EXTRAS="").splitlines()
    assert f"== 2/6 base model, mine, in {tmp_path}" in lines and "left: " in lines
    assert lines[-1] == str(ROOT / "llava" / "__init__.py")


def prepare(folder):
    """Data, a random base and a sequence with all its settings, named by relative paths."""
    config = PhantomConfig(size=32, train_rows=24, train_images=12, test_rows=12, test_images=12)
    make_phantom(folder / "data", config)
    write_base(folder / "tiny-llava-base")
    values = {
        "name": "mini",
        "tasks": [{"name": task, "train": f"data/train_{task}.jsonl"} for task in TASKS],
        "test": "data/test.jsonl",
        "image_folder": "data/images",
        "slots_per_task": 4,
        "keys": {"rank": 2, "targets": ["q_proj", "o_proj"], "text_encoder": "base", "iterations": 5},
        "train": {"epochs": 1, "learning_rate": 2e-2, "batch_size": 8, "zero": "none", "seed": 3},
        "base": {"model": "tiny-llava-base"},
    }
    test = folder / "data" / "test.jsonl"
    rows = [line for line, row in zip(test.read_text().splitlines(), read_rows(test)) if row.domain in TASKS]
    test.write_text("\n".join(rows) + "\n")
    (folder / "mini.json").write_text(json.dumps(values))
    return folder


def test_real_data_without_a_base_asks_for_what_the_medical_base_learns_from(tmp_path):
    """Before anything is made or read."""
    words = ["bash", str(ROOT / "scripts" / "quickstart.sh")]
    settings = environment(DATASET="vqa-rad", SLAKE_DIR="nowhere", EXTRAS="", OUTPUT_DIR="mine")
    done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == HEADINGS[1]
    assert done.stderr.splitlines()[-1].startswith("error: SLAKE not found: nowhere") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_quick_start_and_the_steps_by_hand_give_the_same(tmp_path):
    """Both from a folder of the user's own, with relative paths: everything lands there, and is equal to the byte."""
    folder = prepare(tmp_path)
    said = run("bash", ROOT / "scripts" / "quickstart.sh", cwd=folder, SEQUENCE="mini.json", EXTRAS="")
    assert tuple(line for line in said.splitlines() if line[:5] in {f"== {n}/" for n in range(1, 7)}) == HEADINGS
    assert "base model: tiny-llava-base" in said and "is taken as prepared" in said
    asked = f"--model-path output/{STAGES[-1]} --model-base tiny-llava-base --question-file data/test.jsonl"
    assert said.splitlines()[-1].endswith(f"gradio_web_server {asked} --image-folder data/images")
    first = (folder / "output").rename(folder / "first")  # the second gets its name: records name files
    hand = {"cwd": folder, "SEQUENCE": "mini.json", "OUTPUT_DIR": "output", "PYTHONPATH": str(ROOT)}
    for task in TASKS:
        run(warm_python(), ROOT / "train_prompt_key.py", "--task", task, **hand)
    run(warm_python(), ROOT / "merge_prompt_key.py", **hand)
    trained = run("bash", ROOT / "finetune_continual.sh", **hand)
    assert "== task 2 of 2: chest -> output/llava-mini_abd_chest" in trained
    run("bash", ROOT / "cv805.sh", **hand)
    found, wanted = (comparable(contents(output)) for output in (folder / "output", first))
    assert found.keys() == wanted.keys() and [name for name in wanted if found[name] != wanted[name]] == []
    keys = "prompt-key/mini/merged_prompt_key.pth"
    made = {keys, "eval/mini/accuracy_matrix.json"} | {f"{stage}/slots.pth" for stage in STAGES}
    made |= {f"eval/mini/{stage}/{name}" for stage in STAGES for name in ("answers.jsonl", "scores.json")}
    assert made <= wanted.keys()
    settings = Pool.read(first / keys).settings
    assert (settings.rank, settings.targets) == (2, ("q_proj", "o_proj"))
    assert not (ROOT / "output" / STAGES[0]).exists()
