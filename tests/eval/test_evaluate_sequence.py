"""Evaluating a task sequence in this process: one load, the same bytes after a kill, late faults found early."""

import json
import os
import re

import numpy as np
import pytest
import torch
from tiny_llava import write_base, write_images, write_stage
from tiny_runs import held_by_another, in_processes

from llava.data.rows import question_row, write_jsonl
from llava.eval import answer_chunk, answerer, evaluate_sequence, loaded, model_vqa_loader, text_metrics
from llava.eval.metrics import normalise
from llava.utils import UserError

TASKS = ("abd", "chest")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    base = write_base(folder / "tiny-base")
    write_stage(folder / "output" / "llava-tiny_abd", base, TASKS[:1])
    write_stage(folder / "output" / "llava-tiny_abd_chest", base, TASKS)
    write_images(folder / "images", [f"{number}.png" for number in range(4)])
    rows = [question_row(n, f"{n % 4}.png", f"is there {n}?", "yes", TASKS[n % 2], TASKS) for n in range(11)]
    write_jsonl(folder / "test.jsonl", rows)
    write_sequence(folder)
    return folder


def write_sequence(folder, name="tiny", **changes):
    values = {
        "name": "tiny",
        "tasks": [{"name": task, "train": str(folder / "test.jsonl")} for task in TASKS],
        "test": str(folder / "test.jsonl"),
        "image_folder": str(folder / "images"),
        "metrics": ["exact_match"],
        **changes,
    }
    (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / f"{name}.json"


@pytest.fixture
def evaluate(place, tmp_path, monkeypatch):
    """The command; its results go to a folder of the test's own, whose stages are the shared ones."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(text_metrics, "find_java", lambda: None)
    for stage in ("llava-tiny_abd", "llava-tiny_abd_chest"):
        os.symlink(place / "output" / stage, tmp_path / stage)

    def run(*more, sequence=None):
        words = ["--sequence", sequence or place / "tiny.json", "--base_model", place / "tiny-base"]
        words += ["--output_dir", tmp_path, "--max_new_tokens", 3, "--batch_size", 2, *more]
        evaluate_sequence.main([str(word) for word in words])
        return tmp_path / "eval" / "tiny"

    return run


def test_a_second_evaluation_into_one_folder_is_told_who_holds_it_and_takes_it_over_from_the_dead(evaluate, tmp_path):
    with held_by_another(tmp_path / "eval" / "tiny") as (child, kill):
        with pytest.raises(UserError, match=rf"tiny is being written by process {child} on \S+; wait until"):
            evaluate()
        kill()
        assert [path.name for path in (tmp_path / "eval").iterdir()] == [".tiny.lock"]  # as it was left
        assert (evaluate("--zero_shot", 0) / "accuracy_matrix.json").is_file()
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["tiny"]


@pytest.fixture
def loads(monkeypatch):
    """Every model that is loaded."""
    made, load = [], loaded.load_pretrained_model
    monkeypatch.setattr(loaded, "load_pretrained_model", lambda *a, **k: made.append(a[0]) or load(*a, **k))
    return made


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json*")}


def test_one_load_answers_with_the_base_and_every_stage(place, evaluate, loads, tmp_path):
    folder = evaluate("--chunks", 2)
    assert loads == [str(place / "tiny-base")]
    assert len(list((tmp_path / "cache" / "queries").rglob("*.safetensors"))) == 4  # of four pictures
    names = ["zero-shot", "llava-tiny_abd", "llava-tiny_abd_chest"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(names)
    for name in names:
        assert sorted(path.name for path in (folder / name / "chunks").iterdir()) == ["2_0.jsonl", "2_1.jsonl"]
        words = ["--model-path", tmp_path / name, "--model-base", place / "tiny-base"]
        words = ["--model-path", place / "tiny-base"] if name == "zero-shot" else words
        words += ["--question-file", place / "test.jsonl", "--image-folder", place / "images", "--max_new_tokens", 3]
        words += ["--batch-size", 2, "--answers-file", tmp_path / f"{name}.jsonl"]
        model_vqa_loader.main([str(word) for word in words])  # a fresh load, for this model alone

        def told(path):
            answers = [json.loads(line) for line in path.read_text().splitlines()]
            return [{**answer, "metadata": answer["metadata"].get("route")} for answer in answers]

        assert told(folder / name / "answers.jsonl") == told(tmp_path / f"{name}.jsonl")
    matrix = json.loads((folder / "accuracy_matrix.json").read_text())
    assert matrix["stages"] == names[1:] and matrix["zero_shot_model"] == "tiny-base"


def test_what_the_pictures_contribute(place, evaluate, loads, capsys, monkeypatch):
    looked, vision = [], answerer.QuestionCache._seen
    seen = staticmethod(lambda *parts: looked.append(parts[1]) or vision(*parts))
    monkeypatch.setattr(answerer.QuestionCache, "_seen", seen)
    folder = evaluate("--chunks", 2, "--pictures", "blank", "shuffled", "real", "--picture_seed", 3)
    assert len(loads) == 1 and len(looked) == 5  # four pictures and one blank, for all passes and models
    last = folder / "llava-tiny_abd_chest"
    assert not (folder / "llava-tiny_abd" / "blank").exists()
    told = {}
    for kind, part in (("real", last), ("blank", last / "blank"), ("shuffled", last / "shuffled")):
        answers = [json.loads(line) for line in (part / "answers.jsonl").read_text().splitlines()]
        told[kind] = [answer["text"] for answer in answers]
        assert [answer["metadata"].get("pictures", "real") for answer in answers] == [kind] * 11
        assert (part / "scores.json").is_file()
    pictures = json.loads((last / "scores.json").read_text())["pictures"]
    assert list(pictures) == ["blank", "shuffled"]
    for kind, found in pictures.items():
        overall = found["groups"]["overall"]
        pairs = zip(told["real"], told[kind], strict=True)
        changed = sum(normalise(one) != normalise(other) for one, other in pairs)
        assert changed and overall["changed"]["value"] == changed / 11
        drop = overall["figures"]["exact_match"]
        assert drop["drop"] == drop["real"] - drop["shown"] and len(drop["ci95"]) == 2
        assert set(found["groups"]) == {"overall", *TASKS}
    assert "pictures" in json.loads((folder / "zero-shot" / "scores.json").read_text())
    printed = capsys.readouterr().out
    assert "what the pictures contribute" not in printed
    assert [line.split(":")[0] for line in printed.splitlines() if " pictures: " in line] == [
        "blank pictures",
        "shuffled pictures",
    ]
    before = contents(folder)
    evaluate("--chunks", 2, "--pictures", "real", "blank", "shuffled", "--picture_seed", 3)
    assert contents(folder) == before and len(loads) == 1
    evaluate("--chunks", 2)  # without the passes the scores speak of the real pictures alone
    assert "pictures" not in json.loads((last / "scores.json").read_text())


def test_gaps_to_what_is_evaluated_already(place, evaluate, tmp_path):
    evaluate("--route", "oracle")
    for stage in ("llava-tiny_abd", "llava-tiny_abd_chest"):
        os.symlink(place / "output" / stage, tmp_path / stage.replace("tiny", "tiny-joint"))
    evaluate("--method", "joint")
    summary = json.loads((evaluate() / "accuracy_matrix.json").read_text())["metrics"]["exact_match"]["summary"]
    assert {"gap_to_joint", "gap_to_task_given"} <= set(summary) and "gap_to_individual" not in summary
    assert summary["gap_to_joint"] == {"value": 0.0, "ci95": [0.0, 0.0]}  # the very same stages


def test_repeating_changes_nothing_and_loads_nothing(evaluate, loads):
    before = contents(evaluate("--chunks", 2))
    loads.clear()
    assert contents(evaluate("--chunks", 2)) == before
    assert loads == []


def test_java_starts_before_what_answers_is_there_and_ends_with_the_evaluation(evaluate, loads, monkeypatch):
    """METEOR's tables take seconds to load; where everything is answered and scored nobody waits for them."""
    started = []

    class Meteor:
        ended = False

        def __init__(self, java):
            started.append(list(loads))
            self.asked = self.closed = 0

        def rows(self, references, predictions):
            self.asked += 1
            return np.ones((len(references), 23))

        def close(self):
            assert self.asked and not self.closed
            self.closed = 1

    monkeypatch.setattr(text_metrics, "find_java", lambda: "java")
    monkeypatch.setattr(text_metrics, "ptb_tokenize", lambda texts, java: list(texts))
    monkeypatch.setattr(text_metrics, "MeteorProcess", Meteor)
    looked = evaluate_sequence.visible_devices
    monkeypatch.setattr(evaluate_sequence, "visible_devices", lambda: started[0] or looked())  # imports torch
    folder = evaluate()
    assert started == [[]] and len(loads) == 1
    monkeypatch.setattr(evaluate_sequence, "visible_devices", looked)
    evaluate()
    assert len(started) == 1
    (folder / "zero-shot" / "answers.jsonl").unlink()
    (folder / "zero-shot" / "scores.json").unlink()
    evaluate()
    assert len(started) == 2


def test_a_page_that_cannot_be_made_takes_nothing_from_the_evaluation(evaluate, monkeypatch, capsys):
    folder = evaluate("--page", 1)
    page = (folder / "report.html").read_text()
    assert "Accuracy matrix" in page and "the page: " in capsys.readouterr().out
    assert "--page" not in json.loads((folder / "evaluation.json").read_text())["command"]
    for file in ("report.html", "accuracy_matrix.json"):
        (folder / file).unlink()

    (folder / "report.html").mkdir()
    (folder / "report.html" / "x").mkdir()
    again = f"The results are whole. Again: python -m llava.eval.report {folder}"

    def said():
        evaluate("--page", 1)
        assert (folder / "accuracy_matrix.json").is_file()
        return capsys.readouterr().err.splitlines()

    why = "a folder stands where a file is needed; choose another place, or move it away"
    assert said()[-1] == f"no page: {folder / 'report.html'}: {why}. {again}"

    def broken(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(evaluate_sequence.report, "write_page", broken)
    with pytest.raises(ZeroDivisionError):  # a fault of the program is not hidden
        said()


class Killed(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("after", [2, 13])
def test_killed_work_goes_on_to_the_same_bytes(evaluate, monkeypatch, tmp_path, after):
    append, written = answer_chunk.append, []

    def killed(stream, answers):
        append(stream, answers)
        written.extend(answers)
        if len(written) == after:
            stream.write(b'{"question_id": 6, "pro')
            stream.flush()
            raise Killed

    monkeypatch.setattr(answer_chunk, "append", killed)
    with pytest.raises(Killed):
        evaluate("--chunks", 2)
    monkeypatch.setattr(answer_chunk, "append", append)
    continued = contents(evaluate("--chunks", 2))
    for file in (tmp_path / "eval").rglob("*.jsonl"):
        file.unlink()
    assert contents(evaluate("--chunks", 2)) == continued


def test_rows_that_share_ids_or_have_several_domains_reach_the_matrix(place, evaluate, tmp_path):
    rows = [{**row, "question_id": row["image"]} for row in rows_of(place)]
    rows[1]["domain"] = dict.fromkeys(TASKS, True)
    rows[2]["domain"] = dict.fromkeys(TASKS, False)
    write_jsonl(tmp_path / "test.jsonl", rows)
    folder = evaluate("--chunks", 3, sequence=write_sequence(place, "shared", test=str(tmp_path / "test.jsonl")))
    answers = [json.loads(line) for line in (folder / "zero-shot" / "answers.jsonl").read_text().splitlines()]
    assert [answer["metadata"]["position"] for answer in answers] == list(range(11))
    groups = json.loads((folder / "zero-shot" / "scores.json").read_text())["groups"]
    assert {name: group["rows"] for name, group in groups.items()} == {"overall": 11, "abd": 6, "chest": 5}
    assert json.loads((folder / "accuracy_matrix.json").read_text())["metrics"]["exact_match"]["n"] == [6, 5]


def test_results_have_a_folder_for_each_route(evaluate, loads, tmp_path):
    evaluate("--no_zero_shot", "--route", "oracle")
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == ["tiny-oracle"]
    assert len(loads) == 1 and not (tmp_path / "eval" / "tiny-oracle" / "zero-shot").exists()


def test_stale_answers_are_refused_before_anything_is_answered(evaluate, loads):
    folder = evaluate()
    (folder / "zero-shot" / "chunks" / "1_0.jsonl").unlink()  # there is work left before the stale ones come
    loads.clear()
    with pytest.raises(UserError, match=r"llava-tiny_abd/chunks/1_0.jsonl: line 1 was made with other model weights"):
        evaluate("--conv_mode", "v0", "--stale", "refuse")
    assert loads == []
    evaluate("--conv_mode", "v0")
    assert len(loads) == 1


def rows_of(place):
    return [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]


def without_a_domain(place):
    return {"test": [{name: value for name, value in row.items() if name != "domain"} for row in rows_of(place)]}


def of_one_task(place):
    return {"test": [row for row in rows_of(place) if row["domain"]["abd"]]}


def of_two_tasks(place):
    both = {"abd": True, "chest": True}
    return {"test": [{**row, "domain": both} if row["question_id"] == 5 else row for row in rows_of(place)]}


def of_another_picture(place):
    return {"test": [{**row, "image": "absent.png"} if row["question_id"] == 9 else row for row in rows_of(place)]}


def of_one_picture(place):
    return {"test": [{**row, "image": "0.png"} if row["domain"]["abd"] else row for row in rows_of(place)]}


LATE = [
    (without_a_domain, (), r"no question is of task 'abd' \(its domains are none\)"),
    (of_two_tasks, ("--route", "oracle"), r"question_id 5 has several \(abd, chest\)"),
    (of_one_task, (), "no question is of task 'chest'"),
    (of_another_picture, (), "absent.png"),
    (lambda _: {"metrics": ["exact_match", "accuracy"]}, (), "accuracy"),
    (lambda _: {}, ("--chunks", 0), "CHUNKS is '0'"),
    (lambda _: {}, ("--chunks", "two"), "CHUNKS is 'two'"),
    (lambda _: {}, ("--route", "compass"), "'compass' is not a router"),
    (lambda _: {}, ("--conv_mode", "v99"), "v99"),
    (lambda _: {}, ("--image_aspect_ratio", "pda"), "did you mean 'pad'"),
    (lambda _: {}, ("--batch_size", 0), "--batch_size is 0"),
    (of_one_picture, ("--pictures", "shuffled"), "domain 'abd' cannot change places: 0.png"),
    (lambda _: {}, ("--method", "joint"), "stage checkpoint not found: .*llava-tiny-joint_abd"),
    (lambda _: {}, ("--base_model", "no-such-model"), "no-such-model"),
    (lambda place: {"test": place / "absent.jsonl"}, (), "absent.jsonl"),
]


@pytest.mark.parametrize("changes, more, message", LATE, ids=[message for *_, message in LATE])
def test_what_is_wrong_is_found_before_a_model_is_loaded(place, evaluate, loads, tmp_path, changes, more, message):
    found = changes(place)
    if isinstance(found.get("test"), list):
        write_jsonl(tmp_path / "test.jsonl", found["test"])
        found["test"] = tmp_path / "test.jsonl"
    sequence = write_sequence(place, "changed", **{name: _plain(value) for name, value in found.items()})
    with pytest.raises(UserError, match=message):
        evaluate(*more, sequence=sequence)
    assert loads == [] and not (tmp_path / "eval").exists()


def _plain(value):
    return value if isinstance(value, list) else str(value)


def test_a_stage_over_another_base_is_found_before_a_model_is_loaded(place, evaluate, loads, tmp_path):
    other = write_base(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="the slots were trained on base"):
        evaluate("--base_model", other)
    assert loads == []


def test_devices_are_those_of_the_environment(monkeypatch):
    from llava.devices import restricted_to, visible_devices

    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    for text, found in (("0,2", ["0", "2"]), ("", []), (" GPU-1 ,", ["GPU-1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert visible_devices() == found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    assert visible_devices() == ["0", "1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    assert visible_devices() == ["3"]
    assert restricted_to("3") == {"CUDA_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "3"}


def texts(folder):
    """Per model the answers, as they are written."""
    files = sorted(folder.glob("*/answers.jsonl"))
    rows = {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: [(row["question_id"], row["text"]) for row in found] for name, found in rows.items()}


def figures(folder):
    """The accuracy matrix without its files' checksums: answers name the chunks that they came from."""
    return re.sub(r'"sha256": "\w+"', "", (folder / "accuracy_matrix.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_processes_of_a_launcher_answer_together(evaluate, count):
    folder = evaluate()
    expected, matrix = texts(folder), figures(folder)
    os.rename(folder, folder.with_name("alone"))
    assert in_processes(count, evaluate) == [0] * count
    assert texts(folder) == expected and len(expected) == 3
    assert figures(folder) == matrix
    chunks = sorted(path.name for path in (folder / "zero-shot" / "chunks").iterdir())
    assert chunks == [f"{count}_{number}.jsonl" for number in range(count)]
    assert not list(folder.parent.glob(".*.lock"))
