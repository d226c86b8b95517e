"""Ask a model about pictures in the browser, and by OpenAI's API.

    python -m llava.serve.gradio_web_server --model-path output/llava-vqa-rad_abd_chest_head

The page shows the answer as it comes and, beside it, the route: which task the question fits and which slots answered.
The same process answers ``/v1/chat/completions`` (``docs/serving.md``). Answers are those of ``llava.eval.run_llava``.
What users give stays in memory; nothing is fetched from elsewhere or reported. Not for clinical use.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.cli import MANY, fail, flag, parse
from llava.eval.loading_flags import LoadingFlags, PromptFlags, asked_prompt, generation_of, loading_of
from llava.utils import UserError, quiet_libraries, rank0_print, run_cli

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """Which model, how it answers, who may ask how much."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    task_id: str | None = flag(None, "route every question to this task's slots")
    route: str | None = flag(None, "router to use; 'none' answers with the base model")
    temperature: float = flag(0.0, "0 is greedy, as in the evaluation", least=0)
    top_p: float | None = flag(None, above=0, most=1)
    max_new_tokens: int = flag(256, "of an answer, where the API's caller does not say", least=1, most=MANY)
    refuse_unknown: bool = flag(False, "answer questions that fit no known task with a fixed refusal")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines ask")
    port: int = flag(7860, "0: any that is free", least=0, most=65535)
    question_file: str | None = flag(None, "test set whose questions are offered as examples")
    image_folder: str | None = flag(None, "folder of its pictures")
    examples: int = flag(8, "how many of them", least=1, most=100)
    max_pictures: int = flag(8, "pictures of a conversation", least=1, most=MANY)
    max_megabytes: int = flag(32, "of a conversation's pictures together", least=1, most=MANY)
    max_pixels: int | None = flag(32_000_000, "pixels of a conversation's pictures together", least=1)
    max_characters: int = flag(20_000, "of a conversation's text", least=1, most=MANY)
    max_answer_tokens: int = flag(1024, "that the API's caller may ask for", least=1, most=MANY)
    at_once: int = flag(8, "questions that are answered or wait; more are told to come back", least=1, most=1000)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parse(Arguments, argv, __doc__)
    quiet_libraries()
    if (arguments.question_file is None) != (arguments.image_folder is None):
        fail("--question-file and --image-folder belong together; give both, or none")
    with _listening(arguments.host, arguments.port) as here:
        app, service = make(arguments)
        import uvicorn

        if arguments.host not in LOOPBACK:
            rank0_print(f"note: whoever reaches {arguments.host} can ask; there is no password")
        name = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        at = f"http://{name}:{here.getsockname()[1]}"
        rank0_print(f"the demo is at {at}/, the API at {at}/v1; Ctrl-C ends it")
        try:
            uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[here])
        finally:
            service.close()


def make(arguments: Arguments) -> tuple[Any, Any]:
    """The app of a command line, and the service behind it.

    Raises:
        UserError: the extra ``serve`` is missing, or the model or the examples cannot be had.
    """
    _need_gradio()
    from llava.eval.answerer import Answerer
    from llava.mm_utils import get_model_name_from_path
    from llava.serve.app import make_app
    from llava.serve.examples import read_examples
    from llava.serve.service import Limits, Service

    loading = loading_of(arguments)
    limits = Limits(
        arguments.max_pictures,
        arguments.max_megabytes * 2**20,
        arguments.max_pixels or Limits.pixels,
        arguments.max_characters,
        max(arguments.max_answer_tokens, arguments.max_new_tokens),
        arguments.at_once,
    )
    examples = []
    if arguments.question_file is not None and arguments.image_folder is not None:
        examples = read_examples(arguments.question_file, arguments.image_folder, arguments.examples, limits)
    answerer = Answerer(arguments.model_base, loading)
    answerer.use(arguments.model_path, arguments.route, arguments.task_id, **asked_prompt(arguments))
    service = Service(answerer, get_model_name_from_path(arguments.model_path), generation_of(arguments), limits)
    return make_app(service, examples, only_here=arguments.host in LOOPBACK), service


def _listening(host: str, port: int) -> socket.socket:
    """The socket to listen on, had before a model is loaded.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    if not host:  # every address, for a socket
        raise UserError("--host is empty; write 0.0.0.0 where other machines may ask")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError, TypeError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error


def _need_gradio() -> None:
    """Turn off what gradio would tell its makers, before it is imported.

    Raises:
        UserError: it is not installed.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    for name in ("gradio", "fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the demo needs {name} (install: pip install '.[serve]')")


if __name__ == "__main__":
    run_cli(main)
