"""``fusion.py`` from the command line on small generated data: what it writes, finds by itself, and refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from raw_samples import (
    ROOT,
    read_jsonl,
    vqa_rad_row,
    vqa_rad_rows,
    write_pictures,
    write_references,
    write_slake,
    write_vqa_rad,
)

import fusion
from llava.data.rows import read_rows
from llava.utils import UserError

OUTPUTS = [f"train_{task}.jsonl" for task in ("vqa_rad_combined", "abd", "chest", "head")] + ["test_vqa_rad.jsonl"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty working folder, without the real data's variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQA_RAD_DIR", raising=False)
    monkeypatch.delenv("SLAKE_DIR", raising=False)
    return tmp_path


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_csv(path, rows, columns=("image", "question", "answer")):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def test_vqa_rad_from_the_default_place(home, capsys):
    write_vqa_rad(home / "data/vqa-rad")
    assert fusion.main([]) == 0
    output = home / "data"
    rows = {name: read_jsonl(output / name) for name in OUTPUTS}
    # 12 pictures with two training rows and one test row each; of the two further rows one leaks, one repeats
    assert [len(rows[name]) for name in OUTPUTS] == [24, 8, 8, 8, 12]
    assert all(row["split"] == "train" for row in rows["train_abd.jsonl"])
    assert {tuple(row["domain"].values()) for row in rows["train_chest.jsonl"]} == {(False, True, False)}
    first = rows["train_vqa_rad_combined.jsonl"][0]
    assert first == {
        "question_id": 10,
        "image": "abd0.jpg",
        "pair_id": "abd0",
        "text": "Is the ABD finding 0 there?\n<image>",
        "gpt4_answer": "Yes",
        "domain": {"abd": True, "chest": False, "head": False},
        "answer_type": "CLOSED",
        "question_type": ["PRES"],
        "split": "train",
        "phrase_type": "freeform",
        "evaluation": "evaluated",
    }
    for name in OUTPUTS:
        read_rows(output / name, require_answer=True)
        read_rows(output / "unseen" / name, require_answer=True)
    report = json.loads((output / "fusion_report.json").read_text())
    assert [(row["question_id"], row["same_as"]) for row in report["dropped"]] == [(900, 12), (901, 44)]
    assert report["mended"]["qid: string read as number"] == [10]
    assert report["mended"]["answer_type: spelling"] == [11]
    assert report["mended"]["question_type: spelling"] == [13, 14, 15]
    assert report["mended"]["answer: number written as text"] == [15]
    assert report["mended"]["answer: tab read as comma"] == [18]
    assert report["mended"]["answer: stray quotation mark removed"] == [21]
    assert report["files"]["test_vqa_rad.jsonl"] == 12
    printed = capsys.readouterr().out
    assert "rows          abd closed  abd open  chest closed" in printed
    assert printed.count("wrote data/") == 10


def test_mended_fields_reach_the_rows(home):
    write_vqa_rad(home / "data/vqa-rad", name="VQA_RAD Dataset Public.json")
    fusion.main([])
    output = home / "data"
    rows = {row["question_id"]: row for name in OUTPUTS for row in read_jsonl(output / name)}
    assert rows[11]["answer_type"] == "CLOSED"
    assert rows[13]["question_type"] == ["POS", "PRES"]
    assert rows[14]["question_type"] == ["OTHER"]
    assert (rows[15]["gpt4_answer"], rows[15]["question_type"]) == ("4", ["ATTRIB"])
    assert rows[18]["gpt4_answer"] == "lungs, bony cavity, vessels"
    assert rows[21]["gpt4_answer"] == "on the skin"


def test_unseen_split_holds_no_picture_on_both_sides(home):
    write_vqa_rad(home / "data/vqa-rad")
    fusion.main([])
    train = read_jsonl(home / "data/unseen/train_vqa_rad_combined.jsonl")
    test = read_jsonl(home / "data/unseen/test_vqa_rad.jsonl")
    assert not {row["image"] for row in train} & {row["image"] for row in test}
    assert len(train) + len(test) == 36
    assert {row["split"] for row in test} == {"test"}
    fold = {row["image"]: row["fold"] for row in train + test}
    assert fold["head2.jpg"] == fold["head3.jpg"]


def test_second_run_gives_the_same_bytes_and_another_seed_another_split(home):
    write_vqa_rad(home / "data/vqa-rad")
    fusion.main(["--output_dir", "one"])
    fusion.main(["--output_dir", "two"])
    fusion.main(["--output_dir", "three", "--seed", "5"])
    assert files_in(home / "one") == files_in(home / "two") == files_in(home / "three")
    for name in files_in(home / "one"):
        assert (home / "one" / name).read_bytes() == (home / "two" / name).read_bytes()
    unseen = "unseen/test_vqa_rad.jsonl"
    assert (home / "one" / unseen).read_bytes() != (home / "three" / unseen).read_bytes()


def test_variable_names_the_folder(home, monkeypatch):
    monkeypatch.setenv("VQA_RAD_DIR", str(write_vqa_rad(home / "elsewhere")))
    assert fusion.main([]) == 0
    monkeypatch.setenv("VQA_RAD_DIR", str(home / "nowhere"))
    with pytest.raises(UserError, match="VQA_RAD_DIR names no folder: .*nowhere"):
        fusion.main([])


@pytest.mark.parametrize("how", [["--dataset", "slake"], ["--data_dir", "data/slake"], []])
def test_slake(home, how, capsys):
    write_slake(home / "data/slake")
    assert fusion.main(how) == 0
    output = home / "data"
    rows = {task: read_jsonl(output / f"slake_train_{task}.jsonl") for task in ("combined", "ct", "mri", "xray")}
    assert {task: len(found) for task, found in rows.items()} == {"combined": 7, "ct": 3, "mri": 2, "xray": 2}
    assert len(read_jsonl(output / "slake_validate.jsonl")) == len(read_jsonl(output / "slake_test.jsonl")) == 6
    assert rows["xray"][0] == {
        "question_id": 6,
        "image": "xmlab6/source.jpg",
        "pair_id": "xmlab6/source",
        "text": "Is this a lung?\n<image>",
        "gpt4_answer": "Yes",
        "domain": {"ct": False, "mri": False, "xray": True},
        "answer_type": "CLOSED",
        "question_type": ["Organ"],
        "split": "train",
        "location": "Lung",
        "base_type": "vqa",
    }
    report = json.loads((output / "slake_fusion_report.json").read_text())
    assert [row["question_id"] for row in report["dropped"]] == [800]
    assert [(row["question_id"], row["same_as"]) for row in report["repeated"]] == [(801, 0)]
    assert "dropped, empty answer: 1 rows (question_id 800)" in capsys.readouterr().out
    assert not (output / "train_vqa_rad_combined.jsonl").exists()


def csv_form(home, columns=("image", "question", "answer")):
    """metadata.csv and references in data/train, as the seed names them, from the rows of the authors' form."""
    rows = vqa_rad_rows()
    write_csv(home / "data/train/metadata.csv", ([row["image_name"], row["question"], row["answer"]] for row in rows))
    write_references(home / "data/train", rows)
    write_pictures(home / "data/vqa-rad/images", (row["image_name"] for row in rows))
    return rows


def test_csv_with_references_equals_the_authors_form(home):
    """Every row gets its organ, answer type, question type and split; ids are positions, for the csv has none."""
    rows = csv_form(home)
    assert fusion.main(["--output_dir", "from_csv"]) == 0
    write_vqa_rad(home / "authors")
    fusion.main(["--data_dir", "authors", "--output_dir", "from_json"])
    id_of = {number: int(row["qid"]) for number, row in enumerate(rows)}
    for name in OUTPUTS:
        joined, expected = read_jsonl(home / "from_csv" / name), read_jsonl(home / "from_json" / name)
        assert [id_of[row["question_id"]] for row in joined] == [row["question_id"] for row in expected]
        for row, right in zip(joined, expected, strict=True):
            shared = set(right) - {"question_id", "phrase_type", "evaluation"}
            assert {key: row[key] for key in shared} == {key: right[key] for key in shared}
    report = json.loads((home / "from_csv/fusion_report.json").read_text())["organ_join"]
    # "Is it normal? No" stands under all three organs: 12 rows and one repeat, all told by the picture's other rows
    assert report["counts"] == {
        "question and answer": 25,
        "question and answer, then the picture's other questions": 13,
    }
    assert report["listed"] == []


def test_ambiguous_rows_are_listed_and_left_out(home, capsys):
    csv_form(home)
    with open(home / "data/train/metadata.csv", "a") as stream:
        stream.write("lonely.jpg,Is it normal?,No\nlonely.jpg,Why?,Because\nabd1.jpg,Why?,Because\n")
    write_pictures(home / "data/vqa-rad/images", ["lonely.jpg"])
    fusion.main([])
    listed = json.loads((home / "data/fusion_report.json").read_text())["organ_join"]["listed"]
    assert [(row["image"], row["organ"], row["candidates"]) for row in listed] == [
        ("lonely.jpg", None, ["abd", "chest", "head"]),
        ("lonely.jpg", None, ["abd", "chest", "head"]),
        ("abd1.jpg", "abd", ["abd"]),
    ]
    written = [
        row for name in files_in(home / "data") if name.endswith("l") for row in read_jsonl(home / "data" / name)
    ]
    assert not any(row["image"] == "lonely.jpg" for row in written)
    assert any(row["image"] == "abd1.jpg" and row["text"].startswith("Why?") for row in written)
    printed = capsys.readouterr()
    assert "organ by open: 2 rows" in printed.out
    assert "2 of them stay open and are left out" in printed.err


def test_export_with_one_copy_of_the_picture_for_each_question(home):
    """The Hugging Face copy has no picture names: copies with the same bytes are one picture."""
    rows = vqa_rad_rows()[:-2]
    table = []
    for number, row in enumerate(rows):
        split = "test" if row["phrase_type"].startswith("test_") else "train"
        name = f"{split}_{number:05d}.jpg"
        table.append([name, row["question"].lower(), str(row["answer"]).lower(), split])
        path = home / "data/train/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"picture {row['image_name']}".encode())
    write_csv(home / "data/train/metadata.csv", table, ("file_name", "question", "answer", "split"))
    write_references(home / "data/train", rows)
    fusion.main([])
    combined = read_jsonl(home / "data/train_vqa_rad_combined.jsonl") + read_jsonl(home / "data/test_vqa_rad.jsonl")
    right = {number: row["image_organ"].lower() for number, row in enumerate(rows)}
    assert {row["question_id"]: next(d for d, true in row["domain"].items() if true) for row in combined} == right
    unseen = [read_jsonl(home / "data/unseen" / name) for name in (OUTPUTS[0], OUTPUTS[-1])]
    pictures = [{rows[row["question_id"]]["image_name"] for row in side} for side in unseen]
    assert not pictures[0] & pictures[1]


def test_second_csv_holds_the_test_rows(home):
    write_csv(home / "train.csv", [[f"a{n}.jpg", f"What is {n}?", "x", "abd"] for n in range(20)], DOMAIN_COLUMNS)
    write_csv(home / "test.csv", [["a0.jpg", "And this?", "yes", "abd"]], DOMAIN_COLUMNS)
    write_pictures(home / "pictures", [f"a{n}.jpg" for n in range(20)])
    options = ["--metadata", "train.csv", "--image_dir", "pictures", "--output_dir", "out"]
    assert fusion.main([*options, "--test_metadata", "test.csv"]) == 0
    assert [row["question_id"] for row in read_jsonl(home / "out/test_vqa_rad.jsonl")] == [20]
    assert len(read_jsonl(home / "out/train_abd.jsonl")) == 20
    # the same without test rows would train on what an older test file asks
    with pytest.raises(UserError, match="test_vqa_rad.jsonl is from an earlier run"):
        fusion.main(options)
    (home / "out/test_vqa_rad.jsonl").unlink()
    assert fusion.main(options) == 0
    assert not (home / "out/test_vqa_rad.jsonl").exists()
    assert (home / "out/unseen/test_vqa_rad.jsonl").exists()


DOMAIN_COLUMNS = ("image", "question", "answer", "domain")


def test_own_data_with_a_domain_column_needs_no_references(home):
    rows = [[f"img/{d}{n}.png", f"What is {d}?", "x", d] for d in ("Knee", "hip") for n in range(8)]
    write_csv(home / "own.csv", rows, DOMAIN_COLUMNS)
    write_pictures(home / "pictures", [f"{d}{n}.png" for d in ("Knee", "hip") for n in range(8)])
    fusion.main(["--metadata", "own.csv", "--image_dir", "pictures", "--output_dir", "out"])
    (first, *_) = read_jsonl(home / "out/train_knee.jsonl")
    assert first["domain"] == {"hip": False, "knee": True}
    assert first["image"] == "Knee0.png"  # as it is in the folder
    assert "answer_type" not in first


def test_missing_pictures_are_named_and_counted(home, capsys):
    write_vqa_rad(home / "data/vqa-rad")
    for number in range(4):
        (home / f"data/vqa-rad/images/head{number}.jpg").unlink()
    (home / "data/vqa-rad/images/abd0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"5 images are missing or empty in .*: abd0.jpg, head0.jpg, head1.jpg, … \("):
        fusion.main([])
    assert files_in(home / "data") == files_in_of_raw(home)
    assert fusion.main(["--allow_missing_images"]) == 0
    assert "5 images are missing" in capsys.readouterr().err
    assert len(read_jsonl(home / "data/train_head.jsonl")) == 8


def files_in_of_raw(home):
    return [f"vqa-rad/{name}" for name in files_in(home / "data/vqa-rad")]


def test_missing_pictures_of_a_csv_are_named_as_the_csv_has_them(home):
    csv_form(home)
    (home / "data/vqa-rad/images/abd2.jpg").unlink()
    with pytest.raises(UserError, match="1 images are missing or empty in .*: abd2.jpg"):
        fusion.main([])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qid": "x"}, "item 3: field 'qid': expected a whole number, found 'x'"),
        ({"qid": 11}, "qid 11 is used twice"),
        ({"image_organ": "KNEE"}, r"item 3 \(qid 12\): field 'image_organ': expected one of ABD, CHEST, HEAD"),
        ({"answer": None}, r"item 3 \(qid 12\): field 'answer' is missing"),
        ({"answer": "  "}, r"field 'answer' is empty"),
        ({"question": 7.5, "answer": float("nan")}, "field 'answer' is missing or no text: nan"),
        ({"answer_type": "yes/no"}, "field 'answer_type': expected OPEN or CLOSED"),
        ({"image_name": ""}, "field 'image_name' is empty"),
        ({"phrase_type": "frame"}, "templated copies of the test questions"),
        ({"question": "what <image>?"}, "question 12: the question is empty or holds '<image>'"),
    ],
)
def test_bad_field_of_the_authors_form(home, change, words):
    rows = vqa_rad_rows()
    rows[2] |= change
    write_vqa_rad(home / "data/vqa-rad", rows) if "image_name" not in change else write_broken(home, rows)
    with pytest.raises(UserError, match=words):
        fusion.main([])
    assert not (home / "data/train_abd.jsonl").exists()


def write_broken(home, rows):
    (home / "data/vqa-rad").mkdir(parents=True)
    (home / "data/vqa-rad/VQA_RAD_Dataset_Public.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file holds no rows"),
        ("[]", "the file holds no rows"),
        ('[{"qid": 1,\n oops', "VQA_RAD_Dataset_Public.json, line 2: broken JSON"),
        ("[1]", "neither VQA-RAD .* nor SLAKE .* rows: int"),
        ('[{"a": 1, "b": 2}]', "neither VQA-RAD .* nor SLAKE .* rows: a, b"),
    ],
)
def test_bad_file(home, content, words):
    (home / "data/vqa-rad").mkdir(parents=True)
    (home / "data/vqa-rad/VQA_RAD_Dataset_Public.json").write_text(content)
    with pytest.raises(UserError, match=words):
        fusion.main([])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no raw input found: place VQA_RAD_Dataset_Public.json and images/ in data/vqa-rad"),
        (["--dataset", "slake"], "no SLAKE input found: place train.json, validate.json, test.json and imgs/"),
        (["--dataset", "vqa-rad-csv"], "or place metadata.csv with vqa_ABD.json"),
        (["--dataset", "pathology"], "unknown dataset 'pathology' .*auto, vqa-rad, vqa-rad-csv, slake"),
        (["--data_dir", "nowhere"], "no VQA-RAD or SLAKE input in nowhere: place VQA_RAD_Dataset_Public.json"),
        (["--data_dir", "nowhere", "--dataset", "slake"], "no slake input in nowhere: place train.json, validate.json"),
        (["--metadata", "none.csv"], "metadata csv not found: none.csv"),
        (["--reference", "vqa_ABD.json"], "metadata csv not found: data/train/metadata.csv"),
    ],
)
def test_input_that_is_not_there(home, options, words):
    with pytest.raises(UserError, match=words):
        fusion.main(options)
    assert files_in(home) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vqa_ABD.json", "[]", "vqa_ABD.json: the file holds no rows"),
        ("vqa_ABD.json", '[{"question": "q"}]', "item 1: field 'answer' is missing"),
        ("vqa_ABD.json", '[{"question": "q", "answer": "a", "image_organ": "HEAD"}]', "'head', but the file name says"),
        ("organs.json", '[{"question": "q", "answer": "a"}]', "no organ: name the file vqa_<ORGAN>.json"),
        ("vqa_ABD.json", "[3]", "expected a JSON object"),
    ],
)
def test_bad_reference(home, name, content, words):
    csv_form(home)
    (home / name).write_text(content)
    with pytest.raises(UserError, match=words):
        fusion.main(["--reference", name])


def test_csv_without_references_says_what_to_add(home):
    write_csv(home / "data/train/metadata.csv", [["a.jpg", "q", "a"]])
    with pytest.raises(UserError, match="row 0 has no domain and there are no reference JSONs: place vqa_ABD.json"):
        fusion.main([])


def test_authors_file_serves_as_reference(home):
    rows = csv_form(home)
    (home / "all.json").write_text(json.dumps(rows))
    assert fusion.main(["--reference", "all.json"]) == 0
    assert len(read_jsonl(home / "data/test_vqa_rad.jsonl")) == 12


def test_a_task_without_rows_is_refused(home):
    rows = [row for row in vqa_rad_rows() if row["image_organ"] != "HEAD"]
    write_vqa_rad(home / "data/vqa-rad", rows)
    with pytest.raises(UserError, match="no rows for train_head.jsonl, .*nothing was written"):
        fusion.main([])


def test_slake_picture_in_two_splits_is_refused(home):
    write_slake(home / "data/slake")
    path = home / "data/slake/test.json"
    rows = json.loads(path.read_text())
    rows[0]["img_name"] = "xmlab0/source.jpg"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="picture xmlab0/source.jpg is in train and in test"):
        fusion.main(["--dataset", "slake"])


def test_nothing_half_written_when_a_rename_fails_late(home, monkeypatch):
    """The disk fills while the files are written: the old ones are all as they were."""
    write_vqa_rad(home / "data/vqa-rad")
    fusion.main([])
    before = {name: (home / "data" / name).read_bytes() for name in files_in(home / "data")}
    rows = vqa_rad_rows()
    rows[0]["question"] = "Something else?"
    write_vqa_rad(home / "data/vqa-rad", rows)
    calls = []

    def full_disk(handle):
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        fusion.main([])
    after = {name: (home / "data" / name).read_bytes() for name in files_in(home / "data")}
    raw = "vqa-rad/VQA_RAD_Dataset_Public.json"
    assert {name: text for name, text in after.items() if name != raw} == {n: t for n, t in before.items() if n != raw}


def run(home, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "fusion.py"), *options]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_command_line_says_one_line_and_exits_non_zero(home):
    done = run(home)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no raw input found: place")
    write_vqa_rad(home / "data/vqa-rad")
    (home / "file").write_text("")
    done = run(home, "--output_dir", "file")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: output folder file is a file" in done.stderr
    assert run(home).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_no_permission_to_write(home):
    write_vqa_rad(home / "data/vqa-rad")
    (home / "locked").mkdir(mode=0o500)
    done = run(home, "--output_dir", "locked")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "permission denied" in done.stderr


def test_read_only_place_ends_in_one_line(home):
    write_vqa_rad(home / "data/vqa-rad")
    done = run(home, "--output_dir", "/proc/fusion")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


def test_vqa_rad_row_helper_is_complete():
    assert set(vqa_rad_row(1, "a.jpg", "ABD", "q", "a")) >= {"qid", "phrase_type", "image_name", "image_organ"}
