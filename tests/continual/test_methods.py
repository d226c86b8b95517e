"""Recipes: the ones that prove the interface do what their papers say, through the real command."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_world import SLOTS, TOP_K, refusal, same

from llava.continual.methods import METHODS
from llava.continual.methods.replay import without_picture
from llava.continual.run import Run
from llava.data.rows import parse_row, read_rows
from llava.model.builder import load_pretrained_model
from llava.slots.edit import remove
from llava.slots.merge import merge_pools
from llava.slots.peft_export import export_peft
from llava.utils import UserError

NEW = ("replay", "ewc", "l2p", "moelora")


def two_stages(world, folder, method, *more):
    """Train abd, then chest; returns both finished runs."""
    stages = [folder / f"llava-{method}_abd", folder / f"llava-{method}_abd_chest"]
    world.train("abd", stages[0], None, "--method", method, *more)
    world.train("chest", stages[1], stages[0], "--method", method, *more)
    return [Run.open(stage) for stage in stages]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Both stages of every new method."""
    return {name: two_stages(world, tmp_path_factory.mktemp(name), name) for name in NEW}


def answer(world, stage, question="is there a lesion?"):
    """Greedy token ids of a stage (or the base, ``None``) about one picture."""
    from llava.data.prompt import Prompt, PromptEncoder
    from llava.data.rows import parse_row

    place = str(world.base) if stage is None else str(stage)
    tokenizer, model, processor, _ = load_pretrained_model(
        place, None if stage is None else str(world.base), device="cpu"
    )
    prompt = Prompt.of(model.config, "tiny-llava-base")
    row = parse_row({"question_id": 1, "image": "abd0.png", "text": f"{question}\n<image>"})
    encoder = PromptEncoder(prompt, tokenizer, processor, model.config, world.folder / "images")
    sample = encoder.encode(row, answer=False)
    ids, ((pixels, _),) = torch.tensor([sample.input_ids]), sample.pictures
    out = model.generate(ids, images=[pixels], questions=[question], max_new_tokens=6, do_sample=False)
    return out[0].tolist(), model


@pytest.mark.parametrize("method", NEW)
def test_a_stage_of_it_loads_and_answers_and_going_again_skips_it(world, runs, method, capsys):
    _, second = runs[method]
    ids, model = answer(world, second.folder)
    assert ids and model.last_route is not None
    before = (second.folder / "slots.pth").read_bytes()
    world.train("chest", second.folder, runs[method][0].folder, "--method", method)
    assert "is finished already; skipped" in capsys.readouterr().out
    assert (second.folder / "slots.pth").read_bytes() == before


@pytest.mark.parametrize("method", NEW)
def test_it_is_reproduced_to_the_byte(world, runs, method, tmp_path):
    first, _ = runs[method]
    again = tmp_path / first.folder.name
    world.train("abd", again, None, "--method", method)
    for name in ("slots.pth", "memory.pth", "kept_rows.jsonl"):
        assert (again / name).is_file() == (first.folder / name).is_file()
        if (again / name).is_file():
            assert (again / name).read_bytes() == (first.folder / name).read_bytes()


@pytest.mark.parametrize("method", NEW)
def test_the_base_stays_as_it_is(world, runs, method):
    _, with_stage = answer(world, runs[method][1].folder)
    _, base = answer(world, None)
    for name, tensor in base.state_dict().items():
        assert torch.equal(with_stage.state_dict()[name], tensor), name


# -- replay ------------------------------------------------------------------------------------------------------------


def test_replay_keeps_rows_of_each_task_and_trains_on_them(world, tmp_path):
    first, second = two_stages(world, tmp_path, "replay", "--replay_rows", 4)
    assert len(first.kept_rows) == 4 and len(second.kept_rows) == 8
    mine = {row.id for row in read_rows(world.folder / "train_abd.jsonl")}
    assert {row.id for row in second.kept_rows[:4]} <= mine
    assert [row.id for row in second.kept_rows[:4]] == [row.id for row in first.kept_rows]
    assert all(row.image for row in first.kept_rows)
    sequential = two_stages(world, tmp_path, "sequential")[1]
    assert not same(dict(second.pool.tasks[0].A), dict(sequential.pool.tasks[0].A))


def test_replay_without_rows_is_sequential(world, tmp_path):
    none = two_stages(world, tmp_path, "replay", "--replay_rows", 0)[1]
    sequential = two_stages(world, tmp_path, "sequential")[1]
    assert none.pool.tasks[0].checksum() == sequential.pool.tasks[0].checksum()


def test_replay_of_questions_keeps_no_picture(world, tmp_path):
    _, second = two_stages(world, tmp_path, "replay", "--replay_rows", 3, "--replay_keep", "questions")
    text = (second.folder / "kept_rows.jsonl").read_text()
    assert len(second.kept_rows) == 6 and ".png" not in text and "<image>" not in text
    row = read_rows(world.folder / "train_abd.jsonl")[0]
    assert without_picture(row).question == row.question and without_picture(row).image is None
    assert without_picture(row).answer == row.answer
    said = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image> Q?"}]
    row = parse_row({"id": 1, "image": "a.png", "conversations": said})
    assert without_picture(row).system == "Be brief." and without_picture(row).question == "Q?"


# -- EWC ---------------------------------------------------------------------------------------------------------------


def test_ewc_holds_the_adapter_where_it_was(world, tmp_path):
    def moved(penalty):
        more = ("--ewc_lambda", penalty, "--max_steps", 12)
        first, second = two_stages(world, tmp_path / str(penalty), "ewc", *more)
        step = (second.pool.tasks[0].A["o_proj"] - first.pool.tasks[0].A["o_proj"]).square()
        return (first.memory["information.A.o_proj"] * step).sum(), second

    free, _ = moved(0)
    held, second = moved(1e6)
    assert held < 0.5 * free
    fisher = second.memory["information.A.o_proj"]
    assert fisher.shape == second.pool.tasks[0].A["o_proj"].shape and fisher.min() >= 0 and fisher.max() > 0


def test_ewc_without_a_penalty_is_sequential(world, tmp_path):
    none = two_stages(world, tmp_path, "ewc", "--ewc_lambda", 0)[1]
    sequential = two_stages(world, tmp_path, "sequential")[1]
    one, other = none.pool.tasks[0].A["o_proj"], sequential.pool.tasks[0].A["o_proj"]
    torch.testing.assert_close(one, other)


def test_the_fisher_information_of_tasks_adds_up(world, tmp_path):
    first, second = two_stages(world, tmp_path, "ewc", "--ewc_gamma", 0.5)
    again, alone = two_stages(world, tmp_path / "half", "ewc", "--ewc_gamma", 0.0)
    here = alone.memory["information.A.o_proj"]
    torch.testing.assert_close(again.memory["information.A.o_proj"], first.memory["information.A.o_proj"])
    torch.testing.assert_close(second.memory["information.A.o_proj"], here + 0.5 * first.memory["information.A.o_proj"])


def test_ewc_holds_the_adapter_where_it_is_by_then(world, runs):
    """The model moves to its device after ``begin``; ``meta`` stands for an accelerator."""
    first, second = runs["ewc"]
    recipe = METHODS.get("ewc")()
    model = torch.nn.Module()
    model.attach_adapter = lambda adapter: setattr(model, "retriever", adapter)
    pool = second.pool.with_tasks([second.pool.tasks[0].copy()])
    context = SimpleNamespace(
        model=model, pool=pool, trained=pool.tasks[0].name, previous=first, options=METHODS.get("ewc").Options()
    )
    model.device = torch.device("cpu")
    recipe.begin(context)
    model.to("meta")
    assert recipe.loss(context, {}, None, torch.zeros((), device="meta")).device.type == "meta"


def test_information_is_measured_without_dropout(world, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(METHODS.get("ewc"), "end", lambda self, context, batches: modes.append(context.model.training))
    world.train("abd", tmp_path / "llava-ewc", None, "--method", "ewc")
    assert modes == [False]


# -- L2P ---------------------------------------------------------------------------------------------------------------


def test_l2p_learns_prompts_and_no_offsets(runs):
    first, second = runs["l2p"]
    assert [task.name for task in second.pool.tasks] == ["abd", "chest"] and second.pool.adapter == "l2p"
    assert not second.pool.settings.targets and not any(task.A for task in second.pool.tasks)
    assert second.memory["prefix.table"].shape == (2 * SLOTS, 5, 32)
    assert not torch.equal(first.memory["prefix.table"], second.memory["prefix.table"][:SLOTS])  # shared, so it moves


def test_l2p_puts_the_selected_prompts_in_front(world, runs):
    _, model = answer(world, runs["l2p"][1].folder)
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 6, 7]])
    query = torch.randn(2, model.retriever.settings.text_dim)
    image = torch.randn(2, model.retriever.settings.image_dim)
    with torch.no_grad():
        out = model(ids, text_query=query, image_query=image)
        model.config.tokenizer_model_max_length = 4  # of the text: the prompts take no room from it
        assert torch.equal(model(ids, text_query=query, image_query=image).logits, out.logits)
    assert out.logits.shape[1] == 4 + TOP_K * 5
    alone = model(ids[:1], text_query=query[:1], image_query=image[:1])
    torch.testing.assert_close(out.logits[:1], alone.logits, rtol=1e-4, atol=1e-4)


# -- MoELoRA -----------------------------------------------------------------------------------------------------------


def test_moelora_trains_its_gate_and_weighs_every_expert(world, runs):
    first, second = runs["moelora"]
    assert second.pool.tasks[0].count == 4
    assert not torch.equal(first.memory["gate.weight"], second.memory["gate.weight"])
    _, model = answer(world, second.folder)
    route = model.last_route
    assert route.slot_indices.tolist() == [[0, 1, 2, 3]]
    assert math.isclose(float(route.slot_weights.sum()), 1.0, rel_tol=1e-5)
    assert "weights" in route.describe(0)


@pytest.mark.parametrize("method, kept", [("ewc", "information."), ("l2p", "prefix.table"), ("moelora", "gate.")])
def test_a_stage_before_of_another_method_is_one_line(world, tmp_path, capsys, method, kept):
    before = tmp_path / "llava-before"
    world.train("abd", before, None, "--method", "sequential")
    line = refusal(world, capsys, world.train_arguments("chest", tmp_path / "llava-x", before, "--method", method))
    assert kept in line and str(before) in line and "--method sequential" in line


def test_a_stage_before_with_another_adapter_is_one_line(world, runs, tmp_path, capsys):
    before = runs["moelora"][0].folder
    words = world.train_arguments("chest", tmp_path / "llava-x", before, "--method", "sequential")
    assert f"{before} was trained with --method moelora, whose adapter is another" in refusal(world, capsys, words)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--method", "replay", "--replay_rows", -1), "--replay_rows is -1; give 0 or more"),
        (("--method", "moelora", "--experts", 0), "--experts is 0; give 1 or more"),
        (("--method", "l2p", "--prompt_length", 0), "--prompt_length is 0; give 1 or more"),
        (("--method", "retrieval", "--experts", 2), "unknown argument --experts"),
    ],
)
def test_bad_options_are_one_line(world, tmp_path, capsys, more, message):
    words = world.train_arguments("abd", tmp_path / "llava-x", None, *more)
    assert message in refusal(world, capsys, words)


def test_an_option_of_the_method_is_part_of_the_record(world, tmp_path, capsys):
    stage = tmp_path / "llava-moe"
    world.train("abd", stage, None, "--method", "moelora", "--experts", 2)
    assert json.loads((stage / "training.json").read_text())["experts"] == 2
    line = refusal(world, capsys, world.train_arguments("abd", stage, None, "--method", "moelora", "--experts", 3))
    assert "experts = 2, now it is 3" in line


@pytest.mark.parametrize("method", ["l2p", "moelora"])
def test_slots_that_are_only_a_part_are_neither_merged_nor_taken_apart(runs, tmp_path, method):
    pool = runs[method][1].pool
    name = pool.names[0]
    for edit in (
        lambda: merge_pools([("a.pth", pool)]),
        lambda: remove(pool, [name]),
        lambda: export_peft(pool, name, tmp_path / "lora"),
    ):
        with pytest.raises(UserError, match=f"its slots belong to method '{method}', which keeps tensors beside them"):
            edit()
