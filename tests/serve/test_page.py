"""Parts of the page: routes of all kinds."""

from __future__ import annotations

from llava.serve.conversations import Said
from llava.serve.page import PICK_SCRIPT, route_part, talk_part
from llava.serve.question import Answer

TASKS = {0: "abd", 1: "abd", 2: "<chest>"}


def told(route, finish="stop", **more):
    return [Said("where?", 1, "left", Answer("left", route, finish, 9, 2), **more)]


def test_a_route_shows_posterior_slots_and_weights():
    route = {"task": "abd", "task_posterior": {"<chest>": 0.25, "abd": 0.75}, "slots": [2, 0], "weights": [0.4, 0.6]}
    part = route_part(told(route | {"novelty": 0.5, "unknown": False}), TASKS)
    assert part.index("75.0 %") < part.index("&lt;chest&gt;") < part.index("25.0 %")
    assert part.index("slot 0 · abd") < part.index("slot 2 · &lt;chest&gt;") and "0.600" in part
    assert "Novelty 0.50" in part and "unknown</span>" not in part and "<chest>" not in part


def test_an_unknown_question_a_given_task_and_the_base_are_said():
    unknown = {"task": "abd", "slots": [0], "weights": [0.0], "novelty": 1.3, "unknown": True}
    assert "unknown</span>" in route_part(told(unknown), TASKS) and "Novelty 1.30" in route_part(told(unknown), TASKS)
    given = {"task": "abd", "slots": [0], "weights": [1.0], "task_given": True}
    assert "The task was given" in route_part(told(given), TASKS)
    assert "The base model answered" in route_part(told(None), TASKS)
    assert "With each answer" in route_part([Said("where?", 1, "le")], TASKS)
    keys_alone = {"slots": [7], "weights": [1.0]}  # a method without tasks
    assert "slot 7" in route_part(told(keys_alone), {}) and "posterior" not in route_part(told(keys_alone), {})


def test_ends_of_answers_are_said():
    assert "(no more tokens were allowed)" in talk_part(told(None, "length"))
    assert "(stopped)" in talk_part(told(None, "stopped"))
    assert "(an empty answer)" in talk_part([Said("where?", 1, "", Answer("", None, "stop", 9, 1))])
    assert "about 2 pictures" in talk_part([Said("where?", 2)]) and " …" in talk_part([Said("where?", 2)])


def test_the_script_of_the_upload_has_no_numbers_of_its_own():
    assert "MOST_PICTURES" in PICK_SCRIPT and "MOST_MEGABYTES" in PICK_SCRIPT
