"""The pipeline's scripts on a real GPU, as a user gives them, with each launcher.

What can run beside each other does: most of the time is Python's own.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import write_base
from tiny_runs import difference

from llava.data.answers import read_answers
from llava.slots.pool import Pool
from llava.toy.phantom import PhantomConfig, make_phantom

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)  # the warm one is a CPU's
TASKS = ("abd", "chest")
STAGES = ("llava-mini_abd", "llava-mini_abd_chest")
SETTINGS = {"EPOCHS": "1", "BATCH_SIZE": "8", "LEARNING_RATE": "2e-2", "MAX_NEW_TOKENS": "4", "OMP_NUM_THREADS": "1"}
LAUNCHES = {
    "plain": {},
    "zero3": {"ZERO": "scripts/zero3.json"},
    "zero2": {"ZERO": "scripts/zero2.json"},
    "torchrun": {"ZERO": "none", "LAUNCHER": "torchrun --nproc_per_node 1 --master_port {port}"},
}
ANSWERED = ("plain", "zero3")


class Pipeline:
    """A folder with data, base and keys, and in it one of outputs for each launcher."""

    def __init__(self, folder):
        self.folder, self.base, self.sequence = folder, folder / "tiny-llava-base", folder / "mini.json"
        self.keys = folder / "keys" / "merged_prompt_key.pth"
        self.said = {}

    def output(self, name):
        return self.folder / f"output-{name}"

    def start(self, name, *command, **settings):
        environment = {**os.environ, **SETTINGS, "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(_free_port()), **settings}
        environment |= {"SEQUENCE": str(self.sequence), "BASE_MODEL": str(self.base)}
        environment |= {"OUTPUT_DIR": str(self.output(name.split()[0])), "KEYS": str(self.keys)}
        environment["PATH"] = f"{PYTHON.parent}{os.pathsep}{environment['PATH']}"
        words = list(map(str, command))
        with open(self.folder / f"{name}.log", "w") as log:  # a pipe that nobody reads would fill up
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def run(self, calls):
        """Calls ``{name: (command, settings)}`` at once; each must succeed. What each said is kept."""
        started = {name: self.start(name, *command, **more) for name, (command, more) in calls.items()}
        codes = {name: process.wait(timeout=500) for name, process in started.items()}
        for name, code in codes.items():
            self.said[name] = (self.folder / f"{name}.log").read_text()
            assert code == 0, f"{name}\n{self.said[name][-4000:]}"


@pytest.fixture(scope="module")
def pipeline(device, tmp_path_factory):
    """Stage 1 of each task, the merger, stage 2 with each launcher, and the evaluation of what two of them trained."""
    made = Pipeline(tmp_path_factory.mktemp("scripts"))
    config = PhantomConfig(size=32, train_rows=24, train_images=12, test_rows=12, test_images=12)
    make_phantom(made.folder / "data", config)
    write_base(made.base)
    values = {
        "name": "mini",
        "tasks": [{"name": task, "train": str(made.folder / "data" / f"train_{task}.jsonl")} for task in TASKS],
        "test": str(made.folder / "data" / "test.jsonl"),
        "image_folder": str(made.folder / "data" / "images"),
        "slots_per_task": 4,
    }
    made.sequence.write_text(json.dumps(values), encoding="utf-8")
    python, keys = str(PYTHON), made.keys.parent
    stage_1 = [python, "train_prompt_key.py", "--cache_dir", made.folder / "cache", "--task"]
    made.run({task: ([*stage_1, task, "--save_path", keys / f"{task}.pth"], {}) for task in TASKS})
    made.run({"merge": ([python, "merge_prompt_key.py", "--key_dir", keys], {})})
    made.launches = [name for name in LAUNCHES if name == "plain" or device != "cpu"]
    made.run({name: (["bash", "finetune_continual.sh"], _with_port(LAUNCHES[name])) for name in made.launches})
    made.run({f"{name} answers": (["bash", "cv805.sh"], {}) for name in ANSWERED if name in made.launches})
    return made


def _with_port(settings):
    return {name: value.format(port=_free_port()) for name, value in settings.items()}


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def name(request, pipeline):
    """A launch; on a CPU there is one."""
    if request.param not in pipeline.launches:
        pytest.skip("starts processes for GPUs")
    return request.param


@pytest.mark.parametrize("name", LAUNCHES, indirect=True)
def test_each_launcher_trains_every_task_on_the_gpu(pipeline, name, device):
    said = pipeline.said[name]
    assert "all 2 tasks are trained" in said
    slots = Pool.read(pipeline.output(name) / STAGES[-1] / "slots.pth")
    assert slots.names == list(TASKS)
    assert all(task.trained and task.A["o_proj"].abs().max() > 0 for task in slots.tasks)
    if device == "cuda":
        assert "training on 1 GPU(s)" in said and "gradient checkpointing: off" in said
        assert ("[launch.py" in said) == ("zero" in name)  # DeepSpeed's launcher


@pytest.mark.parametrize("name", LAUNCHES, indirect=True)
def test_a_stage_leaves_the_task_before_alone(pipeline, name):
    before, after = (Pool.read(pipeline.output(name) / stage / "slots.pth").task("abd") for stage in STAGES)
    assert before.checksum() == after.checksum()


def test_launchers_train_nearly_the_same(pipeline):
    slots = {name: Pool.read(pipeline.output(name) / STAGES[0] / "slots.pth") for name in pipeline.launches}
    apart = {name: difference(found, slots["plain"]) for name, found in slots.items()}
    print("from plain training:", {name: f"{value:.1e}" for name, value in apart.items()})
    assert apart.get("torchrun", 0) < 0.05 and max(apart.values()) < 0.7  # DeepSpeed computes in bfloat16 throughout


@pytest.mark.parametrize("name", ANSWERED, indirect=True)
def test_every_question_is_answered_and_scored(pipeline, name):
    folder = pipeline.output(name) / "eval" / "mini"
    for stage in ("zero-shot", *STAGES):
        answers = read_answers(folder / stage / "answers.jsonl")
        assert len(answers) == 36 and all(("route" in one["metadata"]) == (stage != "zero-shot") for one in answers)
        assert "provenance" in json.loads((folder / stage / "scores.json").read_text())
    assert json.loads((folder / "accuracy_matrix.json").read_text())["tasks"] == list(TASKS)
