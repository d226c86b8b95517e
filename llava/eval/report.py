"""One page about one evaluated run or several, which needs nothing beside itself; and its tables as Markdown and LaTeX.

    python -m llava.eval.report output/eval/vqa-rad
    python -m llava.eval.report output/eval/vqa-rad output/eval/vqa-rad-sequential
    python -m llava.eval.report output/benchmarks/phantom

An OUTPUT is an evaluation's folder, a folder with several of them under ``eval``, or a benchmark's. Without one,
``--sequence``, ``--method`` and ``--route`` name the evaluation as ``cv805.sh`` does. Of several runs the page also has
the differences from the first, scored on the same resampled questions, and the spread over seeds where they have
several. ``report.html``, ``report.md`` and ``report.tex`` go into the folder that all runs have in common.

The page holds pictures, questions and answers of the test data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.cli import SEEDS, flag, parse, word
from llava.continual.places import REPORT, Places
from llava.continual.sequence import load_sequence
from llava.files import atomic_write
from llava.utils import UserError, quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    outputs: list[str] = word("evaluations' folders, or what holds them", default=None)
    sequence: str = flag("", "without OUTPUTS: the task sequence whose evaluation is meant")
    method: str = flag("retrieval", "with --sequence: the method that was evaluated")
    route: str = flag("", "with --sequence: the router that was asked for")
    output_dir: str = flag("", "with --sequence: holds the results (default: OUTPUT_DIR, else output)")
    report_dir: str = flag("", "folder of the page (default: the one that all runs lie in)")
    image_folder: str = flag("", "pictures of the test questions (default: where the evaluation took them)")
    examples: int = flag(24, "how many questions are shown with their pictures", least=0, most=200)
    seed: int = flag(17, "which they are", **SEEDS)
    route_report: str = flag("", "route_report.json of llava.eval.route_report: its routers are shown too")
    no_java: bool = flag(False, "compare several runs with the plain tokenizer, without METEOR")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = parse(Arguments, argv, __doc__)
    quiet_libraries()
    write_page(arguments)


def write_page(arguments: Arguments) -> None:
    """Read, look, write.

    Raises:
        UserError: there is nothing to show.
    """
    from llava.eval.page import writing
    from llava.eval.page.results import Results, evaluations, labels
    from llava.eval.page.routes import read_route_report
    from llava.eval.page.sections import all_sections, title_of_page

    outputs = arguments.outputs or [named_evaluation(arguments)]
    found = {os.path.realpath(folder): folder for output in outputs for folder in evaluations(output)}
    folders = list(found.values())
    runs = [Results.read(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    sections = all_sections(
        runs,
        arguments.examples,
        arguments.seed,
        arguments.image_folder or None,
        False if arguments.no_java else None,
        read_route_report(arguments.route_report) if arguments.route_report else None,
    )
    title = title_of_page(runs)
    target = Path(arguments.report_dir or common_folder(outputs))
    files = {
        target / REPORT: writing.html(title, sections),
        (target / REPORT).with_suffix(".md"): writing.markdown(title, sections),
        (target / REPORT).with_suffix(".tex"): writing.latex(title, sections),
    }
    for file, text in files.items():
        with atomic_write(file) as stream:
            stream.write(text)
    for damage in (one for run in runs for one in run.left_out):
        print(f"note: left out of the page: {damage.error}", file=sys.stderr)
    print(f"the page: {target / REPORT}; its tables: report.md and report.tex beside it")


def common_folder(outputs: Sequence[str]) -> str:
    """The folder that all outputs lie in, as it is told from here unless one of them has a whole path."""
    if len(outputs) == 1:
        return outputs[0]
    found = os.path.commonpath(list(map(os.path.abspath, outputs)))
    return found if any(map(os.path.isabs, outputs)) else os.path.relpath(found)


def named_evaluation(arguments: Arguments) -> str:
    """The folder that ``--sequence`` and its like name.

    Raises:
        UserError: there is no ``--sequence`` either.
    """
    if not arguments.sequence:
        raise UserError("give evaluations' folders, such as output/eval/vqa-rad, or --sequence")
    environ = {**os.environ, **({"OUTPUT_DIR": arguments.output_dir} if arguments.output_dir else {})}
    places = Places.of(load_sequence(arguments.sequence), arguments.method, environ)
    return str(places.evaluation(arguments.route or None))


if __name__ == "__main__":
    run_cli(main)
