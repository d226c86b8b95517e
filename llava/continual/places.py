"""Names and folders of a sequence's runs: the one place that knows where a stage, a key file or a score lies.

::

    output/prompt-key/abd.pth, merged_prompt_key.pth      keys of the sequence vqa-rad
    output/prompt-key/<sequence>/...                      of every other one: two may have tasks of one name
    output/llava-<sequence>[-<method>]_<task>_<task>      a stage
    output/checkpoints/<stage>                            its work in progress
    output/eval/<sequence>[-<method>][-<route>]           answers, scores, accuracy matrix
    output/tiny-base, output/tiny-base-<recipe>           tiny bases
    output/cache/queries                                  queries and picture features of both stages
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llava.continual.sequence import TaskSequence, load_sequence
from llava.utils import UserError

MERGED = "merged_prompt_key.pth"
_SEQUENCE_AT_THE_TOP = "vqa-rad"


@dataclass(frozen=True)
class Places:
    """Where the files of ``sequence`` lie under ``root``, trained with ``method``."""

    root: Path
    sequence: TaskSequence
    method: str = "retrieval"

    @classmethod
    def of(cls, sequence: TaskSequence, method: str = "retrieval", environ: Mapping[str, str] | None = None) -> Places:
        """Under ``OUTPUT_DIR``, else ``output`` in the folder where the command was started."""
        environ = os.environ if environ is None else environ
        return cls(Path(environ.get("OUTPUT_DIR") or "output"), sequence, method)

    @property
    def stages(self) -> list[Path]:
        """The stages' folders in order."""
        return [
            self.root / self.sequence.stage_name(number, self.method)
            for number in range(1, len(self.sequence.tasks) + 1)
        ]

    def stage(self, task: str) -> Path:
        """Folder of the stage that ends with ``task``."""
        return self.stages[self._index(task)]

    def stage_before(self, task: str) -> Path | None:
        """Folder of the stage before; ``None`` for the first task."""
        index = self._index(task)
        return self.stages[index - 1] if index else None

    @staticmethod
    def work(stage: Path) -> Path:
        """Folder of a stage's checkpoints while it is trained."""
        return stage.parent / "checkpoints" / stage.name

    @property
    def key_folder(self) -> Path:
        folder = self.root / "prompt-key"
        return folder if self.sequence.name == _SEQUENCE_AT_THE_TOP else folder / self.sequence.name

    def key_file(self, task: str) -> Path:
        """Stage 1's file of a task."""
        return self.key_folder / f"{task}.pth"

    @property
    def merged_keys(self) -> Path:
        return self.key_folder / MERGED

    def evaluation(self, route: str | None = None) -> Path:
        """Folder of answers and scores; ``route`` is the router asked for, empty: as trained."""
        marks = [
            self.sequence.name,
            *([] if self.method == "retrieval" else [self.method]),
            *([route] if route else []),
        ]
        return self.root / "eval" / "-".join(marks)

    @property
    def tiny_base(self) -> Path:
        """Folder of the tiny base that the sequence's recipe makes; the phantoms' where it names none."""
        recipe = self.sequence.base.recipe or "phantom"
        return self.root / ("tiny-base" if recipe == "phantom" else f"tiny-base-{recipe}")

    def base_model(self, given: str | None = None) -> str:
        """The base model: the flag, else the sequence's (``BASE_MODEL`` goes before), else the tiny base that was made.

        Raises:
            UserError: there is none.
        """
        name = given or self.sequence.base.model
        if name is None and self.sequence.base.recipe and (self.tiny_base / "config.json").is_file():
            name = str(self.tiny_base)
        if name is None:
            raise UserError(
                f"no base model for sequence {self.sequence.name!r}: give the flag or BASE_MODEL a LLaVA checkpoint, "
                "or make the tiny one with python scripts/make_tiny_base.py"
            )
        return name

    @property
    def query_cache(self) -> Path:
        return self.root / "cache" / "queries"

    def _index(self, task: str) -> int:
        return self.sequence.task_names.index(self.sequence.task(task).name)


def places_of(sequence: str | os.PathLike[str], method: str = "retrieval") -> Places:
    """``Places`` of a sequence given by name or file, under ``OUTPUT_DIR``."""
    return Places.of(load_sequence(sequence), method)
