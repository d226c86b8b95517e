"""How far a long step is: lines in a log file, a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import io

import pytest

from llava import progress
from llava.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(monkeypatch, capsys):
    """What standard error, which is no terminal, has got; with a clock that each look moves on by five seconds."""
    now = iter(range(0, 100_000, 5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return lambda: capsys.readouterr().err


def test_a_log_file_gets_a_line_every_half_a_minute_and_one_at_the_end(log):
    shown = Progress("prompt keys", "round", range(20))
    for number in shown:
        shown.figures["best_similarity"] = 0.5 + number
    lines = log().splitlines()
    assert lines[0] == "prompt keys: 6 of 20 rounds, best similarity 5.5, 5.8 s a round, about 1 min 22 s left"
    assert len(lines) == 4 and all("\r" not in line for line in lines)
    assert lines[-1] == "prompt keys: 20 of 20 rounds, best similarity 19.5, took 2 min 15 s"


def test_fast_rounds_have_a_rate_and_what_was_done_before_has_no_share_in_it(log):
    with Progress("answers", "question", total=1000, done=400) as shown:
        for _ in range(7):
            shown.advance(100 if shown.done < 1000 else 0)
    assert log().splitlines()[0] == "answers: 1000 of 1000 questions, 17.1/s, about 0 min 00 s left"


def test_more_rounds_than_were_told_leave_no_time_below_nothing(log):
    with Progress("steps", "step", total=5) as shown:
        for _ in range(8):
            shown.advance()
    assert log().splitlines()[0].endswith("6 of 5 steps, 5.8 s a step, about 0 min 00 s left")


def test_a_short_step_leaves_nothing_behind(log):
    assert list(Progress("rows", "row", "abc")) == ["a", "b", "c"] and log() == ""


def test_a_total_may_be_unknown_and_a_loop_may_break_off(log):
    for number in Progress("steps", "batch", iter(range(100))):
        if number == 8:
            break
    assert log().splitlines() == ["steps: 6 batches, 5.8 s a batch", "steps: 8 batches, took 0 min 55 s"]


def test_a_step_that_fails_does_not_say_that_it_has_ended(log):
    with pytest.raises(ZeroDivisionError), Progress("steps", "step", total=9) as shown:
        for _ in range(7):
            shown.advance()
        raise ZeroDivisionError
    assert len(log().splitlines()) == 1


@pytest.mark.parametrize("quiet, rank", [(True, "0"), (False, "1")])
def test_other_processes_and_quiet_steps_say_nothing(log, monkeypatch, quiet, rank):
    monkeypatch.setenv("RANK", rank)
    with Progress("steps", "step", total=50, quiet=quiet) as shown:
        for _ in range(50):
            shown.advance()
        shown.say("a word")
    assert log() == ""


def test_a_closed_standard_error_is_no_obstacle(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert list(Progress("steps", "step", range(3))) == [0, 1, 2]


def test_a_terminal_gets_a_bar_unless_lines_are_wanted(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with Progress("answers", "question", total=3, stays=True) as shown:
        shown.figures["loss"] = 0.25
        shown.advance()
        shown.say("a word")
        shown.advance(2)
    said = stream.getvalue()
    assert "\ranswers: 100%" in said and "3/3" in said and "loss 0.25" in said and "a word\n" in said
    stream.truncate(0)
    assert list(Progress("answers", "question", range(3), lines=True)) == [0, 1, 2] and "%" not in stream.getvalue()


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 200, 3900)] == ["0 min 00 s", "3 min 20 s", "1 h 05 min"]
