"""Benchmarks for a CPU on models of a few thousand weights and on commands that do nothing: all run, once.

Their figures need a quiet machine, and are not looked at here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiny_world import run_main

from benchmarks import decode, eval_loop, offset_scope, pipeline, pool_growth, seven_billion, startup, train_step
from benchmarks.parts import bench
from benchmarks.parts.contenders import TINY, DenseTraining, TrainingOnPictures, random_model, with_slots
from benchmarks.parts.questions import Questions
from benchmarks.parts.timing import AGAIN, BASE
from llava.utils import UserError


def measured(main, tmp_path, *words):
    """What a benchmark writes, after its table."""
    run_main(main, "--rounds", 1, "--json", tmp_path / "new" / "figures.json", *words)
    return json.loads((tmp_path / "new" / "figures.json").read_text())


@pytest.mark.parametrize(
    ("main", "parts", "beside"),
    [
        (train_step.main, ["train"], "dense offsets, o_proj"),
        (decode.main, ["prefill", "decode"], "slots, 3 tasks, one by one"),
        (eval_loop.main, ["eval"], "base, LLaVA's loop"),
    ],
)
def test_steps_of_a_model_are_measured_beside_the_base(tmp_path, capsys, monkeypatch, main, parts, beside):
    monkeypatch.setattr(bench, "MANY", 12)
    threads = torch.get_num_threads()
    written = measured(main, tmp_path, "--shape", "tiny", "--threads", threads)
    assert list(written["parts"]) == parts and written["shape"] == "tiny" and "over base" in capsys.readouterr().out
    for part in written["parts"].values():
        assert {BASE, AGAIN, beside} < part["contenders"].keys()
        assert all(row["median_ms"] > 0 for row in part["contenders"].values())


def test_both_scopes_of_offsets_are_measured(tmp_path):
    written = measured(offset_scope.main, tmp_path, "--shape", "tiny", "--threads", torch.get_num_threads())["parts"]
    training, answers = (part["contenders"] for part in written.values())
    assert {BASE, AGAIN, "behind, first epoch", "behind, later epochs"} == training.keys()
    assert {BASE, AGAIN, "behind, whole prompts", "behind, first model", "behind, later models"} == answers.keys()


def test_what_is_kept_in_front_of_questions_is_worked_out_once_a_picture(tmp_path, monkeypatch):
    """Fourteen questions about two pictures, in two training steps that keep it, and in one that does not."""
    torch.manual_seed(0)
    base = random_model(TINY, torch.device("cpu"))
    questions = Questions(tmp_path, replace(TINY, rows=14), base, 7)
    model = with_slots(base, TINY, 1, offset_scope="question")
    passes, whole = [], type(model)._prefix
    monkeypatch.setattr(type(model), "_prefix", lambda *given: passes.append(1) or whole(*given))
    step = TrainingOnPictures(model, TINY, questions.batch(base), keeps=True)
    step(), step()
    assert len(questions.rows) == 14 and len(passes) == 2
    TrainingOnPictures(model, TINY, questions.batch(base))()
    assert len(passes) == 4


def test_the_dense_form_adds_what_the_low_rank_form_adds():
    torch.manual_seed(0)
    step = DenseTraining(random_model(TINY, torch.device("cpu")), TINY)
    with torch.no_grad():
        step.model.dense[0].normal_()
    step()
    up, down = (side[:4, 1] for side in step.model.dense)
    x, projection = torch.randn(3, TINY.decoder["hidden_size"]), step.model.get_model().layers[1].self_attn.o_proj
    step.offsets = ((step.model.dense[0][:4].mT @ step.model.dense[1][:4]) / 4).sum(0)
    expected = x @ projection.weight.T + sum((x @ b.T) @ a for a, b in zip(up, down, strict=True)) / 4
    torch.testing.assert_close(projection(x), expected)


def test_pools_of_several_sizes_are_measured(tmp_path, capsys):
    threads = torch.get_num_threads()
    written = measured(pool_growth.main, tmp_path, "--shape", "tiny", "--tasks", 2, 6, "--threads", threads)
    assert list(written["parts"]) == list(pool_growth.PARTS)
    assert all(list(part["contenders"]) == [BASE, AGAIN, "6 tasks"] for part in written["parts"].values())
    sizes = {name: size["file_bytes"] for name, size in written["sizes"].items()}
    assert 2 * sizes[BASE] < sizes["6 tasks"] < 4 * sizes[BASE]  # every task has numbers of its own
    assert "6 tasks        files" in capsys.readouterr().out
    assert all(0 < size["own_bytes"] < size["file_bytes"] for size in written["sizes"].values())


def test_starts_of_processes_are_measured(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(startup.subprocess, "run", lambda words, **more: started.append(words[1:]))
    written = measured(startup.main, tmp_path, "--contenders", "import llava")
    assert list(written["contenders"]) == [BASE, AGAIN, "import llava"]
    assert [words[1] for words in started] == 2 * [
        "import torch, transformers",
        "import torch, transformers",
        "import llava",
    ]


def test_a_command_is_run_with_each_tree_into_a_fresh_folder(tmp_path, monkeypatch):
    output, other, log = tmp_path / "output", tmp_path / "other", tmp_path / "log"
    for folder in (output / "llava-a_b", output / "eval" / "a", other):
        folder.mkdir(parents=True)
    script = f"import os; found = os.listdir(os.environ['OUTPUT_DIR']); log = open({str(log)!r}, 'a')\n"
    script += "print(__file__, found, file=log)"
    for tree in (tmp_path / "mine", other):
        tree.mkdir(exist_ok=True)
        (tree / "work.py").write_text(script)
    monkeypatch.setattr(pipeline, "ROOT", tmp_path / "mine")
    words = ("--output_dir", output, "--against", other, "--", sys.executable, "-S", "work.py")
    written = measured(pipeline.main, tmp_path, *words)
    assert list(written["contenders"]) == [BASE, AGAIN, str(other)]
    said = log.read_text().splitlines()
    assert len(said) == 6 and all(line.endswith("['llava-a_b']") for line in said)
    assert sum(line.startswith(str(other)) for line in said) == 2
    with pytest.raises(UserError, match="failed: .*SystemExit|failed: "):
        pipeline.run([sys.executable, "-c", "raise SystemExit(3)"], other, output)


def test_a_base_is_written_in_shards_loaded_trained_and_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(seven_billion, "SHARD", 10**5)
    words = ("--shape", "tiny", "--folder", tmp_path / "base", "--json", tmp_path / "figures.json")
    assert run_main(seven_billion.main, *words) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [step["name"].split()[0] for step in written["steps"]] == ["write", "load", "attach", "a", "answer"]
    shards = list(tmp_path.rglob("model-*.safetensors"))
    assert len(shards) > 1 and sum(shard.stat().st_size for shard in shards) >= written["bytes"]
    assert "a training step of a sample" in capsys.readouterr().out
