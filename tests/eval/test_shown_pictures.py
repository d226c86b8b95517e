"""What questions are shown in place of their pictures: the exchange by hand, and the loader on a tiny random LLaVA."""

import json
from collections import Counter

import pytest
from PIL import Image
from tiny_llava import write_base, write_images, write_stage

from llava.data.rows import parse_row, question_row, read_rows, write_jsonl
from llava.eval import model_vqa_loader
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading
from llava.eval.shown_pictures import ACROSS, BLANK, KINDS, REAL, SHUFFLED, shown_rows
from llava.utils import UserError

DOMAINS = ("abd", "chest")


def question(number, *images, domain="abd"):
    """A question about any number of pictures."""
    marks = "".join("\n<image>" for _ in images)
    row = {"question_id": number, "image": list(images), "text": f"is it {number}?{marks}", "gpt4_answer": "yes"}
    return parse_row({**row, "domain": {name: name == domain for name in DOMAINS}})


def many(rows=60, pictures=9):
    """Rows of two domains that share some pictures; half of all rows are about one."""
    return [
        question(number, f"{domain}{0 if number % 2 else number % pictures}.png", domain=domain)
        for number in range(rows)
        for domain in DOMAINS
    ]


@pytest.mark.parametrize("kind", [SHUFFLED, ACROSS])
@pytest.mark.parametrize("seed", range(5))
def test_every_question_gets_another_picture_and_none_is_lost(kind, seed):
    rows = many()
    shown = shown_rows(rows, kind, seed)
    for row, other in zip(rows, shown, strict=True):
        assert other.image != row.image and (other.id, other.conversations) == (row.id, row.conversations)
        assert kind == ACROSS or other.image.startswith(row.domain)
    assert {row.image for row in shown} == {row.image for row in rows}
    assert Counter(Counter(row.image for row in shown).values()) == Counter(Counter(row.image for row in rows).values())
    assert shown == shown_rows(rows, kind, seed) != shown_rows(rows, kind, seed + 5)
    backwards = shown_rows(rows[::-1], kind, seed)
    assert backwards[::-1] == shown  # the seed and the names decide, not the rows' order
    if kind == ACROSS:
        assert any(not other.image.startswith(row.domain) for row, other in zip(rows, shown, strict=True))


def test_two_pictures_change_places_for_every_seed():
    rows = [question(1, "a.png"), question(2, "b.png"), question(3, "a.png")]
    for seed in range(20):
        assert [row.image for row in shown_rows(rows, SHUFFLED, seed)] == ["b.png", "a.png", "b.png"]


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_several_pictures_keep_their_number_and_share_none_with_themselves(seed):
    pairs = [(f"{number}.png", f"{(number + 1) % 8}.png") for number in range(8)]
    rows = [question(number, *pair) for number, pair in enumerate(pairs)] + [question(9)]
    *shown, without = shown_rows(rows, ACROSS, seed)
    for row, other in zip(rows, shown):
        assert len(set(other.images)) == 2 and not set(other.images) & set(row.images)
    assert without.images == ()


def test_own_and_blank_pictures_leave_the_rows():
    rows = many(4)
    assert shown_rows(rows, REAL, 1) == shown_rows(rows, BLANK, 1) == rows


def test_a_domain_of_one_picture_is_refused_but_not_across():
    rows = [question(1, "a.png"), question(2, "a.png"), question(3, "b.png", domain="chest")]
    with pytest.raises(UserError, match="domain 'abd' cannot change places: a.png .* --pictures shuffled-across"):
        shown_rows(rows, SHUFFLED, 0)
    assert [row.image for row in shown_rows(rows, ACROSS, 0)] == ["b.png", "b.png", "a.png"]


# -- on a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a stage over it, eight questions about four pictures, one of them without any."""
    folder = tmp_path_factory.mktemp("shown")
    write_stage(folder / "llava-tiny_abd_chest", write_base(folder / "tiny-base"))
    write_images(folder / "images", [f"{number}.png" for number in range(4)])
    rows = []
    for number in range(8):
        image = None if number == 7 else f"{number % 4}.png"
        rows.append(question_row(number, image, f"what side is lung {number}?", "yes", DOMAINS[number % 2], DOMAINS))
    write_jsonl(folder / "questions.jsonl", rows)
    return folder


def run(place, target, *more, questions="questions.jsonl", images="images"):
    words = ["--model-path", place / "llava-tiny_abd_chest", "--model-base", place / "tiny-base", "--device", "cpu"]
    words += ["--question-file", place / questions, "--image-folder", place / images, "--answers-file", target]
    model_vqa_loader.main([str(word) for word in [*words, "--max_new_tokens", 6, *more]])
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def essence(answers):
    return [(a["question_id"], a["text"], a["metadata"]["route"]) for a in answers]


def test_shuffled_pictures_are_answered_and_routed_as_rows_that_name_them(place, tmp_path):
    answers = run(place, tmp_path / "a.jsonl", "--pictures", "shuffled", "--seed", 3)
    rows = read_rows(place / "questions.jsonl")
    assert [answer["metadata"]["pictures"] for answer in answers] == ["shuffled"] * 8
    shown = [answer["metadata"]["shown"] for answer in answers]
    assert shown == [list(row.images) for row in shown_rows(rows, SHUFFLED, 3)]
    named = [{**row.raw, "image": names or None} for row, names in zip(rows, shown, strict=True)]
    write_jsonl(place / "named.jsonl", named)
    assert essence(run(place, tmp_path / "n.jsonl", questions="named.jsonl")) == essence(answers)
    halves = [
        run(place, tmp_path / f"{half}.jsonl", "--pictures", "shuffled", "--seed", 3, "--num-chunks", 2, *index)
        for half, index in enumerate([(), ("--chunk-idx", 1)])
    ]
    assert essence(halves[0] + halves[1]) == essence(answers)


def test_blank_pictures_are_answered_and_routed_as_files_of_one_colour(place, tmp_path):
    """Whatever their names and sizes, all blanks are one picture to the tower."""
    answers = run(place, tmp_path / "a.jsonl", "--pictures", "blank")
    assert [answer["metadata"]["pictures"] for answer in answers] == ["blank"] * 8
    (place / "blank").mkdir()
    for number in range(4):
        size = Image.open(place / "images" / f"{number}.png").size
        Image.new("RGB", size, (122, 116, 104)).save(place / "blank" / f"{number}.png")  # CLIP's mean, as LLaVA pads
    assert essence(run(place, tmp_path / "b.jsonl", images="blank")) == essence(answers)


def test_what_is_shown_is_one_of_the_settings_of_an_answers_file(place, tmp_path):
    whole = {kind: run(place, tmp_path / f"{kind}.jsonl", "--pictures", kind) for kind in KINDS}
    assert len({str(essence(answers)) for answers in whole.values()}) == 4
    assert len({answers[0]["metadata"]["run"] for answers in whole.values()}) == 4
    assert all(answers[7]["text"] == whole[REAL][7]["text"] for answers in whole.values())  # it has no picture
    assert not {"pictures", "shown"} & set(whole[REAL][0]["metadata"])
    with pytest.raises(UserError, match="other model weights or settings"):
        run(place, tmp_path / f"{REAL}.jsonl", "--pictures", "blank")
    data = (tmp_path / "shuffled.jsonl").read_bytes()
    (tmp_path / "shuffled.jsonl").write_bytes(data[: len(data) // 2])
    run(place, tmp_path / "shuffled.jsonl", "--pictures", "shuffled")
    assert (tmp_path / "shuffled.jsonl").read_bytes() == data


def test_passes_share_the_tower_and_blanks_one_look(place):
    rows = read_rows(place / "questions.jsonl")
    answerer = Answerer(str(place / "tiny-base"), Loading(device="cpu")).use(str(place / "llava-tiny_abd_chest"))
    looked, generation = [], Generation(max_new_tokens=2, workers=2)
    answerer.model.get_vision_tower().register_forward_pre_hook(lambda module, inputs: looked.append(len(inputs[0])))
    for kind in (REAL, SHUFFLED, BLANK, BLANK, REAL):
        replies = answerer.answer(shown_rows(rows, kind, 0), generation, str(place / "images"), blank=kind == BLANK)
        assert len(list(replies)) == 8
    assert looked == [1] * 5  # four pictures and one blank
    assert len(answerer.cache.blanks) == 1
