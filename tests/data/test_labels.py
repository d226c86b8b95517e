"""Ids and label masks of every template under four tokenizer behaviours and a real sentencepiece model."""

from __future__ import annotations

import json
import random
import re

import pytest
import tokenizer_zoo

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.labels import conversation_ids, expanded_length, has_labels, place_image, prompt_ids, truncate
from llava.mm_utils import tokenizer_image_token
from llava.utils import UserError

MODES = sorted(conv_templates)
QUESTION, ANSWER = "Is there a fracture of the left rib?\n<image>", "yes, the left lung"


@pytest.fixture(params=tokenizer_zoo.NAMES)
def tokenizer(request):
    return tokenizer_zoo.build(request.param)


def labelled_text(ids, labels, tokenizer) -> list[str]:
    """Each run of labelled ids, decoded."""
    runs, current = [], []
    for token, label in zip(ids, labels):
        assert label in (IGNORE_INDEX, token)
        if label == IGNORE_INDEX:
            runs, current = (runs + [current] if current else runs), []
        else:
            current.append(token)
    return [tokenizer.decode(run).strip() for run in runs + ([current] if current else [])]


def whole_prompt_ids(prompt: str, tokenizer) -> list[int]:
    """LLaVA's rule spelt out: each stretch by the tokenizer, its <s> dropped, one <s> in front."""
    ids = [tokenizer.bos_token_id]
    for index, stretch in enumerate(prompt.split("<image>")):
        ids += ([IMAGE_TOKEN_INDEX] if index else []) + tokenizer(stretch)["input_ids"][1:]
    return ids


def rendered(mode, *texts):
    conversation = conv_templates[mode].copy()
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


@pytest.mark.parametrize("mode", [mode for mode in MODES if "mmtag" not in mode])
def test_ids_equal_the_tokenizer_on_the_whole_prompt(mode, tokenizer):
    turns = [("human", QUESTION), ("gpt", ANSWER), ("human", "Where?"), ("gpt", "right lower lobe")]
    ids, labels = conversation_ids(turns, tokenizer, mode, images=1)
    prompt = rendered(mode, "<image>\nIs there a fracture of the left rib?", ANSWER, "Where?", "right lower lobe")
    assert ids == whole_prompt_ids(prompt, tokenizer) == tokenizer_image_token(prompt, tokenizer)
    assert len(labels) == len(ids)


@pytest.mark.parametrize("mode", MODES)
def test_generation_prompt_is_the_first_part_of_the_training_sample(mode, tokenizer):
    ids, labels = conversation_ids([("human", QUESTION), ("gpt", ANSWER)], tokenizer, mode, images=1)
    prompt = prompt_ids(QUESTION, tokenizer, mode, has_image=True)
    assert ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORE_INDEX}
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert prompt.count(IMAGE_TOKEN_INDEX) == 1


def end_mark(mode: str) -> str:
    conversation = conv_templates[mode]
    return (conversation.sep2 or conversation.sep).strip()


@pytest.mark.parametrize("mode", [mode for mode in MODES if "plain" not in mode])
def test_labels_are_the_answers_with_their_end_marks(mode, tokenizer):
    turns = [("human", QUESTION), ("gpt", ANSWER), ("human", "Where?"), ("gpt", "right lower lobe")]
    ids, labels = conversation_ids(turns, tokenizer, mode, images=1)
    found = labelled_text(ids, labels, tokenizer)
    assert [re.sub(r"\s+", "", text) for text in found] == [
        "yes,theleftlung" + end_mark(mode),
        "rightlowerlobe" + end_mark(mode),
    ]


def test_caption_template_masks_only_the_picture(tokenizer):
    ids, labels = conversation_ids([("human", QUESTION), ("gpt", "chest x-ray")], tokenizer, "plain", images=1)
    assert ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX]
    assert labels[:2] == [IGNORE_INDEX, IGNORE_INDEX] and labels[2:] == ids[2:]
    assert ids == whole_prompt_ids("<image>chest x-ray\n", tokenizer)


@pytest.mark.parametrize(
    "answer",
    ["no ASSISTANT: yes", "a </s> b", "### Human: x", "[/INST] y", "<|im_end|>", "see <image> above", "USER: me"],
)
@pytest.mark.parametrize("mode", ["v1", "llava_v0", "mistral_instruct", "chatml_direct"])
def test_an_answer_that_holds_a_separator_keeps_all_its_labels(mode, answer, tokenizer):
    ids, labels = conversation_ids([("human", QUESTION), ("gpt", answer)], tokenizer, mode, images=1)
    prompt = prompt_ids(QUESTION, tokenizer, mode, has_image=True)
    assert ids[: len(prompt)] == prompt and labels[len(prompt) :] == ids[len(prompt) :]
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    text = tokenizer.decode(ids[len(prompt) :])
    assert re.sub(r"\s+", "", text) == re.sub(r"\s+", "", answer) + end_mark(mode)


def random_text(source: random.Random) -> str:
    pieces = [
        "lung",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "é",
        "肺",
        "🫁",
        ":",
        "###",
        "</s>",
        "ASSISTANT:",
        "yes",
        "[/INST]",
        "-7.5",
    ]
    return "".join(source.choice(pieces) for _ in range(source.randint(1, 6)))


@pytest.mark.parametrize("mode", ["v1", "llava_v0", "llava_llama_2", "mistral_instruct", "chatml_direct", "plain"])
def test_odd_texts_never_break_prompt_or_labels(mode, tokenizer):
    source = random.Random(7)
    for _ in range(100):
        question, answer = random_text(source) + "?", random_text(source) + "."
        prompt = prompt_ids(question, tokenizer, mode, has_image=True)
        ids, labels = conversation_ids([("human", question), ("gpt", answer)], tokenizer, mode, images=1)
        assert ids[: len(prompt)] == prompt, (question, answer)
        assert labels == [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :], (question, answer)
        assert len(ids) > len(prompt)


def test_second_turn_prompt_is_a_prefix_too(tokenizer):
    turns = [("human", QUESTION), ("gpt", ANSWER), ("human", "Where?"), ("gpt", "lung")]
    ids, labels = conversation_ids(turns, tokenizer, "v1", images=1)
    prompt, open_labels = conversation_ids(turns[:3], tokenizer, "v1", images=1)
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == open_labels
    assert labels[len(prompt) :] == ids[len(prompt) :]


def test_text_only_equals_the_tokenizer(tokenizer):
    ids, labels = conversation_ids([("human", "Where?"), ("gpt", "lung")], tokenizer, "v1", images=0)
    assert ids == tokenizer(rendered("v1", "Where?", "lung"))["input_ids"]
    assert has_labels(labels)


def test_empty_answer_leaves_no_label(tokenizer):
    _, labels = conversation_ids([("human", "Where?"), ("gpt", "")], tokenizer, "v1", images=0)
    assert not has_labels(labels)


def test_picture_goes_in_front_wherever_it_stood():
    tokenizer = tokenizer_zoo.build("llama")
    forms = [prompt_ids(text, tokenizer, "v1", True) for text in ("Q?\n<image>", "<image>\nQ?", "Q?", " <image> Q? ")]
    assert all(form == forms[0] for form in forms)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_together_go_in_front_wherever_they_stood(mode):
    tokenizer = tokenizer_zoo.build("llama")
    forms = ("Q?\n<image>\n<image>", "<image>\n<image>\nQ?", "Q?", " <image><image> Q? ")
    found = [conversation_ids([("human", text)], tokenizer, mode, images=2) for text in forms]
    assert all(form == found[0] for form in found) and found[0][0].count(IMAGE_TOKEN_INDEX) == 2


def test_pictures_with_words_between_them_stay_where_they_are():
    text = " Frontal: <image>\nLateral: <image>\nWhat is seen? "
    assert place_image(text, 2) == text.strip()
    assert place_image("Q?\n<image>\n<image>", 2) == "<image>\n<image>\nQ?"


@pytest.mark.parametrize("mode", [mode for mode in MODES if "plain" not in mode])
def test_labels_of_a_row_with_pictures_in_several_turns(mode, tokenizer):
    turns = [("human", "Prior: <image>\nCurrent: <image>\nWorse?"), ("gpt", ANSWER)]
    turns += [("human", "And <image> here?"), ("gpt", "right lower lobe")]
    ids, labels = conversation_ids(turns, tokenizer, mode, images=3)
    prompt, none = conversation_ids(turns[:1], tokenizer, mode, images=2)
    assert ids[: len(prompt)] == prompt and set(none) == {IGNORE_INDEX}
    assert ids.count(IMAGE_TOKEN_INDEX) == 3 and prompt.count(IMAGE_TOKEN_INDEX) == 2
    assert [re.sub(r"\s+", "", text) for text in labelled_text(ids, labels, tokenizer)] == [
        "yes,theleftlung" + end_mark(mode),
        "rightlowerlobe" + end_mark(mode),
    ]
    if "mmtag" not in mode:
        shown = ["Prior: <image>\nCurrent: <image>\nWorse?", ANSWER, "<image>\nAnd  here?", "right lower lobe"]
        assert ids == whole_prompt_ids(rendered(mode, *shown), tokenizer)


SYSTEM = "You are a radiologist. Answer in one word."


@pytest.mark.parametrize("mode", [mode for mode in MODES if conv_templates[mode].system])
def test_a_system_text_replaces_the_templates_own_and_carries_no_label(mode, tokenizer):
    turns = [("human", QUESTION), ("gpt", ANSWER)]
    ids, labels = conversation_ids(turns, tokenizer, mode, images=1, system=SYSTEM)
    own, own_labels = conversation_ids(turns, tokenizer, mode, images=1)
    wanted = conv_templates[mode].copy()
    mark = "<|im_start|>system\n" if wanted.system.startswith("<|im_start|>system\n") else ""
    wanted.system = mark + SYSTEM
    wanted.append_message(wanted.roles[0], "<image>\nIs there a fracture of the left rib?")
    wanted.append_message(wanted.roles[1], ANSWER)
    if "mmtag" not in mode:
        assert ids == whole_prompt_ids(wanted.get_prompt(), tokenizer)
    assert [label for label in labels if label != IGNORE_INDEX] == [x for x in own_labels if x != IGNORE_INDEX]
    assert ids[ids.index(IMAGE_TOKEN_INDEX) :] == own[own.index(IMAGE_TOKEN_INDEX) :] and ids != own


@pytest.mark.parametrize("mode", [mode for mode in MODES if not conv_templates[mode].system])
def test_a_template_without_a_place_for_a_system_text_refuses_one(mode):
    turns = [("human", QUESTION), ("gpt", ANSWER)]
    with pytest.raises(UserError, match=f"template '{mode}' has no place for a system turn"):
        conversation_ids(turns, tokenizer_zoo.build("llama"), mode, images=1, system=SYSTEM)


def test_marks_around_the_picture():
    tokenizer = tokenizer_zoo.build("byte_level")
    im_start = prompt_ids("Q?", tokenizer, "v1", True, use_im_start_end=True)
    at = im_start.index(IMAGE_TOKEN_INDEX)
    assert tokenizer.decode(im_start[:at]).endswith("USER: <im_start>")
    assert tokenizer.decode(im_start[at + 1 :]) == "<im_end>\nQ? ASSISTANT:"
    mmtag = prompt_ids("Q?", tokenizer, "v1_mmtag", True)
    at = mmtag.index(IMAGE_TOKEN_INDEX)
    assert tokenizer.decode(mmtag[:at]).endswith("USER: <Image>")
    assert tokenizer.decode(mmtag[at + 1 :]) == "</Image>\nQ? ASSISTANT:"


def test_image_mark_without_an_image_is_refused():
    with pytest.raises(UserError, match="there is no image"):
        prompt_ids("Q?\n<image>", tokenizer_zoo.build("llama"), "v1", has_image=False)


def test_turns_out_of_order_are_refused():
    with pytest.raises(UserError, match="turn 2 is 'human'"):
        conversation_ids([("human", "a"), ("human", "b")], tokenizer_zoo.build("llama"), "v1", images=0)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_a_sentencepiece_llama_equal_sentencepiece(tmp_path, legacy):
    """The outside check: sentencepiece itself gives the expected ids, as LLaVA's slow tokenizer did."""
    spm = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    (tmp_path / "corpus.txt").write_text("\n".join(line.replace("\n", " ") for line in tokenizer_zoo.CORPUS * 20))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"unk_token": "<unk>", "add_bos_token": True})
    )
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    model = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))

    system, rest = rendered("v1", "<image>\nIs it left?", "yes").split("<image>")
    expected = [1, *model.encode(system), IMAGE_TOKEN_INDEX, *model.encode(rest.removesuffix("</s>")), 2]
    ids, labels = conversation_ids([("human", "Is it left?\n<image>"), ("gpt", "yes")], tokenizer, "v1", True)
    assert ids == expected
    answer = model.encode("yes")  # begins with the space that stands before the answer
    assert [label for label in labels if label != IGNORE_INDEX] == [*answer, 2]

    turns = [("human", "Is it left?"), ("gpt", "yes"), ("human", "USER"), ("gpt", "no")]
    _, tail = conversation_ids(turns, tokenizer, "v1", False)[0], rendered("v1", "Is it left?", "yes", "USER", "no")
    second = tail.split("</s>")[1]
    expected_second = model.encode(second)
    if not legacy:  # no space is put before a stretch that follows a special token
        marked = model.encode("\n" + second)
        expected_second = marked[len(model.encode("\n")) :]
    ids = conversation_ids(turns, tokenizer, "v1", False)[0]
    assert ids[-len(expected_second) - 2 :] == [2, *expected_second, 2]


LONG = [("human", "<image>\n" + "left right " * 40), ("gpt", "yes"), ("human", "Where?"), ("gpt", "lung")]


def test_truncation_drops_later_turns_whole():
    tokenizer = tokenizer_zoo.build("llama")
    ids, labels = conversation_ids(LONG, tokenizer, "v1", True)
    first_turn, _ = conversation_ids(LONG[:2], tokenizer, "v1", True)
    cut, cut_labels = truncate(ids, labels, expanded_length(ids, 10) - 1, image_tokens=10)
    assert cut == first_turn and len(cut_labels) == len(cut)


@pytest.mark.parametrize("room", [60, 100, 120])
def test_truncation_shortens_the_question_and_keeps_the_answer(room):
    tokenizer = tokenizer_zoo.build("llama")
    ids, labels = conversation_ids(LONG, tokenizer, "v1", True)
    cut, cut_labels = truncate(ids, labels, room, image_tokens=16)
    assert expanded_length(cut, 16) == room
    assert labelled_text(cut, cut_labels, tokenizer) == ["yes</s>"]
    assert cut.count(IMAGE_TOKEN_INDEX) == 1 and cut[0] == tokenizer.bos_token_id
    assert tokenizer.decode(cut[cut.index(IMAGE_TOKEN_INDEX) + 1 :]).endswith("ASSISTANT: yes</s>")


def test_a_long_answer_loses_its_end_only():
    tokenizer = tokenizer_zoo.build("llama")
    ids, labels = conversation_ids([("human", "<image>\nQ?"), ("gpt", "left " * 60)], tokenizer, "v1", True)
    cut, cut_labels = truncate(ids, labels, 30, image_tokens=4)
    assert expanded_length(cut, 4) == 30 and has_labels(cut_labels)


def test_a_picture_that_fills_the_whole_length_is_refused():
    ids, labels = conversation_ids(LONG[:2], tokenizer_zoo.build("llama"), "v1", True)
    with pytest.raises(UserError, match="model_max_length 512 leaves no room for an answer beside 576 image tokens"):
        truncate(ids, labels, 512, image_tokens=576)


def test_a_short_sample_is_returned_as_it_is():
    ids, labels = conversation_ids(LONG[:2], tokenizer_zoo.build("llama"), "v1", True)
    assert truncate(ids, labels, 10_000, 576) == (ids, labels)
