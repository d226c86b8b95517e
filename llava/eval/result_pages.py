"""Tables in Markdown pages, made from the small result files of benchmarks.

    python -m llava.eval.result_pages README.md docs/results.md

Between the lines ``<!-- results: FILE -->`` and ``<!-- end of results -->`` of a page stands what ``markdown`` makes of
that file, whose name is relative to the page. ``llava.eval.benchmark_table --result`` writes such a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.cli import parse, word
from llava.files import atomic_write
from llava.outside import read_object, read_text
from llava.schema import Wanted, an_object, check_fields, list_of, number, whole, words, yes_or_no
from llava.utils import UserError, run_cli

FORMAT_VERSION = 1
OWN = "retrieval"
SIMPLE = ("zero_shot", "sequential", "replay")
"""Methods that count as simple baselines, beside the two that train nothing at all."""
SHOWN = {"forgetting": "forgetting", "bwt": "BWT", "fwt": "FWT"}


def _each(inside: Wanted) -> Wanted:
    """A JSON object whose values are all so."""
    return Wanted(
        f"a JSON object, each value {inside.words}",
        lambda value: isinstance(value, Mapping) and all(map(inside.allows, value.values())),
    )


_PARTS = an_object({"mean": number(), "sd": number(0), "ci95": list_of(number(), 2)})
_FIGURE = Wanted("a figure with its mean", lambda value: _PARTS.allows(value) and value.get("mean") is not None)
RESULT: dict[str, Wanted] = {
    "command": words(empty=False),
    "machine": words(),
    "cells": whole(0),
    "done": whole(0),
    "metric": words(),
    "tasks": list_of(words(empty=False), empty=False),
    "baselines": _each(_each(number())),
    "runs": list_of(an_object()),
}
"""What a table is made of; the rest of a result is for its readers."""
RUN: dict[str, Wanted] = {
    **dict.fromkeys(("run", "method"), words(empty=False)),
    "order": list_of(words(empty=False), empty=False),
    "seeds": list_of(whole(0), empty=False),
    "task_given": yes_or_no,
    **dict.fromkeys(("rates", "final"), _each(number())),
    **dict.fromkeys(("summary", "overall", "gaps"), _each(_FIGURE)),
    "pictures": _each(_each(_FIGURE)),
}
_OF_ALL_RUNS = tuple(name for name in RUN if name != "overall")
"""Earlier results tell nothing over all questions."""
_PART = re.compile(r"^(<!-- results: (\S+) -->\n).*?^(<!-- end of results -->)$", re.S | re.M)
_OPEN = re.compile(r"^<!-- results:", re.M)
_ZERO = re.compile(r"^([+-]?)0\.")


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    pages: list[str] = word("Markdown pages")


def main(argv: Sequence[str] | None = None) -> None:
    """Renew the tables of some pages."""
    for page in parse(Arguments, argv, __doc__).pages:
        text = read_text(page, "page")
        found = renewed(text, Path(page).parent)
        if found != text:
            with atomic_write(page) as stream:
                stream.write(found)
        print(f"{page}: {'renewed' if found != text else 'as it should be'}")


def renewed(text: str, folder: Path) -> str:
    """A page with its tables as the result files say; ``folder`` is the page's.

    Raises:
        UserError: a table that does not end, or a file that is missing or no result.
    """
    if len(_PART.findall(text)) != len(_OPEN.findall(text)):
        raise UserError(f"a table in {folder} does not end; write <!-- end of results --> behind it")
    return _PART.sub(lambda part: f"{part[1]}{markdown(read_result(folder / part[2]))}{part[3]}", text)


def read_result(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        UserError: it is missing, or none of this version.
    """
    found = read_object(path, "result", "write it with: python -m llava.eval.benchmark_table FILE --result")
    if found.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: no result of version {FORMAT_VERSION}; write it again")
    try:
        _check(found, str(path))
    except UserError as error:
        raise UserError(f"{error} (a result is not written by hand; write it again)") from error
    return found


def _check(result: Mapping[str, Any], where: str) -> None:
    """Refuse a result that lacks what a table is made of."""
    check_fields(result, RESULT, where, False, tuple(RESULT))
    by_task = dict.fromkeys(result["tasks"], number())
    for name, values in result["baselines"].items():
        check_fields(values, by_task, f"{where}: baselines: {name}", False, tuple(by_task))
    for place, entry in enumerate(result["runs"], start=1):
        run = f"{where}: run {place}"
        check_fields(entry, RUN, run, False, _OF_ALL_RUNS)
        check_fields(entry["final"], by_task, f"{run}: final", False, tuple(by_task))
        check_fields(entry["summary"], {"average_final": _FIGURE}, f"{run}: summary", False, ("average_final",))


def markdown(result: Mapping[str, Any]) -> str:
    """The caption, and a line for each baseline and run: final scores by task, on average, and over all questions,
    means over seeds, with the standard deviation of the latter two where there are several."""
    tasks, gaps = result["tasks"], sorted({name for entry in result["runs"] for name in entry["gaps"]})
    also = list(dict.fromkeys(name for entry in result["runs"] for name in entry.get("overall", {})))
    head = [
        "run",
        "order",
        "seeds",
        *tasks,
        "average",
        *("overall" if name == result["metric"] else name for name in also),
        *SHOWN.values(),
        *(f"gap to {name.replace('_', ' ')}" for name in gaps),
    ]
    lines = [head, ["---"] * len(head)]
    for name, values in result["baselines"].items():
        scores = [score(values[task]) for task in tasks]
        lines.append([name, "", "", *scores, score(_mean(values)), *[""] * (len(also) + len(SHOWN) + len(gaps))])
    for entry in result["runs"]:
        summary = entry["summary"]
        name = entry["run"] + (" (task given)" if entry["task_given"] else "")
        line = [f"**{name}**" if entry["run"] == OWN else name, ", ".join(entry["order"]), str(len(entry["seeds"]))]
        line += [score(entry["final"][task]) for task in tasks]
        line += [spread(summary.get("average_final")), *(spread(entry.get("overall", {}).get(name)) for name in also)]
        line += [spread(summary.get(name)) for name in SHOWN]
        lines.append([*line, *(spread(entry["gaps"].get(name), "+") for name in gaps)])
    return f"\n{caption(result)}\n\n{_table(lines)}\n\n{pictures(result)}"


def pictures(result: Mapping[str, Any]) -> str:
    """A table of what the pictures contribute to the runs for which that was asked; empty where it was for none."""
    entries = [entry for entry in result["runs"] if entry["pictures"]]
    if not entries:
        return ""
    kinds = list(dict.fromkeys(kind for entry in entries for kind in entry["pictures"]))
    head = ["run", "order", *(f"{what}, {kind}" for kind in kinds for what in ("answers that change", "drop"))]
    lines = [head, ["---"] * len(head)]
    for entry in entries:
        shown = [entry["pictures"].get(kind, {}).get(what) for kind in kinds for what in ("changed", "drop")]
        lines.append([entry["run"], ", ".join(entry["order"]), *map(_within, shown)])
    text = (
        f"Without the right picture: share of answers that change, and drop of {result['metric']}, with 95 % intervals "
        "over seeds, over questions where there is one seed."
    )
    return f"{text}\n\n{_table(lines)}\n\n"


def _within(found: Mapping[str, Any] | None) -> str:
    """A mean with its interval."""
    if found is None:
        return ""
    ends = found.get("ci95")
    return score(found["mean"]) + ("" if ends is None else f" [{score(ends[0])}, {score(ends[1])}]")


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(result: Mapping[str, Any]) -> str:
    """What was measured, on what, which learning rates were chosen, and whether a simple baseline wins."""
    found = ["; ".join(part for part in (result["metric"], f"`{result['command']}`") if part)]
    if result["machine"]:
        found[0] += f" on {result['machine']}"
    if result["done"] < result["cells"]:
        found.append(f"{result['done']} of {result['cells']} cells are done")
    for entry in {entry["run"]: entry for entry in result["runs"] if entry["rates"]}.values():
        tried = ", ".join(f"{score(value)} at {rate}" for rate, value in entry["rates"].items())
        found.append(f"Learning rate of {entry['run']} by validation rows: {tried}")
    return ". ".join([*found, *verdict(result)]) + "."


def verdict(result: Mapping[str, Any]) -> list[str]:
    """A sentence on who is above the project's own method in its first order, among those that neither are told the
    task nor see all data at once; none where that method is not there."""
    own = next((entry for entry in result["runs"] if entry["run"] == OWN and not entry["task_given"]), None)
    if own is None:
        return []
    bar = own["summary"]["average_final"]["mean"]
    values = {name: (_mean(by), True) for name, by in result["baselines"].items()}
    for entry in result["runs"]:
        told = entry["task_given"] or entry["method"] in ("joint", OWN)
        if entry["order"] == own["order"] and not told:
            values[entry["run"]] = entry["summary"]["average_final"]["mean"], entry["method"] in SIMPLE
    above = {name: pair for name, pair in values.items() if pair[0] > bar}
    if not above:
        return [f"No baseline or other method that is not told the task is above {OWN} ({score(bar)})"]
    marks = {True: ", a simple baseline", False: ""}
    named = "; ".join(f"{name} ({score(value)}{marks[simple]})" for name, (value, simple) in above.items())
    return [f"Above {OWN} ({score(bar)}): {named}"]


def spread(found: Mapping[str, Any] | None, sign: str = "") -> str:
    """A mean with its standard deviation."""
    if found is None:
        return ""
    deviation = found.get("sd")
    return score(found["mean"], sign) + ("" if deviation is None else f" ± {score(deviation)}")


def score(value: float | None, sign: str = "") -> str:
    """Three digits, without the zero in front: ``.617``."""
    return "" if value is None else _ZERO.sub(r"\1.", f"{value:{sign}.3f}")


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


if __name__ == "__main__":
    run_cli(main)
