"""LLaVA-Med's two published figures by its own rules: accuracy on closed questions, recall on open ones.

They are kept apart from the strict ones because they are more lenient and not symmetric:

- closed: right when the prediction holds "yes" or "no" anywhere, also inside another word ("note"), and the reference
  anywhere; an answer that is neither yes nor no ("left") is never right. So its script counts since its correction; the
  first release left wrong answers out of the mean.
- open: a word that is in both counts as often as the prediction has it, a missing one as often as the reference has it.

Texts are compared in the form of that script, which is VQA-v2's with slips of its own: punctuation vanishes instead of
becoming a space where it stands beside a space anywhere in the text, or where a number has a comma; a full stop goes
unless a digit follows.
"""

from __future__ import annotations

import re
from collections import Counter

from llava.eval.metrics.base import Example, row_metric
from llava.eval.metrics.words import ARTICLES, NUMBER_WORDS

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # the script hands a flag over where the number of replacements stands
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, mark in enumerate(word) if mark == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"


def script_form(text: str) -> str:
    """A text as LLaVA-Med's script compares it."""
    lower = text.lower()
    number = _COMMA_IN_NUMBER.search(lower) is not None
    bare = lower
    for mark in _PUNCTUATION:
        vanishes = number or f"{mark} " in lower or f" {mark}" in lower
        bare = bare.replace(mark, "" if vanishes else " ")
    words = (NUMBER_WORDS.get(word, word) for word in _FULL_STOP.sub("", bare, count=_FULL_STOPS).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@row_metric("LLaVA-Med's: mean over closed rows of [the prediction holds yes or no, and the reference], as substrings")
def llava_med_closed_accuracy(example: Example) -> float | None:
    if not example.closed:
        return None
    said = script_form(example.prediction)
    return float(("yes" in said or "no" in said) and script_form(example.reference) in said)


@row_metric("LLaVA-Med's: mean over open rows of hits / (hits + missing words), a hit counted as often as it is said")
def llava_med_open_recall(example: Example) -> float | None:
    if example.closed:
        return None
    # Its script brings both texts into their form twice, which can drop a further full stop or number word.
    said, wanted = (Counter(script_form(script_form(text)).split()) for text in (example.prediction, example.reference))
    hits = sum(count for word, count in said.items() if word in wanted)
    missing = sum(count for word, count in wanted.items() if word not in said)
    return hits / (hits + missing) if hits else 0.0
