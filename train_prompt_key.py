"""Stage 1: fit one task's prompt keys to the queries of its training questions.

    python train_prompt_key.py --task abd --data_paths data/train_abd.jsonl --save_path output/prompt-key/abd.pth

Tasks can be fitted in any order, on any machine, at the same time; ``merge_prompt_key.py`` joins the files.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from llava.devices import default_device
from llava.utils import UserError, quiet_libraries, run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, help="task name, as in the task sequence")
    parser.add_argument("--data_paths", nargs="+", help="training files (default: the sequence's)")
    parser.add_argument("--save_path", help="key file to write (default: output/prompt-key/<task>.pth)")
    parser.add_argument("--sequence", default=os.environ.get("SEQUENCE", "vqa-rad"), help="task sequence, name or file")
    parser.add_argument("--model-base", "--model_base", dest="model_base", help="base model (default: $BASE_MODEL)")
    parser.add_argument("--image_folder", help="picture folder (default: the sequence's)")
    parser.add_argument("--image_aspect_ratio", help="pad, square or anyres (default: the base's)")
    parser.add_argument("--query_mode", default="text+image", choices=("text", "image", "text+image"))
    parser.add_argument("--text_encoder", default="auto", help="auto, base, minilm, or a sentence encoder's folder")
    parser.add_argument(
        "--image_query", default="tower+picture", choices=("tower", "picture", "tower+picture"), help="of the picture"
    )
    parser.add_argument("--router", default="gaussian", help="keys, gaussian, ridge, uniform, random or batch_vote")
    parser.add_argument("--groups", type=int, default=4, help="groups a key is split into")
    parser.add_argument("--top_k", type=int, default=4, help="slots selected for each question")
    parser.add_argument("--rank", type=int, default=8, help="rank of a slot")
    parser.add_argument("--tau", type=float, default=0.1, help="temperature of the slot weights")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on every weight offset")
    parser.add_argument("--image_weight", type=float, default=0.5, help="share of the picture in key similarity")
    parser.add_argument("--targets", nargs="+", default=["o_proj"], help="projections that get offsets")
    parser.add_argument(
        "--unknown_share", type=float, default=0.005, help="share of a task's own questions that may count as unknown"
    )
    parser.add_argument("--held_out", type=float, default=0.1, help="share of pictures kept to measure routing")
    parser.add_argument("--iterations", type=int, default=50, help="rounds of key fitting at most")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", 42)))
    parser.add_argument("--batch_size", type=int, default=16, help="pictures encoded at a time")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--cache_dir",
        default="output/cache/queries",
        help="where queries and picture features are kept, for stage 2 too",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    quiet_libraries()

    from llava.continual.prompt_keys import KeyOptions, fit_task
    from llava.continual.queries import default_base
    from llava.continual.tasks import load_sequence
    from llava.slots.file import write_slot_file

    if not 0 <= args.held_out < 1:
        raise UserError(f"--held_out is {args.held_out}; give a share of 0 or more and below 1")
    sequence = load_sequence(args.sequence)
    names = {name for name in vars(args) if name in KeyOptions.__dataclass_fields__}
    values = {name: getattr(args, name) for name in names}
    values["targets"] = tuple(args.targets)
    values["device"] = default_device(args.device)
    save_path = Path(args.save_path or f"output/prompt-key/{args.task}.pth")
    slots, fitted = fit_task(
        args.task,
        sequence.slot_range(args.task),
        args.data_paths or [sequence.task(args.task).train],
        default_base(args.model_base),
        args.image_folder or sequence.image_folder,
        KeyOptions(**values),
        args.cache_dir or None,
        answer_suffix=sequence.answer_suffix,
        answer_style=sequence.answer_style,
        aspect_ratio=args.image_aspect_ratio,
    )
    write_slot_file(save_path, slots)
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
    from llava.continual.prompt_keys import routing_accuracy
    from llava.slots.merge import merge_key_files

    task = slots.tasks[0].name
    others = []
    for path in sorted(save_path.parent.glob("*.pth")):
        if path.name not in (save_path.name, "merged_prompt_key.pth"):
            try:
                merge_key_files([save_path, path])
            except UserError:  # made with other settings: not comparable, so it takes no part
                continue
            others.append(path)
    if not slots.tasks[0].held_out:
        return "none were held out"
    if not others:
        return "measurable once another task's key file stands beside this one (merge_prompt_key.py reports it)"
    right, count = routing_accuracy(merge_key_files([save_path, *others]))[task]
    names = ", ".join(path.stem for path in others)
    return f"{right} of {count} go to {task} ({100 * right / count:.1f} %), against {names}"


if __name__ == "__main__":
    run_cli(main)
