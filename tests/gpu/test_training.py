"""Stage 2 on a real GPU: what must be the same again is, bit for bit, and the base stays as it is.

Every run is a process of its own, as a user's is; they are started at once, for most of their time is Python's.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import EACH_STEP, difference
from tiny_world import same_slots

from llava.slots.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import os, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
from safetensors.torch import load_file
import tiny_runs
from tiny_world import World
from llava.train import train as train_module

world, finish = World(*map(Path, {world!r})), train_module.finish
task, stage, previous, kill, *more = sys.argv[1:]

def look(recipe, context, trainer, loss, args):
    expected = load_file(world.base / "model.safetensors")
    state = context.model.state_dict()
    known = [name for name in expected if name in state]
    assert len(known) > 20, (sorted(expected), sorted(state))
    for name in known:
        assert torch.equal(state[name].cpu(), expected[name].to(state[name].dtype)), name
    print("FROZEN", len(known), context.model.device, context.model.dtype, "LOSS", loss, flush=True)
    finish(recipe, context, trainer, loss, args)

train_module.finish = look
if int(kill):
    tiny_runs.kill_while_saving_step(int(kill))
world.train(task, stage, previous or None, *more)
"""
FIXED = ("--full_determinism", "True")
RUNS = {
    "once": (),
    "again": (),
    "fixed": FIXED,
    "fixed again": FIXED,
    "checkpointed": (*FIXED, "--gradient_checkpointing", "True"),
    "bf16": ("--bf16", "True"),
    "fp16": ("--fp16", "True"),
    "contextual": ("--method", "contextual"),
}
HALVES = ("bf16", "fp16")


class Runs:
    """Processes that train a task of the tiny world on a device."""

    def __init__(self, world, device, folder):
        self.world, self.folder, self.device = world, folder, device
        places = [str(getattr(world, name)) for name in ("folder", "base", "sequence", "keys")]
        self.driver = DRIVER.format(paths=[str(ROOT / "tests"), str(ROOT)], world=places)
        self.said = {}

    def stage(self, name, task="abd"):
        return self.folder / name.replace(" ", "-") / f"llava-tiny_{task}"

    def slots(self, name, task="abd"):
        return Pool.read(self.stage(name, task) / "slots.pth")

    def start(self, name, more, task="abd", before=None, kill=0):
        previous = str(self.stage(before)) if before else ""
        words = [task, str(self.stage(name, task)), previous, str(kill), *EACH_STEP, *more]
        words += ["--use_cpu", str(self.device == "cpu")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", self.driver, *words]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return name, subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **out)

    def end(self, started, code=0):
        name, process = started
        self.said[name] = process.communicate(timeout=300)[0]
        assert process.returncode == code, f"{name}: {process.returncode}\n{self.said[name][-3000:]}"


@pytest.fixture(scope="module")
def runs(device, world, tmp_path_factory):
    made = Runs(world, device, tmp_path_factory.mktemp("runs"))
    started = [made.start(name, more) for name, more in RUNS.items() if device != "cpu" or name not in HALVES]
    killed = made.start("killed", FIXED, kill=3)
    for one in started:
        made.end(one)
    made.end(killed, -signal.SIGKILL)
    second = [made.start("killed", FIXED), made.start("next", FIXED, "chest", before="fixed")]
    second.append(made.start("contextual next", RUNS["contextual"], "chest", before="contextual"))
    for one in second:
        made.end(one)
    return made


def test_every_run_is_on_the_device_and_leaves_the_base_bit_for_bit(runs, device):
    for name, said in runs.said.items():
        assert f"FROZEN {said.split('FROZEN ')[1].split()[0]} {device}" in said, name
    assert all(float(said.split("LOSS ")[1].split()[0]) < 100 for said in runs.said.values())


def test_with_full_determinism_a_seed_gives_the_same_file(runs):
    assert (runs.stage("fixed") / "slots.pth").read_bytes() == (runs.stage("fixed again") / "slots.pth").read_bytes()


def test_without_it_a_seed_gives_nearly_the_same(runs):
    apart = difference(runs.slots("once"), runs.slots("again"))
    print(f"two runs of a seed differ by {apart:.1e}; from full determinism by", end=" ")
    print(f"{difference(runs.slots('once'), runs.slots('fixed')):.1e}")
    assert apart < 0.05  # AdamW's first steps go by the gradients' signs


def test_a_killed_run_ends_as_an_undisturbed_one(runs):
    assert "going on from" in runs.said["killed"]
    assert (runs.stage("fixed") / "slots.pth").read_bytes() == (runs.stage("killed") / "slots.pth").read_bytes()


def test_the_next_task_leaves_the_first_one_bit_for_bit(runs):
    first, both = runs.slots("fixed"), runs.slots("next", "chest")
    assert both.names == ["abd", "chest"] and same_slots(first.task("abd"), both.task("abd"))


def test_frozen_slots_act_beside_those_that_train(runs):
    first, both = runs.slots("contextual"), runs.slots("contextual next", "chest")
    assert both.names == ["abd", "chest"] and same_slots(first.task("abd"), both.task("abd"))
    assert any(side.any() for side in both.task("chest").A.values())


def test_checkpointing_gradients_changes_little(runs):
    apart = difference(runs.slots("checkpointed"), runs.slots("fixed"))
    print(f"gradient checkpointing: {apart:.1e}")
    assert apart < 1e-3


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_trains_slots_of_float32(runs, half, device):
    if device == "cpu":
        pytest.skip("half precision is a GPU's")
    slots = runs.slots(half)
    tensors = [*slots.tasks[0].A.values(), *slots.tasks[0].B.values()]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors)
    apart = difference(slots, runs.slots("once"))
    print(f"{half}: {apart:.1e} from float32")
    if half == "bf16":  # float16's first steps are left out until the loss has its scale
        assert apart < 0.7 and not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors)
