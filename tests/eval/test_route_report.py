"""The route report: its figures by hand values, and the command on a tiny world."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_world import TASKS, make_world, run_main

from llava.data.rows import write_jsonl
from llava.eval import route_picture
from llava.eval.route_picture import principal_plane
from llava.eval.route_report import main
from llava.eval.route_scores import (
    RoutedRows,
    auroc,
    expected_calibration_error,
    score_routes,
    wilson,
    worst_mistakes,
)
from llava.utils import UserError


def routes():
    """Two tasks of two slots; rows: abd right, abd wrong (sure), chest right, chest wrong (unsure), spine."""
    return RoutedRows(
        tasks=["abd", "chest"],
        domains=["abd", "abd", "chest", "chest", "spine"],
        posterior=np.array([[0.9, 0.1], [0.05, 0.95], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]),
        novelty=np.array([0.2, 0.9, 0.3, 1.2, 1.5]),
        slots=np.array([[0, 1], [2, 3], [2, 3], [0, 2], [0, 1]]),
        slot_tasks=["abd", "abd", "chest", "chest"],
    )


def test_wilson_interval_by_hand():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 10)[0] == 0.0
    assert wilson(0, 0) == (None, None)


def test_calibration_error_by_hand():
    confidence, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False])
    assert expected_calibration_error(confidence, right) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert expected_calibration_error(np.ones(3), np.ones(3, dtype=bool)) == 0
    assert expected_calibration_error(np.zeros(0), np.zeros(0, dtype=bool)) is None


def test_auroc_by_hand():
    assert auroc([0.1, 0.2], [0.3, 0.4]) == 1.0
    assert auroc([0.1, 0.3], [0.3, 0.2]) == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert auroc([0.1], []) is None


def test_scores_count_each_row_once_and_keep_unknown_domains_apart():
    scores = score_routes(routes())
    assert scores["accuracy"] | {"interval": None} == {"value": 0.5, "right": 2, "n": 4, "interval": None}
    assert scores["per_domain"]["abd"]["right"] == 1 and scores["per_domain"]["chest"]["right"] == 1
    assert scores["confusion"] == {
        "abd": {"abd": 1, "chest": 1},
        "chest": {"abd": 1, "chest": 1},
        "spine": {"abd": 1, "chest": 0},
    }
    novelty = scores["novelty"]
    assert novelty["rejected_known"]["right"] == 1 and novelty["detected_unknown"]["value"] == 1.0
    assert novelty["auroc"] == 1.0
    assert set(novelty["rejected"]) == {"abd", "chest", "spine"}


def test_slot_use_counts_a_tasks_own_questions():
    use = score_routes(routes())["slots"]["chest"]  # its rows select slots 2, 3 and 0, 2
    share = np.array([2, 1]) / 3
    assert (use["used"], use["slots"]) == (2, 2)
    assert use["entropy"] == pytest.approx(-(share * np.log(share)).sum() / math.log(2))


def test_mistakes_come_the_most_confident_first():
    assert worst_mistakes(routes(), 5) == [1, 3]
    assert worst_mistakes(routes(), 1) == [1]


def test_the_plane_holds_the_two_widest_directions():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(200, 5)) * [1, 9, 1, 4, 1] + 3
    mean, plane = principal_plane(points)
    assert abs(plane[1, 0]) > 0.99 and abs(plane[3, 1]) > 0.98
    assert plane[1, 0] > 0 and np.allclose(mean, points.mean(0))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def report(world, output, *more):
    questions = json.loads(world.sequence.read_text())["test"]
    arguments = ["--slots", world.keys, "--question-file", questions, "--image-folder", world.folder / "images"]
    run_main(main, *arguments, "--output_dir", output, "--cache_dir", world.folder / "cache", *more)
    return json.loads((output / "route_report.json").read_text(), parse_constant=pytest.fail)  # no NaN


def test_the_command_reports_every_router(world, tmp_path, capsys):
    found = report(world, tmp_path / "route")
    assert list(found["routers"]) == ["gaussian", "keys", "ridge"]
    for scores in found["routers"].values():
        assert set(scores["per_domain"]) == set(TASKS)
        low, high = scores["accuracy"]["interval"]
        assert low <= scores["accuracy"]["value"] <= high
    shown = capsys.readouterr().out
    assert "true domain by row" in shown and "counted as unknown" in shown
    assert (tmp_path / "route" / "route_report.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_name_their_picture_and_question(world, tmp_path, capsys):
    found = report(world, tmp_path / "route", "--routers", "random", "--mistakes", 3)
    assert 0 < len(found["mistakes"]) <= 3
    shown = capsys.readouterr().out
    for mistake in found["mistakes"]:
        assert mistake["domain"] != mistake["routed_to"]
        assert f"{mistake['image']}  {mistake['question']}" in shown
    assert found["routers"]["random"]["novelty"] is None


def test_rows_of_other_domains_measure_unknown_inputs(world, tmp_path):
    from llava.slots.edit import read_place, remove

    remove(read_place(world.keys), list(TASKS[2:])).write(tmp_path / "two.pth")
    found = report(world, tmp_path / "route", "--slots", tmp_path / "two.pth")
    novelty = found["routers"]["gaussian"]["novelty"]
    assert novelty["detected_unknown"]["n"] > 0 and 0 <= novelty["auroc"] <= 1
    assert set(found["routers"]["gaussian"]["confusion"]) == set(TASKS)


def test_rows_of_no_or_several_domains_are_left_out_and_it_is_said(world, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(json.loads(world.sequence.read_text())["test"]).read_text().splitlines()]
    whole = report(world, tmp_path / "whole", "--routers", "keys")["routers"]["keys"]["accuracy"]["n"]
    rows[0]["domain"] = dict.fromkeys(TASKS, True)
    rows[1]["domain"] = dict.fromkeys(TASKS, False)
    write_jsonl(tmp_path / "q.jsonl", rows)
    capsys.readouterr()
    found = report(world, tmp_path / "route", "--question-file", tmp_path / "q.jsonl", "--routers", "keys")
    assert found["routers"]["keys"]["accuracy"]["n"] == whole - 2
    assert f"2 of {len(rows)} rows have no domain, or several: left out" in capsys.readouterr().out
    write_jsonl(tmp_path / "q.jsonl", rows[:2])
    with pytest.raises(UserError, match="no row has one domain"):
        report(world, tmp_path / "route", "--question-file", tmp_path / "q.jsonl")


def test_without_matplotlib_the_figures_are_still_written(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(route_picture, "draw", lambda *words: False)
    report(world, tmp_path / "route")
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out


def test_bad_input_is_refused_by_name(world, tmp_path):
    with pytest.raises(UserError, match="unknown router 'compass'; known: batch_vote, gaussian, keys"):
        report(world, tmp_path / "route", "--routers", "compass")
    with pytest.raises(UserError, match="no row's domain is a task"):
        from llava.slots.edit import read_place, remove, rename

        rename(remove(read_place(world.keys), list(TASKS[1:])), "abd", "belly").write(tmp_path / "n.pth")
        report(world, tmp_path / "route", "--slots", tmp_path / "n.pth")
