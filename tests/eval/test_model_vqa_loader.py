"""The answering command on a tiny random LLaVA: format, batching, chunks, resuming, routes, refusals."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llava import write_base, write_images, write_stage

from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval import eval_video_qa, model_vqa_loader
from llava.eval.answer_file import merge_answers
from llava.eval.answerer import Answerer
from llava.model.builder import load_pretrained_model
from llava.slots.routers import ROUTERS
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("abd", "chest")
QUESTIONS = [
    "is there a lesion",
    "what side",
    "where is the lesion in the image of the chest on the left or right side",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a stage over it, nine questions and their pictures; and the same with one row that has no picture."""
    folder = tmp_path_factory.mktemp("eval")
    write_base(folder / "tiny-base")
    write_stage(folder / "llava-tiny_abd_chest", folder / "tiny-base")
    write_images(folder / "images", [f"{number}.png" for number in range(4)])
    for name, without_picture in (("questions", None), ("mixed", 4)):
        rows = []
        for number in range(9):
            image = None if number == without_picture else f"{number % 4}.png"
            question = f"{QUESTIONS[number % 3]} {number}?"
            rows.append(question_row(number, image, question, "yes", DOMAINS[number % 2], DOMAINS))
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def arguments(place, target, *more, stage=True):
    model = ["--model-path", str(place / "llava-tiny_abd_chest"), "--model-base", str(place / "tiny-base")]
    return [
        *(model if stage else ["--model-path", str(place / "tiny-base")]),
        "--question-file",
        str(place / "questions.jsonl"),
        "--image-folder",
        str(place / "images"),
        "--answers-file",
        str(target),
        "--device",
        "cpu",
        "--max_new_tokens",
        "6",
        *map(str, more),
    ]


def run(place, target, *more, stage=True):
    model_vqa_loader.main(arguments(place, target, *more, stage=stage))
    return [json.loads(line) for line in Path(target).read_text(encoding="utf-8").splitlines()]


def test_answers_have_the_seeds_format_and_the_route(place, tmp_path):
    answers = run(place, tmp_path / "a.jsonl", "--batch-size", 4)
    assert [answer["question_id"] for answer in answers] == list(range(9))
    for answer, row in zip(answers, read_rows(place / "questions.jsonl"), strict=True):
        assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert answer["prompt"] == row.raw["text"]
        assert answer["model_id"] == "llava-tiny_abd_chest"
        route = answer["metadata"]["route"]
        assert set(route["task_posterior"]) == set(DOMAINS)
        assert sum(route["task_posterior"].values()) == pytest.approx(1, abs=1e-5)
        assert len(route["slots"]) == len(route["weights"]) == 2
        assert route["weights"] == [round(weight, 6) for weight in route["weights"]]
    assert len({answer["text"] for answer in answers}) > 3
    assert len({answer["answer_id"] for answer in answers}) == 9


def test_the_batch_size_changes_no_answer_and_no_route(place, tmp_path):
    def essence(answers):
        return [(a["question_id"], a["text"], a["metadata"]["route"]["slots"]) for a in answers]

    single = essence(run(place, tmp_path / "1.jsonl", "--batch-size", 1))
    assert essence(run(place, tmp_path / "4.jsonl", "--batch-size", 4)) == single
    assert essence(run(place, tmp_path / "9.jsonl", "--batch-size", 9, "--num-workers", 2)) == single


def test_a_batch_of_sixteen_answers_as_one_by_one(place, tmp_path):
    """Greedy answers and routes of 40 questions of many lengths, one of them without a picture."""
    words = " ".join(QUESTIONS).split()
    rows = []
    for number in range(40):
        question = " ".join(words[number % 5 : number % 5 + 2 + number % 13]) + f" {number}?"
        image = None if number == 20 else f"{number % 4}.png"
        rows.append(question_row(number, image, question, "yes", DOMAINS[number % 2], DOMAINS))
    write_jsonl(tmp_path / "many.jsonl", rows)
    single, together = (
        run(place, tmp_path / f"{size}.jsonl", "--question-file", tmp_path / "many.jsonl", "--batch-size", size)
        for size in (1, 16)
    )
    assert [a["text"] for a in together] == [a["text"] for a in single]
    assert [a["metadata"]["route"]["slots"] for a in together] == [a["metadata"]["route"]["slots"] for a in single]
    assert len({a["text"] for a in single}) > 10


@pytest.mark.parametrize("attention, said", [("eager", ""), ("flash_attention_2", "using SDPA instead")])
def test_attention_can_be_chosen_and_falls_back_with_a_message(place, tmp_path, capsys, attention, said):
    plain = run(place, tmp_path / "plain.jsonl")
    capsys.readouterr()
    chosen = run(place, tmp_path / "chosen.jsonl", "--attn_implementation", attention)
    assert said in capsys.readouterr().out
    assert [answer["text"] for answer in chosen] == [answer["text"] for answer in plain]


def test_the_base_alone_answers_without_a_route(place, tmp_path):
    base = run(place, tmp_path / "base.jsonl", stage=False)
    mixed = run(
        place, tmp_path / "mixed.jsonl", "--question-file", place / "mixed.jsonl", "--batch-size", 1, stage=False
    )
    assert [a["text"] for a in mixed[:4] + mixed[5:]] == [a["text"] for a in base[:4] + base[5:]]
    stage = run(place, tmp_path / "stage.jsonl")
    off = run(place, tmp_path / "off.jsonl", "--route", "none")
    assert base[0]["model_id"] == "tiny-base"
    assert all("route" not in answer["metadata"] for answer in base + off)
    assert [answer["text"] for answer in base] == [answer["text"] for answer in off]
    assert [answer["text"] for answer in base] != [answer["text"] for answer in stage]


def test_chunks_together_are_the_whole(place, tmp_path):
    whole = run(place, tmp_path / "whole.jsonl", "--batch-size", 2)
    paths = [tmp_path / f"4_{index}.jsonl" for index in range(4)]
    for index, path in enumerate(paths):
        run(place, path, "--batch-size", 2, "--num-chunks", 4, "--chunk-idx", index)
    merged = merge_answers(read_rows(place / "questions.jsonl"), paths)
    assert [answer["text"] for answer in merged] == [answer["text"] for answer in whole]


def test_a_resumed_run_ends_with_the_same_bytes(place, tmp_path, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    run(place, whole, "--batch-size", 4)
    data = whole.read_bytes()
    lines = data.splitlines(keepends=True)
    target = tmp_path / "cut.jsonl"
    for kept in (b"".join(lines[:1]), b"".join(lines[:4]), b"".join(lines[:6]) + lines[6][:25]):
        target.write_bytes(kept)
        run(place, target, "--batch-size", 4)
        assert target.read_bytes() == data
    monkeypatch.setattr(Answerer, "use", lambda *_: pytest.fail("a finished file needs no model"))
    run(place, target, "--batch-size", 4)


def pictures_as_ids(folder):
    """Rows whose id is their picture's, as in MME and TextVQA; the first two ask the same of two pictures."""
    asked = [("0.png", "1.png", "normal?"), ("0.png", "2.png", "normal?"), ("1.png", "1.png", "what side?")]
    asked += [("0.png", "0.png", "is there a lesion?"), ("1.png", "3.png", "where is the lesion in the image?")]
    rows = [
        {"question_id": name, "image": image, "text": f"{question}\n<image>", "gpt4_answer": "yes"}
        for name, image, question in asked
    ]
    write_jsonl(folder / "mme.jsonl", rows)
    return "--question-file", folder / "mme.jsonl"


def test_rows_that_share_an_id_are_answered_in_full_resumed_merged_and_scored(place, tmp_path, capsys):
    asked = pictures_as_ids(tmp_path)
    whole = run(place, tmp_path / "whole.jsonl", *asked, "--batch-size", 2)
    assert "5 of 5 rows share their question_id with others" in capsys.readouterr().out
    assert [answer["question_id"] for answer in whole] == ["0.png", "0.png", "1.png", "0.png", "1.png"]
    assert [answer["metadata"]["position"] for answer in whole] == list(range(5))
    assert len({answer["answer_id"] for answer in whole}) == 5
    data = (tmp_path / "whole.jsonl").read_bytes()
    for kept in (1, 3, 5):
        (tmp_path / "cut.jsonl").write_bytes(b"".join(data.splitlines(keepends=True)[:kept]) + b'{"question_id": "0')
        run(place, tmp_path / "cut.jsonl", *asked, "--batch-size", 2)
        assert (tmp_path / "cut.jsonl").read_bytes() == data
    chunks = [tmp_path / f"3_{index}.jsonl" for index in range(3)]
    for index, path in enumerate(chunks):
        run(place, path, *asked, "--batch-size", 2, "--num-chunks", 3, "--chunk-idx", index)
    merged = merge_answers(read_rows(tmp_path / "mme.jsonl"), chunks[::-1])
    assert [answer["text"] for answer in merged] == [answer["text"] for answer in whole]
    with pytest.raises(UserError, match="question_id 0.png .position 0.") as caught:
        merge_answers(read_rows(tmp_path / "mme.jsonl"), chunks[1:])
    assert "1 of 5 questions have no answer" in str(caught.value)
    words = ["--question-file", str(tmp_path / "mme.jsonl"), "--answers-file", str(tmp_path / "whole.jsonl")]
    eval_video_qa.main([*words, "--no-java", "--draws", "20"])
    assert json.loads((tmp_path / "scores.json").read_text())["groups"]["overall"]["rows"] == 5


def test_another_chunk_of_rows_that_ask_the_same_is_not_taken_for_this_one(place, tmp_path):
    row = {"question_id": "a", "text": "normal?\n<image>"}
    write_jsonl(tmp_path / "q.jsonl", [{**row, "image": f"{number}.png"} for number in range(4)])
    words = ("--question-file", tmp_path / "q.jsonl", "--num-chunks", 2)
    run(place, tmp_path / "a.jsonl", *words, "--chunk-idx", 0)
    with pytest.raises(UserError, match="answers question_id 'a' of another question file or chunk"):
        run(place, tmp_path / "a.jsonl", *words, "--chunk-idx", 1)


def test_llava_meds_own_file_is_answered_but_the_oracle_needs_one_domain_a_row(place, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (place / "questions.jsonl").read_text().splitlines()][:3]
    rows[1]["domain"], rows[2]["domain"] = {"abd": True, "chest": True}, {"abd": False, "chest": False}
    write_jsonl(tmp_path / "med.jsonl", rows)
    assert len(run(place, tmp_path / "a.jsonl", "--question-file", tmp_path / "med.jsonl")) == 3
    assert len(run(place, tmp_path / "t.jsonl", "--question-file", tmp_path / "med.jsonl", "--task-id", "abd")) == 3
    monkeypatch.setattr("llava.eval.loaded.load_pretrained_model", lambda *_, **__: pytest.fail("found out too late"))
    with pytest.raises(UserError, match=r"one domain; question_id 1 has several \(abd, chest\)"):
        run(place, tmp_path / "o.jsonl", "--question-file", tmp_path / "med.jsonl", "--route", "oracle")
    assert not (tmp_path / "o.jsonl").exists()


def two_pictures(number, text="is it worse?\n<image>\n<image>", images=("0.png", "1.png")):
    return {"question_id": number, "image": list(images), "text": text, "gpt4_answer": "yes"}


def test_rows_with_two_pictures_are_answered_as_the_model_itself_answers_them(place, tmp_path):
    rows = [
        two_pictures(0),
        two_pictures(1, "is it worse?"),
        two_pictures(2, images=("1.png", "0.png")),
        two_pictures(3, "Prior: <image>\nCurrent: <image>\nis it worse?"),
        {"question_id": 4, "image": "0.png", "text": "is it worse?\n<image>"},
        {"question_id": 5, "image": ["0.png"], "text": "is it worse?\n<image>"},
        {"question_id": 6, "text": "is it worse?"},
    ]
    write_jsonl(tmp_path / "q.jsonl", rows)
    words = ("--question-file", tmp_path / "q.jsonl")
    answers = run(place, tmp_path / "together.jsonl", *words, "--batch-size", 7)
    alone = run(place, tmp_path / "alone.jsonl", *words, "--batch-size", 1)

    def essence(answer):
        return answer["text"], answer["metadata"]["route"]["slots"], answer["metadata"]["route"]["weights"]

    assert [answer["text"] for answer in answers] == [answer["text"] for answer in alone]
    assert essence(answers[0]) == essence(answers[1]) and essence(answers[4]) == essence(answers[5])
    assert answers[0]["metadata"]["route"]["weights"] != answers[4]["metadata"]["route"]["weights"]
    stage, base = place / "llava-tiny_abd_chest", place / "tiny-base"
    tokenizer, model, processor, _ = load_pretrained_model(str(stage), str(base), "llava-tiny", device="cpu")
    prompt = Prompt.of(model.config, "llava-tiny")
    encoder = PromptEncoder(prompt, tokenizer, processor, model.config, place / "images")
    for row, answer in zip(read_rows(tmp_path / "q.jsonl"), answers, strict=True):
        sample = encoder.encode(row, answer=False)
        pixels = [pixels for pixels, _ in sample.pictures]
        for questions in ([row.question], None):  # given, or read back from the prompt
            options = {"questions": questions, "max_new_tokens": 6, "do_sample": False}
            output = model.generate(torch.tensor([sample.input_ids]), images=[pixels or None], **options)
            assert tokenizer.decode(output[0], skip_special_tokens=True).strip() == answer["text"]
            route = model.last_route.describe(0)
            assert (route["slots"], route["weights"]) == essence(answer)[1:]


def test_counts_that_do_not_fit_are_refused_naming_the_row(place, tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [two_pictures(0), two_pictures(1, "<image> is it worse?")])
    with pytest.raises(UserError, match=r"q.jsonl line 2: 1 times <image> for 2 images"):
        run(place, tmp_path / "a.jsonl", "--question-file", tmp_path / "q.jsonl")


def test_a_system_turn_is_asked_with_or_refused_naming_the_row(place, tmp_path):
    turns = [{"from": "human", "value": "<image>\nis there a lesion?"}]
    spoken = [{"from": "system", "value": "You are a radiologist."}, *turns]
    rows = [{"id": name, "image": "0.png", "conversations": said} for name, said in (("own", turns), ("said", spoken))]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    own, said = run(place, tmp_path / "a.jsonl", "--question-file", tmp_path / "q.json", "--max_new_tokens", 12)
    assert own["metadata"]["route"] == said["metadata"]["route"]  # routed by the question alone
    assert own["text"] != said["text"]
    with pytest.raises(UserError, match="row 'said': template 'mistral_instruct' has no place for a system turn"):
        more = ("--conv-mode", "mistral_instruct")
        run(place, tmp_path / "b.jsonl", "--question-file", tmp_path / "q.json", "--batch-size", 1, *more)
    assert not (tmp_path / "b.jsonl").exists()


def test_sampled_answers_survive_a_resume(place, tmp_path):
    sampling = ("--batch-size", 2, "--temperature", 1.0, "--top_p", 0.9, "--seed", 3)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(place, whole, *sampling)
    cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:5]))
    run(place, cut, *sampling)
    assert cut.read_bytes() == whole.read_bytes()


KILLED_AFTER_SOME_ANSWERS = """
import os, signal, sys
from llava.eval import answer_chunk, model_vqa_loader
write, answered = answer_chunk.append, []

def append(stream, answers):
    write(stream, answers)
    answered.extend(answers)
    if len(answered) == 5:
        stream.write(b'{"question_id": 5, "pro')
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

answer_chunk.append = append
model_vqa_loader.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_line_and_the_same_command_again(place, tmp_path):
    target = tmp_path / "killed.jsonl"
    command = [sys.executable, "-c", KILLED_AFTER_SOME_ANSWERS, *arguments(place, target, "--batch-size", 3)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert target.read_bytes().count(b"\n") == 5
    run(place, target, "--batch-size", 3)
    run(place, tmp_path / "undisturbed.jsonl", "--batch-size", 3)
    assert target.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_answers_of_other_pictures_are_not_taken_as_finished(place, tmp_path):
    target = tmp_path / "a.jsonl"
    run(place, target)
    write_images(tmp_path / "others", [f"{number}.png" for number in (3, 0, 1, 2)])  # the same names, other pictures
    with pytest.raises(UserError, match="or of other pictures"):
        run(place, target, "--image-folder", tmp_path / "others")


def test_another_models_file_is_refused(place, tmp_path):
    target = tmp_path / "a.jsonl"
    run(place, target, stage=False)
    before = target.read_bytes()
    with pytest.raises(UserError, match="by model 'tiny-base'"):
        run(place, target)
    assert target.read_bytes() == before
    with pytest.raises(UserError, match="other model weights or settings"):
        run(place, target, "--max_new_tokens", 5, stage=False)
    answers = run(place, target, "--stale", "replace")
    assert answers[0]["model_id"] == "llava-tiny_abd_chest"


def test_a_task_can_be_given(place, tmp_path):
    rows = read_rows(place / "questions.jsonl")
    for answer, row in zip(run(place, tmp_path / "o.jsonl", "--route", "oracle"), rows, strict=True):
        assert answer["metadata"]["route"]["task_given"]
        assert all((slot < 4) == (row.domain == "abd") for slot in answer["metadata"]["route"]["slots"])
    write_stage(place / "llava-tiny_abd", place / "tiny-base", tasks=("abd",))
    first_stage = run(place, tmp_path / "f.jsonl", "--model-path", place / "llava-tiny_abd", "--route", "oracle")
    given = ["task_given" in answer["metadata"]["route"] for answer in first_stage]
    assert given == [row.domain == "abd" for row in rows]  # what is not learned yet is routed freely
    alone = ("--model-path", place / "llava-tiny_abd", "--route", "oracle", "--batch-size", 1)
    for together, single in zip(first_stage, run(place, tmp_path / "g.jsonl", *alone), strict=True):
        assert together["text"] == single["text"]
        assert together["metadata"]["route"] == single["metadata"]["route"]
    for answer in run(place, tmp_path / "t.jsonl", "--task-id", "chest"):
        assert all(slot >= 4 for slot in answer["metadata"]["route"]["slots"])
    with pytest.raises(UserError, match="no trained slots for task 'head'; the model has abd, chest"):
        run(place, tmp_path / "h.jsonl", "--task-id", "head")
    with pytest.raises(UserError, match="not a router"):
        run(place, tmp_path / "h.jsonl", "--route", "compass")
    assert not (tmp_path / "h.jsonl").exists()


def test_a_router_from_a_plug_in_folder_can_be_asked_for(place, tmp_path, monkeypatch):
    ROUTERS.names()
    monkeypatch.setattr(ROUTERS, "_items", dict(ROUTERS._items))
    monkeypatch.setenv("LLAVA_PLUGINS", str(tmp_path))
    (tmp_path / "first_router.py").write_text(
        "import torch\nfrom llava.slots.routers import ROUTERS, Router\n\n\n"
        "@ROUTERS.register\nclass First(Router):\n    name = 'first'\n\n"
        "    def scores(self, query):\n"
        "        return -torch.arange(len(self.slot_tasks)).double().repeat(len(query), 1)\n"
    )
    for answer in run(place, tmp_path / "r.jsonl", "--route", "first"):
        assert answer["metadata"]["route"]["slots"] == [0, 1]


def test_demo_sample_of_the_readme(place, tmp_path):
    demo = {
        "question_id": 101,
        "image": "test_img_00101.jpg",
        "pair_id": "test_img_00101",
        "text": "is there evidence of air in the peritoneal cavity?\n<image>",
        "domain": {"abd": True, "chest": False, "head": False},
    }
    (tmp_path / "demo_sample.jsonl").write_text(json.dumps(demo, indent=4))
    write_images(tmp_path / "images", ["test_img_00101.jpg"])
    more = ("--question-file", tmp_path / "demo_sample.jsonl", "--image-folder", tmp_path / "images")
    (answer,) = run(place, tmp_path / "out.jsonl", *more)
    assert answer["question_id"] == 101
    assert answer["prompt"] == demo["text"]


def test_bad_input_is_named_and_leaves_nothing_behind(place, tmp_path):
    target = tmp_path / "out" / "a.jsonl"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question_id": 1, "te')
    row = question_row(1, "absent.png", "is there?", "yes", "abd", DOMAINS)
    write_jsonl(tmp_path / "noimage.jsonl", [row])
    cases = [
        (("--question-file", tmp_path / "absent.jsonl"), "not found"),
        (("--question-file", tmp_path / "empty.jsonl"), "empty.jsonl"),
        (("--question-file", tmp_path / "broken.jsonl"), "line 1"),
        (("--question-file", tmp_path / "noimage.jsonl"), "absent.png"),
        (("--model-path", tmp_path / "no-such-model"), "no-such-model"),
        (("--conv-mode", "v99"), "v99"),
        (("--num-chunks", 2, "--chunk-idx", 2), "chunk-idx 2"),
    ]
    for more, message in cases:
        with pytest.raises(UserError, match=message):
            run(place, target, *more)
        assert not target.exists()
