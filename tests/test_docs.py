"""What the pages say exists: links, tests they name, and the flags of the commands they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava.eval.result_pages import renewed

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", ROOT / "output" / "README.md"]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"(?:python3?|deepspeed)[ \t]+(?:-m[ \t]+)?(?P<target>[\w./]+)(?P<rest>(?:\\\n|[^\n])*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_exist(page):
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def source_of(target: str) -> str | None:
    """The text that declares a command's flags, or None for programs that are not ours."""
    path = ROOT / (target if target.endswith(".py") else target.replace(".", "/") + ".py")
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if path.name == "train_mem.py":
        text += "".join(file.read_text(encoding="utf-8") for file in (ROOT / "llava" / "train").glob("*.py"))
    if "model_vqa_loader.Arguments" in text:
        text += (ROOT / "llava" / "eval" / "model_vqa_loader.py").read_text(encoding="utf-8")
    if "LoadingFlags" in text:
        text += (ROOT / "llava" / "eval" / "loading_flags.py").read_text(encoding="utf-8")
    if "flags_of(" in text:
        text += (ROOT / "llava" / "continual" / "settings.py").read_text(encoding="utf-8")
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_shown_commands_exist(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for command in COMMAND.finditer(block):
            source = source_of(command["target"])
            if source is None:
                assert not command["target"].startswith(("llava", "scripts/")), f"no such program: {command['target']}"
                continue
            if "train_mem" in command["target"]:  # transformers declares most of these
                continue
            for flag in re.findall(r"(?<=\s)--([\w-]+)", command["rest"].split("#")[0]):
                known = f'"--{flag}"' in source or f"    {flag.replace('-', '_')}:" in source
                known = known or f'spelled("{flag.replace("-", "_")}")' in source
                assert known, f"{command['target']} has no --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_shell_scripts_that_are_shown_exist(page):
    shown = re.findall(r"\bbash ([\w./]+\.sh)", page.read_text(encoding="utf-8"))
    assert not [name for name in shown if not (ROOT / name).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_of_results_are_those_of_their_files(page):
    """``python -m llava.eval.result_pages`` makes them so."""
    text = page.read_text(encoding="utf-8")
    assert renewed(text, page.parent) == text


def test_the_thirty_failures_are_all_answered():
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "docs" / "llava-failures.md").read_text(encoding="utf-8"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 31))
    for _, row in rows:
        held_by = row.split("|")[-1].strip()
        assert held_by == "open" or "`" in held_by
        for file in re.findall(r"`((?:llava|scripts|\.ci)/[\w./]+)`", held_by):
            assert (ROOT / file).is_file(), file
