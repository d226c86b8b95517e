"""Routers by hand-computed values, on separable data, and per sample: what is in the batch changes no bit of a row."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from llava.slots.pool import Retriever, RetrieverSettings
from llava.slots.routers import ROUTERS, Pool, Query, Router, TaskStatistics, build_router

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


def pool(tasks=TASKS, slots=SLOTS) -> Pool:
    def keys(part):
        split = [
            normalize(getattr(cloud(task, slots, seed=7), part).unflatten(1, (GROUPS, -1)), dim=-1) for task in tasks
        ]
        return torch.cat(split).transpose(0, 1).contiguous()  # [groups, pool, part]

    statistics = {task: TaskStatistics.of(cloud(task, 60).joint()) for task in tasks}
    names = [task for task in tasks for _ in range(slots)]
    return Pool(names, keys("text"), keys("image"), statistics)


def retriever(tasks=TASKS, **options) -> Retriever:
    """The same pool behind a ``Retriever``, all tasks trained."""
    values = {"text_dim": TEXT, "image_dim": IMAGE, "groups": GROUPS, "rank": 2, "top_k": 2}
    made = Retriever(RetrieverSettings(num_layers=1, features={"o_proj": (4, 4)}, **{**values, **options}))
    whole = pool(tasks)
    for number, task in enumerate(tasks):
        block = made.add_task(task, SLOTS)
        span = slice(number * SLOTS, (number + 1) * SLOTS)
        block.text_keys.copy_(whole.text_keys[:, span])
        block.image_keys.copy_(whole.image_keys[:, span])
        block.statistics, block.trained = whole.statistics[task], True
    made.changed()
    return made


# -- values ------------------------------------------------------------------------------------------------------------


def test_group_cosine_by_hand():
    # two groups of two dimensions; slot 0 agrees in both groups, slot 1 in the first and is opposite in the second
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [0.0, -1.0]]])  # [groups, pool, part]
    router = build_router("keys", Pool(["a", "a"], text_keys=keys, tau=0.5))
    query = Query(torch.tensor([[5.0, 0.0, 0.0, 0.1], [1.0, 1.0, 0.0, 2.0]]))
    slanted = math.sqrt(0.5)
    expected = torch.tensor([[1.0, 0.0], [(slanted + 1) / 2, (slanted - 1) / 2]]).double()
    torch.testing.assert_close(router.similarity(query), expected)
    torch.testing.assert_close(router.scores(query), expected / 0.5)


def test_modalities_are_combined_by_their_weight():
    text = torch.tensor([[[1.0, 0.0]]])
    image = torch.tensor([[[0.0, 1.0]]])
    query = Query(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))  # text fits, image is orthogonal
    both = build_router("keys", Pool(["a"], text, image, image_weight=0.3))
    assert both.similarity(query).item() == pytest.approx(0.7)
    alone = build_router("keys", Pool(["a"], text_keys=text, image_weight=0.3))
    assert alone.similarity(Query(query.text)).item() == pytest.approx(1.0)


def test_length_of_a_query_or_key_does_not_matter():
    base, query = pool(), cloud("abd", 3)
    long = Pool(base.slot_tasks, base.text_keys * 9, base.image_keys * 0.1)
    scores = build_router("keys", base).scores(query)
    torch.testing.assert_close(build_router("keys", long).scores(Query(query.text * 4, query.image * 2)), scores)


@pytest.mark.parametrize("name", FITTED)
def test_separable_tasks_are_told_apart(name):
    router = build_router(name, pool())
    for task in TASKS:
        best = router.scores(cloud(task, 50, seed=3)).argmax(-1)
        assert all(router.pool.slot_tasks[slot] == task for slot in best.tolist())


@pytest.mark.parametrize("name", ["gaussian", "ridge"])
def test_within_a_task_the_keys_decide(name):
    query = cloud("chest", 20, seed=5)
    by_keys = build_router("keys", pool()).scores(query)[:, SLOTS : 2 * SLOTS]
    fitted = build_router(name, pool()).scores(query)[:, SLOTS : 2 * SLOTS]
    assert torch.equal(by_keys.argsort(), fitted.argsort())
    torch.testing.assert_close(fitted.softmax(-1), by_keys.softmax(-1))


def test_gaussian_is_the_linear_discriminant():
    router, query = build_router("gaussian", pool()), cloud("head", 4, seed=2)
    stats = [router.pool.statistics[task] for task in TASKS]
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
    found = build_router("ridge", made).log_posterior(query)
    torch.testing.assert_close(found, torch.log_softmax(20 * expected, -1), atol=1e-4, rtol=1e-4)


def test_oracle_gives_the_task_and_the_keys_the_slot():
    query = cloud("abd", 2)
    router = build_router("oracle", pool())
    scores = router.scores(Query(query.text, query.image, ["head", "chest"]))
    allowed = scores > -torch.inf
    assert allowed[0].nonzero().flatten().tolist() == [6, 7, 8]
    assert allowed[1].nonzero().flatten().tolist() == [3, 4, 5]
    assert torch.equal(scores[allowed], build_router("keys", pool()).scores(query)[allowed])


def test_uniform_likes_every_slot_alike():
    scores = build_router("uniform", pool()).scores(cloud("abd", 2))
    assert scores.shape == (2, 12) and scores.unique().numel() == 1
    route = retriever(router="uniform", top_k=4).route(cloud("abd", 2).text, cloud("abd", 2).image)
    assert torch.equal(route.slot_weights, torch.full((2, 4), 0.25))


def test_random_depends_on_seed_and_query_alone():
    query = cloud("abd", 6)
    scores = build_router("random", pool(), seed=1).scores(query)
    assert torch.equal(scores, build_router("random", pool(), seed=1).scores(query))
    turned = Query(query.text.flip(0), query.image.flip(0))
    assert torch.equal(scores.flip(0), build_router("random", pool(), seed=1).scores(turned))
    assert not torch.equal(scores, build_router("random", pool(), seed=2).scores(query))
    assert len({tuple(row.tolist()) for row in scores}) == 6


def test_batch_vote_takes_one_decision_and_warns():
    with pytest.warns(UserWarning, match="one decision for the whole batch"):
        router = build_router("batch_vote", pool())
    mixed = Query(*(torch.cat([getattr(cloud(t, 2), part) for t in ("abd", "head")]) for part in ("text", "image")))
    scores = router.scores(mixed)
    assert (scores == scores[0]).all()
    torch.testing.assert_close(scores[0], build_router("keys", pool()).scores(mixed).mean(0))


# -- order and batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "ridge"])
def test_the_order_of_tasks_changes_no_bit(name):
    query = cloud("chest", 5, seed=4)
    expected = build_router(name, pool()).log_posterior(query)
    for order in itertools.permutations(TASKS):
        assert torch.equal(build_router(name, pool(order)).log_posterior(query), expected)


def test_statistics_of_a_task_are_exactly_removable():
    three = tuple(task for task in TASKS if task != "chest")
    query, full = cloud("head", 5), retriever()
    full.remove_task("chest")
    never = retriever(three)
    assert torch.equal(full.router().scores(query), never.router().scores(query))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["keys", "gaussian", "ridge", "oracle", "uniform", "random"]),
    batch=st.lists(st.integers(0, 23), min_size=1, max_size=17),
    dims=st.sampled_from([(TEXT, IMAGE), (16, 64), (52, 36), (192, 1024)]),
)
def test_scores_of_a_row_do_not_depend_on_the_rest_of_the_batch(name, batch, dims):
    scores, posterior, weights = _one_by_one(name, dims)
    rows = torch.tensor(batch)
    text, image = _queries(dims)
    given_tasks = [TASKS[row % 4] for row in batch] if name == "oracle" else None
    made = _retriever_of(dims, "keys" if name == "oracle" else name)
    router = made.router(tasks_given=name == "oracle")
    assert torch.equal(router.scores(Query(text[rows], image[rows], given_tasks)), scores[rows])
    route = made.route(text[rows], image[rows], given_tasks)
    assert torch.equal(route.task_posterior, posterior[rows])
    assert torch.equal(route.slot_weights, weights[rows])


_MEMORY: dict = {}


def _queries(dims):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(24, dims[0], generator=generator), torch.randn(24, dims[1], generator=generator)


def _retriever_of(dims, name):
    if (dims, name) not in _MEMORY:
        generator = torch.Generator().manual_seed(6)
        made = Retriever(
            RetrieverSettings(1, {"o_proj": (4, 4)}, dims[0], dims[1], groups=4, rank=2, top_k=2, router=name)
        )
        for task in TASKS:
            block = made.add_task(task, 5)
            block.text_keys.normal_(generator=generator)
            block.image_keys.normal_(generator=generator)
            text, image = torch.randn(30, dims[0], generator=generator), torch.randn(30, dims[1], generator=generator)
            block.statistics, block.trained = TaskStatistics.of(Query(text, image).joint()), True
        made.changed()
        _MEMORY[dims, name] = made
    return _MEMORY[dims, name]


def _one_by_one(name, dims):
    if (name, dims) not in _MEMORY:
        made = _retriever_of(dims, "keys" if name == "oracle" else name)
        text, image = _queries(dims)
        rows = []
        for row in range(24):
            tasks = [TASKS[row % 4]] if name == "oracle" else None
            one = text[row : row + 1], image[row : row + 1]
            route = made.route(*one, tasks)
            scores = made.router(tasks_given=tasks is not None).scores(Query(*one, tasks))
            rows.append((scores, route.task_posterior, route.slot_weights))
        _MEMORY[name, dims] = tuple(torch.cat(part) for part in zip(*rows, strict=True))
    return _MEMORY[name, dims]


# -- the route ---------------------------------------------------------------------------------------------------------


def test_route_is_top_k_and_softmax_of_the_allowed_slots():
    made = retriever(router="keys", top_k=3)
    made.block("head").trained = False
    made.changed()
    query = cloud("head", 4)
    route = made.route(query.text, query.image)
    scores = build_router("keys", pool()).scores(query)
    scores[:, 6:9] = -torch.inf
    best, slots = scores.topk(3)
    assert torch.equal(route.slot_indices, slots)
    torch.testing.assert_close(route.slot_weights, best.softmax(-1).float())
    assert route.tasks == ["abd", "chest", "knee"]
    torch.testing.assert_close(route.task_posterior.sum(-1), torch.ones(4).double())
    assert made.pool_mask.tolist() == [True] * 6 + [False] * 3 + [True] * 3


def test_the_prototypes_weights_are_the_distances():
    query = cloud("abd", 3)
    route = retriever(router="keys", weighting="distance").route(query.text, query.image)
    best = build_router("keys", pool()).scores(query).topk(2).values
    torch.testing.assert_close(route.slot_weights, (best / best.sum(-1, keepdim=True)).float())


def test_while_a_task_trains_only_its_slots_compete():
    made, query = retriever(), cloud("abd", 5)
    made.train_only("head")
    route = made.route(query.text, query.image)
    assert set(route.slot_indices.flatten().tolist()) <= {6, 7, 8}
    made.finish_training()
    assert set(made.route(query.text, query.image).slot_indices.flatten().tolist()) <= {0, 1, 2}


def test_a_description_has_plain_rounded_values():
    query = cloud("chest", 2)
    told = retriever().route(query.text, query.image).describe(1)
    assert told["task"] == "chest" and set(told["task_posterior"]) == set(TASKS)
    assert sum(told["weights"]) == pytest.approx(1, abs=1e-5)
    assert all(slot in (3, 4, 5) for slot in told["slots"])


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTED)
def test_a_query_of_another_dimension_names_both(name):
    router, query = build_router(name, pool()), cloud("abd", 2)
    with pytest.raises(ValueError, match="text query has 16 dimensions, the keys have 12"):
        router.scores(Query(torch.zeros(2, 16), query.image))
    with pytest.raises(ValueError, match="image query has 8 dimensions, the keys have 20"):
        router.scores(Query(query.text, torch.zeros(2, 8)))
    with pytest.raises(ValueError, match="the pool has image keys, but the query has no image part"):
        router.scores(Query(query.text))


def test_statistics_of_another_dimension_name_both():
    made = pool()
    made.statistics = {task: TaskStatistics.of(torch.rand(9, 8)) for task in TASKS}
    with pytest.raises(ValueError, match="query has 32 dimensions, the task statistics 8"):
        build_router("gaussian", made).scores(cloud("abd", 1))


def test_nan_is_refused_in_keys_and_queries():
    broken = pool()
    broken.text_keys[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="keys hold NaN"):
        build_router("keys", broken)
    query = cloud("abd", 2)
    query.image[1, 3] = torch.inf
    with pytest.raises(ValueError, match="image query holds NaN or infinite"):
        build_router("keys", pool()).scores(query)


def test_empty_pools_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="the pool is empty"):
        build_router("keys", Pool([]))
    with pytest.raises(ValueError, match="unknown router 'compass'; known: keys, gaussian"):
        build_router("compass", pool())
    with pytest.raises(ValueError, match="missing: \\['knee'\\]"):
        build_router("gaussian", Pool(list(TASKS), statistics=pool(TASKS[:3]).statistics))
    empty = Retriever(RetrieverSettings(1, {"o_proj": (4, 4)}, TEXT, IMAGE))
    assert not empty.active
    with pytest.raises(ValueError, match="the pool is empty"):
        empty.route(torch.zeros(1, TEXT), torch.zeros(1, IMAGE))


def test_more_selected_than_allowed_slots_names_both():
    query = cloud("abd", 1)
    with pytest.raises(ValueError, match="top_k is 13, but only 12 slots may be selected"):
        retriever(top_k=13).route(query.text, query.image)
    with pytest.raises(ValueError, match="top_k is 4, but task 'chest' has 3 slots"):
        retriever(top_k=4).route(query.text, query.image, ["chest"])


def test_an_unknown_or_removed_task_names_the_known_ones():
    made, query = retriever(), cloud("abd", 1)
    with pytest.raises(ValueError, match="no slots for task 'foot'; the pool knows \\['abd', 'chest', 'head', 'knee'"):
        made.route(query.text, query.image, ["foot"])
    made.remove_task("chest")
    with pytest.raises(ValueError, match="no slots for task 'chest'; the pool knows \\['abd', 'head', 'knee'\\]"):
        made.route(query.text, query.image, ["chest"])
    with pytest.raises(ValueError, match="no slots for task 'chest'"):
        made.slot_range("chest")
    with pytest.raises(ValueError, match="already has slots for task 'abd'"):
        made.add_task("abd", 3)
    with pytest.raises(ValueError, match="needs the task of every question"):
        build_router("oracle", pool()).scores(query)


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
    assert set(ROUTERS) == {"keys", "gaussian", "ridge", "oracle", "uniform", "random", "batch_vote"}
    with pytest.raises(NotImplementedError, match="must define scores"):
        Router(pool()).scores(cloud("abd", 1))
