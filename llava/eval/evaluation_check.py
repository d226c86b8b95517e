"""What about an evaluation of a task sequence can be known before a model is loaded."""

from __future__ import annotations

from llava.continual.methods import METHODS
from llava.continual.preflight import check_base, check_questions, check_space, check_stages, require_stages
from llava.conversation import get_conversation
from llava.data.prompt import check_aspect_ratio
from llava.data.samples import check_image_files
from llava.eval.evaluation import Evaluation
from llava.eval.generation import check_route, given_tasks
from llava.eval.shown_pictures import shown_rows
from llava.utils import require_file

ANSWER_BYTES = 500
"""What an answer takes on the disk, at least."""


def check_evaluation(evaluation: Evaluation) -> None:
    """Find what would stop the evaluation later on, without loading a model.

    Raises:
        UserError: naming the first thing that is wrong.
    """
    settings = evaluation.settings
    METHODS.get(settings.method)  # refuses a name that is no method
    check_route(settings.route or None)
    if settings.conv_mode:
        get_conversation(settings.conv_mode)
    if settings.image_aspect_ratio:
        check_aspect_ratio(settings.image_aspect_ratio)
    check_questions(evaluation.rows, evaluation.sequence)
    given_tasks(evaluation.rows, settings.route or None)  # refuses rows that the oracle route knows no task for
    for task in evaluation.sequence.tasks:
        for file in task.files:
            require_file(file, "training file", "the majority baselines need it; make it with: python fusion.py")
    require_stages(evaluation.places.stages)
    check_stages(evaluation.places.stages, check_base(evaluation.base))
    check_space(evaluation.folder, ANSWER_BYTES * len(evaluation.rows) * len(evaluation.passes), "the answers")
    check_image_files(evaluation.rows, evaluation.image_folder)
    for kind in settings.pictures:
        shown_rows(evaluation.rows, kind, settings.picture_seed)  # refuses pictures that cannot change places
    for name, kind in evaluation.passes:
        for number in range(evaluation.chunks):
            evaluation.chunk(name, number, kind).finished()  # refuses another run's answers, if it should
