"""A benchmark's cells: what is shared, skipped, chosen and told, and what is left where a run is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny_cells
from tiny_world import run_main, write_sequence
from warm_python import warm_python

from llava import devices
from llava.continual.benchmark import Benchmark
from llava.continual.benchmark_marks import Marks
from llava.eval import benchmark_table
from llava.eval.result_pages import markdown, read_result
from llava.locks import only_writer
from llava.utils import UserError
from scripts import run_cells

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def kill() -> None:
    raise Killed


@pytest.fixture
def file(world, tmp_path, monkeypatch):
    """A benchmark of two tasks and a few runs; its keys and steps are short."""
    sequence = write_sequence(tmp_path, ("abd", "chest"), rows=6)
    short = {"keys": {"rank": 2, "top_k": 2, "text_encoder": "base"}, "train": {"save_steps": 1}}
    values = {**json.loads(sequence.read_text()), **short, "metrics": ["exact_match", "closed_accuracy"]}
    sequence.write_text(json.dumps(values), encoding="utf-8")
    path = tmp_path / "short.json"
    runs = [{"method": "joint"}, {"method": "zero_shot"}, {"method": "sequential", "learning_rate": [1e-3, 1e-2]}]
    write(path, sequence, [*runs, {"method": "retrieval", "seeds": [1]}])
    monkeypatch.setenv("BASE_MODEL", str(world.base))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "one"))
    return path


def write(path, sequence, runs, **more):
    values = {"sequence": str(sequence), "seeds": [0], "validation": 0.34, "runs": runs, **more}
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture
def tiny(file, monkeypatch):
    """The benchmark with commands that stand for the real ones."""
    tiny_cells.stand_in(monkeypatch.setattr)
    monkeypatch.setattr(tiny_cells, "ticks", iter(()))
    monkeypatch.setattr(run_cells, "POLL", 0.01)
    return file


def results(file):
    """Bytes of everything that a reader takes from a benchmark."""
    benchmark = Benchmark.read(file)
    names = ("accuracy_matrix.json", "answers.jsonl", "rows.jsonl", "slots.pth", "table.json")
    found = [path for path in benchmark.root.rglob("*") if path.name in names]
    return {str(path.relative_to(benchmark.root)): path.read_bytes() for path in found}


def put_away(file, tmp_path):
    """The results, whose folder is moved out of the way: the same command makes it anew, under the same name."""
    found = results(file)
    (tmp_path / "one").rename(tmp_path / "first")
    return found


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[benchmark]")]


PLACES = ["joint", "zero_shot", "trials/sequential-0.001", "trials/sequential-0.01", "sequential", "retrieval"]


def test_a_benchmark_is_run_skipped_and_told(tiny, monkeypatch, capsys):
    run_main(run_cells.main, tiny)
    said = lines(capsys)
    assert [line.split("now ")[1].split("/abd_chest/")[0] for line in said[:-1]] == PLACES
    assert said[0].startswith("[benchmark] 0 of 6 cells, 0 min 00 s so far; now joint/abd_chest/seed-0")
    assert re.match(r"\[benchmark\] 2 of 6 cells, .* so far, about 0 min \d\d s left; now trials/", said[2])
    assert said[-1].startswith("[benchmark] 6 of 6 cells")
    made = results(tiny)
    monkeypatch.setattr(run_cells, "call", lambda *words: pytest.fail("nothing is left to do"))
    run_main(run_cells.main, tiny)
    assert results(tiny) == made
    root = Benchmark.read(tiny).root
    zero_shot = [*root.glob("zero-shot/*/1_0.jsonl"), *root.rglob("zero-shot/chunks/1_0.jsonl")]
    assert len(zero_shot) == 5 and len({path.read_bytes() for path in zero_shot}) == 1  # what four cells share
    scores = [path.read_bytes() for path in root.rglob("zero-shot/scores.json")]
    assert len(scores) == len(set(scores)) == 4  # nobody's is another's, whoever was first
    assert [path.relative_to(root) for path in root.rglob("sights")] == [Path("cache", "sights")]
    told = json.loads((Benchmark.read(tiny).root / "table.json").read_text())
    assert (told["done"], told["cells"]) == (4, 4)
    assert [entry["run"] for entry in told["runs"]] == ["joint", "zero_shot", "sequential", "retrieval"]
    finals = [entry["metrics"]["exact_match"]["summary"]["average_final"]["mean"] for entry in told["runs"]]
    gaps = told["runs"][3]["gaps"]
    assert gaps["joint"]["exact_match"]["mean"] == pytest.approx(finals[0] - finals[3])  # of other seeds: the means
    assert gaps["joint"]["exact_match"]["sd"] is None and gaps["individual"] is None and gaps["task_given"] is None
    said = capsys.readouterr().out
    assert said.count("[benchmark]") == 1 and "| **retrieval** | abd, chest | 1 |" in said


def test_a_result_is_a_small_file_with_what_it_was_made_of(tiny, tmp_path, capsys):
    run_main(run_cells.main, tiny)
    benchmark = Benchmark.read(tiny)
    figures = {f"{name}_exact_match": {"value": 0.123456} for name in ("majority", "nearest")}
    scores = benchmark.matrix(benchmark.cells[0]).parent / "zero-shot" / "scores.json"
    scores.write_text(json.dumps({"groups": {task: {"figures": figures} for task in ("abd", "chest")}}))
    file = tmp_path / "result.json"
    with pytest.raises(UserError, match="--result wants --machine"):
        run_main(benchmark_table.main, tiny, "--result", file)
    run_main(benchmark_table.main, tiny, "--result", file, "--machine", "two cores")
    found = json.loads(file.read_text())
    assert (found["machine"], found["metric"], found["settings"]) == ("two cores", "exact_match", benchmark.values)
    assert found["baselines"]["majority answer"] == {"abd": 0.1235, "chest": 0.1235}
    assert list(found["data"]) == ["train_abd.jsonl", "train_chest.jsonl", "test.jsonl"]
    assert set(found["versions"]) == {"python", "llava", "torch", "transformers", "numpy"}
    sequential = found["runs"][2]
    assert sequential["rates"].keys() == {"0.001", "0.01"} and sequential["final"].keys() == {"abd", "chest"}
    assert file.stat().st_size < 6000
    assert read_result(file) == found and markdown(found) in capsys.readouterr().out


def test_gaps_are_told_over_the_seeds_that_both_have(tiny):
    """Here the cells end with: retrieval .5, .6, .8; joint .9, .7 (seeds 0 and 2); the first seed asked with the task
    given .7; and other stages, also with the task given."""
    given = {"method": "retrieval", "route": "oracle", "seeds": [0]}
    runs = [{"method": "retrieval", "seeds": [0, 1, 2]}, {"method": "joint", "seeds": [0, 2]}]
    runs += [{**given, "name": "others", "flags": ["--lora_r", "2"]}, {**given, "name": "given"}]
    write(tiny, json.loads(tiny.read_text())["sequence"], runs)
    benchmark = Benchmark.read(tiny)
    for cell, value in zip(benchmark.cells, (0.5, 0.6, 0.8, 0.9, 0.7, 0.1, 0.7), strict=True):
        found = {"matrix": [[0.5] * 2] * 2, "learning_curve": {"value": [0.5] * 2}}
        found["summary"] = {"average_final": {"value": value}}
        matrix = {"tasks": ["abd", "chest"], "metrics": {"exact_match": found}}
        matrix["provenance"] = {"question_file": {"sha256": "same"}}
        benchmark.matrix(cell).parent.mkdir(parents=True)
        benchmark.matrix(cell).write_text(json.dumps(matrix))
        Marks(benchmark).finish(cell, benchmark.identity(cell, benchmark.sequence_of(cell)), 1.0)
    retrieval, joint, others, asked = (entry["gaps"] for entry in benchmark_table.table(benchmark)["runs"])
    to_joint = retrieval["joint"]["exact_match"]
    assert to_joint["values"] == pytest.approx([0.4, -0.1]) and to_joint["mean"] == pytest.approx(0.15)
    assert to_joint["sd"] == pytest.approx(0.5 / 2**0.5)
    assert retrieval["task_given"]["exact_match"]["mean"] == pytest.approx(0.7 - 0.5)  # not from the mean of all seeds
    assert joint["task_given"] is others["task_given"] is asked["task_given"] is None


def test_what_the_pictures_contribute_is_told_over_seeds(tiny):
    sequence = json.loads(tiny.read_text())["sequence"]
    runs = [
        {"method": "joint", "pictures": ["real", "blank"], "seeds": [0, 1]},
        {"method": "ewc", "pictures": ["blank"]},
    ]
    write(tiny, sequence, runs)
    run_main(run_cells.main, tiny)
    benchmark = Benchmark.read(tiny)
    for place, cell in enumerate(benchmark.cells):
        matrix, stage = benchmark_table.last(benchmark, cell)
        figure = {"drop": 0.1 * place, "ci95": [0.0, 0.3]}
        group = {"changed": {"value": 0.5, "ci95": [0.4, 0.6]}, "figures": {"exact_match": figure}}
        all_questions = {"exact_match": {"value": 0.4 + 0.2 * place}, "open_recall": {"value": None}}
        scores = {"groups": {"overall": {"figures": all_questions}}}
        scores["pictures"] = {"blank": {"groups": {"overall": group}}}
        (matrix.parent / stage.name / "scores.json").write_text(json.dumps(scores))
    runs = benchmark_table.table(benchmark)["runs"]
    assert [entry["overall"].keys() for entry in runs] == [{"exact_match"}] * 2
    assert [entry["overall"]["exact_match"]["mean"] for entry in runs] == pytest.approx([0.5, 0.8])
    joint, ewc = (entry["pictures"]["blank"] for entry in runs)
    assert joint["exact_match"]["mean"] == pytest.approx(0.05) and joint["changed"]["sd"] == 0
    assert ewc["exact_match"] == {"mean": 0.2, "sd": None, "ci95": [0.0, 0.3], "values": [0.2]}


def test_the_best_rate_on_validation_rows_is_taken(tiny):
    run_main(run_cells.main, tiny)
    benchmark = Benchmark.read(tiny)
    tried = {cell.rates[0]: benchmark.score(cell) for cell in benchmark.cells if cell.trial}
    cell = next(cell for cell in benchmark.cells if len(cell.rates) == 2)
    best = max(tried, key=tried.__getitem__)
    assert benchmark.rate(cell) == best and len(set(tried.values())) == 2
    assert json.loads((benchmark.folder(cell) / "sequence.json").read_text())["train"]["learning_rate"] == best


def test_what_the_base_answers_is_shared_also_after_a_change(tiny, monkeypatch):
    """Of test rows; and where they are as before again, nothing is asked a second time."""
    sequence = json.loads(tiny.read_text())["sequence"]
    runs = [{"method": method, "pictures": ["real", "blank"]} for method in ("joint", "ewc", "lwf")]
    made = []
    for test_rows, more in ((None, []), (2, [{"method": "replay"}]), (None, [{"method": "replay"}])):
        monkeypatch.setattr(tiny_cells, "written", [])
        write(tiny, sequence, [*runs, *more], **({} if test_rows is None else {"test_rows": test_rows}))
        run_main(run_cells.main, tiny)
        made.append([path for path in tiny_cells.written if path.parts[-3:] == ("zero-shot", "chunks", "1_0.jsonl")])
        benchmark = Benchmark.read(tiny)
        chunks = [benchmark.matrix(cell).parent / "zero-shot" / "chunks" / "1_0.jsonl" for cell in benchmark.cells]
        assert len({path.read_bytes() for path in chunks}) == 1
    assert [[path.parents[6].name for path in paths] for paths in made] == [["joint"], ["joint"], []]


def test_a_copied_stage_is_renewed_with_the_one_it_was_copied_from(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    for folder in (source, target):
        folder.mkdir()
        (folder / "training.json").write_text("{}")
    (target / "README.md").write_text("with figures of its own")
    run_cells.take_over(source, target)
    assert (target / "README.md").is_file()
    (source / "training.json").write_text('{"seed": 1}')
    run_cells.take_over(source, target)
    assert (target / "training.json").read_text() == '{"seed": 1}' and not (target / "README.md").exists()


GIVEN = {"name": "given", "method": "retrieval", "route": "oracle", "seeds": [1]}


def trained(file, monkeypatch, tmp_path, runs, **more):
    """Places of the cells whose stages were trained, each once a stage, and what the benchmark ends with."""
    write(file, json.loads(file.read_text())["sequence"], runs, **more)
    found, train = [], tiny_cells.train

    def told():
        stage = Path(tiny_cells.words()["output_dir"])
        if not (stage / "slots.pth").is_file():
            found.append(str(stage.parent.relative_to(Benchmark.read(file).root)).split("/abd_chest/")[0])
        train()

    with monkeypatch.context() as patched:
        patched.setattr(run_cells, "train", told)
        run_main(run_cells.main, file)
    return found, put_away(file, tmp_path)


def test_cells_that_are_only_asked_otherwise_share_their_stages(tiny, monkeypatch, tmp_path):
    runs = [{"method": "retrieval", "seeds": [1, 2]}, GIVEN, {**GIVEN, "name": "other", "flags": ["--lora_r", "2"]}]
    stages, found = trained(tiny, monkeypatch, tmp_path, runs)
    assert stages == ["retrieval"] * 4 + ["other"] * 2
    shutil.rmtree(tmp_path / "first")
    stages, alone = trained(tiny, monkeypatch, tmp_path, [GIVEN])
    assert stages == ["given"] * 2 and {path: found[path] for path in alone if "/" in path} == {
        path: data for path, data in alone.items() if "/" in path
    }


def test_a_trial_that_keeps_no_picture_back_is_the_cell_of_its_rate(tiny, monkeypatch, tmp_path):
    runs = [{"method": "sequential", "learning_rate": [1e-3, 1e-2]}, {"method": "joint"}]
    test = json.loads(Path(json.loads(tiny.read_text())["sequence"]).read_text())["test"]
    stages, _ = trained(tiny, monkeypatch, tmp_path, runs, validation=test)
    assert stages == [place for place in (*PLACES[2:4], "joint") for _ in range(2)]


def test_stages_that_another_process_trains_are_waited_for_and_those_of_a_failed_cell_are_trained(tiny, monkeypatch):
    write(tiny, json.loads(tiny.read_text())["sequence"], [{**GIVEN, "route": "", "name": "free"}, GIVEN])
    benchmark = Benchmark.read(tiny)
    first, second = benchmark.cells
    marks, holder = Marks(benchmark, time.time()), ExitStack()
    holder.enter_context(only_writer(benchmark.folder(first)))
    assert marks.teacher(second) == first and marks.teacher(first) is None
    assert not any(run_cells.take(benchmark, marks, cell, set(), 2, 0.0) for cell in benchmark.cells)
    holder.close()
    marks.fail(first, "the disk is full")
    assert run_cells.take(benchmark, marks, second, set(), 2, 0.0) and marks.whole(second)


def test_a_rate_is_not_chosen_by_what_its_trials_said_of_other_rows(tiny, monkeypatch):
    """With others at work a cell's turn may come before those of its trials, which are still there from last time."""
    runs = [{"method": "sequential", "learning_rate": [1e-3, 1e-2]}]
    write(tiny, json.loads(tiny.read_text())["sequence"], runs)
    run_main(run_cells.main, tiny)
    write(tiny, json.loads(tiny.read_text())["sequence"], runs, rows=4)
    benchmark = Benchmark.read(tiny)
    marks, checked, trials = Marks(benchmark, time.time()), set(), benchmark.cells[:2]
    with only_writer(benchmark.folder(trials[0])):
        assert not any(run_cells.take(benchmark, marks, cell, checked, 3, 0.0) for cell in benchmark.cells[::2])
    assert all(run_cells.take(benchmark, marks, cell, checked, 3, 0.0) for cell in benchmark.cells)


def test_a_run_with_further_rates_to_try_is_not_done(tiny, capsys):
    sequence = json.loads(tiny.read_text())["sequence"]
    write(tiny, sequence, [{"method": "joint"}, {"method": "sequential", "learning_rate": [1e-3]}])
    run_main(run_cells.main, tiny)
    write(tiny, sequence, [{"method": "joint"}, {"method": "sequential", "learning_rate": [1e-3, 1e-2]}])
    run_main(benchmark_table.main, tiny)
    assert "1 of 2 cells are done" in capsys.readouterr().out
    benchmark = Benchmark.read(tiny)
    for number, trial in enumerate(cell for cell in benchmark.cells if cell.trial):
        matrix = benchmark.matrix(trial)
        matrix.parent.mkdir(parents=True)
        summary = {"average_final": {"value": 0.4 + 0.1 * number}}  # the further one is better
        matrix.write_text(json.dumps({"metrics": {"exact_match": {"summary": summary}}}))
        Marks(benchmark).finish(trial, benchmark.identity(trial, benchmark.sequence_of(trial)), 1.0)
    run_main(benchmark_table.main, tiny)
    assert "1 of 2 cells are done" in capsys.readouterr().out, "the cell has the rate of before"


def told(capsys):
    """How many cells each line of a run counts as done, of how many."""
    found = [re.match(r"\[benchmark\] (\d+) of (\d+) cells", line) for line in lines(capsys)]
    return [(int(line[1]), int(line[2])) for line in found if line]


def test_what_is_made_anew_is_not_counted_as_done(tiny, capsys):
    """After further rates, other rows, and others for the trials alone."""
    sequence = json.loads(tiny.read_text())["sequence"]
    test = json.loads(Path(sequence).read_text())["test"]
    runs = [{"method": "joint"}, {"method": "sequential", "learning_rate": [1e-3]}]
    write(tiny, sequence, runs)
    run_main(run_cells.main, tiny)
    assert told(capsys) == [(0, 2), (1, 2), (2, 2)]
    runs[1]["learning_rate"] = [1e-3, 1e-2]
    write(tiny, sequence, runs)
    run_main(run_cells.main, tiny)
    benchmark = Benchmark.read(tiny)
    last = [(3, 4)] if benchmark.rate(benchmark.cells[-1]) == 1e-2 else []
    assert told(capsys) == [(1, 4), (2, 4), *last, (4, 4)]
    for more, done, lines_of_cells in (
        ({"rows": 4}, 0, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"rows": 4, "validation": test}, 1, [(1, 4), (2, 4)]),  # whether the last has another rate then is chance
    ):
        write(tiny, sequence, runs, **more)
        run_main(benchmark_table.main, tiny)
        said = capsys.readouterr().out
        assert f"{done} of 2 cells are done" in said and f"note: {2 - done} more were made with other rates" in said
        run_main(run_cells.main, tiny)
        found = told(capsys)
        assert found[: len(lines_of_cells)] == lines_of_cells and found[-1] == (4, 4)


def test_who_looks_takes_no_rows_away_from_those_who_run(tiny):
    """The file was edited while its benchmark runs, and the table is asked for."""
    sequence = json.loads(tiny.read_text())["sequence"]
    write(tiny, sequence, [{"method": "joint"}], rows=4)
    benchmark = Benchmark.read(tiny)
    running = benchmark.prepare(benchmark.cells[0])
    before = [Path(file).read_bytes() for task in running.tasks for file in task.files]
    write(tiny, sequence, [{"method": "joint"}], rows=3)
    edited = Benchmark.read(tiny)
    edited.sequence_of(edited.cells[0])
    assert [Path(file).read_bytes() for task in running.tasks for file in task.files] == before


def test_keys_of_other_rows_are_made_again(tiny):
    values = json.loads(tiny.read_text())
    found = []
    for rows in (None, 4, 4, None):
        tiny.write_text(json.dumps({**values, "rows": rows}))
        benchmark = Benchmark.read(tiny)
        cell = benchmark.cells[0]
        sequence = benchmark.prepare(cell)
        keys = run_cells.fit_keys(benchmark, cell, sequence, benchmark.folder(cell) / "sequence.json")
        found.append(keys.read_bytes())
    assert found[0] == found[3] != found[1] == found[2]


def test_a_cell_that_fails_stops_no_other_and_is_told_at_the_end(tiny, monkeypatch, capsys):
    def broken():
        given = tiny_cells.words()
        if given["method"] == "joint" or given.get("learning_rate") == "0.001":
            raise UserError("the disk is full; free some")
        tiny_cells.train()

    with monkeypatch.context() as patched:
        patched.setattr(run_cells, "train", broken)
        with pytest.raises(UserError, match="3 of 6 cells failed.*joint/abd_chest/seed-0: UserError: the disk is full"):
            run_main(run_cells.main, tiny)
    said = lines(capsys)
    assert "[benchmark] joint/abd_chest/seed-0 failed: the disk is full; free some" in said
    assert said[-1].startswith("[benchmark] 3 of 6 cells")
    benchmark = Benchmark.read(tiny)
    waiting = next(cell for cell in benchmark.cells if len(cell.rates) == 2)
    assert "learning rate is not known, as trials/sequential-0.001/" in Marks(benchmark).failed(waiting)
    run_main(run_cells.main, tiny)
    assert lines(capsys)[-1].startswith("[benchmark] 6 of 6 cells") and Marks(benchmark).failed(waiting) is None


def test_a_wrong_flag_of_a_run_is_a_failed_cell(file, monkeypatch, capsys):
    sequence = json.loads(file.read_text())["sequence"]
    write(file, sequence, [{"method": "joint", "flags": ["--ewc_lambda", "3"]}])
    monkeypatch.setattr(run_cells, "fit_keys", lambda *rest: Path("keys.pth"))
    with pytest.raises(UserError, match="1 of 1 cells failed"):
        run_main(run_cells.main, file)


def test_what_another_process_makes_is_waited_for(tiny, monkeypatch, capsys):
    """Here it ends without having finished its cell, which is then taken over."""
    benchmark, holder = Benchmark.read(tiny), ExitStack()
    holder.enter_context(only_writer(benchmark.folder(benchmark.cells[0])))
    monkeypatch.setattr(run_cells.time, "sleep", lambda seconds: holder.close())
    run_main(run_cells.main, tiny)
    said = lines(capsys)
    assert "[benchmark] other processes make the rest; waiting for them" in said
    assert "now joint/" in said[-2] and said[-1].startswith("[benchmark] 6 of 6 cells")


@pytest.mark.parametrize("wanted", ["0", "two"])
def test_a_wrong_number_of_workers_is_refused(tiny, wanted):
    with pytest.raises(UserError, match="WORKERS is"):
        run_main(run_cells.main, tiny, "--workers", wanted)


def test_workers_take_turns_with_the_devices(tiny, monkeypatch):
    started = []

    class Process:
        def __init__(self, words, env):
            started.append((words, env))

        def wait(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(devices.subprocess, "Popen", Process)
    monkeypatch.setattr(devices.signal, "signal", lambda *rest: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    values = json.loads(tiny.read_text())
    tiny.write_text(json.dumps({**values, "workers": 3}))
    run_main(run_cells.main, tiny)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["4", "6", "4"]
    assert {env["OMP_NUM_THREADS"] for _, env in started} == {str(max(1, os.cpu_count() // 3))}
    assert all(words[3:6] == ["--workers", "3", "--worker-since"] for words, _ in started)
    started.clear()
    run_main(run_cells.main, tiny, "--workers", "")
    assert len(started) == 3
    tiny.write_text(json.dumps(values))
    run_main(run_cells.main, tiny)
    assert len(started) == 5  # one a device


def killed_until_whole(monkeypatch, file, places):
    """Run with a kill at each of ``places`` in turn, then to the end; the number of kills."""
    kills = 0
    for place in places:
        monkeypatch.setattr(tiny_cells, "ticks", iter([*[lambda: None] * place, kill]))
        try:
            run_main(run_cells.main, file)
            return kills
        except Killed:
            kills += 1
    monkeypatch.setattr(tiny_cells, "ticks", iter(()))
    run_main(run_cells.main, file)
    return kills


def test_a_benchmark_that_is_killed_again_and_again_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch):
    run_main(run_cells.main, tiny)
    wanted = put_away(tiny, tmp_path)
    assert killed_until_whole(monkeypatch, tiny, [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14]) >= 10
    assert results(tiny) == wanted


@pytest.mark.thorough
def test_the_script_killed_at_ten_places_ends_with_the_same_bytes(tiny, tmp_path):
    """Real kills of the shell and all that it has started; in the end with two processes."""
    python, stub, stopped = tmp_path / "bin" / "python", ROOT / "tests" / "tiny_cells.py", tmp_path / "stopped"
    python.parent.mkdir()
    python.write_text(
        f"""#!/bin/sh
        case $1 in */run_cells.py) shift; set -- "{stub}" "$@";; esac
        exec "{warm_python()}" "$@"
        """
    )
    python.chmod(0o755)

    def start(**more):
        environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", **more}
        environment |= {"PYTHONPATH": str(ROOT / "tests"), "STOPPED": str(stopped)}
        words = ["bash", str(ROOT / "scripts" / "run_benchmark.sh"), str(tiny)]
        return subprocess.Popen(words, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)

    said, _ = start().communicate(timeout=600)
    assert "| sequential | abd, chest | 1 |" in said
    wanted = put_away(tiny, tmp_path)
    for place in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14):
        running = start(STOP_AT=str(place))
        while running.poll() is None and not stopped.exists():
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        stopped.unlink()
    last = start(WORKERS="2")
    last.communicate(timeout=600)
    assert last.returncode == 0 and results(tiny) == wanted


def killing(monkeypatch, after):
    """From now on the run is killed once it has done ``after`` further steps and one more."""
    count = iter(range(after))

    def step(do):
        def done(*words):
            do(*words)
            if next(count, None) is None:
                raise Killed

        return done

    monkeypatch.setattr(run_cells, "call", step(run_cells.call))
    monkeypatch.setattr(run_cells.evaluate_sequence, "main", step(run_cells.evaluate_sequence.main))


@pytest.mark.thorough
def test_the_real_commands_too(file, tmp_path, monkeypatch):
    sequence, short = json.loads(file.read_text())["sequence"], {"flags": ["--max_steps", "2"]}
    given = {"name": "given", "method": "retrieval", "route": "oracle"}
    write(file, sequence, [{**run, **short} for run in ({"method": "sequential"}, {"method": "retrieval"}, given)])
    run_main(run_cells.main, file)
    wanted = put_away(file, tmp_path)
    kills = 0
    for after in sorted([*range(20)] * 3):  # each start also counts the steps that it skips
        with monkeypatch.context() as patched:
            killing(patched, after)
            try:
                run_main(run_cells.main, file)
                break
            except Killed:
                kills += 1
    assert kills >= 10 and results(file) == wanted
