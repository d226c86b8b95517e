"""What an evaluation of a task sequence takes and makes. It is told without torch, which takes seconds to import."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llava.cli import MANY, SEEDS, flag
from llava.continual.places import Places
from llava.continual.sequence import TaskSequence, load_sequence, sequence_flag
from llava.data.rows import Row, read_rows
from llava.devices import default_device, readers
from llava.eval.generation import ORACLE, Generation, Loading
from llava.eval.loading_flags import DTYPES, asked_prompt
from llava.eval.shown_pictures import KINDS, REAL, SHUFFLED
from llava.inside import Folder, opened_to_links
from llava.utils import UserError, require_file

if TYPE_CHECKING:
    from llava.eval.answer_chunk import Chunk


@dataclass(frozen=True)
class Settings:
    """The command line; an empty text is as good as none."""

    sequence: str = sequence_flag()
    base_model: str = flag("", "model under the stages (default: the sequence's)", aliases=["--model-base"])
    output_dir: str = flag("", "holds the stages and the results (default: OUTPUT_DIR, else output)")
    method: str = flag("retrieval", "continual method whose stages are evaluated")
    route: str = flag("", "a router, 'oracle' (the task is given) or 'none' (default: as trained)")
    zero_shot: bool = flag(True, "also evaluate the base model alone")
    chunks: str = flag("", "parts of the question file (default: one for each device)")
    batch_size: int = flag(16, "questions answered at a time", least=1, most=MANY)
    max_new_tokens: int = flag(64, "longest answer, in tokens", least=1, most=MANY)
    num_workers: int | None = flag(
        None, "threads that read pictures ahead (default: 4 beside a GPU)", least=0, most=1024
    )
    query_cache: str | None = flag(
        None, "keeps queries and picture features, which training left there (default: cache/queries; '' for none)"
    )
    conv_mode: str = flag("", "conversation template (default: the stage's own)")
    follow_links: bool = flag(False, "open pictures that are links out of their folder")
    dtype: str | None = flag(
        None, "of the weights (default: the checkpoint's own on a GPU, float32 on the CPU)", choices=DTYPES
    )
    tf32: bool | None = flag(None, "products of float32 matrices in TF32, on NVIDIA GPUs since Ampere (default: no)")
    image_aspect_ratio: str = flag("", "pad, square or anyres (default: the stage's own)")
    answer_suffix: str | None = flag(None, "text after each question (default: the stage's own; '' for none)")
    pictures: list[str] = flag(
        [REAL], "what the base and the last stage are shown, also blank, shuffled", choices=KINDS
    )
    picture_seed: int = flag(0, "of the exchange of shuffled pictures", **SEEDS)
    stale: str = flag("replace", "answers of other weights or settings", choices=["replace", "refuse"])
    page: bool = flag(False, "end with the page about it, report.html, and its tables")
    worker: str = flag("", "which part of the chunks this process answers, for the command's own use")


@dataclass(frozen=True)
class Evaluation:
    """A task sequence's models, questions and places.

    Attributes:
        chunks: parts of the question file.
        models: name of each model's folder, and its stage (``None``: the base), in the order in which they answer.
    """

    ZERO_SHOT: ClassVar[str] = "zero-shot"

    settings: Settings
    sequence: TaskSequence
    places: Places
    chunks: int

    @classmethod
    def of(cls, settings: Settings, devices: int | str) -> Evaluation:
        """What the settings ask for.

        Raises:
            UserError: a number of chunks below 1; no such sequence.
        """
        chunks = str(settings.chunks or devices)
        if not chunks.isdigit() or int(chunks) < 1:
            raise UserError(f"CHUNKS is {chunks!r}; give a whole number of 1 or more, or leave it empty")
        sequence = load_sequence(settings.sequence)
        environ = {**os.environ, **({"OUTPUT_DIR": settings.output_dir} if settings.output_dir else {})}
        return cls(settings, sequence, Places.of(sequence, settings.method, environ), int(chunks))

    @cached_property
    def base(self) -> str:
        """The model under the stages; ``UserError`` where neither the settings nor the sequence name one."""
        return self.places.base_model(self.settings.base_model or None)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.places.evaluation(self.settings.route or None)

    @property
    def models(self) -> list[tuple[str, Path | None]]:
        stages: list[tuple[str, Path | None]] = [(stage.name, stage) for stage in self.places.stages]
        return [(self.ZERO_SHOT, None), *stages] if self.settings.zero_shot else stages

    @property
    def passes(self) -> list[tuple[str, str]]:
        """Name of the model and kind of picture of everything to be answered: of each model the real pictures first."""
        kinds = [kind for kind in KINDS if kind in self.settings.pictures and kind != REAL]
        names = [name for name, _ in self.models]
        return [
            (name, kind) for name in names for kind in (REAL, *(kinds if name in (self.ZERO_SHOT, names[-1]) else ()))
        ]

    def answers_folder(self, name: str, pictures: str = REAL) -> Path:
        """Where a model's answers to a kind of picture go."""
        return self.folder / name / ("" if pictures == REAL else pictures)

    def answers_file(self, name: str, pictures: str = REAL) -> Path:
        """A model's answers to a kind of picture, once all are there."""
        return self.answers_folder(name, pictures) / "answers.jsonl"

    def references(self, scores: str) -> dict[str, Path]:
        """Scores files, where they are there, of what the last stage is compared with: by the reference's name."""
        others = {name: replace(self.places, method=name) for name in ("joint", "individual")}
        places = {"task_given": (self.places, ORACLE), **{name: (other, None) for name, other in others.items()}}
        files = {
            name: found.evaluation(route) / found.stages[-1].name / scores for name, (found, route) in places.items()
        }
        return {name: file for name, file in files.items() if file.is_file() and self.folder not in file.parents}

    @cached_property
    def rows(self) -> list[Row]:
        """The test questions."""
        source = require_file(self.sequence.test, "question file", "make it with: python fusion.py")
        return read_rows(source)

    @property
    def image_folder(self) -> Folder:
        """The pictures of the test questions."""
        return opened_to_links(self.sequence.image_folder, self.settings.follow_links) or ""

    @property
    def query_cache(self) -> str:
        """Folder of what was computed of questions and pictures; empty: none."""
        asked = self.settings.query_cache
        return str(self.places.query_cache) if asked is None else asked

    @property
    def loading(self) -> Loading:
        """The accelerator of this process, unquantised."""
        return Loading(tf32=self.settings.tf32, dtype=self.settings.dtype)

    def chunk(self, name: str, number: int, pictures: str = REAL) -> Chunk:
        """One chunk of a model's answers to a kind of picture."""
        from llava.eval.answer_chunk import Chunk

        settings, stage = self.settings, dict(self.models)[name]
        return Chunk(
            question_file=self.sequence.test,
            rows=self.rows,
            image_folder=self.image_folder,
            answers_file=self.answers_folder(name, pictures) / "chunks" / f"{self.chunks}_{number}.jsonl",
            model=self.base if stage is None else str(stage),
            base=None if stage is None else self.base,
            loading=self.loading,
            generation=Generation(
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                workers=readers(default_device()) if settings.num_workers is None else settings.num_workers,
                seed=settings.picture_seed if pictures.startswith(SHUFFLED) else 0,
            ),
            route=settings.route or None,
            number=number,
            count=self.chunks,
            asked=asked_prompt(settings),
            defaults={"answer_suffix": self.sequence.answer_suffix},
            replace=settings.stale == "replace",
            pictures=pictures,
        )
