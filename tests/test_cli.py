"""Command lines made of dataclasses: spellings, lists, switches, positional words, sub-commands, errors in one line."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm_python import warm_python

from llava.cli import Parser, flag, flags_of, given, parse, parse_command, word
from llava.train.arguments import TrainParser

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "fusion.py",
    "train_prompt_key.py",
    "merge_prompt_key.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").glob("*.py") if path.name != "check_env.py"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.py")),
]
MODULES = [
    *("llava.continual.slots", "llava.continual.tasks", "llava.serve.cli", "llava.train.train_mem"),
    *("llava.eval.model_vqa_loader", "llava.eval.model_vqa", "llava.eval.run_llava", "llava.eval.merge_chunks"),
    *("llava.eval.eval_video_qa", "llava.eval.accuracy_matrix", "llava.eval.route_report", "llava.eval.report"),
    "llava.serve.gradio_web_server",
]
COLD = ("train_prompt_key.py", "llava.train.train_mem", "llava.eval.model_vqa_loader")
"""Started as a user does, with all that they import; the others are with ``--thorough``."""


@dataclass(kw_only=True)
class Arguments:
    question_file: str = flag(help="questions")
    names: list[str] = flag([], "none or more", empty=True)
    top_p: float | None = flag(None, "share", aliases=["--nucleus"])
    mode: str = flag("a", "a or b", choices=("a", "b"))
    force: bool = flag(False, "again")
    steps: int = 3


@dataclass(kw_only=True)
class Join:
    """join places"""

    places: list[str] = word("some")
    output: str = flag(help="file")
    pack: bool = flag(False, "number anew")


@dataclass(kw_only=True)
class Show:
    """show a place"""

    place: str = word("one")


@dataclass(frozen=True)
class Settings:
    rank: int = 8
    targets: tuple[str, ...] = ("o_proj",)
    share: float = flag(0.5, "50 % or so")


def test_both_spellings_lists_and_switches():
    words = "--question-file q --names a b --nucleus 0.5 --force".split()
    assert parse(Arguments, words) == Arguments(question_file="q", names=["a", "b"], top_p=0.5, force=True)
    words = "--question_file=q --names --top-p 0.5 --force False --mode b".split()
    assert parse(Arguments, words) == Arguments(question_file="q", top_p=0.5, mode="b")


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "the following arguments are required: --question_file/--question-file"),
        ("--question_file q --mode c", "argument --mode: invalid choice: 'c'"),
        ("--question_file q --steps x", "argument --steps: invalid int value: 'x'"),
        ("--question_file q --colour red", "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Arguments, words.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {message}") and said.rstrip().endswith("--help)")


@dataclass
class AllKinds:
    text: str
    number: float = 0.5
    maybe_a_number: int | None = flag(None, "or none", metavar="N")
    known: str | None = flag(None, choices=("a", "b"))
    many_words: list[str] = flag(["x"], "some", aliases=["--words"])
    perhaps_some: list[int] | None = None
    on: bool = flag(True, "switch")
    switched_off: bool = False
    undecided: bool | None = flag(None, "yes or no")


@pytest.mark.parametrize("kind", [AllKinds, Arguments, flags_of(Settings)])
def test_fields_become_the_flags_that_transformers_makes_of_them(kind):
    def told(action):
        about = {**vars(action), "type": action.type and action.type("1"), "container": None}
        return type(action), about

    ours, theirs = Parser(kind)._actions, TrainParser(kind)._actions
    assert list(map(told, ours)) == list(map(told, theirs))
    truth = {action.dest: action.type for action in Parser(AllKinds)._actions}["switched_off"]
    assert [truth(text) for text in "yes No TRUE f y 0".split()] == [True, False, True, False, True, False]
    with pytest.raises(argparse.ArgumentTypeError, match="expected true or false, found '2'"):
        truth("2")


LIGHT = [
    *("llava.continual.tasks", "llava.continual.slots", "llava.eval.eval_video_qa", "llava.eval.accuracy_matrix"),
    *("llava.eval.over_seeds", "llava.eval.result_pages", "llava.eval.run_llava", "llava.eval.route_report"),
    *("llava.eval.evaluate_sequence", "llava.serve.cli", "fusion", "train_prompt_key", "merge_prompt_key"),
]
"""Commands that do something, or explain themselves, before they need a model's libraries."""


def test_light_commands_import_no_library_of_models():
    code = f"""
import importlib, runpy, sys
for name in {LIGHT}:
    importlib.import_module(name)
sys.argv = ["tasks", "variables", "phantom", "tasks", "stages", "more=flags", "base=base.recipe"]
del sys.modules["llava.continual.tasks"]
try:
    runpy.run_module("llava.continual.tasks", run_name="__main__")
except SystemExit as done:
    heavy = {{"torch", "transformers", "peft", "accelerate", "pandas", "matplotlib"}}
    print(done.code, sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "tasks=(abd chest head)" and done.stdout.splitlines()[-1] == "0 []"


def test_sub_commands_with_positional_words(capsys):
    commands = {"join": Join, "show": Show}
    name, found = parse_command(commands, "join --pack a b --output c".split())
    assert name == "join" and found == Join(places=["a", "b"], output="c", pack=True)
    assert parse_command(commands, ["show", "x"]) == ("show", Show(place="x"))
    for words in ([], ["shew"], ["show"], ["join", "--output", "x"]):
        with pytest.raises(SystemExit) as stopped:
            parse_command(commands, words)
        assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_settings_kept_elsewhere_are_flags_that_are_none_unless_given(capsys):
    kind = flags_of(Settings)
    assert given(parse(kind, []), Settings) == {}
    assert given(parse(kind, "--targets q_proj o_proj --share 0".split()), Settings) == {
        "targets": ("q_proj", "o_proj"),
        "share": 0.0,
    }
    with pytest.raises(SystemExit):
        parse(kind, ["--help"])
    said = capsys.readouterr().out
    assert "50 % or so (default: 0.5)" in said and "--rank" in said


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, *MODULES])
def test_every_command_explains_itself(command):
    words = [command] if command.endswith(".py") else ["-m", command]

    def run(python, flag):
        return subprocess.run([str(python), *words, flag], cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run(sys.executable if command in COLD else warm_python(), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "--help" in done.stdout
    wrong = run(warm_python(), "--no-such-flag")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith("error: ")


def test_all_modules_of_the_list_exist():
    assert all(importlib.util.find_spec(name) for name in MODULES)
