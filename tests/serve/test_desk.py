"""The demo behind its page: pictures, answers equal to ``run_llava``'s, several turns, stop, errors, several users."""

from __future__ import annotations

import base64
import threading
import time

import pytest
from serve.room import NEW, dicom_bytes

from llava.data.rows import question_row, write_jsonl
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation
from llava.serve import service as service_module
from llava.serve.conversations import Conversation, Conversations
from llava.serve.desk import Desk
from llava.serve.examples import read_examples
from llava.serve.question import Answer, Limits, Question
from llava.serve.service import Service
from llava.utils import UserError

ASKED, DOMAINS = "is there a lesion", ("abd", "chest")


@pytest.fixture
def desk(place):
    return Desk(place.service)


def file(data, name="a.png"):
    return {"name": name, "data": base64.b64encode(data).decode()}


def said(desk, key="me"):
    """What was answered in a conversation."""
    return [(one.question, one.answer and one.answer.text) for one in desk.talks.of(key).said]


def test_the_answer_is_that_of_run_llava_and_comes_in_parts(place, desk):
    view = desk.show("me", [file(place.png(1)), file(place.png(2), "<b>.png")])
    assert view.pictures.count("<li>") == 2 and "&lt;b&gt;" in view.pictures and not view.notice
    views = list(desk.ask("me", f" {ASKED} "))
    expected = place.truth(ASKED, 1, 2)
    assert said(desk) == [(ASKED, expected)]
    first, *between, last = views
    assert first.busy and first.question == "" and "Waiting" in first.notice
    assert len(between) > 2 and not last.busy and last.notice == ""
    route = desk.talks.of("me").said[0].answer.route
    assert route["task"] in last.route and all(f"slot {slot} · " in last.route for slot in route["slots"])


def test_dicom_and_the_bases_answer(place, desk, tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom_bytes())
    desk.show("me", [file(dicom_bytes(), "a.dcm")])
    *_, last = desk.ask("me", ASKED, with_base=True)
    (one,) = desk.talks.of("me").said
    assert one.answer.text == place.truth(ASKED, tmp_path / "a.dcm")
    assert one.base.text == place.truth(ASKED, tmp_path / "a.dcm", route="none") and one.base.route is None
    assert "the base alone" in last.talk and not last.busy


def test_later_turns_know_the_ones_before_and_may_bring_pictures(place, desk):
    desk.show("me", [file(place.png(0))])
    list(desk.ask("me", ASKED))
    list(desk.ask("me", "what side"))
    desk.show("me", [file(place.png(1))])
    list(desk.ask("me", "and here?"))
    (_, one), (_, two), (_, three) = said(desk)
    turns = [f"<image>\n{ASKED}", one, "what side", two, "<image>\nand here?"]
    pairs = tuple(zip(("human", "gpt") * 3, turns))
    for count, pictures, expected in ((1, 1, one), (3, 1, two), (5, 2, three)):
        shown = tuple(place.picture(number) for number in range(pictures))
        question = Question(pairs[:count], shown, Generation(max_new_tokens=NEW))
        assert place.service.ask(question).answer.text == expected


def test_a_picture_that_comes_while_a_question_is_begun_belongs_to_the_next(place):
    talk, limits, how = Conversation(), Limits(), Generation()
    talk.add(place.png(0), "a.png", limits)
    first = talk.question(ASKED, limits, how)
    talk.add(place.png(1), "b.png", limits)
    talk.begin(first, ASKED)
    talk.end(first, Answer("yes", None, "stop", 1, 1))
    assert talk.question("and here?", limits, how).turns[-1] == ("human", "<image>\nand here?")


@pytest.mark.parametrize(
    ("files", "text", "expected"),
    [
        ([], ASKED, "no picture yet"),
        (["png"], "  ", "empty"),
        (["png"], "see <image> and <image>", "2 times"),
        (["png"], "a" * 20_001, "characters"),
        (["png"], "lung " * 300, "positions"),
    ],
)
def test_a_question_that_cannot_be_asked_stays_in_its_box(place, desk, files, text, expected):
    desk.show("me", [file(place.png(0)) for _ in files])
    *_, last = desk.ask("me", text)
    assert expected in last.notice and 'role="alert"' in last.notice and last.question == text and not last.busy
    assert said(desk) == []
    desk.show("me", [file(place.png(0))])
    list(desk.ask("me", ASKED))
    assert len(said(desk)) == 1


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([{"name": "a.png", "data": "@@"}], "broken base64"),
        ([{"name": "a.png"}], "larger than 32 MB"),
        ([{"name": 5, "data": "aGk="}], "is sent as"),
        (["a.png"], "is sent as"),
        ([{"name": "a.png", "data": "aGk="}], "cannot be read"),
        ([{"name": "<script>.svg", "data": base64.b64encode(b"<svg></svg>").decode()}], "&lt;script&gt;"),
        ([{"name": "a.png", "data": ""}], "is empty"),
    ],
)
def test_pictures_that_cannot_be_shown(place, desk, sent, expected):
    view = desk.show("me", [file(place.png(0)), *sent])
    assert expected in view.notice and 'role="alert"' in view.notice and "<script>" not in view.notice
    assert view.pictures.count("<li>") == 1


def test_pictures_have_limits_together(place):
    desk = Desk(Service(place.service._answerer, "small", limits=Limits(pictures=2, picture_bytes=400, pixels=700)))
    view = desk.show("a", [file(place.png(0)), file(place.png(1))])
    assert "704 pixels" in view.notice and view.pictures.count("<li>") == 1
    assert "has 3 pictures; 2 may be shown" in desk.show("b", [file(place.png(0))] * 3).notice
    assert "larger than" in desk.show("c", [file(b"a" * 401)]).notice
    desk.service.close()


def test_what_is_typed_is_text(place, desk):
    desk.show("me", [file(place.png(0))])
    *_, last = desk.ask("me", "<img src=x onerror=alert(1)>")
    assert "<img src=x" not in last.talk + last.route and "&lt;img src=x" in last.talk and "&lt;img" in last.route


@pytest.fixture
def slow(place, monkeypatch):
    """A desk whose model takes a while for each token."""
    service = Service(place.service._answerer, "slow", Generation(max_new_tokens=150), Limits(at_once=2))
    put = service_module._Said.put
    monkeypatch.setattr(service_module._Said, "put", lambda self, value: (time.sleep(0.02), put(self, value))[1])
    yield Desk(service)
    service.close()


def test_stop_keeps_what_was_said_and_a_second_question_has_to_wait(place, slow):
    slow.show("me", [file(place.png(0))])
    views = slow.ask("me", "what side")
    next(views), next(views)
    (refused,) = slow.ask("me", "again")
    assert "still on its way" in refused.notice and refused.busy is None
    slow.stop("me")
    *_, last = views
    (one,) = slow.talks.of("me").said
    assert one.answer.finish == "stopped" and one.answer.text and "(stopped)" in last.talk and not last.busy
    assert len(slow.talks.of("me").turns) == 2
    slow.stop("me"), slow.stop("nobody")


def test_what_is_stopped_before_its_first_word_was_not_asked(place, slow):
    for key in ("one", "two"):
        slow.show(key, [file(place.png(0))])
    first, second = slow.ask("one", "what side"), slow.ask("two", ASKED)
    next(first), next(second)
    slow.stop("two")
    *_, last = second
    assert said(slow, "two") == [] and last.question == ASKED and not last.busy
    (full,) = slow.ask("two", ASKED) if slow.service._places.acquire(blocking=False) else [None]
    assert "2 questions" in full.notice
    slow.service._places.release()
    first.close()


def test_a_page_that_starts_over_or_is_closed_ends_its_answer(place, slow):
    for leave in (slow.start_over, slow.forget):
        slow.show("me", [file(place.png(0))])
        views = slow.ask("me", "what side")
        next(views), next(views)
        leave("me")
        assert list(views) == [] and said(slow) == []
        answering = slow.service.ask(place.question(ASKED, 0, new=1))  # the model is free again
        assert answering.answer.new_tokens == 1


def test_users_at_once_get_their_own_answers_and_routes(place, desk):
    def talk(number):
        key = f"user {number}"
        desk.show(key, [file(place.png(number))])
        list(desk.ask(key, ASKED, with_base=True))
        (one,) = desk.talks.of(key).said
        return one.answer.text, str(one.answer.route), one.base.text

    alone = [talk(number) for number in (0, 1)]
    desk.start_over("user 0"), desk.start_over("user 1")
    found = {}
    users = [threading.Thread(target=lambda n=n: found.update({n: talk(n)})) for n in (0, 1)]
    [user.start() for user in users], [user.join() for user in users]
    assert [found[0], found[1]] == alone and alone[0] != alone[1]


def test_a_fault_in_the_model_is_said_and_the_question_stays(place, desk, monkeypatch):
    desk.show("me", [file(place.png(0))])

    def broken(*args, **more):
        raise RuntimeError("secret path")

    monkeypatch.setattr(Answerer, "ask", broken)
    *_, last = desk.ask("me", ASKED)
    assert "log" in last.notice and "secret" not in last.notice and last.question == ASKED and not last.busy
    monkeypatch.undo()
    list(desk.ask("me", ASKED))
    assert len(said(desk)) == 1


def test_only_so_many_conversations_are_kept():
    talks = Conversations(most=2)
    first = talks.of("a")
    talks.of("b"), talks.of("a"), talks.of("c")
    assert talks.holds("a", first) and len(talks) == 2 and not talks.of("b").pictures and len(talks) == 2


@pytest.fixture
def test_set(place, tmp_path):
    rows = [
        question_row(
            number, f"{number % 3}.png", f"what side {number}?", "<left>", ("abd", "chest")[number > 5], DOMAINS
        )
        for number in range(9)
    ]
    write_jsonl(tmp_path / "q.jsonl", [*rows, question_row(9, None, "text alone?", "yes", "abd", DOMAINS)])
    return tmp_path / "q.jsonl"


def test_examples_are_of_all_domains_and_begin_anew(place, test_set):
    examples = read_examples(str(test_set), str(place.images), 4, Limits())
    assert [example.domain for example in examples] == ["abd", "chest", "abd", "chest"]
    assert len({example.pictures[0][0] for example in examples}) > 1
    desk = Desk(place.service, examples)
    desk.show("me", [file(place.png(3))])
    view = desk.example("me", 1)
    assert view.question == examples[1].question and view.pictures.count("<li>") == 1
    *_, last = desk.ask("me", view.question)
    assert said(desk) == [(view.question, place.truth(view.question, examples[1].pictures[0][0][0]))]
    assert "reference: &lt;left&gt;" in last.talk
    list(desk.ask("me", "another?"))
    assert desk.talks.of("me").said[1].reference is None
    for wrong in (4, -1, "0", None, True):
        assert "no example" in desk.example("me", wrong).notice


def test_examples_that_cannot_be_read(place, test_set, tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_examples(str(test_set), str(tmp_path), 4, Limits())
    write_jsonl(tmp_path / "text.jsonl", [question_row(9, None, "text alone?", "yes", "abd", DOMAINS)])
    with pytest.raises(UserError, match="no row has a picture"):
        read_examples(str(tmp_path / "text.jsonl"), str(place.images), 4, Limits())
