"""The examples of ``docs/extending.md``, taken from the page word for word and run with the real commands."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_world import TASKS, arguments, fit, merge, run_main, same

import fusion
from llava.continual.sequence import load_sequence
from llava.data.answers import read_answers
from llava.data.metric_names import METRICS
from llava.data.raw import RAW
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval import accuracy_matrix, eval_video_qa, model_vqa_loader
from llava.registry import PLUGINS
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder whose plug-ins are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PLUGINS, raising=False)
    for registry in registries():
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    return tmp_path


def registries():
    from llava.continual.methods import METHODS
    from llava.slots.routers import ROUTERS

    return METHODS, ROUTERS, RAW, METRICS


def write_example(place, monkeypatch, name) -> Path:
    """Write an example of the page, with ``plugins`` named as the page says."""
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EXAMPLES[name], encoding="utf-8")
    if path.suffix == ".py":
        monkeypatch.setenv(PLUGINS, "plugins")
    return path


def test_the_page_has_one_example_of_each_kind():
    names = ["plugins/stay_near.py", "joints.json", "plugins/nearest_mean.py", "plugins/knees.py", "plugins/hedging.py"]
    assert list(EXAMPLES) == names
    assert len(re.findall(r"^```(?:python|json)$", PAGE, re.M)) == len(EXAMPLES)


# -- a method --------------------------------------------------------------------------------------------------------


def offsets(stage) -> list[torch.Tensor]:
    from llava.slots.pool import Pool

    (task,) = Pool.read(stage / "slots.pth").tasks
    return [tensor for kind in (task.A, task.B) for tensor in kind.values()]


@pytest.mark.slow
def test_a_method_from_a_plugin_trains(world, place, monkeypatch):
    """With weight 0 it is ``sequential``, bit for bit; with much weight the second task moves the adapter little."""
    first, near, free, plain = (place / f"llava-{name}" for name in ("first", "near", "free", "plain"))
    world.train("abd", first, None, "--method", "sequential")
    world.train("chest", plain, first, "--method", "sequential")
    write_example(place, monkeypatch, "plugins/stay_near.py")
    world.train("chest", free, first, "--method", "stay_near", "--stay_near", "0")
    world.train("chest", near, first, "--method", "stay_near", "--stay_near", "1e4")
    assert same(offsets(free), offsets(plain))

    def moved(stage):
        pairs = zip(offsets(stage), offsets(first), strict=True)
        return sum(float((now - before).square().sum()) for now, before in pairs)

    assert 0 < moved(near) < moved(free) / 2


@pytest.mark.slow
def test_a_methods_options_are_part_of_what_a_stage_is(world, place, monkeypatch, capsys):
    write_example(place, monkeypatch, "plugins/stay_near.py")
    stage = place / "llava-stage"
    world.train("abd", stage, None, "--method", "stay_near")
    capsys.readouterr()
    world.train("abd", stage, None, "--method", "stay_near")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="stay_near"):
        world.train("abd", stage, None, "--method", "stay_near", "--stay_near", "3")


def test_a_method_is_unknown_without_its_plugin(world, place):
    with pytest.raises(UserError, match="unknown method 'stay_near'; known: .*sequential"):
        world.train("abd", place / "llava-stage", None, "--method", "stay_near")


# -- a task sequence -------------------------------------------------------------------------------------------------


def write_joints(world, place) -> None:
    """The data that ``joints.json`` names, from the tiny world's."""
    rows = read_rows(world.folder / "test.jsonl")
    (place / "data").mkdir()
    shutil.copytree(world.folder / "images", place / "data" / "images")
    for task in ("knee", "chest"):
        shutil.copy(world.folder / f"train_{task}.jsonl", place / "data")
    write_jsonl(place / "data" / "test_joints.jsonl", [row.raw for row in rows if row.domain in ("knee", "chest")])


@pytest.mark.slow
def test_a_task_sequence_is_learnt_and_answered(world, place, monkeypatch):
    write_joints(world, place)
    sequence = write_example(place, monkeypatch, "joints.json")
    assert load_sequence(sequence).task_names == ["knee", "chest"]
    stage = learn(world, place, sequence)
    words = ["--model-path", stage, "--model-base", world.base, "--question-file", "data/test_joints.jsonl"]
    words += ["--image-folder", "data/images", "--answers-file", "output/answers.jsonl", "--device", "cpu"]
    run_main(model_vqa_loader.main, *words, "--max_new_tokens", 2)
    answers = read_answers(place / "output" / "answers.jsonl")
    assert len(answers) == 6
    assert {name for answer in answers for name in answer["metadata"]["route"]["task_posterior"]} == {"knee", "chest"}


def learn(world, place, sequence) -> Path:
    """Keys and stages of both tasks; returns the last stage's folder."""
    from llava.train.train import train

    for task in ("knee", "chest"):
        fit(place, world.base, sequence, task)
    words = [
        "--model_name_or_path",
        world.base,
        "--sequence",
        sequence,
        "--retriever_state_dict",
        merge(place, sequence),
    ]
    words += ["--use_cpu", "True", "--max_steps", 2, "--save_strategy", "no", "--report_to", "none"]
    first, both = place / "llava-joints_knee", place / "llava-joints_knee_chest"
    with arguments([*words, "--task", "knee", "--output_dir", first]):
        train()
    with arguments([*words, "--task", "chest", "--output_dir", both, "--previous_stage", first]):
        train()
    return both


# -- a router --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_router_from_a_plugin_routes(world, place, monkeypatch):
    """Fitted under its name, read back under it, and it sends questions to the nearest task."""
    from llava.slots.pool import Pool
    from llava.slots.queries import Query
    from llava.slots.routers import build_router

    write_example(place, monkeypatch, "plugins/nearest_mean.py")
    sequence = world.sequence
    for task in TASKS:
        fit(place, world.base, sequence, task, "--router", "nearest_mean")
    pool = Pool.read(merge(place, sequence))
    assert pool.settings.router == "nearest_mean"
    generator = torch.Generator().manual_seed(0)
    sizes = (pool.settings.text_dim, pool.settings.image_dim)
    query = Query(*(torch.randn(20, size, generator=generator) for size in sizes))
    means = torch.stack([task.statistics.mean for task in pool.tasks]).double()  # [tasks, dim]
    router = build_router(pool.settings.router, pool.settings, pool.tasks)
    nearest = torch.cdist(query.joint(), means).argmin(1)
    assert len(nearest.unique()) > 1
    assert torch.equal(router.choose(query, 1).posterior.argmax(1), nearest)


@pytest.mark.slow
def test_evaluation_takes_a_router_from_a_plugin(world, place, monkeypatch):
    write_example(place, monkeypatch, "plugins/nearest_mean.py")
    stage = place / "llava-tiny_abd"
    world.train("abd", stage)
    words = ["--model-path", stage, "--model-base", world.base, "--question-file", world.folder / "test.jsonl"]
    words += ["--image-folder", world.folder / "images", "--device", "cpu", "--max_new_tokens", 2]
    run_main(model_vqa_loader.main, *words, "--answers-file", "answers.jsonl", "--route", "nearest_mean")
    assert all("route" in answer["metadata"] for answer in read_answers(place / "answers.jsonl"))
    with pytest.raises(UserError, match="nearest_meen"):
        run_main(model_vqa_loader.main, *words, "--answers-file", "more.jsonl", "--route", "nearest_meen")


# -- a raw data set --------------------------------------------------------------------------------------------------


def write_knees(folder: Path) -> None:
    rows = [
        {"number": n, "film": f"k{n}.png", "knee_side": ("left", "right")[n % 2], "held_out": n > 5}
        | {"question": "Is  there a fracture?", "finding": ("yes", "no")[n // 2 % 2]}
        for n in range(8)
    ]
    (folder / "images").mkdir(parents=True)
    for row in rows:
        Image.new("L", (4, 4), row["number"]).save(folder / "images" / row["film"])
    (folder / "knees.json").write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize("how", [["--dataset", "knees"], ["--data_dir", "data/knees"], []])
def test_a_raw_data_set_from_a_plugin_is_found_and_written(place, monkeypatch, capsys, how):
    monkeypatch.delenv("VQA_RAD_DIR", raising=False)
    monkeypatch.delenv("SLAKE_DIR", raising=False)
    write_example(place, monkeypatch, "plugins/knees.py")
    write_knees(place / "data" / "knees")
    assert fusion.main(how) == 0
    counts = {path.name: len(read_rows(path, require_answer=True)) for path in (place / "data").glob("*.jsonl")}
    assert counts == {
        "knees_train_combined.jsonl": 6,
        "knees_train_left.jsonl": 3,
        "knees_train_right.jsonl": 3,
        "knees_test.jsonl": 2,
    }
    first = read_rows(place / "data" / "knees_train_left.jsonl")[0]
    assert (first.image, first.domain, first.question) == ("k0.png", "left", "Is there a fracture?")
    report = json.loads((place / "data" / "knees_fusion_report.json").read_text(encoding="utf-8"))
    assert report["dataset"] == "knees" and len(report["inputs"]) == 1
    assert "knees from data/knees/knees.json" in capsys.readouterr().out


def test_what_a_plugin_data_set_wants_is_said(place, monkeypatch):
    write_example(place, monkeypatch, "plugins/knees.py")
    with pytest.raises(UserError, match="^no the knees input found: place knees.json and images/ in data/knees"):
        fusion.main(["--dataset", "knees"])
    monkeypatch.setenv("KNEES_DIR", "nowhere")
    with pytest.raises(UserError, match="KNEES_DIR names no folder: nowhere"):
        fusion.main(["--dataset", "knees"])
    (place / "rows.json").write_text('[{"left": 1}]')
    with pytest.raises(
        UserError, match=r"neither VQA-RAD .* nor SLAKE .* nor the knees \(film, knee_side\) rows: left"
    ):
        fusion.main(["--data_dir", "rows.json"])
    with pytest.raises(UserError, match="choose from auto, vqa-rad, vqa-rad-csv, slake, knees"):
        fusion.main(["--dataset", "hips"])


# -- a metric --------------------------------------------------------------------------------------------------------

ANSWERED = [("left", "probably left"), ("right", "left"), ("yes", "Maybe yes"), ("no", "likely")]


def write_answered(place) -> list[str]:
    """Two open and two closed questions with answers; the command line that scores them."""
    rows = [
        question_row(number, f"{number}.jpg", "where?", right, ("knee", "hip")[number % 2], ("knee", "hip"))
        for number, (right, _) in enumerate(ANSWERED)
    ]
    write_jsonl(place / "questions.jsonl", rows)
    answers = [{"question_id": n, "text": text, "model_id": "llava-a"} for n, (_, text) in enumerate(ANSWERED)]
    write_jsonl(place / "answers.jsonl", answers)
    return ["--question-file", "questions.jsonl", "--answers-file", "answers.jsonl", "--no-java", "--draws", "20"]


def test_a_metric_from_a_plugin_is_scored(place, monkeypatch, capsys):
    """In ``scores.json``, in the row values and in the table; scores made without it are made anew."""
    words = write_answered(place)
    eval_video_qa.main(words)
    before = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    plugin = write_example(place, monkeypatch, "plugins/hedging.py")
    capsys.readouterr()
    eval_video_qa.main(words)
    printed = capsys.readouterr().out
    after = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    groups = after["groups"]
    assert {name: groups[name]["figures"]["hedging"]["value"] for name in groups} == {
        "overall": 0.5,
        "knee": 1.0,
        "hip": 0.0,
    }
    assert groups["overall"]["figures"]["hedging"]["formula"].startswith("mean over open rows of [the prediction holds")
    assert list(groups["overall"]["figures"])[-1] == "hedging"
    assert re.search(r"^answer_words .*\nhedging  .*0\.500", printed, re.M)
    rows = [json.loads(line)["scores"].get("hedging") for line in (place / "rows.jsonl").read_text().splitlines()]
    assert rows == [1.0, 0.0, None, None]
    for group in groups.values():
        del group["figures"]["hedging"]
    assert groups == before["groups"]
    eval_video_qa.main(words)
    assert "up to date" in capsys.readouterr().out
    plugin.write_text(EXAMPLES["plugins/hedging.py"].replace('"likely", ', ""), encoding="utf-8")
    eval_video_qa.main(words)
    assert "up to date" not in capsys.readouterr().out


def test_a_metric_from_a_plugin_is_in_the_accuracy_matrix_of_a_sequence_that_names_it(place, monkeypatch):
    words = write_answered(place)
    sequence = place / "own.json"
    values = {"name": "own", "test": "questions.jsonl", "image_folder": "images", "metrics": ["hedging", "exact_match"]}
    values["tasks"] = [{"name": name, "train": f"train_{name}.jsonl"} for name in ("knee", "hip")]
    sequence.write_text(json.dumps(values), encoding="utf-8")
    matrix = ["--sequence", str(sequence), "--output-dir", ".", "--scores", "scores.json", "scores.json"]
    eval_video_qa.main(words)
    with pytest.raises(UserError, match="hedging"):
        accuracy_matrix.main(matrix)
    write_example(place, monkeypatch, "plugins/hedging.py")
    with pytest.raises(UserError, match="scores.json: no figure for metric 'hedging'; score the answers again"):
        accuracy_matrix.main(matrix)
    eval_video_qa.main(words)
    accuracy_matrix.main(matrix)
    found = json.loads((place / "accuracy_matrix.json").read_text(encoding="utf-8"))["metrics"]
    assert list(found) == ["hedging", "exact_match"]
    assert found["hedging"]["matrix"] == [[1.0, 0.0], [1.0, 0.0]]


def test_a_reader_finds_every_kind_of_plugin_in_one_folder(place, monkeypatch):
    """All four files at once, as the page has them."""
    for name in EXAMPLES:
        write_example(place, monkeypatch, name)
    names = [set(registry.names()) for registry in registries()]
    for own, known in zip(("stay_near", "nearest_mean", "knees", "hedging"), names, strict=True):
        assert own in known
    assert not any(name.startswith("plugins.") for name in sys.modules)
