"""How far a long step is: a bar on a terminal, elsewhere a line every 30 seconds, so that log files stay readable.

Everything that takes its time counts here, and nobody else makes a bar. Both go to standard error, and the main process
alone shows them. A step that ends before its first line is due leaves nothing in a log file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, TypeVar

from llava.utils import is_main_process

SECONDS = 30.0
"""Between two lines."""

Item = TypeVar("Item")


class Progress(Generic[Item]):
    """A long step, counted by iterating over it, or by ``advance`` inside a ``with``.

    Args:
        what: the step, such as ``prompt keys``. unit: of its rounds, in the singular.
        items: what it goes over; may be left out where ``advance`` counts.
        total: rounds there are (default: the items' number). done: those of them that were done before this start.
        quiet: shows nothing. lines: lines on a terminal too. stays: the finished bar stays on the terminal.

    Attributes:
        figures: what the rounds so far have reached, such as ``loss``; shown with them.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        items: Iterable[Item] = (),
        *,
        total: int | None = None,
        done: int = 0,
        quiet: bool = False,
        lines: bool = False,
        stays: bool = False,
    ) -> None:
        self.what, self.unit, self.items = what, unit, items
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.begun, self.done = done, done
        self.figures: dict[str, float] = {}
        self._quiet = quiet or sys.stderr is None or not is_main_process()  # None: the standard error is closed
        self._bar = None if self._quiet or lines or not sys.stderr.isatty() else self._made_bar(stays)
        self._start = self._said = time.monotonic()

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self.items:
                yield item
                self.advance()

    def __enter__(self) -> Progress[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(finished=kind in (None, GeneratorExit))  # a loop that breaks off has found its end

    def advance(self, rounds: int = 1) -> None:
        """Count further rounds."""
        self.done += rounds
        if self._bar is not None:
            self._bar.set_postfix_str(self._told_figures(), refresh=False)
            self._bar.update(rounds)
        elif not self._quiet and time.monotonic() - self._said >= SECONDS:
            self.say(self._line())
            self._said = time.monotonic()

    def say(self, text: str) -> None:
        """Show a line at once, on a terminal above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self, finished: bool = True) -> None:
        """End; where lines were shown, a last one says what it took."""
        if self._bar is not None:
            self._bar.close()
        elif finished and self._said > self._start:
            taken = f"took {duration(time.monotonic() - self._start)}"
            self.say(", ".join(filter(None, (self._counted(), self._told_figures(), taken))))
            self._said = self._start

    def _made_bar(self, stays: bool) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=self.what, unit=self.unit, total=self.total, initial=self.begun, leave=stays, dynamic_ncols=True
        )

    def _line(self) -> str:
        """``prompt keys: 12 of 50 rounds, similarity 0.9132, 1.5/s, about 0 min 25 s left``."""
        parts = [self._counted(), self._told_figures()]
        fresh, seconds = self.done - self.begun, time.monotonic() - self._start
        if fresh > 0:
            rate = fresh / seconds
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s a {self.unit}")
            if self.total is not None:
                parts.append(f"about {duration(max(0, self.total - self.done) / rate)} left")
        return ", ".join(filter(None, parts))

    def _counted(self) -> str:
        total = "" if self.total is None else f" of {self.total}"
        return f"{self.what}: {self.done}{total} {self.unit}{'es' if self.unit.endswith('ch') else 's'}"

    def _told_figures(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.figures.items())


def duration(seconds: float) -> str:
    """``1 h 05 min`` or ``3 min 20 s``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
