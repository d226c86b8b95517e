"""Times and counts of steps that are measured beside each other, in one process.

A machine's clock, its neighbours and the host's caches change while a benchmark runs. So all contenders take one step
each in every round, in another order each time; figures are medians over the rounds, and the base stands in every table
twice: where it is not within ``ALIKE`` of itself, no ratio of that table counts.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

ROUNDS, ALIKE = 9, 0.03
BASE, AGAIN = "base", "base again"
LONG_MS = 1000.0
Step = Callable[[], Any]


@dataclass
class Found:
    """What was measured of one contender's step.

    Attributes:
        ms: of each round. peak: bytes that a step takes beyond what lay there before it. kernels, copies_in,
            copies_out: that it starts on the GPU, and to it and from it; busy_ms: how long its kernels ran. syncs: how
            often the host waited for the GPU. All but ``ms`` is ``None`` without a GPU.
    """

    ms: list[float] = field(default_factory=list)
    peak: int | None = None
    kernels: int | None = None
    copies_in: int | None = None
    copies_out: int | None = None
    busy_ms: float | None = None
    syncs: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def measure(
    steps: Mapping[str, Step],
    device: torch.device,
    until: float = float("inf"),
    rounds: int = ROUNDS,
    uncounted: Collection[str] = (),
) -> dict[str, Found]:
    """Every step of ``steps``, timed, and counted but for the ``uncounted``.

    Args:
        until: on ``time.monotonic``'s clock; rounds that would begin later are left out, but for the first.
    """
    found = {name: Found() for name in steps}
    for name, step in steps.items():
        first = _timed(step, device)
        if name in uncounted:
            continue
        if first < LONG_MS:  # a long step has its memory and its kernels after one
            step()
        if device.type == "cuda":
            _count(step, found[name], device)
    names = list(steps)
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            found[name].ms.append(_timed(steps[name], device))
        if time.monotonic() > until:
            break
    return found


def _timed(step: Step, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(step: Step, found: Found, device: torch.device) -> None:
    """One step under the memory's counter, one under the profiler, one that tells when the host waits."""
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    found.peak = torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        _wait(device)
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event.name for event in ran if event.name.startswith(("Memcpy", "Memset"))]
    kernels = [event for event in ran if not event.name.startswith(("Memcpy", "Memset")) and not _is_range(event)]
    found.kernels, found.busy_ms = len(kernels), sum(event.time_range.elapsed_us() for event in kernels) / 1000
    found.copies_in, found.copies_out = (sum(f" {way}" in name for name in copies) for way in ("HtoD", "DtoH"))
    found.syncs = _waits(step)


def _is_range(event: Any) -> bool:
    """Whether an event of the device is a marked range of the program, and no kernel."""
    return bool(getattr(event, "is_user_annotation", False))


def _waits(step: Step) -> int:
    """How often the host waits for the GPU in a step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


def lines(title: str, found: Mapping[str, Found], items: int = 1, what: str = "") -> list[str]:
    """A table of one measurement; with ``items`` a step, how many of ``what`` a second too."""
    base = found[BASE].median
    counts = reliable(found)
    head = f"{title:<34}{'ms':>10}{'over base':>11}{'GB more':>9}{'kernels':>9}{'busy ms':>9}{'syncs':>7}"
    head += f"{'in':>5}{'out':>5}{'n':>4}" + (f"{what + '/s':>14}" if what else "")
    rows = [head]
    for name, one in found.items():
        ratio = f"{one.median / base:.3f}" + ("" if counts or name in (BASE, AGAIN) else "?")
        cells = f"  {name:<32}{one.median:>10.2f}{ratio:>11}{_shown(one.peak and one.peak / 1e9, 2):>9}"
        cells += f"{_shown(one.kernels):>9}{_shown(one.busy_ms, 2):>9}{_shown(one.syncs):>7}"
        cells += f"{_shown(one.copies_in):>5}{_shown(one.copies_out):>5}{len(one.ms):>4}"
        rows.append(cells + (f"{1000 * items / one.median:>14.1f}" if what else ""))
    if not counts:
        rows.append(f"  the base is not within {ALIKE:.0%} of itself here: ratios with a ? do not count")
    return rows


def reliable(found: Mapping[str, Found]) -> bool:
    """Whether the base is like itself, so that ratios over it say something."""
    return abs(found[AGAIN].median / found[BASE].median - 1) <= ALIKE


def record(found: Mapping[str, Found]) -> dict[str, Any]:
    """The same for a JSON file."""
    base = found[BASE].median
    rows = {
        name: {**asdict(one), "median_ms": one.median, "over_base": one.median / base} for name, one in found.items()
    }
    return {"reliable": reliable(found), "contenders": rows}


def _shown(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
