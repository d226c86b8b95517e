"""Runs of stage 2 on the tiny world that are killed, each in a process of its own."""

import os
import signal
import socket
import traceback

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
