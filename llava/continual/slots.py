"""Life of slots: look at, merge, remove, rename, export, import and verify them.

    python -m llava.continual.slots list output/llava-vqa-rad_abd_chest
    python -m llava.continual.slots merge A.pth B.pth --output merged.pth
    python -m llava.continual.slots remove output/llava-vqa-rad_abd_chest chest --output output/llava-vqa-rad_abd
    python -m llava.continual.slots rename merged.pth abd abdomen
    python -m llava.continual.slots export-peft output/llava-vqa-rad_abd abd --output output/abd-lora
    python -m llava.continual.slots import-prototype CHECKPOINT --tasks abd chest --model-base BASE --output a.pth
    python -m llava.continual.slots verify output/llava-vqa-rad_abd --model-base BASE

A place is a slot file (key file, merged file) or a stage checkpoint's folder. ``remove`` and ``rename`` change it in
place unless ``--output`` is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.utils import UserError, quiet_libraries, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    listing = command("list", "show the tasks of some places")
    listing.add_argument("places", nargs="+")
    merge = command("merge", "join key files or trained slots, also of different machines")
    merge.add_argument("places", nargs="+")
    merge.add_argument("--output", required=True, help=".pth file, or a stage folder when an input is one")
    merge.add_argument("--pack", action="store_true", help="number the slots anew, in the order given")
    remove = command("remove", "take tasks out, exactly")
    remove.add_argument("place")
    remove.add_argument("tasks", nargs="+")
    remove.add_argument("--output", help="where to write (default: in place)")
    rename = command("rename", "give a task another name")
    rename.add_argument("place")
    rename.add_argument("old")
    rename.add_argument("new")
    rename.add_argument("--output", help="where to write (default: in place)")
    export = command("export-peft", "write a task's fixed mixture of slots as a LoRA adapter for PEFT")
    export.add_argument("place")
    export.add_argument("task")
    export.add_argument("--output", required=True, help="folder of the adapter")
    export.add_argument("--weights", nargs="+", type=float, help="one per slot (default: the task's mean weights)")
    prototype = command("import-prototype", "read the slots of the public prototype's checkpoint")
    prototype.add_argument("source", help="checkpoint folder, state dict, or key file")
    prototype.add_argument("--tasks", nargs="+", required=True, help="names in slot order")
    prototype.add_argument("--slots_per_task", type=int, default=8)
    prototype.add_argument("--model-base", "--model_base", dest="model_base", required=True)
    prototype.add_argument("--text_encoder", help="of the keys' queries, e.g. a local copy of nli-roberta-base-v2")
    prototype.add_argument("--top_k", type=int, default=4)
    prototype.add_argument("--output", required=True, help=".pth file")
    verify = command("verify", "check checksums, numbers, shapes and the base model")
    verify.add_argument("place")
    verify.add_argument("--model-base", "--model_base", dest="model_base", help="default: the recorded one, if here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    quiet_libraries()
    COMMANDS[args.command](args)


def show_list(args) -> None:
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
        print(f"rank {settings.rank}, targets {', '.join(settings.targets)}")
        for task in slots.tasks:
            state = "trained" if task.trained else "not trained"
            weights = sum(tensor.numel() for tensors in (task.A, task.B) for tensor in tensors.values())
            rows = f"{task.info['rows']} rows" if "rows" in task.info else ""
            print(
                f"  {task.name:<12} slots {task.start:>4}-{task.stop - 1:<4} {state:<11} {weights:>10,} weights  "
                f"{task.checksum()}  {rows}".rstrip()
            )


def do_merge(args) -> None:
    from llava.slots.edit import merge, write_place

    slots = merge(args.places, args.pack)
    path = write_place(slots, args.output, args.places, f"merge of {' '.join(Path(p).name for p in args.places)}")
    print(f"merged {len(slots.tasks)} tasks ({', '.join(slots.names)}); written to {path}")


def do_remove(args) -> None:
    from llava.slots.edit import read_place, remove, write_place

    slots = remove(read_place(args.place), args.tasks)
    path = write_place(slots, args.output or args.place, [args.place], f"removal of {' '.join(args.tasks)}")
    print(f"removed {', '.join(args.tasks)}; left: {', '.join(slots.names)}; written to {path}")


def do_rename(args) -> None:
    from llava.slots.edit import read_place, rename, write_place

    slots = rename(read_place(args.place), args.old, args.new)
    path = write_place(slots, args.output or args.place, [args.place], f"renaming {args.old} to {args.new}")
    print(f"{args.old} is now {args.new}; written to {path}")


def do_export(args) -> None:
    from llava.slots.edit import read_place
    from llava.slots.peft_export import export_peft

    mixture = export_peft(read_place(args.place), args.task, args.output, args.weights)
    parts = ", ".join(f"{weight:.4f} of slot {slot}" for slot, weight in mixture.items())
    print(f"task {args.task}: {parts}; adapter written to {args.output}")


def do_import(args) -> None:
    from llava.checkpoints.weights import resolve_checkpoint
    from llava.slots.edit import write_place
    from llava.slots.prototype import import_prototype
    from llava.slots.settings import check_task_name

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


def do_verify(args) -> None:
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


COMMANDS = {
    "list": show_list,
    "merge": do_merge,
    "remove": do_remove,
    "rename": do_rename,
    "export-peft": do_export,
    "import-prototype": do_import,
    "verify": do_verify,
}

if __name__ == "__main__":
    run_cli(main)
