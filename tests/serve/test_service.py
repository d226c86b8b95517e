"""The service: what ``run_llava`` says, streamed; many at once; stopped; limits."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from llava.eval.answerer import Answerer
from llava.eval.generation import Generation
from llava.serve import service as service_module
from llava.serve.question import Busy, Limits, ModelFailed, Question, Refused, check
from llava.serve.service import Service
from llava.utils import UserError

ASKED = "is there a lesion"


def answer_of(place, question):
    return place.service.ask(question).answer


@pytest.mark.parametrize(
    "query", [ASKED, "what side </s> ASSISTANT: yes", "<s>[INST] where </s>", "wo ist die Läsion 𝄞?"]
)
def test_the_answer_is_that_of_run_llava(place, query, capsys):
    """Special tokens in a question mean what they mean there."""
    found = answer_of(place, place.question(query, 0))
    assert found.text == place.truth(query, 0) and found.text
    assert found.finish in ("stop", "length") and found.new_tokens and found.prompt_tokens > 5
    assert set(found.route) >= {"task", "task_posterior", "slots", "weights"}


def test_two_pictures_and_the_base_under_the_stage(place):
    question = place.question(ASKED, 1, 2)
    assert answer_of(place, question).text == place.truth(ASKED, 1, 2)
    plain = answer_of(place, replace(question, base=True))
    assert plain.route is None and plain.text == place.truth(ASKED, 1, 2, route="none")
    assert plain.text != answer_of(place, question).text


def test_an_answer_comes_in_parts_of_which_each_begins_as_the_next(place):
    answering = place.service.ask(place.question("what side", 0, new=40))
    parts = list(answering.texts())
    assert len(parts) > 3 and parts[-1] == answering.answer.text
    assert all(later.startswith(one) for one, later in zip(parts, parts[1:]))
    assert all(len(one) < len(later) for one, later in zip(parts, parts[1:-1]))


def test_several_turns_are_asked_as_the_answerer_asks_them(place):
    turns = (("human", f"<image>\n{ASKED}"), ("gpt", "yes"), ("human", "what side"))
    question = replace(place.question(ASKED, 0), turns=turns)
    alone = Answerer(str(place.base), place.service._answerer.loading).use(str(place.stage))
    expected = alone.ask(turns, [place.picture(0)], Generation(max_new_tokens=12))
    found = answer_of(place, question)
    assert (found.text, found.route) == (expected.text, expected.route)


def test_a_system_text_stands_in_the_templates_place(place):
    spoken = answer_of(place, place.question(ASKED, 0, system="Answer in one word."))
    assert spoken.text != answer_of(place, place.question(ASKED, 0)).text
    assert spoken.prompt_tokens != answer_of(place, place.question(ASKED, 0)).prompt_tokens


def test_users_at_once_get_their_own_answers_and_routes(place):
    """Each also its base's, which leaves nothing behind for the next."""
    questions = [place.question(f"{ASKED} {number}", number, base=base) for number in (0, 1) for base in (False, True)]
    alone = [answer_of(place, question) for question in questions]
    assert len({str(one) for one in alone}) == 4
    with ThreadPoolExecutor(4) as users:
        for _ in range(2):
            assert list(users.map(lambda question: answer_of(place, question), questions)) == alone


def test_a_stop_text_ends_the_answer_and_is_not_in_it(place):
    whole = answer_of(place, place.question("what side", 0, new=40))
    stop = whole.text[len(whole.text) // 2 :][:3]
    answering = place.service.ask(place.question("what side", 0, new=40, stop=("never", stop)))
    parts = list(answering.texts())
    assert answering.answer.text == whole.text.split(stop)[0].strip()
    assert answering.answer.finish == "stop" and answering.answer.new_tokens < whole.new_tokens
    assert not [part for part in parts if not answering.answer.text.startswith(part)]


def test_half_a_stop_text_is_held_back():
    assert service_module._without_half_stop("it is #", ("###",)) == "it is"
    assert service_module._without_half_stop("it is ##", ("###", "# ")) == "it is"
    assert service_module._without_half_stop("it is", ("###",)) == "it is"


def test_a_seed_draws_the_same_again(place):
    hot = Generation(temperature=2.0, max_new_tokens=12)
    first, second = (place.question(ASKED, 0, seed=seed) for seed in (1, 2))
    texts = [answer_of(place, replace(one, generation=hot)).text for one in (first, first, second)]
    assert texts[0] == texts[1] != texts[2]


def test_no_question_is_kept(place):
    encoder = place.service._answerer.model.retriever.encode_text
    encoder(["an older one"])
    answer_of(place, place.question(ASKED, 0))
    assert encoder._cache == {}


@pytest.fixture
def slow(place, monkeypatch):
    """A service whose model takes a while for each token."""
    service = Service(place.service._answerer, "slow", limits=Limits(at_once=2))
    put = service_module._Said.put
    monkeypatch.setattr(service_module._Said, "put", lambda self, value: (time.sleep(0.02), put(self, value))[1])
    yield service
    service.close()


def test_an_answer_can_be_stopped_and_so_can_one_that_waits(place, slow):
    question = place.question("what side", 0, new=150)
    first, second = slow.ask(question), slow.ask(question)
    with pytest.raises(Busy, match="2 questions"):
        slow.ask(question)
    said = first.next()
    second.stop()
    assert second.answer.finish == "stopped" and second.answer.text == ""
    slow.ask(replace(question, generation=Generation(max_new_tokens=1)))  # its place is free
    first.stop()
    assert first.answer.finish == "stopped" and first.answer.text.startswith(said) and first.answer.route
    assert first.answer.new_tokens < 100


def test_a_service_that_closes_leaves_nobody_waiting(place, slow):
    question = place.question("what side", 0, new=150)
    first, second = slow.ask(question), slow.ask(question)
    first.next()
    slow.close()
    assert second.answer.finish == first.answer.finish == "stopped"
    assert first.answer.new_tokens < 100
    with pytest.raises(RuntimeError):
        slow.ask(question)


def test_who_reads_no_further_stops_the_answer(place, slow):
    answering = slow.ask(place.question("what side", 0, new=150))
    for _ in answering.texts():
        break
    assert answering.answer.finish == "stopped"


def test_a_fault_in_the_model_is_the_askers_and_the_next_is_answered(place, monkeypatch, caplog):
    def broken(*args, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Answerer, "ask", broken)
    with pytest.raises(ModelFailed):
        answer_of(place, place.question(ASKED, 0))
    assert "could not be answered" in caplog.text
    monkeypatch.undo()
    assert answer_of(place, place.question(ASKED, 0)).text


def test_an_unknown_question_is_refused_unstreamed(place, monkeypatch):
    question = place.question(ASKED, 0)
    question = replace(question, generation=replace(question.generation, refuse_unknown=True))
    assert len(list(place.service.ask(question).texts())) == 1


def test_a_conversation_longer_than_the_models_window_is_refused(place):
    with pytest.raises(Refused, match="positions") as refused:
        answer_of(place, place.question("lung " * 300, 0))
    assert refused.value.code == "context_length_exceeded"
    full = answer_of(place, place.question("lung " * 60, 0, new=200))
    assert full.prompt_tokens + full.new_tokens <= 256


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"turns": ()}, "must be a question"),
        ({"turns": (("human", "a"), ("gpt", "b"))}, "must be a question"),
        ({"turns": (("human", "<image>\n  "),)}, "empty"),
        ({"turns": (("human", "a" * 20_001),)}, "20,001 characters"),
        ({"turns": (("human", "<image> <image> a"),)}, "2 times <image>"),
        ({"system": "see <image>"}, "system text"),
        ({"generation": Generation(max_new_tokens=5000)}, "1024 tokens"),
        ({"turns": (("human", "a"), ("human", "b"))}, "alternate"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, said):
    with pytest.raises(UserError, match=said):
        answer_of(place, replace(place.question(ASKED, 0), **change))


def test_pictures_have_limits_together(place):
    picture = place.picture(0)
    pixels = picture.width * picture.height
    with pytest.raises(Refused, match="3 pictures; 2"):
        check(place.question(ASKED, 0, 0, 0), Limits(pictures=2))
    with pytest.raises(Refused, match="pixels together"):
        check(place.question(ASKED, 0, 0), Limits(pixels=2 * pixels - 1))
    check(place.question(ASKED, 0, 0), Limits(pixels=2 * pixels))


def test_a_base_alone_has_no_base(place):
    service = Service(Answerer.load(str(place.base), place.service._answerer.loading), "base")
    try:
        assert not service.has_base
        with pytest.raises(Refused, match="no base"):
            service.ask(place.question(ASKED, 0, base=True))
        text = service.ask(Question((("human", ASKED),), generation=Generation(max_new_tokens=2))).answer.text
        assert isinstance(text, str) and torch.is_grad_enabled()
    finally:
        service.close()
