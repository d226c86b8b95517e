"""A language model out of a GGUF file, such as packages ship, as a plain folder that any program reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava.checkpoints.weights import first_line
from llava.files import atomic_folder
from llava.utils import UserError


def packaged_gguf(package: str) -> Path:
    """The GGUF file that an installed package ships; the package itself is not imported.

    Raises:
        UserError: it is not installed, or ships no such file, or several.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pip = package.replace("_", "-")
        raise UserError(f"the language model's package {pip} is not installed; pip install --no-deps {pip} gguf")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"package {package} holds {len(files)} GGUF files, not one; give the file itself (--gguf)")
    return files[0]


def write_plain_model(file: Path, folder: Path) -> None:
    """Write the language model and the tokenizer of a GGUF file, dequantised to float32, to the new ``folder``.

    The model that transformers gives counts as quantised and refuses to be saved; a fresh one of the same
    configuration takes its weights.

    Raises:
        UserError: the package ``gguf`` is not installed, the file cannot be read, or ``folder`` exists already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already; give a new folder")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading GGUF files needs the package gguf; pip install --no-deps gguf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{file}: cannot be read as a GGUF language model ({first_line(error)})") from error
    values = {key: value for key, value in read.config.to_dict().items() if key not in _OF_THE_FILE}
    plain: Any = type(read)(type(read.config).from_dict(values))
    plain.load_state_dict(read.state_dict())
    with atomic_folder(folder) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


_OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")
"""Fields of a config that tell of the GGUF file."""
