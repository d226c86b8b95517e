"""Runs that differ in their seed: mean, deviation and interval by hand, the command, the refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from llava.eval import over_seeds
from llava.utils import UserError


def write(folder, value, summary=True, tasks=("abd", "chest"), questions="0" * 64):
    """A matrix whose figures are all ``value``."""
    found = {
        "tasks": list(tasks),
        "provenance": {"question_file": {"sha256": questions}},
        "metrics": {
            "exact_match": {
                "matrix": [[value] * len(tasks)] * len(tasks),
                "learning_curve": {"value": [value] * len(tasks), "ci95": None},
                "summary": {"bwt": {"value": value}, "fwt": {"value": None}} if summary else None,
            }
        },
    }
    folder.mkdir()
    (folder / "accuracy_matrix.json").write_text(json.dumps(found))
    return str(folder)


def test_by_hand(tmp_path, capsys):
    folders = [write(tmp_path / str(n), value) for n, value in enumerate((0.5, 0.6, 0.7))]
    over_seeds.main([*folders, "--output-json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["runs"] == 3 and len(result["provenance"]) == 3
    exact = result["metrics"]["exact_match"]
    half = 4.303 * 0.1 / 3**0.5
    assert list(exact["summary"]) == ["bwt"]  # fwt is defined in no run
    for cell in (exact["summary"]["bwt"], exact["matrix"][1][0], exact["learning_curve"][1]):
        assert (cell["mean"], cell["sd"]) == (pytest.approx(0.6), pytest.approx(0.1))
        assert cell["ci95"] == pytest.approx([0.6 - half, 0.6 + half], abs=1e-3)
        assert cell["values"] == [0.5, 0.6, 0.7]
    printed = capsys.readouterr().out
    assert "3 runs" in printed
    line = next(line for line in printed.splitlines() if line.strip().startswith("BWT"))
    assert line.split() == ["BWT", "0.600", "0.100", "[0.352,", "0.848]"]


def test_one_run_has_a_mean_alone(tmp_path):
    cell = over_seeds.spread([0.5])
    assert cell == {"mean": 0.5, "sd": None, "ci95": None, "values": [0.5]}
    over_seeds.main([write(tmp_path / "a", 0.5)])


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    cells = [over_seeds.spread(values) for values in draws]
    held = np.mean([low <= 0 <= high for low, high in (cell["ci95"] for cell in cells)])
    assert held == pytest.approx(0.95, abs=0.015)
    assert np.isfinite(over_seeds.spread(draws[:, 0])["sd"])  # more runs than the table has


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    first = write(tmp_path / "a", 0.5)
    cases = [
        (write(tmp_path / "b", 0.5, tasks=("abd", "head")), "differ in tasks: abd, chest and abd, head"),
        (write(tmp_path / "c", 0.5, questions="1" * 64), "differ in questions"),
        (str(tmp_path / "absent"), "accuracy matrix not found"),
    ]
    for name, metrics, message in (
        ("d", None, "field 'metrics' is missing; .*not an accuracy matrix of this version"),
        ("e", {"bleu_1": {"matrix": [[0.5]], "learning_curve": {}, "summary": {}}}, "bleu_1: matrix is .*a list of 2"),
    ):
        found = json.loads(Path(write(tmp_path / name, 0.5), "accuracy_matrix.json").read_text())
        (tmp_path / name / "accuracy_matrix.json").write_text(json.dumps({**found, "metrics": metrics}))
        cases.append((str(tmp_path / name), message))
    for other, message in cases:
        with pytest.raises(UserError, match=message):
            over_seeds.main([first, other])


def test_a_metric_that_one_run_lacks_is_left_out(tmp_path):
    folders = [write(tmp_path / "a", 0.5), write(tmp_path / "b", 0.5, summary=False)]
    assert over_seeds.over_seeds([over_seeds.read_matrix(folder) for folder in folders])["metrics"] == {}
