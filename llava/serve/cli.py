"""Chat about a picture in the terminal.

    python -m llava.serve.cli --model-path output/llava-vqa-rad_abd --image-file chest.png --device cpu

Each question is answered with the conversation so far; an empty line (or the end of the input) ends the chat. With
slots the route is chosen anew for each question; ``--debug`` shows it with the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from llava.cli import flag, parse
from llava.eval.loading_flags import LoadingFlags, PromptFlags
from llava.utils import quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """LLaVA's flags with its defaults, and this project's routing flags."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    image_file: str = flag(help="file or URL")
    temperature: float = flag(0.2, "0 is greedy")
    top_p: float | None = None
    num_beams: ClassVar[int] = 1
    max_new_tokens: int = 512
    task_id: str | None = flag(None, "route every question to this task's slots")
    route: str | None = flag(None, "router to use; 'none' answers with the base model")
    debug: bool = flag(False, "show prompt and route")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parse(Arguments, argv, __doc__)
    quiet_libraries()
    from llava.conversation import get_conversation
    from llava.eval.model_vqa_loader import Speaker
    from llava.eval.run_llava import load_pictures

    pictures = load_pictures(arguments.image_file, sep="\0")  # one picture, whatever its name
    speaker = Speaker.load(arguments)
    names = get_conversation(speaker.prompt.conv_mode).roles
    print("ask about the picture; an empty line ends the chat")
    chat(speaker, pictures, arguments, names)


def chat(speaker, pictures: list, arguments: Arguments, names: Sequence[str]) -> list[tuple[str, str]]:
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
