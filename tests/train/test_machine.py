"""``--bf16 auto`` asks the machine, says what it found, and is a plain command line afterwards."""

from __future__ import annotations

import pytest

from llava.train import machine
from llava.train.machine import with_precision


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
    assert with_precision(["--task", "abd", *words, "--seed", "1"]) == ["--task", "abd", *expected, "--seed", "1"]
    assert capsys.readouterr().out.startswith(f"precision: {kind}")


def test_what_a_user_decides_stays(monkeypatch, capsys):
    here(monkeypatch, True, True)
    line = ["--bf16", "False", "--output_dir", "auto", "--bf16=True", "--bf16"]
    assert with_precision(line) == ["--bf16", "False", "--output_dir", "auto", "--bf16", "True", "--bf16"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", [["--bf16", "False"], ["--fp16=True"]])
def test_a_sequences_precision_is_a_default(monkeypatch, capsys, line):
    here(monkeypatch, False)
    assert with_precision(["--task", "abd"], "auto")[:2] == ["--bf16", "False"]
    capsys.readouterr()
    assert with_precision(line, "auto") == line and capsys.readouterr().out == ""
