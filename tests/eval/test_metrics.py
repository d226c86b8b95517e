"""Text and medical VQA metrics against values worked out by hand, and against pycocoevalcap itself."""

import math
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.metric_names import METRIC_NAMES, METRICS, metric_names
from llava.data.rows import parse_row, question_row
from llava.eval import text_metrics
from llava.eval.metrics import OVERALL, mean_statistic, metric, row_metric, score
from llava.eval.metrics.words import (
    contains,
    is_closed,
    majority_answer,
    matches,
    token_overlap,
    vqa_tokens,
)
from llava.eval.statistics import figure, resample_weights
from llava.eval.text_metrics import TextScorer, bleu_statistics, cider_statistic, plain_tokens, rouge_statistic
from llava.utils import UserError

needs_java = pytest.mark.skipif(text_metrics.find_java() is None, reason="Java is not installed")

REFERENCES = ["yes", "left lung", "the left lower lobe of the lung", "ct-scan", "no", "2.5 cm", "pleural effusions"]
PREDICTIONS = ["yes", "right lung", "lower lobe of the left lung", "", "yes", "2.5 cm (large)", "pleural effusion"]


def make_row(number, answer, domain="abd", answer_type=None):
    domains = ("abd", "chest")
    row = question_row(number, f"{number}.jpg", f"question {number}?", answer, domain, domains, answer_type=answer_type)
    return parse_row(row)


def make_answer(row, text, **metadata):
    return {"question_id": row.id, "text": text, "model_id": "m", "metadata": metadata}


def value_of(statistic):
    return float(statistic.value(statistic.rows.sum(axis=0)))


# -- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The left lung, an opacity.", ["left", "lung", "opacity"]),
        ("two masses of 2.5 cm", ["2", "masses", "of", "2.5", "cm"]),
        ("None", ["0"]),
        ("1,000 x-rays", ["1,000", "x", "rays"]),
        ("...", []),
    ],
)
def test_vqa_tokens(text, expected):
    assert vqa_tokens(text) == expected


def test_exact_match_never_counts_two_empty_texts():
    assert matches("Yes.", "yes") == 1.0
    assert matches("yes it is", "yes") == 0.0
    assert matches("", "") == matches(".", "-") == 0.0


def test_contains_is_a_substring_of_characters_as_published():
    assert contains("Yes, there is an effusion", "yes") == 1.0
    assert contains("the normal heart", "no") == 1.0  # the published rule rewards this; closed_accuracy does not
    assert contains("yes", "no") == 0.0
    assert contains("anything", "?") == 0.0


def test_token_overlap_by_hand():
    # tokens: prediction {left:2, lung:1}, reference {left:1, upper:1, lung:1, lobe:1}; matched 2
    recall, f1 = token_overlap("left left lung", "the left upper lung lobe")
    assert recall == pytest.approx(2 / 4)
    assert f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert token_overlap("", "lung") == (0.0, 0.0)


def test_majority_answer_breaks_ties_by_the_alphabet():
    assert majority_answer(["Yes", "no", "yes.", "No", "left"]) == "no"
    assert majority_answer(["", "?"]) is None


def test_closed_rows_are_told_by_answer_type_then_by_yes_or_no():
    assert is_closed(make_row(1, "left", answer_type="CLOSED"))
    assert not is_closed(make_row(1, "left"))
    assert is_closed(make_row(1, "Yes."))


# -- text metrics by hand --------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    # corpus: predictions "a b c" and "a"; references "a b d" and "a x". Unigrams 3 of 4 correct, bigrams 1 of 2;
    # lengths 4 against 5: brevity penalty exp(1 - 5/4).
    found = bleu_statistics(["a b d", "a x"], ["a b c", "a"])
    penalty = math.exp(1 - 5 / 4)
    assert value_of(found["bleu_1"]) == pytest.approx(penalty * 3 / 4)
    assert value_of(found["bleu_2"]) == pytest.approx(penalty * math.sqrt(3 / 4 * 1 / 2))
    assert value_of(found["bleu_3"]) == pytest.approx(0, abs=1e-4)


def test_rouge_by_hand():
    # LCS("the left lung", "left lung base") = 2: precision = recall = 2/3, so F = 2/3 for every beta.
    statistic = rouge_statistic(["the left lung", "a b c d", "x", ""], ["left lung base", "a c", "", ""])
    precision, recall, beta2 = 2 / 2, 2 / 4, 1.2**2
    second = (1 + beta2) * precision * recall / (recall + beta2 * precision)
    assert statistic.per_row == pytest.approx([2 / 3, second, 0.0, 0.0])


def test_cider_by_hand():
    # Four one-word references: a has document frequency 2, b and c 1. Weights: log 4 - log df. Only unigrams exist, so
    # a hit is 10/4 = 2.5 whatever the weight; "b c" against "b" has cosine 1/sqrt 2 and a bigram that weighs
    # nothing, and its two-gram length differs by 1.
    statistic = cider_statistic(["a", "a", "b", "c"], ["a", "b", "b c", "c"])
    third = 2.5 / math.sqrt(2) * math.exp(-1 / (2 * 36))
    assert statistic.per_row == pytest.approx([2.5, 0.0, third, 2.5])


def test_plain_tokens():
    assert plain_tokens("The X-ray, at 2.5 cm (50%)!") == ["the", "x-ray", "at", "2.5", "cm", "50", "%"]


# -- the real pycocoevalcap ------------------------------------------------------------------------------------------


@needs_java
def test_ptb_tokenizer_equals_pycocoevalcap():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [*REFERENCES, "The patient's x-ray (PA), 3/4 > 50%.", "Ménière’s “disease” 5 °C", "a\nb", "."]
    theirs = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    assert text_metrics.ptb_tokenize(texts) == [theirs[number][0] for number in range(len(texts))]
    assert text_metrics.ptb_tokenize(["", "yes", " ", ""]) == ["", "yes", "", ""]
    assert text_metrics.ptb_tokenize(["", "\n"]) == ["", ""]


@needs_java
def test_texts_of_which_the_ptb_tokenizer_keeps_nothing_are_empty_wherever_they_stand():
    nothing = ["\u200b", "\U0001f600", "&nbsp;", "\x00", "\ue000", "\ufffd"]
    found = text_metrics.ptb_tokenize(["yes", *nothing])
    assert found[0] == "yes" and len(found) == 1 + len(nothing)
    assert found[-1] == ""


@needs_java
@pytest.mark.slow
def test_every_text_metric_equals_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    with closing(TextScorer()) as scorer:
        tokens = scorer.tokenize(REFERENCES + PREDICTIONS)
        references, predictions = tokens[: len(REFERENCES)], tokens[len(REFERENCES) :]
        found = scorer.statistics(references, predictions)
    targets = {number: [text] for number, text in enumerate(references)}
    results = {number: [text] for number, text in enumerate(predictions)}
    bleu, _ = Bleu(4).compute_score(targets, results, verbose=0)
    assert [value_of(found[f"bleu_{order}"]) for order in (1, 2, 3, 4)] == pytest.approx(bleu)
    assert value_of(found["rouge_l"]) == pytest.approx(Rouge().compute_score(targets, results)[0])
    assert value_of(found["cider"]) == pytest.approx(Cider().compute_score(targets, results)[0])
    aggregate, segments = Meteor().compute_score(targets, results)
    assert value_of(found["meteor"]) == pytest.approx(aggregate)
    assert text_metrics.meteor_value(found["meteor"].rows) == pytest.approx(segments)


def test_meteor_by_hand():
    # "left lung" against "left lung": one chunk, perfect (its chunk is not counted) -> 1. And 5 words (2 of them
    # function words) against 6 (2), 3 content and 1 function word matched exactly in 3 chunks of 4 words.
    perfect = np.zeros(23)
    perfect[[0, 1, 4, 5, 21, 22]] = 2
    partly = np.zeros(23)
    partly[:8] = [5, 6, 2, 2, 3, 3, 1, 1]
    partly[20:] = [3, 4, 4]
    precision, recall = 2.5 / 2.75, 2.5 / 3.5
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    assert text_metrics.meteor_value(perfect) == pytest.approx(1.0)
    assert text_metrics.meteor_value(partly) == pytest.approx(mean * (1 - 0.6 * (3 / 4) ** 0.2))
    assert text_metrics.meteor_value(np.zeros(23)) == 0.0


def test_without_java_meteor_is_missing_with_a_reason_and_the_tokenizer_is_named(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    row = make_row(1, "yes")
    scores = score([row], [make_answer(row, "Yes!")])
    meteor = scores["groups"][OVERALL]["figures"]["meteor"]
    assert meteor["value"] is None
    assert "Java" in meteor["reason"]
    assert scores["tokenizer"].startswith("plain")
    assert scores["groups"][OVERALL]["figures"]["rouge_l"]["value"] == 1.0
    with pytest.raises(UserError, match="Java"):
        TextScorer(use_java=True)


def test_a_meteor_process_that_dies_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 0\n")
    broken.chmod(0o755)
    scorer = TextScorer(use_java=False)
    scorer._java, scorer.meteor_reason = str(broken), None
    with closing(scorer):
        assert "METEOR's Java process failed" in scorer.statistics(["yes"], ["yes"])["meteor"]


def test_a_dead_meteor_process_is_closed_with_a_line_still_unread(tmp_path):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 0\n")
    broken.chmod(0o755)
    process = text_metrics.MeteorProcess(str(broken))
    process._process.wait()
    process._process.stdin.write("SCORE ||| a line in the buffer ||| of a dead process\n")
    process.close()
    assert process._process.stdin.closed


def test_a_meteor_process_that_ended_before_it_was_asked_is_started_again(monkeypatch):
    class Meteor:
        started, closed = 0, 0

        def __init__(self, java):
            Meteor.started += 1
            self.ended = Meteor.started == 1

        def rows(self, references, predictions):
            return np.ones((len(references), 23))

        def close(self):
            Meteor.closed += 1

    monkeypatch.setattr(text_metrics, "MeteorProcess", Meteor)
    monkeypatch.setattr(text_metrics, "find_java", lambda: "java")
    with closing(TextScorer()) as scorer:
        scorer.start()
        scorer.statistics(["yes"], ["yes"])
        assert (Meteor.started, Meteor.closed) == (2, 1)
        scorer.statistics(["no"], ["yes"])
    assert (Meteor.started, Meteor.closed) == (2, 2)


# -- statistics and the whole score ----------------------------------------------------------------------------------


def test_bootstrap_is_seeded_and_brackets_the_mean():
    generator = np.random.default_rng(0)
    statistic = mean_statistic("mean", (generator.random(400) < 0.3).astype(float))
    found = figure(statistic, resample_weights(400, draws=2000, seed=1))
    assert found == figure(statistic, resample_weights(400, draws=2000, seed=1))
    half_width = 1.96 * math.sqrt(found["value"] * (1 - found["value"]) / 400)  # the normal approximation
    assert found["ci95"] == pytest.approx([found["value"] - half_width, found["value"] + half_width], abs=0.01)
    assert found["n"] == 400


def test_a_group_without_such_rows_has_no_value():
    found = figure(mean_statistic("mean", [1.0, 0.0], [False, False]), resample_weights(2))
    assert found["value"] is None
    assert found["n"] == 0


def test_score_by_hand():
    rows = [
        make_row(1, "Yes", answer_type="CLOSED"),
        make_row(2, "left lung", answer_type="OPEN"),
        make_row(3, "no", "chest", "CLOSED"),
        make_row(4, "no", "chest", "CLOSED"),
    ]
    train = [make_row(9, text, domain, "CLOSED") for text, domain in [("yes", "abd"), ("no", "chest"), ("No", "chest")]]
    route = {"task_posterior": {"abd": 0.9, "chest": 0.1}}
    texts = ["yes.", "the lung", "", "It is not."]
    answers = [make_answer(row, text, route=route) for row, text in zip(rows, texts, strict=True)]
    with closing(TextScorer(use_java=False)) as scorer:
        scores = score(rows, answers, train, scorer)
    overall, abd, chest = (scores["groups"][name] for name in (OVERALL, "abd", "chest"))
    assert list(scores["groups"]) == [OVERALL, "abd", "chest"]

    def value(group, name):
        return group["figures"][name]["value"]

    assert (overall["rows"], abd["rows"], chest["rows"]) == (4, 2, 2)
    assert (overall["empty_answers"], abd["empty_answers"], chest["empty_answers"]) == (1, 0, 1)
    assert value(overall, "exact_match") == 1 / 4
    assert value(overall, "closed_accuracy") == pytest.approx(1 / 3)
    assert value(overall, "closed_contains") == pytest.approx(2 / 3)  # "It is not." holds "no"
    assert value(overall, "open_recall") == 1 / 2
    assert value(overall, "open_f1") == pytest.approx(2 / 3)
    assert value(chest, "open_recall") is None
    assert value(overall, "majority_closed_accuracy") == pytest.approx(2 / 3)  # always "no"
    assert value(abd, "majority_closed_accuracy") == 1.0  # always "yes"
    assert value(overall, "route_accuracy") == 1 / 2
    assert value(abd, "answer_words") == 1.5
    assert scores["per_row"]["exact_match"] == [1.0, 0.0, 0.0, 0.0]
    assert scores["per_row"]["open_recall"] == [None, 0.5, None, None]
    assert overall["figures"]["closed_accuracy"]["n"] == 3


DOMAIN_SETS = st.sets(st.sampled_from(["abd", "chest", "head"]))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(DOMAIN_SETS, st.sampled_from(["yes", "no", "left lung"]), st.booleans()), min_size=1, max_size=8)
)
def test_a_row_counts_under_each_of_its_domains_and_overall_once(drawn):
    rows, answers = [], []
    for number, (domains, reference, right) in enumerate(drawn):
        value = {"question_id": number, "text": "q?", "gpt4_answer": reference}
        rows.append(parse_row({**value, "domain": {name: name in domains for name in ("abd", "chest", "head")}}))
        answers.append(make_answer(rows[-1], reference if right else "wrong"))
    with closing(TextScorer(use_java=False)) as scorer:
        found = score(rows, answers, rows, scorer, draws=5)
        alone = {
            name: score([rows[n] for n in mine], [answers[n] for n in mine], [rows[n] for n in mine], scorer, draws=5)
            for name in ("abd", "chest", "head")
            if (mine := [number for number, (domains, *_) in enumerate(drawn) if name in domains])
        }
    assert list(found["groups"]) == [OVERALL, *sorted(alone)]
    overall = found["groups"][OVERALL]
    assert overall["rows"] == len(rows) and overall["figures"]["exact_match"]["n"] == len(rows)
    assert overall["figures"]["exact_match"]["value"] == pytest.approx(sum(right for *_, right in drawn) / len(rows))
    assert found["rows_of_several_domains"] == sum(len(domains) > 1 for domains, *_ in drawn)
    assert found["rows_of_no_domain"] == sum(not domains for domains, *_ in drawn)
    for name, only in alone.items():  # the figures of a domain are those of its rows scored by themselves
        for group in (found["groups"][name], only["groups"][OVERALL]):
            group["figures"] = {key: value for key, value in group["figures"].items() if "nearest" not in key}
        assert found["groups"][name] == only["groups"][OVERALL]
    for number, (domains, *_) in enumerate(drawn):
        assert set(found["by_domain"][number]) == (domains if len(domains) > 1 else set())
        assert found["per_row"]["exact_match"][number] == float(drawn[number][2])
        for values in found["by_domain"][number].values():
            assert values["exact_match"] == float(drawn[number][2])


def test_rows_of_no_or_several_domains_are_left_out_of_the_route_accuracy():
    route = {"task_posterior": {"abd": 0.9, "chest": 0.1}}
    domains = [{"abd": True}, {"chest": True}, {"abd": True, "chest": True}, {"abd": False}]
    rows = [
        parse_row({"question_id": number, "text": "q?", "gpt4_answer": "yes", "domain": domain})
        for number, domain in enumerate(domains)
    ]
    with closing(TextScorer(use_java=False)) as scorer:
        found = score(rows, [make_answer(row, "yes", route=route) for row in rows], scorer=scorer, draws=5)
    figure = found["groups"][OVERALL]["figures"]["route_accuracy"]
    assert (figure["value"], figure["n"]) == (0.5, 2)
    assert "rows of no or of several domains are left out" in figure["formula"]
    assert found["groups"]["abd"]["figures"]["route_accuracy"]["n"] == 1


def test_a_given_task_is_no_routing_accuracy():
    row = make_row(1, "yes")
    route = {"task_posterior": {"abd": 1.0}, "task_given": True}
    with closing(TextScorer(use_java=False)) as scorer:
        scores = score([row], [make_answer(row, "yes", route=route)], scorer=scorer)
    assert scores["groups"][OVERALL]["figures"]["route_accuracy"]["value"] is None


def test_score_refuses_rows_it_cannot_score():
    row, other = make_row(1, "yes"), make_row(2, "no")
    with pytest.raises(UserError, match="question_id 2"):
        score([row], [make_answer(other, "no")])
    unanswered = parse_row({"question_id": 6, "image": "a.jpg", "text": "q?", "domain": {"abd": True}})
    with pytest.raises(UserError, match="question_id 6 has no reference answer"):
        score([unanswered], [make_answer(unanswered, "x")])
    with pytest.raises(UserError, match="nothing to score"):
        score([], [])


# -- the registry ------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_metrics(monkeypatch):
    """Metrics that a test registers are forgotten afterwards."""
    METRICS.names()
    monkeypatch.setattr(METRICS, "_items", dict(METRICS._items))


def scored(texts, **fields):
    rows = [make_row(number, text, **fields) for number, text in enumerate(texts)]
    answers = [make_answer(row, text) for row, text in zip(rows, texts, strict=True)]
    with closing(TextScorer(use_java=False)) as scorer:
        return score(rows, answers, (), scorer, draws=10)


def test_every_metric_that_ships_is_registered_and_has_a_formula_and_a_place_in_the_table():
    assert all(len(METRICS.get(name).formula) > 20 for name in metric_names())
    figures = scored(["yes", "left lung"])["groups"][OVERALL]["figures"]
    assert list(figures) == metric_names()
    assert metric_names()[: len(METRIC_NAMES)] == list(METRIC_NAMES)
    for name, found in figures.items():
        assert found["formula"] == METRICS.get(name).formula


def test_the_row_values_keep_their_order():
    """Files of row values are compared byte for byte when a scoring is done again."""
    captions = ["rouge_l", "cider", "llava_med_closed_accuracy", "llava_med_open_recall"]
    medical = ["exact_match", "closed_accuracy", "closed_contains", "open_exact_match"]
    medical += ["open_recall", "open_f1", "answer_words"]
    assert list(scored(["yes", "left lung"])["per_row"]) == [*captions, *medical]


def test_a_metric_of_a_group_gives_a_statistic_or_a_reason(own_metrics):
    formula = "mean over rows of [the prediction is the first one of its group]"

    @metric(formula)
    def as_the_first(group):
        if len(group.examples) < 2:
            return "one row says nothing"
        return mean_statistic(formula, [one == group.predictions[0] for one in group.predictions])

    figures = [scored(texts)["groups"][OVERALL]["figures"]["as_the_first"] for texts in (["a", "A", "b"], ["a"])]
    assert figures[0]["value"] == pytest.approx(2 / 3)
    assert figures[1] | {"formula": formula} == figures[1]
    assert (figures[1]["value"], figures[1]["reason"]) == (None, "one row says nothing")


def test_two_metrics_of_one_name_are_refused(own_metrics):
    with pytest.raises(UserError, match="two metrics are called 'exact_match': llava.eval.metrics.medical"):

        @row_metric("1", name="exact_match")
        def always_right(example):
            return 1.0

    assert "normalised prediction" in METRICS.get("exact_match").formula
