"""The six guarantees of the design, bit for bit, on stages that the real training code has trained.

Every prefix of every order of the four tasks is trained once (64 short stages); the tests compare their files.
"""

import hashlib
import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_world import ASKED, TASKS, fit, merge, same, same_slots, write_sequence

from llava.data.labels import prompt_ids
from llava.data.rows import read_rows
from llava.image_io import load_image
from llava.mm_utils import process_images
from llava.model.builder import attach_slots, load_pretrained_model
from llava.slots.edit import merge as merge_slots
from llava.slots.edit import remove as remove_tasks
from llava.slots.pool import Pool

ORDERS = list(itertools.permutations(TASKS))
NEW_TOKENS = 6


class Stages:
    """Stages by the order in which their tasks were trained, trained on demand from the stage before."""

    def __init__(self, world, folder):
        self.world, self.folder = world, folder

    def folder_of(self, order):
        return self.folder / ("llava-tiny_" + "_".join(order))

    def slots(self, *order) -> Pool:
        stage = self.folder_of(order)
        if not stage.exists():
            previous = None
            if order[:-1]:
                self.slots(*order[:-1])
                previous = self.folder_of(order[:-1])
            self.world.train(order[-1], stage, previous)
        return Pool.read(stage / "slots.pth")

    def bytes(self, *order) -> dict[str, bytes]:
        self.slots(*order)
        return slot_bytes(self.folder_of(order))


def slot_bytes(stage) -> dict[str, bytes]:
    """All files of a stage's slots."""
    return {file.name: file.read_bytes() for file in (stage / "slots.pth", *(stage / "slots").iterdir())}


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory):
    return Stages(world, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def base_digest(world):
    """Of the base before any stage of this module was trained."""
    return hashlib.sha256((world.base / "model.safetensors").read_bytes()).hexdigest()


class Model:
    """A loaded checkpoint that answers rows in batches of any make-up."""

    def __init__(self, world, path):
        loaded = load_pretrained_model(str(path), str(world.base), device="cpu")
        self.tokenizer, self.model, self.processor, _ = loaded
        self.images = world.folder / "images"

    def batch(self, rows):
        ids = [prompt_ids(row.question, self.tokenizer, "vicuna_v1", row.image is not None) for row in rows]
        length = max(map(len, ids))
        padded, mask = torch.zeros(len(rows), length).long(), torch.zeros(len(rows), length).long()
        for number, row_ids in enumerate(ids):
            padded[number, length - len(row_ids) :] = torch.tensor(row_ids)
            mask[number, length - len(row_ids) :] = 1
        images = [None if row.image is None else self.picture(row.image) for row in rows]
        return {"input_ids": padded, "attention_mask": mask, "images": images}

    def picture(self, name):
        return process_images([load_image(self.images / name)], self.processor, self.model.config)[0]

    def answer(self, rows):
        """Per row: its new tokens up to the end mark, the first token's logits, and the route."""
        output = self.model.generate(
            **self.batch(rows),
            questions=[row.question for row in rows],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        route = self.model.last_route
        answers = []
        for number, tokens in enumerate(output.sequences.tolist()):
            end = tokens.index(2) if 2 in tokens else len(tokens)
            decision = None
            if route is not None:
                decision = route.slot_indices[number], route.slot_weights[number], route.task_posterior[number]
            answers.append((tokens[:end], output.scores[0][number], decision))
        return answers


@pytest.fixture(scope="module")
def rows(world):
    """The test questions, and one of them without its picture."""
    found = read_rows(world.folder / "test.jsonl")
    bare = found[1].raw | {"image": None, "question_id": "bare", "text": ASKED[0] + "?"}
    bare = {name: value for name, value in bare.items() if name != "image"}
    from llava.data.rows import write_jsonl

    write_jsonl(world.folder / "bare.jsonl", [bare])
    return [*found, *read_rows(world.folder / "bare.jsonl")]


@pytest.fixture(scope="module")
def trained(world, stages):
    """The model after all four tasks."""
    stages.slots(*TASKS)
    return Model(world, stages.folder_of(TASKS))


# -- 1. isolation ------------------------------------------------------------------------------------------------------


def test_training_a_task_leaves_every_other_task_as_it_was(stages, world):
    initial = Pool.read(world.keys)
    for end in range(1, len(TASKS) + 1):
        after = stages.slots(*TASKS[:end])
        assert [task.name for task in after.tasks] == list(TASKS[:end])
        for task in TASKS[: end - 1]:
            assert same_slots(after.task(task), stages.slots(*TASKS[: end - 1]).task(task))
        new, begun = after.task(TASKS[end - 1]), initial.task(TASKS[end - 1])
        assert same(new.text_keys, begun.text_keys) and same(new.image_keys, begun.image_keys)
        assert new.trained and not begun.trained
        assert not same(new.A, begun.A) and not same(new.B, begun.B)  # it did learn
        assert all(slot.abs().max() > 0 for slot in new.A["o_proj"])


def test_training_leaves_the_base_as_it_was(base_digest, stages, world, tmp_path):
    whole = tmp_path / "llava-whole"
    world.train("abd", whole, None, "--save_full_model", "True")
    assert hashlib.sha256((world.base / "model.safetensors").read_bytes()).hexdigest() == base_digest
    before, after = load_file(world.base / "model.safetensors"), load_file(whole / "model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert slot_bytes(whole) == stages.bytes("abd")


# -- 2. order invariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_of_tasks_ends_in_the_same_bytes(stages, order):
    for end in range(1, len(TASKS) + 1):
        in_slot_order = tuple(task for task in TASKS if task in order[:end])
        assert stages.bytes(*order[:end]) == stages.bytes(*in_slot_order)


# -- 3. exact removal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", TASKS)
def test_a_removed_task_was_never_there(stages, gone, world, rows, tmp_path):
    others = tuple(task for task in TASKS if task != gone)
    left = remove_tasks(stages.slots(*TASKS), [gone])
    left.write_stage(tmp_path / "slots.pth")
    assert slot_bytes(tmp_path) == stages.bytes(*others)


def test_a_task_removed_from_a_loaded_model_leaves_no_trace(stages, world, rows):
    others = tuple(task for task in TASKS if task != "chest")
    stages.slots(*TASKS), stages.slots(*others)
    model, never = Model(world, stages.folder_of(TASKS)), Model(world, stages.folder_of(others))
    before = model.answer(rows)
    model.model.retriever.pool.remove("chest")
    after, expected = model.answer(rows), never.answer(rows)
    assert same(after, expected)
    assert not same(before, expected)
    with pytest.raises(ValueError, match="no slots for task 'chest'"):
        model.model.generate(
            **model.batch(rows[:1]), questions=[rows[0].question], tasks=["chest"], max_new_tokens=1, pad_token_id=0
        )


# -- 4. composition ----------------------------------------------------------------------------------------------------


def test_tasks_trained_apart_and_merged_equal_the_sequence(stages, world, tmp_path):
    """Each hospital has its own copy of the base, its own data alone, and its own key file."""
    places = []
    for task in TASKS:
        home = tmp_path / task
        shutil.copytree(world.base, home / world.base.name)
        shutil.copytree(world.folder / "images", home / "images")
        shutil.copyfile(world.folder / f"train_{task}.jsonl", home / f"train_{task}.jsonl")
        sequence = home / "tiny.json"
        sequence.write_text(world.sequence.read_text().replace(str(world.folder), str(home)))
        key_file = fit(home, home / world.base.name, sequence, task)
        merge(home, sequence, key_file)
        apart = type(world)(home, home / world.base.name, sequence, home / "keys" / "merged_prompt_key.pth")
        apart.train(task, home / f"llava-tiny_{task}")
        places.append(home / f"llava-tiny_{task}")
    merged, sequence = merge_slots(places[::-1]), stages.slots(*TASKS)
    assert [task.name for task in merged.tasks] == list(TASKS)
    assert all(same_slots(merged.task(task), sequence.task(task)) for task in TASKS)
    merged.base = sequence.base  # the same base under another path
    merged.write_stage(tmp_path / "slots.pth")
    assert slot_bytes(tmp_path) == stages.bytes(*TASKS)


def test_keys_do_not_depend_on_the_order_or_company_in_which_they_are_fitted(world, tmp_path):
    sequence = write_sequence(tmp_path, TASKS)
    for task in TASKS[::-1]:
        again = fit(tmp_path, world.base, sequence, task)
        assert again.read_bytes() == (world.folder / "keys" / f"{task}.pth").read_bytes()
    assert merge(tmp_path, sequence).read_bytes() == world.keys.read_bytes()


# -- 5. batch invariance -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_question_gets_its_route_and_answer_in_any_batch(data, trained, rows):
    alone = _answers_alone(trained, rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9), label="batch")
    for number, (tokens, logits, route) in zip(chosen, trained.answer([rows[n] for n in chosen]), strict=True):
        assert same(route, alone[number][2])
        torch.testing.assert_close(logits, alone[number][1], atol=1e-5, rtol=1e-5)
        assert tokens == alone[number][0]


_ALONE: dict = {}


def _answers_alone(trained, rows):
    if id(trained) not in _ALONE:
        _ALONE[id(trained)] = [trained.answer([row])[0] for row in rows]
        routes = {tuple(route[0].tolist()) for _, _, route in _ALONE[id(trained)]}
        assert len(routes) > 2 and len({tuple(tokens) for tokens, _, _ in _ALONE[id(trained)]}) > 3
    return _ALONE[id(trained)]


# -- 6. zero cost when empty -------------------------------------------------------------------------------------------


def test_without_a_trained_slot_the_base_answers(world, rows):
    plain, empty = Model(world, world.base), Model(world, world.base)
    attach_slots(empty.model, Pool.read(world.keys), world.base)
    assert empty.model.retriever.pool.size > 0 and not empty.model.retriever.active
    assert same(empty.answer(rows), plain.answer(rows))
    assert empty.model.last_route is None


def test_a_slot_before_its_first_step_changes_no_logit(world, rows):
    plain, begun = Model(world, world.base), Model(world, world.base)
    attach_slots(begun.model, Pool.read(world.keys), world.base)
    begun.model.retriever.train_only("head")
    for (tokens, logits, route), (base_tokens, base_logits, _) in zip(
        begun.answer(rows), plain.answer(rows), strict=True
    ):
        assert route is not None
        assert torch.equal(logits, base_logits) and tokens == base_tokens


def test_the_trained_model_is_another_than_the_base(world, trained, rows):
    plain = Model(world, world.base)
    assert [tokens for tokens, _, _ in plain.answer(rows)] != [tokens for tokens, _, _ in trained.answer(rows)]
