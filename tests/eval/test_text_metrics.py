"""Caption metrics on thousands of generated texts that no data set would hold: equal to pycocoevalcap's own classes."""

import random
from contextlib import closing

import pytest

from llava.eval import text_metrics
from llava.eval.text_metrics import TextScorer, meteor_value, plain_tokens

PAIRS = 2000
WORDS = (
    "yes no left right lung the a of lesion ct x-ray 3.5 1,000 50% t2 (pa) patient's can't isn't no. Dr. e.g. and/or"
)
HOSTILE = [*WORDS.split(), "|||", "'", '"', "``", "--", "...", "-LRB-", "<unk>", "\\", "\t", "é", "ménière’s", "İ", "ß"]
HOSTILE += [
    "日本語",
    "رئة",
    "🫁",
    "a\u0301",
    "\u00a0",
    "\u200b",
    "0",
    "-1",
    "$5",
    "http://a.b/c?d=e&f",
    "x" * 200,
    "_",
    "#",
]


def hostile_pairs(count=PAIRS, seed=0):
    """References and predictions: disjoint, equal, overlapping, empty, one word repeated, and long."""
    draw = random.Random(seed)

    def text():
        kind = draw.random()
        if kind < 0.05:
            return ""
        words = [draw.choice(HOSTILE) for _ in range(draw.randint(30, 60) if kind > 0.97 else draw.randint(1, 7))]
        return " ".join(words if kind < 0.9 else words[:1] * draw.randint(2, 6))

    pairs = []
    for _ in range(count):
        reference, kind = text(), draw.random()
        words = reference.split()
        draw.shuffle(words)
        prediction = reference if kind < 0.15 else " ".join(words[: len(words) // 2 + 1]) if kind < 0.4 else text()
        pairs.append((reference, prediction))
    return [reference for reference, _ in pairs], [prediction for _, prediction in pairs]


def value_of(statistic):
    return float(statistic.value(statistic.rows.sum(axis=0)))


def theirs(metric, references, predictions):
    targets, results = ({number: [text] for number, text in enumerate(side)} for side in (references, predictions))
    return metric.compute_score(targets, results)


@pytest.mark.thorough
def test_counted_metrics_equal_pycocoevalcap_on_hostile_pairs():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references, predictions = ([" ".join(plain_tokens(text)) for text in side] for side in hostile_pairs())
    assert len(references) == PAIRS and sum(not text for text in predictions) > 50
    with closing(TextScorer(use_java=False)) as scorer:
        found = scorer.statistics(references, predictions)
    bleu = BleuScorer(n=4)
    for reference, prediction in zip(references, predictions, strict=True):
        bleu += (prediction, [reference])
    values, _ = bleu.compute_score(option="closest", verbose=0)
    assert [value_of(found[f"bleu_{order}"]) for order in (1, 2, 3, 4)] == pytest.approx(values, rel=0, abs=1e-12)
    cider, rows = theirs(Cider(), references, predictions)
    assert value_of(found["cider"]) == pytest.approx(cider, rel=0, abs=1e-12)
    assert found["cider"].per_row == pytest.approx(list(rows), rel=0, abs=1e-12)
    full = [number for number in range(PAIRS) if references[number] and predictions[number]]  # see ``rouge_statistic``
    _, rows = theirs(Rouge(), [references[n] for n in full], [predictions[n] for n in full])
    assert [found["rouge_l"].per_row[n] for n in full] == pytest.approx(list(rows), rel=0, abs=1e-12)


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.skipif(text_metrics.find_java() is None, reason="Java is not installed")
def test_tokens_and_meteor_equal_pycocoevalcap_on_hostile_pairs():
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references, predictions = hostile_pairs()
    texts = [text for text in dict.fromkeys([*references, *predictions]) if text]
    tokens = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    with closing(TextScorer()) as scorer:
        assert scorer.tokenize(texts) == [tokens[number][0] for number in range(len(texts))]
        references, predictions = scorer.tokenize(references), scorer.tokenize(predictions)
        meteor = scorer.statistics(references, predictions)["meteor"]
    aggregate, rows = theirs(Meteor(), references, predictions)
    assert value_of(meteor) == pytest.approx(aggregate, rel=0, abs=1e-12)
    assert meteor_value(meteor.rows) == pytest.approx(rows, rel=0, abs=1e-12)
