"""The files of a checkpoint folder, before anything is known of it: where a name leads, which files hold the weights.

Weights are ``model.safetensors`` or ``pytorch_model.bin``, both also sharded with an index file. Transformers decides
which of them a model is made of, and everything else here follows it: safetensors before ``.bin``, within one format
the single file before the shards. Where that choice would pass over tensors of the same names in the same format, the
folder holds two saves and is refused. ``Checkpoint`` puts these parts together.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.checkpoints.schemas import read_settings
from llava.inside import LinkedFolder, inside
from llava.schema import words
from llava.utils import UserError

FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Stem and ending of the two formats, the preferred one first."""
HARMLESS = ("rotary_emb.inv_freq", "position_ids")
"""Endings of tensors that old checkpoints hold and the model computes, or the reverse."""
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What ``torch.load`` raises for a cut or foreign file; it depends on where the cut is."""
WORDS = words(empty=False)
_EDGE = 1 << 16  # bytes read at each end of a weight file for the fingerprint


def resolve_checkpoint(name: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint given by path or by hub name (from the local cache, else downloaded)."""
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    looks_like_hub_name = str(name).count("/") == 1 and not str(name).startswith((".", "/", "~", "output/", "data/"))
    if not looks_like_hub_name:
        raise UserError(f"checkpoint folder not found: {name} (give an existing folder or a Hugging Face hub name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise UserError(
            f"checkpoint {name!r} is no local folder and cannot be fetched from the hub ({first_line(error)}); "
            "download it on a machine with internet and give its folder"
        ) from error


def resolve_recorded(name: str, stage: Path) -> str:
    """Where the base is that a stage names: there, else, for a relative path, in a folder above the stage.

    A stage is opened from other folders than the one in which its training was started.

    Raises:
        UserError: neither.
    """
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir() and not folder.is_absolute():
        above = [parent / folder for parent in stage.resolve().parents]
        if here := next((place for place in above if place.is_dir()), None):
            return str(here)
    try:
        resolve_checkpoint(name)
    except UserError as error:
        raise UserError(
            f"{stage} names {name} as its base model, which is not there; give its place as --model-base, or where a "
            "program takes none, put a link to it there"
        ) from error
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder; ``UserError`` if it is missing, broken, or of no model."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, so this is no checkpoint folder")
    return read_settings(path)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in name order; empty if the folder has none.

    Raises:
        UserError: a single file and shards beside it hold tensors of the same names.
    """
    for stem, ending in FORMATS:
        if files := sorted(folder.glob(f"{stem}*.{ending}")):
            _refuse_two_sets(folder / f"{stem}.{ending}", _shards(folder, stem, ending))
            return files
    return []


def tensor_places(folder: Path, files: list[Path]) -> dict[str, Path]:
    """Which file holds which tensor, for those of the folder's ``weight_files`` that transformers makes a model of.

    Raises:
        UserError: the index is broken or names a file that is gone; a file cannot be read; two saves in one folder.
    """
    for stem, ending in FORMATS:
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if single.is_file():
            return dict.fromkeys(tensor_names(single), single)
        if index.is_file():
            return _indexed(index)
    places: dict[str, Path] = {}
    for file in files:  # shards whose index is lost: enough to read tensors, not to build a model
        names = tensor_names(file)
        if twice := sorted(places.keys() & set(names)):
            raise _two_sets(places[twice[0]], file, twice[0])
        places.update(dict.fromkeys(names, file))
    return places


def _indexed(index: Path) -> dict[str, Path]:
    weight_map = _weight_map(index)
    places = {file: _shard(index, file) for file in sorted(set(weight_map.values()))}
    for file, place in places.items():
        if not place.is_file():
            raise UserError(f"{index} names {file}, which is not there; copy the checkpoint again")
    return {key: places[file] for key, file in weight_map.items()}


def _shard(index: Path, file: str) -> Path:
    """A file that an index names, beside it. Links are followed: the hub's cache is made of them."""
    return inside(LinkedFolder(index.parent), file, str(index))


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, as an index says.

    Raises:
        UserError: it is broken, or names something else than files beside it.
    """
    weight_map = read_settings(index).get("weight_map") or {}
    for key, file in weight_map.items():
        WORDS.check(file, f"{index}: weight_map: {key}")
    return weight_map


def _shards(folder: Path, stem: str, ending: str) -> list[Path]:
    """The files beside the single one: numbered ones, and those that an index names."""
    index = folder / f"{stem}.{ending}.index.json"
    named = set(_weight_map(index).values()) if index.is_file() else set()
    shards = {*folder.glob(f"{stem}-*-of-*.{ending}"), *(_shard(index, name) for name in named)}
    return sorted(file for file in shards if file.is_file() and file.name != f"{stem}.{ending}")


def _refuse_two_sets(single: Path, shards: list[Path]) -> None:
    if not (single.is_file() and shards):
        return
    names = set(tensor_names(single))
    for shard in shards:
        if twice := sorted(names & set(tensor_names(shard))):
            raise _two_sets(single, shard, twice[0])


def _two_sets(one: Path, other: Path, name: str) -> UserError:
    return UserError(
        f"{one.parent} holds two sets of weights: {one.name} and {other.name} both have {name}; remove the stale set "
        "(shards go with their index file)"
    )


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a weight file."""
    if file.suffix != ".safetensors":
        return list(load_bin(file))
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read as safetensors ({first_line(error)}); copy it again") from error


def load_tensors(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of one file, reading nothing else of a safetensors file."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in names}
    found = load_bin(file)
    return {name: found[name].clone() for name in names}


def load_bin(file: Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` file, tensors and plain containers only; ``UserError`` if it holds anything else."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (FileNotFoundError, PermissionError):
        raise
    except UNREADABLE as error:
        raise UserError(
            f"{file}: cannot be read as a file of plain tensors ({first_line(error)}); copy it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{file}: holds something else than tensors by name; copy it again")
    return state


def lacking_tensors(report: Mapping[str, Any]) -> list[str]:
    """Tensors that ``from_pretrained(..., output_loading_info=True)`` reports as not in the files.

    Transformers gives them random numbers and a warning; here each caller says which of them may be missing.
    """
    return sorted(key for key in report["missing_keys"] if not key.endswith(HARMLESS))


def first_line(error: Exception) -> str:
    """The first line of an error's text, its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def fingerprint(folder: Path) -> str:
    """``fingerprint_of`` a folder that is needed for nothing else."""
    return fingerprint_of(read_config(folder), weight_files(folder))


def fingerprint_of(config: dict[str, Any], files: list[Path]) -> str:
    """16 hex digits that tell one base checkpoint from another: config fields that shape it, sizes and ends of weights.

    Reads a few hundred kilobytes, also of a 14 GB checkpoint.
    """
    digest = hashlib.sha256()
    shape = {key: config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
            stream.seek(size // 2)
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()[:16]
