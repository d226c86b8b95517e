"""The model card of a stage, and the figures that evaluations add to it.

| section | says | written by |
| --- | --- | --- |
| ``about`` | base, tasks, training rows, prompt, use | training, ``save_pretrained``, ``llava.continual.slots`` |
| ``training`` | method, tasks so far, settings | training |
| ``licence`` | of the base (its card) and of the data (the task sequence's ``licence``) | training |
| ``figures NAME`` | the stage's row of the accuracy matrix | the evaluation of that name |

Equal runs write equal cards: there is no date, no path and no name of a machine in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.checkpoints.card import (
    CARD_FILE,
    NOT_CLINICAL,
    PIPELINE,
    TAGS,
    licence_fields,
    licence_of,
    licence_section,
    public_name,
    table,
    write_card,
)
from llava.continual.methods import Context
from llava.continual.run import Run
from llava.continual.sequence import TaskSequence
from llava.locks import only_writer
from llava.slots.card import ABOUT, FIGURES, LICENCE, TRAINING, about_slots, front, write_slots_card
from llava.utils import rank0_print

SETTINGS = (
    "method",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "fp16",
    "bits",
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "seed",
)
"""Fields of a run's record that a card shows, in order; all of them stand in ``training.json``."""
SUMMARY = {"average_final": "mean over tasks", "bwt": "BWT", "forgetting": "forgetting"}


def write_stage_card(folder: Path, context: Context, rows: int) -> None:
    """Write the card of a stage that is being written.

    Args:
        folder: where its files go. context: the stage in training, whose run has its slots by now.
        rows: how many it was trained on in this stage.
    """
    run, base_name, sequence = context.run, context.base_name, context.sequence
    base, name = context.base.folder, run.folder.name
    if run.pool.tasks:
        top, about = front(run.pool, licence_fields(base)), about_slots(run.pool, name)
    else:
        top, about = _plain_front(base_name, licence_fields(base)), _about_model(name, base_name)
    sections = {
        ABOUT: about,
        TRAINING: _training(run, sequence, context.task, rows),
        LICENCE: licence_section(public_name(base_name), licence_of(base), sequence.licence),
    }
    write_card(folder, top, sections)


def refresh_figures(stages: Sequence[Path], matrix: Mapping[str, Any], evaluation: str) -> None:
    """Put each stage's row of an accuracy matrix into its card, which is made where an older stage has none.

    Args:
        stages: folders, in the matrix's order; one that is elsewhere is passed over.
        matrix: what ``accuracy_matrix.json`` holds.
        evaluation: its name, which tells a given route and other methods apart.
    """
    here = [(number, stage) for number, stage in enumerate(stages) if stage.is_dir()]
    for number, stage in here:
        text = figures(matrix, number, evaluation)
        try:
            with only_writer(stage / CARD_FILE, wait=True):
                if not (stage / CARD_FILE).is_file():
                    write_slots_card(stage, Run.open(stage).pool)
                write_card(stage, {}, {f"{FIGURES} {evaluation}": text})
        except OSError as error:
            why = f"{stage / CARD_FILE} cannot be written ({error.strerror})"
            rank0_print(f"note: {why}, so the stage's card does not show its figures")


def figures(matrix: Mapping[str, Any], number: int, evaluation: str) -> str:
    """The figures of the stage ``number``, counted from 0; the last stage's come with the summary of all."""
    tasks, last = list(matrix["tasks"]), number == len(matrix["stages"]) - 1
    head = ["metric", *tasks, "mean of the tasks so far", *(SUMMARY.values() if last else ())]
    rows = []
    for metric, found in matrix["metrics"].items():
        values = found["matrix"][number]
        known = [value for value in values[: number + 1] if value is not None]
        mean = sum(known) / len(known) if known else None
        known_summary = found["summary"] or {}  # none where a figure is missing
        summary = [known_summary[name]["value"] if known_summary else None for name in SUMMARY] if last else []
        rows.append([metric, *map(_figure, [*values, mean, *summary])])
    counts: Sequence[int] = next((found["n"] for found in matrix["metrics"].values()), [])
    questions = ", ".join(f"{task} {count}" for task, count in zip(tasks, counts, strict=False))
    return f"## Figures: {evaluation}\n\n{table(head, rows)}\nTest questions: {questions}.\n"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _plain_front(base_name: str, licence: Mapping[str, str]) -> dict[str, Any]:
    base = {"base_model": public_name(base_name), "library_name": "llava"}
    return {**base, "pipeline_tag": PIPELINE, "tags": list(TAGS), **licence}


def _about_model(name: str, base_name: str) -> str:
    return f"# {name}\n\nA LLaVA checkpoint, trained from `{public_name(base_name)}`.\n\n{NOT_CLINICAL}\n"


def _training(run: Run, sequence: TaskSequence, task: str, rows: int) -> str:
    record, order = run.record, sequence.task_names
    so_far = [name for name in run.pool.names if name in order]
    if not so_far and task in order:  # one adapter for all tasks, which does not tell them
        so_far = order[: order.index(task) + 1]
    lines: list[list[Any]] = [["tasks so far", ", ".join(so_far)]] if so_far else []
    lines += [["training rows of this stage", rows]]
    idle = ["num_train_epochs"] if (record.get("max_steps") or -1) > 0 else []
    idle += [] if record.get("lora_enable") else ["lora_r", "lora_alpha"]
    idle += ["bits"] if record.get("bits") == 16 else []
    names = [name for name in SETTINGS if name not in idle and record.get(name) not in (None, "", False, -1)]
    lines += [[name, record[name]] for name in names]
    return f"## Training\n\n{table(['setting', 'value'], lines)}"
