"""Routing accuracy on VQA-RAD and SLAKE, and how well unknown inputs are noticed.

    python benchmarks/routing_accuracy.py --model_base output/tiny-base

For each kind of query and each router: VQA-RAD's official test split, ten folds grouped by picture (every picture is
tested by slots that never saw it), and SLAKE's test split by modality. ``unknown``: share of the folds' questions that
would be sent to the base model. At the end, a model that knows abdominal VQA-RAD alone is shown SLAKE's head MRI and
chest X-ray. The datasets are looked for in ``VQA_RAD_DIR`` and ``SLAKE_DIR``, else in ``../shared/data``. Labels of
test rows are used for counting only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.checkpoints.weights import resolve_checkpoint  # noqa: E402
from llava.cli import flag, parse  # noqa: E402
from llava.continual.places import places_of  # noqa: E402
from llava.continual.queries import compute_queries  # noqa: E402
from llava.data.rows import Row, read_rows  # noqa: E402
from llava.eval.route_scores import auroc, wilson  # noqa: E402
from llava.folds import deal  # noqa: E402
from llava.slots.fit import fit_keys, seed_of  # noqa: E402
from llava.slots.pool import Pool  # noqa: E402
from llava.slots.queries import Queries, Query, TaskStatistics  # noqa: E402
from llava.slots.route import Route  # noqa: E402
from llava.slots.settings import RetrieverSettings  # noqa: E402
from llava.slots.unknown import TaskExtent  # noqa: E402
from llava.utils import run_cli  # noqa: E402

ROUTERS = ("gaussian", "ridge", "keys")
KINDS = (("text+image", "tower+picture"), ("image", "tower+picture"), ("image", "picture"), ("image", "tower"))
KINDS += (("text", "tower"),)
SLOTS, FOLDS, GROUPS = 8, 10, 4


class Data:
    """Rows and queries of both datasets."""

    def __init__(self, base: Path, encoder: str, work: Path):
        self.base, self.encoder, self.work = base, encoder, work
        self.folders = {"rad": _folder("VQA_RAD_DIR", "vqa-rad"), "slake": _folder("SLAKE_DIR", "slake")}
        for name, folder in self.folders.items():
            flags = ["--data_dir", str(folder.resolve()), "--output_dir", str(work / name)]
            flags += ["--dataset", "slake"] if name == "slake" else []
            subprocess.run([sys.executable, "fusion.py", *flags], cwd=ROOT, check=True, capture_output=True)

    def rows(self, dataset: str, *files: str) -> list[Row]:
        return [row for file in files for row in read_rows(self.work / dataset / f"{file}.jsonl")]

    def queries(self, dataset: str, rows: list[Row], mode: str, kind: str) -> Queries:
        pictures = self.folders[dataset] / ("images" if dataset == "rad" else "imgs")
        cache = self.work / "cache"
        return compute_queries(rows, self.base, pictures, mode, self.encoder, cache_dir=cache, image_query=kind)


def _folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / "data" / name)
    if not folder.is_dir():
        sys.exit(f"error: {name} not found in {folder}; set {variable}")
    return folder


def fit(queries: Queries, rows: list[Row], mode: str, kind: str) -> Pool:
    """Slots for every domain of the rows, each fitted to its own rows alone, as stage 1 does."""
    dims = [None if part is None else part.shape[1] for part in (queries.text, queries.image)]
    settings = RetrieverSettings(1, {"o_proj": (8, 8)}, *dims, mode, kind, groups=GROUPS, rank=1)
    pool = Pool(settings)
    for task in sorted({row.domain for row in rows}):
        mine = [place for place, row in enumerate(rows) if row.domain == task]
        own = queries.select(torch.tensor(mine))
        weight = {"text": 0.0, "image": 1.0}.get(mode, settings.image_weight)
        keys = fit_keys(own, SLOTS, GROUPS, settings.top_k, weight, seed_of(task, 42, "keys"))
        block, query = pool.append(task, SLOTS), Query(own.text, own.image)
        block.text_keys, block.image_keys = keys.text, keys.image
        block.statistics = TaskStatistics.of(query.joint())
        block.feature_statistics = TaskStatistics.of(query.random_features())
        block.extent = TaskExtent.of(query.evidence(), [rows[place].image for place in mine])
        block.trained = True
    pool.changed()
    return pool


def route(pool: Pool, router: str, queries: Queries) -> Route:
    """The routes by one router."""
    return pool.route(Query(queries.text, queries.image), router=router)


def right(found: Route, rows: list[Row]) -> list[bool]:
    """Whether each row's most probable task is its own."""
    best = found.task_posterior.argmax(-1).tolist()
    return [found.tasks[place] == row.domain for place, row in zip(best, rows, strict=True)]


def by_folds(queries: Queries, rows: list[Row], mode: str, kind: str) -> tuple[dict[str, list[bool]], list[bool]]:
    """Right routes per router, and rows taken for unknown, over ten folds grouped by picture."""
    fold, unknown = torch.tensor(deal([row.image for row in rows], range(FOLDS))), []
    found: dict[str, list[bool]] = {router: [] for router in ROUTERS}
    for number in range(FOLDS):
        keep, leave = (fold != number).nonzero().flatten(), (fold == number).nonzero().flatten()
        made, tested = fit(queries.select(keep), [rows[i] for i in keep], mode, kind), queries.select(leave)
        for router in ROUTERS:
            routes = route(made, router, tested)
            found[router] += right(routes, [rows[i] for i in leave])
            if router == "gaussian":
                unknown += routes.unknown.tolist()
    return found, unknown


def accuracy(data: Data) -> None:
    """Print the table."""
    train, test = data.rows("rad", "train_vqa_rad_combined"), data.rows("rad", "test_vqa_rad")
    slake, slake_test = data.rows("slake", "slake_train_combined"), data.rows("slake", "slake_test")
    print("percent right, with the 95 % interval")
    print(f"{'queries':<26}{'router':<10}{'official test':>21}{'10 folds':>21}{'SLAKE modality':>21}{'unknown':>9}")
    for mode, kind in KINDS:
        name = f"{mode} ({kind})" if "image" in mode else mode
        made = fit(data.queries("rad", train, mode, kind), train, mode, kind)
        others = fit(data.queries("slake", slake, mode, kind), slake, mode, kind)
        tested = data.queries("rad", test, mode, kind), data.queries("slake", slake_test, mode, kind)
        folds, unknown = by_folds(data.queries("rad", train + test, mode, kind), train + test, mode, kind)
        for router in ROUTERS:
            parts = [right(route(made, router, tested[0]), test), folds[router]]
            parts.append(right(route(others, router, tested[1]), slake_test))
            share = f"{100 * sum(unknown) / len(unknown):>8.2f}%" if router == "gaussian" else ""
            print(f"{name:<26}{router:<10}" + "".join(f"{percent(part):>21}" for part in parts) + share, flush=True)


def unknown_inputs(data: Data) -> None:
    """Abdominal VQA-RAD is all that is known; SLAKE's head MRI and chest X-ray come in."""
    known = [row for row in data.rows("rad", "train_vqa_rad_combined") if row.domain == "abd"]
    test = [row for row in data.rows("rad", "test_vqa_rad") if row.domain == "abd"]
    files = ("slake_train_combined", "slake_validate", "slake_test")
    strange = [row for row in data.rows("slake", *files) if is_head_mri(row) or is_chest_x_ray(row)]
    print(
        f"\nonly abdominal VQA-RAD is known ({len(known)} rows); {len(strange)} rows of SLAKE head MRI and chest X-ray"
    )
    print(f"{'queries':<26}{'AUROC, test':>13}{'AUROC, new pictures':>21}{'known rejected':>16}{'noticed':>9}")
    for mode, kind in KINDS:
        queries = data.queries("rad", known + test, mode, kind)
        first = torch.arange(len(known))
        made = fit(queries.select(first), known, mode, kind)
        own = route(made, "gaussian", queries.select(torch.arange(len(known), len(known + test)))).novelty
        theirs = route(made, "gaussian", data.queries("slake", strange, mode, kind)).novelty
        held_out = made.task("abd").extent.distances / made.unknown_gate().limits["abd"]
        name = f"{mode} ({kind})" if "image" in mode else mode
        print(
            f"{name:<26}{auroc(own, theirs):>13.4f}{auroc(held_out, theirs):>21.4f}"
            f"{100 * (own > 1).double().mean():>15.2f}%{100 * (theirs > 1).double().mean():>8.1f}%",
            flush=True,
        )


def is_head_mri(row: Row) -> bool:
    return row.domain == "mri" and str(row.raw.get("location")).startswith("Brain")


def is_chest_x_ray(row: Row) -> bool:
    return row.domain == "xray" and str(row.raw.get("location")).startswith(("Lung", "Chest"))


def percent(found: list[bool]) -> str:
    low, high = wilson(sum(found), len(found))
    return f"{100 * sum(found) / len(found):.2f} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    model_base: str | None = flag(None, "whose tower and embeddings make the queries (default: the tiny base)")
    text_encoder: str = flag("base", "base, minilm, or a sentence encoder's folder")


def main() -> None:
    arguments = parse(Arguments, description=__doc__)
    base = resolve_checkpoint(places_of("phantom").base_model(arguments.model_base))
    with tempfile.TemporaryDirectory() as work:
        data = Data(base, arguments.text_encoder, Path(work))
        print(f"base {base}, text encoder {arguments.text_encoder}")
        accuracy(data)
        unknown_inputs(data)


if __name__ == "__main__":
    run_cli(main)
