"""Answers on a real GPU: those of the CPU, alone as in a batch, in every type, and with few waits of our making."""

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_llava import write_base, write_images, write_stage
from tiny_world import run_main

from llava.data.answers import read_answers
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval import model_vqa_loader
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading
from llava.eval.question_cache import QuestionCache
from llava.slots.pool import Pool

DOMAINS, ROWS, TOKENS = ("abd", "chest", "head"), 24, 6
WORDS = "is there a lesion in the image of the left lung what side".split()
OURS = set((Path(__file__).resolve().parents[2] / "llava").rglob("*.py"))
HALVES = (torch.bfloat16, torch.float16)


class Place:
    """A base, two stages over it that differ in where their offsets act, and questions."""

    def __init__(self, folder):
        self.folder, self.images = folder, str(folder / "images")
        base = write_base(folder / "tiny-base")
        self.base = str(base)
        self.stages = {"all": write_stage(folder / "llava-tiny_all", base, DOMAINS)}
        self.stages["question"] = write_stage(folder / "llava-tiny_question", base, DOMAINS)
        slots = Pool.read(self.stages["question"] / "slots.pth")
        slots.settings.offset_scope = "question"
        slots.write(self.stages["question"] / "slots.pth")
        write_images(folder / "images", [f"{number}.png" for number in range(ROWS // 3)])
        rows = []
        for number in range(ROWS):
            text = " ".join(WORDS[number % 7 : number % 7 + 1 + number % 9]) + f" {number}?"
            rows.append(question_row(number, f"{number // 3}.png", text, "yes", DOMAINS[number % 3], DOMAINS))
        write_jsonl(folder / "questions.jsonl", rows)
        self.rows = read_rows(folder / "questions.jsonl")

    def answerer(self, scope="all", route=None, prefixes=False, **loading):
        cache = QuestionCache(prefixes=prefixes)
        return Answerer(self.base, Loading(**loading), cache).use(str(self.stages[scope]), route)

    def ask(self, answerer, batch_size, done=0):
        """Texts, and the slots of each route."""
        generation = Generation(max_new_tokens=TOKENS, batch_size=batch_size, workers=2)
        replies = list(answerer.answer(self.rows, generation, self.images, done))
        return [reply.text for reply in replies], [reply.route and reply.route["slots"] for reply in replies]


@pytest.fixture(scope="module")
def place(device, tmp_path_factory):
    return Place(tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("scope", ["all", "question"])
def test_answers_in_float32_are_the_cpus(place, device, scope):
    found = place.ask(place.answerer(scope, device=device, dtype=torch.float32, tf32=False), 8)
    assert found == place.ask(place.answerer(scope, device="cpu"), 8)
    assert len(set(found[0])) > 3


@pytest.mark.parametrize("scope", ["all", "question"])
@pytest.mark.parametrize("route", [None, "keys", "oracle", "none"])
def test_a_batch_changes_no_answer(place, device, scope, route):
    answerer = place.answerer(scope, route, device=device, dtype=torch.float32, tf32=False)
    alone = place.ask(answerer, 1)
    assert place.ask(answerer, 7) == alone and place.ask(answerer, ROWS) == alone
    assert place.ask(answerer, 7, done=10) == tuple(part[10:] for part in alone)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scope", ["all", "question"])
def test_half_precision_answers_and_routes_each_question_alike_in_a_batch(place, device, scope, dtype):
    answerer = place.answerer(scope, device=device, dtype=dtype)
    assert answerer.model.dtype == dtype
    (alone, routes), (batched, others) = (place.ask(answerer, size) for size in (1, ROWS))
    alike = sum(one == other for one, other in zip(alone, batched, strict=True))
    print(f"{dtype}, scope {scope}: {alike} of {ROWS} answers of a batch are those of a batch of one")
    assert routes == others and alike >= ROWS // 2


def test_a_kept_prefix_changes_no_answer(place, device):
    """In scope ``question`` a picture's keys and values are computed once, whatever is asked about it."""
    answerer = place.answerer("question", prefixes=True, device=device, dtype=torch.float32, tf32=False)
    kept = place.ask(answerer, 8)
    assert len(answerer.model.prefixes) == len({row.images for row in place.rows if row.images})
    answerer.model.prefixes = None
    assert place.ask(answerer, 8) == kept


def test_a_device_map_changes_no_answer(place, device):
    answerer = place.answerer(device=device, device_map="auto", dtype=torch.float32, tf32=False)
    assert answerer.model.device.type == device
    assert place.ask(answerer, 8) == place.ask(place.answerer(device="cpu"), 8)


def test_the_loader_without_a_word_of_devices_answers_as_with_one(place, device, tmp_path):
    words = ["--model-path", place.stages["all"], "--model-base", place.base, "--image-folder", place.images]
    words += ["--question-file", place.folder / "questions.jsonl", "--max-new-tokens", TOKENS, "--batch-size", 8]
    texts = []
    for name, more in (("default", []), ("named", ["--device", device])):
        run_main(model_vqa_loader.main, *words, "--answers-file", tmp_path / f"{name}.jsonl", *more)
        texts.append([answer["text"] for answer in read_answers(tmp_path / f"{name}.jsonl")])
    assert texts[0] == texts[1] and len(texts[0]) == ROWS


def waits(place, answerer, tokens):
    """Lines of this project at which the host waits for the GPU in one batch; a plain copy to it is a wait too."""
    generation = Generation(max_new_tokens=tokens, batch_size=ROWS)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            list(answerer.answer(place.rows, generation, place.images))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [one for one in said if "synchronizing CUDA operation" in str(one.message)]
    places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found if Path(one.filename) in OURS)
    print(f"waits: {len(found)} for {tokens} tokens, of ours {dict(places)}")
    return places


def test_a_batch_waits_seldom_for_the_gpu_and_a_token_never_for_us(place, device):
    if device == "cpu":
        pytest.skip("a CPU is never waited for")
    answerer = place.answerer(device=device)
    answerer.model.generation_config.min_new_tokens = 6
    place.ask(answerer, ROWS)  # all pictures are seen, all slots lie on the device
    short = waits(place, answerer, 6)
    answerer.model.generation_config.min_new_tokens = 12
    assert waits(place, answerer, 12) == short and sum(short.values()) <= 2
