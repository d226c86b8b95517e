"""lmms-eval's model ``llava``: ``generate_until`` and ``loglikelihood`` on batches mixed with text-only documents."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from clients.room import NEW, ROWS, SUFFIX, TEXT_ONLY, half, one_row, open_prompt, slots_of, write_side_pair

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

ONE = [(row["text"], (row["image"],)) for row in ROWS]
NONE = [(TEXT_ONLY, ()), ("where is the lesion", ())]
TWO = [
    ("what side is it in each image", ("chest1.png", "head2.png")),
    ("is the lung left in both", ("abd0.png", "abd3.png")),
]
MIXED = [ONE[0], NONE[0], TWO[0], ONE[1], NONE[1], TWO[1], ONE[2]]
DOCUMENTS = {"one picture": ONE, "two pictures": TWO, "no picture": NONE, "mixed": MIXED}


class Llava:
    """The suite's model: loaded by the checkpoint's path alone, a stage finds its base by itself."""

    def __init__(self, pretrained, conv_template, batch_size=1):
        self.accelerator = Accelerator(cpu=True)
        self.device = self.accelerator.device
        name = get_model_name_from_path(pretrained)
        more = {"multimodal": True, "attn_implementation": "sdpa"}
        try:
            loaded = load_pretrained_model(pretrained, None, name, device_map="cpu", **more)
        except TypeError:
            more.pop("multimodal")
            loaded = load_pretrained_model(pretrained, None, name, device_map="cpu", **more)
        self.tokenizer, self._model, self.image_processor, self.max_length = loaded
        self.config = self._model.config
        self.model.eval()
        self.model.tie_weights()
        self.model.to(self.device)
        self.conv_template, self.batch_size = conv_template, batch_size
        self.used = []

    @property
    def model(self):
        return self.accelerator.unwrap_model(self._model)

    def padded(self, input_ids, fill):
        left = self.tokenizer.padding_side == "left"
        flipped = [torch.flip(ids, [0]) for ids in input_ids] if left else input_ids
        ids = torch.nn.utils.rnn.pad_sequence(flipped, batch_first=True, padding_value=fill)
        return torch.flip(ids, [1]) if left else ids

    def with_marks(self, context, visuals, pictures):
        if pictures is not None and len(pictures) != 0 and DEFAULT_IMAGE_TOKEN not in context:
            return " ".join([DEFAULT_IMAGE_TOKEN] * len(visuals)) + "\n" + context
        return context

    def pictures(self, visuals):
        if not visuals:
            return None
        return half(process_images(visuals, self.image_processor, self.config), self.model)

    def generate_until(self, requests):
        """``requests``: ``(context, pictures)``; the longest context first, answers in the order asked."""
        order = sorted(
            range(len(requests)), key=lambda n: (-len(self.tokenizer.encode(requests[n][0])), requests[n][0])
        )
        found = {}
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            visuals = [list(requests[number][1]) for number in chunk]
            flat = [] if any(entry is None for entry in visuals) else [one for entry in visuals for one in entry]
            pictures = self.pictures(flat)
            prompts = [
                open_prompt(self.conv_template, self.with_marks(requests[number][0], entry, pictures))
                for number, entry in zip(chunk, visuals, strict=True)
            ]
            ids = [
                tokenizer_image_token(text, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt") for text in prompts
            ]
            pad = (
                self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
            )
            input_ids = self.padded(ids, pad).to(self.device)
            output = self.model.generate(
                input_ids,
                attention_mask=input_ids.ne(pad).to(self.device),
                pad_token_id=pad,
                images=pictures,
                image_sizes=[flat[number].size for number in range(len(flat))],
                do_sample=False,
                temperature=0,
                top_p=None,
                num_beams=1,
                max_new_tokens=NEW,
                use_cache=True,
            )
            texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
            assert len(texts) == len(chunk)
            found |= dict(zip(chunk, zip(prompts, texts, slots_of(self.model, len(chunk)), strict=True), strict=True))
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, context, continuation, visuals):
        """The loss, whether the continuation is the greedy one as the suite reckons it, and the logits."""
        image_sizes = [[visual.size[0], visual.size[1]] for visual in visuals]
        pictures = self.pictures(visuals)
        conv = conv_templates[self.conv_template].copy()
        conv.append_message(conv.roles[0], self.with_marks(context, visuals, pictures))
        conv.append_message(conv.roles[1], None)
        context_ids = one_row(conv.get_prompt(), self.tokenizer, self.model)
        conv.messages[1][1] = continuation
        input_ids = one_row(conv.get_prompt(), self.tokenizer, self.model)
        labels = input_ids.clone()
        labels[0, : context_ids.shape[1]] = -100
        with torch.inference_mode():
            outputs = self.model(
                input_ids=input_ids, labels=labels, images=pictures, use_cache=True, image_sizes=image_sizes
            )
        self.used = (input_ids, labels)
        greedy = outputs["logits"].argmax(dim=-1)[:, context_ids.shape[1] : input_ids.shape[1]]
        equal = bool((greedy == input_ids[:, context_ids.shape[1] :]).all())
        return float(outputs["loss"].item()), equal, outputs["logits"]


@pytest.fixture(scope="module")
def suite(side):
    return Llava(str(side.path), side.template)


def opened(side, documents):
    return [(text, side.opened(*names)) for text, names in documents]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_generate_until(side, suite, kind, batch_size, padding_side):
    """Every document's answer is the one it gets alone, whatever stands beside it in the batch."""
    suite.batch_size, suite.tokenizer.padding_side = batch_size, padding_side
    found = suite.generate_until(opened(side, DOCUMENTS[kind]))
    for (prompt, text, slots), (question, names) in zip(found, DOCUMENTS[kind], strict=True):
        expected = side.reference(prompt, question, names)
        assert (text.strip(), slots) == (expected.text, expected.slots)
    if kind == "one picture":
        assert [text.strip() for _, text, _ in found] == side.texts(ROWS)


@pytest.mark.parametrize("kind", ["one picture", "two pictures", "no picture"])
def test_loglikelihood(side, suite, kind):
    """The whole turn with its answer in one forward pass: the loss and the logits of the question's own route."""
    engine = side.engine.model
    for context, names in DOCUMENTS[kind][:2]:
        loss, _, logits = suite.loglikelihood(context, "yes", side.opened(*names))
        input_ids, labels = suite.used
        shown = [picture.half().float() for picture in side.pixels(names)]
        with torch.inference_mode():
            told = {"input_ids": input_ids, "labels": labels, "images": [shown] if shown else None}
            expected = engine(**told, questions=[context])
            plain = engine(**told, route="none")
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert loss == pytest.approx(float(expected.loss), rel=1e-4)
        assert torch.allclose(logits, plain.logits, atol=1e-2) is not side.is_stage


def test_the_suites_post_prompt(tmp_path_factory):
    """A stage trained with an answer suffix, and a task that puts the same words behind its questions."""
    _, stage = write_side_pair(tmp_path_factory.mktemp("suffix"), "llama", SUFFIX)
    suite = Llava(str(stage.path), stage.template, batch_size=2)
    found = suite.generate_until([(f"{row['text']}\n{SUFFIX}", stage.opened(row["image"])) for row in ROWS])
    expected = stage.answers(ROWS)
    assert [(text.strip(), slots) for _, text, slots in found] == [(one.text, one.slots) for one in expected]


def test_llava_next_arguments(side):
    """The suite's models of LLaVA-NeXT: a changed config, ``modalities``, pictures in a list, a copied template."""
    name = get_model_name_from_path(str(side.path))
    more = {"multimodal": True, "attn_implementation": "sdpa", "overwrite_config": {"mm_spatial_pool_stride": 2}}
    tokenizer, model, image_processor, _ = load_pretrained_model(
        str(side.path), None, name, device_map="cpu", torch_dtype="float32", **more
    )
    assert model.config.mm_spatial_pool_stride == 2 and model.dtype == torch.float32
    for row, expected in zip(ROWS[:2], side.answers(ROWS[:2]), strict=True):
        conv = copy.deepcopy(conv_templates[side.template])
        conv.append_message(conv.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{row['text']}")
        conv.append_message(conv.roles[1], None)
        images = side.opened(row["image"])
        pictures = process_images(images, image_processor, model.config)
        output = model.generate(
            one_row(conv.get_prompt(), tokenizer, model),
            images=[picture.to(dtype=torch.float16, device=model.device) for picture in pictures],
            image_sizes=[image.size for image in images],
            modalities=["image"],
            do_sample=False,
            temperature=0,
            max_new_tokens=NEW,
        )
        text = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
        assert (text, slots_of(model, 1)[0]) == (expected.text, expected.slots)
