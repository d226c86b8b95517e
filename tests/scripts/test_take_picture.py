"""Pictures of pages: what a machine without a browser is told."""

import runpy
from pathlib import Path

import pytest

from llava.utils import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "take_picture.py"


def test_without_a_browser_it_says_what_to_install(monkeypatch):
    pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    seen = runpy.run_path(str(SCRIPT))["seen"]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no Chromium is installed; apt-get install chromium"):
        seen("about:blank", "", 400, 300)
