"""The page as a reader sees it, in a real browser: pictures, sorting, switch, filters, phone, paper, screen reader."""

import shutil

import pytest
from browser import opened, serious_findings
from real_data import vqa_rad_folder, vqa_rad_rows
from tiny_evaluation import TASKS, make_evaluation

from llava.continual.places import REPORT
from llava.data.jsonl import json_values, write_jsonl
from llava.eval.report import main
from llava.toy.phantom import PhantomConfig, make_phantom

BROKEN = "Array.from(document.images).filter((one) => !one.complete || !one.naturalWidth).length"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LONG = "pneumonoultramicroscopicsilicovolcanoconiosis" * 4


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    folder = make_evaluation(root, texts=["<script>document.title = 'taken'</script>", LONG])
    main([str(folder)])
    return folder / REPORT


@pytest.mark.slow
def test_a_reader_sorts_switches_and_filters(file):
    with opened(file) as (page, wrong):
        assert page.title() == "Evaluation of tiny"
        assert page.locator(".example img").count() == 16 and page.evaluate(BROKEN) == 0
        assert all(drawing.bounding_box()["height"] > 100 for drawing in page.locator("#routes figure svg").all())

        table = page.locator("#summary table").first
        column = table.locator("thead th", has_text="overall")
        values = [float(cell) for cell in cells(table, 2)]
        column.get_by_role("button").click()
        assert column.get_attribute("aria-sort") == "ascending"
        assert [float(cell) for cell in cells(table, 2)] == sorted(values) != values
        column.get_by_role("button").press("Enter")
        assert column.get_attribute("aria-sort") == "descending"
        assert [float(cell) for cell in cells(table, 2)] == sorted(values, reverse=True)

        assert page.locator(".panel:visible").count() == 1
        page.get_by_label("Metric").select_option("closed accuracy")
        assert page.locator(".panel:visible h3").inner_text() == "closed accuracy"

        page.locator("#filter-domain").select_option("chest")
        page.locator("#filter-type").select_option("open")
        assert page.locator(".example:visible").count() == 4
        assert page.locator(".filters output").inner_text() == "4 of 16 shown"
        page.locator("#filter-answer").select_option("right")
        shown = page.locator(".example:visible")
        assert shown.count() < 4 and all("✓ right" in text for text in shown.all_inner_texts())

        page.keyboard.press("Control+Home")
        assert not serious_findings(page)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate(WIDER) <= 0
        page.emulate_media(color_scheme="dark")
        assert not serious_findings(page)
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 720, "height": 1000})  # A4 between its margins
        assert page.evaluate(WIDER) <= 0
        assert not page.locator("nav").is_visible() and not page.locator(".filters").is_visible()
        assert wrong == []


def cells(table, number):
    """The cells of a column that hold a value, from the top."""
    found = table.locator(f"tbody td:nth-child({number + 1})").all()
    return [cell.get_attribute("data-value") for cell in found]


@pytest.mark.slow
def test_without_scripts_everything_is_there_unsorted(file):
    with opened(file, java_script_enabled=False) as (page, wrong):
        assert page.locator(".panel").count() == page.locator(".panel:visible").count() == 2
        assert page.locator(".example:visible").count() == 16
        assert not page.locator(".switch").is_visible() and page.locator("thead button").count() == 0
        assert wrong == []


def phantom(root):
    """Generated phantoms, as the quick start has them."""
    make_phantom(root, PhantomConfig(size=48, train_rows=12, train_images=12, test_rows=15, test_images=12))
    write_jsonl(root / "test.jsonl", [row for _, row in json_values(root / "test.jsonl") if shown(row)])


def vqa_rad(root):
    """Questions about real X-rays and CT of two organs."""
    rows = [row for row in vqa_rad_rows()["test"] if shown(row)]
    rows = [row for task in TASKS for row in rows if row["domain"][task]][::8]
    (root / "images").mkdir()
    for name in {row["image"] for row in rows}:
        shutil.copy(vqa_rad_folder() / "images" / name, root / "images" / name)
    write_jsonl(root / "test.jsonl", rows)


def shown(row):
    return any(row["domain"][task] for task in TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("data", [phantom, vqa_rad], ids=lambda make: make.__name__)
def test_a_page_about_many_questions_has_24_examples_with_their_pictures(tmp_path, data):
    data(tmp_path)
    folder = make_evaluation(tmp_path)
    main([str(folder)])
    assert (folder / REPORT).stat().st_size < 8e6
    with opened(folder / REPORT) as (page, wrong):
        assert page.locator(".example img").count() == 24 and page.evaluate(BROKEN) == 0
        assert not serious_findings(page)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate(WIDER) <= 0 and wrong == []
