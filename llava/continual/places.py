"""Names and folders of a sequence's runs: the one place that knows where a stage, a key file or a score lies.

::

    output/prompt-key/abd.pth, merged_prompt_key.pth      keys of the sequence vqa-rad
    output/prompt-key/<sequence>/...                      of every other one: two may have tasks of one name
    output/llava-<sequence>[-<method>]_<task>_<task>      a stage
    output/checkpoints/<stage>                            its work in progress
    output/runs/<sequence>[-<method>]/<task>              what a stage reports to TensorBoard
    output/eval/<sequence>[-<method>][-<route>]           answers, scores, accuracy matrix, report.html
    output/tiny-base, output/llava-medical-base           bases that are made here
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
REPORT = "report.html"
"""The page about what a folder of results holds: an evaluation's, a benchmark's."""
_SEQUENCE_AT_THE_TOP = "vqa-rad"
MADE_BASES = {
    "phantom": ("tiny-base", "python scripts/make_tiny_base.py"),
    "medical": ("llava-medical-base", "bash scripts/make_medical_base.sh"),
}
"""Each base's recipe: its folder, and the command that makes it."""


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
        name = self.sequence.learned_by(self.method)
        return self.root / "eval" / (f"{name}-{route}" if route else name)

    def report(self, route: str | None = None) -> Path:
        """The page about an evaluation (``llava.eval.report``)."""
        return self.evaluation(route) / REPORT

    @property
    def made_base(self) -> Path | None:
        """Folder of the base that the sequence's recipe makes; ``None`` where it has a model, or no recipe."""
        base = self.sequence.base
        return self.root / MADE_BASES[base.recipe][0] if base.recipe and not base.model else None

    def base_model(self, given: str | None = None) -> str:
        """The base model: the flag, else the sequence's (``BASE_MODEL`` goes before), else the one that was made here.

        Raises:
            UserError: there is none.
        """
        name, made = given or self.sequence.base.model, self.made_base
        if name:
            return name
        if made is None or not (made / "config.json").is_file():
            command = MADE_BASES[self.sequence.base.recipe or "phantom"][1]
            raise UserError(
                f"no base model for sequence {self.sequence.name!r}: give the flag or BASE_MODEL a LLaVA checkpoint, "
                f"or make one with {command}"
            )
        return str(made)

    @property
    def query_cache(self) -> Path:
        return self.root / "cache" / "queries"

    def _index(self, task: str) -> int:
        return self.sequence.task_names.index(self.sequence.task(task).name)


def places_of(sequence: str | os.PathLike[str], method: str = "retrieval") -> Places:
    """``Places`` of a sequence given by name or file, under ``OUTPUT_DIR``."""
    return Places.of(load_sequence(sequence), method)
