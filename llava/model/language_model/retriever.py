"""The ``Retriever`` under the name that the seed gives it; its body is ``llava.slots.pool``."""

from __future__ import annotations

from llava.slots.pool import Retriever, Route, SlotBlock
from llava.slots.settings import RetrieverSettings

__all__ = ["Retriever", "RetrieverSettings", "Route", "SlotBlock"]
