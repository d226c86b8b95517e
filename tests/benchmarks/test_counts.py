"""What ``benchmarks/counts.py`` counts, over a command of two processes whose loads and pictures are known."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import write_base, write_images

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
import torch
from PIL import Image
from llava.model.builder import load_pretrained_model, load_vision_tower
base, pictures = sys.argv[1], sys.argv[2:]
_, model, _, _ = load_pretrained_model(base, None, device="cpu")
model.get_vision_tower()(torch.zeros(2, 3, 16, 16))
load_vision_tower(Path(base))(torch.eye(16).expand(3, 3, 16, 16))
for picture in pictures:
    Image.open(picture)
"""


@pytest.mark.slow
def test_loads_openings_and_passes_are_counted_over_all_processes(tmp_path):
    base, images = write_base(tmp_path / "tiny-llava-base"), write_images(tmp_path / "images", ["a.png", "b.png"])
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    once = f"{sys.executable} {script} {base} {images / 'a.png'}"
    command = ["bash", "-c", f"PYTHONPATH={ROOT}:$PYTHONPATH; {once} {images / 'b.png'} && {once} && exit 3"]
    words = [sys.executable, ROOT / "benchmarks" / "counts.py", "--", *command]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("work "))
    assert line.split() == ["work", "2", "2", "2", "3", "(2)", "10", "(2,", "4)"]
