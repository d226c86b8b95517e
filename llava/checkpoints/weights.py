"""Reading checkpoint folders without building a model: single tensors, fingerprints, where a name leads.

Works on a folder with ``model.safetensors`` or ``pytorch_model.bin`` (both also sharded, with their index files).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llava.utils import UserError

_EDGE = 1 << 16  # bytes read at each end of a weight file for the fingerprint


def resolve_checkpoint(name: str | os.PathLike) -> Path:
    """The local folder of a checkpoint given by path or by hub name (from the local cache, else downloaded)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    looks_like_hub_name = str(name).count("/") == 1 and not str(name).startswith((".", "/", "~", "output/", "data/"))
    if not looks_like_hub_name:
        raise UserError(f"checkpoint folder not found: {name} (give an existing folder or a Hugging Face hub name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"checkpoint {name!r} is no local folder and cannot be fetched from the hub ({reason}); download it on a "
            "machine with internet and give its folder"
        ) from error


def read_config(folder: Path) -> dict:
    """``config.json`` of a checkpoint folder; ``UserError`` if it is missing or broken."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, so this is no checkpoint folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON at line {error.lineno}; restore the file") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in name order; empty if the folder has none."""
    safetensors = sorted(folder.glob("model*.safetensors"))
    return safetensors or sorted(folder.glob("pytorch_model*.bin"))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = folder / index_name
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {key: folder / file for key, file in weight_map.items()}
    places: dict[str, Path] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                places.update(dict.fromkeys(tensors.keys(), file))
        else:
            places.update(dict.fromkeys(load_bin(file), file))
    return places


def read_tensors(folder: Path, wanted: list[str]) -> dict[str, Tensor]:
    """The named tensors, reading nothing else of a safetensors checkpoint."""
    places = tensor_files(folder)
    found: dict[str, Tensor] = {}
    for file in sorted({places[key] for key in wanted}):
        mine = [key for key in wanted if places[key] == file]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                found.update({key: tensors.get_tensor(key) for key in mine})
        else:
            tensors = load_bin(file)
            found.update({key: tensors[key].clone() for key in mine})
    return found


def load_bin(file: Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` file, tensors and plain containers only; ``UserError`` if it holds anything else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file}: cannot be read as a file of plain tensors ({reason}); copy it again") from error


@functools.lru_cache(maxsize=8)
def fingerprint(folder: Path) -> str:
    """16 hex digits that tell one base checkpoint from another: config fields that shape it, sizes and ends of weights.

    Reads a few hundred kilobytes, also of a 14 GB checkpoint.
    """
    digest = hashlib.sha256()
    config = read_config(folder)
    shape = {key: config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
            stream.seek(size // 2)
            digest.update(stream.read(_EDGE))
    return digest.hexdigest()[:16]
