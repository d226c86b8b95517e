"""``fusion.py`` on the published data: the counts of the papers, every known trap, and the organ join's accuracy."""

from __future__ import annotations

import json
from collections import Counter

import pandas
import pytest
from raw_samples import read_jsonl, real_data, write_references

import fusion
from llava.data.rows import read_rows

TASKS = ("abd", "chest", "head")


@pytest.fixture(scope="module")
def vqa_rad():
    return real_data("VQA_RAD_DIR", "vqa-rad", "VQA_RAD_Dataset_Public.json")


@pytest.fixture(scope="module")
def slake():
    return real_data("SLAKE_DIR", "slake", "train.json")


@pytest.fixture(scope="module")
def output(vqa_rad, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    fusion.main(["--data_dir", str(vqa_rad), "--output_dir", str(folder)])
    return folder


def domain_of(row):
    return next(name for name, true in row["domain"].items() if true)


def counts(rows):
    return Counter((domain_of(row), row["answer_type"]) for row in rows)


def test_published_counts(output):
    train = read_jsonl(output / "train_vqa_rad_combined.jsonl")
    test = read_jsonl(output / "test_vqa_rad.jsonl")
    assert (len(train), len(test)) == (1793, 451)
    assert counts(train) == {
        ("abd", "CLOSED"): 337,
        ("abd", "OPEN"): 244,
        ("chest", "CLOSED"): 393,
        ("chest", "OPEN"): 224,
        ("head", "CLOSED"): 295,
        ("head", "OPEN"): 300,
    }
    assert counts(test) == {
        ("abd", "CLOSED"): 102,
        ("abd", "OPEN"): 56,
        ("chest", "CLOSED"): 116,
        ("chest", "OPEN"): 58,
        ("head", "CLOSED"): 54,
        ("head", "OPEN"): 65,
    }
    for task in TASKS:
        assert read_jsonl(output / f"train_{task}.jsonl") == [row for row in train if domain_of(row) == task]


def test_official_split_lists(vqa_rad, output):
    path = vqa_rad / "splits" / "official_split.json"
    if not path.is_file():
        pytest.skip("no official_split.json beside the real data")
    split = json.loads(path.read_text())
    listed = next(values for name, values in split.items() if isinstance(values, list) and len(values) == 1793)
    assert [row["question_id"] for row in read_jsonl(output / "train_vqa_rad_combined.jsonl")] == listed
    assert [row["question_id"] for row in read_jsonl(output / "test_vqa_rad.jsonl")] == split["test"]


def test_every_file_reads_back_as_training_rows(output):
    for path in output.rglob("*.jsonl"):
        assert read_rows(path, require_answer=True)


def test_known_slips_are_mended_and_listed(output):
    report = json.loads((output / "fusion_report.json").read_text())
    assert [(row["question_id"], row["same_as"]) for row in report["dropped"]] == [
        (79, 78),
        (196, 195),
        (422, 447),
        (943, 942),
    ]
    mended = report["mended"]
    assert mended["qid: string read as number"] == [0]
    assert mended["answer: number written as text"] == [1511, 1568, 1683, 2234, 2235]
    assert mended["answer: tab read as comma"] == [369, 472, 591, 594, 922]
    assert mended["answer: white space tidied"] == [2239]
    assert mended["answer_type: spelling"] == [2156, 2157]
    assert mended["question: undecodable character read as apostrophe"] == [2136]
    assert len(mended["question_type: spelling"]) == 4
    files = ("train_vqa_rad_combined.jsonl", "test_vqa_rad.jsonl")
    rows = {row["question_id"]: row for name in files for row in read_jsonl(output / name)}
    assert rows[0]["text"] == "Are regions of the brain infarcted?\n<image>"
    assert rows[1511]["gpt4_answer"] == "4"
    assert rows[591]["gpt4_answer"] == "lungs, bony thoracic cavity, mediastinum and great vessels"
    assert rows[2136]["text"] == "How can you tell if it's the common bile duct vs the cystic duct?\n<image>"
    assert rows[2156]["answer_type"] == "CLOSED"
    assert rows[2239]["gpt4_answer"] == "superficial to the patient's skin"
    labels = {label for row in rows.values() for label in row["question_type"]}
    expected = "ABN ATTRIB COLOR COUNT MODALITY ORGAN OTHER PLANE POS PRES SIZE"
    assert labels == set(expected.split())
    assert not any("\t" in row["text"] + row["gpt4_answer"] or "\ufffd" in row["text"] for row in rows.values())


def test_unseen_split_shares_no_picture_and_no_case(output):
    train = read_jsonl(output / "unseen" / "train_vqa_rad_combined.jsonl")
    test = read_jsonl(output / "unseen" / "test_vqa_rad.jsonl")
    assert len(train) + len(test) == 2244
    assert not {row["image"] for row in train} & {row["image"] for row in test}
    for task in TASKS:
        share = sum(domain_of(row) == task for row in test) / sum(domain_of(row) == task for row in train + test)
        assert 0.18 < share < 0.22
    fold = {row["image"]: row["fold"] for row in train + test}
    assert len(fold) == 314
    assert fold["synpic55245.jpg"] == fold["synpic55286.jpg"]
    per_fold = Counter(row["fold"] for row in train + test)
    assert len(per_fold) == 10
    assert max(per_fold.values()) - min(per_fold.values()) < 25


def rewrite_as_csv(vqa_rad, folder, change=lambda row, raw: row):
    """The authors' rows as metadata.csv without the organ, and their references; returns the rows by id."""
    rows = json.loads((vqa_rad / "VQA_RAD_Dataset_Public.json").read_text(encoding="utf-8"))
    write_references(folder, rows)
    columns = {"question_id": "qid", "image": "image_name", "question": "question", "answer": "answer"}
    table = [change({name: row[field] for name, field in columns.items()}, row) for row in rows]
    pandas.DataFrame(table).to_csv(folder / "metadata.csv", index=False)
    return {int(row["qid"]): row for row in rows}


def wrong_and_open(output, rows):
    """Ids whose organ is wrong, ids with no organ, and the ids that the report lists."""
    report = json.loads((output / "fusion_report.json").read_text())
    written = read_jsonl(output / "train_vqa_rad_combined.jsonl") + read_jsonl(output / "test_vqa_rad.jsonl")
    dropped = {row["question_id"] for row in report["dropped"]}
    organ = {row["question_id"]: domain_of(row) for row in written}
    wrong = {number for number, found in organ.items() if found != rows[number]["image_organ"].lower()}
    listed = {row["question_id"] for row in report["organ_join"]["listed"]}
    return wrong, set(rows) - set(organ) - dropped, listed


def test_organ_join_on_the_authors_own_rows(vqa_rad, tmp_path, output):
    """The acceptance figure: at least 99.5 % right, every wrong or open row listed."""
    rows = rewrite_as_csv(vqa_rad, tmp_path)
    options = ["--metadata", str(tmp_path / "metadata.csv"), "--image_dir", str(vqa_rad / "images")]
    fusion.main([*options, "--output_dir", str(tmp_path / "out")])
    wrong, left_open, listed = wrong_and_open(tmp_path / "out", rows)
    assert len(wrong | left_open) <= 0.005 * len(rows)
    assert wrong | left_open <= listed
    # measured: all 2,248 right, 2,209 by question and answer, 39 by the picture's other questions
    assert (len(wrong), len(left_open)) == (0, 0)
    for name in ("train_vqa_rad_combined.jsonl", "test_vqa_rad.jsonl"):
        joined, expected = read_jsonl(tmp_path / "out" / name), read_jsonl(output / name)
        shared = ("question_id", "image", "text", "gpt4_answer", "domain", "answer_type", "split")
        assert [[row[key] for key in shared] for row in joined] == [[row[key] for key in shared] for row in expected]


def test_organ_join_without_picture_names_and_in_lower_case(vqa_rad, tmp_path):
    """As exported from the Hugging Face copy: one copy of the picture for each question, all in lower case."""
    pictures = tmp_path / "images"
    pictures.mkdir()

    def export(row, raw):
        name = f"img_{int(row['question_id']):05d}.jpg"
        (pictures / name).symlink_to(vqa_rad / "images" / row["image"])
        split = "test" if raw["phrase_type"].startswith("test_") else "train"
        lower = {"question": row["question"].lower(), "answer": str(row["answer"]).lower()}
        return row | lower | {"image": name, "split": split}

    rows = rewrite_as_csv(vqa_rad, tmp_path, export)
    options = ["--metadata", str(tmp_path / "metadata.csv"), "--follow_links"]
    fusion.main([*options, "--output_dir", str(tmp_path / "out")])
    wrong, left_open, listed = wrong_and_open(tmp_path / "out", rows)
    assert len(wrong | left_open) <= 0.005 * len(rows)
    assert wrong | left_open <= listed
    assert len(read_jsonl(tmp_path / "out" / "test_vqa_rad.jsonl")) == 451


def test_references_with_gaps_are_told_in_the_report(vqa_rad, tmp_path):
    """A tenth of the references is missing: what is decided without a word-for-word match is listed, wrong or not."""
    rows = rewrite_as_csv(vqa_rad, tmp_path)
    for path in tmp_path.glob("vqa_*.json"):
        path.write_text(json.dumps([row for row in json.loads(path.read_text()) if int(row["qid"]) % 10]))
    options = ["--metadata", str(tmp_path / "metadata.csv"), "--image_dir", str(vqa_rad / "images")]
    fusion.main([*options, "--output_dir", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "fusion_report.json").read_text())["organ_join"]
    written = read_jsonl(tmp_path / "out" / "train_vqa_rad_combined.jsonl")
    wrong = {row["question_id"] for row in written if domain_of(row) != rows[row["question_id"]]["image_organ"].lower()}
    listed = {row["question_id"] for row in report["listed"]}
    assert wrong <= listed
    assert sum(report["counts"].values()) == len(rows)
    assert report["counts"]["open"] < 0.005 * len(rows)


def test_community_file_with_templated_test_questions_is_refused(vqa_rad):
    path = vqa_rad / "splits" / "mevf_trainset.json"
    if not path.is_file():
        pytest.skip("no mevf_trainset.json beside the real data")
    with pytest.raises(fusion.UserError, match="templated copies of the test questions"):
        fusion.main(["--data_dir", str(path), "--image_dir", str(vqa_rad / "images"), "--output_dir", "/nonexistent"])


def test_slake_counts(slake, tmp_path):
    fusion.main(["--data_dir", str(slake), "--output_dir", str(tmp_path)])
    rows = {task: read_jsonl(tmp_path / f"slake_train_{task}.jsonl") for task in ("ct", "mri", "xray")}
    assert {task: len(found) for task, found in rows.items()} == {"ct": 2366, "mri": 1129, "xray": 1423}
    assert len(read_jsonl(tmp_path / "slake_validate.jsonl")) == 1053
    test = read_jsonl(tmp_path / "slake_test.jsonl")
    assert counts(test) == {
        ("ct", "CLOSED"): 214,
        ("ct", "OPEN"): 258,
        ("mri", "CLOSED"): 88,
        ("mri", "OPEN"): 140,
        ("xray", "CLOSED"): 114,
        ("xray", "OPEN"): 247,
    }
    assert not {row["image"] for row in test} & {row["image"] for found in rows.values() for row in found}
    report = json.loads((tmp_path / "slake_fusion_report.json").read_text())
    assert [row["question_id"] for row in report["dropped"]] == [1622]
    assert [row["question_id"] for row in report["repeated"]] == list(range(592, 599))
