"""The names that LLaVA's workers import from ``llava.utils``."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import pickle
import sys

import pytest

from llava import utils
from llava.utils import StreamToLogger, UserError, run_cli


def test_a_workers_imports_are_there():
    assert utils.server_error_msg and utils.moderation_msg and "NETWORK" not in utils.server_error_msg
    logger = utils.build_logger(logger_name="llava.test_worker", logger_filename=None)
    assert logger is utils.build_logger("llava.test_worker") and len(logger.handlers) == 1
    assert utils.disable_torch_init() is None


def test_bars_of_libraries_stay_out_of_a_log_also_once_they_are_imported(monkeypatch):
    """Commands whose modules import transformers were too late for the variable that it reads at import."""
    from transformers.utils import logging as theirs

    before = theirs.is_progress_bar_enabled()
    theirs.enable_progress_bar()
    try:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        utils.quiet_libraries()
        assert not theirs.is_progress_bar_enabled()
    finally:
        theirs.enable_progress_bar() if before else theirs.disable_progress_bar()


def test_an_error_is_one_line_whatever_names_stand_in_it():
    """A group of scores named with a line's end made two lines, and a terminal's commands were sent to it."""
    error = UserError("a.json: groups: one\ntwo\x1b[2J\u2028: field 'n' is missing, naïvely")
    assert str(error) == "a.json: groups: one\\ntwo\\x1b[2J\\u2028: field 'n' is missing, naïvely"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_semaphore_is_put_in_words():
    assert utils.pretty_print_semaphore(None) == "None"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(2)) == "Semaphore(value=2, locked=False)"
    assert utils.pretty_print_semaphore(asyncio.Semaphore(0)) == "Semaphore(value=0, locked=True)"


def test_what_is_printed_goes_to_the_logger_line_by_line(caplog, monkeypatch):
    stream = StreamToLogger(logging.getLogger("llava.test_stream"), logging.WARNING)
    monkeypatch.setattr(sys, "stdout", stream)
    with caplog.at_level(logging.INFO):
        print("one")
        print("two", end="  \nthr")
        assert [record.getMessage() for record in caplog.records] == ["one", "two"]
        print("ee", end="")
        stream.flush()
        stream.flush()
    assert [record.getMessage() for record in caplog.records] == ["one", "two", "three"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert stream.isatty() == stream.terminal.isatty()


def test_no_text_is_sent_to_a_moderation_service():
    with pytest.raises(UserError, match="not sent.*--moderate"):
        utils.violates_moderation("a patient's question")


def test_without_a_temporary_folder_python_says_where_it_looked(capsys):
    def main():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    with pytest.raises(SystemExit):
        run_cli(main)
    assert capsys.readouterr().err == (
        "error: No usable temporary directory found in ['/tmp', '/var/tmp']; "
        "set TMPDIR to a folder with room that you may write to\n"
    )
