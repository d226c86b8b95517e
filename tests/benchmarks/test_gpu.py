"""The benchmark of a GPU on a model of a few thousand weights: all runs, and contenders are what they are called.

Its figures need a GPU, and are not looked at here.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_world import run_main

from benchmarks import gpu
from benchmarks.parts import bench
from benchmarks.parts.contenders import TINY, Prefill, Training, random_model, trained_rank, with_lora, with_slots
from benchmarks.parts.timing import AGAIN, BASE, Found, lines, measure, record
from llava.utils import run_cli

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return random_model(TINY, CPU)


@pytest.fixture
def few_tasks(monkeypatch):
    monkeypatch.setattr(bench, "MANY", 12)


def test_every_part_runs_and_is_written(tmp_path, capsys, few_tasks):
    file = tmp_path / "new" / "gpu.json"
    run_main(gpu.main, "--tiny", "True", "--device", "cpu", "--rounds", 1, "--json", file)
    written, said = json.loads(file.read_text()), capsys.readouterr().out
    assert list(written["parts"]) == list(gpu.PARTS) and written["shape"] == "tiny"
    for part in written["parts"].values():
        assert {BASE, AGAIN} < part["contenders"].keys() and len(part["contenders"]) >= 6
        assert all(row["median_ms"] > 0 for row in part["contenders"].values())
    assert written["parts"]["eval"]["answers_alike"] == TINY.rows
    assert f"{TINY.rows} of {TINY.rows} answers of a batch are those of a batch of one" in said


def test_what_begins_after_the_time_is_left_out(capsys, few_tasks):
    run_main(gpu.main, "--tiny", "True", "--device", "cpu", "--minutes", 1e-9, "--parts", "decode", "prefill")
    assert "decode: left out" in capsys.readouterr().out


def test_a_part_that_fails_leaves_the_others(tmp_path, capsys, few_tasks, monkeypatch):
    def fail(self, until):
        raise torch.OutOfMemoryError("not enough")

    monkeypatch.setattr(bench.Bench, "train", fail)
    words = ("--tiny", "True", "--device", "cpu", "--rounds", 1, "--json", tmp_path / "gpu.json")
    assert run_main(gpu.main, *words, "--parts", "train", "prefill") == 1
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["prefill"]
    assert "failed: train" in capsys.readouterr().out


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "has_accelerator", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: run_cli(gpu.main), "--parts", "train")
    assert stopped.value.code == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: no GPU here")]


def test_contenders_share_the_base_and_leave_it_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slots, lora = with_slots(model, TINY, 3), with_lora(model, trained_rank(TINY))
    steps = {BASE: Training(model, TINY), "slots": Training(slots, TINY), "LoRA": Training(lora, TINY)}
    trained = {name: [p.clone() for p in _trained(step.model)] for name, step in steps.items()}
    for step in steps.values():
        step()
        step()
    assert not trained[BASE] and sum(p.numel() for p in trained["slots"]) == sum(p.numel() for p in trained["LoRA"])
    for name in ("slots", "LoRA"):
        assert all(not torch.equal(one, other) for one, other in zip(trained[name], _trained(steps[name].model)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = model.get_model().layers[0].mlp.up_proj.weight
    assert slots.get_model().layers[0].mlp.up_proj.weight is own
    assert not model._offset_hooks and model.retriever is None


def test_slots_and_mixed_loras_change_what_is_answered(model):
    torch.manual_seed(0)
    base = Prefill(model, TINY)
    ours, lora = Prefill(with_slots(model, TINY, 3), TINY, tasks=3), Prefill(with_lora(model, 4, 3), TINY, adapters=3)
    ours.embeds = lora.embeds = base.embeds
    plain = base().logits
    assert all(not torch.allclose(step().logits, plain) for step in (ours, lora))


def test_a_ratio_counts_only_where_the_base_is_like_itself():
    found = {BASE: Found([10, 10, 10]), AGAIN: Found([10.2, 10.2, 10.2]), "slots": Found([11, 11, 30])}
    assert record(found)["reliable"] and record(found)["contenders"]["slots"]["over_base"] == 1.1
    assert "1.100 " in lines("step", found)[3]
    found[AGAIN] = Found([10.4])
    assert not record(found)["reliable"] and "1.100?" in lines("step", found, 4, "samples")[3]


def test_each_contender_takes_its_turn_in_every_round():
    taken = []
    found = measure({name: lambda name=name: taken.append(name) for name in "abc"}, CPU, rounds=3)
    assert taken == [*"aabbcc", *"abc", *"bca", *"cab"] and all(len(one.ms) == 3 for one in found.values())
    short = measure({"a": lambda: None}, CPU, until=0.0, rounds=5, uncounted=("a",))
    assert len(short["a"].ms) == 1


def _trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
