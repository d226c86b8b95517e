"""LLaVA's stages on two processes, under DDP, ZeRO-2 and ZeRO-3: the same weights as on one."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_parts import stage_words, write_parts
from tiny_world import arguments
from warm_python import warm_python

from llava.checkpoints.weights import load_bin
from llava.train.train import train

ROOT = Path(__file__).resolve().parents[2]
ROWS = 4  # of a step, over all processes
# Plain gradient descent: Adam would divide the rounding of gradients that are nothing by itself. Whole steps of one
# epoch: where rows are left over, two processes fill the last step with rows of the first.
STEPS = ("--optim", "sgd", "--learning_rate", "5e-2", "--max_steps", 4, "--lr_scheduler_type", "constant")
KINDS = {
    "align": ("align.json", "--version plain --tune_mm_mlp_adapter True --max_steps 2"),
    "instruct": ("instruct.json", "--version v1 --group_by_modality_length True"),
    "tower": ("instruct.json", "--version v1 --group_by_modality_length True --unfreeze_mm_vision_tower True"),
    "lora": ("instruct.json", "--version v1 --lora_enable True --lora_r 2 --lora_dropout 0 --lora_alpha 4"),
    "checkpointed": ("instruct.json", "--version v1 --gradient_checkpointing True --feature_cache_mb 0"),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """Each kind on one process, trained once; and with a learning rate of nothing."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def stage(kind, *more):
        key = (kind, *more)
        if key not in done:
            data, flags = KINDS[kind]
            done[key] = folder / f"llava-{len(done)}"
            own = ("--per_device_train_batch_size", ROWS, *more)
            with arguments(stage_words(parts, done[key], data, *STEPS, *flags.split(), *own)):
                train()
        return weights(done[key])

    return stage


def weights(stage):
    from safetensors.torch import load_file

    found = {}
    for file in [*sorted(stage.glob("*.safetensors")), *sorted(stage.glob("*.bin"))]:
        found |= load_file(file) if file.suffix == ".safetensors" else load_bin(file)
    return found


def launch(parts, stage, kind, *more, program=ROOT / "llava" / "train" / "train_mem.py"):
    """A run on two processes."""
    data, flags = KINDS[kind]
    own = ("--per_device_train_batch_size", ROWS // 2, *more)
    words = stage_words(parts, stage, data, *STEPS, *flags.split(), *own)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    launcher = [str(warm_python()), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(program), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def together(parts, stage, kind, *more):
    done = launch(parts, stage, kind, *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return weights(stage)


def check(found, expected, still):
    assert found.keys() == expected.keys()
    moved = [name for name, value in expected.items() if (value - still[name]).abs().max() > 1e-3]
    assert moved
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-5, name


def cases(usual, every):
    """Those that always run, and the others for ``--thorough``."""
    return [case if case in usual else pytest.param(*case, marks=pytest.mark.thorough) for case in every]


@pytest.mark.slow
@pytest.mark.parametrize(("kind",), cases([("align",), ("instruct",)], [(kind,) for kind in KINDS]))
def test_two_processes_train_what_one_does(parts, alone, tmp_path, kind):
    """Also where the rows of one of them, or of both, hold no picture."""
    found = together(parts, tmp_path / "llava-two", kind)
    check(found, alone(kind), alone(kind, "--learning_rate", 0))


USUAL = [("instruct", 2), ("instruct", 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), cases(USUAL, [(kind, stage) for kind in KINDS for stage in (2, 3)]))
def test_zero_trains_what_plain_training_does(parts, alone, tmp_path, kind, stage):
    """The parts of the weights are gathered into whole files."""
    pytest.importorskip("deepspeed")
    found = together(parts, tmp_path / "llava-zero", kind, "--deepspeed", ROOT / "scripts" / f"zero{stage}.json")
    check(found, alone(kind), alone(kind, "--learning_rate", 0))


STOPPER = """
import sys
sys.path.insert(0, {root!r})
from llava.train import llava_trainer
save = llava_trainer.LLaVATrainer._save_checkpoint

def stop(self, model, trial):
    save(self, model, trial)
    if self.state.global_step == 2:
        raise KeyboardInterrupt

llava_trainer.LLaVATrainer._save_checkpoint = stop
from llava.train.train_mem import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage",), cases([(3,)], [(2,), (3,)]))
def test_a_run_under_zero_goes_on_where_it_was_stopped(parts, tmp_path, stage):
    pytest.importorskip("deepspeed")
    zero = ("--deepspeed", ROOT / "scripts" / f"zero{stage}.json", "--save_strategy", "steps", "--save_steps", 2)
    whole = together(parts, tmp_path / "a" / "llava-zero", "instruct", *zero)
    driver, place = tmp_path / "stopper.py", tmp_path / "b" / "llava-zero"
    driver.write_text(STOPPER.format(root=str(ROOT)), encoding="utf-8")
    assert launch(parts, place, "instruct", *zero, program=driver).returncode != 0
    assert (place.parent / "checkpoints" / place.name / "checkpoint-2" / "complete").is_file()
    resumed = together(parts, place, "instruct", *zero)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
