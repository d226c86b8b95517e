"""The processes of a launcher that answer one evaluation together, as ``RANK`` and its like tell them.

They share nothing but folders: each answers chunks of its own, and waits for the others where the next step needs what
they wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from llava.utils import UserError

LONGEST = timedelta(days=30)
"""For which processes wait for each other's answers."""


@dataclass(frozen=True)
class Ranks:
    """This process's ``number`` of ``count``, and its ``place`` among those of its machine."""

    number: int
    count: int
    place: int

    @classmethod
    def here(cls) -> Ranks:
        """As the launcher says; without one this process is alone."""
        number, count, place = (int(os.environ.get(name) or default) for name, default in _NAMES)
        return cls(number, count, place)

    @contextmanager
    def together(self) -> Iterator[Callable[[Callable[[], object]], None]]:
        """Gives ``in_step(work)``: do ``work`` and wait until all processes have done theirs.

        Raises:
            UserError: the launcher does not say where the processes meet; one of them could not do its work, which ends
                all.
        """
        import torch.distributed as dist

        if lacking := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(
                f"WORLD_SIZE is {self.count} and {lacking[0]} is not set, so the processes cannot meet; start them "
                "with torchrun, DeepSpeed's launcher or LAUNCHER=srun, or unset WORLD_SIZE"
            )
        dist.init_process_group("gloo")
        group = dist.new_group(timeout=LONGEST)

        def in_step(work: Callable[[], object]) -> None:
            said = None
            try:
                work()
            except UserError as error:
                said = str(error)
            found: list[str | None] = [None] * self.count
            dist.all_gather_object(found, said, group=group)
            for number, message in enumerate(found):
                if message is not None:
                    raise UserError(message if number == self.number else f"process {number}: {message}")

        try:
            yield in_step
        finally:
            dist.destroy_process_group()


_NAMES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
