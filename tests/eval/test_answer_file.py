"""Answer files: chunks, resuming at every byte, refusing another run's file, merging."""

import json
from dataclasses import replace

import pytest

from llava.data.rows import parse_row, question_row, with_positions, write_jsonl
from llava.eval import merge_chunks
from llava.eval.answer_file import (
    answer_row,
    append,
    appending,
    batches,
    chunk_range,
    merge_answers,
    split_evenly,
)
from llava.utils import UserError

ROWS = [parse_row(question_row(number, "a.jpg", f"question {number}?", "yes", "abd", ("abd",))) for number in range(7)]


def answers(rows=ROWS, model_id="llava-x", run="r1", text="yes"):
    return [answer_row(row, text, model_id, {"run": run}) for row in rows]


def write_all(path, rows=ROWS, model_id="llava-x", run="r1", replace=False):
    with appending(path, rows, model_id, run, replace) as (done, stream):
        append(stream, answers(rows[done:], model_id, run))
    return done


@pytest.mark.parametrize("total", [0, 1, 7, 8, 10, 17, 20, 33, 41])
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_chunks_cover_every_row_once_and_evenly(total, chunks):
    parts = split_evenly(total, chunks)
    assert [number for part in parts for number in part] == list(range(total))
    assert len(parts) == chunks
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_chunk_index_out_of_range_is_named():
    assert chunk_range(10, 8, 7) == range(8, 10)
    for chunks, index in [(8, 8), (8, -1), (0, 0)]:
        with pytest.raises(UserError, match="chunk"):
            chunk_range(10, chunks, index)


def test_batches():
    assert batches(7, 3) == [range(0, 3), range(3, 6), range(6, 7)]
    assert batches(0, 3) == []


def test_answer_row_is_the_seeds_format_and_its_id_repeats():
    text = "is there evidence of air in the peritoneal cavity?\n<image>"
    row = parse_row({"question_id": 101, "image": "test_img_00101.jpg", "pair_id": "test_img_00101", "text": text})
    answer = answer_row(row, "no", "llava-vqa-rad_abd", {})
    assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (answer["question_id"], answer["prompt"], answer["text"]) == (101, text, "no")
    assert (answer["model_id"], answer["metadata"]) == ("llava-vqa-rad_abd", {})
    assert answer["answer_id"] == answer_row(row, "yes", "llava-vqa-rad_abd", {})["answer_id"]
    assert answer["answer_id"] != answer_row(row, "no", "llava-vqa-rad_abd_chest", {})["answer_id"]


SHARED = with_positions([replace(row, id=row.id // 3) for row in ROWS])  # 0, 0, 0, 1, 1, 1, 2


@pytest.mark.parametrize("rows", [ROWS, SHARED], ids=["own ids", "shared ids"])
def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(tmp_path, rows):
    whole = tmp_path / "whole.jsonl"
    write_all(whole, rows)
    data = whole.read_bytes()
    target = tmp_path / "cut.jsonl"
    for length in range(0, len(data) + 1, 13):
        target.write_bytes(data[:length])
        done = write_all(target, rows)
        assert done == data[:length].count(b"\n")
        assert target.read_bytes() == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": "llava-y"}, "by model 'llava-y'"),
        ({"run": "r2"}, "other model weights or settings"),
        ({"rows": ROWS[1:]}, "another question file or chunk"),
        ({"rows": [*ROWS, parse_row(question_row(9, "a.jpg", "q?", "yes", "abd", ("abd",)))]}, "more than the 7"),
    ],
)
def test_another_runs_file_is_refused_and_kept_or_replaced_on_demand(tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, answers(**change))
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        write_all(path)
    assert path.read_bytes() == before
    assert write_all(path, replace=True) == 0
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == [row.id for row in ROWS]


def test_a_broken_line_inside_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(answers()[0]) + "\n{broken\n")
    with pytest.raises(UserError, match="line 2"):
        write_all(path)


def test_a_run_that_fails_before_its_first_answer_leaves_no_file(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    with pytest.raises(UserError, match="no model"), appending(path, ROWS, "llava-x", "r1"):
        raise UserError("no model")
    assert not path.exists()


def test_a_chunk_without_rows_is_an_empty_file_that_merges(tmp_path):
    path = tmp_path / "a.jsonl"
    write_all(path, rows=[])
    assert path.read_bytes() == b""
    assert len(merge_answers(ROWS, [*write_chunks(tmp_path), path])) == 7


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    with appending(path, ROWS, "llava-x", "r1") as (_, stream):
        with pytest.raises(UserError, match=r"a\.jsonl is being written by process \d+ on "):
            write_all(path)
        append(stream, answers())
    assert len(path.read_text().splitlines()) == len(ROWS)


def test_an_answer_that_was_changed_since_is_no_answer_of_the_run(tmp_path):
    """One letter of an answer, or two answers exchanged with their ids, went into the scores without a word."""
    path = tmp_path / "a.jsonl"
    write_all(path)
    whole = path.read_text()
    path.write_text(whole.replace('"text": "', '"text": "x', 1))
    with pytest.raises(UserError, match=r"a\.jsonl line 1: is not the answer that was written here"):
        merge_answers(ROWS, [path])
    with pytest.raises(UserError, match="it cannot be resumed"), appending(path, ROWS, "llava-x", "r1"):
        pass
    with appending(path, ROWS, "llava-x", "r1", replace=True) as (done, _):
        assert done == 0


def write_chunks(folder, chunks=3, rows=ROWS, **more):
    paths = []
    for number, part in enumerate(split_evenly(len(rows), chunks)):
        path = folder / f"{chunks}_{number}.jsonl"
        write_jsonl(path, answers([rows[i] for i in part], **more))
        paths.append(path)
    return paths


def test_chunks_merge_in_the_question_files_order(tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    write_jsonl(questions, [row.raw for row in ROWS])
    paths = write_chunks(tmp_path)
    target = tmp_path / "answers.jsonl"
    chunk_arguments = [str(path) for path in reversed(paths)]
    merge_chunks.main(["--question-file", str(questions), "--answers-file", str(target), "--chunks", *chunk_arguments])
    assert [json.loads(line)["question_id"] for line in target.read_text().splitlines()] == list(range(7))
    assert "7 answers from 3 chunk(s)" in capsys.readouterr().out


@pytest.mark.parametrize("chunks", [1, 3, 10])
def test_chunks_of_rows_that_share_ids_merge_in_any_order(tmp_path, chunks):
    paths = write_chunks(tmp_path, chunks, rows=SHARED)
    merged = merge_answers(SHARED, paths[::-1])
    assert [(answer["question_id"], answer["prompt"]) for answer in merged] == [
        (row.id, row.conversations[0][1]) for row in SHARED
    ]
    assert [answer["metadata"].get("position") for answer in merged] == [0, 1, 2, 3, 4, 5, None]


def test_more_chunks_than_rows_merge(tmp_path):
    paths = write_chunks(tmp_path, chunks=10)
    assert len(merge_answers(ROWS, paths)) == 7


def test_a_missing_torn_foreign_or_double_chunk_is_refused(tmp_path):
    paths = write_chunks(tmp_path)
    with pytest.raises(UserError, match="missing chunk: .*gone.jsonl"):
        merge_answers(ROWS, [*paths, tmp_path / "gone.jsonl"])
    with pytest.raises(UserError, match="2 of 7 questions have no answer, the first is question_id 0"):
        merge_answers(ROWS, paths[1:])
    with pytest.raises(UserError, match="answers to questions that the question file lacks: 6"):
        merge_answers(ROWS[:6], paths)
    with pytest.raises(UserError, match="question_id 0 is answered twice, but one row has it"):
        merge_answers(ROWS, [*paths, paths[0]])
    write_jsonl(paths[1], answers([ROWS[i] for i in split_evenly(7, 3)[1]], run="r2"))
    with pytest.raises(UserError, match="different runs"):
        merge_answers(ROWS, paths)
    paths = write_chunks(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-5])
    with pytest.raises(UserError, match="the first is question_id 6"):
        merge_answers(ROWS, paths)
