"""Runs of stage 2 on the tiny world that are killed, each in a process of its own."""

import os
import signal

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
