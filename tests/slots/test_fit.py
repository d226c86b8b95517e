"""Stage 1's keys: they cover a task's queries, do not collapse, and come out the same every time."""

import pytest
import torch
from torch.nn.functional import normalize

from llava.continual.prompt_keys import split_by_picture
from llava.data.rows import Row
from llava.slots.fit import FittedKeys, fit_keys, seed_of
from llava.slots.key_scores import KeyScores
from llava.slots.queries import Queries, Query

TEXT, IMAGE, GROUPS, SLOTS = 24, 32, 4, 8
IMAGE_WEIGHT = 0.5


def clustered(clusters=8, each=30, spread=0.3, seed=0) -> Queries:
    """Queries of a task in ``clusters`` clusters of equal size."""
    generator = torch.Generator().manual_seed(seed)

    def part(dim):
        centres = torch.randn(clusters, dim, generator=generator)
        noise = spread * torch.randn(clusters * each, dim, generator=generator)
        return centres.repeat_interleave(each, 0) + noise

    return Queries(part(TEXT), part(IMAGE), {})


def fit(queries, slots=SLOTS, top_k=1, seed=1) -> FittedKeys:
    return fit_keys(queries, slots, GROUPS, top_k, IMAGE_WEIGHT, seed)


@pytest.mark.parametrize("clusters", [3, 8, 12])
@pytest.mark.parametrize("seed", range(4))
def test_every_slot_is_selected_by_at_least_five_percent(clusters, seed):
    fitted = fit(clustered(clusters, 240 // clusters, seed=seed), seed=seed)
    assert fitted.selected.min() >= 0.05
    assert fitted.covered == SLOTS
    assert fitted.entropy > 0.9


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_keys_fit_better_than_random_ones_and_do_not_collapse(top_k):
    fitted = fit(clustered(), top_k=top_k)
    assert fitted.similarity_after > fitted.similarity_before + 0.15
    flat = torch.cat([fitted.text.transpose(0, 1).flatten(1), fitted.image.transpose(0, 1).flatten(1)], 1)
    similarity = normalize(flat, dim=-1) @ normalize(flat, dim=-1).T - 2 * torch.eye(SLOTS)
    assert similarity.max() < 0.9  # no two keys are alike


def test_each_cluster_gets_its_key_where_there_are_as_many_keys():
    queries = clustered(8, 30, spread=0.05)
    fitted = fit(queries)
    torch.testing.assert_close(fitted.selected, torch.full((8,), 1 / 8))
    assert fitted.similarity_after > 0.98


def test_fitting_is_deterministic_and_deaf_to_the_global_seed():
    torch.manual_seed(1)
    first = fit(clustered())
    torch.manual_seed(2)
    again = fit(clustered())
    assert torch.equal(first.text, again.text) and torch.equal(first.image, again.image)
    assert not torch.equal(first.text, fit(clustered(), seed=2).text)


def test_selection_is_what_the_keys_router_selects():
    queries = clustered(5, 20)
    fitted = fit(queries, top_k=2)
    similarity = KeyScores(fitted.text, fitted.image, IMAGE_WEIGHT, tau=0.1).similarity(
        Query(queries.text, queries.image)
    )
    chosen = similarity.topk(2).indices
    selected = torch.bincount(chosen.flatten(), minlength=SLOTS) / len(queries)
    torch.testing.assert_close(selected.float(), fitted.selected, atol=0.02, rtol=0)
    assert similarity.topk(2).values.mean().item() == pytest.approx(fitted.similarity_after, abs=1e-5)


def test_keys_are_unit_vectors_per_group_and_modality():
    fitted = fit(clustered())
    assert fitted.text.shape == (GROUPS, SLOTS, TEXT // GROUPS) and fitted.image.shape == (
        GROUPS,
        SLOTS,
        IMAGE // GROUPS,
    )
    torch.testing.assert_close(fitted.text.norm(dim=-1), torch.ones(GROUPS, SLOTS))
    only_text = fit_keys(Queries(clustered().text, None, {}), SLOTS, GROUPS, 1, 0.0, 1)
    assert only_text.image is None and only_text.text.shape == fitted.text.shape


@pytest.mark.parametrize("kind", ["equal", "zeros", "few"])
def test_degenerate_queries_give_finite_keys(kind):
    queries = clustered(1, SLOTS if kind == "few" else 40, spread=0.0 if kind == "equal" else 0.3)
    if kind == "zeros":
        queries.image.zero_()  # rows without pictures
    fitted = fit(queries)
    assert torch.isfinite(fitted.text).all() and torch.isfinite(fitted.image).all()
    assert fitted.selected.sum() == pytest.approx(1)


def test_more_starved_keys_than_queries_to_move_them_to():
    queries = Queries(torch.eye(TEXT)[:2].repeat(5, 1), torch.eye(IMAGE)[:2].repeat(5, 1), {})
    fitted = fit_keys(queries, 10, GROUPS, 1, IMAGE_WEIGHT, 3)
    assert torch.isfinite(fitted.text).all()


def test_seeds_depend_on_the_tasks_name_and_purpose_alone():
    assert seed_of("abd", 42, "keys") == seed_of("abd", 42, "keys")
    different = {seed_of(t, s, p) for t in ("abd", "chest") for s in (1, 2) for p in ("keys", "offsets")}
    assert len(different) == 8


def test_a_picture_is_held_out_with_all_of_its_rows():
    rows = [Row(n, (f"{n % 20}.png",), (("human", "q"), ("gpt", "a")), ("abd",), None, {}) for n in range(100)]
    kept, held = split_by_picture(rows, 0.1, 42)
    assert len(kept) + len(held) == 100 and len(held) == 10
    assert not {rows[n].image for n in kept.tolist()} & {rows[n].image for n in held.tolist()}
    again = split_by_picture(rows[::-1], 0.1, 42)[1]
    assert {rows[::-1][n].image for n in again.tolist()} == {rows[n].image for n in held.tolist()}
    assert len(split_by_picture(rows, 0.0, 42)[1]) == 0
