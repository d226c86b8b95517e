"""A picture of the demo as a user sees it, for the pages of this project: an example asked of a demo that runs.

    python -m llava.serve.gradio_web_server --model-path output/llava-phantom_abd_chest_head \\
        --question-file data/phantom/test.jsonl --image-folder data/phantom/images &
    python scripts/demo_picture.py --output docs/pictures/demo.png

Needs the extra ``browser`` and a Chromium of the system's.
"""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from llava.cli import flag, parse
from llava.files import atomic_write
from llava.utils import UserError, run_cli

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
COLOURS = 128


@dataclass(kw_only=True)
class Arguments:
    address: str = flag("http://127.0.0.1:7860/", "where the demo runs")
    output: str = flag(help="PNG file to write")
    example: int = flag(1, "which of its examples is asked, from 1", least=1)
    width: int = flag(1400, "of the window, in pixels", least=300, most=4000)


def main() -> None:
    """Command line."""
    arguments = parse(Arguments, None, __doc__)
    shot = Image.open(io.BytesIO(photographed(arguments.address, arguments.example, arguments.width)))
    with atomic_write(arguments.output, "wb") as stream:
        shot.convert("RGB").quantize(COLOURS).save(stream, "PNG", optimize=True)


def photographed(address: str, example: int, width: int) -> bytes:
    """The page as PNG when an example has been answered, by the stage and by its base.

    Raises:
        UserError: no browser, or no demo at this address.
    """
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise UserError("a browser is driven by playwright (install: pip install '.[browser]')") from error
    if browser is None:
        raise UserError(f"no {CHROMIUM[0]} is installed (on Debian: apt install chromium)")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": width, "height": 600})
        try:
            page.goto(address)
            page.locator(".examples button").nth(example - 1).click()
            page.locator(".shown li").first.wait_for()
            page.get_by_label("Also show the base's answer").check()
            page.get_by_role("button", name="Ask", exact=True).click()
            page.locator(".talk .base").wait_for()
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            return page.screenshot(full_page=True)
        except Error as error:
            raise UserError(f"{address}: {str(error).splitlines()[0]} (does the demo run, with examples?)") from error


if __name__ == "__main__":
    run_cli(main)
