"""Each step of the pipeline, disturbed and given again: the undisturbed result or one line, and no leftovers.

python -m pytest tests/faults                # one point in eleven
python -m pytest tests/faults --thorough -rP # every point, and how many there were
"""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import raw_samples
import tiny_world
import torch
from faults.disturb import (
    at_change,
    comparable,
    contents,
    count_changes,
    damaged,
    in_child,
    kill,
    put_back,
    refuse_with,
)

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EFBIG, errno.EDQUOT)
TASKS = ("abd", "chest")
DAMAGES = ("flip", "cut", "empty", "remove", "swap")

pytestmark = pytest.mark.slow
points_taken = pytest.mark.parametrize("each", [11, pytest.param(1, marks=pytest.mark.thorough)])
"""One point of so many: no multiple of the kinds of damage, or one kind would stand for all."""


@dataclass(frozen=True)
class Pipeline:
    """A world of its own, and its steps as commands, each after those before it.

    Attributes:
        touches: of steps that do not read and write all of it, the places that they do.
        changes: how many changes to the disk each step makes, undisturbed.
        after: what the output folder holds after each.
    """

    world: tiny_world.World
    steps: dict[str, Callable[[], None]]
    touches: dict[str, Sequence[Path]]
    changes: dict[str, int]
    after: dict[str, dict[str, bytes]]

    @property
    def out(self) -> Path:
        return self.world.folder / "out"

    def go_back_before(self, step: str) -> None:
        names = list(self.steps)
        put_back(self.out, self.after[names[names.index(step) - 1]] if names.index(step) else {})

    def points(self, each: int) -> Sequence[tuple[str, int]]:
        """One change of so many, as step and number."""
        return [(step, number) for step, count in self.changes.items() for number in range(count)][::each]

    def run_again(self, step: str) -> None:
        """The undisturbed result, with nothing left over."""
        again = in_child(self.steps[step])
        assert again.code == 0, again.said
        assert self.differences(step) == []

    def differences(self, step: str) -> list[str]:
        """Files of the output that are not those of an undisturbed run, and what is left over."""
        found, wanted = comparable(contents(self.out)), comparable(self.after[step])
        return [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]


def steps_of(world, out) -> dict[str, Callable[[], None]]:
    """The pipeline's steps, and the commands beside it."""
    return {**tiny_world.pipeline_steps(world, out), **steps_beside(world, out, out / "llava-tiny_abd_chest")}


def steps_beside(world, out, stage) -> dict[str, Callable[[], None]]:
    """The commands beside the pipeline's own: raw data, life of slots, whole checkpoints, the matrix."""
    import fusion
    from llava.continual import slots
    from llava.eval import accuracy_matrix
    from llava.model import consolidate

    raw = world.folder.with_name(f"{world.folder.name}-raw")
    if not raw.exists():
        raw_samples.write_vqa_rad(raw)

    def run(main, *words):
        return lambda: tiny_world.run_main(main, *words)

    matrix = ["--scores", out / "eval" / "scores.json", "--tasks", "abd", "--draws", 20]
    return {
        "matrix": run(accuracy_matrix.main, *matrix, "--output-dir", out / "matrix"),
        "removed": run(slots.main, "remove", stage, "chest", "--output", out / "llava-removed"),
        "exported": run(slots.main, "export-peft", stage, "abd", "--output", out / "lora"),
        "whole": run(consolidate.main, "--src", world.base, "--dst", out / "llava-whole"),
        "fused": run(fusion.main, "--data_dir", raw, "--output_dir", out / "fused"),
    }


def touches_of(out) -> dict[str, Sequence[Path]]:
    """What the commands beside the pipeline read and write, but inputs of which nothing was written down."""
    stage = out / "llava-tiny_abd_chest"
    return {
        "matrix": (out / "eval", out / "matrix"),
        "removed": (stage, out / "llava-removed"),
        "exported": (stage, out / "lora"),
        "whole": (out / "llava-whole",),
        "fused": (out / "fused",),
    }


def each_point(points: Sequence[tuple], check: Callable[..., None]) -> None:
    """Check every point, and tell all that fail: one that does says nothing of the others."""
    failed = []
    for point in points:
        try:
            check(*point)
        except AssertionError as error:
            failed.append(f"{point}: {error}")
    print(f"{len(points)} points")
    assert not failed, f"{len(failed)} of {len(points)}\n" + "\n".join(failed)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The undisturbed pipeline."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("faults")
    base = tiny_world.write_base(folder / "tiny-llava-base")
    world = tiny_world.World(folder, base, tiny_world.write_sequence(folder, TASKS), folder / "none.pth")
    for step in steps_of(world, folder / "before").values():
        step()  # what is imported here is not imported anew in each child
    shutil.rmtree(folder / "before")
    made = Pipeline(world, steps_of(world, folder / "out"), touches_of(folder / "out"), {}, {})
    made.out.mkdir()  # it stays when the disturbed runs go back to before the first step
    for name, step in made.steps.items():
        made.changes[name] = count_changes(step, made.out)
        made.after[name] = contents(made.out)
    return made


@points_taken
def test_a_killed_step_ends_as_an_undisturbed_one(pipeline, each):
    def check(step, number):
        pipeline.go_back_before(step)
        killed = in_child(pipeline.steps[step], at_change(number, pipeline.out, kill))
        assert killed.code == -signal.SIGKILL, killed.said
        pipeline.run_again(step)

    each_point(pipeline.points(each), check)


@points_taken
def test_a_refused_change_is_one_line_and_the_next_run_ends_as_an_undisturbed_one(pipeline, each):
    def check(step, number):
        pipeline.go_back_before(step)
        refused = in_child(
            pipeline.steps[step], at_change(number, pipeline.out, refuse_with(ERRORS[number % len(ERRORS)]))
        )
        if refused.code:  # what is kept for speed alone may fail: the step goes on
            refused.check_refused()
        elif not pipeline.differences(step):
            return
        pipeline.run_again(step)

    each_point(pipeline.points(each), check)


def files_of(pipeline, step) -> list[Path]:
    """What a step reads or has written, but for cards, and inputs of which nothing was written down."""
    out = [pipeline.out / name for name in pipeline.after[step] if not name.endswith("README.md")]
    inputs = [path for path in pipeline.world.folder.rglob("*") if path.is_file() and pipeline.out not in path.parents]
    unknown = {"keys": inputs, "scores": [pipeline.world.folder / "test.jsonl"]}.get(step, [])
    touched = pipeline.touches.get(step, [pipeline.world.folder])
    known = {*out, *inputs} - {*unknown}
    return sorted(path for path in known if path.is_file() and not {*touched}.isdisjoint(path.parents))


@points_taken
def test_a_damaged_file_never_gives_another_result(pipeline, each):
    def check(step, file, how):
        put_back(pipeline.out, pipeline.after[step])
        data = file.read_bytes()
        damaged(file, how)
        again = in_child(pipeline.steps[step])
        try:
            if again.code:
                again.check_refused()
            else:
                found, wanted = comparable_but(pipeline, file), comparable(pipeline.after[step])
                assert [name for name in found if found[name] != wanted.get(name)] == [], again.said
        finally:
            file.write_bytes(data)

    every = []
    for step, state in pipeline.after.items():
        put_back(pipeline.out, state)
        every += [(step, file, how) for file in files_of(pipeline, step) for how in DAMAGES]
    each_point(every[::each], check)


def comparable_but(pipeline, file) -> dict[str, bytes]:
    """The output without a file that was damaged, whether or not it was made again."""
    found = contents(pipeline.out)
    if pipeline.out in file.parents:
        found.pop(str(file.relative_to(pipeline.out)), None)
    return comparable(found)


@points_taken
def test_a_damaged_checkpoint_is_not_gone_on_from(pipeline, each):
    step, work = "first stage", pipeline.out / "checkpoints"

    def kill_before_it_appears(event, args):
        if event == "os.rename" and str(args[0]).endswith(".partial"):
            kill()

    pipeline.go_back_before(step)
    assert in_child(pipeline.steps[step], kill_before_it_appears).code == -signal.SIGKILL
    state = contents(pipeline.out)

    def check(file, how):
        put_back(pipeline.out, state)
        damaged(file, how)
        again = in_child(pipeline.steps[step])
        if again.code:
            again.check_refused()
            return
        assert pipeline.differences(step) == []

    each_point([(file, how) for file in sorted(work.rglob("*")) if file.is_file() for how in DAMAGES][::each], check)
