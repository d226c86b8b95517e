"""LLaVA's loaders for other formats answer as ``model_vqa_loader`` does on the same questions, base and stage."""

from __future__ import annotations

import base64
import csv
import json

import pytest
from tiny_llava import write_base, write_images, write_stage

from llava.data.jsonl import write_jsonl
from llava.eval import model_qa, model_vqa_loader, model_vqa_mmbench, model_vqa_science
from llava.utils import UserError

LETTER = "Answer with the option's letter from the given choices directly."
GREEDY = ["--temperature", "0", "--max_new_tokens", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, a stage over it and two pictures."""
    folder = tmp_path_factory.mktemp("evaluations")
    write_stage(folder / "llava-tiny_abd_chest", write_base(folder / "tiny-base"))
    return write_images(folder, ["a.png", "b.png"])


MODELS = {"base": ["tiny-base"], "stage": ["llava-tiny_abd_chest", "tiny-base"]}


@pytest.fixture(params=MODELS)
def model(request, place):
    """``--model-path`` and ``--model-base`` of a base and of a stage."""
    names = [str(place / name) for name in MODELS[request.param]]
    return [word for pair in zip(["--model-path", "--model-base"], names) for word in pair]


def answered(command, path, *words):
    """The answer rows that a command writes."""
    command.main([*map(str, [*words, "--answers-file", path, *GREEDY])])
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_the_loader(rows, folder, model, *words):
    """Texts and routes of question rows as ``model_vqa_loader`` gives them."""
    write_jsonl(folder / "rows.jsonl", rows)
    words = [*model, "--question-file", folder / "rows.jsonl", "--batch-size", "1", *words]
    found = answered(model_vqa_loader, folder / "expected.jsonl", *words)
    return [said(answer) for answer in found]


def said(answer):
    return answer["text"], answer["metadata"].get("route")


SCIENCE = [
    {
        "id": "11",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat side\nA. left\nB. right"},
            {"from": "gpt", "value": "B"},
        ],
    },
    {"id": "12", "conversations": [{"from": "human", "value": "where is the lesion\nA. head\nB. abdomen"}]},
]


@pytest.mark.parametrize("letter", [False, True])
def test_scienceqa_is_answered_as_by_the_loader(place, tmp_path, model, letter):
    file = tmp_path / "science.json"
    file.write_text(json.dumps(SCIENCE))
    words = [*model, "--question-file", file, "--image-folder", place, *["--single-pred-prompt"] * letter]
    answers = answered(model_vqa_science, tmp_path / "answers.jsonl", *words)
    assert [answer["question_id"] for answer in answers] == ["11", "12"]
    assert ["<image>" in answer["prompt"] for answer in answers] == [True, False]
    assert {"prompt", "answer_id", "model_id", "metadata"} <= answers[0].keys()
    rows = [{"question_id": r["id"], "text": r["conversations"][0]["value"]} for r in SCIENCE]
    rows[0]["image"] = "a.png"
    suffix = ["--answer-suffix", LETTER] * letter
    expected = by_the_loader(rows, tmp_path, model, "--image-folder", place, *suffix)
    assert [said(answer) for answer in answers] == expected
    assert (expected[0][1] is not None) == ("--model-base" in model)


def test_science_has_llavas_defaults_and_says_what_a_flag_does_not_do(place, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(model_vqa_loader, "write", seen.append)
    (tmp_path / "science.json").write_text(json.dumps(SCIENCE))
    words = ["--model-path", str(place / "tiny-base"), "--question-file", str(tmp_path / "science.json")]
    model_vqa_science.main([*words, "--answer-prompter"])
    (chunk,) = seen
    assert chunk.generation.temperature == 0.2 and chunk.generation.max_new_tokens == 1024 and chunk.asked == {}
    assert capsys.readouterr().out.count("--answer-prompter has no effect") == 1


HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"]


def write_table(path, place, *lines):
    """MMBench's table; each line's last value is a picture's name."""
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(HEAD)
        for *values, picture in lines:
            writer.writerow([*values, base64.b64encode((place / picture).read_bytes()).decode()])
    return path


@pytest.fixture
def table(place, tmp_path):
    first = [7, "what side", "the image of the chest", "left", "right", "head", "", "A", "a.png"]
    return write_table(tmp_path / "dev.tsv", place, first, [8, "where", "nan", "abdomen", "lung", "", "", "B", "b.png"])


CHEST = "the image of the chest\nwhat side\nA. left\nB. right\nC. head"
LUNG = "where\nA. abdomen\nB. lung"


def test_mmbench_is_answered_as_by_the_loader(place, tmp_path, model, table):
    words = [*model, "--question-file", table, "--single-pred-prompt", "--lang", "cn"]
    answers = answered(model_vqa_mmbench, tmp_path / "answers.jsonl", *words)
    assert [(answer["question_id"], answer["prompt"]) for answer in answers] == [(7, CHEST), (8, LUNG)]
    assert answers[0]["options"] == ["left", "right", "head"] and answers[1]["option_char"] == ["A", "B"]
    assert [answer["round_id"] for answer in answers] == [0, 0]
    rows = [{"question_id": 7, "image": "a.png", "text": CHEST}, {"question_id": 8, "image": "b.png", "text": LUNG}]
    expected = by_the_loader(rows, tmp_path, model, "--image-folder", place, "--answer-suffix", "请直接回答选项字母。")
    assert [said(answer) for answer in answers] == expected


def test_each_round_rotates_the_options_under_letters_that_stay(place, tmp_path, table):
    rows = list(model_vqa_mmbench.question_rows(str(table), tmp_path, all_rounds=True))
    assert [(row["question_id"], row["round_id"]) for row in rows] == [(7, 0), (7, 1), (7, 2), (8, 0), (8, 1)]
    assert rows[1]["text"] == "the image of the chest\nwhat side\nA. right\nB. head\nC. left"
    assert rows[1]["options"] == ["right", "head", "left"] and rows[1]["option_char"] == ["B", "C", "A"]
    assert (tmp_path / rows[4]["image"]).read_bytes() == (place / "b.png").read_bytes()


def test_a_killed_run_of_all_rounds_goes_on(place, tmp_path, table):
    """The rounds of a question share its id."""
    words = ["--model-path", place / "tiny-base", "--question-file", table, "--all-rounds"]
    whole = answered(model_vqa_mmbench, tmp_path / "answers.jsonl", *words)
    rounds = [(answer["question_id"], answer["round_id"], answer["options"][0]) for answer in whole]
    assert rounds == [(7, 0, "left"), (7, 1, "right"), (7, 2, "head"), (8, 0, "abdomen"), (8, 1, "lung")]
    assert whole[1]["prompt"] == "the image of the chest\nwhat side\nA. right\nB. head\nC. left"
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][:9], encoding="utf-8")
    assert answered(model_vqa_mmbench, tmp_path / "answers.jsonl", *words) == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([1, "", "", "a", "b", "", "", "A", "a.png"], "row 1: column 'question' is missing"),
        ([1, "where", "", "a", "", "", "", "A", "a.png"], "row 1: column 'B' is missing"),
    ],
)
def test_a_table_that_lacks_something_is_refused(place, tmp_path, line, message):
    table = write_table(tmp_path / "bad.tsv", place, line)
    with pytest.raises(UserError, match=message):
        list(model_vqa_mmbench.question_rows(str(table), tmp_path, all_rounds=False))


def test_a_table_with_a_byte_order_mark_and_pictures_in_lines(place, tmp_path, table):
    plain = list(model_vqa_mmbench.question_rows(str(table), tmp_path, all_rounds=True))
    head, *rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        picture = base64.encodebytes((place / f"{'ab'[row[0] == '8']}.png").read_bytes()).decode()
        row[-1] = f'"{picture}"'
    table.write_text("\n".join("\t".join(row) for row in [head, *rows]), encoding="utf-8-sig")
    assert list(model_vqa_mmbench.question_rows(str(table), tmp_path, all_rounds=True)) == plain


def test_a_table_of_another_encoding_is_named(place, tmp_path, table):
    table.write_bytes(table.read_bytes().replace(b"where", "wh\u00f6".encode("latin-1")))
    with pytest.raises(UserError, match="dev.tsv row 2: not UTF-8"):
        list(model_vqa_mmbench.question_rows(str(table), tmp_path, all_rounds=False))


@pytest.mark.parametrize("picture", ["x!y", "\u00e9eee"])
def test_a_picture_that_is_no_base64_is_named(tmp_path, picture):
    text = f"index\tquestion\tA\tB\timage\n5\twhere\ta\tb\t{picture}\n"
    (tmp_path / "bad.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="bad.tsv row 1: column 'image' is no base64"):
        list(model_vqa_mmbench.question_rows(str(tmp_path / "bad.tsv"), tmp_path, all_rounds=False))


def test_model_qa_asks_without_pictures(place, tmp_path, model):
    rows = [{"question_id": n, "text": text, "category": "generic"} for n, text in enumerate(["what side", "where"])]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    named = [word.replace("--model-path", "--model-name") for word in model]
    answers = answered(model_qa, tmp_path / "answers.jsonl", *named, "--question-file", tmp_path / "questions.jsonl")
    assert [said(answer) for answer in answers] == by_the_loader(rows, tmp_path, model)
    assert model_qa.DEFAULTS["temperature"] == 0.7
