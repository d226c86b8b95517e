"""Life of slots: look at, merge, remove, rename, export, import and verify them.

    python -m llava.continual.slots list output/llava-vqa-rad_abd_chest
    python -m llava.continual.slots merge A.pth B.pth --output merged.pth
    python -m llava.continual.slots remove output/llava-vqa-rad_abd_chest chest --output output/llava-vqa-rad_abd
    python -m llava.continual.slots rename merged.pth abd abdomen
    python -m llava.continual.slots export-peft output/llava-vqa-rad_abd abd --output output/abd-lora
    python -m llava.continual.slots export-peft STAGE abd --output output/abd-hf --layout hf --model-base BASE-HF
    python -m llava.continual.slots import-prototype CHECKPOINT --tasks abd chest --model-base BASE --output a.pth
    python -m llava.continual.slots verify output/llava-vqa-rad_abd --model-base BASE

A place is a slot file (key file, merged file) or a stage checkpoint's folder. ``remove`` and ``rename`` change it in
place unless ``--output`` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.checkpoints.kinds import ADAPTER_CONFIG, SLOTS_FILE
from llava.cli import MANY, flag, parse_command, word
from llava.utils import UserError, quiet_libraries, run_cli


@dataclass(kw_only=True)
class Listing:
    """show the tasks of some places"""

    places: list[str] = word()


@dataclass(kw_only=True)
class Merge:
    """join key files or trained slots, also of different machines"""

    places: list[str] = word()
    output: str = flag(help=".pth file, or a stage folder when an input is one")
    pack: bool = flag(False, "number the slots anew, in the order given")


@dataclass(kw_only=True)
class Remove:
    """take tasks out, exactly"""

    place: str = word()
    tasks: list[str] = word()
    output: str | None = flag(None, "where to write (default: in place)")


@dataclass(kw_only=True)
class Rename:
    """give a task another name"""

    place: str = word()
    old: str = word()
    new: str = word()
    output: str | None = flag(None, "where to write (default: in place)")


@dataclass(kw_only=True)
class Export:
    """write a task's fixed mixture of slots as a LoRA adapter for PEFT"""

    place: str = word()
    task: str = word()
    output: str = flag(help="folder of the adapter")
    weights: list[float] | None = flag(None, "one per slot (default: the task's mean weights)")
    layout: str = flag(
        "llava",
        "class it fits: llava, or hf for LlavaForConditionalGeneration and serving engines",
        choices=("llava", "hf"),
    )
    model_base: str | None = flag(None, "base that the adapter names (default: the slots' own)")


@dataclass(kw_only=True)
class Import:
    """read the slots of the public prototype's checkpoint"""

    source: str = word("checkpoint folder, state dict, or key file")
    tasks: list[str] = flag(help="names in slot order")
    slots_per_task: int = flag(8, least=1, most=MANY)
    model_base: str = flag(help="base model")
    text_encoder: str | None = flag(None, "of the keys' queries, e.g. a local copy of nli-roberta-base-v2")
    top_k: int = flag(4, least=1, most=MANY)
    output: str = flag(help=".pth file")


@dataclass(kw_only=True)
class Verify:
    """check checksums, numbers, shapes and the base model"""

    place: str = word()
    model_base: str | None = flag(None, "default: the recorded one, if here")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    name, args = parse_command({name: kind for name, (kind, _) in COMMANDS.items()}, argv, __doc__)
    quiet_libraries()
    COMMANDS[name][1](args)


def show_list(args: Listing) -> None:
    from llava.slots.edit import read_place

    for place in args.places:
        slots = read_place(place)
        settings = slots.settings
        print(f"{place}: base {slots.base.get('path')} ({slots.base.get('fingerprint')})")
        encoder = settings.encoder.get("name", "none")
        print(
            f"  queries {settings.query_mode}, encoder {encoder}, router {settings.router}, top {settings.top_k}, ",
            end="",
        )
        print(f"rank {settings.rank}, targets {', '.join(settings.targets)}, offset scope {settings.offset_scope}")
        for task in slots.tasks:
            state = "trained" if task.trained else "not trained"
            weights = sum(tensor.numel() for tensors in (task.A, task.B) for tensor in tensors.values())
            rows = f"{task.info['rows']} rows" if "rows" in task.info else ""
            print(
                f"  {task.name:<12} slots {task.start:>4}-{task.stop - 1:<4} {state:<11} {weights:>10,} weights  "
                f"{task.checksum()}  {rows}".rstrip()
            )


def do_merge(args: Merge) -> None:
    from llava.slots.edit import merge, write_place

    slots = merge(args.places, args.pack)
    path = write_place(slots, args.output, args.places, f"merge of {' '.join(Path(p).name for p in args.places)}")
    print(f"merged {len(slots.tasks)} tasks ({', '.join(slots.names)}); written to {path}")


def do_remove(args: Remove) -> None:
    from llava.slots.edit import read_place, remove, write_place

    slots = remove(read_place(args.place), args.tasks)
    path = write_place(slots, args.output or args.place, [args.place], f"removal of {' '.join(args.tasks)}")
    print(f"removed {', '.join(args.tasks)}; left: {', '.join(slots.names)}; written to {path}")


def do_rename(args: Rename) -> None:
    from llava.slots.edit import read_place, rename, write_place

    slots = rename(read_place(args.place), args.old, args.new)
    path = write_place(slots, args.output or args.place, [args.place], f"renaming {args.old} to {args.new}")
    print(f"{args.old} is now {args.new}; written to {path}")


def do_export(args: Export) -> None:
    from llava.slots.card import write_export_card
    from llava.slots.edit import read_place
    from llava.slots.peft_export import export_peft

    pool = read_place(args.place)
    _check_export(Path(args.place), Path(args.output))
    mixture = export_peft(pool, args.task, args.output, args.weights, args.layout, args.model_base)
    write_export_card(Path(args.output), pool, args.task, mixture, args.model_base)
    parts = ", ".join(f"{weight:.4f} of slot {slot}" for slot, weight in mixture.items())
    print(f"task {args.task}: {parts}; adapter written to {args.output}")


def _check_export(place: Path, target: Path) -> None:
    if (place / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{place} has a LoRA beside its slots, which would be missing in the export; save the stage whole "
            "(save_pretrained), and export from there with --model-base naming a base that holds those weights"
        )
    if there := next((name for name in ("config.json", SLOTS_FILE) if (target / name).is_file()), None):
        raise UserError(f"{target} holds {there}, so it is a model's folder; give the adapter a new one")


def do_import(args: Import) -> None:
    from llava.checkpoints.weights import resolve_checkpoint
    from llava.slots.edit import write_place
    from llava.slots.names import check_task_name
    from llava.slots.prototype import import_prototype

    for name in args.tasks:
        check_task_name(name)
    if Path(args.output).suffix != ".pth":
        raise UserError(f"--output {args.output}: give a .pth file")
    size = args.slots_per_task
    ranges = {name: (number * size, (number + 1) * size) for number, name in enumerate(args.tasks)}
    base = resolve_checkpoint(args.model_base)
    slots = import_prototype(args.source, ranges, base, args.model_base, args.text_encoder, args.top_k)
    path = write_place(slots, args.output, [], "")
    trained = [task.name for task in slots.tasks if task.trained]
    print(f"imported {len(slots.tasks)} tasks (trained: {', '.join(trained) or 'none'}); written to {path}")
    if args.text_encoder is None:
        print("no --text_encoder given: questions can be routed only with a ready text_query")


def do_verify(args: Verify) -> None:
    from llava.checkpoints.weights import resolve_checkpoint
    from llava.slots.edit import read_place, verify

    slots = read_place(args.place)
    recorded = slots.base.get("path")
    base = None
    if args.model_base:
        base = resolve_checkpoint(args.model_base)
    elif recorded and Path(recorded).is_dir():
        base = Path(recorded)
    findings = verify(slots, base)
    for finding in findings:
        mark = {True: "ok", False: "BAD", None: "-"}[finding.sound]
        print(f"{mark:<4} {finding.what:<16} {finding.found}")
    bad = [finding.what for finding in findings if finding.sound is False]
    if bad:
        raise UserError(f"{args.place}: not sound: {', '.join(bad)}")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "list": (Listing, show_list),
    "merge": (Merge, do_merge),
    "remove": (Remove, do_remove),
    "rename": (Rename, do_rename),
    "export-peft": (Export, do_export),
    "import-prototype": (Import, do_import),
    "verify": (Verify, do_verify),
}

if __name__ == "__main__":
    run_cli(main)
