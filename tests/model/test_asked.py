"""The question of a rendered prompt is read back from its ids, character for character, whatever the template."""

from __future__ import annotations

import pytest
import tokenizer_zoo as zoo
import torch
from tiny_llava import FAMILIES, make_tokenizer, write_base, write_stage

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, get_conversation, plain_question
from llava.data.labels import conversation_ids
from llava.data.prompt import Prompt, PromptEncoder
from llava.mm_utils import tokenizer_image_token
from llava.model.asked import QuestionReader
from llava.model.builder import load_pretrained_model
from llava.padding import pad

TEMPLATES = sorted(mode for mode in conv_templates if "plain" not in mode)
SUFFIX = "Answer with one word."
QUESTIONS = (
    "is there a fracture of the left rib?",
    "what  side \t of\n\nthe lung",
    "Où est la lésion 肺 🫁?",
    "### what </s> USER: is ASSISTANT: this [INST] x [/INST] <|im_end|> y",
    "a ###Human: b",
    "it 's here , is n't it ?",
    "",
)
SEVERAL = (("human", "what side"), ("gpt", "the left. USER: said so"))


def read(tokenizer, ids, prompt=None, **more):
    return QuestionReader(tokenizer).read(torch.tensor([ids]), prompt=prompt, **more)[0]


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("mode", TEMPLATES)
def test_the_question_comes_back_as_the_loader_has_it(name, mode):
    """With and without a picture, after other turns, with a suffix; the stage's template is this one or another."""
    tokenizer = zoo.build(name)
    for question in QUESTIONS:
        if not question and get_conversation(mode).sep_style.name == "LLAMA_2":
            continue  # such a template leaves an empty turn out
        for pictured, before, suffix in ((True, (), ""), (False, (), SUFFIX), (True, SEVERAL, SUFFIX)):
            turns = [(who, f"{text}\n{suffix}" if suffix and who == "human" else text) for who, text in before]
            turns.append(("human", f"{question}\n{suffix}" if suffix else question))
            ids, _ = conversation_ids(turns, tokenizer, mode, pictured)
            for own in (mode, "vicuna_v1", "mistral_instruct", None):
                found = read(tokenizer, ids, {"conv_mode": own, "answer_suffix": suffix})
                assert found == plain_question(question), (question, own)


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("mode", TEMPLATES)
def test_prompts_that_llava_renders_and_tokenizes_are_read_too(name, mode):
    """``get_prompt`` and ``tokenizer_image_token``; pictures anywhere, in marks, and a system text of one's own."""
    tokenizer = zoo.build(name)
    for text in ("<image>\nwhat side", "what side\n<image>", "<image>\n<image>\nwhat side",
                 "<im_start><image><im_end>\nwhat side", "<Image><image></Image>\nwhat side"):  # fmt: skip
        for system in (None, "You are a radiologist."):
            conversation = get_conversation(mode)
            if system is not None:
                conversation.system = system
            conversation.append_message(conversation.roles[0], text)
            conversation.append_message(conversation.roles[1], None)
            assert read(tokenizer, tokenizer_image_token(conversation.get_prompt(), tokenizer)) == "what side"


@pytest.mark.parametrize("name", zoo.NAMES)
def test_pictures_between_the_words_leave_the_words_as_they_are(name):
    tokenizer = zoo.build(name)
    for text in ("is <image> as large as\n<image> now", "first <image>\nthen <image> , and which <image>"):
        for mode in TEMPLATES:
            ids, _ = conversation_ids([("human", text)], tokenizer, mode, text.count("<image>"))
            assert read(tokenizer, ids) == plain_question(text)


def test_a_demos_prompt_with_its_picture_in_a_message_is_read():
    tokenizer = zoo.build("llama")
    for mode in ("v0_mmtag", "v1_mmtag", "vicuna_v1"):
        conversation = get_conversation(mode)
        conversation.append_message(conversation.roles[0], ("what side", None, "Pad"))
        conversation.append_message(conversation.roles[1], None)
        assert read(tokenizer, tokenizer_image_token(conversation.get_prompt(), tokenizer)) == "what side"


def test_an_answer_begun_or_given_does_not_hide_its_question():
    tokenizer = zoo.build("llama")
    for mode in TEMPLATES:
        ids, _ = conversation_ids([*SEVERAL, ("human", "where")], tokenizer, mode, True)
        for more in ("The", "The left lung"):
            assert read(tokenizer, ids + tokenizer(more, add_special_tokens=False).input_ids) == "where"
        closed, _ = conversation_ids([*SEVERAL, ("human", "where"), ("gpt", "the lung")], tokenizer, mode, True)
        assert read(tokenizer, closed) == "where"


def test_labels_choose_the_turn_that_they_answer():
    """All answers labelled, as in training: the first turn. The last alone, as in scoring: the last."""
    tokenizer = zoo.build("llama")
    for mode in TEMPLATES:
        turns = [("human", "what side"), ("gpt", "left ASSISTANT: no"), ("human", "where"), ("gpt", "in the lung")]
        ids, labels = conversation_ids(turns, tokenizer, mode, True)
        assert read(tokenizer, ids, labels=torch.tensor([labels])) == "what side"
        unmasked = torch.tensor([ids]).clone()
        assert read(tokenizer, ids, labels=unmasked) == "what side"
        opened, _ = conversation_ids(turns[:3], tokenizer, mode, True)
        last = torch.tensor([[IGNORE_INDEX] * len(opened) + ids[len(opened) :]])
        assert read(tokenizer, ids, labels=last) == "where"
        assert read(tokenizer, ids, labels=torch.full((1, len(ids)), IGNORE_INDEX)) == "where"


@pytest.mark.parametrize("name", zoo.NAMES)
def test_labels_that_begin_a_token_too_early_or_too_late_mean_the_same_turn(name):
    """Masks of programs that count tokens otherwise are off by one."""
    tokenizer = zoo.build(name)
    turns = [("human", "what side"), ("gpt", "left lung"), ("human", "where"), ("gpt", "in the lung")]
    for mode in TEMPLATES:
        for count, asked in ((2, "what side"), (4, "where")):
            ids, _ = conversation_ids(turns[:count], tokenizer, mode, True)
            opened = len(conversation_ids(turns[: count - 1], tokenizer, mode, True)[0])
            for first in (opened - 1, opened, opened + 1, opened + 2):
                labels = torch.tensor([[IGNORE_INDEX] * first + ids[first:]])
                assert read(tokenizer, ids, {"conv_mode": mode}, labels=labels) == asked, (mode, first - opened)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_padding_is_no_part_of_a_question(side, masked):
    tokenizer = make_tokenizer()
    texts = ["what side", "where is the lesion in the left lung", ""]
    rows = [torch.tensor(conversation_ids([("human", text)], tokenizer, "vicuna_v1", True)[0]) for text in texts]
    ids, mask = pad(rows, side, tokenizer.pad_token_id)
    assert QuestionReader(tokenizer).read(ids, mask if masked else None) == texts
    if masked:  # whatever stands under the mask
        ids[~mask.bool()] = rows[0][-1]
        assert QuestionReader(tokenizer).read(ids, mask) == texts


def test_a_text_in_no_template_is_the_question_which_is_said_once(capsys):
    tokenizer = zoo.build("mistral")
    reader = QuestionReader(tokenizer)
    ids = torch.tensor([tokenizer("what side\nis it").input_ids + [IMAGE_TOKEN_INDEX, tokenizer.eos_token_id]])
    for _ in range(2):
        assert reader.read(ids, prompt={"conv_mode": "vicuna_v1"}) == ["what side\nis it"]
    assert capsys.readouterr().out.count("the whole of it is routed as the question") == 1
    assert read(tokenizer, [IMAGE_TOKEN_INDEX], {"conv_mode": "plain"}) == ""


# -- routes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def stage(request, tmp_path_factory):
    """``(tokenizer, model, image processor)`` of a stage over a base of each family."""
    folder = tmp_path_factory.mktemp("asked")
    base = write_base(folder / "tiny-base", family=request.param)
    light = write_stage(folder / "llava-tiny_abd_chest", base)
    return load_pretrained_model(str(light), str(base), device="cpu")[:3]


ASKED = ("is there a lesion", "what side", "where is the lesion in the left lung")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prompts(tokenizer, mode="vicuna_v1", side="left", questions=ASKED):
    rows = [torch.tensor(conversation_ids([("human", text)], tokenizer, mode, True)[0]) for text in questions]
    ids, mask = pad(rows, side)
    pictures = torch.stack(
        [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(len(ids))]
    )
    return {"attention_mask": mask.long(), "images": pictures}, ids


def same_route(route, other):
    return torch.equal(route.slot_indices, other.slot_indices) and torch.equal(route.slot_weights, other.slot_weights)


def with_and_without(model, ids, questions=ASKED, **options):
    """Answer ids and route with the questions given, and without."""
    torch.manual_seed(0)
    given = model.generate(ids, questions=list(questions), **options), model.last_route
    torch.manual_seed(0)
    read_back = model.generate(ids, **options), model.last_route
    return given, read_back


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["vicuna_v1", "v0", "mistral_instruct", "chatml_direct"])
def test_generate_routes_by_the_prompt_as_by_the_question(stage, mode, side):
    tokenizer, model, _ = stage
    more, ids = prompts(tokenizer, mode, side)
    (answers, route), (found, own) = with_and_without(model, ids, **more, **GREEDY)
    assert (
        torch.equal(answers, found) and same_route(route, own) and torch.equal(route.task_posterior, own.task_posterior)
    )
    assert len({tuple(sorted(row)) for row in route.slot_indices.tolist()}) > 1
    base = model.generate(ids, **more, **GREEDY, route="none")
    assert model.last_route is None and not torch.equal(base, answers)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_beams_and_samples_take_the_routes_of_their_questions(stage, options, number):
    tokenizer, model, _ = stage
    more, ids = prompts(tokenizer, questions=ASKED[:number])
    (answers, route), (found, own) = with_and_without(model, ids, ASKED[:number], **more, **{**GREEDY, **options})
    assert torch.equal(answers, found) and same_route(route, own)


def test_what_else_generate_gives_is_given(stage):
    """And nothing of it changes what comes later."""
    tokenizer, model, _ = stage
    more, ids = prompts(tokenizer)
    seen, before = [], model.vision_features(more["images"])
    out = model.generate(
        ids, **more, **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True,
        output_hidden_states=True, logits_processor=[lambda _, scores: seen.append(len(scores)) or scores],
    )  # fmt: skip
    given = model.generate(
        ids, questions=list(ASKED), **more, **GREEDY, return_dict_in_generate=True, output_logits=True
    )
    assert len(out.scores) == 4 and seen == [3] * 4 and len(out.hidden_states) == 4
    assert all(torch.equal(a, b) for a, b in zip(out.logits, given.logits, strict=True))
    after = model.vision_features(more["images"])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True))


@torch.inference_mode()
def test_forward_routes_by_the_prompt(stage):
    tokenizer, model, _ = stage
    more, ids = prompts(tokenizer, side="right")
    given = model(ids, questions=list(ASKED), **more).logits
    assert torch.equal(model(ids, **more).logits, given)
    query = model.retriever.encode_questions(ASKED)
    assert torch.equal(model(ids, text_query=query, **more).logits, given)
    assert not torch.allclose(model(ids, route="none", **more).logits, given, atol=1e-2)
    alone = model(ids[:1][more["attention_mask"][:1].bool()][None], images=more["images"][:1]).logits
    torch.testing.assert_close(alone[0], given[0, : alone.shape[1]], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_text_alone_is_routed_too(stage):
    tokenizer, model, _ = stage
    rows = [torch.tensor(conversation_ids([("human", text)], tokenizer, "v0", False)[0]) for text in ASKED]
    ids, mask = pad(rows, "right")
    found = model(ids, attention_mask=mask.long()).logits
    assert torch.equal(found, model(ids, attention_mask=mask.long(), questions=list(ASKED)).logits)
    assert not torch.allclose(found, model(ids, attention_mask=mask.long(), route="none").logits, atol=1e-2)


def test_a_trainers_batch_is_routed_by_its_first_questions(stage):
    """``model(**batch)`` of a program that knows nothing of routes, several turns and all answers labelled."""
    tokenizer, model, _ = stage
    turns = [("human", "what side"), ("gpt", "left"), ("human", "where is the lesion"), ("gpt", "in the lung")]
    ids, labels = (torch.tensor([part]) for part in conversation_ids(turns, tokenizer, "vicuna_v1", True))
    batch = {"input_ids": ids, "labels": labels, "images": torch.randn(1, 3, 16, 16)}
    found = model(**batch).loss
    assert torch.equal(found, model(**batch, questions=["what side"]).loss)
    assert not torch.equal(found, model(**batch, questions=["where is the lesion"]).loss)


@torch.inference_mode()
def test_the_stages_suffix_is_no_part_of_the_question(stage):
    tokenizer, model, processor = stage
    prompt = Prompt("vicuna_v1", answer_suffix=SUFFIX)
    before = dict(model.config.prompt)
    encoder = PromptEncoder(prompt, tokenizer, processor, model.config)
    ids = torch.tensor([encoder.conversation([("human", f"{DEFAULT_IMAGE_TOKEN}\nwhat side")], True)[0]])
    more = {"images": torch.randn(1, 3, 16, 16)}
    try:
        prompt.tell(model.config)
        assert torch.equal(model(ids, **more).logits, model(ids, questions=["what side"], **more).logits)
    finally:
        model.config.prompt = before
    other = model(ids, questions=[f"what side\n{SUFFIX}"], **more).logits
    assert torch.equal(model(ids, **more).logits, other)


def test_pictures_alone_need_no_question(stage, monkeypatch):
    tokenizer, model, _ = stage
    monkeypatch.setattr(model, "tokenizer", None)
    more, ids = prompts(tokenizer)
    with pytest.raises(ValueError, match="knows no tokenizer"):
        model(ids, **more)
    settings = model.retriever.settings
    monkeypatch.setattr(type(settings), "uses_text", property(lambda self: False))
    monkeypatch.setattr(model.retriever, "router_name", "keys")
    model.retriever.pool.changed()
    try:
        model.generate(ids, **more, **GREEDY)
        assert model.last_route is not None
    finally:
        model.retriever.pool.changed()


def test_what_is_no_route_is_refused(stage):
    tokenizer, model, _ = stage
    more, ids = prompts(tokenizer)
    with pytest.raises(ValueError, match="route is 'chest'; give a Route, or 'none'"):
        model(ids, route="chest", **more)
    with pytest.raises(ValueError, match=r"1 question\(s\) for 3 prompt\(s\)"):
        model(ids, questions=["what side"], **more)
