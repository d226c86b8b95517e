"""Many questions through the answering loop and the scores: what is in memory at the end is what was at the start.

The rows and their answers are read whole, so that each holds what its file holds; beyond that nothing may grow.
"""

import ctypes
import gc
import json
import os
from pathlib import Path

import pytest
from tiny_llava import write_base, write_images, write_stage

from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval import eval_video_qa
from llava.eval.answer_chunk import Chunk
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading, Reply

PICTURES, DOMAINS = 12, ("abd", "chest")


class Stub(Answerer):
    """Answers without the language model. Rows, pictures, tokens, queries and caches are real; notes its memory."""

    seen = 0

    def _generate(self, inputs, generation, tasks, **options):
        rows = inputs["rows"]
        self.model.retriever.encode_text([row.question for row in rows])
        self.seen += len(rows)
        if self.seen == self.first:
            self.before = resident()
        return [Reply(row, f"answer {row.id}", {"task": row.domain}) for row in rows]


def resident() -> int:
    """Bytes of this process that are in memory, after what is free went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    base = write_base(folder / "tiny-base")
    write_stage(folder / "llava-tiny", base, DOMAINS)
    write_images(folder / "images", [f"{number}.png" for number in range(PICTURES)])
    return folder


def questions(place, count):
    """A file of generated questions, all different."""
    found = place / f"questions-{count}.jsonl"
    texts = ((number, f"{number % PICTURES}.png", f"is there a lesion {number}?") for number in range(count))
    rows = (question_row(number, image, text, "yes", DOMAINS[number % 2], DOMAINS) for number, image, text in texts)
    write_jsonl(found, rows)
    return found


def scored(place, count) -> int:
    """Memory after the answers to as many questions were scored."""
    words = ["--question-file", place / f"questions-{count}.jsonl", "--answers-file", place / f"answers-{count}.jsonl"]
    eval_video_qa.main([*map(str, words), "--no-java", "--draws", "2", "--output-dir", str(place / f"scores-{count}")])
    return resident()


def answered(place, first, count) -> tuple[int, int]:
    """Memory after the first so many questions of a file, and after all of them."""
    file = questions(place, count)
    answers = place / f"answers-{count}.jsonl"
    stub = Stub(str(place / "tiny-base"), Loading(device="cpu"))
    stub.first = first
    asked = Generation(batch_size=100)
    stage = str(place / "llava-tiny")
    Chunk(str(file), read_rows(file), str(place / "images"), answers, stage, stub.base, Loading(), asked).write(
        lambda: stub, quiet=True
    )
    after = resident()
    with answers.open() as lines:
        assert [json.loads(line)["question_id"] for line in lines] == list(range(count))
    return stub.before, after


@pytest.mark.parametrize("first", [200, pytest.param(10_000, marks=pytest.mark.thorough)])
def test_memory_does_not_grow_with_the_questions_that_were_asked(place, first):
    answered(place, first, first)
    small = scored(place, first)
    before, after = answered(place, first, 10 * first)
    large = scored(place, 10 * first)
    found = [f"{size / 2**20:.0f} MiB" for size in (before, after, small, large)]
    print("answers: {} after a tenth of them, {} after all; scores: {} of a tenth, {} of all".format(*found))
    assert after < 1.1 * before and large < 1.1 * small, found
