"""Join independently fitted key files into one file with keys and initial weight offsets.

    python merge_prompt_key.py

By default it merges what the task sequence names, in its slot order: the files that ``train_prompt_key.py`` writes for
its tasks, into ``merged_prompt_key.pth`` beside them (``output/prompt-key`` for vqa-rad, else a folder in it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.cli import flag, parse, word
from llava.continual.sequence import sequence_flag
from llava.utils import UserError, quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    key_files: list[str] = word("key files (default: one for every task)", [])
    sequence: str = sequence_flag()
    key_dir: str | None = flag(None, "folder of the key files (default: the sequence's)")
    save_path: str | None = flag(None, "file to write (default: <key_dir>/merged_prompt_key.pth)")


def main() -> None:
    args = parse(Arguments, description=__doc__)
    quiet_libraries()
    from llava.continual.places import MERGED, places_of
    from llava.slots.fit import routing_accuracy
    from llava.slots.merge import merge_files

    paths = [Path(path) for path in args.key_files]
    places = places_of(args.sequence)
    folder = Path(args.key_dir or places.key_folder)
    if not paths:
        paths = [folder / f"{task}.pth" for task in places.sequence.task_names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"key file not found: {missing[0]} (make it with train_prompt_key.py --task {missing[0].stem}, or name "
                "the files to merge)"
            )
    merged = merge_files(paths)
    accuracy = routing_accuracy(merged) if len(merged.tasks) > 1 else {}
    for task in merged.tasks:
        task.held_out = None  # measured now; the merged file goes to every training run and needs no queries
    save_path = Path(args.save_path or folder / MERGED)
    merged.write(save_path)
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
