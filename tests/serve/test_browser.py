"""The demo in a real browser: what a user does, two of them at once, and that nothing leaves the machine or stays."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time

import pytest
from serve.room import NAME, bomb, dicom_bytes, running

pytest.importorskip("gradio", reason="the demo needs the serve extra")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by the browser extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

from llava.data.rows import question_row, write_jsonl  # noqa: E402
from llava.serve import app as app_module  # noqa: E402
from llava.serve import demo as demo_module  # noqa: E402
from llava.serve import service as service_module  # noqa: E402
from llava.serve.app import make_app  # noqa: E402
from llava.serve.demo import build  # noqa: E402
from llava.serve.desk import Desk  # noqa: E402
from llava.serve.examples import read_examples  # noqa: E402
from llava.serve.service import Service  # noqa: E402

ASKED = "is there a lesion"


class User:
    """A page of one user, and what it loaded and complained of."""

    def __init__(self, browser, address, width=1400):
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.set_default_timeout(60_000)
        self.page.goto(address)
        self.page.get_by_role("button", name="Ask").wait_for()

    def add(self, *files):
        shown = self.page.locator(".shown li").count()
        self.page.set_input_files("input[type=file]", files)
        self.page.locator(f".shown li >> nth={shown + len(files) - 1}").wait_for()

    def ask(self, text):
        self.page.get_by_label("Question").fill(text)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def settled(self):
        """Wait until no answer is on its way."""
        self.page.locator("button:has-text('Stop'):disabled").wait_for()

    @property
    def answers(self):
        return [one.strip() for one in self.page.locator(".talk .answer:not(.base)").all_inner_texts()]

    @property
    def route(self):
        return self.page.locator(".panel").inner_text()

    def complaint(self, text):
        self.page.get_by_role("alert").filter(has_text=text).wait_for()


def shown(text):
    """An answer as the page shows it, which ends at its limit or not."""
    return re.compile(re.escape(text) + r"( … \(no more tokens were allowed\))?")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_users_of_the_demo(place, tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("cache", "temporary", "work")]
    [folder.mkdir() for folder in places]
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(places[0]))
    monkeypatch.setattr(tempfile, "tempdir", str(places[1]))
    monkeypatch.chdir(places[2])
    monkeypatch.setenv("LLAVA_MAX_PIXELS", "32000000")
    hold, put = threading.Event(), service_module._Said.put
    monkeypatch.setattr(
        service_module._Said, "put", lambda self, value: (hold.is_set() and time.sleep(0.2), put(self, value))[1]
    )
    files = {"a.dcm": dicom_bytes(), "broken.png": b"\x89PNG\r\n\x1a\nnothing", "bomb.png": bomb(), "b.svg": b"<svg/>"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_jsonl(tmp_path / "q.jsonl", [question_row(1, "2.png", "what side?", "<left>", "abd", ("abd", "chest"))])
    service = Service(place.service._answerer, NAME, place.service.generation)
    built = {}

    class KnownDesk(Desk):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            built["desk"] = self

    monkeypatch.setattr(demo_module, "Desk", KnownDesk)
    monkeypatch.setattr(app_module, "build", lambda *arguments: built.setdefault("page", build(*arguments)))
    app = make_app(service, read_examples(str(tmp_path / "q.jsonl"), str(place.images), 3, service.limits))
    with running(app) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        ann, bob = User(browser, address), User(browser, address, width=390)

        # nothing to ask about; what is no picture
        ann.ask(ASKED)
        ann.complaint("no picture yet")
        for name, said in (("broken.png", "cannot be read"), ("bomb.png", "pixels"), ("b.svg", "cannot be read")):
            ann.page.set_input_files("input[type=file]", tmp_path / name)
            ann.complaint(said)
        assert ann.page.get_by_label("Question").input_value() == ASKED and not ann.page.locator(".shown li").count()

        # two at once, with different pictures
        ann.add(place.images / "0.png")
        bob.add(place.images / "1.png")
        ann.ask(ASKED), bob.ask(ASKED)
        for user, number in ((ann, 0), (bob, 1)):
            user.page.locator(".panel h3").first.wait_for()
            user.settled()
            alone = place.service.ask(place.question(ASKED, number)).answer
            assert len(user.answers) == 1 and shown(place.truth(ASKED, number)).fullmatch(user.answers[0])
            for slot, weight in zip(alone.route["slots"], alone.route["weights"]):
                assert f"slot {slot} · " in user.route and f"{weight:.3f}" in user.route
            assert alone.route["task"] in user.route and "Task posterior" in user.route
        assert ann.route != bob.route

        # a second turn with a DICOM picture, typed as a trouble-maker would, and the base's answer
        ann.add(tmp_path / "a.dcm")
        ann.page.get_by_label("Also show the base's answer").check()
        ann.ask("<img src=x onerror=document.title='hit'> side?")
        ann.page.locator(".talk .base").wait_for()
        assert len(ann.answers) == 2 and "onerror" in ann.page.locator(".talk .question").last.inner_text()
        assert ann.page.title() != "hit"

        # stop, and go on
        bob.page.get_by_role("button", name="Start over").click()
        bob.page.locator(".talk .empty").wait_for()
        bob.add(place.images / "0.png")
        hold.set()
        bob.ask("what side")
        bob.page.wait_for_function("document.querySelector('.talk .answer')?.innerText.trim().length > 3")
        bob.page.get_by_role("button", name="Stop").click()
        bob.page.get_by_text("(stopped)").wait_for()
        hold.clear()
        said = bob.answers[0].removesuffix("… (stopped)").strip()
        whole = place.truth("what side", 0)
        assert said and whole.startswith(said) and said != whole
        bob.page.locator(".examples button").click()
        bob.page.locator(".talk .empty").wait_for()
        assert bob.page.get_by_label("Question").input_value() == "what side?"
        bob.page.get_by_label("Question").press("Enter")
        bob.page.get_by_text("reference: <left>").wait_for()
        assert bob.answers[0].startswith(place.truth("what side?", 2))

        for user in (ann, bob):
            assert {url for url in user.requests if not url.startswith((address, "data:", "blob:"))} == set()
            assert user.complaints == []
            wide = user.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert wide, "the page must not scroll sideways"
        # a page that opens with an example
        cid = User(browser, f"{address}/?example=1")
        cid.page.locator(".talk .base").wait_for()
        assert cid.answers == bob.answers[:1] and cid.complaints == []
        cid.page.goto(f"{address}/?example=9")
        cid.complaint("no example")
        cid.page.close()

        talks, sessions = built["desk"].talks, built["page"][0].state_holder.session_data
        assert len(talks) >= 2 and "onerror" in str([vars(session) for session in sessions.values()])
        browser.close()
        end = time.monotonic() + 60
        while (len(talks) or sessions) and time.monotonic() < end:
            time.sleep(0.05)
        assert not len(talks) and "onerror" not in str([vars(session) for session in sessions.values()])
    service.close()
    assert [file for folder in places for file in folder.rglob("*")] == []
