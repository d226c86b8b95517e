"""Several requests at a time on one model, each in a thread of its own: no route reaches another's answer."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
import torch
from tiny_llava import write_base, write_stage
from transformers import TextIteratorStreamer

from llava.data.labels import conversation_ids
from llava.model.builder import load_pretrained_model

QUESTIONS = ("is there a lesion", "what side", "where is the lesion in the left lung", "is the lung in the image")
ROUNDS = 6


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    base = write_base(folder / "tiny-base")
    light = write_stage(folder / "llava-tiny_abd_chest", base)
    return load_pretrained_model(str(light), str(base), device="cpu")[:2]


def request(tokenizer, number):
    """What a worker hands over for one of the questions."""
    ids = torch.tensor([conversation_ids([("human", QUESTIONS[number])], tokenizer, "vicuna_v1", 1)[0]])
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(number))
    return {"inputs": ids, "images": picture, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def ask(model, tokenizer, number):
    answer = model.generate(**request(tokenizer, number))
    return answer.tolist(), model.last_route.slot_indices.tolist(), model.last_route.slot_weights.tolist()


def test_four_threads_answer_as_one(stage):
    tokenizer, model = stage
    alone = [ask(model, tokenizer, number) for number in range(len(QUESTIONS))]
    assert len({str(route) for _, route, _ in alone}) > 1 and len({str(answer) for answer, *_ in alone}) == len(alone)
    found = {number: [] for number in range(len(QUESTIONS))}
    together = Barrier(len(QUESTIONS))

    def work(number):
        for _ in range(ROUNDS):
            together.wait()
            found[number].append(ask(model, tokenizer, number))

    threads = [Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [alone[number]] * ROUNDS for number in found}


def test_streams_of_several_requests_at_a_time(stage):
    """As LLaVA's worker does it: ``generate`` in a thread, its text read in another."""
    tokenizer, model = stage
    expected = [
        tokenizer.decode(model.generate(**request(tokenizer, number))[0], skip_special_tokens=True)
        for number in range(len(QUESTIONS))
    ]
    streamers = [
        TextIteratorStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True, timeout=60) for _ in expected
    ]
    for number, streamer in enumerate(streamers):
        Thread(target=model.generate, kwargs={**request(tokenizer, number), "streamer": streamer}).start()
    assert ["".join(streamer) for streamer in streamers] == expected


def test_each_thread_reads_its_own_last_route(stage):
    tokenizer, model = stage
    mine = ask(model, tokenizer, 0)[1]
    seen = []
    other = Thread(target=lambda: seen.append((model.last_route.slot_indices.tolist(), ask(model, tokenizer, 2)[1])))
    other.start()
    other.join()
    assert seen[0][0] == mine and seen[0][1] != mine  # before it asked anything: the latest of all
    assert model.last_route.slot_indices.tolist() == mine
    model.detach_adapter()
    assert model.last_route is None
