"""Failures of LLaVA's issue tracker that no other test excludes (the table is docs/llava-failures.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "llava").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")])
BROAD = {"Exception", "BaseException"}


def names_of(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return BROAD
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {kind.id for kind in kinds if isinstance(kind, ast.Name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_blanket_except_swallows_an_error(path):
    """LLaVA turns any broken dependency into "cannot import name", and any exception into a network error."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler) and names_of(node) & BROAD:
            raised = [inner for inner in ast.walk(node) if isinstance(inner, ast.Raise)]
            assert raised, f"{path.name}:{node.lineno} swallows every error"
    assert "NETWORK ERROR" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "statement",
    [
        "from llava import LlavaLlamaForCausalLM",
        "from llava.model import LlavaConfig",
        "from llava.model import *; LlavaConfig",
    ],
)
def test_a_broken_dependency_is_named_by_the_import_that_needs_it(statement):
    program = f"import sys; sys.modules['transformers'] = None; {statement}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "transformers" in done.stderr.splitlines()[-1] and "LlavaLlama" not in done.stderr.splitlines()[-1]


def test_llavas_public_names_can_be_imported():
    from llava import LlavaLlamaForCausalLM
    from llava.model import LlavaConfig, LlavaMistralConfig, LlavaMistralForCausalLM

    assert LlavaLlamaForCausalLM.config_class is LlavaConfig and LlavaConfig.model_type == "llava_llama"
    assert LlavaMistralForCausalLM.config_class is LlavaMistralConfig
    with pytest.raises(ImportError):
        from llava.model import LlavaMptForCausalLM  # noqa: F401
