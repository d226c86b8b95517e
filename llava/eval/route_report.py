"""How well questions find their task: confusion, accuracy per domain, calibration, worst mistakes, unknown inputs.

    python -m llava.eval.route_report --slots output/prompt-key/merged_prompt_key.pth --question-file \\
        data/test_vqa_rad.jsonl --image-folder data/vqa-rad/images --output_dir output/route

``--slots`` is a key file, a merged file or a stage checkpoint's folder. Each router in ``--routers`` is measured on the
same queries; the first one gets the mistakes and the picture. Rows of domains that are no task (and those of
``--unknown-file``) measure how well unknown inputs are noticed; rows with no domain, or several, are left out. Text
goes to the terminal, ``route_report.json`` and ``route_report.png`` to ``--output_dir``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.cli import flag, parse
from llava.files import atomic_write
from llava.utils import UserError, quiet_libraries, run_cli


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    slots: str = flag(help="key file, merged file or stage checkpoint folder")
    question_file: str = flag()
    image_folder: str = ""
    follow_links: bool = flag(False, "open pictures that are links out of their folder")
    unknown_file: str | None = flag(None, "rows that belong to none of the tasks")
    unknown_images: str | None = flag(None, "their picture folder (default: --image-folder)")
    model_base: str | None = flag(None, "default: the one the slots name")
    routers: list[str] | None = flag(None, "default: the slots' own, then keys, gaussian, ridge")
    mistakes: int = flag(10, "how many to show", least=0)
    output_dir: str = "output/route"
    device: str = "cpu"
    cache_dir: str = flag("output/cache/queries", "where computed queries are kept")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(Arguments, argv, __doc__)
    quiet_libraries()
    from llava.devices import check_device
    from llava.eval.route_picture import draw
    from llava.eval.route_scores import score_routes, worst_mistakes
    from llava.slots.names import ROUTERS

    check_device(arguments.device)
    for name in arguments.routers or ():
        ROUTERS.get(name)  # refuses a name that is no router, before queries are computed
    pool, base = load_pool(arguments.slots, arguments.model_base)
    rows, queries = read_queries(arguments, pool, base)
    if not {row.domain for row in rows} & set(pool.names):
        raise UserError(f"{arguments.question_file}: no row's domain is a task of the slots ({pool.names})")
    routers = arguments.routers or list(dict.fromkeys([pool.settings.router, "keys", "gaussian", "ridge"]))
    routes = {name: route_rows(pool, name, rows, queries) for name in routers}
    scores = {name: score_routes(found) for name, found in routes.items()}
    first = routers[0]
    mistakes = [_mistake(rows[row], routes[first], row) for row in worst_mistakes(routes[first], arguments.mistakes)]
    settings = pool.settings
    report = {
        "slots": str(arguments.slots),
        "question_file": arguments.question_file,
        "unknown_file": arguments.unknown_file,
        "queries": {"mode": settings.query_mode, "image": settings.image_query, "text": settings.encoder.get("name")},
        "routers": scores,
        "mistakes": mistakes,
    }
    print(report_text(report, first))
    folder = Path(arguments.output_dir)
    with atomic_write(folder / "route_report.json") as stream:
        json.dump(report, stream, indent=1)
    title = f"{first} router, queries {settings.query_mode}: {100 * scores[first]['accuracy']['value']:.1f} % right"
    points, keys = joint_points(pool, queries)
    written = f"written to {folder / 'route_report.json'}"
    if draw(routes[first], scores[first], points, keys, title, folder / "route_report.png"):
        print(f"{written} and {folder / 'route_report.png'}")
    else:
        print(f"{written}; no picture: matplotlib is not installed (pip install matplotlib)")


def load_pool(place: str, model_base: str | None) -> tuple[Any, Path]:
    """The pool and its base model's folder. Where no task is trained (key files), all take part."""
    from llava.checkpoints.checkpoint import Checkpoint
    from llava.checkpoints.weights import resolve_checkpoint, resolve_recorded
    from llava.slots.edit import read_place

    slots = read_place(place)
    name = model_base or slots.base.get("path")
    if not name:
        raise UserError(f"{place} names no base model; give --model-base")
    base = resolve_checkpoint(model_base or resolve_recorded(name, Path(place)))
    if found := Checkpoint(base).other_than(slots.base):
        raise UserError(f"{place} belongs to another base than {base}: {found}; give the right --model-base")
    if not any(task.trained for task in slots.tasks):
        for task in slots.tasks:
            task.trained = True
    slots.check_shapes()
    slots.changed()
    return slots, base


def read_queries(arguments: Arguments, slots: Any, base: Path) -> tuple[list, Any]:
    """Rows of the question file and of the unknown file, with their queries."""
    import torch

    from llava.continual.queries import compute_queries
    from llava.data.rows import read_rows
    from llava.inside import opened_to_links
    from llava.slots.encoders import same_encoder
    from llava.slots.queries import Queries

    files = [(arguments.question_file, arguments.image_folder)]
    if arguments.unknown_file:
        files.append((arguments.unknown_file, arguments.unknown_images or arguments.image_folder))
    rows, parts, settings = [], [], slots.settings
    for file, folder in files:
        given = read_rows(file)
        mine = [row for row in given if row.domain is not None]
        if not mine:
            raise UserError(f"{file}: no row has one domain, so no route can be judged (add 'domain' to the rows)")
        if len(mine) < len(given):
            print(f"{file}: {len(given) - len(mine)} of {len(given)} rows have no domain, or several: left out")
        rows += mine
        parts.append(
            compute_queries(
                mine,
                base,
                opened_to_links(folder, arguments.follow_links) or "",
                settings.query_mode,
                settings.encoder.get("name", "base"),
                device=arguments.device,
                cache_dir=arguments.cache_dir or None,
                image_query=settings.image_query,
                aspect_ratio=slots.prompt.get("aspect_ratio"),
            )
        )
    if settings.uses_text and not same_encoder(parts[0].encoder, settings.encoder):
        raise UserError(f"the slots were fitted with text encoder {settings.encoder}, here it is {parts[0].encoder}")
    joined = [
        None if getattr(parts[0], kind) is None else torch.cat([getattr(part, kind) for part in parts])
        for kind in ("text", "image")
    ]
    return rows, Queries(*joined, parts[0].encoder)


def route_rows(pool: Any, router: str, rows: Sequence, queries: Any) -> Any:
    """What ``router`` makes of the rows."""
    from llava.eval.route_scores import RoutedRows
    from llava.slots.queries import Query

    route = pool.route(Query(queries.text, queries.image), router=router)
    slot_tasks = [task.name for task in pool.tasks for _ in range(task.count)]
    return RoutedRows(
        route.tasks,
        [row.domain for row in rows],
        route.task_posterior.numpy(),
        None if route.novelty is None else route.novelty.numpy(),
        route.slot_indices.numpy(),
        slot_tasks,
    )


def joint_points(pool: Any, queries: Any) -> tuple[Any, Any]:
    """Queries ``[rows, dim]`` and keys ``[pool, dim]`` in the space of the closed-form routers."""
    from llava.slots.key_scores import joined
    from llava.slots.queries import Query

    def flat(kind: str):
        keys = joined([getattr(task, f"{kind}_keys") for task in pool.tasks])
        return None if keys is None else keys.permute(1, 0, 2).flatten(1)

    keys = Query(flat("text"), flat("image")).joint()
    return Query(queries.text, queries.image).joint().numpy(), keys.numpy()


def _mistake(row: Any, routes: Any, place: int) -> dict:
    routed = routes.routed[place]
    return {
        "question_id": row.id,
        "image": row.image,
        "question": row.question,
        "domain": row.domain,
        "routed_to": routed,
        "probability": round(float(routes.posterior[place].max()), 4),
    }


def report_text(report: dict, first: str) -> str:
    """The report for a terminal."""
    queries = report["queries"]
    about = f"queries {queries['mode']} (text {queries['text']}, image {queries['image']})"
    lines = [f"{report['question_file']}: routes by {report['slots']}, {about}", ""]
    domains = list(next(iter(report["routers"].values()))["per_domain"])
    lines.append(f"{'router':<10} {'all':>22}" + "".join(f"{domain:>22}" for domain in domains) + f"{'ECE':>8}")
    for name, scores in report["routers"].items():
        cells = [scores["accuracy"], *[scores["per_domain"][domain] for domain in domains]]
        lines.append(f"{name:<10}" + "".join(f" {_percent(cell):>21}" for cell in cells) + f"{scores['ece']:>8.4f}")
    scores = report["routers"][first]
    tasks = list(next(iter(scores["confusion"].values())))
    lines += ["", f"{first}: true domain by row, routed to:", " " * 12 + "".join(f"{task:>10}" for task in tasks)]
    for domain, counts in scores["confusion"].items():
        lines.append(f"{domain:<12}" + "".join(f"{counts[task]:>10}" for task in tasks))
    lines += ["", "slots that at least 5 % of a task's questions select, entropy of the selection:"]
    for task, use in scores["slots"].items():
        lines.append(f"  {task:<12} {use['used']} of {use['slots']}, {use['entropy']:.3f}")
    lines += ["", *_novelty_lines(scores["novelty"])]
    if report["mistakes"]:
        lines += ["", f"most confident mistakes of {first}:"]
        for found in report["mistakes"]:
            lines.append(
                f"  {found['domain']} -> {found['routed_to']} ({100 * found['probability']:.1f} %)  "
                f"{found['image']}  {found['question']}"
            )
    return "\n".join(lines)


def _novelty_lines(novelty: dict | None) -> list[str]:
    if novelty is None:
        return ["unknown inputs: not calibrated"]
    lines = [f"counted as unknown: {_percent(novelty['rejected_known'])} of the tasks' rows"]
    if novelty["detected_unknown"]["n"]:
        lines[0] += f", {_percent(novelty['detected_unknown'])} of other rows; AUROC {novelty['auroc']:.4f}"
    return lines


def _percent(cell: dict) -> str:
    """``99.6 [98.4, 99.9]`` in percent."""
    if not cell["n"]:
        return "-"
    low, high = cell["interval"]
    return f"{100 * cell['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    run_cli(main)
