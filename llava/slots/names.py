"""Words that settings of slots are made of, and what may be a task's name. Needs nothing else, so that commands that
only read a task sequence start at once.
"""

from __future__ import annotations

import re
from typing import Any

from llava.registry import Registry
from llava.utils import UserError

QUERY_MODES = ("text", "image", "text+image")
KINDS = ("tower", "picture", "tower+picture")
"""What a picture's query is made of (see ``picture_query``)."""
ALL, QUESTION = SCOPES = ("all", "question")
"""Which positions of a row weight offsets act on: all, or those behind its last picture."""
ORACLE = "oracle"
"""What stands for "the task is given" where a router's name is expected."""
ROUTERS: Registry[Any] = Registry("router", "llava.slots.routers")
"""Classes of routers by name (see ``routers``)."""
_TASK_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def check_task_name(name: str, where: str = "") -> None:
    """``UserError`` if ``name`` cannot be a task's name; ``where`` goes in front of the message."""
    if not _TASK_NAME.fullmatch(name):
        raise UserError(f"{where}task name {name!r}: use lower-case letters, digits, '-' and '_' only")
