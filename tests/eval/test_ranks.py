"""Processes of a launcher that work in step: what one cannot do stops all."""

import pytest
from tiny_runs import in_processes

from llava.eval.ranks import Ranks
from llava.utils import UserError


def test_what_one_process_cannot_do_stops_all(tmp_path):
    def task():
        ranks, done = Ranks.here(), []
        with ranks.together() as in_step:
            in_step(lambda: done.append("checked"))
            message = "no such file" if ranks.number else "process 1: no such file"
            with pytest.raises(UserError, match=f"^{message}$"):
                in_step(refuse if ranks.number else lambda: done.append("worked"))
        (tmp_path / str(ranks.number)).write_text(" ".join(done))

    def refuse():
        raise UserError("no such file")

    assert in_processes(2, task) == [0, 0]
    assert [(tmp_path / name).read_text() for name in "01"] == ["checked worked", "checked"]


def test_without_a_place_to_meet_nothing_waits(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert (Ranks.here().number, Ranks.here().count) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2 and MASTER_ADDR is not set"), Ranks.here().together():
        pass
