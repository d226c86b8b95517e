"""A PNG picture of a page, as README shows them: a window of the system's Chromium, in few colours.

Example::

    python scripts/take_picture.py output/eval/phantom/report.html docs/pictures/report.png --at "#examples"

Needs the extra ``browser`` (``pip install -e '.[browser]'``) and a Chromium (``apt-get install chromium``).
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.cli import flag, parse, word
from llava.files import atomic_write
from llava.utils import UserError, run_cli

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    page: str = word("file, or address of a page")
    picture: str = word("PNG to write")
    at: str = flag("", "CSS selector of what stands at the top of the picture (default: the page's top)")
    after: str = flag("", "CSS selector of what must be there before the picture is taken")
    width: int = flag(1400, "of the window, in pixels", least=200, most=4000)
    height: int = flag(820, "of the window, in pixels", least=200, most=4000)
    colours: int = flag(256, "that the picture has", least=2, most=256)


def main() -> None:
    """Open, look, write."""
    from PIL import Image

    arguments = parse(Arguments, description=__doc__)
    address = arguments.page if "://" in arguments.page else Path(arguments.page).resolve().as_uri()
    data = seen(address, arguments.at, arguments.width, arguments.height, arguments.after)
    with atomic_write(arguments.picture, "wb") as stream:
        few = Image.open(io.BytesIO(data)).convert("RGB").quantize(arguments.colours)
        few.save(stream, format="PNG", optimize=True)
    print(f"wrote {arguments.picture}, {Path(arguments.picture).stat().st_size / 1000:.0f} kB")


def seen(address: str, at: str, width: int, height: int, after: str = "") -> bytes:
    """What the browser's window shows, as PNG, when there is something that fits the selector ``after``.

    Raises:
        UserError: no browser, or nothing that drives it.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("playwright is not installed; pip install -e '.[browser]'") from error
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise UserError("no Chromium is installed; apt-get install chromium")
    with sync_playwright() as play:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        browser = play.chromium.launch(executable_path=program, args=as_root)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.goto(address)
        if after:
            page.locator(after).first.wait_for()
        if at:
            page.locator(at).first.evaluate("(element) => window.scrollTo(0, element.offsetTop)")
        picture = page.screenshot()
        browser.close()
    return picture


if __name__ == "__main__":
    run_cli(main)
