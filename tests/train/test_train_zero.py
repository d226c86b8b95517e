"""Stage 2 under DeepSpeed on the CPU: it trains what plain training does, and a killed run goes on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import EACH_STEP
from tiny_world import LORA
from warm_python import warm_python

from llava.continual.run import Run
from llava.model.builder import load_pretrained_model
from llava.slots.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
METHODS_WITH_MEMORY = ("ewc", "l2p", "moelora")
ZERO_STAGES = ("zero2", "zero3")
DRIVER = """
import os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from llava.utils import quiet_libraries
quiet_libraries()
import tiny_runs
from tiny_world import LORA, World

world = World(*map(Path, {world!r}))
words = (*tiny_runs.EACH_STEP, "--deepspeed", {config!r})

def run(folder, kill=None, more=(), task="abd", before=None):
    def work():
        if kill:
            tiny_runs.kill_while_saving_step(kill)
        place = Path({folder!r}) / folder
        world.train(task, place / f"llava-tiny_{{task}}", before and place / before, *words, *more)
    return tiny_runs.in_a_process_of_its_own(work)

print("STATUS", run("undisturbed"), run("killed", 3), run("killed"), run("lora", more=LORA), flush=True)
print("WHOLE", run("whole", more=("--save_full_model", "True")), flush=True)
for zero in {zeros!r}:
    half = ("--bf16", "True", "--deepspeed", {config!r}.replace("zero3", zero))
    print("HALF", zero, run(f"half-{{zero}}", more=half), flush=True)
for name in {methods!r}:
    more = ("--method", name)
    codes = run(name, more=more), run(name, more=more, task="chest", before="llava-tiny_abd")
    print("METHOD", name, *codes, flush=True)  # a child would print once more what is left in the buffer
"""


@pytest.fixture(scope="module")
def zero3(world, tmp_path_factory):
    """Under ZeRO-3 on the CPU, in a process that starts DeepSpeed: an undisturbed run, a killed and resumed one, and
    one with a LoRA."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    places = [str(getattr(world, name)) for name in ("folder", "base", "sequence", "keys")]
    values = {
        "zeros": ZERO_STAGES,
        "methods": METHODS_WITH_MEMORY,
        "tests": str(ROOT / "tests"),
        "root": str(ROOT),
        "world": places,
        "folder": str(folder),
    }
    (folder / "driver.py").write_text(DRIVER.format(config=str(ROOT / "scripts" / "zero3.json"), **values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [str(warm_python()), str(folder / "driver.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    said = done.stdout[-3000:] + done.stderr[-3000:]
    assert f"STATUS 0 {-signal.SIGKILL} 0 0" in done.stdout and "WHOLE 0" in done.stdout, said
    assert all(f"HALF {zero} 0" in done.stdout for zero in ZERO_STAGES), said
    assert all(f"METHOD {name} 0 0" in done.stdout for name in METHODS_WITH_MEMORY), said
    assert "going on from" in done.stdout and "checkpoint-2" in done.stdout
    return folder


@pytest.mark.slow
def test_a_killed_zero3_run_ends_as_an_undisturbed_one(zero3):
    undisturbed, resumed = (zero3 / name / "llava-tiny_abd" / "slots.pth" for name in ("undisturbed", "killed"))
    assert undisturbed.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
def test_zero3_trains_what_plain_training_does(zero3, world, tmp_path):
    stage = tmp_path / "llava-tiny_abd"
    world.train("abd", stage, None, *EACH_STEP)
    sharded, plain = (Pool.read(folder / "slots.pth") for folder in (zero3 / "undisturbed" / stage.name, stage))
    for kind in ("A", "B"):
        one, other = getattr(sharded.tasks[0], kind)["o_proj"], getattr(plain.tasks[0], kind)["o_proj"]
        assert (one - other).norm() / other.norm() < 0.02


@pytest.mark.slow
def test_zero3_trains_a_lora_beside_the_slots_as_plain_training_does(zero3, world, tmp_path):
    world.train("abd", tmp_path / "llava-tiny_abd", None, *EACH_STEP, *LORA)
    places = [folder / "llava-tiny_abd" for folder in (zero3 / "lora", tmp_path)]
    sharded, plain = (load_file(place / "adapter_model.safetensors") for place in places)
    assert sharded.keys() == plain.keys() and any(value.abs().sum() > 0 for value in plain.values())
    for name, value in plain.items():
        assert (sharded[name] - value).norm() <= 0.02 * value.norm(), name
    one, other = (Pool.read(place / "slots.pth").tasks[0] for place in places)
    assert (one.A["o_proj"] - other.A["o_proj"]).norm() / other.A["o_proj"].norm() < 0.02


@pytest.mark.slow
def test_zero3_writes_the_whole_model_where_it_is_asked_to(zero3, world):
    """Its weights lie in parts on the devices; the checkpoint holds them whole and needs no base."""
    whole = zero3 / "whole" / "llava-tiny_abd"
    assert list(whole.glob("*.safetensors"))
    found, base = (load_pretrained_model(str(place), None, device="cpu")[1] for place in (whole, world.base))
    expected = base.state_dict()
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.items())
    assert found.retriever.pool.names == ["abd"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_slots_trained_in_bfloat16_are_written_as_the_optimizer_has_them(zero3, zero):
    task = Pool.read(zero3 / f"half-{zero}" / "llava-tiny_abd" / "slots.pth").tasks[0]
    for side in (task.A["o_proj"], task.B["o_proj"]):
        assert side.dtype == torch.float32 and not torch.equal(side, side.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS_WITH_MEMORY)
def test_zero3_trains_methods_that_keep_something_as_plain_training_does(zero3, world, tmp_path, method):
    more = (*EACH_STEP, "--method", method)
    world.train("abd", tmp_path / "llava-tiny_abd", None, *more)
    world.train("chest", tmp_path / "llava-tiny_chest", tmp_path / "llava-tiny_abd", *more)
    sharded, plain = (Run.open(folder / "llava-tiny_chest") for folder in (zero3 / method, tmp_path))
    assert sharded.memory.keys() == plain.memory.keys()
    for name, value in plain.memory.items():
        assert (sharded.memory[name] - value).norm() <= 0.05 * value.norm(), name
