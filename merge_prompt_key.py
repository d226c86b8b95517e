"""Join independently fitted key files into one file with keys and initial weight offsets.

    python merge_prompt_key.py

By default it merges what the task sequence names, in its slot order: ``output/prompt-key/<task>.pth`` for every task,
into ``output/prompt-key/merged_prompt_key.pth``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llava.utils import UserError, quiet_libraries, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("key_files", nargs="*", help="key files (default: <key_dir>/<task>.pth for every task)")
    parser.add_argument("--sequence", default=os.environ.get("SEQUENCE", "vqa-rad"), help="task sequence, name or file")
    parser.add_argument("--key_dir", default="output/prompt-key", help="folder of the key files")
    parser.add_argument("--save_path", help="file to write (default: <key_dir>/merged_prompt_key.pth)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    quiet_libraries()
    from llava.continual.prompt_keys import routing_accuracy
    from llava.continual.tasks import load_sequence
    from llava.data.prompt import shared_prompt
    from llava.slots.file import read_slot_file, write_slot_file
    from llava.slots.merge import merge_slot_files

    paths = [Path(path) for path in args.key_files]
    if not paths:
        paths = [Path(args.key_dir) / f"{task}.pth" for task in load_sequence(args.sequence).task_names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"key file not found: {missing[0]} (make it with train_prompt_key.py --task {missing[0].stem}, or name "
                "the files to merge)"
            )
    files = [(path, read_slot_file(path)) for path in paths]
    merged = merge_slot_files(files)
    merged.prompt = shared_prompt([(path, file.prompt) for path, file in files])
    accuracy = routing_accuracy(merged) if len(merged.tasks) > 1 else {}
    for task in merged.tasks:
        task.held_out = None  # measured now; the merged file goes to every training run and needs no queries
    save_path = Path(args.save_path or Path(args.key_dir) / "merged_prompt_key.pth")
    write_slot_file(save_path, merged)
    print(f"merged {len(merged.tasks)} tasks, {sum(task.count for task in merged.tasks)} slots:")
    for task in merged.tasks:
        right, count = accuracy.get(task.name, (0, 0))
        routed = f"routed right on held-out rows: {right} of {count} ({100 * right / count:.1f} %)" if count else ""
        print(f"  {task.name:<12} slots {task.start:>3}-{task.stop - 1:<3} {routed}".rstrip())
    if total := sum(count for _, count in accuracy.values()):
        right = sum(right for right, _ in accuracy.values())
        print(
            f"  routing accuracy ({merged.settings.router}): {100 * right / total:.1f} % of {total} held-out questions"
        )
    print(f"written to {save_path}")


if __name__ == "__main__":
    run_cli(main)
