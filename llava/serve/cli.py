"""Chat about a picture in the terminal.

    python -m llava.serve.cli --model-path output/llava-vqa-rad_abd --image-file chest.png --device cpu

Each question is answered with the conversation so far; an empty line (or the end of the input) ends the chat. With
slots the route is chosen anew for each question; ``--debug`` shows it with the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llava.cli import MANY, flag, parse
from llava.data.rows import with_pictures
from llava.eval.loading_flags import LoadingFlags, PromptFlags, asked_prompt, generation_of, loading_of
from llava.eval.run_llava import load_image
from llava.utils import quiet_libraries, run_cli

if TYPE_CHECKING:
    from llava.eval.answerer import Answerer
    from llava.eval.generation import Generation


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """LLaVA's flags with its defaults, and this project's routing flags."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    image_file: str = flag(help="file or URL")
    temperature: float = flag(0.2, "0 is greedy", least=0)
    top_p: float | None = flag(None, above=0, most=1)
    num_beams: ClassVar[int] = 1
    max_new_tokens: int = flag(512, least=1, most=MANY)
    task_id: str | None = flag(None, "route every question to this task's slots")
    route: str | None = flag(None, "router to use; 'none' answers with the base model")
    debug: bool = flag(False, "show prompt and route")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parse(Arguments, argv, __doc__)
    quiet_libraries()
    from llava.conversation import get_conversation
    from llava.eval.answerer import Answerer

    pictures = [load_image(arguments.image_file)]
    answerer = Answerer(arguments.model_base, loading_of(arguments))
    answerer.use(arguments.model_path, arguments.route, arguments.task_id, **asked_prompt(arguments))
    names = get_conversation(answerer.prompt.conv_mode).roles
    print("ask about the picture; an empty line ends the chat")
    chat(answerer, pictures, generation_of(arguments), names, arguments.debug)


def chat(
    answerer: Answerer, pictures: list, generation: Generation, names: Sequence[str], debug: bool = False
) -> list[tuple[str, str]]:
    """Questions from the standard input and answers to the standard output, until an empty line; returns the turns."""
    turns: list[tuple[str, str]] = []
    human, assistant = (name.split("|>")[-1].strip() or name for name in names)
    while question := _read(f"{human}: "):
        turns.append(("human", question if turns else with_pictures(question, len(pictures))))
        print(f"{assistant}: ", end="", flush=True)
        _, text, route = answerer.ask(turns, pictures, generation, streamer=_streamer(answerer.tokenizer))
        if not text:
            print("(the model gave an empty answer)")
        turns.append(("gpt", text))
        if debug:
            print({"turns": turns, "conv_mode": answerer.prompt.conv_mode, "route": route})
    return turns


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        print(file=sys.stdout)
        return ""


def _streamer(tokenizer: Any) -> Any:
    """Prints the answer while it is made."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    run_cli(main)
