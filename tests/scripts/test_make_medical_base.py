"""make_medical_base.sh on tiny parts: the base it makes, and that a killed one ends in the same weights."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from raw_samples import write_slake
from safetensors.torch import load_file
from tiny_parts import write_parts
from warm_python import warm_python

from llava.checkpoints.weights import load_bin
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ["bash", str(ROOT / "scripts" / "make_medical_base.sh")]
BASE = "output/llava-medical-base"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_slake(folder / "slake")
    for number, path in enumerate(sorted((folder / "slake" / "imgs").rglob("*.jpg"))):
        Image.new("L", (40, 30), 20 * number).save(path)
    return folder


def settings(parts, **more):
    """What the script's block takes, with a caller's own settings that must not reach it."""
    tiny = {"BASE_LM": parts / "vicuna", "VISION_TOWER": parts / "clip", "SLAKE_DIR": parts / "slake"}
    tiny |= {"DATA_ARGS": "--side 16 --views 4 --turns 2 --phantoms 12 --phantom_turns 2"}
    tiny |= {
        "ALIGN_EPOCHS": 1,
        "ALIGN_BATCH": 2,
        "INSTRUCT_BATCH": 2,
        "BASE_MAX_LENGTH": 512,
        "WORKERS": 0,
        "BASE_SAVE_STEPS": 2,
    }
    tiny |= {"EPOCHS": 7, "SEED": 7, "BATCH_SIZE": 7, "ZERO": "none", "MAX_LENGTH": 1, "EXTRA_ARGS": "--no_such_flag"}
    tiny |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, **more}
    path = f"{warm_python().parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **{name: str(value) for name, value in tiny.items()}}


def make(parts, folder, **more):
    done = subprocess.run(
        SCRIPT, cwd=folder, env=settings(parts, **more), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def same(one, other):
    """The base may be written in bfloat16."""
    return torch.equal(one.bfloat16(), other.bfloat16())


@pytest.fixture(scope="module")
def made(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, make(parts, folder)


@pytest.mark.slow
def test_the_base_is_a_llava_and_is_made_once(parts, made):
    folder, said = made
    assert re.findall(r"== medical base, (\d/4)", said) == ["1/4", "2/4", "3/4", "4/4"]
    assert "min left for the whole" in said and said.splitlines()[-1].startswith(f"== the medical base is in {BASE}")
    trained = json.loads((folder / BASE / "training.json").read_text())
    assert trained["num_train_epochs"] == 1 and trained["prompt"]["conv_mode"] == "chatml_direct"
    _, model, processor, _ = load_pretrained_model(str(folder / BASE), None, device="cpu")
    tower = load_file(parts / "clip" / "model.safetensors")
    name = "embeddings.patch_embedding.weight"
    ((_, before),) = [item for item in tower.items() if item[0].endswith(name)]
    ((_, after),) = [item for item in model.get_vision_tower().state_dict().items() if item[0].endswith(name)]
    assert processor is not None and same(before, after)
    learned = load_bin(folder / f"{BASE}-parts" / "llava-align" / "mm_projector.bin")
    kept = model.get_model().mm_projector.state_dict()
    assert all(same(kept[name.split("mm_projector.")[1]], value) for name, value in learned.items())

    already = f"== the medical base is in {BASE} already\n"
    assert make(parts, folder, SLAKE_DIR="nowhere") == already == make(parts, folder)


@pytest.mark.slow
def test_a_base_of_another_slake_is_not_taken_for_this_one(parts, made, tmp_path):
    """A picture that was exchanged under its name; nothing is made anew before its owner has seen to the old rows."""
    folder, _ = made
    slake = shutil.copytree(parts / "slake", tmp_path / "slake")
    picture = sorted(slake.rglob("*.jpg"))[0]
    picture.write_bytes(picture.read_bytes() + b" ")
    done = subprocess.run(
        SCRIPT, cwd=folder, env=settings(parts, SLAKE_DIR=slake), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "holds rows made with other settings; remove it" in done.stderr


@pytest.mark.thorough
@pytest.mark.slow
def test_a_killed_base_ends_in_the_same_weights(parts, made, tmp_path):
    """Killed in the middle of both stages, everything that the command started at once."""
    work = {"3/4": f"{BASE}-parts/checkpoints/llava-align", "4/4": "output/checkpoints/llava-medical-base"}
    for place in work.values():
        run = subprocess.Popen(
            SCRIPT, cwd=tmp_path, env=settings(parts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        mark = tmp_path / place / "checkpoint-4" / "complete"
        while not mark.exists() and run.poll() is None:
            time.sleep(0.002)
        assert run.poll() is None, "it ended before it could be killed"
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    said = make(parts, tmp_path)
    assert "llava-align is finished already; skipped" in said and "going on from" in said
    whole, mended = (load_file(place / BASE / "model.safetensors") for place in (made[0], tmp_path))
    assert whole.keys() == mended.keys() and all(torch.equal(whole[name], mended[name]) for name in whole)


def test_without_slake_it_says_so_before_anything_is_made(parts, tmp_path):
    done = subprocess.run(
        SCRIPT, cwd=tmp_path, env=settings(parts, SLAKE_DIR="nowhere"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: SLAKE not found: nowhere (place it there")
    assert not list(tmp_path.iterdir())
