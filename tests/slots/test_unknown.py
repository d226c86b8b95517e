"""Questions that fit no known task: the distance, its calibration, and the way back to the base model."""

import json

import pytest
import torch
from tiny_llava import HIDDEN, VISION, write_base, write_images, write_stage

from llava.data.rows import question_row, write_jsonl
from llava.eval import model_vqa_loader
from llava.eval.generation import REFUSAL
from llava.model.builder import load_pretrained_model
from llava.slots import unknown
from llava.slots.pool import Pool
from llava.slots.queries import Query, TaskStatistics
from llava.slots.settings import RetrieverSettings
from llava.slots.unknown import TaskExtent, UnknownGate

DIM = 6


def cloud(task, rows, seed=0):
    """Queries about a centre of the task's own: ``[rows, DIM]``."""
    centre = torch.randn(DIM, generator=torch.Generator().manual_seed(sum(map(ord, task)))) * 4
    return centre + torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)) * 0.5


def joint(task, rows, seed=0):
    return Query(text=cloud(task, rows, seed)).joint()


def calibrated(tasks, **settings):
    made = Pool(RetrieverSettings(1, {"o_proj": (4, 4)}, DIM, groups=2, rank=2, top_k=2, **settings))
    for task in tasks:
        block = made.append(task, 3)
        block.text_keys.copy_(torch.randn(2, 3, DIM // 2, generator=torch.Generator().manual_seed(len(task))))
        block.statistics = TaskStatistics.of(joint(task, 200))
        block.extent = TaskExtent.of(joint(task, 200), [number // 4 for number in range(200)])
        block.trained = True
    made.changed()
    return made


def distance(extent, row):
    """Of one query's evidence, alone."""
    return unknown.distances([extent], row[None])[0]


def test_the_distance_is_mahalanobis_under_the_regularised_covariance():
    data = joint("abd", 50).double()
    extent, row = TaskExtent.of(data, range(50)), joint("chest", 1)[0]
    covariance = (data - data.mean(0)).T @ (data - data.mean(0)) / 50
    covariance = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(DIM).double()
    offset = row - data.mean(0)
    expected = (offset @ torch.linalg.inv(covariance) @ offset).sqrt()
    torch.testing.assert_close(distance(extent, row).double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("share, over", [(0.01, 1), (0.05, 5), (0.001, 0), (0.5, 50)])
def test_at_most_the_share_of_held_out_rows_lies_beyond_the_limit(share, over):
    extent = TaskExtent.of(joint("abd", 100), range(100))
    assert int((extent.distances > extent.limit(share)).sum()) == over


def test_beyond_the_leading_directions_one_variance_serves_all(monkeypatch):
    monkeypatch.setattr(unknown, "DIRECTIONS", 2)
    data = joint("abd", 60)
    variances = torch.linalg.eigvalsh((data - data.mean(0)).T @ (data - data.mean(0)) / 60)
    extent = TaskExtent.of(data, range(60))
    assert extent.directions.shape == (2, DIM)
    torch.testing.assert_close(extent.rest.double(), 0.9 * variances[:4].mean() + 0.1 * variances.mean())
    x = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
    x = x - extent.directions.T @ (extent.directions @ x)  # orthogonal to the leading directions
    torch.testing.assert_close(distance(extent, extent.mean + x), x.norm() / extent.rest.sqrt(), rtol=1e-3, atol=0)


def test_rows_are_measured_against_other_pictures_only():
    data, pictures = joint("abd", 40), [number // 2 for number in range(40)]
    far = data.clone()
    far[6:8] = joint("head", 2)  # one picture of its own kind: it must not vouch for itself
    found = TaskExtent.of(far, pictures).distances
    assert found.shape == (40,) and torch.equal(found, found.sort().values)
    assert found[-2] > 2 * found[-3]
    assert TaskExtent.of(data, ["same"] * 40) is None


def test_own_questions_are_known_and_others_are_not():
    made = calibrated(("abd", "chest"))
    own, other = made.route(Query(cloud("abd", 300, seed=7))), made.route(Query(cloud("spine", 50, seed=7)))
    assert own.unknown.float().mean() <= 0.03 and other.unknown.all()
    assert not other.slot_weights.any() and torch.isfinite(other.slot_weights).all()
    torch.testing.assert_close(own.slot_weights[~own.unknown].sum(-1), torch.ones(int((~own.unknown).sum())))
    told = other.describe(0)
    assert told["unknown"] is True and told["novelty"] > 1 and told["weights"] == [0, 0]


def test_the_verdict_is_per_sample_and_survives_other_tasks_bit_for_bit():
    mixed = torch.cat([cloud(task, 4, seed=3) for task in ("abd", "spine", "chest")])
    made, turned = calibrated(("abd", "chest", "head", "knee")), calibrated(("head", "knee", "chest", "abd"))
    together = made.route(Query(mixed))
    alone = torch.cat([made.route(Query(row[None])).novelty for row in mixed])
    assert torch.equal(together.novelty, alone)
    assert torch.equal(turned.route(Query(mixed)).novelty, together.novelty)
    made.remove("head")
    assert torch.equal(
        made.route(Query(mixed)).novelty, calibrated(("abd", "chest", "knee")).route(Query(mixed)).novelty
    )


def test_it_is_off_without_calibration_in_training_and_when_the_task_is_given():
    query = cloud("spine", 3)
    made = calibrated(("abd", "chest"))
    assert made.route(Query(query), tasks=["abd"] * 3).unknown is None
    assert made.route(Query(query), router="uniform").unknown is None
    made.train_only("abd")
    assert made.route(Query(query)).unknown is None
    assert calibrated(("abd", "chest"), unknown_share=0.0).route(Query(query)).unknown is None
    made = calibrated(("abd", "chest"))
    made.task("chest").extent = None
    made.changed()
    route = made.route(Query(query))
    assert route.unknown is None and "unknown" not in route.describe(0)


def test_only_the_most_probable_tasks_are_measured():
    gate = UnknownGate({task: TaskExtent.of(joint(task, 50), range(50)) for task in "abcdefgh"}, 0.01)
    row, posterior = joint("a", 1), torch.linspace(1, 0, 8)[None]
    assert gate.novelty(row, posterior, list("abcdefgh")) < 1 < gate.novelty(row, posterior, list("hgfedcba"))


def test_distances_measured_together_are_those_measured_alone():
    extents = [TaskExtent.of(joint(task, 50), range(50)) for task in ("abd", "chest", "abd", "head")]
    rows = joint("abd", 4)
    together = unknown.distances(extents, rows)
    assert torch.equal(together, torch.stack([distance(one, row) for one, row in zip(extents, rows, strict=True)]))
    fewer = TaskExtent(**extents[0].tensors())
    fewer.directions, fewer.variances = fewer.directions[:2], fewer.variances[:2]  # of a version that kept fewer
    mixed = unknown.distances([extents[0], fewer], rows[:2])
    assert torch.equal(mixed, torch.stack([distance(extents[0], rows[0]), distance(fewer, rows[1])]))
    double = TaskExtent(**{name: part.double() for name, part in extents[1].tensors().items()})
    assert torch.equal(unknown.distances([extents[0], double], rows[:2]), together[:2])


def test_a_wrong_share_is_refused():
    with pytest.raises(ValueError, match="unknown_share must be at least 0 and below 1, not 1.5"):
        RetrieverSettings(1, {}, unknown_share=1.5)


def test_the_picture_decides_and_the_words_only_where_there_is_none():
    text, image = torch.randn(3, 8), torch.randn(3, 6)
    assert torch.equal(Query(text, image).evidence(), Query(image=image).joint())
    assert torch.equal(Query(text=text).evidence(), Query(text=text).joint())
    long = torch.randn(3, 1312)
    assert torch.equal(Query(text, long).evidence(), Query(image=long).joint())
    assert not torch.equal(Query(text, image).evidence(), Query(text, -image).evidence())


def test_evidence_of_another_kind_is_refused_with_both_sizes():
    extent = TaskExtent.of(torch.randn(30, 14), range(30))
    with pytest.raises(ValueError, match="query has 6 dimensions, the task's extent 14"):
        distance(extent, torch.randn(6))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The base, and a stage over it whose tasks are calibrated."""
    folder = tmp_path_factory.mktemp("unknown")
    base = write_base(folder / "llava-base")
    stage = write_stage(folder / "llava-stage", base)
    slots = Pool.read(stage / "slots.pth")
    for number, task in enumerate(slots.tasks):
        generator = torch.Generator().manual_seed(number)
        text = torch.randn(60, HIDDEN, generator=generator)
        image = torch.randn(VISION, generator=generator) * 3 + torch.randn(60, VISION, generator=generator)
        task.statistics = TaskStatistics.of(Query(text, image).joint())
        task.extent = TaskExtent.of(Query(text, image).evidence(), range(60))
        task.info["centre"] = image.mean(0).tolist()
    slots.write(stage / "slots.pth")
    load = [(str(stage), str(base)), (str(base), None)]
    return [load_pretrained_model(*place, device="cpu")[1] for place in load], slots


def test_an_unknown_question_gets_the_base_models_logits_and_its_neighbours_do_not(models):
    (routed, plain), slots = models
    known = torch.tensor(slots.task("abd").info["centre"])
    image_query = torch.stack([known, -known])
    ids = torch.tensor([[1, 20, -200, 30, 31], [1, 25, -200, 40, 41]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        query = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))
        route = routed.retriever.decide(Query(query, image_query))
        assert route.unknown.tolist() == [False, True]
        with_slots = routed(ids, images=pixels, text_query=query, image_query=image_query).logits
        base = plain(ids, images=pixels).logits
    assert torch.equal(with_slots[1], base[1])
    assert not torch.allclose(with_slots[0], base[0])


def test_calibration_survives_the_file_and_counts_in_the_checksum(models, tmp_path):
    slots = models[1]
    slots.write(tmp_path / "a.pth")
    back = Pool.read(tmp_path / "a.pth")
    assert torch.equal(back.task("abd").extent.distances, slots.task("abd").extent.distances)
    back.task("abd").extent.distances += 1
    assert back.task("abd").checksum() != slots.task("abd").checksum()


def test_unknown_questions_are_answered_by_the_base_or_refused(tmp_path):
    base = write_base(tmp_path / "llava-base")
    stage = write_stage(tmp_path / "llava-stage", base)
    slots = Pool.read(stage / "slots.pth")
    for task in slots.tasks:
        task.extent = TaskExtent.of(torch.randn(30, VISION), range(30))
        task.extent.distances = torch.full((30,), 1e-6)  # so that nothing fits
    slots.write(stage / "slots.pth")
    write_images(tmp_path / "images", ["a.png", "b.png"])
    rows = [question_row(n, f"{'ab'[n % 2]}.png", f"is it left {n}?", "yes", "abd", ["abd"]) for n in range(4)]
    write_jsonl(tmp_path / "q.jsonl", rows)

    def answers(model, name, *more):
        flags = ["--question-file", tmp_path / "q.jsonl", "--image-folder", tmp_path / "images", "--device", "cpu"]
        target = tmp_path / f"{name}.jsonl"
        flags += ["--model-path", model, "--answers-file", target, "--max_new_tokens", 4, *more]
        model_vqa_loader.main([str(flag) for flag in flags])
        return [json.loads(line) for line in target.read_text().splitlines()]

    plain = answers(base, "plain")
    fallen_back = answers(stage, "fallen", "--model-base", base)
    refused = answers(stage, "refused", "--model-base", base, "--refuse_unknown")
    assert [answer["text"] for answer in fallen_back] == [answer["text"] for answer in plain]
    assert {answer["text"] for answer in refused} == {REFUSAL}
    assert all(answer["metadata"]["route"]["unknown"] is True for answer in fallen_back + refused)
