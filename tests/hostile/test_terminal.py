"""A terminal that is not UTF-8 loses no answer."""

from __future__ import annotations

import io
import sys

import pytest

from llava.utils import UserError, run_cli


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_the_terminal_lacks_is_written_as_escapes(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        print("the answer … 肺")
        raise UserError("no row … 肺")

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    for stream, said in ((out, "the answer"), (err, "error: no row")):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert said in text and "\\u80ba" in text
    assert ended.value.code == 2
