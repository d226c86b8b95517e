"""A checkpoint folder, read once and then known: what it is, which model, which file holds which tensor.

| found in the folder | kind |
| --- | --- |
| ``slots.pth`` | ``stage``: a stage checkpoint of this project, with weights beside it or light |
| ``adapter_config.json``, no weights | ``lora``: a LoRA adapter, mostly with ``non_lora_trainables.bin`` |
| ``mm_projector.bin``, no weights | ``projector``: a projector for the language model in ``model_base`` |
| a Hugging Face LLaVA config | ``hf``: transformers' own layout |
| a config that names LLaVA, or projector tensors | ``llava``: a full LLaVA checkpoint |
| any other config | ``plain``: a language model without pictures |

The folder's name decides only where the content allows two readings (an adapter beside full weights; a legacy
``model_type: llava`` that names no decoder). Each answer comes with the rule that gave it, for printing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from llava.checkpoints import weights
from llava.checkpoints.hf_layout import TO_LLAVA, config_from_hf, is_hf_layout, renamed
from llava.checkpoints.kinds import (
    ADAPTER_CONFIG,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    SLOTS_FILE,
    language_family,
    names_llava,
)
from llava.checkpoints.manifest import check_seal, difference, manifest
from llava.utils import UserError, rank0_print


class Checkpoint:
    """What a checkpoint folder holds. Each part is read when it is first asked for, and kept.

    A folder that changes on disk afterwards must be opened again.

    Args:
        folder: an existing folder; ``Checkpoint.open`` also takes hub names.
        name: the model's name, for ties (default: the folder's).

    Raises:
        UserError: the folder holds two sets of weights with tensors of the same names.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or folder.name
        self.weight_files = weights.weight_files(folder)

    @classmethod
    def open(cls, place: Place, name: str | None = None) -> Checkpoint:
        """The checkpoint at a path or hub name; one that is open already is given back.

        Raises:
            UserError: there is no such folder, and it cannot be fetched.
        """
        return place if isinstance(place, Checkpoint) else cls(weights.resolve_checkpoint(place), name)

    def __str__(self) -> str:
        return str(self.folder)

    def has(self, file: str) -> bool:
        """Whether the folder holds a file of this name."""
        return (self.folder / file).is_file()

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds full weights, rather than parts that go over a base."""
        return bool(self.weight_files)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of ``config.json``; ``UserError`` if it is missing or broken."""
        return weights.read_config(self.folder)

    @property
    def is_hf(self) -> bool:
        """Whether the folder has Hugging Face's layout of LLaVA rather than LLaVA's own."""
        return is_hf_layout(self.config)

    @cached_property
    def llava_config(self) -> dict[str, Any]:
        """The config's values in LLaVA's words, whatever the layout."""
        return config_from_hf(self.config) if self.is_hf else self.config

    @cached_property
    def family(self) -> str:
        """The decoder, ``llama`` or ``mistral``; ``UserError`` for another."""
        return language_family(self.llava_config, self.name)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, Llama's number where the config does not say."""
        return int((self.config.get("text_config") or self.config).get("vocab_size", 32000))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell one base checkpoint from another."""
        return weights.fingerprint_of(self.config, self.weight_files)

    @cached_property
    def manifest(self) -> dict[str, str]:
        """By name the checksum of each file that decides what the model does, see ``manifest.manifest``."""
        return manifest(self.folder)

    def identity(self, path: str) -> dict[str, Any]:
        """What keys and slots keep of this base, to know it again; ``path`` is how it was named."""
        return {"path": path, "fingerprint": self.fingerprint, "files": self.manifest}

    def other_than(self, kept: dict[str, Any]) -> str | None:
        """What tells this base from the one whose ``identity`` was kept, in words; ``None`` where nothing does.

        Slots of earlier versions kept a fingerprint alone.
        """
        fingerprint, files = kept.get("fingerprint"), kept.get("files")
        if fingerprint and fingerprint != self.fingerprint:
            return f"its fingerprint is {self.fingerprint}, not {fingerprint}"
        return difference(files, self.manifest) if files else None

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """Which file holds which tensor, by the names in the files."""
        return weights.tensor_places(self.folder, self.weight_files)

    @cached_property
    def llava_names(self) -> dict[str, str]:
        """LLaVA's name of each tensor, by its name in the files."""
        table = TO_LLAVA if self.is_hf else {}
        return {key: renamed(key, table) for key in self.tensor_files}

    def read_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, by the names in the files, reading nothing else of a safetensors checkpoint."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensor_files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, mine in sorted(by_file.items()):
            found |= weights.load_tensors(file, mine)
        return found

    @property
    def kind(self) -> str:
        """What the folder is, see the module's table.

        Raises:
            UserError: it holds nothing that can be loaded; a file is not the one that was written into it.
        """
        return self._told[0]

    @property
    def rule(self) -> str:
        """What told the kind, in words."""
        return self._told[1]

    @cached_property
    def _told(self) -> tuple[str, str]:
        check_seal(self.folder)
        if self.has(SLOTS_FILE):
            return "stage", f"{SLOTS_FILE} found"
        if self.has(ADAPTER_CONFIG):
            if not self.has_weights:
                return "lora", f"{ADAPTER_CONFIG} and no full weights found"
            if "lora" in self.name.lower():
                return "lora", f"{ADAPTER_CONFIG} and full weights found; the name holds 'lora'"
            rank0_print(f"note: {self} holds full weights and {ADAPTER_CONFIG}; the adapter is left out")
        if not self.has_weights:
            if self.has(PROJECTOR_FILE):
                return "projector", f"{PROJECTOR_FILE} and no full weights found"
            raise UserError(
                f"{self}: nothing to load (none of model*.safetensors, pytorch_model*.bin, {SLOTS_FILE}, "
                f"{ADAPTER_CONFIG}, {PROJECTOR_FILE}); check the path"
            )
        if self.is_hf:
            return "hf", "config.json has the Hugging Face LLaVA layout"
        model_type = self.config.get("model_type")
        if names_llava(self.config):
            return "llava", f"config.json says model type {model_type!r}"
        if any(key.startswith(PROJECTOR_PREFIX) for key in self.tensor_files):
            return "llava", f"the weights hold {PROJECTOR_PREFIX}*"
        return "plain", f"model type {model_type!r}, no projector, no vision tower"


Place: TypeAlias = str | os.PathLike[str] | Checkpoint
"""What ``Checkpoint.open`` takes, and everything that reads a checkpoint with it."""
