"""The answerer on a tiny random LLaVA: several stages over one base, what they leave behind, shared pictures, order."""

import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_llava import HIDDEN, write_base, write_images, write_stage

from llava.cli import filled
from llava.continual.methods import l2p, moelora
from llava.continual.queries import PictureSource, look_at_pictures
from llava.data import prompt as prompt_module
from llava.data.labels import prompt_ids
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval import loaded as loaded_module
from llava.eval import model_vqa_loader
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading
from llava.eval.loading_flags import loading_of
from llava.eval.question_cache import QuestionCache
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.prefixes import SharedPrefixes
from llava.slots.adapter import MEMORY_FILE
from llava.slots.pool import Pool
from llava.utils import UserError

DOMAINS = ("abd", "chest")
WORDS = "is there a lesion in the image of the left lung what side where abdomen head".split()
CPU = Loading(device="cpu")
SHORT = Generation(max_new_tokens=5, batch_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two light stages over it, and 24 questions of many lengths, one of them without a picture."""
    folder = tmp_path_factory.mktemp("answerer")
    base = write_base(folder / "tiny-base")
    write_stage(folder / "llava-tiny_abd", base, DOMAINS[:1], seed=1)
    write_stage(folder / "llava-tiny_abd_chest", base, DOMAINS, seed=2)
    write_images(folder / "images", [f"{number}.png" for number in range(5)])
    rows = []
    for number in range(24):
        text = " ".join(WORDS[number % 7 : number % 7 + 1 + number % 9]) + f" {number}?"
        image = None if number == 7 else f"{number % 5}.png"
        rows.append(question_row(number, image, text, "yes", DOMAINS[number % 2], DOMAINS))
    write_jsonl(folder / "questions.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def rows(place):
    return read_rows(place / "questions.jsonl")


def told(answerer, place, rows, generation=SHORT):
    return [(r.row.id, r.text, r.route) for r in answerer.answer(rows, generation, str(place / "images"))]


def fresh(place, stage, rows, route=None):
    """Answers of an answerer that has done nothing else."""
    alone = Answerer(str(place / "tiny-base"), CPU).use(stage and str(place / stage), route)
    return told(alone, place, rows)


def hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


STAGES = (None, "llava-tiny_abd", "llava-tiny_abd_chest")


def test_stages_over_one_base_answer_as_each_by_itself(place, rows, monkeypatch):
    expected = {stage: fresh(place, stage, rows) for stage in STAGES}
    assert len({str(answers) for answers in expected.values()}) == 3
    loads = []

    def load(*args, **kwargs):
        loads.append(args)
        return load_pretrained_model(*args, **kwargs)

    monkeypatch.setattr(loaded_module, "load_pretrained_model", load)
    shared = Answerer.load(str(place / "tiny-base"), CPU)
    for stage in (*STAGES, *reversed(STAGES)):  # in any order
        assert told(shared.use(stage and str(place / stage)), place, rows) == expected[stage]
    assert len(loads) == 1


def test_what_is_taken_off_leaves_nothing_behind(place):
    answerer = Answerer.load(str(place / "tiny-base"), CPU)
    before = dict(vars(answerer.model.config))
    assert hooks(answerer.model) == 0 and answerer.model.retriever is None
    answerer.use(str(place / "llava-tiny_abd"), conv_mode="v0", aspect_ratio="square", answer_suffix="Be brief.")
    assert hooks(answerer.model) > 0 and answerer.model.config.image_aspect_ratio == "square"
    assert answerer.use(None) is answerer
    assert vars(answerer.model.config) == before
    assert hooks(answerer.model) == 0 and answerer.model.retriever is None


def test_a_stage_is_answered_from_any_folder_over_the_base_it_names(place, rows, tmp_path, monkeypatch):
    """The base's name may be relative to where the training was started."""
    stage = tmp_path / "output" / "llava-tiny_abd"
    shutil.copytree(place / "llava-tiny_abd", stage)
    shutil.copytree(place / "tiny-base", tmp_path / "output" / "base")
    slots = Pool.read(stage / "slots.pth")
    slots.base = {**slots.base, "path": "output/base"}
    slots.write(stage / "slots.pth")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    alone = Answerer(None, CPU).use(str(stage))
    assert told(alone, place, rows[:4]) == fresh(place, "llava-tiny_abd", rows[:4])


def test_without_a_route_no_hook_and_no_entry_stays(place, rows):
    answerer = Answerer(str(place / "tiny-base"), CPU).use(str(place / "llava-tiny_abd"), route="none")
    assert hooks(answerer.model) == 0 and not hasattr(answerer.model.config, "retriever")
    assert told(answerer, place, rows) == fresh(place, None, rows)


def test_a_router_of_one_stage_is_not_the_next_ones(place, rows):
    answerer = Answerer(str(place / "tiny-base"), CPU).use(str(place / "llava-tiny_abd"), route="uniform")
    uniform = told(answerer, place, rows)
    assert told(answerer.use(str(place / "llava-tiny_abd")), place, rows) == fresh(place, "llava-tiny_abd", rows)
    assert uniform == fresh(place, "llava-tiny_abd", rows, "uniform")


@pytest.mark.filterwarnings("ignore:router 'batch_vote'")
def test_a_router_that_looks_at_the_batch_gets_the_questions_as_they_came(place, rows, monkeypatch):
    """Whichever questions are beside one another decides its vote, so they may not be put in order of length."""
    answerer, batches = Answerer(str(place / "tiny-base"), CPU), []
    generate = Answerer._generate

    def note(self, inputs, *args, **options):
        batches.append([row.id for row in inputs["rows"]])
        return generate(self, inputs, *args, **options)

    monkeypatch.setattr(Answerer, "_generate", note)
    as_they_came = [[row.id for row in rows[start : start + 4]] for start in range(0, 24, 4)]
    told(answerer.use(str(place / "llava-tiny_abd_chest"), "batch_vote"), place, rows)
    assert batches == as_they_came
    batches.clear()
    told(answerer.use(str(place / "llava-tiny_abd_chest"), "keys"), place, rows)
    assert batches != as_they_came


def test_order_and_batch_size_change_no_answer(place, rows):
    answerer = Answerer(str(place / "tiny-base"), CPU).use(str(place / "llava-tiny_abd_chest"))

    def essence(asked, size):
        replies = told(answerer, place, asked, Generation(max_new_tokens=5, batch_size=size))
        assert [number for number, *_ in replies] == [row.id for row in asked]
        return {number: (text, route["slots"]) for number, text, route in replies}

    shuffled = random.Random(0).sample(rows, len(rows))
    single = essence(rows, 1)
    assert len({text for text, _ in single.values()}) > 5
    assert essence(shuffled, 1) == essence(shuffled, 7) == essence(rows, 3) == essence(rows, 24) == single


def test_questions_of_like_length_are_answered_together(place, rows, monkeypatch):
    answerer = Answerer.load(str(place / "tiny-base"), CPU)
    padding, generate = [], answerer.model.generate

    def recorded(**inputs):
        padding.append(int((inputs["attention_mask"] == 0).sum()))
        return generate(**inputs)

    monkeypatch.setattr(answerer.model, "generate", recorded)
    told(answerer, place, rows)
    sorted_padding = sum(padding)
    padding.clear()
    for start in range(0, len(rows), 4):
        told(answerer, place, rows[start : start + 4])
    assert sorted_padding < sum(padding) / 2


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_replies_after_some_are_what_would_have_followed(place, rows, temperature):
    answerer = Answerer(str(place / "tiny-base"), CPU).use(str(place / "llava-tiny_abd_chest"))
    generation = Generation(temperature=temperature, top_p=0.9, max_new_tokens=5, batch_size=2, seed=3)
    whole = list(answerer.answer(rows, generation, str(place / "images")))
    for done in (1, 8, 17, 23, 24):
        assert list(answerer.answer(rows, generation, str(place / "images"), done)) == whole[done:]


def test_each_picture_is_opened_and_looked_at_once_for_all_stages(place, rows, monkeypatch):
    opened, looked, original = [], [], prompt_module.load_image
    monkeypatch.setattr(prompt_module, "load_image", lambda path: opened.append(path) or original(path))
    answerer = Answerer.load(str(place / "tiny-base"), CPU)
    tower = answerer.model.get_vision_tower()
    tower.register_forward_pre_hook(lambda module, inputs: looked.append(len(inputs[0])))
    for stage in STAGES:
        told(answerer.use(stage and str(place / stage)), place, rows, Generation(max_new_tokens=2, workers=2))
    assert len(opened) == len(set(opened)) == 5 and looked == [1] * 5
    told(answerer.use(None, aspect_ratio="square"), place, rows, Generation(max_new_tokens=2))
    assert len(opened) == 10  # other pixels


def test_a_model_is_loaded_in_the_type_that_a_flag_names(place, rows):
    asked = SimpleNamespace(model_path=str(place / "tiny-base"), question_file="q", dtype="bfloat16", device="cpu")
    loading = loading_of(filled(model_vqa_loader.Arguments, asked))
    answerer = Answerer.load(str(place / "tiny-base"), loading)
    assert {weight.dtype for weight in answerer.model.parameters()} == {torch.bfloat16}
    assert len(told(answerer, place, rows[:2])) == 2


def test_pictures_go_through_the_tower_once_for_all_processes(place, rows, tmp_path, monkeypatch, capsys):
    through, forward = [], CLIPVisionTower.forward
    monkeypatch.setattr(CLIPVisionTower, "forward", lambda self, x: through.append(len(x)) or forward(self, x))
    source = PictureSource.standalone(place / "tiny-base", str(place / "images"), None, "cpu")
    seen = [row for row in rows if row.images != ("4.png",)]  # in training: all pictures but one
    look_at_pictures(seen, source, "tower+picture", source.store(tmp_path), 0)

    def answers(folder):
        through.clear()
        found = Answerer(str(place / "tiny-base"), CPU, QuestionCache(folder=folder))
        short = Generation(max_new_tokens=2, batch_size=4, workers=2)
        return [told(found.use(stage and str(place / stage)), place, rows[:8], short) for stage in STAGES]

    assert through == [1] * 4
    expected = answers(None)
    assert through == [1] * 5
    for calls in (1, 0, 1):
        assert answers(tmp_path) == expected and len(through) == calls
        if not calls:
            next(tmp_path.rglob("*.safetensors")).write_bytes(b"damaged")
    assert capsys.readouterr().out.count("is damaged") == 1


def test_stages_behind_the_picture_and_their_base_share_what_stands_in_front(place, rows, tmp_path, monkeypatch):
    worked_out, work_out = [], SharedPrefixes._prefix
    monkeypatch.setattr(SharedPrefixes, "_prefix", lambda *words: worked_out.append(1) or work_out(*words))
    stages = [shutil.copytree(place / name, tmp_path / name) for name in STAGES if name]
    for stage in stages:
        slots = Pool.read(stage / "slots.pth")
        slots.settings.offset_scope = "question"
        slots.write(stage / "slots.pth")

    def answers(prefixes, folder=None):
        worked_out.clear()
        found = Answerer(str(place / "tiny-base"), CPU, QuestionCache(folder=folder, prefixes=prefixes))
        return [told(found.use(stage and str(stage)), place, rows) for stage in (None, *stages)], len(worked_out)

    expected, none = answers(False)
    assert none == 0
    for folder, calls in ((None, 5), (tmp_path / "cache", 5), (tmp_path / "cache", 0)):
        assert answers(True, folder) == (expected, calls)


def test_a_memory_that_is_too_small_changes_no_answer(place, rows, monkeypatch):
    monkeypatch.setattr("llava.eval.question_cache.RECENT", 2)
    small = Answerer(str(place / "tiny-base"), CPU, QuestionCache(megabytes=0)).use(str(place / "llava-tiny_abd"))
    assert told(small, place, rows) == fresh(place, "llava-tiny_abd", rows)
    assert len(small.cache.recent) == 2 and not small.cache.sights


def test_a_stage_with_weights_of_its_own_is_loaded_by_itself(place, rows, tmp_path, capsys):
    """Its base's weights beside its slots; the light stages before and after it are not disturbed."""
    whole = tmp_path / "llava-whole"
    base = write_base(whole, seed=5)
    write_stage(whole, base, DOMAINS, seed=2)
    answerer = Answerer(str(place / "tiny-base"), CPU)
    light = told(answerer.use(str(place / "llava-tiny_abd_chest")), place, rows)
    capsys.readouterr()
    heavy = told(answerer.use(str(whole)), place, rows)
    assert "llava-whole: has weights of its own, so it was loaded by itself" in capsys.readouterr().out
    off = told(answerer.use(str(whole), route="none"), place, rows)
    assert all(route is None for *_, route in off) and off != heavy
    assert told(answerer.use(str(whole)), place, rows) == heavy != light
    assert told(answerer.use(str(place / "llava-tiny_abd_chest")), place, rows) == light


def write_adapted(folder, place, adapter, memory):
    """The light stage of two tasks, acted on by another adapter than the retriever, which keeps ``memory``."""
    pool = Pool.read(write_stage(folder, place / "tiny-base", DOMAINS, seed=2) / "slots.pth")
    Pool(pool.settings, pool.tasks, pool.base, adapter=adapter).write(folder / "slots.pth")
    torch.save(memory(pool), folder / MEMORY_FILE)
    return str(folder)


def test_any_methods_adapter_is_put_on_and_taken_off(place, rows, tmp_path):
    torch.manual_seed(0)

    def prompts(pool):
        return {l2p.PREFIX: torch.randn(pool.size, 3, HIDDEN)}

    def gate(pool):
        return {moelora.GATE: torch.randn(pool.size, moelora.query_width(pool.settings))}

    stages = [None, write_adapted(tmp_path / "llava-l2p", place, "l2p", prompts)]
    stages += [write_adapted(tmp_path / "llava-moelora", place, "moelora", gate), str(place / "llava-tiny_abd_chest")]
    alone = [told(Answerer(str(place / "tiny-base"), CPU).use(stage), place, rows) for stage in stages]
    assert len({str([text for _, text, _ in answers]) for answers in alone}) == 4
    shared = Answerer.load(str(place / "tiny-base"), CPU)
    for stage, expected in [*zip(stages, alone, strict=True)][::-1]:
        assert told(shared.use(stage), place, rows) == expected


def test_a_task_is_given_where_it_is_learned(place, rows):
    answerer = Answerer(str(place / "tiny-base"), CPU).use(str(place / "llava-tiny_abd"), route="oracle")
    given = ["task_given" in route for *_, route in told(answerer, place, rows)]
    assert given == [row.domain == "abd" for row in rows]
    with pytest.raises(UserError, match="no trained slots for task 'head'; the model has abd"):
        answerer.use(str(place / "llava-tiny_abd"), task="head")
    with pytest.raises(UserError, match="'compass' is not a router"):
        answerer.use(str(place / "llava-tiny_abd"), route="compass")


def test_another_model_looks_at_the_pictures_itself(place, rows, tmp_path):
    other = str(write_base(tmp_path / "tiny-other", seed=5))
    alone = told(Answerer.load(other, CPU), place, rows)
    answerer = Answerer(None, CPU).use(str(place / "tiny-base"))
    first = told(answerer, place, rows)
    assert told(answerer.use(other), place, rows) == alone != first
    assert told(answerer.use(str(place / "tiny-base")), place, rows) == first


@pytest.mark.parametrize("wrong", [{"task": "head"}, {"answer_style": "loud"}, {"stage": "llava-of-another-base"}])
def test_a_choice_that_fails_leaves_the_base_clean_and_nothing_chosen(place, rows, tmp_path, wrong):
    write_stage(tmp_path / "llava-of-another-base", write_base(tmp_path / "tiny-other", seed=5))
    wrong = {"stage": str(place / "llava-tiny_abd"), **wrong}
    wrong["stage"] = str(tmp_path / wrong["stage"])  # an absolute path stays
    answerer = Answerer.load(str(place / "tiny-base"), CPU)
    before = {name: value for name, value in vars(answerer.model.config).items() if name != "prompt"}
    answerer.use(str(place / "llava-tiny_abd_chest"), conv_mode="v0")
    with pytest.raises(UserError):
        answerer.use(**wrong)
    assert vars(answerer.model.config) == before
    assert hooks(answerer.model) == 0 and answerer.model.retriever is None
    with pytest.raises(UserError, match="no model is chosen"):
        next(answerer.answer(rows, SHORT, str(place / "images")))
    assert told(answerer.use(None), place, rows) == fresh(place, None, rows)


def test_answers_do_not_come_from_a_model_that_was_chosen_meanwhile(place, rows):
    answerer = Answerer(str(place / "tiny-base"), CPU).use(str(place / "llava-tiny_abd"))
    replies = answerer.answer(rows, Generation(max_new_tokens=5, batch_size=1), str(place / "images"))
    next(replies)
    answerer.use(None)
    with pytest.raises(RuntimeError, match="another model was chosen"):
        list(replies)
    late = answerer.answer(rows, SHORT, str(place / "images"))
    answerer.use(str(place / "llava-tiny_abd"))
    with pytest.raises(RuntimeError, match="another model was chosen"):
        next(late)


# -- with a stub in the model's place ----------------------------------------------------------------------------------


def ask_stub(place, monkeypatch, text, **prompt):
    """What ``generate`` was asked, and the replies to rows 0-8, where the model always answers ``text``."""
    answerer = Answerer.load(str(place / "tiny-base"), CPU).use(None, **prompt)
    calls, tokens = [], answerer.tokenizer(text, add_special_tokens=False).input_ids

    def generate(**inputs):
        calls.append(inputs)
        return torch.tensor([tokens] * len(inputs["input_ids"]))

    monkeypatch.setattr(answerer.model, "generate", generate)
    rows = read_rows(place / "questions.jsonl")[:9]
    replies = list(answerer.answer(rows, Generation(batch_size=9), str(place / "images")))
    return calls, answerer, rows, replies


def test_prompts_are_left_padded_and_masked(place, monkeypatch):
    (call,), answerer, rows, _ = ask_stub(place, monkeypatch, "yes")
    for number, row in enumerate(rows):
        ids = prompt_ids(row.question, answerer.tokenizer, "vicuna_v1", has_image=number != 7)
        padding = call["input_ids"].shape[1] - len(ids)
        assert call["input_ids"][number].tolist() == [0] * padding + ids
        assert call["attention_mask"][number].tolist() == [0] * padding + [1] * len(ids)
    assert call["questions"] == [row.question for row in rows]
    assert [len(features) for features in call["image_features"]] == [1] * 7 + [0, 1]  # question 7 has no picture
    assert call["image_sizes"][:3] == [(16, 20), (24, 16), (24, 16)]
    assert call["do_sample"] is False and "tasks" not in call


def test_text_after_the_templates_end_mark_is_cut(place, monkeypatch):
    calls, _, _, replies = ask_stub(place, monkeypatch, " no ### Human: where", conv_mode="v0")
    assert {reply.text for reply in replies} == {"no"}
    assert "stopping_criteria" in calls[0]
    assert "stopping_criteria" not in ask_stub(place, monkeypatch, "no")[0][0]  # the end token itself stops


def test_the_answer_suffix_is_in_the_prompt_but_not_in_the_routed_question(place, monkeypatch):
    (call,), answerer, rows, _ = ask_stub(place, monkeypatch, "no", answer_suffix="Answer briefly.")
    text = f"{rows[0].question}\nAnswer briefly."
    expected = prompt_ids(text, answerer.tokenizer, "vicuna_v1", has_image=True)
    assert call["input_ids"][0].tolist()[-len(expected) :] == expected
    assert call["questions"][0] == rows[0].question


def test_how_far_it_is_is_told_by_batches_and_not_by_replies(place, rows):
    """The first reply may have to wait for the last batch: a rate taken from replies says hours for minutes."""
    answerer, told, ready = Answerer.load(str(place / "tiny-base"), CPU), [], []
    generation = Generation(max_new_tokens=5, batch_size=3)
    for _ in answerer.answer(rows, generation, str(place / "images"), done=1, answered=told.append):
        ready.append(sum(told))
    assert max(told) <= 3 and sum(told) == len(rows) - 1 and all(map(int.__le__, range(1, len(rows)), ready))
    assert ready[0] > 1


def test_a_model_without_a_tower_refuses_pictures(place, rows):
    answerer = Answerer.load(str(place / "tiny-base"), CPU)
    answerer._loaded.image_processor = None
    with pytest.raises(UserError, match="no vision tower"):
        list(answerer.answer(rows, SHORT, str(place / "images")))
    assert len(list(answerer.answer([rows[7]], SHORT))) == 1


@pytest.mark.parametrize(
    ("loading", "device_map"),
    [(Loading(device="cuda"), {"": "cuda"}), (Loading(device="cuda", device_map="auto"), "auto"), (CPU, {"": "cpu"})],
)
def test_a_model_lies_on_one_device_unless_asked_otherwise(place, monkeypatch, loading, device_map):
    asked = {}
    monkeypatch.setattr("llava.devices.check_device", lambda name: None)  # as where there is a GPU
    monkeypatch.setattr(loaded_module, "load_pretrained_model", lambda *_, **options: asked.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Answerer.load(str(place / "tiny-base"), loading)
    assert asked["device_map"] == device_map and asked["device"] == loading.device
