"""What keeps the project in order names the versions and places that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.M).group(1)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_complete_and_of_this_version():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what the format asks for
    assert str(cited["cff-version"]) == "1.2.0" and cited["license"] == "Apache-2.0"
    assert str(cited["version"]) == VERSION and cited["authors"] == [{"name": "The maintainers"}]


def test_the_changelog_holds_this_version_and_what_comes_next():
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.M)
    assert headings[0] == "Unreleased" and VERSION in headings
    kinds = set(re.findall(r"^### (.+)$", read("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_hooks_run_the_ruff_of_continuous_integration():
    hooks = {repo["repo"].rsplit("/", 1)[1]: repo for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    pinned = re.search(r"^ruff==(.+)$", read("constraints.txt"), re.M).group(1)
    assert hooks["ruff-pre-commit"]["rev"] == f"v{pinned}"
    assert [hook["id"] for hook in hooks["ruff-pre-commit"]["hooks"]] == ["ruff-check", "ruff-format"]
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", repo["rev"]) for repo in hooks.values())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_text_files_end_their_lines_as_unix_does():
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if line.startswith(("i/crlf", "i/mixed"))]
    asked = ["git", "check-attr", "eol", "binary", "--", "cv805.sh", ".ci/run", "x.png", "x.safetensors"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "cv805.sh: eol: lf" in found and ".ci/run: eol: lf" in found
    assert "x.png: binary: set" in found and "x.safetensors: binary: set" in found


def test_modules_without_clean_types_exist():
    """The list may only shrink: a file that moves or goes takes its line with it."""
    listed = re.findall(r'^ {4}"(llava\.[\w.]+)",$', PROJECT, re.M)
    assert listed and not [name for name in listed if not (ROOT / f"{name.replace('.', '/')}.py").is_file()]
