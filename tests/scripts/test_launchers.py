"""What ``HOSTFILE`` and ``LAUNCHER`` make of a command, by programs that stand for the launchers'."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = 'source scripts/launchers.sh; launch_with some.module; "${launcher[@]}" --flag "two words"'
PYTHON = """#!/usr/bin/env bash
printf '<%s>' "$@"; echo " $RANK/$WORLD_SIZE/$LOCAL_RANK $MASTER_ADDR"
"""
SRUN = """#!/usr/bin/env bash
export SLURM_NTASKS=2
for number in 0 1; do SLURM_PROCID=$number SLURM_LOCALID=$number "${@:3}"; done
"""
# Two writes with time between: whoever stops reading after the first name ends it with a broken pipe.
SCONTROL = "#!/bin/sh\necho node7; sleep 0.2; echo node8\n"


@pytest.fixture
def launch(tmp_path):
    """Run ``SCRIPT``; returns what the programs were told."""
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(code=0, **settings):
        environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUTPUT_DIR": str(tmp_path / "output")}
        environment |= {"HOSTFILE": "", "LAUNCHER": "", **settings}
        command = ["bash", "-c", SCRIPT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout.splitlines() or done.stderr

    return run


def test_torchrun(launch):
    (said,) = launch(LAUNCHER="torchrun --nnodes 2 --nproc_per_node 8")
    words = "<-m><torch.distributed.run><--nnodes><2><--nproc_per_node><8><-m><some.module><--flag><two words>"
    assert said.startswith(words)


def test_every_process_of_slurm_knows_its_place(launch):
    said = launch(LAUNCHER="srun --ntasks-per-node 1", SLURM_JOB_NODELIST="node[7-8]")
    assert said == [f"<-m><some.module><--flag><two words> {number}/2/{number} node7" for number in range(2)]


def test_deepspeeds_launcher_takes_the_settings_along(launch, tmp_path):
    settings = {"SEQUENCE": "my tasks.json", "VQA_RAD_DIR": "/data", "EPOCHS": "3", "SECRET": "no"}
    (said,) = launch(HOSTFILE="hosts", MASTER_PORT="123", **settings)
    assert said.startswith("<-m><deepspeed.launcher.runner><--hostfile><hosts><--master_port><123><--no_local_rank>")
    assert "<--module><some.module><--flag><two words>" in said
    taken = (tmp_path / "output" / "launch.env").read_text().splitlines()
    assert {"SEQUENCE=my\\ tasks.json", "VQA_RAD_DIR=/data", "EPOCHS=3"} <= set(taken)
    assert not any("SECRET" in line or line.startswith("PATH=") for line in taken)


def test_another_launcher_is_refused(launch):
    assert launch(2, LAUNCHER="mpirun -n 2") == "error: LAUNCHER is 'mpirun -n 2'; it begins with torchrun or srun\n"
