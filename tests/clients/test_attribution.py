"""Attribution tools: prompts made into embeddings first, attentions, hidden states, gradients, logits processors."""

from __future__ import annotations

import pytest
import torch
from clients.room import NEW, ROWS, TEXT_ONLY, half, one_row, open_prompt, slots_of, with_mark
from tiny_llava import HIDDEN, LAYERS
from transformers import LogitsProcessor, LogitsProcessorList

from llava.mm_utils import process_images

DOCUMENTS = {
    "one picture": (ROWS[1]["text"], ("chest1.png",)),
    "two pictures": (ROWS[4]["text"], ("head4.png", "abd0.png")),
    "no picture": (TEXT_ONLY, ()),
}
CLOSE = {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture(scope="module")
def loaded(side):
    """These tools ask for the attention that can be looked at."""
    return side.load(attn_implementation="eager")


@pytest.fixture(params=DOCUMENTS)
def asked(request, side):
    """``(prompt, question, pictures)``."""
    question, names = DOCUMENTS[request.param]
    return open_prompt(side.template, "<image>\n" * len(names) + question), question, names


def prepared(side, loaded, prompt, names):
    """The first step: ``inputs_embeds`` and mask of one prompt, or its ids where it shows nothing."""
    tokenizer, model, image_processor, _ = loaded
    images = side.opened(*names)
    pictures = process_images(images, image_processor, model.config).to(model.dtype) if images else None
    input_ids = one_row(prompt, tokenizer, model)
    attention_mask = torch.ones_like(input_ids)
    input_ids, position_ids, attention_mask, past, inputs_embeds, labels = model.prepare_inputs_labels_for_multimodal(
        input_ids, None, attention_mask, None, None, pictures, image_sizes=[image.size for image in images]
    )
    assert position_ids is None and past is None and labels is None
    assert (inputs_embeds is None) == (not names) == (input_ids is not None)
    return {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}


def test_two_steps(side, loaded, asked):
    """The embeddings of the first call are given to the second, with all that can be looked at."""
    prompt, question, names = asked
    with torch.inference_mode():
        outputs = loaded[1](
            **prepared(side, loaded, prompt, names),
            use_cache=True,
            output_attentions=True,
            output_hidden_states=True,
            return_dict=True,
        )
        expected = side.truth(prompt, question, names)
        plain = loaded[1](**prepared(side, loaded, prompt, names), route="none")
    torch.testing.assert_close(outputs.logits, expected.logits, **CLOSE)
    assert torch.allclose(outputs.logits, plain.logits, atol=1e-2) is not side.is_stage
    length = outputs.logits.shape[1]
    assert [tuple(layer.shape) for layer in outputs.attentions] == [(1, 2, length, length)] * LAYERS
    assert [tuple(layer.shape) for layer in outputs.hidden_states] == [(1, length, HIDDEN)] * (LAYERS + 1)


def test_looking_changes_nothing(side):
    """A tower that has seen pictures gives the same features after the attentions were asked for."""
    tokenizer, model, image_processor, _ = side.load()
    pictures = process_images(side.opened("chest1.png"), image_processor, model.config)
    before = model.encode_images(pictures)
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    model(inputs_embeds=embeds, route="none", output_attentions=True, output_hidden_states=True)
    assert torch.equal(model.encode_images(pictures), before)


def test_a_batch_in_two_steps(side, loaded):
    """Two prompts of different lengths with one picture each, padded by the first step."""
    tokenizer, model, image_processor, _ = loaded
    rows = ROWS[:2]
    prompts = [open_prompt(side.template, with_mark(model.config, row["text"])) for row in rows]
    ids = [one_row(prompt, tokenizer, model)[0] for prompt in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    pictures = process_images(side.opened("abd0.png", "chest1.png"), image_processor, model.config)
    with torch.no_grad():
        _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            input_ids, None, input_ids.ne(0), None, None, pictures
        )
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        truths = [
            side.truth(prompt, row["text"], [row["image"]]).logits[0] for row, prompt in zip(rows, prompts, strict=True)
        ]
    for number, expected in enumerate(truths):
        torch.testing.assert_close(logits[number][mask[number].bool()], expected, **CLOSE)


def test_the_inner_decoder(side, loaded, asked):
    """Tools that look at attentions alone call the decoder inside the language model."""
    prompt, question, names = asked
    with torch.inference_mode():
        outputs = loaded[1].model(
            **prepared(side, loaded, prompt, names), use_cache=False, output_attentions=True, return_dict=True
        )
        logits = loaded[1].lm_head(outputs.last_hidden_state)
        torch.testing.assert_close(logits, side.truth(prompt, question, names).logits, **CLOSE)
    assert len(outputs.attentions) == LAYERS


@pytest.mark.parametrize("how", ["as it is", "detached", "cloned"])
def test_the_gradient_of_a_logit(side, loaded, how):
    """By the prompt's embeddings: the greatest next logit, through the offsets of the prompt's own route."""
    question, names = DOCUMENTS["one picture"]
    prompt = open_prompt(side.template, f"<image>\n{question}")
    given = prepared(side, loaded, prompt, names)
    embeds = given["inputs_embeds"]
    if how == "detached":
        embeds = embeds.detach().requires_grad_()
    elif how == "cloned":
        embeds = embeds.clone().detach().requires_grad_()
    else:
        embeds.retain_grad()
    logits = loaded[1](**given | {"inputs_embeds": embeds}).logits[0, -1]
    logits.max().backward()

    known = embeds.detach().clone().requires_grad_()
    route = side.decided(prompt, question, names)
    expected = side.engine.model(inputs_embeds=known, attention_mask=given["attention_mask"], **route).logits[0, -1]
    expected.max().backward()
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(embeds.grad, known.grad, **CLOSE)
    assert embeds.grad.abs().sum() > 0


def test_noised_embeddings(side, loaded):
    """SmoothGrad and integrated gradients: others than the prompt's, so a stage must be told the prompt's route."""
    question, names = DOCUMENTS["one picture"]
    prompt = open_prompt(side.template, f"<image>\n{question}")
    model, given = loaded[1], prepared(side, loaded, prompt, names)
    noise = torch.randn(given["inputs_embeds"].shape, generator=torch.Generator().manual_seed(0))
    embeds = (given["inputs_embeds"] + 0.01 * noise).detach().requires_grad_()
    if side.is_stage:
        with pytest.raises(ValueError, match="route=model.last_route"):
            model(**given | {"inputs_embeds": embeds})
    logits = model(**given | {"inputs_embeds": embeds}, route=model.last_route).logits[0, -1]
    logits.max().backward()
    route = side.decided(prompt, question, names)
    expected = side.engine.model(inputs_embeds=embeds.detach(), attention_mask=given["attention_mask"], **route)
    torch.testing.assert_close(logits, expected.logits[0, -1], **CLOSE)
    assert embeds.grad.abs().sum() > 0


def test_embeddings_made_by_hand(side, loaded):
    """No prompt is known for them: a stage says so, unless it is told the query; a base takes them."""
    tokenizer, model, image_processor, _ = loaded
    question = DOCUMENTS["one picture"][0]
    prompt = open_prompt(side.template, f"<image>\n{question}")
    ids = one_row(prompt, tokenizer, model)[0]
    (place,) = (ids == -200).nonzero().flatten().tolist()
    pictures = process_images(side.opened("head2.png"), image_processor, model.config)
    embed = model.get_input_embeddings()
    with torch.inference_mode():
        features = model.encode_images(pictures)[0]
        embeds = torch.cat([embed(ids[:place]), features, embed(ids[place + 1 :])])[None]
        if side.is_stage:
            with pytest.raises(ValueError, match="give questions="):
                model(inputs_embeds=embeds)
        logits = model(inputs_embeds=embeds, **side.decided(prompt, question, ["head2.png"])).logits
        torch.testing.assert_close(logits, side.truth(prompt, question, ["head2.png"]).logits, **CLOSE)


class Shift(LogitsProcessor):
    """Forbids the token that the model likes best; notes how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


def test_logits_processors_and_scores(side, loaded):
    """``generate`` with everything it can return; the processor acts in the engine's answer in the same way."""
    tokenizer, model, image_processor, _ = loaded
    question, names = DOCUMENTS["one picture"]
    prompt = open_prompt(side.template, f"<image>\n{question}")
    pictures = half(process_images(side.opened(*names), image_processor, model.config), model)
    shift = Shift()
    output = model.generate(
        one_row(prompt, tokenizer, model),
        images=pictures,
        do_sample=False,
        max_new_tokens=NEW,
        logits_processor=LogitsProcessorList([shift]),
        output_attentions=True,
        output_hidden_states=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = side.engine.model.generate(
        one_row(prompt, side.engine.tokenizer, side.engine.model),
        images=[side.pixels(names)],
        questions=[question],
        do_sample=False,
        max_new_tokens=NEW,
        logits_processor=LogitsProcessorList([Shift()]),
    )
    steps = output.sequences.shape[1]
    assert torch.equal(output.sequences, expected)
    assert shift.calls == len(output.scores) == len(output.attentions) == len(output.hidden_states) == steps
    assert slots_of(model, 1) == slots_of(side.engine.model, 1)
