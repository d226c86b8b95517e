"""What a page is made of: sections, with cards, panels, tables, plots and examples in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava.eval.page.examples import Example
from llava.eval.page.plots import Plot
from llava.eval.page.tables import Table


@dataclass(frozen=True)
class Card:
    """One figure in large print."""

    title: str
    text: str
    detail: str = ""
    words: str = ""


@dataclass(frozen=True)
class Panel:
    """What is shown of one metric."""

    name: str
    title: str
    tables: Sequence[Table]
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Section:
    """A part of the page; ``folded`` tables are opened on demand, ``words`` are paragraphs."""

    name: str
    title: str
    words: Sequence[str] = ()
    cards: Sequence[Card] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    panels: Sequence[Panel] = ()
    folded: Sequence[Table] = ()
    examples: Sequence[Example] = field(default=())

    @property
    def every_table(self) -> list[Table]:
        return [*self.tables, *(table for panel in self.panels for table in panel.tables), *self.folded]
