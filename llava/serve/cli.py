"""Chat about a picture in the terminal.

    python -m llava.serve.cli --model-path output/llava-vqa-rad_abd --image-file chest.png --device cpu

Each question is answered with the conversation so far; an empty line (or the end of the input) ends the chat. With
slots the route is chosen anew for each question; ``--debug`` shows it with the prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llava.eval.loading_flags import add_loading_flags, add_prompt_flags
from llava.utils import quiet_libraries, run_cli


def build_parser() -> argparse.ArgumentParser:
    """LLaVA's flags with its defaults, and this project's routing flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="base model that a light checkpoint is applied to")
    parser.add_argument("--image-file", required=True, help="file or URL")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    add_prompt_flags(parser)
    add_loading_flags(parser)
    parser.add_argument("--task-id", help="route every question to this task's slots")
    parser.add_argument("--route", help="router to use; 'none' answers with the base model")
    parser.add_argument("--debug", action="store_true", help="show prompt and route")
    parser.set_defaults(num_beams=1)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    quiet_libraries()
    from llava.conversation import get_conversation
    from llava.eval.model_vqa_loader import Speaker
    from llava.eval.run_llava import load_pictures

    pictures = load_pictures(arguments.image_file, sep="\0")  # one picture, whatever its name
    speaker = Speaker.load(arguments)
    names = get_conversation(speaker.prompt.conv_mode).roles
    print("ask about the picture; an empty line ends the chat")
    chat(speaker, pictures, arguments, names)


def chat(speaker, pictures: list, arguments: argparse.Namespace, names: Sequence[str]) -> list[tuple[str, str]]:
    """Questions from the standard input and answers to the standard output, until an empty line; returns the turns."""
    from llava.eval.run_llava import ask, with_pictures

    turns: list[tuple[str, str]] = []
    human, assistant = (name.split("|>")[-1].strip() or name for name in names)
    while question := _read(f"{human}: "):
        turns.append(("human", question if turns else with_pictures(question, len(pictures))))
        print(f"{assistant}: ", end="", flush=True)
        text, route = ask(speaker, turns, pictures, arguments, streamer=_streamer(speaker))
        if not text:
            print("(the model gave an empty answer)")
        turns.append(("gpt", text))
        if arguments.debug:
            print({"turns": turns, "conv_mode": speaker.prompt.conv_mode, "route": route})
    return turns


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        print(file=sys.stdout)
        return ""


def _streamer(speaker):
    """Prints the answer while it is made."""
    from transformers import TextStreamer

    return TextStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    run_cli(main)
