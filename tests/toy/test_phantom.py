"""The phantom dataset: same bytes every time, balanced answers, valid rows, conventions that differ by domain."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import pytest

from llava.data.rows import Row, parse_row, read_rows
from llava.toy import phantom
from llava.toy.phantom import SPLITS, PhantomConfig, build_part, make_phantom
from llava.toy.phantom_domains import DOMAINS, LARGE, SMALL, VOCABULARY, Scene, draw_scene
from llava.toy.phantom_draw import LOOKS
from llava.toy.phantom_questions import QUESTIONS
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL_CONFIG = PhantomConfig(train_rows=48, train_images=16, test_rows=24, test_images=12)


@pytest.fixture(scope="module")
def full_parts() -> dict[tuple[str, str], list[Row]]:
    """Rows by domain and split at the default size, without drawing the pictures."""
    parts = {}
    for domain in DOMAINS:
        for split in SPLITS:
            parts[domain, split] = [parse_row(row) for row in build_part(domain, split, PhantomConfig())[1]]
    return parts


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _scene(domain: str = "abd", **changes) -> Scene:
    values = {
        "modality": 0,
        "enlarged": False,
        "look": "bright",
        "count": 1,
        "large": SMALL,
        "right": False,
        "lower": False,
        "seed": 3,
    }
    return Scene(domain=domain, **{**values, **changes})


def _answer(name: str, scene: Scene) -> str:
    return next(question for question in QUESTIONS if question.name == name).answer_for(scene)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    assert make_phantom(tmp_path / "one", SMALL_CONFIG)
    assert make_phantom(tmp_path / "two", SMALL_CONFIG)
    assert _checksums(tmp_path / "one") == _checksums(tmp_path / "two")
    first = draw_scene(_scene(), 64)
    assert not (first == draw_scene(_scene(seed=4), 64)).all()


@pytest.mark.slow
def test_a_complete_folder_is_left_alone_and_other_settings_replace_it(tmp_path):
    target = tmp_path / "phantom"
    make_phantom(target, SMALL_CONFIG)
    before = (target / "test.jsonl").stat().st_mtime_ns
    assert not make_phantom(target, SMALL_CONFIG)
    assert (target / "test.jsonl").stat().st_mtime_ns == before
    assert make_phantom(target, PhantomConfig(**{**vars(SMALL_CONFIG), "size": 48}))
    assert cv2.imread(str(next((target / "images").iterdir())), cv2.IMREAD_GRAYSCALE).shape == (48, 48)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_half_written_and_the_next_one_completes(tmp_path, monkeypatch):
    make_phantom(tmp_path / "whole", SMALL_CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(phantom, "png_bytes", _fail_after(30))
        with pytest.raises(KeyboardInterrupt):
            make_phantom(tmp_path / "killed", SMALL_CONFIG)
    assert not (tmp_path / "killed").exists()
    make_phantom(tmp_path / "killed", SMALL_CONFIG)
    assert _checksums(tmp_path / "killed") == _checksums(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "whole"}


def _fail_after(calls: int):
    real, left = phantom.png_bytes, [calls]

    def fail(picture):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(picture)

    return fail


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a phantom dataset"):
        make_phantom(tmp_path, SMALL_CONFIG)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", [{"size": 8}, {"train_rows": 3}, {"test_images": 2}])
def test_sizes_that_cannot_work_are_refused(tmp_path, change):
    with pytest.raises(UserError, match="--"):
        make_phantom(tmp_path / "phantom", PhantomConfig(**{**vars(SMALL_CONFIG), **change}))


def test_every_row_is_valid_and_its_picture_exists(tmp_path):
    make_phantom(tmp_path / "phantom", SMALL_CONFIG)
    for name in [f"train_{domain}" for domain in DOMAINS] + ["test"]:
        for row in read_rows(tmp_path / "phantom" / f"{name}.jsonl", require_answer=True):
            assert (tmp_path / "phantom" / "images" / row.image).is_file()
            assert row.domain in DOMAINS
            assert row.answer_type in ("OPEN", "CLOSED")
            assert (row.answer in ("yes", "no")) == (row.answer_type == "CLOSED")


def test_sizes_are_as_asked(full_parts):
    for (_domain, split), rows in full_parts.items():
        wanted = 600 if split == "train" else 120
        assert wanted - 12 <= len(rows) <= wanted
        assert len({row.image for row in rows}) == (150 if split == "train" else 40)
        closed = sum(row.answer_type == "CLOSED" for row in rows) / len(rows)
        assert 0.35 < closed < 0.5


def test_no_picture_is_in_two_parts(full_parts):
    for domain in DOMAINS:
        pictures = [{row.image for row in full_parts[domain, split]} for split in SPLITS]
        assert len(set().union(*pictures)) == sum(map(len, pictures))
        scenes = [build_part(domain, split, SMALL_CONFIG)[0].values() for split in SPLITS]
        assert len({scene.seed for part in scenes for scene in part}) == sum(map(len, scenes))  # nor drawn twice


def test_questions_alone_and_the_majority_answer_are_weak(full_parts):
    for domain in DOMAINS:
        test = full_parts[domain, "test"]
        majority = Counter(row.answer for row in full_parts[domain, "train"]).most_common(1)[0][0]
        assert sum(row.answer == majority for row in test) / len(test) < 0.25
        by_question = defaultdict(Counter)
        for row in full_parts[domain, "train"]:
            by_question[row.question][row.answer] += 1
        guesses = {question: answers.most_common(1)[0][0] for question, answers in by_question.items()}
        assert sum(row.answer == guesses[row.question] for row in test) / len(test) < 0.5


def test_answers_of_a_question_are_equally_frequent(full_parts):
    by_question = defaultdict(Counter)
    for row in full_parts["head", "train"]:
        by_question[row.question][row.answer] += 1
    for question, answers in by_question.items():
        assert len(answers) >= 2, question
        assert max(answers.values()) - min(answers.values()) <= 1, (question, answers)


def test_most_questions_are_asked_in_all_domains_with_other_answers(full_parts):
    asked = [{row.question for row in full_parts[domain, "train"]} for domain in DOMAINS]
    shared = set.intersection(*asked)
    assert len(shared) == len(QUESTIONS) - 1
    looks = [set(VOCABULARY[domain].looks.values()) for domain in DOMAINS]
    assert all(set(VOCABULARY[domain].looks) == set(LOOKS) for domain in DOMAINS)
    assert not looks[0] & looks[1] and not looks[1] & looks[2] and not looks[0] & looks[2]


def test_the_side_follows_the_convention_of_the_domain():
    assert _answer("side", _scene("abd", right=False)) == "right"
    assert _answer("side", _scene("chest", right=False)) == "right"
    assert _answer("side", _scene("head", right=False)) == "left"
    assert _answer("left", _scene("abd", right=True)) == "yes"
    assert _answer("left", _scene("head", right=True)) == "no"


def test_urgency_follows_another_rule_in_every_domain():
    large_bright = {"look": "bright", "large": LARGE}
    assert [_answer("urgent", _scene(domain, **large_bright)) for domain in DOMAINS] == ["yes", "no", "yes"]
    small_dark = {"look": "dark", "large": SMALL}
    assert [_answer("urgent", _scene(domain, **small_dark)) for domain in DOMAINS] == ["no", "yes", "no"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_abnormality_is_drawn_where_the_scene_says(domain):
    for right in (False, True):
        changes = {"large": LARGE, "right": right, "lower": True}
        with_spot = draw_scene(_scene(domain, **changes), 64).astype(int)
        without = draw_scene(_scene(domain, **{**changes, "look": None, "count": 0}), 64).astype(int)
        difference = abs(with_spot - without) > 20
        assert not difference[:30].any()
        left, other = difference[:, :32].sum(), difference[:, 32:].sum()
        assert left + other > 20
        assert (other > left) == right


@pytest.mark.slow
def test_the_command_line_prints_a_summary_and_draws_an_overview(tmp_path):
    sizes = [f"--{name}={value}" for name, value in vars(SMALL_CONFIG).items()]
    command = [sys.executable, "scripts/make_phantom.py", "--output_dir", tmp_path / "p", *sizes]
    done = subprocess.run(
        [*command, "--contact_sheet", tmp_path / "sheet.png"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "train_chest" in done.stdout and "majority answer" in done.stdout
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] > 1000
    bad = subprocess.run([*command, "--size=4"], check=False, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode != 0 and bad.stderr.count("\n") == 1 and "--size 4" in bad.stderr
