"""Ask one question about one or more pictures.

    python -m llava.eval.run_llava --model-path output/llava-vqa-rad_abd --image-file chest.png \\
        --query "is there a pleural effusion?"

``eval_model(args)`` is the same from Python, as LLaVA's README shows it: ``args`` is any object with some of the flags
as attributes. Several pictures are given with ``--sep`` between their names; ``<image>`` in the query says how many it
speaks of, without it all pictures stand in front of the question.
"""

from __future__ import annotations

import http.client
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava.cli import MANY, filled, flag, parse
from llava.data.rows import with_pictures
from llava.eval.loading_flags import LoadingFlags, PromptFlags, asked_prompt, generation_of, loading_of
from llava.utils import UserError, quiet_libraries, run_cli

if TYPE_CHECKING:
    from PIL.Image import Image

URL_TIMEOUT = 30  # seconds
MOST_BYTES = 2**30


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """LLaVA's flags with its defaults, and this project's routing flags."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    image_file: str = flag(help="file or URL; several with --sep between them")
    query: str = flag()
    sep: str = flag(",", "between file names")
    temperature: float = flag(0.2, "0 is greedy", least=0)
    top_p: float | None = flag(None, above=0, most=1)
    num_beams: int = flag(1, least=1, most=MANY)
    max_new_tokens: int = flag(512, least=1, most=MANY)
    task_id: str | None = flag(None, "route the question to this task's slots")
    route: str | None = flag(None, "router to use; 'none' answers with the base model")


def eval_model(args: Any) -> str:
    """Load the model, print the answer and return it.

    Args:
        args: an object with ``model_path``, ``image_file`` and ``query``; other flags may be missing.
    """
    from llava.eval.answerer import Answerer

    arguments = filled(Arguments, args)
    pictures = load_images(image_parser(arguments))
    answerer = Answerer(arguments.model_base, loading_of(arguments))
    answerer.use(arguments.model_path, arguments.route, arguments.task_id, **asked_prompt(arguments))
    turns = [("human", with_pictures(arguments.query, len(pictures)))]
    text = answerer.ask(turns, pictures, generation_of(arguments)).text
    if not text:
        print("note: the model gave an empty answer", file=sys.stderr)
    print(text)
    return text


def image_parser(args: Any) -> list[str]:
    """The names in ``args.image_file``: a text with ``args.sep`` between them, or a list."""
    return args.image_file.split(args.sep) if isinstance(args.image_file, str) else list(args.image_file)


def load_images(image_files: Iterable[str]) -> list[Image]:
    """RGB pictures from file names or URLs.

    Raises:
        UserError: one cannot be read, naming it.
    """
    return [load_image(name) for name in image_files]


def load_image(image_file: str) -> Image:
    """An RGB picture from a file name or URL.

    Raises:
        UserError: it cannot be read, naming it.
    """
    from llava import image_io

    if not image_file.startswith(("http://", "https://")):
        return image_io.load_image(image_file)
    try:
        with urllib.request.urlopen(image_file, timeout=URL_TIMEOUT) as stream:
            data = stream.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"no picture can be had from {image_file} ({error}); download it and give the file") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"{image_file} is larger than {MOST_BYTES >> 20} MB; download it and give the file")
    return image_io.decode_image(data, image_file.partition("?")[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    quiet_libraries()
    eval_model(parse(Arguments, argv, __doc__))


if __name__ == "__main__":
    run_cli(main)
