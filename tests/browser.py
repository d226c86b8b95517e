"""A real browser for tests of pages: the system's Chromium, driven by playwright. Tests without one are skipped."""

import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SERIOUS = ("serious", "critical")


@contextmanager
def opened(file, width=1400, height=1000, **context):
    """A page of a file in a window, and what went wrong on it: messages of the console, and requests that left it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        view = browser.new_context(viewport={"width": width, "height": height}, **context)
        page, wrong = view.new_page(), []
        page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda sent: wrong.append(sent.url) if not sent.url.startswith(("data:", "file:")) else None)
        page.goto(file.as_uri())
        try:
            yield page, wrong
        finally:
            browser.close()


def serious_findings(page):
    """What axe-core finds that keeps people out, as lines of text; skips the test where axe is missing."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install -e '.[browser]'")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['target']} {node.get('failureSummary', '')}"
        for one in found
        if one["impact"] in SERIOUS
        for node in one["nodes"]
    ]
