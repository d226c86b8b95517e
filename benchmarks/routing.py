"""What routing one question costs, with pools of up to ten thousand slots.

    python benchmarks/routing.py

Medians over routes of one question, or of ``--batch`` questions, on one thread, beyond the text encoder and the vision
tower. "allocated" is all memory that one route asks for: far below the keys of the pool, so the pool is not copied. The
table's factor compares with the smallest pool on the same machine, which is what other machines should find again.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava.cli import flag, parse  # noqa: E402
from llava.slots.pool import Pool  # noqa: E402
from llava.slots.queries import Query, TaskStatistics  # noqa: E402
from llava.slots.settings import RetrieverSettings  # noqa: E402
from llava.slots.unknown import TaskExtent  # noqa: E402
from llava.utils import run_cli  # noqa: E402

SLOTS = 8


def random_pool(tasks: int, router: str, text_dim: int, image_dim: int) -> Pool:
    """A trained pool of ``tasks`` times eight slots with random keys and statistics."""
    settings = RetrieverSettings(1, {"o_proj": (8, 8)}, text_dim, image_dim, rank=1, router=router)
    pool, generator = Pool(settings), torch.Generator().manual_seed(0)
    dim = Query(torch.zeros(1, text_dim), torch.zeros(1, image_dim)).joint().shape[1]
    scatter, waves = torch.eye(dim), torch.eye(1024)  # shared: a route reads only what is solved from their sums
    seen = Query(image=torch.zeros(1, image_dim)).evidence().shape[1]
    extent = (torch.randn(64, seen) / seen**0.5, torch.ones(64), torch.tensor(1.0), torch.linspace(1, 50, 200))
    for number in range(tasks):
        block = pool.append(f"task{number:05d}", SLOTS)
        block.text_keys.normal_(generator=generator)
        block.image_keys.normal_(generator=generator)
        block.statistics = TaskStatistics(100, torch.randn(dim, generator=generator), scatter)
        block.feature_statistics = TaskStatistics(100, torch.randn(1024, generator=generator) / 32, waves)
        block.extent, block.trained = TaskExtent(block.statistics.mean[-seen:], *extent), True
    pool.changed()
    return pool


def speed(arguments: Arguments) -> None:
    """Median milliseconds to route one question, and the most memory a route takes beside the pool."""
    torch.set_num_threads(arguments.threads)
    batch, repeats = arguments.batch, max(arguments.repeats // arguments.batch, 9)
    print(f"{arguments.threads} thread(s), queries {arguments.text_dim} + {arguments.image_dim}, ", end="")
    print(f"{batch} at a time; median ms a question")
    print(f"{'router':<10}{'slots':>8}{'ms':>9}{'fastest':>9}{'to 24 slots':>13}{'allocated':>12}{'keys of pool':>14}")
    for router in arguments.routers:
        base = None
        for tasks in (3, 125, 1250):
            made = random_pool(tasks, router, arguments.text_dim, arguments.image_dim)
            queries = [
                Query(torch.randn(batch, arguments.text_dim), torch.randn(batch, arguments.image_dim))
                for _ in range(repeats)
            ]
            made.route(queries[0])  # factors are made once
            for query in queries:
                made.route(query)
            times = []
            for query in queries:
                start = time.perf_counter()
                made.route(query)
                times.append(1000 * (time.perf_counter() - start) / batch)
            median = statistics.median(times)
            base = base or median
            keys = tasks * SLOTS * (arguments.text_dim + arguments.image_dim) * 8
            print(
                f"{router:<10}{tasks * SLOTS:>8}{median:>9.3f}{min(times):>9.3f}{median / base:>12.2f}x"
                f"{allocated(made, queries[0]) / 2**20:>9.2f} MB{keys / 2**20:>11.1f} MB"
            )


def allocated(pool: Pool, query: Query) -> int:
    """Bytes that one route allocates in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pool.route(query)
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    routers: list[str] = flag(["gaussian", "ridge", "keys"])
    text_dim: int = flag(768, "default: the reference encoder's")
    image_dim: int = flag(1312, "default: CLIP-L's features and the edges")
    batch: int = flag(1, "questions that are routed together", least=1)
    repeats: int = flag(100, "questions in all; nine batches at least", least=1)
    threads: int = 1


def main() -> None:
    speed(parse(Arguments, description=__doc__))


if __name__ == "__main__":
    run_cli(main)
