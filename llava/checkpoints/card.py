"""The model card beside a checkpoint: ``README.md`` as the Hub shows it, with sections that programs keep up to date.

A section stands between two marks, and only what stands between them is ever written again; a user's own text, and the
YAML block at the top, stay. A card names folders by their last part: it says nothing of the machine it was made on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava.files import atomic_write
from llava.outside import parsed_yaml
from llava.utils import UserError, rank0_print

CARD_FILE = "README.md"
PIPELINE = "image-text-to-text"
TAGS = ("llava", "medical", "visual-question-answering")
NOT_CLINICAL = (
    "**Not for clinical use.** This is a research model. Its answers can be wrong and have not been tested on "
    "patients; they must not guide a diagnosis or a treatment."
)
_HUB_CACHE = re.compile(r"models--([^/]+)/snapshots/[^/]+/?$")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def write_card(folder: Path, front: Mapping[str, Any], sections: Mapping[str, str], drop: Iterable[str] = ()) -> None:
    """Write or refresh a folder's card.

    Args:
        front: fields of the YAML block of a new card; those that are empty are left out. A card that is there keeps its
            own.
        sections: text of each section by its name; of one that is there the text is replaced, others come last.
        drop: beginnings of the names of sections that are taken out.
    """
    path = folder / CARD_FILE
    text = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else _front_text(front)
    for name in drop:
        text = re.sub(rf"{_section(name, more=True)}(?:\r?\n)*", "", text, flags=re.DOTALL)
    for name, content in sections.items():
        text = with_section(text, name, content)
    with atomic_write(path, "wb") as stream:  # what a user wrote in another encoding stays as it is
        stream.write(text.encode("utf-8", "surrogateescape"))


def with_section(text: str, name: str, content: str) -> str:
    """A card's text with the section ``name`` saying ``content``."""
    block = f"<!-- llava: {name} -->\n{content.strip()}\n<!-- llava: end -->\n"
    there = re.compile(rf"{_section(name)}(?:\r?\n)?", re.DOTALL)
    if there.search(text):
        return there.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}" if text.strip() else block


def _section(name: str, more: bool = False) -> str:
    """A pattern for a section with its marks; of one whose end mark is gone, for its first mark alone.

    Args:
        more: whether the section's name may go on behind ``name``.
    """
    rest = "[^\n]*?" if more else ""
    return rf"<!-- llava: {re.escape(name)}{rest} -->(?:\r?\n(?:(?!<!-- llava: ).)*<!-- llava: end -->)?"


def front_matter(folder: Path | None) -> dict[str, Any]:
    """The YAML block of a folder's card; empty where there is no card, no block, or a broken one, which is said."""
    path = None if folder is None else folder / CARD_FILE
    if path is None or not path.is_file():
        return {}
    found = _FRONT.match(path.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        values = parsed_yaml(found[1], str(path)) if found else None
    except UserError:
        rank0_print(f"note: {path}: the block at its top is no YAML; its licence is not read")
        return {}
    return values if isinstance(values, dict) else {}


def licence_of(folder: Path | None) -> str:
    """The licence that a checkpoint's card states, empty where it states none."""
    values = front_matter(folder)
    return _plain(values.get("license_name")) or _plain(values.get("license"))


def licence_fields(folder: Path | None) -> dict[str, str]:
    """What a checkpoint's card says of its licence in its YAML block, for the block of what is made from it."""
    values = front_matter(folder)
    return {name: text for name in ("license", "license_name", "license_link") if (text := _plain(values.get(name)))}


def _plain(value: Any) -> str:
    """A text, or a list of some, as a text; anything else is no licence."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return value if isinstance(value, str) else ""


def licence_section(base: str, licence: str, data: str = "") -> str:
    """What is known of the licences of a base and of the data that was learned from."""
    stated = f"`{licence}`, as its card states" if licence else "its folder states none; ask its publisher"
    learned = data or "not stated; the terms of the data sets hold for what was learned from them"
    return f"## Licence\n\n- Base `{base}`: {stated}.\n- Training data: {learned}.\n"


def write_merged_card(folder: Path, name: str, source: Any, base: Any = None) -> None:
    """The card of a checkpoint, called ``name``, that was made whole of ``source``, over ``base`` if it needed one."""
    part, over = public_name(source), public_name(base)
    about = f"`{part}`{f' over `{over}`' if over else ''}, written as one checkpoint that needs no other."
    front = {"base_model": over or part, "library_name": "llava", "pipeline_tag": PIPELINE, "tags": list(TAGS)}
    place = Path(os.path.expanduser(base or source))
    licence = licence_section(over or part, licence_of(place))
    known = {"about": f"# {name}\n\n{about}\n\n{NOT_CLINICAL}", "licence": licence}
    write_card(folder, {**front, **licence_fields(place)}, known)


def public_name(place: Any) -> str:
    """A checkpoint's name for a card: a hub name, also that of a folder in the hub's cache; a folder's last part."""
    text = str(place or "")
    if cached := _HUB_CACHE.search(text):
        return "/".join(cached[1].split("--"))
    owner, _, name = text.partition("/")
    is_hub = owner and name and "/" not in name and owner not in (".", "..", "~", "output", "data")
    return text if is_hub and not Path(os.path.expanduser(text)).exists() else Path(text).name


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _front_text(front: Mapping[str, Any]) -> str:
    values = {name: value for name, value in front.items() if value}
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"
