"""The task files for lmms-eval: they parse, what they name exists, and their metrics are this project's own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava import write_images

from llava.continual.sequence import load_sequence
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval.metrics import score
from llava.eval.text_metrics import TextScorer

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "lmms_eval"
TASKS = {"vqa_rad": ("abd", "chest", "head"), "slake": ("ct", "mri", "xray")}
GROUPS = {"vqa_rad_by_organ": "vqa_rad", "slake_by_modality": "slake"}
NEEDED = {"task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "process_docs", "doc_to_visual"}
NEEDED |= {"doc_to_text", "doc_to_target", "process_results", "generation_kwargs", "metric_list"}


@pytest.fixture(scope="module")
def utils():
    """The module as lmms-eval loads it: by its file."""
    spec = importlib.util.spec_from_file_location("utils", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_task(path):
    """A task file with what it includes; ``!function`` tags as ``("utils", name)``."""

    class Loader(yaml.SafeLoader):
        """Plain YAML, and the tag."""

    Loader.add_constructor("!function", lambda loader, node: tuple(loader.construct_scalar(node).split(".")))
    values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    included = values.pop("include", None)
    return {**(read_task(FOLDER / included) if included else {}), **values}


def functions(values):
    return [value for value in values.values() if isinstance(value, tuple)]


@pytest.mark.parametrize("task", [f"{name}_{part}" for name, parts in TASKS.items() for part in parts])
def test_a_task_file_is_whole_and_its_functions_exist(utils, task):
    values = read_task(FOLDER / f"{task}.yaml")
    assert values["task"] == task and values.keys() >= NEEDED and values["output_type"] == "generate_until"
    assert len(functions(values)) == 4
    for module, name in functions(values):
        assert module == "utils" and callable(getattr(utils, name))
    assert values["process_docs"] == ("utils", f"only_{task.rsplit('_', 1)[1]}")
    assert tuple(entry["metric"] for entry in values["metric_list"]) == utils.METRIC_NAMES
    assert all(entry["aggregation"] == "mean" and entry["higher_is_better"] for entry in values["metric_list"])


@pytest.mark.parametrize("group, dataset", GROUPS.items())
def test_a_group_holds_the_sequences_tasks_and_reads_its_test_file(group, dataset):
    """Domains, file and pictures are those of the task sequence that trains the stages."""
    values = read_task(FOLDER / f"{group}.yaml")
    sequence = load_sequence(dataset.replace("_", "-"), {})
    assert values["group"] == group and values["task"] == [f"{dataset}_{task}" for task in sequence.task_names]
    for task in values["task"]:
        (test,) = read_task(FOLDER / f"{task}.yaml")["dataset_kwargs"]["data_files"].values()
        assert (FOLDER / test).resolve() == FOLDER.parents[1] / sequence.test
    assert values["aggregate_metric_list"] == [{"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}]


def test_every_file_of_the_folder_is_one_of_these():
    names = {f"{name}_{part}.yaml" for name, parts in TASKS.items() for part in parts}
    names |= {f"{group}.yaml" for group in GROUPS} | {"_vqa_rad_template_yaml", "_slake_template_yaml", "utils.py"}
    assert {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"} == names


# -- on rows, read as lmms-eval reads them -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six rows in a file, closed and open, by a tag and by their answer, and their pictures."""
    folder = tmp_path_factory.mktemp("lmms")
    write_images(folder / "images", ["a.png", "b.png"])
    texts = ["yes", "no", "Left lung", "CT-scan", "the left kidney", "2"]
    rows = []
    for number, text in enumerate(texts):
        domain = ("abd", "chest", "head")[number % 3]
        rows.append(
            question_row(number, ("a.png", "b.png")[number % 2], f"what {number}?", text, domain, TASKS["vqa_rad"])
        )
    rows[3]["answer_type"] = "CLOSED"  # the other rows have no such field: datasets fills it with None
    write_jsonl(folder / "test.jsonl", rows)
    docs = load_dataset("json", data_files={"test": str(folder / "test.jsonl")}, cache_dir=str(folder / "cache"))
    return folder, read_rows(folder / "test.jsonl"), docs["test"]


def test_docs_are_rows_again_with_question_and_picture(utils, place, monkeypatch):
    folder, rows, docs = place
    monkeypatch.setenv("VQA_RAD_DIR", str(folder))
    for row, doc in zip(rows, docs, strict=True):
        assert utils.row_of(doc) == row and utils.question(doc) == row.question
        (picture,) = utils.vqa_rad_pictures(doc)
        assert picture.mode == "RGB" and picture.size in ((24, 16), (16, 20))
    assert utils.question(docs[0], {"pre_prompt": "Q: ", "post_prompt": "\nshort."}) == "Q: what 0?\nshort."
    assert utils.vqa_rad_pictures({**docs[0], "image": None, "text": "what?"}) == []
    both = {**docs[0], "image": [docs[0]["image"], docs[1]["image"]], "text": "what?"}
    assert len(utils.vqa_rad_pictures(both)) == 2


def test_a_domains_rows_are_its_own(utils, place):
    _, rows, docs = place
    assert utils.only_chest(docs)["question_id"] == [row.id for row in rows if row.domain == "chest"]
    assert len(utils.only_abd(docs)) + len(utils.only_head(docs)) == 4


def ours(rows, texts, names):
    """The scores file's figures of these answers."""
    answers = [{"question_id": row.id, "text": text} for row, text in zip(rows, texts, strict=True)]
    figures = score(rows, answers, scorer=TextScorer(use_java=False), draws=2)["groups"]["overall"]["figures"]
    return {name: figures[name]["value"] for name in names}


def theirs(utils, docs, texts):
    """Means over what each answer gives, as lmms-eval takes them."""
    found = {name: [] for name in utils.METRIC_NAMES}
    for doc, text in zip(docs, texts, strict=True):
        for name, value in utils.scores(doc, [text]).items():
            found[name].append(value)
    return {name: sum(values) / len(values) if values else None for name, values in found.items()}


def test_the_figures_of_hand_made_answers(utils, place):
    _, rows, docs = place
    texts = ["Yes.", "yes", "left", "ct scan", "kidney", "two"]
    found = theirs(utils, docs, texts)
    assert found == ours(rows, texts, utils.METRIC_NAMES)
    assert found == {"exact_match": 2 / 6, "closed_accuracy": 2 / 3, "open_recall": (1 / 2 + 1 / 2 + 1) / 3}


WORDS = st.sampled_from(["yes", "no", "the", "left", "lung", "CT-scan", "two", "2", "kidney", "", ".", "1,5"])


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(WORDS, max_size=4).map(" ".join), min_size=6, max_size=6))
def test_the_figures_of_any_answers(utils, place, texts):
    _, rows, docs = place
    assert theirs(utils, docs, texts) == pytest.approx(ours(rows, texts, utils.METRIC_NAMES))


def test_an_empty_answer_counts_and_no_answer_is_one(utils, place):
    *_, docs = place
    assert utils.scores(docs[0], [""]) == utils.scores(docs[0], []) == {"exact_match": 0.0, "closed_accuracy": 0.0}
    assert json.dumps(utils.scores(docs[4], ["left"]))
