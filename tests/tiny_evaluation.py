"""What an evaluated run leaves, written by hand: answers with routes, scores, accuracy matrix, stages with logs."""

import json
import random
from pathlib import Path

from tiny_llava import write_images

from llava.data.answers import with_checksum
from llava.data.rows import question_row, read_rows, write_jsonl
from llava.eval import eval_video_qa
from llava.eval.accuracy_matrix import write_matrix

TASKS = ("abd", "chest")
METRICS = ("exact_match", "closed_accuracy")
ROWS = 8
"""Questions of a domain."""


def make_evaluation(
    root, name="tiny", method="retrieval", seed=42, texts=None, pictures=True, routes=True, metrics=METRICS
):
    """An evaluation's folder under ``root``, its stages beside it; question file and pictures lie in ``root`` too.

    Args:
        texts: of questions, in place of harmless ones. pictures: whether other pictures were shown too.
        routes: ``False``: the answers tell of none. metrics: of the accuracy matrix.
    """
    root = Path(root)
    questions = root / "test.jsonl"
    if not questions.is_file():
        write_images(root / "images", [f"{task}{number}.png" for task in TASKS for number in range(4)])
        write_jsonl(questions, _rows(texts or []))
    folder, rows = root / "eval" / name, read_rows(questions)
    dice = random.Random(f"{method} {seed}")
    models = {"zero-shot": 0, **{f"llava-{name}_{'_'.join(TASKS[: n + 1])}": n + 1 for n in range(len(TASKS))}}
    shown = {}
    for model, known in models.items():
        answers = [_answer(row, model, known, dice, routes) for row in rows]
        write_jsonl(folder / model / "answers.jsonl", answers)
        if pictures and known in (0, len(TASKS)):
            others = [with_checksum({**answer, "text": "no"}) for answer in answers]
            write_jsonl(folder / model / "blank" / "answers.jsonl", others)
            shown[str(folder / model / "answers.jsonl")] = {"blank": folder / model / "blank" / "answers.jsonl"}
        if known:
            _write_stage(root / model, method, seed)
    files = [str(folder / model / "answers.jsonl") for model in models]
    words = ["--question-file", str(questions), "--no-java", "--train-file", str(questions), "--draws", "50"]
    eval_video_qa.score_files(eval_video_qa.parse_arguments([*words, "--answers-file", *files]), shown)
    scores = [folder / model / "scores.json" for model in models]
    write_matrix(folder, scores[1:], TASKS, metrics, scores[0], draws=50)
    about = {
        "format_version": 1,
        "sequence": name,
        "method": method,
        "route": "",
        "base": "tiny-base",
        "question_file": str(questions),
        "image_folder": str(root / "images"),
        "follow_links": False,
        "command": f"python -m llava.eval.evaluate_sequence --sequence /somewhere/{name}.json",
        "machine": "2 CPU cores",
        "versions": {"python": "3.11"},
    }
    (folder / "evaluation.json").write_text(json.dumps(about))
    return folder


def _rows(texts):
    rows = []
    for task in TASKS:
        for number in range(ROWS):
            closed = number % 2 == 0
            question = texts.pop(0) if texts else f"is there {'a lesion' if closed else 'what'} {task} {number}?"
            answer = ("yes" if number % 4 else "no") if closed else "left lung"
            kind = "CLOSED" if closed else "OPEN"
            row = question_row(
                f"{task}-{number}", f"{task}{number % 4}.png", question, answer, task, TASKS, answer_type=kind
            )
            rows.append(row)
    return rows


def _answer(row, model, known, dice, routes):
    learned = row.domain in TASKS[:known]
    text = row.answer if learned and dice.random() < 0.7 else "maybe"
    metadata = {"run": "0" * 16}
    if known and routes:
        task = row.domain if learned else TASKS[0]
        share = dice.uniform(0.6, 1.0) if known > 1 else 1.0
        rest = {other: (1 - share) / max(1, known - 1) for other in TASKS[:known] if other != task}
        posterior = {name: round({**rest, task: share}[name], 6) for name in TASKS[:known]}
        start = 2 * TASKS.index(task)
        novelty = round(dice.uniform(0.3, 0.9) if learned else dice.uniform(1.2, 3), 4)
        metadata["route"] = {
            "task": task,
            "task_posterior": posterior,
            "slots": [start, start + 1],
            "weights": [0.75, 0.25],
            "novelty": novelty,
            "unknown": novelty > 1,
        }
    answer = {"question_id": row.id, "prompt": row.conversations[0][1], "text": text, "model_id": model}
    return with_checksum({**answer, "metadata": metadata})


def _write_stage(folder, method, seed):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"record": 3, "method": method, "seed": seed, "learning_rate": 0.01, "training_files": ["ab" * 8]}
    (folder / "training.json").write_text(json.dumps(record))
    log = [{"step": step, "loss": 2.0 / step, "learning_rate": 0.01 / step, "epoch": step / 4} for step in range(1, 6)]
    (folder / "log_history.json").write_text(json.dumps([*log, {"train_loss": 1.0, "step": 5}]))
