"""What counts as an environment that fits: version ranges, the headless OpenCV's twin, a bare Python."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_env.py"
spec = importlib.util.spec_from_file_location("check_env", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.mark.parametrize(
    "installed, wanted, why",
    [
        ("2.13.0", "torch>=2.6", None),
        ("2.11.0+rocm7.1", "torch>=2.6", None),
        ("2.11.0a0+git123", "torch>=2.6", None),
        ("2.6.0rc1", "torch>=2.6", "torch is 2.6.0rc1, wanted >=2.6"),
        ("6.0.1", "transformers>=5.17,<6", "transformers is 6.0.1, wanted <6,>=5.17"),
        ("5.17", "transformers>=5.17,<6", None),
        ("5.9.4", "transformers>=5.17,<6", "transformers is 5.9.4, wanted <6,>=5.17"),
        ("1.0", "tokenizers", None),
    ],
)
def test_version_ranges(installed, wanted, why, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    assert script.unmet(wanted) == why


def test_either_opencv_will_do(monkeypatch):
    def version(name):
        if name == "opencv-python":
            return "5.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert script.unmet("opencv-python-headless>=4.10") is None
    assert script.unmet("pooch>=1.8") == "pooch is not installed"


def test_extras_are_read_from_the_project_file():
    assert "pooch>=1.8" in script.requirements([]) and "pytest>=8.3" not in script.requirements([])
    assert {"pytest>=8.3", "pydicom>=3"} <= set(script.requirements(["dev"]))


def test_a_bare_python_is_told_in_one_line():
    done = subprocess.run([sys.executable, "-S", "-E", SCRIPT, "dev"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "packaging is not installed\n", "")
