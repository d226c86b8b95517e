"""A batch of questions on a GPU, which is pretended: the CPU's answers, and what the host waits for and copies."""

import pretend_gpu
import pytest
from tiny_llava import write_base, write_images, write_stage

from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading

DOMAINS, BATCH = ("abd", "chest", "head"), 16
WORDS = "is there a lesion in the image of the left lung what side".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    write_stage(folder / "llava-tiny_abd_chest_head", write_base(folder / "tiny-base"), DOMAINS)
    write_images(folder / "images", [f"{number}.png" for number in range(BATCH)])
    rows = []
    for number in range(BATCH):
        text = " ".join(WORDS[number % 7 : number % 7 + 1 + number % 9]) + f" {number}?"
        rows.append(question_row(number, f"{number}.png", text, "yes", DOMAINS[number % 3], DOMAINS))
    write_jsonl(folder / "questions.jsonl", rows)
    return folder


class Asked:
    """An answerer that knows the questions and has seen their pictures."""

    def __init__(self, place, route=None):
        self.rows = read_rows(place / "questions.jsonl")
        self.answerer = Answerer(str(place / "tiny-base"), Loading(device="cpu"))
        self.answerer.use(str(place / "llava-tiny_abd_chest_head"), route)
        self.encoder = self.answerer.encoder(str(place / "images"))
        self.answerer.cache.look_with(self.answerer.model)
        self.ids = [self.encoder.tokens(row, answer=False)[0] for row in self.rows]
        self.expected = self.answers()

    def answers(self, tokens=4):
        """What the batch is answered, and by which routes."""
        inputs = self.answerer._inputs(self.rows, self.ids, self.encoder)
        generation = Generation(max_new_tokens=tokens, batch_size=BATCH)
        replies = self.answerer._generate(inputs, generation, [None] * BATCH)
        return [(reply.text, reply.route) for reply in replies]

    def on_gpu(self, tokens=4):
        """The same on a GPU: answers, and the log."""
        pretend_gpu.move(self.answerer.model, "cuda:0")
        with pretend_gpu.pretending(pretend_gpu.Log()) as log:
            return self.answers(tokens), log


@pytest.mark.parametrize("route", [None, "none", "keys"])
def test_answers_and_routes_are_the_cpus(place, route):
    asked = Asked(place, route)
    if asked.answerer.model.retriever is not None:
        asked.answerer.model.retriever.pool.changed()
    found, log = asked.on_gpu()
    assert found == asked.expected and len({text for text, _ in found}) > 1
    assert sum(log.kernels.values()) > 100


def ours(counter):
    """Of what was counted, that which this project causes: ``generate`` itself is transformers'."""
    return {line: count for line, count in counter.items() if "llava_arch.py" not in line and "generation/" not in line}


def test_a_batch_waits_once_for_the_gpu_and_copies_little_to_it(place):
    _, log = Asked(place).on_gpu()
    assert sum(ours(log.syncs).values()) == 1  # the answers themselves
    assert sum(ours(log.copies).values()) <= 10
    assert not log.of(log.kernels, "slots/routers", "slots/route", "slots/unknown", "slots/key_scores")


def test_a_decoding_step_waits_for_nothing_of_ours_and_a_batch_costs_few_more_kernels_than_the_base(place):
    logs = {route: [Asked(place, route).on_gpu(tokens)[1] for tokens in (2, 6)] for route in (None, "none")}
    counts = {
        route: {name: [sum(getattr(log, name).values()) for log in both] for name in ("syncs", "copies", "kernels")}
        for route, both in logs.items()
    }
    for name in ("syncs", "copies"):
        (short, long), (base_short, base_long) = counts[None][name], counts["none"][name]
        assert long - short == base_long - base_short, logs
    assert counts[None]["kernels"][1] <= 1.15 * counts["none"]["kernels"][1], logs
