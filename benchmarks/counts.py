"""How often a command, with all the Python processes it starts, loads models and towers and opens and encodes pictures.

    python benchmarks/counts.py -- bash finetune_continual.sh

Only libraries are watched (transformers, torch, Pillow), never this project's modules, so that two versions of the
project can be compared. One column each, summed per command and over all::

    models       loads of a language model, with or without a vision tower in it
    towers in    vision towers whose weights came with such a load
    towers apart vision towers whose weights were read by themselves
    openings     of picture files, and how many different ones
    passes       pictures that went through a tower, how many different ones, and in how many calls

On a phantom of 72 training and 72 test questions, over a base of a few thousand random weights::

    export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 D=$PWD/output/counts
    export SEQUENCE=$D/phantom.json BASE_MODEL=$D/tiny-llava-base OUTPUT_DIR=$D/output
    export KEYS=$OUTPUT_DIR/prompt-key/merged_prompt_key.pth
    export ZERO=none EPOCHS=2 BATCH_SIZE=8 LEARNING_RATE=2e-2 MAX_NEW_TOKENS=4
    python scripts/make_phantom.py --output_dir $D/data --size 32 --train_rows 24 --train_images 12 \\
        --test_rows 24 --test_images 12
    PYTHONPATH=tests:. python -c "import pathlib, tiny_llava as t; t.write_base(pathlib.Path('$BASE_MODEL'))"
    sed "s:data/phantom:$D/data:" scripts/tasks/phantom.json > $SEQUENCE
    python benchmarks/counts.py -- bash -c 'for task in abd chest head; do python train_prompt_key.py --task $task \\
        --save_path $OUTPUT_DIR/prompt-key/$task.pth --cache_dir $OUTPUT_DIR/cache/queries; done'
    python merge_prompt_key.py --key_dir $OUTPUT_DIR/prompt-key
    python benchmarks/counts.py -- bash finetune_continual.sh
    python benchmarks/counts.py -- bash cv805.sh
"""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = "COUNTS_FOLDER"
MODEL, TOWER_IN, TOWER, PICTURE, PASS = "models", "towers in", "towers apart", "openings", "passes"
OTHER = "other models"
LANGUAGE, VISION = "ForCausalLM", "CLIPVisionModel"
ROW = "{:<22} {:>7} {:>10} {:>13} {:>21} {:>26}"
STARTUP = """
import importlib.machinery, importlib.util, os, sys
here = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("_counts", {counts!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
others = [place for place in sys.path if os.path.abspath(place) != here]
spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
if spec is not None:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
"""A ``sitecustomize.py``: every Python process reads it first. It then runs the one that it stands before."""


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``actions[name](module)`` when a module of that name has been imported."""

    def __init__(self, actions):
        self.actions = actions

    def find_spec(self, name, path, target=None):
        if name not in self.actions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), self.actions[name](module))
        return spec


def note(kind: str, *values: str) -> None:
    """Append one event to this process's file; written at once, however the process ends."""
    command = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else "python"
    with open(Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps([command, kind, values]) + "\n")


loading = []
"""The towers read since the outermost ``from_pretrained`` began, one list while one runs."""


def watch_models(module) -> None:
    """Loads: the class of what the outermost ``from_pretrained`` returns says what was loaded."""
    plain = module.PreTrainedModel.from_pretrained.__func__

    @functools.wraps(plain)
    def from_pretrained(cls, *args, **kwargs):
        if loading:
            loading[0] += [cls] if cls.__name__ == VISION else []
            return plain(cls, *args, **kwargs)
        loading.append([])
        try:
            made = plain(cls, *args, **kwargs)
        finally:
            towers = loading.pop()
        model = made[0] if isinstance(made, tuple) else made
        if not holds(model, LANGUAGE):
            note(TOWER if holds(model, VISION) else OTHER)
            return made
        note(MODEL)
        if holds(model, VISION):
            note(TOWER if towers else TOWER_IN)
        return made

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def watch_states(module) -> None:
    """Weights that are put into a tower that stands alone."""
    plain = module.Module.load_state_dict

    @functools.wraps(plain)
    def load_state_dict(self, *args, **kwargs):
        if not loading and holds(self, VISION) and not holds(self, LANGUAGE):
            note(TOWER)
        return plain(self, *args, **kwargs)

    module.Module.load_state_dict = load_state_dict


def holds(module, ending: str) -> bool:
    """Whether a part of ``module`` is of a class whose name ends so."""
    return any(type(part).__name__.endswith(ending) for part in module.modules())


def watch_passes(module) -> None:
    """Pictures that go through a tower, told apart by their pixels."""
    plain = module.CLIPVisionModel.forward

    @functools.wraps(plain)
    def forward(self, *args, **kwargs):
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        pictures = pixels.detach().float().cpu().numpy()
        note(PASS, *(hashlib.sha256(picture.tobytes()).hexdigest()[:16] for picture in pictures))
        return plain(self, *args, **kwargs)

    module.CLIPVisionModel.forward = forward


def watch_pictures(module) -> None:
    """Openings of pictures, by path, or by content where it is no file."""
    plain = module.open

    @functools.wraps(plain)
    def opened(fp, *args, **kwargs):
        path = fp if isinstance(fp, (str, os.PathLike)) else getattr(fp, "name", None)
        if path is None and hasattr(fp, "getvalue"):
            path = hashlib.sha256(fp.getvalue()).hexdigest()
        note(PICTURE, os.path.abspath(path) if path else "unnamed")
        return plain(fp, *args, **kwargs)

    module.open = opened


def table(events: list) -> str:
    """One line for each command and one for all of them."""
    names = ("command", MODEL, TOWER_IN, TOWER, "openings (different)", "passes (different, calls)")
    lines = [ROW.format(*names)]
    for command in [*dict.fromkeys(event[0] for event in events), "all"]:
        own = [(kind, values) for name, kind, values in events if command in (name, "all")]
        count = Counter(kind for kind, _ in own)
        seen = {kind: [v for found, values in own if found == kind for v in values] for kind in (PICTURE, PASS)}
        openings = f"{count[PICTURE]} ({len(set(seen[PICTURE]))})"
        passes = f"{len(seen[PASS])} ({len(set(seen[PASS]))}, {count[PASS]})"
        cells = (command, count[MODEL], count[TOWER_IN], count[TOWER], openings, passes)
        others = f"  and {count[OTHER]} other models" if count[OTHER] else ""
        lines.append(ROW.format(*cells) + others)
    return "\n".join(lines)


@dataclass
class Arguments:
    """Words."""

    command: list[str] = field(metadata={"positional": True, "help": "command to run, after --"})


def main() -> int:
    from llava.cli import parse  # here: the watched processes load this file too

    command = parse(Arguments, description=__doc__.splitlines()[0]).command
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "sitecustomize.py").write_text(STARTUP.format(counts=str(Path(__file__).resolve())))
        paths = os.pathsep.join([place, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**os.environ, FOLDER: place, "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, check=False)
        files = sorted(Path(place).glob("*.jsonl"), key=lambda file: file.stat().st_ctime_ns)
        events = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    print(table(events))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
elif FOLDER in os.environ:
    actions = {"transformers.modeling_utils": watch_models, "torch.nn.modules.module": watch_states}
    actions |= {"transformers.models.clip.modeling_clip": watch_passes, "PIL.Image": watch_pictures}
    sys.meta_path.insert(0, AfterImport(actions))
