"""What a model card says of slots: the base, the tasks, how they are asked, how the model is used."""

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
from llava.slots.pool import Pool

ABOUT, TRAINING, LICENCE, FIGURES = "about", "training", "licence", "figures"
"""Names of a card's sections; that of an evaluation's figures goes on with the evaluation's name."""


def front(pool: Pool, licence: Mapping[str, str], library: str = "llava") -> dict[str, Any]:
    """The YAML block of a card of these slots; ``licence`` is what ``licence_fields`` of the base gave."""
    return {
        "base_model": public_name(pool.base.get("path")),
        "library_name": library,
        "pipeline_tag": PIPELINE,
        "tags": [*TAGS, "continual-learning"],
        **licence,
    }


def about_slots(pool: Pool, name: str) -> str:
    """The section ``about`` of a stage's card; ``name`` is the folder's."""
    prompt = ", ".join(f"{field} `{value}`" for field, value in pool.prompt.items() if value not in (None, ""))
    return "\n".join(
        [
            f"# {name}\n",
            f"Low-rank slots over a frozen LLaVA, learned task by task for medical visual question answering: "
            f"{', '.join(pool.names) or 'none yet'}. Each question is routed to slots by its text and picture.\n",
            f"{NOT_CLINICAL}\n",
            "## Base\n",
            base_table(pool),
            "## Tasks\n",
            task_table(pool),
            f"Asked with {prompt or 'the template of the base'}.\n",
            "## Use\n",
            "```python",
            "from llava.model.builder import load_pretrained_model",
            f'tokenizer, model, image_processor, _ = load_pretrained_model("{name}", "BASE")  # the base named above',
            "```",
        ]
    )


def base_table(pool: Pool) -> str:
    """Name and fingerprint of the base."""
    base = pool.base
    return table(["base", "fingerprint"], [[public_name(base.get("path")) or "-", base.get("fingerprint") or "-"]])


def task_table(pool: Pool) -> str:
    """Training rows, slots and state of each task."""
    rows = [
        [task.name, task.info.get("rows", "not recorded"), task.count, "trained" if task.trained else "not trained"]
        for task in pool.tasks
    ]
    settings = pool.settings
    shape = f"rank {settings.rank} on {', '.join(settings.targets) or 'no projection'}, top {settings.top_k} of a route"
    router = f"router `{settings.router}`, question encoder `{public_name(settings.encoder.get('name')) or 'none'}`"
    return table(["task", "training rows", "slots", ""], rows) + f"\nSlots: {shape}; {router}.\n"


def write_slots_card(folder: Path, pool: Pool, name: str = "", drop: Sequence[str] = ()) -> None:
    """The card of a folder that holds slots, with what the slots themselves tell; figures of other slots go.

    Args:
        name: what the folder is called (default: its name). drop: further sections that do not hold any more.
    """
    base = base_folder(pool)
    sections = {ABOUT: about_slots(pool, name or folder.name)}
    if not (folder / CARD_FILE).is_file():
        sections[LICENCE] = licence_section(public_name(pool.base.get("path")), licence_of(base))
    write_card(folder, front(pool, licence_fields(base)), sections, [FIGURES, *drop])


def write_export_card(folder: Path, pool: Pool, task: str, mixture: dict[int, float], base: str | None = None) -> None:
    """The card of a task's adapter.

    Args:
        mixture: weight of each slot that was folded in. base: what the adapter names as its base.
    """
    place = Path(base) if base and Path(base).is_dir() else base_folder(pool)
    name = public_name(base or pool.base.get("path"))
    slots = ", ".join(f"{weight:.4f} of slot {slot}" for slot, weight in mixture.items())
    about = "\n".join(
        [
            f"# {folder.name}\n",
            f"Task `{task}` as one LoRA for PEFT over `{name}`: {slots}. It acts on every question; none is routed.\n",
            f"{NOT_CLINICAL}\n",
            "## Slots learned over\n",
            base_table(pool),
            "## Task\n",
            task_table(pool.with_tasks([pool.task(task)])),
        ]
    )
    known = {ABOUT: about, LICENCE: licence_section(name, licence_of(place))}
    write_card(folder, {**front(pool, licence_fields(place), "peft"), "base_model": name}, known)


def base_folder(pool: Pool) -> Path | None:
    """The folder of the base that slots name, where it is at hand."""
    path = pool.base.get("path")
    return Path(path) if path and Path(path).is_dir() else None
