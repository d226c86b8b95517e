"""The tokenizer of a checkpoint folder, with the ids its training saw.

Transformers' ``AutoTokenizer`` goes by ``model_type``: for the legacy ``llava`` it ignores ``tokenizer_class`` and
reads a sentencepiece file without the word-start mark in front, so that nearly every prompt gets other ids than in
training. Folders with a sentencepiece file alone are therefore read by ``LlamaTokenizer``, with the defaults of the
time when such folders were written (``legacy``, a beginning-of-text token).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.checkpoints.schemas import TOKENIZER_FILES, check_settings, read_settings
from llava.outside import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCEPIECE_FILE = "tokenizer.model"
LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")
OLD_DEFAULTS = {"legacy": True, "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    path = folder / "tokenizer_config.json"
    settings = read_settings(path) if path.is_file() else {}
    check_settings(folder, TOKENIZER_FILES)
    alone = (folder / SENTENCEPIECE_FILE).is_file() and not (folder / "tokenizer.json").is_file()
    mend = "copy tokenizer.model or tokenizer.json and tokenizer_config.json from the base model"
    with foreign(folder, mend, "no tokenizer can be read here"):
        if alone and settings.get("tokenizer_class") in LLAMA_CLASSES:
            missing: dict[str, Any] = {key: value for key, value in OLD_DEFAULTS.items() if settings.get(key) is None}
            found: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, **missing)
        else:
            found = AutoTokenizer.from_pretrained(folder)
    return found
