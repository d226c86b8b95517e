"""One chunk of a model's answers to a question file: what identifies it, whether it is there, and writing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llava
from llava.checkpoints.manifest import manifest_of
from llava.data.rows import Row
from llava.eval.answer_file import answer_row, append, appending, base_of, chunk_range, progress, run_id
from llava.eval.generation import Generation, Loading, Reply, given_tasks
from llava.eval.shown_pictures import BLANK, REAL, shown_metadata, shown_rows
from llava.files import file_sha256
from llava.inside import Folder
from llava.mm_utils import get_model_name_from_path
from llava.progress import Progress

if TYPE_CHECKING:
    from llava.eval.answerer import Answerer


@dataclass(frozen=True)
class Chunk:
    """Which questions, by which model, asked how, and where the answers go.

    Args:
        model: checkpoint that answers. base: the one that it is applied to.
        rows: of the whole question file.
        number, count: this chunk of so many.
        asked, defaults: fields of the prompt, see ``Prompt.of``.
        carried: fields of the question rows that their answers repeat.
        pictures: what each question is shown, see ``shown_pictures``; exchanged by the generation's seed.
        query_cache: folder of queries and picture features, which changes no answer.
        replace: start again where the file holds another run's answers, instead of refusing.
    """

    question_file: str
    rows: Sequence[Row] = field(repr=False)
    image_folder: Folder
    answers_file: Path
    model: str
    base: str | None
    loading: Loading
    generation: Generation
    route: str | None = None
    task: str | None = None
    number: int = 0
    count: int = 1
    asked: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    carried: Sequence[str] = ()
    replace: bool = False
    pictures: str = REAL
    query_cache: str = ""

    @cached_property
    def mine(self) -> list[Row]:
        """The chunk's own rows, with the pictures that they are shown."""
        shown = shown_rows(self.rows, self.pictures, self.generation.seed)
        return [shown[number] for number in chunk_range(len(self.rows), self.count, self.number)]

    @property
    def model_id(self) -> str:
        """The model's name in the answers."""
        return get_model_name_from_path(self.model)

    @cached_property
    def run(self) -> str:
        """A short checksum over everything that decides the answers; equal for all chunks of one count.

        Raises:
            UserError: a picture is missing.
        """
        from llava.data.samples import pictures_checksum

        generated = {entry.name: getattr(self.generation, entry.name) for entry in fields(self.generation)}
        del generated["workers"]
        loading = self.loading
        return run_id(
            {
                "version": llava.__version__,
                "model": manifest_of(self.model),
                "base": manifest_of(self.base or base_of(self.model) or self.model),
                "question_file": file_sha256(self.question_file),
                "pictures": pictures_checksum(self.rows, self.image_folder),
                "prompt": [self.asked, self.defaults],
                "chunks": self.count,
                "route": [self.route, self.task],
                "loading": [loading.load_8bit, loading.load_4bit, loading.attn_implementation, str(loading.dtype)],
                **({} if self.pictures == REAL else {"shown": self.pictures}),
                **({} if loading.tf32 is None else {"tf32": loading.tf32}),
                **generated,
            }
        )

    def finished(self) -> bool:
        """Whether all answers are there.

        Raises:
            UserError: the file is another run's, and is not to be replaced.
        """
        done, _ = progress(self.answers_file, self.mine, self.model_id, self.run, self.replace)
        return done == len(self.mine)

    def _check(self) -> None:
        """What can be known of the rows before a model is loaded."""
        given_tasks(self.rows, self.route, self.task)  # refuses rows that the oracle route knows no task for
        if shared := sum(row.position is not None for row in self.rows):
            found = f"{shared} of {len(self.rows)} rows share their question_id with others"
            print(f"{self.question_file}: {found}; their answers name the row's position in the file")

    def write(self, answerer: Callable[[], Answerer], quiet: bool = False) -> None:
        """Answer what is not answered yet; ``answerer`` gives the one to ask, and is called only where one is needed.

        How far it is is shown, unless ``quiet``.

        Raises:
            UserError: as ``finished``; a picture cannot be read.
        """
        rows = self.mine
        opened = appending(self.answers_file, rows, self.model_id, self.run, self.replace)
        with opened as (done, stream):
            if done == len(rows):
                print(f"{self.answers_file}: all {done} answers are there")
                return
            self._check()
            asked = answerer().use(self.model, self.route, self.task, self.defaults, **self.asked)
            cut_before = asked.model.prompts_cut
            title, count = f"answers of {self.model_id}", len(rows)
            with Progress[Reply](title, "question", total=count, done=done, quiet=quiet, stays=True) as shown:
                what = rows, self.generation, self.image_folder, done, self.pictures == BLANK
                for reply in asked.answer(*what, answered=shown.advance):
                    append(stream, [self._answer(reply)])
            cut = asked.model.prompts_cut - cut_before
        note = f"; {cut} prompts were cut to the model's window" if cut else ""
        print(f"{self.answers_file}: {len(rows)} answers by {self.model_id}{note}", flush=True)

    def _answer(self, reply: Reply) -> dict[str, Any]:
        """A line of the answers file."""
        shown = shown_metadata(reply.row, self.pictures)
        metadata = {"run": self.run, **shown, **({"route": reply.route} if reply.route else {})}
        carried = {name: reply.row.raw[name] for name in self.carried if name in reply.row.raw}
        return {**answer_row(reply.row, reply.text, self.model_id, metadata), **carried}
