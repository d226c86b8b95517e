"""Tokenizers of the four real behaviours, trained here in a second each: no download.

``llama_legacy`` and ``llama`` differ in the space they put after ``</s>``; ``mistral`` writes that space by a
normaliser; ``byte_level`` splits by GPT-2's pattern and has whitespace tokens that merge.
"""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Is there a fracture of the left rib? ASSISTANT: yes no",
    "[INST] What type of image is this? [/INST] chest x-ray, ct scan, mri. ### Human: where ### Assistant: lung",
    "<|im_start|>user\n\nassistant\nAnswer the questions. pleural effusion in the right lower lobe\n\n",
] * 3
NAMES = ("llama_legacy", "llama", "mistral", "byte_level")
SPECIALS = ["<unk>", "<s>", "</s>"]
CHATML = ["<|im_start|>", "<|im_end|>"]


@lru_cache
def build(name: str) -> PreTrainedTokenizerFast:
    """One of ``NAMES``."""
    backend = _byte_level() if name == "byte_level" else _metaspace(name)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    chatml = CHATML if name == "byte_level" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=chatml
    )


def _metaspace(name: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS + alphabet, show_progress=False, min_frequency=2
    )
    backend.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
    vocabulary = Tokenizer.from_str(backend.to_str())
    backend = Tokenizer(vocabulary.model)
    backend.add_special_tokens(SPECIALS)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if name == "mistral":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "always" if name == "llama_legacy" else "first"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    return backend


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS + CHATML,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend
