"""The command line of what measures a model's steps on a CPU, and the model: a base of one's own, or random weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.parts.bench import Bench, run_parts
from benchmarks.parts.contenders import SMALL, TINY, Shape, random_model
from benchmarks.parts.timing import ROUNDS
from llava.cli import flag, parse
from llava.heap import keep_freed_memory
from llava.model.builder import load_pretrained_model
from llava.utils import UserError, quiet_libraries

SHAPES = {"small": SMALL, "tiny": TINY}


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    base: str | None = flag(None, "folder of a LLaVA checkpoint (default: random weights of --shape)")
    shape: str = flag("small", "small: a decoder of 135M; tiny: a test of the benchmark itself", choices=tuple(SHAPES))
    rounds: int = flag(ROUNDS, "steps of each contender; fewer where the time is up", least=1)
    minutes: float = flag(60.0, "that it may take in all", above=0)
    threads: int = flag(1, "of torch", least=1)
    json: str | None = flag(None, "file for all figures")


def main(parts: Sequence[str], description: str | None) -> int:
    """Measure the parts of ``Bench`` that a command is about; 1 where one failed."""
    start = time.monotonic()
    arguments = parse(Arguments, description=description)
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as training does; else a step pays for what the one before it gave back
    if arguments.base:
        model, shape = _loaded(arguments.base)
    else:
        shape = SHAPES[arguments.shape]
        model = random_model(shape, torch.device("cpu"))
    bench = Bench(model, shape, arguments.rounds, references=True)
    name = arguments.base or arguments.shape
    return run_parts(bench, parts, name, start + 60 * arguments.minutes, arguments.json)


def _loaded(place: str) -> tuple[Any, Shape]:
    """A base in float32, frozen, with its shape."""
    found: Any = load_pretrained_model(place, None, device="cpu")[1]
    tower = found.get_vision_tower() if hasattr(found, "get_vision_tower") else None
    if tower is None:
        raise UserError(f"--base {place}: has no vision tower; give a LLaVA checkpoint")
    config = found.config
    names = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    pictured = {"image_size": tower.num_patches_per_side, "patch_size": 1}  # as many positions
    shape = Shape({name: getattr(config, name) for name in names}, pictured, dtype=torch.float32)
    return found.requires_grad_(False).eval(), shape
