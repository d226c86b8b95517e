"""A 7B on a machine of 24 GiB, without a GPU: loaded in bfloat16, given slots, trained for a step, asked a question.

    python benchmarks/seven_billion.py --json output/seven_billion.json

A checkpoint of LLaVA-1.5-7B's shape with random weights is written in shards (13.5 GB; removed at the end), then
loaded as ``--dtype bfloat16`` of the commands loads it: its files are mapped, and read where they are first used. Of
every step the time and the most memory are printed, what belongs to the process alone, and with the parts of files that
are mapped, which the system may drop at any time; both also over the checkpoint's size, beyond what was there before it
was loaded. No step may hold a second copy of the weights: the status is 1 where one takes ``MOST`` times their size.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.bench import machine, write  # noqa: E402
from benchmarks.parts.contenders import SEVEN_BILLION, TINY, Shape, Training, config_of, with_slots  # noqa: E402
from benchmarks.parts.questions import Questions, word_tokenizer  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.model.builder import load_pretrained_model  # noqa: E402
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM  # noqa: E402
from llava.utils import run_cli  # noqa: E402

ONE_BILLION = replace(
    SEVEN_BILLION,
    decoder={
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
    },
)
SHAPES = {"7b": SEVEN_BILLION, "1b": ONE_BILLION, "tiny": replace(TINY, dtype=torch.bfloat16)}
SHARD = 2 * 10**9
"""Bytes of a file of weights."""
MOST = 2


@dataclass
class Step:
    """What a step took: seconds, and bytes of memory at most, of the process's own and with mapped files."""

    name: str
    seconds: float = 0.0
    own: int = 0
    mapped: int = 0


@dataclass
class Steps:
    """Steps one after the other, each watched while it runs."""

    taken: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Watch a step; its line is printed when it ends."""
        step, done = Step(name), threading.Event()
        watcher = threading.Thread(target=self._watch, args=(step, done))
        watcher.start()
        begun = time.monotonic()
        try:
            yield
        finally:
            step.seconds = time.monotonic() - begun
            done.set()
            watcher.join()
        self.taken.append(step)
        sizes = f"{step.own / 1e9:>9.2f} GB{step.mapped / 1e9:>9.2f} GB"
        print(f"{name:<34}{step.seconds:>9.1f} s{sizes}", flush=True)

    @staticmethod
    def _watch(step: Step, done: threading.Event) -> None:
        while True:
            own, mapped = memory()
            step.own, step.mapped = max(step.own, own), max(step.mapped, mapped)
            if done.wait(0.02):
                return


def memory() -> tuple[int, int]:
    """Bytes of this process in memory: its own, and with mapped files; zeros where the system does not tell."""
    place = Path("/proc/self/status")
    if not place.exists():
        return 0, 0
    lines = [line.split() for line in place.read_bytes().decode().splitlines()]
    sizes = {words[0]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssShmem:", "RssFile:")}
    own = sizes["RssAnon:"] + sizes["RssShmem:"]
    return own, own + sizes["RssFile:"]


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """A checkpoint of random weights, a shard in memory at a time; returns its bytes."""
    config = config_of(shape)
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    tower: Any = model.get_vision_tower()
    tower.default_processor(tower.config).save_pretrained(folder)
    named = {name: value.shape for name, value in model.state_dict().items() if value.is_floating_point()}
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total, number = 0, 0
    for name, size in named.items():
        held[name] = torch.ones(size, dtype=shape.dtype) if len(size) == 1 else _random(size, shape.dtype)
        total += held[name].nbytes
        if sum(value.nbytes for value in held.values()) >= SHARD or name == list(named)[-1]:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(held, folder / file, {"format": "pt"})
            places |= dict.fromkeys(held, file)
            held = {}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write(folder / "model.safetensors.index.json", index)
    return total


def _random(size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Numbers of a spread that keeps those behind them finite."""
    return torch.empty(size, dtype=dtype).uniform_(-0.03, 0.03)


def go(steps: Steps, shape: Shape, folder: Path) -> tuple[int, tuple[int, int]]:
    """All steps; returns the checkpoint's bytes, and the memory that was in use before it was loaded."""
    with steps.step("write the checkpoint"):
        size = write_checkpoint(folder, shape)
    gc.collect()
    before = memory()
    with steps.step("load it, --dtype bfloat16"):
        base: Any = load_pretrained_model(str(folder), None, device="cpu", dtype="bfloat16")[1]
    base.requires_grad_(False)
    base.config.conversation_version = "vicuna_v1"
    with steps.step("attach slots of 3 tasks"):
        model = with_slots(base, shape, 3)
    one = replace(shape, train_rows=1, rows=1)
    with steps.step("a training step of a sample"):
        Training(model, one)()
    model.eval()
    with steps.step("answer a question"), tempfile.TemporaryDirectory() as pictures:
        (answer,) = Questions(Path(pictures), one, model).ask(model, 1)
    print(f"answered {len(answer.split())} words")
    return size, before


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    shape: str = flag("7b", "7b: LLaVA-1.5's; 1b, tiny: tests of the benchmark itself", choices=tuple(SHAPES))
    folder: str | None = flag(None, "where the checkpoint goes, which is kept then (default: a folder that is removed)")
    json: str | None = flag(None, "file for all figures")


def main() -> int:
    """Print a line for each step; 1 where one held a second copy of the weights."""
    arguments = parse(Arguments, description=__doc__)
    torch.manual_seed(0)
    steps = Steps()
    print(f"{'step':<34}{'time':>11}{'own memory':>12}{'with files':>12}")
    with contextlib.ExitStack() as stack:
        place = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory())
        size, before = go(steps, SHAPES[arguments.shape], Path(place) / f"llava-{arguments.shape}")
    shares = {step.name: [(step.own - before[0]) / size, (step.mapped - before[1]) / size] for step in steps.taken[1:]}
    print(f"over the checkpoint's {size / 1e9:.2f} GB")
    for name, (own, mapped) in shares.items():
        print(f"{name:<34}{own:>23.2f}{mapped:>12.2f}")
    if arguments.json:
        taken = [asdict(step) for step in steps.taken]
        figures = {**machine(torch.device("cpu")), "shape": arguments.shape, "bytes": size, "steps": taken}
        write(Path(arguments.json), figures | {"over_size": shares})
    return int(arguments.shape != "tiny" and max(mapped for _, mapped in shares.values()) >= MOST)


if __name__ == "__main__":
    run_cli(main)
