"""Ask one question about one or more pictures.

    python -m llava.eval.run_llava --model-path output/llava-vqa-rad_abd --image-file chest.png \\
        --query "is there a pleural effusion?"

``eval_model(args)`` is the same from Python, as LLaVA's README shows it: ``args`` is any object with some of the flags
as attributes. Several pictures are given with ``--sep`` between their names; ``<image>`` in the query says how many it
speaks of, without it all pictures stand in front of the question.
"""

from __future__ import annotations

import argparse
import io
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.eval.loading_flags import add_loading_flags, add_prompt_flags
from llava.utils import UserError, quiet_libraries, run_cli

URL_TIMEOUT = 30  # seconds


def build_parser() -> argparse.ArgumentParser:
    """LLaVA's flags with its defaults, and this project's routing flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="base model that a light checkpoint is applied to")
    parser.add_argument("--image-file", required=True, help="file or URL; several with --sep between them")
    parser.add_argument("--query", required=True)
    parser.add_argument("--sep", default=",", help="between file names (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float)
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=512)
    add_prompt_flags(parser)
    add_loading_flags(parser)
    parser.add_argument("--task-id", help="route the question to this task's slots")
    parser.add_argument("--route", help="router to use; 'none' answers with the base model")
    return parser


def eval_model(args: Any) -> str:
    """Load the model, print the answer and return it.

    Args:
        args: an object with ``model_path``, ``image_file`` and ``query``; other flags may be missing.
    """
    from llava.eval.model_vqa_loader import Speaker

    arguments = _with_defaults(args)
    pictures = load_pictures(arguments.image_file, arguments.sep)
    speaker = Speaker.load(arguments)
    text, _ = ask(speaker, [("human", with_pictures(arguments.query, len(pictures)))], pictures, arguments)
    if not text:
        print("note: the model gave an empty answer", file=sys.stderr)
    print(text)
    return text


def _with_defaults(args: Any) -> argparse.Namespace:
    given = {name: getattr(args, name) for name in ("model_path", "image_file", "query") if hasattr(args, name)}
    absent = [name for name in ("model_path", "image_file", "query") if name not in given]
    if absent:
        raise UserError(f"eval_model needs args.{absent[0]}")
    words = ["--model-path", "", "--image-file", "", "--query", ""]
    defaults = vars(build_parser().parse_args(words))
    return argparse.Namespace(**{name: getattr(args, name, value) for name, value in defaults.items()})


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


def ask(speaker, turns: Sequence[tuple[str, str]], pictures: list, arguments: argparse.Namespace, **more):
    """The answer to the last human turn of a conversation about ``pictures``: ``(text, route or None)``.

    Args:
        turns: ``("human", text)``, ``("gpt", text)``, …; the first human turn holds the ``<image>`` marks.
        more: further arguments for ``generate``, such as a streamer.
    """
    import torch

    from llava.data.rows import Row

    encoder = speaker.encoder()
    ids, _ = encoder.conversation(turns, bool(pictures))
    pixels = encoder.pixels(pictures) if pictures else []
    question = turns[-1][1].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    batch = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "images": [list(pixels)] if pictures else None,
        "image_sizes": [[picture.size for picture in pictures]],
        "rows": [Row(0, None, (("human", question),), None, None, {})],
    }
    return speaker.reply(batch, arguments, **more)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    quiet_libraries()
    eval_model(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
