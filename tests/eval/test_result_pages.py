"""Tables in Markdown pages, made from result files: by hand, renewed in a page, and what their caption must say."""

import json

import pytest
from tiny_world import run_main

from llava.eval import result_pages
from llava.utils import UserError


def run(name, average, method=None, order=("abd", "head"), given=False, gaps=None, sd=None, rates=None):
    cell = {"mean": average, "sd": sd, "ci95": None}
    gaps = {name: {"mean": value, "sd": sd, "ci95": None} for name, value in (gaps or {}).items()}
    return {
        "run": name,
        "method": method or name,
        "order": list(order),
        "seeds": [0] if sd is None else [0, 1, 2],
        "task_given": given,
        "rates": rates or {},
        "final": {"abd": average, "head": average},
        "summary": {"average_final": cell, "forgetting": {"mean": 0.0, "sd": sd, "ci95": None}},
        "gaps": gaps,
        "pictures": {},
    }


def result(*runs, done=4, **more):
    values = {"format_version": 1, "benchmark": "phantom", "command": "bash scripts/run_benchmark.sh phantom.json"}
    values |= {"machine": "two cores", "cells": 4, "done": done, "metric": "exact_match", "tasks": ["abd", "head"]}
    return {**values, "baselines": {"majority answer": {"abd": 0.2, "head": 0.25}}, "runs": list(runs), **more}


def test_a_table_by_hand():
    found = result(
        run("retrieval", 0.6, gaps={"joint": -0.05, "task_given": 0.001}, sd=0.012),
        run("given", 0.61, "retrieval", given=True),
        run("sequential", 0.35, gaps={"joint": 0.2}, rates={"0.001": 0.25, "0.01": 0.333}),
        run("joint", 0.55),
    )
    assert result_pages.markdown(found).split("\n") == [
        "",
        "exact_match; `bash scripts/run_benchmark.sh phantom.json` on two cores. Learning rate of sequential by "
        "validation rows: .250 at 0.001, .333 at 0.01. No baseline or other method that is not told the task is above "
        "retrieval (.600).",
        "",
        "| run | order | seeds | abd | head | average | forgetting | BWT | FWT | gap to joint | gap to task given |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| majority answer |  |  | .200 | .250 | .225 |  |  |  |  |  |",
        "| **retrieval** | abd, head | 3 | .600 | .600 | .600 ± .012 | .000 ± .012 |  |  | -.050 ± .012 "
        "| +.001 ± .012 |",
        "| given (task given) | abd, head | 1 | .610 | .610 | .610 | .000 |  |  |  |  |",
        "| sequential | abd, head | 1 | .350 | .350 | .350 | .000 |  |  | +.200 |  |",
        "| joint | abd, head | 1 | .550 | .550 | .550 | .000 |  |  |  |  |",
        "",
        "",
    ]


def test_what_the_pictures_contribute_is_a_table_of_its_own():
    whole, fewer = run("retrieval", 0.6), run("joint", 0.5)
    cell = {"mean": 0.25, "sd": None, "ci95": [0.2, 0.31]}
    whole["pictures"] = {"blank": {"changed": cell, "drop": {**cell, "mean": -0.01}}, "shuffled": {"changed": cell}}
    fewer["pictures"] = {"blank": {"changed": {**cell, "ci95": None}, "drop": cell}}
    *_, head, _, first, second, _, _ = result_pages.markdown(result(whole, fewer, run("ewc", 0.4))).split("\n")
    assert head.startswith("| run | order | answers that change, blank | drop, blank | answers that change, shuffled |")
    assert first == "| retrieval | abd, head | .250 [.200, .310] | -.010 [.200, .310] | .250 [.200, .310] |  |"
    assert second == "| joint | abd, head | .250 | .250 [.200, .310] |  |  |"


def test_figures_over_all_questions_stand_behind_the_average():
    one, other = run("retrieval", 0.6, sd=0.02), run("joint", 0.5)
    one["overall"] = {"exact_match": {"mean": 0.61, "sd": 0.01, "ci95": None}}
    one["overall"]["open_recall"] = {"mean": 0.25, "sd": None, "ci95": None}
    _, _, _, head, _, baseline, first, second, _, _ = result_pages.markdown(result(one, other)).split("\n")
    assert "| average | overall | open_recall | forgetting |" in head
    assert "| .225 |  |  |  |" in baseline and "| .600 ± .020 | .610 ± .010 | .250 | .000 ± .020 |" in first
    assert "| .500 |  |  | .000 |" in second


def test_the_caption_says_where_a_simple_baseline_wins():
    runs = [run("retrieval", 0.3), run("joint", 0.9), run("individual", 0.8, given=True), run("ewc", 0.4)]
    runs += [run("tuned", 0.5, "sequential"), run("replay", 0.6, order=("head", "abd")), run("lwf", 0.2)]
    best = {"nearest question's answer": {"abd": 0.3, "head": 0.4}}
    said = result_pages.caption(result(*runs, done=3, baselines=best))
    assert said.endswith(
        "3 of 4 cells are done. Above retrieval (.300): nearest question's answer (.350, a simple baseline); "
        "ewc (.400); tuned (.500, a simple baseline)."
    )
    assert result_pages.verdict(result(run("joint", 0.9))) == []
    assert result_pages.caption(result(done=0, metric="")).startswith("`bash scripts/run_benchmark.sh phantom.json` on")


@pytest.mark.parametrize("value, text", [(0.5, ".500"), (-0.0125, "-.013"), (1.0, "1.000"), (10.53, "10.530")])
def test_scores_have_no_zero_in_front(value, text):
    assert result_pages.score(value) == text


def test_pages_are_renewed_and_left_alone(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    file, page = tmp_path / "results" / "phantom.json", tmp_path / "page.md"
    file.write_text(json.dumps(result(run("retrieval", 0.6))))
    page.write_text("before\n<!-- results: results/phantom.json -->\nstale\n<!-- end of results -->\nbehind\n")
    run_main(result_pages.main, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- results: results/phantom.json -->\n\nexact_match") and "stale" not in text
    assert text.endswith("| .000 |  |  |\n\n<!-- end of results -->\nbehind\n")
    run_main(result_pages.main, page)
    assert page.read_text() == text
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["renewed", "as it should be"]


def test_what_is_wrong_with_a_page_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not end; write <!-- end of results -->"):
        result_pages.renewed("<!-- results: a.json -->\n", tmp_path)
    whole = "<!-- results: a.json -->\n<!-- end of results -->\n"
    with pytest.raises(UserError, match="write it with: python -m llava.eval.benchmark_table"):
        result_pages.renewed(whole, tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="no result of version 1"):
        result_pages.renewed(whole, tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found.pop("tasks"), "a.json: field 'tasks' is missing"),
        (lambda found: found.update(done="all"), "a.json: done is 'all'; write an integer"),
        (lambda found: found["baselines"]["majority answer"].pop("head"), "majority answer: field 'head' is missing"),
        (lambda found: found["runs"].append("joint"), "a.json: runs, entry 2 is 'joint'"),
        (lambda found: found["runs"][0].pop("seeds"), "run 1: field 'seeds' is missing"),
        (lambda found: found["runs"][0]["final"].update(head=None), "run 1: final"),
        (lambda found: found["runs"][0].update(summary={}), "run 1: summary: field 'average_final' is missing"),
        (lambda found: found["runs"][0].update(gaps={"joint": 0.1}), "run 1: gaps is an object"),
        (lambda found: found["runs"][0].update(pictures={"blank": 3}), "run 1: pictures is an object"),
    ],
)
def test_a_damaged_result_is_one_line(tmp_path, change, message):
    file = tmp_path / "a.json"
    found = result(run("retrieval", 0.6))
    file.write_text(json.dumps(found))
    assert result_pages.read_result(file) == found
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=message):
        result_pages.read_result(file)
    file.write_text(json.dumps(found)[:-9])
    with pytest.raises(UserError, match="broken JSON"):
        result_pages.read_result(file)
