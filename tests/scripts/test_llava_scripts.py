"""pretrain.sh, finetune.sh and finetune_lora.sh: the settings block's way, on a CPU and on tiny parts."""

import os
import subprocess
from pathlib import Path

import pytest
from tiny_parts import write_parts
from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_three_scripts_make_a_llava_one_after_the_other(tmp_path):
    parts = write_parts(tmp_path)
    common = {"BASE_LM": parts / "vicuna", "VISION_TOWER": parts / "clip", "IMAGE_FOLDER": parts / "images"}
    common |= {"PATH": f"{warm_python().parent}{os.pathsep}{os.environ['PATH']}"}
    common |= {"BATCH_SIZE": 4, "MAX_LENGTH": 256, "WORKERS": 0, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": 1}

    def run(script, **settings):
        values = {name: str(value) for name, value in {**common, **settings}.items()}
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / script)],
            cwd=tmp_path,
            env={**os.environ, **values},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    said = run("pretrain.sh", DATA_PATH=parts / "align.json", OUTPUT_DIR="llava-pretrain")
    assert "no GPU: training on the CPU" in said and "next: PROJECTOR=llava-pretrain/mm_projector.bin" in said
    tuned = {"DATA_PATH": parts / "instruct.json", "PROJECTOR": "llava-pretrain/mm_projector.bin"}
    run("finetune.sh", OUTPUT_DIR="llava-tuned", **tuned)
    assert "skipped" in run("finetune.sh", OUTPUT_DIR="llava-tuned", **tuned)
    run("finetune_lora.sh", OUTPUT_DIR="llava-lora", LORA_RANK=2, EXTRA_ARGS="--lora_dropout 0", **tuned)
    run("finetune.sh", OUTPUT_DIR="llava-task", **{**tuned, "BASE_LM": "llava-tuned", "PROJECTOR": ""})
    for name, file in (
        ("pretrain", "mm_projector.bin"),
        ("tuned", "model.safetensors"),
        ("lora", "non_lora_trainables.bin"),
        ("task", "model.safetensors"),
    ):
        assert (tmp_path / f"llava-{name}" / file).is_file()
