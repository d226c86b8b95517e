"""What the task files of lmms-eval in this folder call: rows, pictures, questions, and this project's own metrics.

A *doc* is a question row of ``data/test_vqa_rad.jsonl`` or ``data/slake_test.jsonl`` as ``datasets`` gives it, where a
field that only other rows have is ``None``.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.rows import Row, parse_row
from llava.eval.metrics import METRICS, Example, Group
from llava.eval.text_metrics import TextScorer
from llava.image_io import load_image
from llava.inside import inside

DATA = Path(__file__).resolve().parents[2] / "data"
METRIC_NAMES = ("exact_match", "closed_accuracy", "open_recall")
_SCORER = TextScorer(use_java=False)  # a group carries one; these metrics ask nothing of it


def row_of(doc: dict[str, Any]) -> Row:
    """The question row that a doc was before ``datasets`` gave all rows the same fields."""
    values = {name: value for name, value in doc.items() if value is not None}
    if isinstance(values.get("domain"), dict):
        values["domain"] = {name: bool(value) for name, value in values["domain"].items()}
    return parse_row(values, f"question_id {doc.get('question_id')!r}")


def only(domain: str, docs: Any) -> Any:
    """The docs of a domain: of one task of the sequence."""
    return docs.filter(lambda doc: bool((doc["domain"] or {}).get(domain)))


only_abd, only_chest, only_head = (partial(only, organ) for organ in ("abd", "chest", "head"))
only_ct, only_mri, only_xray = (partial(only, modality) for modality in ("ct", "mri", "xray"))


def pictures(doc: dict[str, Any], folder: Path) -> list[Image.Image]:
    """The question's pictures, upright and RGB as everywhere in this project; an empty list for a text-only row."""
    return [load_image(inside(folder, name)) for name in row_of(doc).shown]


def vqa_rad_pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """From ``$VQA_RAD_DIR/images``, else ``data/vqa-rad/images``."""
    return pictures(doc, Path(os.environ.get("VQA_RAD_DIR") or DATA / "vqa-rad") / "images")


def slake_pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """From ``$SLAKE_DIR/imgs``, else ``data/slake/imgs``."""
    return pictures(doc, Path(os.environ.get("SLAKE_DIR") or DATA / "slake") / "imgs")


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question without ``<image>``, which the suite puts in front; ``post_prompt`` goes behind it."""
    more = lmms_eval_specific_kwargs or {}
    return f"{more.get('pre_prompt', '')}{row_of(doc).question}{more.get('post_prompt', '')}"


def scores(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The metrics of one answer; one that is not about the row (open recall of a closed one) is left out."""
    prediction = results[0] if results else ""
    group = Group([Example(row_of(doc), prediction, {})], (), (), (), _SCORER)
    found = {name: METRICS.get(name)(group).per_row[0] for name in METRIC_NAMES}
    return {name: value for name, value in found.items() if value is not None}
