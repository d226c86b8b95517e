"""LLaVA's chat in the terminal (``serve.cli``) and its ``model_worker``: several turns, streamers, a thread."""

from __future__ import annotations

import base64
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from clients.room import NEW, ROWS, TEXT_ONLY, half, one_row, open_prompt, slots_of, with_mark
from transformers import TextIteratorStreamer, TextStreamer

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    WORKER_HEART_BEAT_INTERVAL,
)
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import get_model_name_from_path, load_image_from_base64, process_images
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init

TALK = ("is there a lesion in the image of the abdomen?", "what side", "where is the lesion")


def load(side):
    """As the terminal's chat loads: the quantisation flags by place, the device by name."""
    disable_torch_init()
    name = get_model_name_from_path(str(side.path))
    base = None if side.base is None else str(side.base)
    return load_pretrained_model(str(side.path), base, name, False, False, device="cpu")


def test_the_chat_in_the_terminal(side, capsys):
    """Three questions about one picture, each answered with what was said before and streamed while it is made."""
    tokenizer, model, image_processor, _ = load(side)
    (image,) = side.opened("abd0.png")
    pictures = half(process_images([image], image_processor, model.config), model)
    conv, turns = conv_templates[side.template].copy(), []
    for number, question in enumerate(TALK):
        conv.append_message(conv.roles[0], question if number else with_mark(model.config, question))
        conv.append_message(conv.roles[1], None)
        input_ids = one_row(conv.get_prompt(), tokenizer, model)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        capsys.readouterr()
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids,
                images=pictures,
                image_sizes=[image.size],
                do_sample=False,
                temperature=0,
                max_new_tokens=NEW,
                streamer=streamer,
                use_cache=True,
            )
        outputs = tokenizer.decode(output_ids[0], skip_special_tokens=True).strip()
        assert capsys.readouterr().out.strip() == outputs
        conv.messages[-1][-1] = outputs
        turns.append(("human", question if number else f"<image>\n{question}"))
        expected = side.ask(turns, ["abd0.png"])
        assert (outputs, slots_of(model, 1)[0]) == (expected.text, expected.slots)
        turns.append(("gpt", expected.text))


class Worker:
    """What ``model_worker`` does with the model; the web around it is left out."""

    def __init__(self, side, folder):
        base = None if side.base is None else str(side.base)
        self.name = str(side.path).split("/")[-1]
        self.tokenizer, self.model, self.image_processor, self.context_len = load_pretrained_model(
            str(side.path), base, self.name, False, False, device="cpu", use_flash_attn=False
        )
        self.device = "cpu"
        self.is_multimodal = "llava" in self.name.lower()

    @torch.inference_mode()
    def stream(self, params):
        """Chunks of JSON, each the whole text so far."""
        model, prompt, images = self.model, params["prompt"], params.get("images")
        told, image_args, taken = prompt, {}, 0
        if images and self.is_multimodal:
            if len(images) != prompt.count(DEFAULT_IMAGE_TOKEN):
                raise ValueError("Number of images does not match number of <image> tokens in prompt")
            images = [load_image_from_base64(image) for image in images]
            sizes = [image.size for image in images]
            pictures = half(process_images(images, self.image_processor, model.config), model)
            mark = DEFAULT_IMAGE_TOKEN
            if getattr(model.config, "mm_use_im_start_end", False):
                mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
            prompt = prompt.replace(DEFAULT_IMAGE_TOKEN, mark)
            taken = prompt.count(mark) * model.get_vision_tower().num_patches
            image_args = {"images": pictures, "image_sizes": sizes}
        temperature, stop = float(params.get("temperature", 1.0)), params.get("stop", "")
        room = getattr(model.config, "max_position_embeddings", 2048)
        input_ids = one_row(prompt, self.tokenizer, model).to(self.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=5)
        new = min(int(params.get("max_new_tokens", 256)), 1024, room - input_ids.shape[-1] - taken)
        thread = Thread(
            target=model.generate,
            kwargs=dict(
                inputs=input_ids,
                do_sample=temperature > 0.001,
                temperature=temperature,
                top_p=float(params.get("top_p", 1.0)),
                top_k=int(params.get("top_k", 50)),
                repetition_penalty=float(params.get("repetition_penalty", 1.0)),
                max_new_tokens=new,
                streamer=streamer,
                use_cache=True,
                **image_args,
            ),
        )
        thread.start()
        for text in streamer:
            told += text
            if stop and told.endswith(stop):
                told = told[: -len(stop)]
            yield json.dumps({"text": told, "error_code": 0}).encode() + b"\0"
        thread.join()

    def answer(self, params):
        """The last chunk's text without the prompt."""
        *_, last = self.stream(params)
        return json.loads(last.removesuffix(b"\0"))["text"].removeprefix(params["prompt"]).strip()


@pytest.fixture(scope="module")
def worker(side, tmp_path_factory):
    return Worker(side, tmp_path_factory.mktemp("worker"))


def params(side, *turns, pictures=()):
    """What the web server sends."""
    conv = conv_templates[side.template]
    stop = conv.sep if conv.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT) else conv.sep2
    images = [base64.b64encode((side.images / name).read_bytes()).decode() for name in pictures]
    sent = {"prompt": open_prompt(side.template, *turns), "temperature": 0, "top_p": 0.7, "max_new_tokens": NEW}
    return sent | {"stop": stop} | ({"images": images} if images else {})


def test_the_workers_stream_with_one_picture(side, worker):
    asked = params(side, f"<image>\n{TALK[0]}", pictures=["abd0.png"])
    expected = side.ask([("human", f"<image>\n{TALK[0]}")], ["abd0.png"])
    assert worker.answer(asked) == expected.text


def test_the_workers_stream_over_several_turns(side, worker):
    """The second question decides; the first and its answer stand before it."""
    turns = (f"<image>\n{TALK[0]}", "yes", TALK[1])
    expected = side.ask(list(zip(("human", "gpt", "human"), turns, strict=True)), ["abd0.png"])
    assert worker.answer(params(side, *turns, pictures=["abd0.png"])) == expected.text


def test_the_workers_stream_with_two_pictures(side, worker):
    """Two pictures in one turn, and one in each of two turns; a picture more than the prompt shows is refused."""
    shown = ["chest1.png", "head2.png"]
    one_turn = (f"<image>\n<image>\n{TALK[1]}",)
    two_turns = (f"<image>\n{TALK[0]}", "yes", f"<image>\n{TALK[1]}")
    for turns in (one_turn, two_turns):
        expected = side.ask(list(zip(("human", "gpt", "human"), turns, strict=False)), shown)
        assert worker.answer(params(side, *turns, pictures=shown)) == expected.text
    with pytest.raises(ValueError, match="does not match"):
        worker.answer(params(side, f"<image>\n{TALK[0]}", pictures=shown))


def test_the_workers_stream_without_a_picture(side, worker):
    """Neither ``images`` nor ``image_sizes`` is given."""
    assert worker.answer(params(side, TEXT_ONLY)) == side.ask([("human", TEXT_ONLY)], []).text


def test_several_streams_at_once(side, worker):
    """The worker answers up to five questions at a time, each in a thread of its own; no route gets into another's."""
    rows = [*ROWS, *ROWS]
    asked = [params(side, f"<image>\n{row['text']}", pictures=[row["image"]]) for row in rows]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(5) as users:
            found = list(users.map(worker.answer, asked))
    finally:
        sys.setswitchinterval(interval)
    assert found == side.texts(rows[: len(ROWS)]) * 2


def test_the_workers_surroundings(tmp_path, monkeypatch):
    """What the worker takes from ``llava`` beside the model."""
    import asyncio

    from llava.utils import build_logger, pretty_print_semaphore, server_error_msg

    monkeypatch.chdir(tmp_path)
    logger = build_logger("model_worker_of_a_test", f"{tmp_path / 'worker.log'}")
    logger.info("loading")
    assert WORKER_HEART_BEAT_INTERVAL > 0 and server_error_msg
    assert "value=5" in pretty_print_semaphore(asyncio.Semaphore(5)) and pretty_print_semaphore(None) == "None"
