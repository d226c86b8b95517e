"""Runs on the tiny world in processes of their own: killed, several at a time, or in each other's way."""

import os
import signal
import socket
import traceback
from contextlib import contextmanager

from llava.locks import only_writer
from llava.train.llava_trainer import LLaVATrainer

EACH_STEP = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "5", "--logging_steps", "3")
"""A checkpoint a step, also between two lines of the log."""


def in_a_process_of_its_own(task):
    """Run ``task`` in a forked child, which may be killed; returns its exit status (negative: the signal)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            task()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def held_by_another(path):
    """A forked child that writes ``path`` and gets nowhere; gives its number, and what kills it."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(path):
            os.write(tells, b".")
            signal.pause()
        os._exit(1)
    os.read(told, 1)
    ended = []

    def kill():
        if not ended:
            os.kill(child, signal.SIGKILL)
            ended.append(os.waitpid(child, 0))

    try:
        yield child, kill
    finally:
        kill()


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving_step(number):
    """SIGKILL in the middle of writing a step's checkpoint: after the trainer's files, before the mark."""

    def save(self, *args, _save=LLaVATrainer._save_checkpoint, **kwargs):
        if self.state.global_step == number:
            super(LLaVATrainer, self)._save_checkpoint(*args, **kwargs)
            kill_this_process()
        _save(self, *args, **kwargs)

    LLaVATrainer._save_checkpoint = save


def in_processes(count, task):
    """Run ``task`` in forked children that are all processes of one launcher; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in told.items()}}
            code = 1
            try:
                task()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def difference(one, other, target="o_proj"):
    """How far the offsets of two pools' first tasks are apart: the larger relative norm of its two sides."""
    sides = [(getattr(one.tasks[0], kind)[target], getattr(other.tasks[0], kind)[target]) for kind in ("A", "B")]
    return max(float((a - b).norm() / b.norm()) for a, b in sides)
