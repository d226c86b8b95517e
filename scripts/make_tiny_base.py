"""Train a tiny base model from scratch and write it in the LLaVA layout: a CPU, a few minutes, no download.

It learns from generic phantoms that it draws itself (``llava.toy.phantom_generic``), never from a task's pictures.

Example::

    python scripts/make_tiny_base.py --output_dir output/tiny-base

A killed run goes on where its last checkpoint was taken and ends in the same weights; a finished one is left alone.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from llava.cli import flag, flags_of, given, parse
from llava.files import atomic_write
from llava.outside import read_object
from llava.toy.phantom_talk import make_dialects
from llava.toy.tiny_base import (
    PIXEL_MEAN,
    PIXEL_STD,
    TinyBaseConfig,
    all_features,
    build_model,
    language_loss,
    model_config,
    run_steps,
    save_base,
    tokenizer_texts,
    tower_loss,
    train_tokenizer,
)
from llava.toy.tiny_tower import TowerTrainer, draw_pictures, tower_accuracy
from llava.utils import UserError, quiet_libraries, run_cli

_SETTINGS = "settings.json"


@dataclass(kw_only=True)
class Arguments(flags_of(TinyBaseConfig)):
    """Flags; those of ``TinyBaseConfig`` override its defaults."""

    output_dir: str = flag("output/tiny-base", "folder to write")
    save_every: int = flag(50, "steps between two checkpoints", least=1)


def main() -> int:
    """Build the base unless it is there already."""
    args = parse(Arguments, description=__doc__)
    quiet_libraries()
    target, config = Path(args.output_dir), TinyBaseConfig(**given(args, TinyBaseConfig))
    if is_finished(target, config):
        print(f"{target}: already made, nothing to do")
        return 0
    start = time.monotonic()
    make_base(target, config, args.save_every)
    print(f"{target}: made in {time.monotonic() - start:.0f} s")
    return 0


def is_finished(target: Path, config: TinyBaseConfig) -> bool:
    """Whether ``target`` is this very base. Raises ``UserError`` when something else lies there."""
    found = target / "config.json"
    if not found.is_file():
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target} exists and is no checkpoint; choose another --output_dir")
        return False
    made = read_object(found).get("tiny_base", {})
    if made == {**made, **asdict(config)}:  # earlier versions kept more
        return True
    raise UserError(f"{target} holds a model made with other settings; remove it or choose another --output_dir")


def make_base(target: Path, config: TinyBaseConfig, save_every: int) -> None:
    """Draw, train the tower, train the language model, write; work in progress lies beside ``target``."""
    work = target.with_name(f".{target.name}.building")
    _prepare(work, config)
    pictures = draw_pictures(config.pictures, config.image_size, config.grid, config.seed)
    tokenizer = train_tokenizer(config, tokenizer_texts(pictures, make_dialects(config.seed), config.seed))
    print(f"{len(pictures)} generic pictures drawn, {len(tokenizer)} tokens", flush=True)

    torch.manual_seed(config.seed)
    trainer = TowerTrainer(_vision_config(config, tokenizer))
    run_steps(
        "tower", trainer, tower_loss(trainer, pictures, config), config.tower_steps, config.tower_lr, work, save_every
    )
    held_out = draw_pictures(500, config.image_size, config.grid, config.seed + 1)
    print(f"tower: {tower_accuracy(trainer, held_out, PIXEL_MEAN, PIXEL_STD):.1%} of unseen pictures' labels right")

    model = build_model(config, tokenizer, trainer)
    loss = language_loss(model, tokenizer, pictures, all_features(trainer, pictures.pixels), config)
    run_steps("language", model, loss, config.steps, config.lr, work, save_every)
    _write(target, work, model, tokenizer, config)


def _vision_config(config: TinyBaseConfig, tokenizer):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**model_config(config, tokenizer).vision_config)


def _prepare(work: Path, config: TinyBaseConfig) -> None:
    """Keep the work of a killed run of the same settings, drop any other."""
    settings = work / _SETTINGS
    if work.exists() and not (settings.is_file() and read_object(settings) == asdict(config)):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    with atomic_write(settings) as stream:
        json.dump(asdict(config), stream)


def _write(target: Path, work: Path, model, tokenizer, config: TinyBaseConfig) -> None:
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    save_base(finished, model, tokenizer, config)
    if target.exists():
        target.rmdir()  # empty, as is_finished has seen
    finished.rename(target)
    shutil.rmtree(work)


if __name__ == "__main__":
    run_cli(main)
