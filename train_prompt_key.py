"""Stage 1: fit one task's prompt keys to the queries of its training questions.

    python train_prompt_key.py --task abd --data_paths data/train_abd.jsonl --save_path output/prompt-key/abd.pth
    SEQUENCE=phantom python train_prompt_key.py --task abd

What a flag does not say, the task sequence's ``keys`` block does (``llava/continual/settings.py``). The public
prototype's flags are known; those of a training by gradients are said to change nothing (``docs/prototype.md``).
Tasks can be fitted in any order, on any machine, at the same time; ``merge_prompt_key.py`` joins the files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from llava.cli import SEEDS, flag, flags_of, given, parse
from llava.continual.sequence import sequence_flag
from llava.continual.settings import KeySettings
from llava.devices import default_device
from llava.inside import opened_to_links
from llava.train.ignored_flags import ignored, say_ignored
from llava.utils import UserError, quiet_libraries, run_cli

ONE_PROCESS = "stage 1 runs in one process, on one device (--device)"
NO_GRADIENTS = "keys are fitted by clustering, without gradients (--iterations bounds its rounds)"


@dataclass(kw_only=True)
class WithoutEffect:
    """Flags of the prototype's stage 1 that have nothing to act on."""

    gpus: str | None = ignored(ONE_PROCESS, aliases=["-g"])
    master_port: str | None = ignored(ONE_PROCESS)
    local_rank: str | None = ignored(ONE_PROCESS)
    epochs: str | None = ignored(NO_GRADIENTS)
    lr: str | None = ignored(NO_GRADIENTS)
    lr_step_size: str | None = ignored(NO_GRADIENTS)
    batch_size: str | None = ignored("pictures are encoded one at a time, so that keys depend on no neighbours")
    log_interval: str | None = ignored("the fit is reported once, at its end")
    num_workers: str | None = ignored("rows and pictures are read in this process")
    checkpoint: str | None = ignored("keys are fitted anew from the task's rows")


@dataclass(kw_only=True)
class Arguments(flags_of(KeySettings, default="the sequence's"), WithoutEffect):
    """Flags; those of ``KeySettings`` override the sequence's ``keys`` block."""

    task: str = flag(help="task name, as in the task sequence")
    data_paths: list[str] | None = flag(None, "training files (default: the sequence's)")
    save_path: str | None = flag(None, "key file to write (default: the sequence's)")
    sequence: str = sequence_flag()
    model_base: str | None = flag(None, "base model (default: BASE_MODEL or the sequence's)")
    image_folder: str | None = flag(None, "picture folder (default: the sequence's)")
    follow_links: bool = flag(False, "open pictures that are links out of their folder")
    image_aspect_ratio: str | None = flag(None, "pad, square or anyres (default: the base's)")
    max_pixels: int | None = flag(
        None, "pixels that a picture may have (default: LLAVA_MAX_PIXELS or 100 million)", least=1
    )
    seed: int | None = flag(None, "default: the sequence's", **SEEDS)
    device: str | None = flag(None, "cpu or cuda (default: cuda where there is one)")
    cache_dir: str | None = flag(None, "keeps queries and picture features, for stage 2 too (default: cache/queries)")
    config_path: str | None = flag(None, "the prototype's JSON: its weight_topk, low_rank and groups; flags go before")


def main() -> None:
    args = parse(Arguments, description=__doc__)
    quiet_libraries()

    from llava.continual.places import places_of
    from llava.continual.prompt_keys import KeyOptions, fit_task
    from llava.continual.prototype_config import read_prototype_config
    from llava.image_io import allow_pixels
    from llava.schema import refuse_unknown
    from llava.slots.names import ROUTERS
    from llava.slots.offsets import TARGETS

    allow_pixels(args.max_pixels)
    places = places_of(args.sequence)
    sequence = places.sequence
    sequence.task(args.task)  # refuses a name that the sequence does not have, before anything else is looked for
    say_ignored(WithoutEffect(**{entry.name: getattr(args, entry.name) for entry in fields(WithoutEffect)}))
    of_file = read_prototype_config(args.config_path) if args.config_path else {}
    keys = replace(sequence.keys, **{**of_file, **given(args, KeySettings)})
    if not 0 <= keys.held_out < 1:
        raise UserError(f"--held_out is {keys.held_out}; give a share of 0 or more and below 1")
    ROUTERS.get(keys.router)  # refuses a name that is no router
    refuse_unknown(keys.targets, TARGETS, "--targets", "projection")
    options = KeyOptions(
        **vars(keys),
        seed=sequence.train.seed if args.seed is None else args.seed,
        device=default_device(args.device),
    )
    base = places.base_model(args.model_base)
    if not args.model_base:
        print(f"base model: {base}")
    save_path = Path(args.save_path or places.key_file(args.task))
    slots, fitted = fit_task(
        args.task,
        sequence.slot_range(args.task),
        args.data_paths or list(sequence.task(args.task).files),
        base,
        opened_to_links(args.image_folder or sequence.image_folder, args.follow_links) or "",
        options,
        str(places.query_cache) if args.cache_dir is None else args.cache_dir or None,
        answer_suffix=sequence.answer_suffix,
        answer_style=sequence.answer_style,
        aspect_ratio=args.image_aspect_ratio,
    )
    slots.write(save_path)
    report(slots, fitted, save_path)


def report(slots, fitted, save_path: Path) -> None:
    """Say what was fitted, and how it routes beside the key files that already stand next to it."""
    task, settings = slots.tasks[0], slots.settings
    encoder = settings.encoder.get("name", "none")
    print(f"task {task.name}: slots {task.start}-{task.stop - 1}, {task.info['rows']} rows, ", end="")
    print(f"queries {settings.query_mode} (text encoder {encoder})")
    print(
        f"  similarity of the selected keys: {fitted.similarity_before:.4f} before, {fitted.similarity_after:.4f} after"
    )
    print(
        f"  {fitted.covered} of {task.count} slots are selected by at least 5 % of the questions, "
        f"selection entropy {fitted.entropy:.3f}"
    )
    print(f"  routing on held-out rows: {_routing_beside(slots, save_path)}")
    print(f"written to {save_path}")


def _routing_beside(slots, save_path: Path) -> str:
    from llava.slots.fit import routing_accuracy
    from llava.slots.merge import merge_files

    task = slots.tasks[0].name
    others = []
    for path in sorted(save_path.parent.glob("*.pth")):
        if path.name not in (save_path.name, "merged_prompt_key.pth"):
            try:
                merge_files([save_path, path])
            except UserError:  # made with other settings: not comparable, so it takes no part
                continue
            others.append(path)
    if not slots.tasks[0].held_out:
        return "none were held out"
    if not others:
        return "measurable once another task's key file stands beside this one (merge_prompt_key.py reports it)"
    right, count = routing_accuracy(merge_files([save_path, *others]))[task]
    names = ", ".join(path.stem for path in others)
    return f"{right} of {count} go to {task} ({100 * right / count:.1f} %), against {names}"


if __name__ == "__main__":
    run_cli(main)
