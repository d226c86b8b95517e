"""The continual metrics beside other implementations of them, on random matrices.

Always: each formula as loops over tasks, as its paper has it. Where avalanche-lib is installed (it is no dependency):
its standalone BWT, forgetting and forward transfer. Its forgetting is measured from the stage in which a task was
trained, ours (Chaudhry et al.) from the best stage before the last; they are the same where that stage is the best.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from llava.continual import matrix as metrics

TASKS = (1, 2, 3, 5, 10)


def drawn(tasks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of accuracies, and those of the base."""
    rng = np.random.default_rng([tasks, seed])
    return rng.random((tasks, tasks)), rng.random(tasks)


def by_loops(R, zero_shot, T):
    """``R[i, j]`` after stage ``i`` on task ``j``, both from 1, as the papers count."""
    pairs = [(i, j) for i in range(1, T + 1) for j in range(1, i + 1)]
    found = {
        "average_final": sum(R(T, j) for j in range(1, T + 1)) / T,
        "average_over_stages": sum(sum(R(i, j) for j in range(1, i + 1)) / i for i in range(1, T + 1)) / T,
        "learning_accuracy": sum(R(i, j) for i, j in pairs if i == j) / T,
    }
    if T > 1:
        found["bwt"] = sum(R(T, i) - R(i, i) for i in range(1, T)) / (T - 1)
        best = {j: max(R(i, j) for i in range(1, T)) for j in range(1, T)}
        found["forgetting"] = sum(best[j] - R(T, j) for j in range(1, T)) / (T - 1)
        found["fwt"] = sum(R(i - 1, i) - zero_shot[i - 1] for i in range(2, T + 1)) / (T - 1)
    return found


@pytest.mark.parametrize("tasks", TASKS)
def test_formulas_as_loops(tasks):
    for seed in range(20):
        matrix, zero_shot = drawn(tasks, seed)
        found = metrics.summary(matrix, zero_shot)
        expected = by_loops(lambda i, j, R=matrix: R[i - 1, j - 1], zero_shot, tasks)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert all(np.isnan(found[name]) for name in set(found) - set(expected))


@pytest.fixture
def avalanche(monkeypatch):
    """avalanche-lib's metrics by name, out of the two files that hold them: the package as a whole imports its data
    sets, models and loggers, with all that these need."""
    found = importlib.util.find_spec("avalanche")
    if found is None:
        pytest.skip("avalanche-lib is not installed: pip install --no-deps avalanche-lib")
    for name in ("avalanche", "avalanche.evaluation.metrics"):
        package = types.ModuleType(name)
        folder = Path(found.submodule_search_locations[0], *name.split(".")[1:])
        monkeypatch.setattr(package, "__path__", [str(folder)], raising=False)
        monkeypatch.setitem(sys.modules, name, package)
    package.Mean = package.TaskAwareAccuracy = object
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in ("forgetting_bwt", "forward_transfer")]
    return {name: getattr(module, name) for module in modules for name in vars(module)}


@pytest.mark.parametrize("tasks", [task for task in TASKS if task > 1])
def test_avalanche_agrees(tasks, avalanche):
    for seed in range(20):
        matrix, zero_shot = drawn(tasks, seed)
        told = {name: avalanche[name]() for name in ("BWT", "Forgetting", "ForwardTransfer")}
        for task in range(tasks - 1):
            for name in ("BWT", "Forgetting"):
                told[name].update(task, matrix[task, task], initial=True)
                told[name].update(task, matrix[-1, task])
        for task in range(1, tasks):
            told["ForwardTransfer"].update(task, zero_shot[task], initial=True)
            told["ForwardTransfer"].update(task, matrix[task - 1, task])
        theirs = {name: np.mean(list(one.result().values())) for name, one in told.items()}
        found = metrics.summary(matrix, zero_shot)
        assert found["bwt"] == pytest.approx(theirs["BWT"], abs=1e-12)
        assert found["fwt"] == pytest.approx(theirs["ForwardTransfer"], abs=1e-12)
        falling = np.minimum(matrix, np.diagonal(matrix))  # each task is best right after it was trained
        falling[-1] = matrix[-1]
        assert metrics.forgetting(falling) == pytest.approx(theirs["Forgetting"], abs=1e-12)
