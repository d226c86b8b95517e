"""Each method's equation, on a model so small that its values are worked out by hand in the comments."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava.continual.methods import METHODS
from llava.continual.methods.contextual import MIX, ContextualAdapter
from llava.continual.methods.individual import GivenAdapter
from llava.continual.methods.keeplora import KeepLoRAAdapter
from llava.continual.methods.l2p import PREFIX, PrefixAdapter
from llava.continual.methods.lwf import Recalling, distillation
from llava.continual.methods.moelora import GATE, GatedAdapter
from llava.continual.methods.o_lora import OLoRAAdapter, overlap
from llava.continual.methods.sequential import SHARED, single_adapter
from llava.continual.methods.subspace import extended, principal, residual
from llava.model.language_model.retriever import Retriever
from llava.slots.pool import Pool
from llava.slots.queries import Query
from llava.slots.route import Route
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots

ONE = torch.ones(1)


def settings(in_=1, out=1, **more):
    return RetrieverSettings(1, {"o_proj": (in_, out)}, rank=1, top_k=1, router="uniform", groups=1, **more)


def slots(name, start, A, B, key=None):
    """One slot of rank 1: ``y = W x + A (B x)``; where it has a ``key``, in text space."""
    A, B = ({"o_proj": torch.tensor(side).reshape(1, 1, 1, -1).float()} for side in (A, B))
    key = None if key is None else torch.tensor(key).reshape(1, 1, -1)
    return TaskSlots(name, start, start + 1, text_keys=key, A=A, B=B, trained=True)


def pool(*tasks, **more):
    found = Pool(settings(**more), tasks)
    found.check_shapes()
    return found


def context(adapter, task, previous=None, **options):
    """A stage in training over ``adapter``, as a recipe sees it."""
    model = SimpleNamespace(retriever=adapter)
    before = None if previous is None else SimpleNamespace(**previous)
    given = SimpleNamespace(**options)
    return SimpleNamespace(model=model, pool=adapter.pool, task=task, trained=task, options=given, previous=before)


def acting(adapter, x, tasks=None, query=None):
    """What the adapter adds to a projection for the input ``x`` ``[in]`` of one question."""
    query = Query(text=torch.ones(1, 1)) if query is None else query
    action = adapter.act(adapter.decide(query, tasks), torch.float32)
    given = torch.tensor(x).float().reshape(1, 1, -1)
    (width,) = {side.shape[-1] for side in action.offset.up.values()}
    return action.offset.add_to(torch.zeros(1, 1, width), "o_proj", 0, given).flatten()


def information(A, B):
    """What ``ewc`` keeps, of an adapter of two weights."""
    return {f"information.{kind}.o_proj": torch.full((1, 1, 1, 1), value) for kind, value in (("A", A), ("B", B))}


# -- ewc -------------------------------------------------------------------------------------------------------------


def test_ewc_penalises_moves_by_the_information():
    """theta = (A, B) = (3, 5), theta* = (1, 2), F = (10, 100): 1 + 4 / 2 * (10 * 2^2 + 100 * 3^2) = 1 + 2 * 940."""
    adapter = Retriever(pool(slots(SHARED, 0, [3], [5])))
    before = {"pool": pool(slots(SHARED, 0, [1], [2])), "remembered": information(10.0, 100.0).__getitem__}
    stage = context(adapter, SHARED, before, ewc_lambda=4.0)
    stage.model.attach_adapter = lambda made: setattr(stage.model, "retriever", made)
    recipe = METHODS.get("ewc")()
    recipe.begin(stage)
    loss = recipe.loss(stage, {}, None, ONE.sum())
    assert loss.item() == 1 + 2 * 940
    loss.backward()
    task = stage.model.retriever.pool.task(SHARED)
    assert task.A["o_proj"].grad.item() == 4 * 10 * 2 and task.B["o_proj"].grad.item() == 4 * 100 * 3


def test_ewc_measures_the_mean_square_of_single_rows_gradients():
    """Loss of a row x is A B x with A = 3, B = 5: dA = 5 x, dB = 3 x; rows 1 and 2: dA^2 25, 100; dB^2 9, 36. On top,
    half of the 8 and 16 that the stage before left."""
    adapter = Retriever(pool(slots(SHARED, 0, [3], [5])))
    adapter.train_only(SHARED)
    stage = context(adapter, SHARED, {"remembered": information(8.0, 16.0).__getitem__}, ewc_gamma=0.5)

    class Model:
        retriever = adapter

        def __call__(self, x):
            B, A = adapter.pool.task(SHARED)(("o_proj",), torch.float32)
            return SimpleNamespace(loss=(A * B * x).sum())

    stage.model, stage.run = Model(), SimpleNamespace(memory={})
    METHODS.get("ewc")().end(stage, [{"x": 1.0}, {"x": 2.0}])
    found = {name: value.item() for name, value in stage.run.memory.items()}
    assert found == {"information.A.o_proj": 62.5 + 4, "information.B.o_proj": 22.5 + 8}


# -- lwf -------------------------------------------------------------------------------------------------------------


def test_lwf_distils_softened_answers():
    """T = 2, two words. Before: logits (2 ln 3, 0), softened (3/4, 1/4); now: (0, 0), softened (1/2, 1/2).
    KL = 3/4 ln(3/2) + 1/4 ln(1/2); times T^2 = 4; a second token on which both agree halves the mean."""
    before, now = torch.tensor([[2 * math.log(3), 0.0], [1.0, 1.0]]), torch.zeros(2, 2, requires_grad=True)
    wanted = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    found = distillation(now, before, 2.0)
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    found.backward()  # T * (softmax(now / T) - softmax(before / T)) / tokens
    torch.testing.assert_close(now.grad, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))
    assert distillation(now[:0], before[:0], 2.0).item() == 0


def test_lwf_asks_the_adapter_of_the_stage_before():
    """Logits are (A B x, 0). Now A = 0, before A = ln 9 with B = x = 1; T = 1: KL((.9, .1) || (.5, .5))."""
    adapter = Recalling(pool(slots(SHARED, 0, [0.0], [1.0])), pool(slots(SHARED, 0, [math.log(9)], [1.0])))
    adapter.train_only(SHARED)
    stage = context(adapter, SHARED, {}, lwf_lambda=3.0, lwf_temperature=1.0)

    class Model:
        retriever = adapter

        def __call__(self, x):
            action = adapter.act(Route(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)), torch.float32)
            word = action.offset.add_to(torch.zeros(1, 1, 1), "o_proj", 0, torch.tensor(x).reshape(1, 1, 1))
            return SimpleNamespace(logits=torch.stack([word.squeeze(), torch.zeros(())])[None])

    stage.model = Model()
    outputs = stage.model(1.0)
    loss = METHODS.get("lwf")().loss(stage, {"x": 1.0}, outputs, ONE.sum())
    wanted = 1 + 3 * (0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert loss.item() == pytest.approx(wanted, rel=1e-6) and not adapter.recalling
    loss.backward()
    assert adapter.pool.task(SHARED).A["o_proj"].grad.item() == pytest.approx(3 * (0.5 - 0.9), rel=1e-5)
    assert not any(parameter.requires_grad for parameter in adapter.before.parameters())


# -- o_lora ----------------------------------------------------------------------------------------------------------


def test_o_lora_adds_up_adapters_and_holds_them_apart():
    """B1 = (1, 2), B2 = (3, -1): B2 B1^T = 1; x = (1, 1): A1 (B1 x) + A2 (B2 x) = 10 * 3 + 7 * 2. loss 1 + .5 * 1^2,
    its gradient by B2 is .5 * 2 * 1 * B1."""
    adapter = OLoRAAdapter(pool(slots("a", 0, [10], [1, 2]), slots("b", 1, [7], [3, -1]), in_=2))
    adapter.train_only("b")
    assert acting(adapter, [1, 1]).item() == 30 + 14
    stage = context(adapter, "b", {"pool": SimpleNamespace(names=["a"])}, o_lora_lambda=0.5)
    recipe = METHODS.get("o_lora")()
    recipe.before = [adapter.pool.task("a").B["o_proj"].detach().transpose(0, 1)]
    loss = recipe.loss(stage, {}, None, ONE.sum())
    assert loss.item() == 1.5
    loss.backward()
    assert adapter.pool.task("b").B["o_proj"].grad.flatten().tolist() == [1, 2]
    assert adapter.pool.task("a").B["o_proj"].grad is None
    assert overlap([torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]).item() == 0


def test_an_adapter_that_adds_up_trains_the_current_task_alone():
    adapter = OLoRAAdapter(pool(slots("a", 0, [10], [1]), slots("b", 1, [7], [3])))
    adapter.train_only("b")
    acting(adapter, [1]).sum().backward()
    trained, frozen = adapter.pool.task("b"), adapter.pool.task("a")
    assert trained.A["o_proj"].grad.item() == 3 and trained.B["o_proj"].grad.item() == 7
    assert frozen.A["o_proj"].grad is None and frozen.B["o_proj"].grad is None


@pytest.mark.parametrize("make", [OLoRAAdapter, lambda pool: ContextualAdapter(pool, {MIX: torch.zeros(2, 2)})])
def test_frozen_slots_that_act_while_another_task_trains_go_where_the_model_goes(make):
    """On a GPU they could not be put beside those that train, and DDP takes weights of one kind of device alone."""
    adapter = make(pool(slots("a", 0, [10], [1], [0.0]), slots("b", 1, [7], [3], [1.0]), text_dim=1, query_mode="text"))
    adapter.train_only("b")
    adapter.to("meta")
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    route = adapter.decide(Query(text=torch.ones(1, 1)))
    offset = adapter.pool(route.slot_indices, route.slot_weights, torch.float32)
    assert offset.up["o_proj"].device.type == "meta"


# -- keeplora --------------------------------------------------------------------------------------------------------


def test_keeplora_knows_the_directions_that_hold_most_of_a_weight():
    """W = diag(3, 1): energies 9 and 1, so the first direction holds .9."""
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    assert principal(weight, 0.9).abs().tolist() == [[1.0], [0.0]]
    assert principal(weight, 0.95).shape == (2, 2) and principal(weight, 0.0).shape == (2, 0)


def test_keeplora_projects_the_gradient_onto_what_is_left():
    """M = e1; G = ((1, 2), (3, 4)): G - G M M^T = ((0, 2), (0, 4)), whose one right singular vector is e2."""
    kept = torch.tensor([[1.0], [0.0]])
    found = residual(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), kept, rank=2)
    torch.testing.assert_close(found.abs(), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))  # there is no second one
    assert not residual(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), kept, rank=1).any()  # all of it is kept already


def test_keeplora_adds_the_directions_of_a_tasks_features():
    """M = e1 of three; X = rows (2, 0, 0), (0, 2, 0), (0, 0, 1): energies 4, 4, 1. M holds 4/9; with e2 8/9."""
    kept = torch.eye(3)[:, :1]
    features = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
    moments = features.T @ features
    assert extended(kept, moments, 0.4).shape == (3, 1)
    torch.testing.assert_close(extended(kept, moments, 0.8).abs(), torch.eye(3)[:, :2])
    whole = extended(kept, moments, 0.99)
    torch.testing.assert_close(whole.T @ whole, torch.eye(3))
    assert extended(whole, moments, 1.0).shape == (3, 3)
    assert extended(kept, torch.zeros(3, 3), 0.9).shape == (3, 1)


def test_keeplora_lays_its_adapter_beside_what_is_kept():
    """The gradient by W of the loss sum(y) of one row x = (1, 2) is x in every row; beside e1 that is e2."""
    adapter = KeepLoRAAdapter(pool(slots("a", 0, [0.0], [5.0, 5.0]), in_=2))
    adapter.train_only("a")
    layer = SimpleNamespace(self_attn=SimpleNamespace(o_proj=nn.Linear(2, 1, bias=False).requires_grad_(False)))
    model = nn.Module()
    model.get_model = lambda: SimpleNamespace(layers=[layer])

    def forward(x):
        given = torch.tensor(x).reshape(1, 1, 2)
        out = layer.self_attn.o_proj(given)
        return SimpleNamespace(loss=out.sum())

    layer.self_attn.o_proj.register_forward_hook(
        lambda module, args, output: output + acting(adapter, args[0].flatten().tolist())
    )
    model.forward, model.retriever = forward, adapter
    stage = context(adapter, "a")
    stage.model, stage.run = model, SimpleNamespace(memory={})
    stage.options = SimpleNamespace(keeplora_features=0.99)
    recipe = METHODS.get("keeplora")()
    recipe.every, recipe.kept = 1, {("o_proj", 0): torch.tensor([[1.0], [0.0]])}
    recipe.start(stage, [{"x": [1.0, 2.0]}])
    torch.testing.assert_close(adapter.pool.task("a").B["o_proj"].detach().flatten().abs(), torch.tensor([0.0, 1.0]))
    recipe.end(stage, [{"x": [1.0, 2.0]}])
    torch.testing.assert_close(stage.run.memory["kept.o_proj.0"].abs(), torch.eye(2))


# -- contextual ------------------------------------------------------------------------------------------------------


def contextual(mix):
    """Tasks a, b, c of one slot each, with keys 1, 0 and 0 in text space."""
    keys = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]}
    tasks = [slots(name, place, [10.0**place], [1.0], key) for place, (name, key) in enumerate(keys.items())]
    made = Pool(settings(text_dim=2, query_mode="text", unknown_share=0.0), tasks)
    made.settings.router = "keys"
    return ContextualAdapter(made, {MIX: torch.tensor(mix)})


def test_contextual_lends_earlier_slots_to_the_task_that_was_chosen():
    """A question of b takes b's slot (weight 1, adds 10) and .5 of a's (adds 1): 10.5. c: 100 + 2 * 10 - 1 * 1."""
    adapter = contextual([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [-1.0, 2.0, 0.0]])
    asked = [Query(text=torch.tensor([key])) for key in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0])]
    assert [acting(adapter, [1.0], query=query).item() for query in asked] == [1.0, 10.5, 119.0]


def test_contextual_trains_its_row_and_its_slots_and_leaves_the_earlier_ones():
    """While c trains every question is c's, whatever is nearest: dy/dalpha[c, s] = A[s] B[s] x, 1 and 10."""
    adapter = contextual([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    trained = adapter.train_only("c")
    assert {id(one) for one in trained} == {id(one) for one in adapter.parameters() if one.requires_grad}
    out = acting(adapter, [1.0], query=Query(text=torch.tensor([[1.0, 0.0]])))
    assert out.item() == 100.0
    out.sum().backward()
    assert adapter.mix.row.grad.tolist() == [1.0, 10.0, 0.0]
    assert adapter.pool.task("c").A["o_proj"].grad.item() == 1 and adapter.pool.task("a").A["o_proj"].grad is None


# -- the others ------------------------------------------------------------------------------------------------------


def test_individual_takes_the_given_task_and_nothing_else():
    """A B x is 10 for a and 7 for b; without a task, and for one that is not learned, the base answers."""
    adapter = GivenAdapter(pool(slots("a", 0, [10], [1]), slots("b", 1, [7], [1])))
    assert [acting(adapter, [1], [task]).item() for task in ("a", "b", "c", None)] == [10, 7, 0, 0]
    assert acting(adapter, [1]).item() == 0
    adapter.train_only("b")
    assert acting(adapter, [1], ["a"]).item() == 7


def test_moelora_weighs_experts_by_its_gate():
    """G q = (ln 3, 0), so w = (3/4, 1/4); experts add 10 and 2: 7.5 + .5."""
    made = Pool(
        settings(text_dim=1, query_mode="text"), [slots("a", 0, [10], [1], [0.0]), slots("b", 1, [2], [1], [0.0])]
    )
    adapter = GatedAdapter(made, {GATE: torch.tensor([[math.log(3)], [0.0]])})
    assert acting(adapter, [1]).item() == pytest.approx(8.0)


def test_l2p_puts_the_prompts_of_the_nearest_keys_in_front():
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])  # [groups, slots, part]
    empty = RetrieverSettings(1, {}, top_k=2, groups=1, text_dim=2, query_mode="text", router="keys", unknown_share=0.0)
    adapter = PrefixAdapter(
        Pool(empty, [TaskSlots("a", 0, 3, text_keys=keys, trained=True)]), {PREFIX: torch.arange(3.0).reshape(3, 1, 1)}
    )
    route = adapter.decide(Query(text=torch.tensor([[-0.1, 1.0]])))
    assert adapter.act(route, torch.float32).prefix.flatten().tolist() == [1.0, 2.0]


def test_one_adapter_is_one_slot_of_the_rank_of_a_route():
    """``top_k`` slots of ``rank`` are what a routed question gets."""
    keys = Pool(RetrieverSettings(1, {"o_proj": (2, 2)}, rank=3, top_k=4), [TaskSlots("a", 0, 4)])
    made = single_adapter(keys)
    assert (made.settings.rank, made.settings.top_k, made.size) == (12, 1, 1) and not made.task(SHARED).A[
        "o_proj"
    ].any()


def test_joint_reads_every_task_so_far_and_the_others_their_own(tmp_path):
    names = ["a", "b", "c"]
    tasks = {name: SimpleNamespace(files=(f"{name}.jsonl",)) for name in names}
    sequence = SimpleNamespace(task_names=names, task=tasks.__getitem__)
    for method in METHODS.names():
        wanted = ["a.jsonl", "b.jsonl"] if method == "joint" else ["b.jsonl"]
        assert METHODS.get(method)().files(sequence, "b") == wanted, method
