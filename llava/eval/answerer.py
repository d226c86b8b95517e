"""Answers of one base model and of any stages over it, apart from any command line.

    answerer = Answerer.load("output/tiny-base")
    answerer.use("output/llava-vqa-rad_abd")
    for reply in answerer.answer(rows, Generation(max_new_tokens=64), "data/vqa-rad/images"):
        print(reply.text, reply.route)

The base is loaded once. Light stages are put on it and taken off again, which leaves nothing behind; what has weights
of its own (a self-contained stage, a LoRA, a projector) is loaded by itself, in the base's place. Questions of like
length are answered together, which changes no answer, and the replies come in the order in which they were asked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import SLOTS_FILE
from llava.checkpoints.weights import resolve_recorded
from llava.conversation import get_conversation, plain_question
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import Row
from llava.data.samples import one_or_all
from llava.eval.answer_file import batches
from llava.eval.generation import (
    NO_ROUTE,
    ORACLE,
    REFUSAL,
    WINDOW,
    Generation,
    Loading,
    Reply,
    check_route,
    given_tasks,
    sorted_batches,
)
from llava.eval.loaded import Loaded, check_asked, check_task, is_light
from llava.eval.question_cache import BlankEncoder, QuestionCache
from llava.inside import Folder
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path
from llava.model.builder import attach_slots, check_slots_fit, tell_prompt
from llava.model.configs import llava_config
from llava.model.saving import refuse_lost_weights
from llava.model.vision.features import on_device
from llava.padding import pad
from llava.slots.adapter import read_memory
from llava.slots.names import ROUTERS
from llava.slots.picture_query import joined_query
from llava.slots.pool import Pool
from llava.utils import UserError, rank0_print


class Answerer:
    """A model that answers questions: a base, and what is put on it.

    Args:
        base: folder or hub name of the model under the stages; ``None``: what each stage names. Nothing is loaded yet.
        cache: what is known of the questions already.
    """

    def __init__(self, base: str | None, loading: Loading | None = None, cache: QuestionCache | None = None) -> None:
        self.base, self.loading = base, loading or Loading()
        self.cache = cache or QuestionCache()
        self._prompt: Prompt | None = None
        self._choices = 0
        self._loaded: Loaded | None = None
        self._route: str | None = None
        self._task: str | None = None

    @classmethod
    def load(cls, base: str, loading: Loading | None = None) -> Answerer:
        """An answerer whose base is in memory and answers."""
        return cls(base, loading).use(None)

    @property
    def model(self) -> Any:
        """The model in memory."""
        return self._in_memory.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._in_memory.tokenizer

    @property
    def prompt(self) -> Prompt:
        """How it is asked."""
        if self._prompt is None:
            raise UserError("no model is chosen; say which one answers with use()")
        return self._prompt

    @property
    def _in_memory(self) -> Loaded:
        if self._loaded is None:
            raise UserError("no model is loaded; say which one answers with use()")
        return self._loaded

    # -- which model -------------------------------------------------------------------------------------------------

    def use(
        self,
        stage: str | None,
        route: str | None = None,
        task: str | None = None,
        defaults: dict[str, Any] | None = None,
        **asked: Any,
    ) -> Answerer:
        """Let a stage answer from now on, or with ``None`` the base; returns the answerer.

        Where this fails, nothing is chosen any more and nothing is left on the base.

        Args:
            stage: folder or hub name of any checkpoint.
            route: a router's name, ``oracle`` (each row's own domain, where it is learned), ``none`` (the base
                answers), or ``None``: as the stage was trained.
            task: every question goes to this task's slots.
            defaults, asked: fields of the prompt, where the stage keeps none and whatever it keeps (``Prompt.of``).

        Raises:
            UserError: not a checkpoint, or one that does not fit its base; a text-only model; an unknown router, task,
                template or picture mode.
        """
        self._prompt = None
        self._choices += 1
        try:
            self._prompt = self._put_on(stage, route, task, defaults or {}, asked)
        except BaseException:
            if self._loaded is not None:
                self._loaded.clear()
            raise
        template = get_conversation(self._prompt.conv_mode)
        self._stop = (template.sep2 if template.sep_style.name in ("TWO", "LLAMA_2") else template.sep) or None
        return self

    def _put_on(
        self, stage: str | None, route: str | None, task: str | None, defaults: dict[str, Any], asked: dict[str, Any]
    ) -> Prompt:
        """Make the model in memory the one that ``use`` is asked for; how it is asked."""
        place = stage or self.base
        if place is None:
            raise UserError("there is no base model; give one, or a stage")
        check_route(route)
        checkpoint = Checkpoint.open(place, get_model_name_from_path(place))
        check_asked(checkpoint, asked)
        if stage is not None and is_light(checkpoint):
            refuse_lost_weights(checkpoint)
            slots = Pool.read(checkpoint.folder / SLOTS_FILE)
            recorded = slots.base.get("path")
            if not self.base and not recorded:
                raise UserError(f"{place} holds only slots; give the base model they were trained on as --model-base")
            base = self.base or resolve_recorded(str(recorded), checkpoint.folder)
            under = Checkpoint.open(base)
            check_slots_fit(llava_config(under), slots, under)
            check_task(task, [one.name for one in slots.selectable])
            loaded = self._ready(base, None)
            attach_slots(loaded.model, slots, under, read_memory(checkpoint.folder), self.cache.encoder)
            tell_prompt(loaded.model.config, slots, base)
        else:
            loaded = self._ready(place, self.base if stage is not None and stage != self.base else None)
            if loaded.adapter is not None:
                loaded.model.attach_adapter(loaded.adapter)
        self._choose(route, task)
        prompt = Prompt.of(loaded.model.config, get_model_name_from_path(place), defaults, **asked)
        prompt.tell(loaded.model.config)
        return prompt

    def _ready(self, place: str, base: str | None) -> Loaded:
        """The model of ``place``, loaded or in memory already, with nothing on it."""
        key = (place, base)
        if self._loaded is None or self._loaded.key != key:
            self._loaded = None  # two models may not fit into the memory
            gc.collect()
            self._loaded = Loaded.load(place, base, self.loading, self.cache)
            if self.base is not None and place != self.base:
                rank0_print(f"{place}: has weights of its own, so it was loaded by itself")
        self._loaded.clear()
        self.cache.device = str(self._loaded.model.device)
        return self._loaded

    def _choose(self, route: str | None, task: str | None) -> None:
        self._route, self._task = route, task
        if route == NO_ROUTE:
            self.model.detach_adapter()
        adapter = self.model.retriever
        if adapter is not None:  # a base model has none
            adapter.router_name = adapter.settings.router if route in (None, ORACLE) else route
            if adapter.router_name == ORACLE:  # a stage that was trained to be given the task
                self._route = ORACLE
        check_task(task, self.known_tasks)

    @property
    def known_tasks(self) -> list[str]:
        """Tasks that the model has trained slots for, in slot order; none for a base model."""
        adapter = self.model.retriever
        return [] if adapter is None else adapter.known_tasks

    # -- answers -----------------------------------------------------------------------------------------------------

    def encoder(self, image_folder: Folder = "", blank: bool = False) -> PromptEncoder:
        """What turns rows and conversations into this model's inputs, as training does; or with blanks for pictures."""
        loaded = self._in_memory
        parts = (self.prompt, loaded.tokenizer, loaded.image_processor, loaded.model.config)
        return (BlankEncoder if blank else PromptEncoder)(*parts, image_folder, cache_megabytes=0)

    def answer(
        self,
        rows: Sequence[Row],
        generation: Generation | None = None,
        image_folder: Folder = "",
        done: int = 0,
        blank: bool = False,
        answered: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Reply]:
        """Replies to ``rows[done:]``, in order, as they come; with ``blank`` a blank stands for every picture.

        Batches depend on the rows and the batch size alone: with ``done`` rows answered before, what follows is what
        would have followed. Questions of like length are answered together, so replies come in bursts: ``answered`` is
        told how many each batch has answered.

        Raises:
            UserError: a picture cannot be read, or a row has none of the tasks that ``use`` was told to go by.
            RuntimeError: ``use`` has chosen another model before the last reply came.
        """
        generation = generation or Generation()
        return self._answers(rows, generation, (image_folder, blank), done, self._choices, answered)

    def _answers(
        self,
        rows: Sequence[Row],
        generation: Generation,
        pictures: tuple[Folder, bool],
        done: int,
        choice: int,
        answered: Callable[[int], None],
    ) -> Iterator[Reply]:
        self._still(choice)
        encoder = self.encoder(*pictures)
        self.cache.look_with(self.model, *self._in_memory.key)
        tasks = given_tasks(rows, self._route, self._task)
        encoder.check(rows)
        self.cache.encode_ahead(rows, self.model.retriever)
        with ThreadPoolExecutor(max(generation.workers, 1)) as readers:
            for window in batches(len(rows), generation.batch_size * self._window):
                if window.stop <= done:
                    continue
                ids = {number: encoder.tokens(rows[number], answer=False)[0] for number in window}
                plan = sorted_batches(window, ids, generation.batch_size, done)
                following = max(window.start, done)
                waiting: dict[int, Reply] = {}
                for place, batch in enumerate(plan):
                    self._still(choice)
                    if generation.workers:
                        for later in plan[place : place + 2]:
                            self.cache.read_ahead([rows[number] for number in later], encoder, readers)
                    if generation.temperature > 0:
                        torch.manual_seed(generation.seed + min(batch))  # sampled answers, too, survive a resume
                    asked = [rows[number] for number in batch]
                    inputs = self._inputs(asked, [ids[number] for number in batch], encoder)
                    replies = self._generate(inputs, generation, [tasks[number] for number in batch])
                    waiting.update(zip(batch, replies, strict=True))
                    answered(sum(number >= done for number in batch))  # the rest were answered before
                    while following in waiting:
                        yield waiting[following]
                        following += 1

    def _still(self, choice: int) -> None:
        if choice != self._choices:
            raise RuntimeError("another model was chosen while answers were still to come; take them all first")

    @property
    def _window(self) -> int:
        """Batches among which questions are put in order; one where the batch decides, which must stay as it came."""
        adapter = self.model.retriever
        if adapter is None or adapter.router_name == ORACLE:
            return WINDOW
        return 1 if ROUTERS.get(adapter.router_name).depends_on_batch else WINDOW

    def ask(
        self,
        turns: Sequence[tuple[str, str]],
        pictures: Sequence[Any],
        generation: Generation,
        system: str | None = None,
        **options: Any,
    ) -> Reply:
        """The answer to the last human turn of a conversation about ``pictures`` (RGB, opened).

        Args:
            turns: ``("human", text)``, ``("gpt", text)``, …; the first human turn holds the ``<image>`` marks.
            system: replaces the template's system text.
            options: further arguments for ``generate``, such as a streamer.
        """
        encoder = self.encoder()
        ids, _ = encoder.conversation(turns, len(pictures), system)
        question = plain_question(turns[-1][1])
        inputs = {
            **self._padded([ids]),
            "images": [[pixels.to(self.model.device) for pixels in encoder.pixels(pictures)]] if pictures else None,
            "image_sizes": [[picture.size for picture in pictures]],
            "rows": [Row(0, (), (("human", question),), (), None, {})],
        }
        (reply,) = self._generate(inputs, generation, [self._task], **options)
        return reply

    def _inputs(self, rows: Sequence[Row], ids: Sequence[list[int]], encoder: PromptEncoder) -> dict[str, Any]:
        """A batch: ids and mask ``[batch, length]``, features and image queries of the pictures, sizes, rows."""
        model, adapter = self.model, self.model.retriever
        sights = [self.cache.look(row, encoder, model) for row in rows]
        inputs = {
            **self._padded(ids),
            "image_features": on_device([[sight.features for sight in seen] for seen in sights], model.device),
            "image_sizes": [one_or_all([sight.size for sight in seen]) for seen in sights],
            "picture_names": [self.cache.names(row, encoder) for row in rows],
            "rows": rows,
        }
        if adapter is not None and adapter.active and adapter.settings.uses_images:
            settings = adapter.settings
            blank = torch.zeros(settings.image_dim)
            kind = settings.image_query
            queries = [
                joined_query(kind, [sight.queries[kind] for sight in seen]) if seen else blank for seen in sights
            ]
            inputs["image_query"] = torch.stack(queries)  # on the host, where routes are decided
        return inputs

    def _padded(self, ids: Sequence[list[int]]) -> dict[str, Tensor]:
        padded, mask = pad([torch.tensor(row) for row in ids], "left", self._pad_id)
        return {"input_ids": padded, "attention_mask": mask.long()}  # on the host, where splicing is planned

    @property
    def _pad_id(self) -> int:
        """The padding token; masked, so any valid id serves where the tokenizer has none."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def _generate(
        self, inputs: dict[str, Any], generation: Generation, tasks: Sequence[str | None], **options: Any
    ) -> list[Reply]:
        """Replies of one batch; tasks that the model has not learned yet are routed freely."""
        model, rows = self.model, inputs.pop("rows")
        given = [task if task in self.known_tasks else None for task in tasks]
        more = {**inputs, **options}
        if any(given):
            more["tasks"] = given
        if self._stop and self._stop.strip() and self._stop != self.tokenizer.eos_token:
            end = KeywordsStoppingCriteria([self._stop], self.tokenizer, inputs["input_ids"])
            more["stopping_criteria"] = [*options.get("stopping_criteria", ()), end]
        if generation.temperature > 0:
            more |= {"temperature": generation.temperature, "top_p": generation.top_p}
        output = model.generate(
            questions=[row.question for row in rows],
            do_sample=generation.temperature > 0,
            num_beams=generation.num_beams,
            max_new_tokens=generation.max_new_tokens,
            pad_token_id=self._pad_id,
            **more,
        )
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        route = model.last_route
        told = None if route is None else route.on_host()
        routes = [None if told is None else told.describe(number, row.domain) for number, row in enumerate(rows)]
        return [
            Reply(
                row,
                REFUSAL if generation.refuse_unknown and found and found.get("unknown") else self.clean(text),
                found,
            )
            for row, text, found in zip(rows, texts, routes, strict=True)
        ]

    def clean(self, text: str) -> str:
        """The answer without the template's end mark and what a model says after it."""
        return (text.split(self._stop)[0] if self._stop and self._stop.strip() else text).strip()
