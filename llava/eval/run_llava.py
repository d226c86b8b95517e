"""Ask one question about one or more pictures.

    python -m llava.eval.run_llava --model-path output/llava-vqa-rad_abd --image-file chest.png \\
        --query "is there a pleural effusion?"

``eval_model(args)`` is the same from Python, as LLaVA's README shows it: ``args`` is any object with some of the flags
as attributes. Several pictures are given with ``--sep`` between their names; ``<image>`` in the query says how many it
speaks of, without it all pictures stand in front of the question.
"""

from __future__ import annotations

import io
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llava.cli import flag, parse
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.eval.loading_flags import LoadingFlags, PromptFlags, asked_prompt, generation_of, loading_of
from llava.utils import UserError, quiet_libraries, run_cli

URL_TIMEOUT = 30  # seconds


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """LLaVA's flags with its defaults, and this project's routing flags."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    image_file: str = flag(help="file or URL; several with --sep between them")
    query: str = flag()
    sep: str = flag(",", "between file names")
    temperature: float = flag(0.2, "0 is greedy")
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 512
    task_id: str | None = flag(None, "route the question to this task's slots")
    route: str | None = flag(None, "router to use; 'none' answers with the base model")


def eval_model(args: Any) -> str:
    """Load the model, print the answer and return it.

    Args:
        args: an object with ``model_path``, ``image_file`` and ``query``; other flags may be missing.
    """
    from llava.eval.answerer import Answerer

    arguments = _with_defaults(args)
    pictures = load_pictures(arguments.image_file, arguments.sep)
    answerer = Answerer(arguments.model_base, loading_of(arguments))
    answerer.use(arguments.model_path, arguments.route, arguments.task_id, **asked_prompt(arguments))
    turns = [("human", with_pictures(arguments.query, len(pictures)))]
    text = answerer.ask(turns, pictures, generation_of(arguments)).text
    if not text:
        print("note: the model gave an empty answer", file=sys.stderr)
    print(text)
    return text


def _with_defaults(args: Any) -> Arguments:
    for name in ("model_path", "image_file", "query"):
        if not hasattr(args, name):
            raise UserError(f"eval_model needs args.{name}")
    return Arguments(
        **{entry.name: getattr(args, entry.name) for entry in fields(Arguments) if hasattr(args, entry.name)}
    )


def load_pictures(names: str, sep: str = ",") -> list:
    """RGB pictures from file names or URLs.

    Raises:
        UserError: one cannot be read, naming it.
    """
    from llava.mm_utils import load_image

    return [
        _from_url(name) if name.startswith(("http://", "https://")) else load_image(name) for name in names.split(sep)
    ]


def _from_url(url: str):
    from PIL import Image, UnidentifiedImageError

    from llava.image_io import to_rgb

    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT) as stream:
            return to_rgb(Image.open(io.BytesIO(stream.read())))
    except (urllib.error.URLError, TimeoutError, UnidentifiedImageError) as error:
        raise UserError(f"no picture can be had from {url} ({error}); download it and give the file") from error


def with_pictures(query: str, count: int) -> str:
    """The query with one ``<image>`` per picture, in front unless it places them itself.

    Raises:
        UserError: it names another number of pictures.
    """
    query = query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    named = query.count(DEFAULT_IMAGE_TOKEN)
    if named and named != count:
        raise UserError(f"the query holds {named} {DEFAULT_IMAGE_TOKEN} but there are {count} pictures (--image-file)")
    return query if named else f"{DEFAULT_IMAGE_TOKEN}\n" * count + query


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    quiet_libraries()
    eval_model(parse(Arguments, argv, __doc__))


if __name__ == "__main__":
    run_cli(main)
