"""The content of a model folder: every file that decides what the model does, by checksum.

One list for whatever takes something for the same: keys and slots for their base, a query cache for its tower, answers
for their model, a stage for what it was trained on. Names, places, sizes and times say nothing here.

Folders that this project writes keep the list of their files beside them, and are compared with it when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava.checkpoints import weights
from llava.checkpoints.large_files import weights_sha256
from llava.checkpoints.schemas import read_settings
from llava.files import atomic_write
from llava.inside import LinkedFolder, inside
from llava.outside import read_object
from llava.utils import UserError

CHECKSUMS_FILE = "checksums.json"
SHORT = 16
"""Hex digits of a checksum in a list."""
IGNORED_VALUES = ("_name_or_path", "transformers_version", "mm_vision_tower", "base_model_name_or_path")
"""Fields of ``config.json`` that say what wrote a model, where it came from, and where its parts lie."""
TOWER = "vision tower"
"""Stands for the content of a tower that lies in a folder of its own."""

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".model")
_SETTINGS: tuple[str, ...] = (
    "config",
    "generation_config",
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
)
_SETTINGS += ("preprocessor_config", "processor_config", "adapter_config")
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state")
_UNSEALED = ("README.md", CHECKSUMS_FILE)
"""Files that programs and users go on writing to, and the list itself."""


def manifest(folder: Path) -> dict[str, str]:
    """By name the checksum of each file of a model folder that decides what the model does; no logs, cards, folders.

    Of weights in two formats those that a model is made of; of ``config.json`` its values but ``IGNORED_VALUES``. A
    tower that the config names, in a folder or in the hub's cache, counts as one file.

    Raises:
        UserError: two sets of weights in the folder; a broken ``config.json``.
    """
    chosen = weights.weight_files(folder)
    passed_over = {file for stem, ending in weights.FORMATS for file in folder.glob(f"{stem}*.{ending}")} - {*chosen}
    files = [file for file in sorted(folder.iterdir()) if _decides(file.name) and file.is_file()]
    found = checksums_of([file for file in files if file.name != "config.json" and file not in passed_over])
    if (folder / "config.json").is_file():
        values = read_settings(folder / "config.json")
        kept = {name: value for name, value in values.items() if name not in IGNORED_VALUES}
        found["config.json"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:SHORT]
        found |= tower_manifest(values)
    return found


def tower_manifest(config: Mapping[str, Any]) -> dict[str, str]:
    """The content of the tower that LLaVA's config values name; empty where its weights are the checkpoint's own."""
    name = config.get("mm_vision_tower")
    if not name or config.get("vision_config"):
        return {}
    folder = local_folder(name)
    return {TOWER: str(name) if folder is None else content_of(manifest(folder))}


def manifest_of(place: str | os.PathLike[str]) -> dict[str, str]:
    """``manifest`` of a folder or of a hub name that is in the local cache; any other name stands for itself."""
    folder = local_folder(place)
    return {"hub id": str(place)} if folder is None else manifest(folder)


def local_folder(place: str | os.PathLike[str]) -> Path | None:
    """The folder of a path or of a hub name in the local cache; nothing is downloaded."""
    folder = Path(os.path.expanduser(place))  # of an unknown user: the name as it is
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(str(place), "config.json")
    except ValueError:  # neither a folder nor a name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def content_of(files: Mapping[str, str]) -> str:
    """One checksum over a manifest."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:SHORT]


def difference(kept: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first file in which two manifests differ, in words; ``None`` where they agree."""
    for name in sorted({*kept, *now}):
        if kept.get(name) != now.get(name):
            return f"{name} {'is gone' if name not in now else 'is new' if name not in kept else 'has changed'}"
    return None


def checksums_of(files: Iterable[Path]) -> dict[str, str]:
    """Checksums by name, several files at a time."""
    files = list(files)
    with ThreadPoolExecutor(4) as readers:
        sums = readers.map(weights_sha256, files)
        return {file.name: found[:SHORT] for file, found in zip(files, sums, strict=True)}


# -- folders that keep their list --------------------------------------------------------------------------------------


def seal(folder: Path) -> None:
    """Write the list of a folder's files into it; the last thing that is written."""
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in _UNSEALED)
    _write_list(folder / CHECKSUMS_FILE, checksums_of(files))


@contextlib.contextmanager
def changing(file: Path) -> Iterator[None]:
    """Around writing a file anew that a folder's list may hold: the list leaves it out until it is whole.

    Raises:
        UserError: the list is damaged.
    """
    path = file.parent / CHECKSUMS_FILE
    listed = _read_list(path) if path.is_file() else {}
    if file.name not in listed:
        yield
        return
    _write_list(path, {name: checksum for name, checksum in listed.items() if name != file.name})
    yield
    _write_list(path, {**listed, **checksums_of([file])})


def check_seal(folder: Path) -> None:
    """Compare a folder with the list that it keeps, where it keeps one. Further files in it are nobody's matter.

    Raises:
        UserError: names the first file that is gone, or is not what was written.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return
    kept = _read_list(path)
    mend = f"copy the folder again, or make it again (where the change is meant, delete {CHECKSUMS_FILE})"
    if gone := sorted(name for name in kept if not (folder / name).is_file()):
        raise UserError(f"{folder / gone[0]}: was written with this folder and is gone; {mend}")
    if found := difference(kept, checksums_of(folder / name for name in kept)):
        raise UserError(f"{folder / found.rsplit(' has ')[0]}: is not the file that was written; {mend}")


def _read_list(path: Path) -> dict[str, str]:
    values = read_object(path, "file", "copy the folder again")
    kept = values.get("files")
    if not isinstance(kept, dict) or values.get("checksum") != content_of(kept):
        raise UserError(f"{path}: is damaged; copy the folder again, or make it again")
    for name in kept:
        inside(LinkedFolder(path.parent), name, str(path))
    return kept


def _write_list(path: Path, files: dict[str, str]) -> None:
    with atomic_write(path) as stream:
        json.dump({"files": files, "checksum": content_of(files)}, stream, indent=1)


def _decides(name: str) -> bool:
    if name.startswith(_OF_TRAINING):
        return False
    return name.startswith(_SETTINGS) or name.endswith((*_WEIGHTS, ".index.json"))
