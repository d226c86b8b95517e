"""An evaluation of a model in memory: pictures from files, questions in words, answers of a fixed length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from benchmarks.parts.contenders import Shape
from llava.conversation import get_conversation
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import Row, question_row, read_rows, write_jsonl
from llava.data.samples import DataCollatorForSupervisedDataset, TrainingSamples, picture_names
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation
from llava.eval.loaded import Loaded

WORDS = "is there a lesion in the lower left lung of this picture and what side does it lie on".split()
SIDE = 512
"""Of a picture in pixels."""


class InMemory(Answerer):
    """An answerer whose model is in memory already; it has seen no picture yet."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        super().__init__(None)
        self._loaded = Loaded(("random", None), tokenizer, model, processor, model.retriever, {})
        config = model.config
        template = getattr(config, "conversation_version", None) or "vicuna_v1"
        self._prompt = Prompt(template, aspect_ratio=getattr(config, "image_aspect_ratio", None) or "pad")
        self._stop = get_conversation(self._prompt.conv_mode).sep2


class Questions:
    """A file of ``shape.rows`` questions, so many about each picture, and the pictures, in ``folder``."""

    def __init__(self, folder: Path, shape: Shape, model: Any, a_picture: int = 2):
        self.shape, self.folder, self.a_picture = shape, folder, a_picture
        self.tokenizer = word_tokenizer()
        tower = model.get_vision_tower()
        self.processor = tower.image_processor or tower.default_processor(tower.config)
        self.rows = self._write()

    def _write(self) -> list[Row]:
        random, written = np.random.default_rng(0), []
        for number in range(self.shape.rows):
            name = f"{number // self.a_picture}.png"
            if number % self.a_picture == 0:
                coarse = random.integers(0, 256, (SIDE // 16, SIDE // 16), dtype=np.uint8)
                Image.fromarray(coarse).resize((SIDE, SIDE)).convert("RGB").save(self.folder / name)
            words = [WORDS[(number + place) % len(WORDS)] for place in range(5 + number % 8)]
            written.append(question_row(number, name, " ".join(words), "yes", "t0000", ["t0000"]))
        write_jsonl(self.folder / "questions.jsonl", written)
        return read_rows(self.folder / "questions.jsonl")

    def batch(self, model: Any) -> dict[str, Any]:
        """All rows, with their answers, as one training batch whose pictures the tower has seen."""
        asked = InMemory(model, self.tokenizer, self.processor)
        encoder = PromptEncoder(asked.prompt, self.tokenizer, self.processor, model.config, str(self.folder))
        features = {}
        for name in picture_names(self.rows):
            pixels, size = encoder.picture(self.rows[0], name)
            features[name] = model.vision_features([pixels])[0][0], size
        samples = TrainingSamples(self.rows, encoder).add(features=features)
        samples.named = True
        return DataCollatorForSupervisedDataset(self.tokenizer)(list(samples))

    def ask(self, model: Any, batch_size: int) -> list[str]:
        """The answers, every picture opened and looked at anew."""
        model.generation_config.min_new_tokens = self.shape.answer
        answerer = InMemory(model, self.tokenizer, self.processor)
        generation = Generation(max_new_tokens=self.shape.answer, batch_size=batch_size, workers=4)
        return [reply.text for reply in answerer.answer(self.rows, generation, str(self.folder))]

    def ask_in_a_loop(self, model: Any) -> list[str]:
        """The same as LLaVA's own evaluation asks: one question after the other, each with its picture anew."""
        found = []
        model.generation_config.min_new_tokens = self.shape.answer
        generation = Generation(max_new_tokens=self.shape.answer, batch_size=1)
        for row in self.rows:
            answerer = InMemory(model, self.tokenizer, self.processor)
            found += [reply.text for reply in answerer.answer([row], generation, str(self.folder))]
        return found


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, so that a prompt has about as many as LLaVA's own; words that it does not know are one."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    known = {word: number for number, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    backend = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
