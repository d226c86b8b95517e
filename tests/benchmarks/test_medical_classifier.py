"""``benchmarks/medical_classifier.py`` on made-up features: it can look, and it scores as the evaluation does."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.data.rows import parse_row

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "medical_classifier.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("medical_classifier", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def row(number, image, question, answer, kind="CLOSED"):
    values = {"question_id": number, "image": image, "pair_id": image, "text": f"{question}\n<image>"}
    return parse_row({**values, "gpt4_answer": answer, "domain": {"abd": True}, "answer_type": kind})


def test_it_learns_an_answer_that_stands_in_one_cell_of_the_map(benchmark):
    generator = torch.Generator().manual_seed(0)
    maps = 0.1 * torch.randn(8, 4, 6, generator=generator)
    rows = []
    for picture in range(8):
        maps[picture, picture % 4, picture // 4] += 3  # the answer is the channel, wherever it stands
        rows.append(("vqa-rad", row(picture, f"{picture}.jpg", "Which?", ("Left", "right.")[picture // 4])))
    places = {f"vqa-rad/{picture}.jpg": picture for picture in range(8)}
    features = benchmark.Features(maps, places, torch.ones(1, 5), {"Which?": 0})
    args = SimpleNamespace(epochs=60, batch=4, lr=1e-2, dropout=0.0)
    model = benchmark.fit(features, rows, ["left", "right"], args, seed=1)
    said = benchmark.answer(model, features, [one for _, one in rows], ["left", "right"])
    assert said == ["left"] * 4 + ["right"] * 4
    other = benchmark.fit(features, rows, ["left", "right"], args, seed=1)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_figures_by_hand(benchmark):
    rows = [
        row(0, "0.jpg", "Is it?", "Yes"),
        row(1, "1.jpg", "Is it?", "No"),
        row(2, "2.jpg", "Where?", "left lung", "OPEN"),
    ]
    assert benchmark.figures(rows, ["yes.", "yes", "the lung"]) == {
        "exact_match": pytest.approx(1 / 3),
        "closed_accuracy": 0.5,
        "open_exact_match": 0.0,
        "open_recall": 0.5,
    }
