"""The form in which texts are compared: what is equal, what is not, and that the form is one."""

import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava.data.raw.example import TRAIN, Example, Report
from llava.data.raw.splits import drop_repeats
from llava.eval.metrics.words import majority_answer, matches, token_overlap
from llava.eval.text_metrics import plain_tokens
from llava.normal_form import normalise, shape_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CT-Scan.", "ct scan"),
        ("  Yes,\tplease \n", "yes please"),
        ("  Is THERE a Mass-like\tlesion?? ", "is there a mass like lesion"),
        ("T2_weighted", "t2 weighted"),
        ("T2-weighted, COVID-19", "t2 weighted covid 19"),
        ("?!", ""),
        ("Ménière’s", "ménière s"),
        ("**Yes** – it is", "yes it is"),
        ("and/or", "and or"),
        ("2.5 cm", "2.5 cm"),
        ("37.50°C", "37.5 ° c"),
        ("C34.10", "c34.10"),
        ("1.2.2020", "1.2.2020"),
        ("HER2-", "her2 −"),
        ("pre- and post-operative", "pre − and post operative"),
        ("yes - 5 mm", "yes 5 mm"),
        ("...5", "5"),
    ],
)
def test_the_form_by_hand(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("HER2-", "HER2+"),
        ("HER2-", "HER2"),
        ("HER2 -", "HER2 +"),
        ("-ve", "+ve"),
        ("<5 mm", ">5 mm"),
        ("≤5", "<5"),
        ("-5", "5"),
        ("±5", "5"),
        ("3-5", "3.5"),
        ("3-5", "35"),
        ("5%", "5"),
        ("37°", "37"),
        ("1/2", "1.2"),
        ("1/2", "12"),
        ("1:2", "1.2"),
        (".5", "5"),
        ("0.5", "0 5"),
        ("1.5", "15"),
        ("1,000", "1"),
        ("10^5", "105"),
        ("10²", "102"),
        ("½", "12"),
        ("↑ density", "↓ density"),
        ("♀", "♂"),
        ("की", "का"),
        ("ปี", "ปู"),
        ("كَ", "كُ"),
        ("résumé", "resume"),
        ("か", "が"),
    ],
)
def test_other_meanings_have_other_forms(one, other):
    assert normalise(one) != normalise(other)
    assert matches(one, other) == 0.0 and matches(one, one) == 1.0
    assert majority_answer([one, one, other]) == normalise(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5.0", "5"),
        ("5.50", "5.5"),
        (".5", "0.5"),
        ("05", "5"),
        ("1,000", "1000"),
        ("1,234.50", "1234.5"),
        ("2,5 cm", "2.5 cm"),
        ("0,500", "0.5"),
        ("2·5", "2.5"),
        ("٥", "5"),
        ("१०٫५", "10.5"),
        ("5cm", "5 cm"),
        ("5-mm", "5 mm"),
        ("5 %", "5%"),
        ("−5", "-5"),
        ("3–5", "3 - 5"),
        ("< 5", "<5"),
        ("<= 5", "≤5"),
        ("+/- 5", "±5"),
        ("<5", "＜5"),
        ("STRASSE", "straße"),
        ("ΟΔΟΣ", "οδος"),
        ("nai\u0308ve", "na\u00efve"),
        ("lung\u200b", "lung"),
        ("le\u00adsion", "lesion"),
        ("\ufeffyes", "yes"),
        ("Yes.\x00", "yes"),
        ("it\ufffds", "it s"),
    ],
)
def test_one_meaning_has_one_form(one, other):
    assert normalise(one) == normalise(other) != ""
    assert matches(one, other) == 1.0


def test_texts_without_a_word_or_sign_never_match():
    for text in ("", " ", ".", "?!", "\u200b", "\ufffd", "_"):
        assert normalise(text) == "" and matches(text, text) == 0.0


TEXTS = st.one_of(st.text(), st.text(alphabet="aZ05.,-/:+<>=% ²é\u0301\u0940_'µ−–|٥\u200d"))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("HER2 -")
@example("a\u200d\u0301 a\u0301")
@example("0 - 0 / 0 : 0")
def test_the_form_is_its_own_and_does_not_depend_on_encoding_or_space(text):
    form = normalise(text)
    assert normalise(form) == form == " ".join(form.split())
    for encoding in ("NFC", "NFD"):
        assert normalise(unicodedata.normalize(encoding, text)) == form
    assert normalise(f" \t{text}\n") == form
    assert len(shape_of(text)) == len(text)


UNSEEN = re.compile("[\u034f\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Marks that show nothing: two joiners, and what chooses between forms of a letter."""


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("a\u034fb")
@example("a\ufe0fb\U000e0100")
def test_letters_and_marks_are_never_lost(text):
    def letters(of):
        decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFD", of).casefold())
        return [char for char in decomposed if unicodedata.category(char)[0] in "LM"]

    assert letters(normalise(text)) == letters(UNSEEN.sub("", text))


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e12, 1e12).map(lambda value: round(value, 6)), st.integers(0, 3))
def test_numbers_of_one_value_have_one_form(value, zeros):
    text = f"{value:.6f}"
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    assert normalise(sign + "0" * zeros + digits + "0" * zeros) == normalise(text)
    assert normalise(f"{value:,.6f}") == normalise(text)
    assert (normalise(text) == normalise(f"{value + 1:.6f}")) is (f"{value + 1:.6f}" == text)


def test_repeats_are_found_by_the_same_rule():
    def row(number, answer):
        return Example(number, "a.jpg", "What is it?", answer, "abd", TRAIN)

    answers = ["HER2-", "HER2+", "her2 +", "<5 mm", ">5 mm", "5", "5.0", "-5", "की", "का", "1/2", "1.2"]
    kept = drop_repeats([row(number, answer) for number, answer in enumerate(answers)], Report("mine"))
    assert [example.answer for example in kept] == [answer for answer in answers if answer not in ("her2 +", "5.0")]


def test_tokens_keep_marks_and_encodings_too():
    composed, decomposed = "naïve œdème", unicodedata.normalize("NFD", "naïve œdème")
    assert token_overlap(composed, decomposed) == (1.0, 1.0)
    assert plain_tokens(composed) == plain_tokens(decomposed) == ["naïve", "œdème"]
    assert plain_tokens("की <5 mm, HER2+") == ["की", "<", "5", "mm", "her2", "+"]
    assert plain_tokens("The X-ray's 2.5 cm.") == ["the", "x-ray's", "2.5", "cm"]
