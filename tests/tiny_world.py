"""A small world for end-to-end tests: a tiny base, four tasks with pictures and questions, and the commands in-process.

The commands are the real ones; only their ``sys.argv`` is set, so that a stage takes tenths of a second.
"""

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_llava import write_base, write_images

from llava.data.rows import question_row, write_jsonl
from llava.slots.pool import Pool
from llava.train import train as train_module
from llava.utils import run_cli

TASKS = ("abd", "chest", "head", "knee")
SLOTS, TOP_K, RANK, PICTURES, ROWS = 2, 2, 2, 6, 12
LORA = ("--lora_enable", "True", "--lora_r", 2, "--lora_alpha", 4, "--lora_dropout", 0)
ASKED = ("is there a lesion", "what side", "where is the lesion in the image", "is the lung left")


@dataclass(frozen=True)
class World:
    """Where everything lies. ``keys`` is the merged key file."""

    folder: Path
    base: Path
    sequence: Path
    keys: Path

    def train_arguments(self, task, stage, previous=None, *more) -> list[str]:
        """Arguments of stage 2 for a few steps; later ones win, as on any command line."""
        arguments = ["--model_name_or_path", self.base, "--sequence", self.sequence, "--task", task]
        arguments += ["--retriever_state_dict", self.keys, "--output_dir", stage, "--use_cpu", "True"]
        arguments += ["--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", "2e-2"]
        arguments += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]
        arguments += ["--query_cache", ""]
        arguments += ["--previous_stage", previous] if previous else []
        return [str(word) for word in [*arguments, *more]]

    def train(self, task, stage, previous=None, *more) -> Pool:
        """Run stage 2; returns the stage checkpoint's slots."""
        from llava.train.train import train

        with arguments(self.train_arguments(task, stage, previous, *more)):
            train()
        return Pool.read(Path(stage) / "slots.pth")


@contextmanager
def arguments(words):
    """``sys.argv`` for a command that is called in this process."""
    before = sys.argv
    sys.argv = ["command", *map(str, words)]
    try:
        yield
    finally:
        sys.argv = before


def run_main(main, *words):
    """Call a command's ``main`` with a command line."""
    with arguments(words):
        return main()


def make_world(folder, tasks=TASKS) -> World:
    """Base, pictures, training files, test file, task sequence, and the merged keys of all tasks."""
    base = write_base(folder / "tiny-llava-base")
    sequence = write_sequence(folder, tasks)
    for task in tasks:
        fit(folder, base, sequence, task)
    return World(folder, base, sequence, merge(folder, sequence))


def write_sequence(folder, tasks=TASKS, name="tiny", rows=ROWS) -> Path:
    """Write data for ``tasks`` and the task sequence file; a task's rows do not depend on which others there are."""
    write_images(folder / "images", [f"{task}{number}.png" for task in tasks for number in range(PICTURES)])
    tests = []
    for task in tasks:
        written = [_row(task, number, tasks) for number in range(rows)]
        write_jsonl(folder / f"train_{task}.jsonl", written)
        tests += [_row(task, rows + number, tasks) for number in range(3)]
    write_jsonl(folder / "test.jsonl", tests)
    sequence = folder / f"{name}.json"
    values = {
        "name": name,
        "tasks": [{"name": task, "train": str(folder / f"train_{task}.jsonl")} for task in tasks],
        "test": str(folder / "test.jsonl"),
        "image_folder": str(folder / "images"),
        "slots_per_task": SLOTS,
    }
    sequence.write_text(json.dumps(values), encoding="utf-8")
    return sequence


def _row(task, number, tasks):
    answer = ("yes", "no", "left", "right")[(number + len(task)) % 4]
    question = f"{ASKED[number % 4]} {number}?"
    return question_row(f"{task}-{number}", f"{task}{number % PICTURES}.png", question, answer, task, tasks)


def fit(folder, base, sequence, task, *more) -> Path:
    """Stage 1 of a task; returns its key file."""
    import train_prompt_key

    target = folder / "keys" / f"{task}.pth"
    words = ["--task", task, "--sequence", sequence, "--model-base", base, "--save_path", target, "--cache_dir", ""]
    run_main(train_prompt_key.main, *words, "--top_k", TOP_K, "--rank", RANK, "--text_encoder", "base", *more)
    return target


def merge(folder, sequence, *more) -> Path:
    """Merge the key files of a sequence; returns the merged file."""
    import merge_prompt_key

    run_main(merge_prompt_key.main, "--sequence", sequence, "--key_dir", folder / "keys", *more)
    return folder / "keys" / "merged_prompt_key.pth"


def pipeline_steps(world, out, seed=42, sampled=False) -> dict[str, Callable[[], None]]:
    """The whole pipeline as commands into ``out``, each after those before it, from the prompt keys to the scores.

    Args:
        seed: of the keys, the stages and the answers; by default what the commands take by themselves.
        sampled: draw the answers instead of taking the likeliest words.
    """
    import merge_prompt_key
    import train_prompt_key
    from llava.eval import eval_video_qa, model_vqa_loader

    stages = out / "llava-tiny_abd", out / "llava-tiny_abd_chest"
    questions, answers = world.folder / "test.jsonl", out / "eval" / "answers.jsonl"

    def keys():
        words = ["--sequence", world.sequence, "--model-base", world.base, "--cache_dir", out / "cache"]
        words += ["--top_k", TOP_K, "--rank", RANK, "--text_encoder", "base", "--seed", seed]
        for task in ("abd", "chest"):
            run_main(train_prompt_key.main, *words, "--task", task, "--save_path", out / "keys" / f"{task}.pth")

    def merge():
        run_main(merge_prompt_key.main, "--sequence", world.sequence, "--key_dir", out / "keys")

    def train(task, stage, before=None):
        more = ["--retriever_state_dict", out / "keys" / "merged_prompt_key.pth", "--query_cache", out / "cache"]
        more += ["--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 2, "--seed", seed]
        world.train(task, stage, before, *more)

    def answer():
        words = ["--model-path", stages[1], "--model-base", world.base, "--question-file", questions]
        words += ["--image-folder", world.folder / "images", "--answers-file", answers, "--device", "cpu"]
        words += ["--max_new_tokens", 3, "--batch_size", 2]
        words += ["--temperature", 1, "--seed", seed] if sampled else []
        run_main(lambda: model_vqa_loader.main(), *words)

    def score():
        words = ["--question-file", questions, "--answers-file", answers, "--no-java", "--draws", 20]
        run_main(lambda: eval_video_qa.main(), *words)

    return {
        "keys": keys,
        "merge": merge,
        "first stage": lambda: train("abd", stages[0]),
        "second stage": lambda: train("chest", stages[1], stages[0]),
        "answers": answer,
        "scores": score,
    }


def same_slots(one, other) -> bool:
    """Whether two tasks' slots (``TaskSlots``) are the same bit for bit, in every tensor and field."""
    statistics = [
        None if task.statistics is None else (task.statistics.count, task.statistics.total, task.statistics.scatter)
        for task in (one, other)
    ]
    fields = ("name", "start", "stop", "trained", "info", "text_keys", "image_keys", "A", "B", "held_out")
    return same(statistics[0], statistics[1]) and all(same(getattr(one, f), getattr(other, f)) for f in fields)


def same(one, other) -> bool:
    """Deep equality, tensors bit for bit and with their types."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, torch.nn.ParameterDict) and isinstance(other, torch.nn.ParameterDict):
        return same(dict(one.items()), dict(other.items()))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def refusal(world, capsys, words):
    """The one line of ``train_mem`` for a refused command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, arguments(words):
        run_cli(train_module.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]
