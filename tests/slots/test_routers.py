"""Routers by hand-computed values, on separable data, and per sample: what is in the batch changes no bit of a row."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from llava.slots.key_scores import KeyScores
from llava.slots.pool import Pool
from llava.slots.queries import Query, TaskStatistics
from llava.slots.route import Route
from llava.slots.routers import ORACLE, ROUTERS, Router, build_router
from llava.slots.settings import RetrieverSettings
from llava.slots.unknown import TaskExtent

TEXT, IMAGE, GROUPS, SLOTS = 12, 20, 4, 3
TASKS = ("abd", "chest", "head", "knee")
FITTED = ("keys", "gaussian", "ridge")


def cloud(task: str, count: int, seed: int = 0) -> Query:
    """Queries about a task's own centre: easy to tell from the other tasks'."""
    place = TASKS.index(task)
    generator = torch.Generator().manual_seed(100 * seed + place)

    def around(dim):
        centre = torch.zeros(dim)
        centre[place::4] = 3.0
        return centre + 0.5 * torch.randn(count, dim, generator=generator)

    return Query(around(TEXT), around(IMAGE))


def pool(tasks=TASKS, **options) -> Pool:
    """Trained slots for each task, with keys near the task's centre."""
    values = {"text_dim": TEXT, "image_dim": IMAGE, "groups": GROUPS, "rank": 2, "top_k": 2}
    made = Pool(RetrieverSettings(num_layers=1, features={"o_proj": (4, 4)}, **{**values, **options}))
    for name in tasks:
        task, near = made.append(name, SLOTS), cloud(name, SLOTS, seed=7)
        for kind in ("text", "image"):
            grouped = normalize(getattr(near, kind).unflatten(1, (GROUPS, -1)), dim=-1)
            setattr(task, f"{kind}_keys", grouped.transpose(0, 1).contiguous())  # [groups, slots, part]
        task.statistics, task.trained = TaskStatistics.of(cloud(name, 60).joint()), True
    made.changed()
    return made


def build(name, made: Pool | None = None, seed=0) -> Router:
    made = pool() if made is None else made
    return build_router(name, made.settings, made.tasks, seed)


# -- values ------------------------------------------------------------------------------------------------------------


def test_group_cosine_by_hand():
    # two groups of two dimensions; slot 0 agrees in both groups, slot 1 in the first and is opposite in the second
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, -1.0]]])  # [groups, pool, part]
    found = KeyScores(keys, None, image_weight=0.5, tau=0.5)
    query = Query(torch.tensor([[5.0, 0.0, 0.0, 0.1], [1.0, 1.0, 0.0, 2.0]]))
    slanted = math.sqrt(0.5)
    expected = torch.tensor([[1.0, 0.0], [(slanted + 1) / 2, (slanted - 1) / 2]]).double()
    torch.testing.assert_close(found.similarity(query), expected)
    torch.testing.assert_close(found.scores(query), expected / 0.5)


def test_modalities_are_combined_by_their_weight():
    text = torch.tensor([[[1.0, 0.0]]])
    image = torch.tensor([[[0.0, 1.0]]])
    query = Query(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))  # text fits, image is orthogonal
    both = KeyScores(text, image, image_weight=0.3, tau=0.1)
    assert both.similarity(query).item() == pytest.approx(0.7)
    alone = KeyScores(text, None, image_weight=0.3, tau=0.1)
    assert alone.similarity(Query(query.text)).item() == pytest.approx(1.0)


def test_length_of_a_query_or_key_does_not_matter():
    made, query = pool(), cloud("abd", 3)
    scores = build("keys", made).scores(query)
    for task in made.tasks:
        task.text_keys, task.image_keys = task.text_keys * 9, task.image_keys * 0.1
    torch.testing.assert_close(build("keys", made).scores(Query(query.text * 4, query.image * 2)), scores)


@pytest.mark.parametrize("name", FITTED)
def test_separable_tasks_are_told_apart(name):
    router = build(name)
    for task in TASKS:
        best = router.scores(cloud(task, 50, seed=3)).argmax(-1)
        assert all(router.slot_tasks[slot] == task for slot in best.tolist())


@pytest.mark.parametrize("name", ["gaussian", "ridge"])
def test_within_a_task_the_keys_decide(name):
    query = cloud("chest", 20, seed=5)
    by_keys = build("keys").scores(query)[:, SLOTS : 2 * SLOTS]
    fitted = build(name).scores(query)[:, SLOTS : 2 * SLOTS]
    assert torch.equal(by_keys.argsort(), fitted.argsort())
    torch.testing.assert_close(fitted.softmax(-1), by_keys.softmax(-1))


def test_gaussian_is_the_linear_discriminant():
    router, query = build("gaussian"), cloud("head", 4, seed=2)
    stats = [router.statistics()[task] for task in TASKS]
    covariance = sum(s.scatter.double() for s in stats) / sum(s.count for s in stats)
    level = covariance.diagonal().mean()
    inverse = torch.linalg.inv(0.9 * covariance + 0.1 * level * torch.eye(len(covariance)).double())
    distance = torch.stack(
        [torch.einsum("bi,ij,bj->b", query.joint() - s.mean, inverse, query.joint() - s.mean) for s in stats], 1
    )
    torch.testing.assert_close(
        router.log_posterior(query), torch.log_softmax(-0.5 * distance, -1), rtol=1e-6, atol=1e-6
    )


def test_ridge_is_least_squares_onto_one_hot_tasks():
    tasks = TASKS[:3]
    made, query = pool(tasks), cloud("abd", 4, seed=2)
    joint = torch.cat([cloud(task, 60).joint() for task in tasks])
    target = torch.eye(3).double().repeat_interleave(60, 0)
    centred = joint - joint.mean(0)
    gram = centred.T @ centred / len(joint)
    penalty = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weight = torch.linalg.solve(gram + penalty, centred.T @ (target - target.mean(0)) / len(joint))
    expected = (query.joint() - joint.mean(0)) @ weight + target.mean(0)
    found = build("ridge", made).log_posterior(query)
    torch.testing.assert_close(found, torch.log_softmax(20 * expected, -1), atol=1e-4, rtol=1e-4)


def test_a_given_task_competes_alone_by_its_keys():
    query, made = cloud("abd", 2), pool(weighting="softmax")
    route = made.route(query, ["head", "chest"])
    assert set(route.slot_indices[0].tolist()) <= {6, 7, 8} and set(route.slot_indices[1].tolist()) <= {3, 4, 5}
    scores = build("keys").scores(query)
    for row, mine in enumerate((slice(6, 9), slice(3, 6))):
        best = scores[row, mine].topk(2)
        assert torch.equal(route.slot_indices[row], best.indices + mine.start)
        torch.testing.assert_close(route.slot_weights[row], best.values.softmax(-1).float(), atol=0, rtol=0)
    torch.testing.assert_close(route.task_posterior, torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]]).double())
    told = route.describe(0)
    assert told["task"] == "head" and told["task_given"] is True and "novelty" not in told


@pytest.mark.parametrize("name", ["keys", "gaussian", "ridge", "uniform", "random", "batch_vote"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.filterwarnings("ignore:router 'batch_vote'")
def test_a_row_of_a_mixed_batch_routes_as_in_a_batch_of_its_kind(name, calibrated):
    """Some rows have their task given, the others none; each kind decides as if it were alone, bit for bit."""
    made = pool(router=name)
    for task in made.tasks if calibrated else []:
        task.extent = TaskExtent.of(cloud(task.name, 40).evidence(), range(40))
    parts = [cloud(task, 2, seed=9) for task in TASKS] + [Query(cloud("abd", 1).text, 9 - cloud("abd", 1).image)]
    query = Query(torch.cat([part.text for part in parts]), torch.cat([part.image for part in parts]))
    given = ["head", None, "abd", "chest", None, None, "knee", None, None]
    mixed = made.route(query, given)
    for rows in ([0, 2, 3, 6], [1, 4, 5, 7, 8]):
        tasks = [given[row] for row in rows]
        own = made.route(query.select(rows), tasks if tasks[0] else None)
        for field in ("slot_indices", "slot_weights", "task_posterior"):
            assert torch.equal(getattr(mixed, field)[rows], getattr(own, field)), field
        if own.novelty is not None:
            assert torch.equal(mixed.novelty[rows], own.novelty)
        assert [mixed.describe(row) for row in rows] == [own.describe(place) for place in range(len(rows))]
    assert mixed.given == given
    assert (mixed.novelty is not None) == (calibrated and name in FITTED)
    if mixed.novelty is not None:
        assert mixed.unknown[8] and not mixed.unknown[[0, 2, 3, 6]].any()
        assert mixed.novelty[[0, 2, 3, 6]].isnan().all() and mixed.slot_weights[[0, 2, 3, 6]].sum(-1).min() > 0.99


def test_tasks_that_are_given_nowhere_are_as_none_at_all():
    query, made = cloud("abd", 2), pool()
    nowhere, none = made.route(query, [None, None]), made.route(query)
    assert torch.equal(nowhere.slot_weights, none.slot_weights) and nowhere.given is None


def test_uniform_likes_every_slot_alike():
    scores = build("uniform").scores(cloud("abd", 2))
    assert scores.shape == (2, 12) and scores.unique().numel() == 1
    route = pool(router="uniform", top_k=4).route(cloud("abd", 2))
    assert torch.equal(route.slot_weights, torch.full((2, 4), 0.25))


def test_random_depends_on_seed_and_query_alone():
    query = cloud("abd", 6)
    scores = build("random", seed=1).scores(query)
    assert torch.equal(scores, build("random", seed=1).scores(query))
    turned = Query(query.text.flip(0), query.image.flip(0))
    assert torch.equal(scores.flip(0), build("random", seed=1).scores(turned))
    assert not torch.equal(scores, build("random", seed=2).scores(query))
    assert len({tuple(row.tolist()) for row in scores}) == 6


def test_batch_vote_takes_one_decision_and_warns():
    with pytest.warns(UserWarning, match="one decision for the whole batch"):
        router = build("batch_vote")
    mixed = Query(*(torch.cat([getattr(cloud(t, 2), part) for t in ("abd", "head")]) for part in ("text", "image")))
    scores = router.scores(mixed)
    assert (scores == scores[0]).all()
    torch.testing.assert_close(scores[0], build("keys").scores(mixed).mean(0))


# -- order and batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "ridge"])
def test_the_order_of_tasks_changes_no_bit(name):
    query = cloud("chest", 5, seed=4)
    expected = build(name).log_posterior(query)
    for order in itertools.permutations(TASKS):
        assert torch.equal(build(name, pool(order)).log_posterior(query), expected)


def test_statistics_of_a_task_are_exactly_removable():
    three = tuple(task for task in TASKS if task != "chest")
    query, full = cloud("head", 5), pool()
    full.remove("chest")
    never = pool(three)
    assert torch.equal(full.router().scores(query), never.router().scores(query))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["keys", "gaussian", "ridge", "oracle", "uniform", "random"]),
    batch=st.lists(st.integers(0, 23), min_size=1, max_size=17),
    dims=st.sampled_from([(TEXT, IMAGE), (16, 64), (52, 36), (192, 1024)]),
)
def test_scores_of_a_row_do_not_depend_on_the_rest_of_the_batch(name, batch, dims):
    expected = _one_by_one(name, dims)
    rows, query = torch.tensor(batch), _queries(dims).select(batch)
    given_tasks = [TASKS[row % 4] for row in batch] if name == ORACLE else None
    made = _pool_of(dims, name)
    if name != ORACLE:
        assert torch.equal(made.router().scores(query), expected[0][rows])
    route = made.route(query, given_tasks)
    for found, alone in zip((route.slot_indices, route.task_posterior, route.slot_weights), expected[1:], strict=True):
        assert torch.equal(found, alone[rows])


_MEMORY: dict = {}


def _queries(dims):
    generator = torch.Generator().manual_seed(5)
    return Query(torch.randn(24, dims[0], generator=generator), torch.randn(24, dims[1], generator=generator))


def _pool_of(dims, name):
    if (dims, name) not in _MEMORY:
        generator = torch.Generator().manual_seed(6)
        made = Pool(RetrieverSettings(1, {"o_proj": (4, 4)}, *dims, groups=4, rank=2, top_k=2, router=name))
        for task in TASKS:
            block = made.append(task, 5)
            block.text_keys.normal_(generator=generator)
            block.image_keys.normal_(generator=generator)
            text, image = torch.randn(30, dims[0], generator=generator), torch.randn(30, dims[1], generator=generator)
            block.statistics, block.trained = TaskStatistics.of(Query(text, image).joint()), True
        made.changed()
        _MEMORY[dims, name] = made
    return _MEMORY[dims, name]


def _one_by_one(name, dims):
    if (name, dims) not in _MEMORY:
        made, query, rows = _pool_of(dims, name), _queries(dims), []
        for row in range(24):
            one = query.select([row])
            route = made.route(one, [TASKS[row % 4]] if name == ORACLE else None)
            scores = torch.zeros(1) if name == ORACLE else made.router().scores(one)
            rows.append((scores, route.slot_indices, route.task_posterior, route.slot_weights))
        _MEMORY[name, dims] = tuple(torch.cat(part) for part in zip(*rows, strict=True))
    return _MEMORY[name, dims]


# -- the route ---------------------------------------------------------------------------------------------------------


def test_route_is_top_k_and_softmax_of_the_allowed_slots():
    made = pool(router="keys", top_k=3)
    made.task("head").trained = False
    made.changed()
    query = cloud("head", 4)
    route = made.route(query)
    scores = build("keys").scores(query)
    scores[:, 6:9] = -torch.inf
    best, slots = scores.topk(3)
    assert torch.equal(route.slot_indices, slots)
    torch.testing.assert_close(route.slot_weights, best.softmax(-1).float())
    assert route.tasks == ["abd", "chest", "knee"]
    torch.testing.assert_close(route.task_posterior.sum(-1), torch.ones(4).double())
    assert made.pool_mask.tolist() == [True] * 6 + [False] * 3 + [True] * 3


def test_the_prototypes_weights_are_the_distances():
    query = cloud("abd", 3)
    route = pool(router="keys", weighting="distance").route(query)
    best = build("keys").scores(query).topk(2).values
    torch.testing.assert_close(route.slot_weights, (best / best.sum(-1, keepdim=True)).float())


def test_distance_weights_of_equal_slots_are_equal():
    made = pool(router="uniform", weighting="distance")
    assert torch.equal(made.route(cloud("abd", 3)).slot_weights, torch.full((3, 2), 0.5))


def test_while_a_task_trains_only_its_slots_compete():
    made, query = pool(), cloud("abd", 5)
    made.train_only("head")
    route = made.route(query)
    assert set(route.slot_indices.flatten().tolist()) <= {6, 7, 8}
    made.finish_training()
    assert set(made.route(query).slot_indices.flatten().tolist()) <= {0, 1, 2}


def test_a_description_has_plain_rounded_values():
    query = cloud("chest", 2)
    told = pool().route(query).describe(1)
    assert told["task"] == "chest" and set(told["task_posterior"]) == set(TASKS)
    assert sum(told["weights"]) == pytest.approx(1, abs=1e-5)
    assert all(slot in (3, 4, 5) for slot in told["slots"])


def test_a_description_is_as_short_for_a_thousand_tasks():
    tasks = [f"t{number:04d}" for number in range(1000)]
    posterior = torch.linspace(0, 1, 1000).double().roll(500)[None]
    route = Route(torch.tensor([[4, 7]]), torch.tensor([[0.5, 0.5]]), posterior, tasks, torch.tensor([0.5]))
    told = route.describe(0, "t0100")
    assert list(told["task_posterior"]) == ["t0100", "t0495", "t0496", "t0497", "t0498", "t0499"]
    assert told["task"] == "t0499" and len(json.dumps(told)) < 300
    assert list(route.describe(0, "none of them")["task_posterior"]) == list(told["task_posterior"])[1:]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTED)
def test_a_query_of_another_dimension_names_both(name):
    router, query = build(name), cloud("abd", 2)
    with pytest.raises(ValueError, match="text query has 16 dimensions, the keys have 12"):
        router.scores(Query(torch.zeros(2, 16), query.image))
    with pytest.raises(ValueError, match="image query has 8 dimensions, the keys have 20"):
        router.scores(Query(query.text, torch.zeros(2, 8)))
    with pytest.raises(ValueError, match="the pool has image keys, but the query has no image part"):
        router.scores(Query(query.text))


def test_statistics_of_another_dimension_name_both():
    made = pool()
    for task in made.tasks:
        task.statistics = TaskStatistics.of(torch.rand(9, 8))
    with pytest.raises(ValueError, match="query has 32 dimensions, the task statistics 8"):
        build("gaussian", made).scores(cloud("abd", 1))


def test_nan_is_refused_in_keys_and_queries():
    broken = pool()
    broken.task("abd").text_keys[1, 2, 0] = torch.nan
    for name in ("keys", "gaussian"):
        with pytest.raises(ValueError, match="keys hold NaN"):
            build(name, broken)
    query = cloud("abd", 2)
    query.image[1, 3] = torch.inf
    with pytest.raises(ValueError, match="image query holds NaN or infinite"):
        build("keys").scores(query)


def test_empty_pools_and_unknown_names_are_refused():
    made = pool()
    with pytest.raises(ValueError, match="the pool is empty"):
        build_router("keys", made.settings, [])
    with pytest.raises(ValueError, match="unknown router 'compass'; known: batch_vote, gaussian, keys"):
        build("compass")
    made.task("knee").statistics = None
    with pytest.raises(ValueError, match="missing: \\['knee'\\]"):
        build("gaussian", made)
    empty = Pool(made.settings)
    assert not empty.active
    with pytest.raises(ValueError, match="the pool is empty"):
        empty.route(Query(torch.zeros(1, TEXT), torch.zeros(1, IMAGE)))


def test_more_selected_than_allowed_slots_names_both():
    query = cloud("abd", 1)
    with pytest.raises(ValueError, match="top_k is 13, but only 12 slots may be selected"):
        pool(top_k=13).route(query)
    with pytest.raises(ValueError, match="top_k is 4, but task 'chest' has 3 slots"):
        pool(top_k=4).route(query, ["chest"])


def test_an_unknown_or_removed_task_names_the_known_ones():
    made, query = pool(), cloud("abd", 1)
    with pytest.raises(ValueError, match="no slots for task 'foot'; the pool knows \\['abd', 'chest', 'head', 'knee'"):
        made.route(query, ["foot"])
    made.remove("chest")
    with pytest.raises(ValueError, match="no slots for task 'chest'; the pool knows \\['abd', 'head', 'knee'\\]"):
        made.route(query, ["chest"])
    with pytest.raises(ValueError, match="no slots for task 'chest'"):
        made.slot_range("chest")
    with pytest.raises(ValueError, match="already has slots for task 'abd'"):
        made.append("abd", 3)


def test_slots_whose_router_is_the_oracle_need_every_task():
    made, query = pool(router=ORACLE), cloud("abd", 2)
    for tasks in (None, ["abd", None]):
        with pytest.raises(ValueError, match="needs the task of every question"):
            made.route(query, tasks)
    assert torch.equal(made.route(query, ["abd"] * 2).slot_weights, pool().route(query, ["abd"] * 2).slot_weights)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"query_mode": "smell"}, "query_mode must be one of .* not 'smell'"),
        ({"router": "compass"}, "unknown router 'compass'"),
        ({"weighting": "heavy"}, "weighting must be .* not 'heavy'"),
        ({"text_dim": 10}, "text queries have 10 dimensions, which 4 groups do not divide"),
        ({"features": {"z_proj": (4, 4)}}, "unknown target projection 'z_proj'"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RetrieverSettings(**{"num_layers": 1, "features": {"o_proj": (4, 4)}, "text_dim": TEXT, **values})


def test_a_router_is_one_class():
    assert {"keys", "gaussian", "ridge", "uniform", "random", "batch_vote"} <= set(ROUTERS.names())
    assert ORACLE not in ROUTERS.names()
    with pytest.raises(NotImplementedError, match="Router must define scores"):
        Router(pool().settings, pool().tasks).scores(cloud("abd", 1))


PLUGIN = """
import torch
from llava.slots.routers import ROUTERS, Router

@ROUTERS.register
class LastRouter(Router):
    name = "last"

    def scores(self, query):
        return torch.arange(len(self.slot_tasks)).double().repeat(len(query), 1)
"""


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    """A folder of plug-ins with a router of its own; forgotten afterwards."""
    ROUTERS.names()
    monkeypatch.setattr(ROUTERS, "_items", dict(ROUTERS._items))
    (tmp_path / "last_router.py").write_text(PLUGIN)
    monkeypatch.setenv("LLAVA_PLUGINS", str(tmp_path))


def test_a_router_from_a_plug_in_folder_routes_and_may_stand_in_the_settings(plugged, tmp_path):
    made = pool(router="last")
    assert made.route(cloud("abd", 2)).slot_indices.tolist() == [[11, 10]] * 2
    assert pool().route(cloud("abd", 1), router="last").slot_indices.tolist() == [[11, 10]]
    made.write(tmp_path / "slots.pth")
    assert Pool.read(tmp_path / "slots.pth").settings.router == "last"
