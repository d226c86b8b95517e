"""``--bf16 auto`` asks the machine, says what it found, and is a plain command line afterwards."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from llava.train import machine
from llava.train.machine import settle_machine, without_auto


def here(monkeypatch, gpu, gpu_bf16=False, cpu_bf16=False):
    monkeypatch.setattr(machine, "has_accelerator", lambda: gpu)
    monkeypatch.setattr(machine, "gpu_has_bfloat16", lambda: gpu_bf16)
    monkeypatch.setattr(machine, "cpu_has_bfloat16", lambda: cpu_bf16)


@pytest.mark.parametrize(
    ("gpu", "gpu_bf16", "cpu_bf16", "kind"),
    [
        (True, True, False, "bfloat16"),
        (True, False, True, "float16"),
        (False, False, True, "bfloat16"),
        (False, False, False, "float32"),
    ],
)
@pytest.mark.parametrize("words", [["--bf16", "auto"], ["--bf16=auto"]])
def test_what_the_machine_has(monkeypatch, capsys, gpu, gpu_bf16, cpu_bf16, kind, words):
    here(monkeypatch, gpu, gpu_bf16, cpu_bf16)
    expected = ["--bf16", str(kind == "bfloat16"), "--fp16", str(kind == "float16")]
    assert without_auto(["--task", "abd", *words, "--seed", "1"]) == ["--task", "abd", *expected, "--seed", "1"]
    assert capsys.readouterr().out.startswith(f"precision: {kind}")


def test_what_a_user_decides_stays(monkeypatch, capsys):
    here(monkeypatch, True, True)
    line = ["--bf16", "False", "--output_dir", "auto", "--bf16=True", "--bf16"]
    assert without_auto(line) == ["--bf16", "False", "--output_dir", "auto", "--bf16", "True", "--bf16"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [["--gradient_checkpointing", "auto"], ["--gradient_checkpointing=auto"]])
def test_checkpointing_is_left_to_the_estimate(words):
    expected = ["--gradient_checkpointing", "False", "--checkpoint_if_needed", "True"]
    assert without_auto(["--task", "abd", *words]) == ["--task", "abd", *expected]
    assert without_auto(["--gradient_checkpointing", "True"]) == ["--gradient_checkpointing", "True"]


def test_a_compilation_that_a_killed_process_left_locked_is_freed(tmp_path, monkeypatch, capsys):
    """torch waits for the file to go, without a word."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / name / "lock" for name in ("py311_cpu/cpu_adam", "utils", "held", "lately")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (0, 0))
    (locks[3].parent / "build.ninja").touch()
    with open(locks[2]):
        machine.free_compilations()
    assert [lock.exists() for lock in locks] == [False, False, True, True]
    assert capsys.readouterr().out.count("was left by a killed compilation and is removed") == 2


@pytest.mark.parametrize("line", [["--bf16", "False"], ["--fp16=True"]])
def test_a_sequences_precision_is_a_default(monkeypatch, capsys, line):
    here(monkeypatch, False)
    assert without_auto(["--task", "abd"], "auto")[:2] == ["--bf16", "False"]
    capsys.readouterr()
    assert without_auto(line, "auto") == line and capsys.readouterr().out == ""


@pytest.mark.parametrize(("gpu", "use_cpu", "bounded"), [(False, False, 1), (True, True, 1), (True, False, 0)])
def test_compiled_products_are_bounded_where_the_cpu_trains(monkeypatch, gpu, use_cpu, bounded):
    here(monkeypatch, gpu)
    calls = []
    monkeypatch.setattr(machine, "bound_compiled_products", lambda: calls.append(1))
    settle_machine(SimpleNamespace(tf32=None, bf16=False, fp16=False, use_cpu=use_cpu))
    assert len(calls) == bounded
