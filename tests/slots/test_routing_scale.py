"""Choosing slots from large pools: the same choice as from all scores, without reading the pool."""

import pytest
import torch

from llava.slots.pool import Pool
from llava.slots.queries import MODALITY_DIM, Query, TaskStatistics, fold
from llava.slots.routers import build_router
from llava.slots.settings import RetrieverSettings
from llava.slots.task_slots import TaskSlots

TEXT, IMAGE, GROUPS = 16, 24, 4


def pool(counts, with_features=False, seed=0):
    """Random slots, ``counts[i]`` of them for task ``i``; the tasks lie close together."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"task{(7 * number) % len(counts):04d}" for number in range(len(counts))]  # not in name order
    statistics, features = {}, {}
    for name in names:
        text = torch.randn(TEXT, generator=generator) * 0.3 + torch.randn(20, TEXT, generator=generator)
        query = Query(text, torch.randn(20, IMAGE, generator=generator))
        statistics[name] = TaskStatistics.of(query.joint())
        if with_features:
            features[name] = TaskStatistics.of(query.random_features())

    def keys(count, dim):
        return torch.randn(GROUPS, count, dim // GROUPS, generator=generator)

    made = Pool(RetrieverSettings(1, {"o_proj": (4, 4)}, TEXT, IMAGE, groups=GROUPS, rank=1))
    for name, count in zip(names, counts, strict=True):
        task = made.append(name, count)
        task.text_keys, task.image_keys = keys(count, TEXT), keys(count, IMAGE)
        task.statistics, task.feature_statistics = statistics[name], features.get(name)
    return made


def router_of(name, made):
    """Over all tasks, trained or not."""
    return build_router(name, made.settings, made.tasks)


def queries(count, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return Query(torch.randn(count, TEXT, generator=generator), torch.randn(count, IMAGE, generator=generator))


@pytest.mark.parametrize("name", ["gaussian", "ridge"])
@pytest.mark.parametrize("counts", [[8] * 40, [1, 5, 2, 9, 3, 1, 1, 4], [6, 7], [12]])
def test_the_choice_is_that_of_all_scores(name, counts):
    router, query = router_of(name, pool(counts)), queries(30)
    scores = router.scores(query)
    for k in (1, 4):
        choice, best = router.choose(query, k), scores.topk(k)
        torch.testing.assert_close(choice.scores, best.values, atol=1e-9, rtol=1e-9)
        assert torch.equal(choice.slots, best.indices)
    posterior = router.log_posterior(query).exp()
    assert torch.equal(choice.posterior.sort().values, posterior.sort().values)
    first = [router.tasks[place] for place in choice.posterior.argmax(-1).tolist()]
    assert first == [router.slot_tasks[slot] for slot in best.indices[:, 0].tolist()]


@pytest.mark.parametrize("name", ["gaussian", "ridge", "keys"])
def test_what_a_choice_lacks_is_named(name):
    router, whole = router_of(name, pool([3, 2])), queries(2)
    with pytest.raises(ValueError, match="the pool has image keys, but the query has no image part"):
        router.choose(Query(whole.text), 2)
    with pytest.raises(ValueError, match="text query has 15 dimensions, the keys have 16"):
        router.choose(Query(whole.text[:, 1:], whole.image), 2)
    with pytest.raises(ValueError, match="6 slots are asked for, but the pool has 5"):
        router.choose(whole, 6)


def test_ridge_on_random_features_tells_apart_what_no_line_can():
    """Two tasks with one mean: directions along the axes, and directions between them."""
    turns = torch.arange(400) * (torch.pi / 2)  # quarter turns
    wobble = torch.rand(400, generator=torch.Generator().manual_seed(0)) * 0.3 - 0.15
    angles = {"along": turns + wobble, "between": turns + torch.pi / 4 + wobble}
    tasks = {name: Query(text=torch.stack([angle.cos(), angle.sin()], 1)) for name, angle in angles.items()}
    joint = {name: TaskStatistics.of(query.joint()) for name, query in tasks.items()}
    waves = {name: TaskStatistics.of(query.random_features()) for name, query in tasks.items()}

    def right(features):
        settings = RetrieverSettings(1, {"o_proj": (4, 4)}, 2, query_mode="text", groups=1)
        made = [
            TaskSlots(name, place, place + 1, torch.ones(1, 1, 2), None, joint[name], features.get(name))
            for place, name in enumerate(tasks)
        ]
        router = build_router("ridge", settings, made)
        found = [router.log_posterior(query).argmax(1) == place for place, query in enumerate(tasks.values())]
        return torch.cat(found).double().mean().item()

    assert right(waves) > 0.99 > 0.7 > right({})


@pytest.mark.parametrize("name", ["gaussian", "ridge"])
def test_one_route_allocates_a_small_part_of_the_pool(name):
    made = pool([8] * 500, with_features=name == "ridge")
    router, query = router_of(name, made), queries(1)
    router.choose(query, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        router.choose(query, 4)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert 0 < allocated < router.keys.table.nbytes / 4


def test_a_pool_of_a_thousand_tasks_is_saved_read_and_routed(tmp_path):
    made = pool([1] * 1000)
    for task in made.tasks:
        task.trained = True
    made.changed()
    made.write(tmp_path / "slots.pth")
    found = Pool.read(tmp_path / "slots.pth")
    assert found.names == made.names and found.size == len(found.selectable) == 1000
    query = queries(20)
    one, other = made.route(query), found.route(query)
    assert torch.equal(one.slot_indices, other.slot_indices) and torch.equal(one.slot_weights, other.slot_weights)
    assert len(set(one.slot_indices[:, 0].tolist())) > 1
    found.write(tmp_path / "again.pth")
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "slots.pth").read_bytes()


def test_long_queries_are_folded_and_keep_their_inner_products():
    rows = torch.randn(50, 4096, generator=torch.Generator().manual_seed(1)).double()
    rows = torch.nn.functional.normalize(rows + 2 * rows[:1], dim=1)
    folded = fold(rows)
    assert folded.shape == (50, MODALITY_DIM)
    assert (folded @ folded.T - rows @ rows.T).abs().mean() < 0.06
    assert torch.equal(fold(rows[3:4]), folded[3:4])
    short = rows[:, :MODALITY_DIM]
    assert fold(short) is short
