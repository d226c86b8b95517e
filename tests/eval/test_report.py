"""The report's command: one page that needs nothing beside itself, the tables beside it, and what is left out."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_evaluation import TASKS, make_evaluation

from llava.continual.places import REPORT
from llava.eval import eval_video_qa
from llava.eval.page import plots, versus
from llava.eval.page.examples import chosen, is_closed, is_right, thumbnail
from llava.eval.page.results import Results, check_route, evaluations, labels
from llava.eval.page.routes import read_route_report
from llava.eval.page.sections import shown_path
from llava.eval.page.tables import Cell, interval, number, routers
from llava.eval.page.writing import markdown_text
from llava.eval.report import Arguments, common_folder, main, named_evaluation
from llava.eval.route_scores import expected_calibration_error, reliability
from llava.utils import UserError

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %}",
    "a | b \\ _x_ & 100 % $5 #6 {y} ~ ^",
    "</style></script><!--",
]


class Seen(HTMLParser):
    """Elements of a page: how often each, what they refer to, ids, and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.ids, self.refers, self.scripts, self.text = {}, [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.setdefault(tag, []).append(dict(attrs))
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.refers += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")], attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose questions are hostile, and its page."""
    root = tmp_path_factory.mktemp("report")
    folder = make_evaluation(root, texts=list(HOSTILE))
    main([str(folder)])
    return folder


@pytest.fixture(scope="module")
def page(made):
    return (made / REPORT).read_text(encoding="utf-8")


def test_the_page_needs_nothing_beside_itself(page):
    seen = Seen(page)
    assert {address.split(":")[0] for address in seen.refers if not address.startswith("#")} == {"data"}
    assert not {"link", "iframe", "object", "embed", "base"} & (set(seen.elements) - {"link"})
    assert [link["href"] for link in seen.elements["link"]] == ["data:,"]
    assert "default-src 'none'" in page and "http-equiv" in page
    assert not re.search(r"url\((?!#)", page) and "@import" not in page


def test_hostile_questions_are_text(page):
    seen = Seen(page)
    assert len(seen.elements["script"]) == 1
    text = "".join(seen.text)
    assert all(words in text for words in HOSTILE)
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in seen.elements["img"])


def test_everything_is_on_the_page(page):
    seen = Seen(page)
    names = ["summary", "matrix", "routes", "pictures", "examples", "training", "provenance"]
    assert [section["id"] for section in seen.elements["section"]] == names
    assert len(seen.elements["img"]) == sum(item.get("class") == "example" for item in seen.elements["li"]) == 16
    titles = [div["aria-label"].split(". ")[0] for div in seen.elements["div"] if div.get("role") == "img"]
    assert titles == [
        "Exact match by task over the stages",
        "Forgetting by task, exact match",
        "Closed accuracy by task over the stages",
        "Forgetting by task, closed accuracy",
        "Reliability of the route",
        "Novelty of the questions after abd",
        "Novelty of the questions after chest",
        "Exact match by what is shown",
        "Training of abd",
        "Training of chest",
    ]
    text = " ".join(" ".join(seen.text).split())
    assert "2 CPU cores" in text and "--sequence …/tiny.json" in text and "/somewhere" not in page
    assert "seed of the training 42" in text and "Not for clinical use" in text


def test_a_screen_reader_finds_its_way(page):
    seen = Seen(page)
    assert len(seen.ids) == len(set(seen.ids)), "two elements of one id"
    for element in ("header", "nav", "main", "h1"):
        assert len(seen.elements[element]) == 1
    assert seen.elements["html"][0]["lang"] == "en" and seen.elements["a"][0]["href"] == "#content"
    assert {link["href"] for link in seen.elements["a"]} <= {f"#{name}" for name in seen.ids}
    assert len(seen.elements["caption"]) == len(seen.elements["table"])
    assert all(heading.get("scope") in ("col", "row") for heading in seen.elements["th"])
    assert all(picture["alt"] for picture in seen.elements["img"])
    assert all(drawing["aria-hidden"] == "true" for drawing in seen.elements["svg"])
    assert "gradient(" not in page, "no program can tell the contrast of a text on it"


def test_the_figures_are_those_of_the_scores(made, page):
    scores = json.loads((made / f"llava-tiny_{'_'.join(TASKS)}" / "scores.json").read_text())
    found = scores["groups"]["overall"]["figures"]["exact_match"]
    low, high = (f"{end:.3f}".lstrip("0") for end in found["ci95"])
    value = f"{found['value']:.3f}".lstrip("0")
    text = "".join(Seen(page).text)
    assert f"{value} [{low}, {high}]" in text
    for name in ("md", "tex"):
        assert f"{value} " in (made / f"report.{name}").read_text(encoding="utf-8")


def test_the_tables_as_markdown_and_latex(made, page):
    text = (made / "report.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert text.count("\n**") == text.count("|\n| --- |") and len(lines) > 40
    for head, rule in ((line, lines[place + 1]) for place, line in enumerate(lines[:-1]) if "---" in lines[place + 1]):
        assert head.count(" | ") == rule.count(" | ")
    tex = (made / "report.tex").read_text(encoding="utf-8")
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == text.count("\n**") > 5
    for table in tex.split(r"\begin{tabular}{")[1:]:
        columns = len(table.split("}")[0])
        rows = [line for line in table.split(r"\end{tabular}")[0].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    assert not re.search(
        r"(?<!\\)[%#$_](?![A-Za-z ]*\n)", re.sub(r"^%.*$|\\label\{[^}]*\}|\$-?\\?[a-z]*\$", "", tex, flags=re.M)
    )


def test_the_same_figures_make_the_same_drawing(made):
    one, other = (plots.curves(Results.read(made), "exact_match") for _ in range(2))
    assert one == other and "exact match" in one.svg and "abd: zero-shot .000, after abd" in one.words


def test_what_a_run_lacks_is_left_out_with_a_word(tmp_path, capsys):
    folder = make_evaluation(tmp_path, pictures=False, routes=False)
    (folder / "evaluation.json").unlink()
    for task in (TASKS[:1], TASKS):
        shutil.rmtree(tmp_path / f"llava-tiny_{'_'.join(task)}")
    (tmp_path / "images" / "abd0.png").unlink()
    main([str(folder), "--examples", "4", "--image_folder", str(tmp_path / "images")])
    seen = Seen((folder / REPORT).read_text(encoding="utf-8"))
    text = " ".join("".join(seen.text).split())
    for words in (
        "The answers tell of no route among tasks",
        "Not measured; PICTURES=",
        "no training log is left",
        "There is no evaluation.json",
    ):
        assert words in text
    (tmp_path / "test.jsonl").unlink()
    main([str(folder), "--examples", "4"])
    assert "No picture: the question file" in (folder / REPORT).read_text(encoding="utf-8")


def test_a_damaged_file_costs_its_own_part_alone(tmp_path, capsys):
    folder = make_evaluation(tmp_path, metrics=("exact_match",))
    first, last = (f"llava-tiny_{'_'.join(tasks)}" for tasks in (TASKS[:1], TASKS))
    answers = folder / first / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    for file, text in (
        (folder / "zero-shot" / "scores.json", "{"),
        (folder / "evaluation.json", "[]"),
        (tmp_path / first / "training.json", '{"seed": '),
        (tmp_path / last / "log_history.json", "{}"),
        (tmp_path / last / "slots.pth", "no slots"),
    ):
        file.write_text(text)
    main([str(folder), "--examples", "2"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and all(line.startswith("note: left out of the page: ") for line in said)
    assert f"{answers}: not the answers that scores.json was made of" in " ".join(said)
    page = (folder / REPORT).read_text(encoding="utf-8")
    files = re.findall(r"<p>Left out, as (.*?) cannot be read: what it tells.</p>", page)
    parts = "answers.jsonl", "training.json", "log_history.json", "slots.pth"
    places = [f"{stage}/{part}" for stage, part in zip((first, first, last, last), parts)]
    assert sorted(files) == sorted(["zero-shot/scores.json", "tiny/evaluation.json", *places])
    assert str(tmp_path) not in page and "Training of abd" in page and "Training of chest" not in page
    assert "Where the questions were routed to" in page


def test_without_the_last_scores_the_matrix_is_left(tmp_path, capsys):
    folder = make_evaluation(tmp_path, metrics=("exact_match",))
    (folder / f"llava-tiny_{'_'.join(TASKS)}" / "scores.json").unlink()
    main([str(folder)])
    assert "left out of the page: scores file not found" in capsys.readouterr().err
    text = " ".join("".join(Seen((folder / REPORT).read_text(encoding="utf-8")).text).split())
    assert "Exact match by stage (rows) and task (columns)" in text and "Training of chest" in text
    assert "0 example questions" in text and "0 test questions" not in text and "Scores after all" not in text


@pytest.mark.parametrize(
    "given, shown",
    [
        ("--model-path=/scans/ann/llava", "--model-path=…/llava"),
        ("--model-path=~ann/llava", "--model-path=…/llava"),
        ("DATA=file:///scans/ann/x", "DATA=…/x"),
        ("~/llava", "…/llava"),
        ("/data/a=b/llava", "…/llava"),
        ("--route=prior=0.5", "--route=prior=0.5"),
        ("output/x", "output/x"),
    ],
)
def test_a_path_is_shortened_however_it_is_given(given, shown):
    assert shown_path(given) == shown


def test_what_does_not_fit_together_is_named(tmp_path):
    folder = make_evaluation(tmp_path, pictures=False, metrics=("exact_match",))
    matrix = folder / "accuracy_matrix.json"
    values = json.loads(matrix.read_text())
    for stages, message in ((["../x", "y"], "leads out"), (7, "stages is 7"), (values["stages"][:1], "1 stages for 2")):
        matrix.write_text(json.dumps({**values, "stages": stages}))
        with pytest.raises(UserError, match=message):
            Results.read(folder)


@pytest.mark.parametrize(
    "route",
    [3, {"slots": 1}, {"slots": [0.5]}, {"weights": ["much"]}, {"novelty": "new"}]
    + [{"task_posterior": found} for found in ([1.0], {"abd": "likely"}, {"abd": None})],
)
def test_another_programs_route_is_looked_at_before_it_is_shown(route):
    with pytest.raises(UserError, match="answers.jsonl: line 2"):
        check_route({"route": route}, "answers.jsonl: line 2")


def test_a_route_need_not_tell_everything():
    for route in (None, {}, {"task": "abd", "novelty": None}, {"task_posterior": {"abd": 1.0}, "slots": [0]}):
        check_route({"route": route}, "answers.jsonl: line 1")


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing: no accuracy_matrix.json there"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="give evaluations' folders"):
        main([])


def test_the_pages_folder_is_the_one_in_common_however_paths_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common_folder(["eval/a", "eval/b"]) == "eval" and common_folder(["a", "b"]) == "."
    assert common_folder([str(tmp_path / "eval" / "a"), "eval/b"]) == str(tmp_path / "eval")
    assert common_folder(["../x/a", "eval/b"]) == ".."


@pytest.mark.filterwarnings("error")
def test_names_in_drawings_are_text_in_whatever_script():
    plot = plots.drawn("odd", "", lambda axes: axes.set_xticks(range(2), ["$x_{$", "\u80ba"]))
    assert "$x_{$" in plot.svg and "\u80ba" in plot.svg


def test_cv805_names_its_evaluation_by_its_settings(tmp_path):
    asked = Arguments(sequence="phantom", method="ewc", route="oracle", output_dir=str(tmp_path))
    assert named_evaluation(asked) == str(tmp_path / "eval" / "phantom-ewc-oracle")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two seeds of one method and one of another, of which no picture is looked at, and their page."""
    root = tmp_path_factory.mktemp("several")
    runs = {"first": ("retrieval", 1), "second": ("retrieval", 2), "other": ("ewc", 1)}
    folders = [
        str(make_evaluation(root, name, *kind, pictures=False, metrics=("exact_match",))) for name, kind in runs.items()
    ]
    main([*folders, "--examples", "2", "--no_java"])
    return root / "eval"


def test_several_runs_stand_side_by_side_with_their_paired_differences(several):
    text = (several / REPORT).read_text(encoding="utf-8")
    told = " ".join(" ".join(Seen(text).text).split())
    assert "Evaluation of first, second, other, 3 runs" in told and "first is what the others are compared with" in told
    assert "retrieval, abd → chest, over 2 seeds" in told
    files = [str(several / name / f"llava-{name}_abd_chest" / "answers.jsonl") for name in ("first", "other")]
    questions = str(several.parent / "test.jsonl")
    words = ["--question-file", questions, "--no-java", "--compare", *files, "--output-dir", str(several / "compared")]
    eval_video_qa.main(words)
    groups = json.loads((several / "compared" / "comparison.json").read_text())["groups"]
    found = groups["overall"]["figures"]["exact_match"]
    cell = Cell(number(found["difference"], "+"), interval(found["ci95"], "+"))
    lines = (several / "report.md").read_text(encoding="utf-8").split("**other minus first**")[1].splitlines()
    assert next(line for line in lines if line.startswith("| exact match")).split(" | ")[1] == markdown_text(str(cell))


def test_an_example_of_several_runs_shows_what_each_answered(several):
    text = (several / REPORT).read_text(encoding="utf-8")
    cards = text.split('<li class="example"')[1:]
    assert len(cards) == 2
    assert all(re.findall(r"<dt>(.*?)</dt>", card) == ["Reference", "first", "second", "other"] for card in cards)


def test_of_many_runs_the_first_of_each_group_is_shown_in_full():
    runs = [
        SimpleNamespace(
            label=f"{method} {seed}", method=method, route="", seed=seed, tasks=["abd"], matrix={"metrics": {}}
        )
        for method in ("retrieval", "ewc", "")
        for seed in (0, 1, 2)
    ]
    for run in runs:
        run.question_file = {"sha256": "0"}
    assert [run.label for run in versus.detailed(runs)] == ["retrieval 0", "ewc 0", " 0", " 1", " 2"]
    assert [run.label for run in versus.detailed(runs[:6])] == [run.label for run in runs[:6]]
    assert [len(group) for group in versus.groups(runs)] == [3, 3, 1, 1, 1]


@pytest.mark.parametrize(
    "folders, found",
    [
        (["a/eval/vqa-rad"], [None]),
        (["a/eval/vqa-rad", "a/eval/vqa-rad-ewc"], ["vqa-rad", "vqa-rad-ewc"]),
        (["a/seed-1/eval/x", "a/seed-2/eval/x"], ["seed-1", "seed-2"]),
        (["b/ewc/o/seed-0/eval/x", "b/ewc/p/seed-0/eval/x", "b/lwf/o/seed-0/eval/x-lwf"], ["ewc/o", "ewc/p", "lwf/o"]),
        (["a/eval/x", "b/c/eval/x"], ["a", "b"]),
        (["b/ewc/o/seed-0/eval/x", "b/lwf/p/seed-0/eval/x"], ["ewc", "lwf"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(folders, found):
    assert labels(list(map(Path, folders))) == found


def test_a_benchmarks_cells_are_its_runs_and_its_trials_are_none(tmp_path):
    for cell in ("ewc/abd_chest/seed-0", "retrieval/abd_chest/seed-1", "trials/ewc-0.1/abd_chest/seed-0"):
        place = tmp_path / cell / "eval" / "tiny"
        place.mkdir(parents=True)
        (place / "accuracy_matrix.json").write_text("{}")
    # The project's own method is what the others are compared with.
    runs = ("retrieval/abd_chest/seed-1", "ewc/abd_chest/seed-0")
    assert evaluations(tmp_path) == [tmp_path / run / "eval/tiny" for run in runs]


def test_the_routers_of_a_route_report(tmp_path):
    told = {"accuracy": share(0.9, 10), "per_domain": {"abd": share(1.0, 5)}, "ece": 0.02}
    told["novelty"] = {"rejected_known": share(0.1, 10), "detected_unknown": share(None, 0), "auroc": None}
    file = tmp_path / "route_report.json"
    file.write_text(json.dumps({"question_file": "data/test.jsonl", "routers": {"gaussian": told}}))
    table = routers(read_route_report(file))
    assert [str(cell) for cell in table.rows[0]] == [
        *("gaussian", ".900 [.800, 1.000]", "1.000 [.800, 1.000]", ".020", ".100 [.800, 1.000]", "–", "–")
    ]
    for broken in ({"routers": {"gaussian": 3}}, {"routers": {"gaussian": {"accuracy": {"value": "x"}}}}, {}):
        file.write_text(json.dumps({"question_file": "data/test.jsonl", **broken}))
        with pytest.raises(UserError, match="not a route report; write it again"):
            read_route_report(file)


def share(value, count):
    return {"value": value, "n": count, "right": 1, "interval": [0.8, 1.0] if count else [None, None]}


def test_a_picture_is_made_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (500, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    address, width, height = thumbnail(tmp_path, "large.png")
    assert (width, height) == (320, 160) and len(address) < 80_000


def test_examples_are_chosen_evenly_and_the_same_again():
    rows = [
        {"domain": domain, "scores": {"exact_match": float(right), **({"closed_accuracy": 1.0} if closed else {})}}
        for domain, count in (("abd", 40), ("chest", 3))
        for right in (True, False)
        for closed in (True, False)
        for _ in range(count)
    ]
    places = chosen(rows, 24, 17)
    counts = Counter((rows[p]["domain"], is_right(rows[p]), is_closed(rows[p])) for p in places)
    assert len(set(places)) == 24 and set(counts.values()) == {3}
    assert chosen(rows, 24, 17) == places != chosen(rows, 24, 18)
    assert len(chosen(rows, 500, 17)) == len(rows)


def test_reliability_is_what_the_calibration_error_is_made_of():
    confidence, right = np.array([0.2, 0.95, 0.99, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    bins = reliability(confidence, right)
    assert [rows for rows, _, _ in bins] == [1, 3] and bins[1][1] == pytest.approx(2 / 3)
    assert expected_calibration_error(confidence, right) == pytest.approx((0.2 + 3 * abs(2 / 3 - 0.98)) / 4)
