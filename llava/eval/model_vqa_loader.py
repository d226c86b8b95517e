"""Answer a question file with a model: batched, left-padded, in chunks, resumable.

    python -m llava.eval.model_vqa_loader --model-path output/llava-vqa-rad_abd --model-base BASE \\
        --question-file data/test_vqa_rad.jsonl --image-folder data/vqa-rad/images --answers-file answers.jsonl

LLaVA's flags, and: any ``--batch-size``; greedy by default; a stage is asked as it was trained (template, answer
suffix, picture mode) unless ``--conv-mode``, ``--answer-suffix`` or ``--image_aspect_ratio`` is given. Killed and
started again with the same command, it goes on where it was and ends with the same file: batches are fixed by the
chunk, not by where the run stopped. The route each answer took is in its ``metadata``. ``--task-id`` (one task for all
rows) and ``--route oracle`` (each row's own domain, where the model has learned it) give the task away, for
comparison; other values of ``--route`` choose a router, ``none`` answers with the base model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llava
from llava.cli import fail, flag, parse
from llava.data.rows import Row, read_rows
from llava.devices import default_device
from llava.eval.answer_file import answer_row, append, appending, batches, chunk_range, model_fingerprint, run_id
from llava.eval.loading_flags import LoadingFlags, PromptFlags
from llava.files import file_sha256
from llava.mm_utils import get_model_name_from_path
from llava.utils import UserError, run_cli

if TYPE_CHECKING:
    from llava.data.prompt import Prompt, PromptEncoder

CACHED_MEGABYTES = 768
"""Memory for preprocessed pictures, about 500 of LLaVA-1.5."""

ORACLE, NO_ROUTE = "oracle", "none"
REFUSAL = "I cannot answer this: the question or the picture is unlike everything I was trained on."


@dataclass(kw_only=True)
class Arguments(PromptFlags, LoadingFlags):
    """LLaVA's flags with its defaults, and this project's routing flags."""

    model_path: str = flag(help="checkpoint folder or hub id")
    model_base: str | None = flag(None, "base model that a light checkpoint is applied to")
    image_folder: str = flag("", "folder of the rows' images")
    question_file: str = flag()
    answers_file: str = "answer.jsonl"
    default_answer_suffix: str = flag("", "for a model that keeps none of its own")
    num_chunks: int = 1
    chunk_idx: int = 0
    temperature: float = flag(0.0, "0 is greedy")
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    batch_size: int = 8
    num_workers: int = flag(0, "processes that read images ahead")
    task_id: str | None = flag(None, "route every question to this task's slots")
    route: str | None = flag(None, f"router to use; {ORACLE!r}: the row's own domain, {NO_ROUTE!r}: no slots")
    refuse_unknown: bool = flag(
        False, "answer questions that fit no known task with a fixed refusal instead of the base model's words"
    )
    seed: int = flag(0, "for a temperature above 0")
    stale: str = flag("refuse", "what to do with another run's answers file", choices=("refuse", "replace"))


def parse_arguments(argv: Sequence[str] | None = None, **defaults: Any) -> Arguments:
    """The command line; ``defaults`` replace those of the flags."""
    arguments = parse(Arguments, argv, __doc__, **defaults)
    for name in ("batch_size", "max_new_tokens", "num_beams"):
        if getattr(arguments, name) < 1:
            fail(f"--{name} must be at least 1")
    if arguments.task_id and arguments.route not in (None, ORACLE):
        fail("--task-id gives the task away, so it goes with --route oracle or none at all")
    return arguments


def main(argv: Sequence[str] | None = None, **defaults: Any) -> None:
    """Answer one chunk of the question file; ``defaults`` replace those of the flags."""
    arguments = parse_arguments(argv, **defaults)
    rows = read_rows(arguments.question_file)
    rows = [rows[number] for number in chunk_range(len(rows), arguments.num_chunks, arguments.chunk_idx)]
    model_id = get_model_name_from_path(arguments.model_path)
    run = run_id(run_settings(arguments))
    with appending(arguments.answers_file, rows, model_id, run, arguments.stale == "replace") as (done, stream):
        if done == len(rows):
            print(f"{arguments.answers_file}: all {done} answers are there")
            return
        check_images(rows[done:], arguments.image_folder)
        speaker = Speaker.load(arguments)
        for batch, replies in answer_rows(speaker, rows, arguments, done):
            answers = [
                answer_row(rows[number], text, model_id, {"run": run, **({"route": route} if route else {})})
                for number, (text, route) in zip(batch, replies, strict=True)
                if number >= done
            ]
            append(stream, answers)
    print(f"{arguments.answers_file}: {len(rows)} answers by {model_id}")


def run_settings(arguments: Any) -> dict[str, Any]:
    """Everything that decides the answers of a chunk set; equal settings mean equal answers."""
    names = "conv_mode answer_suffix num_chunks temperature top_p num_beams max_new_tokens batch_size seed".split()
    names += ["load_8bit", "load_4bit", "task_id", "route", "default_answer_suffix", "image_aspect_ratio"]
    names += [name for name in ("refuse_unknown", "attn_implementation") if vars(arguments).get(name)]
    return {
        "version": llava.__version__,
        "model": model_fingerprint(arguments.model_path),
        "base": model_fingerprint(arguments.model_base) if arguments.model_base else None,
        "question_file": file_sha256(arguments.question_file),
        **{name: getattr(arguments, name) for name in names},
    }


def asked_prompt(arguments: Any) -> dict[str, str | None]:
    """The fields of the prompt that the command line names; None where it leaves them to the checkpoint."""
    given = vars(arguments)
    names = {"conv_mode": "conv_mode", "answer_suffix": "answer_suffix", "aspect_ratio": "image_aspect_ratio"}
    asked = {field: given.get(name) for field, name in names.items()}
    return {field: None if value == "" and field != "answer_suffix" else value for field, value in asked.items()}


def check_prompt_flags(arguments: Any) -> None:
    """Refuse flags of the prompt that name nothing, or nothing that the model can do, before it is loaded.

    Raises:
        UserError: an unknown template or picture mode; ``anyres`` for a model that has no grids for it.
    """
    from llava.checkpoints.weights import resolve_checkpoint
    from llava.conversation import get_conversation
    from llava.data.prompt import check_aspect_ratio
    from llava.model.configs import llava_config

    asked = asked_prompt(arguments)
    if asked["conv_mode"]:
        get_conversation(asked["conv_mode"])
    if asked["aspect_ratio"]:
        check_aspect_ratio(asked["aspect_ratio"])
        folder = resolve_checkpoint(arguments.model_path)
        if (folder / "config.json").is_file():
            check_aspect_ratio(asked["aspect_ratio"], llava_config(folder))


def check_images(rows: Sequence[Row], image_folder: str) -> None:
    """Find a missing picture before the model is loaded.

    Raises:
        UserError: with the first missing file and how many there are.
    """
    names = dict.fromkeys(row.image for row in rows if row.image is not None)
    missing = [name for name in names if not (Path(image_folder) / name).is_file()]
    if missing:
        raise UserError(
            f"image file not found: {Path(image_folder) / missing[0]} ({len(missing)} of {len(names)} are missing; "
            f"check --image-folder)"
        )


def answer_rows(
    speaker: Speaker, rows: Sequence[Row], arguments: Any, done: int = 0
) -> Iterator[tuple[range, list[tuple[str, dict | None]]]]:
    """Answers batch by batch, from the batch that holds row ``done`` on: ``(row numbers, [(text, route), ...])``."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    plan = [batch for batch in batches(len(rows), arguments.batch_size) if batch.stop > done]
    dataset = QuestionDataset(rows, speaker, arguments.image_folder)
    loader = DataLoader(dataset, batch_sampler=plan, num_workers=arguments.num_workers, collate_fn=speaker.collate)
    answered = len(rows) - sum(map(len, plan))
    with tqdm(total=len(rows), initial=answered, unit="question", disable=not sys.stderr.isatty()) as progress:
        for batch, inputs in zip(plan, loader, strict=True):
            torch.manual_seed(arguments.seed + batch.start)  # sampled answers, too, survive a resume
            yield batch, speaker.reply(inputs, arguments)
            progress.update(len(batch))


class QuestionDataset:
    """Rows as model inputs: prompt ids, pixels and the row; many rows ask about one picture, which is kept."""

    def __init__(self, rows: Sequence[Row], speaker: Speaker, image_folder: str):
        self.rows, self.encoder = rows, speaker.encoder(image_folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``input_ids`` (list), ``image`` (``[3, H, W]``, ``[tiles, 3, H, W]`` or None), ``image_size``, ``row``."""
        row = self.rows[number]
        sample = self.encoder.encode(row, answer=False)
        return {"input_ids": sample.input_ids, "image": sample.pixels, "image_size": sample.size, "row": row}


class Speaker:
    """A loaded model with its tokenizer and image processor, and the prompt by which it is asked."""

    def __init__(self, tokenizer: Any, model: Any, image_processor: Any, prompt: Prompt):
        from llava.conversation import get_conversation

        self.tokenizer, self.model, self.image_processor, self.prompt = tokenizer, model, image_processor, prompt
        template = get_conversation(prompt.conv_mode)
        self.stop = (template.sep2 if template.sep_style.name in ("TWO", "LLAMA_2") else template.sep) or None

    @classmethod
    def load(cls, arguments: Any) -> Speaker:
        """Load the checkpoint that the arguments name, with the router and the prompt they ask for.

        Raises:
            UserError: a text-only model, an unknown router, template, picture mode or task.
        """

        from llava.data.prompt import Prompt
        from llava.model.builder import load_pretrained_model

        check_prompt_flags(arguments)
        name = get_model_name_from_path(arguments.model_path)
        tokenizer, model, image_processor, _ = load_pretrained_model(
            arguments.model_path,
            arguments.model_base,
            name,
            load_8bit=arguments.load_8bit,
            load_4bit=arguments.load_4bit,
            device=default_device(arguments.device),
            attn_implementation=arguments.attn_implementation,
        )
        if not hasattr(model, "get_vision_tower"):
            raise UserError(f"{arguments.model_path} is a plain language model, not a LLaVA checkpoint")
        model.eval()
        defaults = {"answer_suffix": vars(arguments).get("default_answer_suffix") or ""}
        prompt = Prompt.of(model.config, name, defaults, **asked_prompt(arguments))
        prompt.tell(model.config)
        choose_router(model, arguments.route)
        if arguments.task_id and arguments.task_id not in known_tasks(model):
            known = ", ".join(known_tasks(model)) or "no slots"
            raise UserError(f"no trained slots for task {arguments.task_id!r}; the model has {known}")
        return cls(tokenizer, model, image_processor, prompt)

    def encoder(self, image_folder: str = "") -> PromptEncoder:
        """What turns rows and conversations into this model's inputs, as training does."""
        from llava.data.prompt import PromptEncoder

        parts = (self.prompt, self.tokenizer, self.image_processor, self.model.config)
        return PromptEncoder(*parts, image_folder, CACHED_MEGABYTES)

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A left-padded batch: ``input_ids`` and ``attention_mask`` ``[batch, length]``, images, sizes, rows."""
        import torch

        length = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros(len(items), length, dtype=torch.long)
        for number, item in enumerate(items):
            start = length - len(item["input_ids"])
            ids[number, start:] = torch.tensor(item["input_ids"], dtype=torch.long)
            mask[number, start:] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "images": _stack_images([item["image"] for item in items]),
            "image_sizes": [item["image_size"] for item in items],
            "rows": [item["row"] for item in items],
        }

    @property
    def pad_id(self) -> int:
        """The padding token; masked, so any valid id serves where the tokenizer has none."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def reply(self, batch: dict[str, Any], arguments: Any, **options: Any) -> list[tuple[str, dict | None]]:
        """Texts and routes of a collated batch; ``options`` go to ``generate``."""
        tasks = given_tasks(batch["rows"], arguments)
        known = known_tasks(self.model)
        if tasks is None or not known:
            return self._generate(batch, arguments, None, **options)
        replies: dict[int, tuple[str, dict | None]] = {}
        for given in (True, False):  # tasks that the model has not learned yet are routed freely
            numbers = [number for number, task in enumerate(tasks) if (task in known) == given]
            if numbers:
                chosen = [tasks[number] for number in numbers] if given else None
                part = self._generate(_select(batch, numbers), arguments, chosen, **options)
                replies.update(zip(numbers, part, strict=True))
        return [replies[number] for number in range(len(tasks))]

    def _generate(
        self, batch: dict[str, Any], arguments: Any, tasks: list[str] | None, **options: Any
    ) -> list[tuple[str, dict | None]]:
        from llava.mm_utils import KeywordsStoppingCriteria

        model, rows = self.model, batch["rows"]
        more: dict[str, Any] = options if tasks is None else {**options, "tasks": tasks}
        if self.stop and self.stop.strip() and self.stop != self.tokenizer.eos_token:
            more["stopping_criteria"] = [KeywordsStoppingCriteria([self.stop], self.tokenizer, batch["input_ids"])]
        if arguments.temperature > 0:
            more |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
        output = model.generate(
            batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            images=_to_device(batch["images"], model.device),
            image_sizes=batch["image_sizes"],
            questions=[row.question for row in rows],
            do_sample=arguments.temperature > 0,
            num_beams=arguments.num_beams,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=self.pad_id,
            **more,
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        route = getattr(model, "last_route", None)
        routes = [None if route is None else route.describe(number) for number in range(len(rows))]
        if tasks is not None:
            routes = [None if found is None else {**found, "task_given": True} for found in routes]
        refuse = vars(arguments).get("refuse_unknown")
        return [
            (REFUSAL if refuse and found and found.get("unknown") else self.clean(text), found)
            for text, found in zip(texts, routes, strict=True)
        ]

    def clean(self, text: str) -> str:
        """The answer without the template's end mark and what a model says after it."""
        return (text.split(self.stop)[0] if self.stop and self.stop.strip() else text).strip()


def given_tasks(rows: Sequence[Row], arguments: Any) -> list[str] | None:
    """The task of each row where the arguments give it away, else None.

    Raises:
        UserError: ``--route oracle`` and a row without a domain.
    """
    if arguments.task_id:
        return [arguments.task_id] * len(rows)
    if arguments.route != ORACLE:
        return None
    for row in rows:
        if row.domain is None:
            raise UserError(f"--route oracle needs each row's domain; question_id {row.id!r} has none (use --task-id)")
    return [row.domain for row in rows]


def known_tasks(model: Any) -> list[str]:
    """Tasks that the model has trained slots for, in slot order; none for a base model."""
    retriever = getattr(model, "retriever", None)
    return [] if retriever is None else list(dict.fromkeys(retriever.layout().allowed_tasks))


def choose_router(model: Any, route: str | None) -> None:
    """Make the model route as ``--route`` says: a router's name, ``none``, or as the checkpoint does by default.

    Raises:
        UserError: an unknown router.
    """
    from llava.slots.routers import ROUTERS

    if route in (None, ORACLE):
        return
    if route == NO_ROUTE:
        model.retriever = None
        return
    if route not in ROUTERS:
        raise UserError(f"--route {route!r} is not a router (choose from {', '.join([*ROUTERS, NO_ROUTE])})")
    if model.retriever is not None:  # a base model has none
        model.retriever.router_name = route
        model.retriever.changed()


def _select(batch: dict[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """Some rows of a collated batch."""
    picked = {name: [value[number] for number in numbers] for name, value in batch.items() if isinstance(value, list)}
    tensors = {name: batch[name][list(numbers)] for name in ("input_ids", "attention_mask")}
    images = batch["images"]
    if not isinstance(images, list):
        picked["images"] = None if images is None else images[list(numbers)]
    return {**picked, **tensors}


def _stack_images(images: list[Any]) -> Any:
    """One tensor when all shapes agree, else the list; None when the batch has no picture."""
    import torch

    if all(image is None for image in images):
        return None
    same = all(image is not None and image.shape == images[0].shape for image in images)
    return torch.stack(images) if same else images


def _to_device(images: Any, device: Any) -> Any:
    if isinstance(images, list):
        return [_to_device(image, device) for image in images]
    return None if images is None else images.to(device)


if __name__ == "__main__":
    run_cli(main)
