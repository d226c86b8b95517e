"""The same commands with the same seed, given again: every file is the same to the byte, whatever came before."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from faults.disturb import comparable, contents
from tiny_world import TASKS, World, pipeline_steps, write_sequence

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from pathlib import Path
from tiny_world import World, pipeline_steps

folder, base, sequence = map(Path, sys.argv[1:])
world = World(folder, base, sequence, folder / "none.pth")
for step in pipeline_steps(world, folder / "out", 3, sampled=True).values():
    step()
"""


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """Two of the shared world's tasks, so that a whole run takes seconds."""
    folder = tmp_path_factory.mktemp("same-again")
    return World(folder, world.base, write_sequence(folder, TASKS[:2]), folder / "none.pth")


def after(world, seed, noise, steps=None) -> dict[str, bytes]:
    """What so many steps of a run leave, or all; it begins with other states of everybody's random numbers."""
    out = world.folder / "out"  # records name files, so each run has the same folder
    shutil.rmtree(out, ignore_errors=True)
    random.seed(noise)
    numpy.random.seed(noise)
    torch.manual_seed(noise)
    for step in list(pipeline_steps(world, out, seed, sampled=True).values())[:steps]:
        step()
    return comparable(contents(out))


def test_two_whole_runs_with_one_seed_leave_the_same_files(small):
    first, again = (after(small, 3, noise) for noise in (1, 2))
    assert first.keys() == again.keys() and [name for name in first if first[name] != again[name]] == []
    made = {"keys/abd.pth", "keys/chest.pth", "keys/merged_prompt_key.pth", "eval/answers.jsonl"}
    for stage in ("llava-tiny_abd", "llava-tiny_abd_chest"):
        made |= {f"{stage}/slots.pth", f"{stage}/training.json", f"{stage}/log_history.json"}
    assert made <= first.keys() and any(name.endswith("scores.json") for name in first), sorted(first)
    other = after(small, 4, 1, 3)
    decided = {name for name in made if name in other}
    assert len(decided) == 6 and all(first[name] != other[name] for name in decided)


@pytest.mark.thorough
def test_the_order_of_pythons_sets_decides_nothing(small):
    """Nor anything else that differs between two processes."""
    found = []
    for seed in ("1", "2"):
        shutil.rmtree(small.folder / "out", ignore_errors=True)
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        words = [sys.executable, "-c", PROGRAM, small.folder, small.base, small.sequence]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed}, check=True)
        found.append(comparable(contents(small.folder / "out")))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
