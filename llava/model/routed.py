"""What a model does about routes: it holds the adapter, and settles for each call which decision holds.

At a prefill the question decides: the one that is given, or the one that stands in the prompt (``llava.model.asked``).
Later steps and embeddings made before keep the decision of their prefill (``llava.model.decision``). Where neither is
known the call is refused: the base model answers only where ``route="none"`` says so, or no adapter is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from llava.devices import OnHost
from llava.model.asked import QuestionReader
from llava.model.decision import (
    NO_ROUTE,
    Decision,
    EmbeddingRoutes,
    LastRoute,
    Prefill,
    cached_length,
    carried,
    carry,
)
from llava.slots.adapter import Adapter
from llava.slots.offsets import ARGUMENT, install_offset_hooks
from llava.slots.queries import Query
from llava.slots.route import Route

_ROUTE_OR_NONE = 'give a route decided before (route=model.last_route), or route="none"'
_HOW = f"give questions=[...] (or text_query); else {_ROUTE_OR_NONE}"


@dataclass
class Asked:
    """What a caller says of the questions, as ``forward`` and ``generate`` take it."""

    questions: Sequence[str] | None = None
    text_query: Any = None  # a tensor, or one ``OnHost``
    image_query: Any = None
    tasks: Sequence[str | None] | None = None
    route: Route | Decision | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.questions, str):
            self.questions = [self.questions]
        if isinstance(self.tasks, str):
            self.tasks = [self.tasks]
        if isinstance(self.text_query, OnHost):
            self.text_query = self.text_query.tensor
        if isinstance(self.image_query, OnHost):
            self.image_query = self.image_query.tensor

    def check_route(self, rows: int) -> None:
        """``ValueError`` for a route of other questions: it has a row for each of ``rows``, or one for all of them."""
        if isinstance(self.route, Route) and len(self.route.slot_indices) not in (1, rows):
            raise ValueError(f"the route is of {len(self.route.slot_indices)} question(s), for {rows} prompt(s)")

    def check(self, rows: int) -> None:
        """``ValueError`` where there is not one of each for each of ``rows``, or a question is no text."""
        given: dict[str, Any] = {"question(s)": self.questions, "text_query row(s)": self.text_query}
        given |= {"image_query row(s)": self.image_query, "task(s)": self.tasks}
        for what, values in given.items():
            if values is not None and len(values) != rows:
                raise ValueError(f"{len(values)} {what} for {rows} prompt(s)")
        for row, question in enumerate(self.questions or ()):
            if not isinstance(question, str):
                raise ValueError(f"the question of row {row} is {question!r}; give texts, or no questions at all")


class Routed:
    """Mix-in of a causal language model: an adapter, and the decisions of its calls."""

    retriever: Adapter | None
    tokenizer: Any
    config: Any
    device: Any

    def init_routing(self) -> None:
        """Called by the back-end's ``__init__``: no adapter yet."""
        self.retriever = None
        self._question_reader: QuestionReader | None = None
        self._last = LastRoute()
        self._latest: Route | None = None
        self._embedding_routes = EmbeddingRoutes()
        self._offset_hooks: list = []

    @property
    def last_route(self) -> Route | None:
        """The route of this thread's latest ``generate`` or ``prepare_inputs_labels_for_multimodal``, ``None`` where
        the base model answered; in a thread that has called neither, of the latest call of all."""
        return self._last.route if self._last.known else self._latest

    def attach_adapter(self, adapter: Adapter) -> None:
        """Let ``adapter`` act from the next forward pass on, instead of the one before."""
        self.detach_adapter()
        cast(nn.Module, adapter).to(self.device)
        self.retriever = adapter
        self.config.retriever = adapter.settings.to_dict()
        model: Any = self
        decoder = model.get_model()
        self._offset_hooks = install_offset_hooks(decoder.layers, adapter.settings.targets)
        self._offset_hooks.append(decoder.register_forward_pre_hook(self._route_decoder, with_kwargs=True))

    def detach_adapter(self) -> None:
        """Be the base model again: no hook and no entry in the config is left."""
        for hook in self._offset_hooks:
            hook.remove()
        self._offset_hooks = []
        self.retriever = None
        self._settle(None)
        self._embedding_routes.forget()
        vars(self.config).pop("retriever", None)

    def route(self, text_query: Tensor | None, image_query: Tensor | None, tasks=None) -> Route | None:
        """The route of each sample, or ``None`` when no slot may be selected (the base model answers)."""
        if self.retriever is None or not self.retriever.active:
            return None
        return self.retriever.decide(Query(text_query, image_query), tasks)

    def _route_decoder(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the decoder runs: where it is called by itself (attribution tools do), it too follows a route."""
        if ARGUMENT in kwargs:  # ``forward`` has seen to it
            return None
        kwargs, args = dict(zip(inspect.signature(decoder.forward).parameters, args)) | kwargs, ()
        asked, cache = Asked(route=kwargs.pop("route", None)), kwargs.get("past_key_values")
        ids, embeds, mask = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
        if cached_length(cache):
            decision = self._continued(asked, carried(cache))
        else:
            decision = self._starting(self._begun(asked, ids, embeds, mask, None, None, None), embeds)
            carry(cache, Prefill(decision, None))
        given = cast(Tensor, ids if embeds is None else embeds)
        rows, past = len(given), cached_length(cache)
        action = decision.action(rows, decoder.embed_tokens.weight.dtype if embeds is None else embeds.dtype)
        if embeds is None and action.prefix is not None and not cached_length(cache):
            raise ValueError(
                "this model's route puts embeddings in front of the prompt; call the model, not its decoder"
            )
        kwargs[ARGUMENT] = decision.placed(action.offset, rows, given.shape[1], past)
        return args, kwargs

    # -- decisions -------------------------------------------------------------------------------------------------

    def _settle(self, route: Route | None) -> None:
        self._last.set(route)
        self._latest = route

    def _given(self, asked: Asked) -> Decision | None:
        """The decision that needs no question: one that the caller gives, or that there is nothing to decide."""
        if isinstance(asked.route, Decision):
            return asked.route
        if isinstance(asked.route, Route):
            return Decision(asked.route, self.retriever)
        if asked.route not in (None, NO_ROUTE):
            raise ValueError(f"route is {asked.route!r}; give a Route, or {NO_ROUTE!r} for the base model's answer")
        if asked.route == NO_ROUTE or self.retriever is None or not self.retriever.active:
            return Decision(None, self.retriever)
        return None

    def _continued(self, asked: Asked, before: Prefill | None) -> Decision:
        """The decision of a step whose cache is filled: the prefill's, unless a route is given.

        Raises:
            ValueError: another program filled the cache, or it was filled under another adapter.
        """
        if (given := self._given(asked)) is not None:
            return given
        if before is None or before.decision.adapter is not self.retriever:
            raise ValueError(f"nothing is known of the route that filled this cache: {_ROUTE_OR_NONE}")
        return before.decision

    def _begun(
        self,
        asked: Asked,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        features: list[list[Tensor]] | None,
        images: Any,
    ) -> Decision:
        """The decision of a prefill: by what is given, by the prompt, or by where the embeddings come from.

        Raises:
            ValueError: none of these tells it, or there are not as many questions, tasks or queries as rows.
        """
        if (given := self._given(asked)) is not None:
            asked.check_route(len(inputs_embeds if input_ids is None else input_ids))  # type: ignore[arg-type]
            return given
        rows = len(inputs_embeds if input_ids is None else input_ids)  # type: ignore[arg-type]
        asked.check(rows)
        adapter = self.retriever
        assert adapter is not None  # _given
        settings = adapter.settings
        text_known = asked.questions is not None or asked.text_query is not None or not settings.uses_text
        picture_known = asked.image_query is not None or features is not None or not settings.uses_images
        if input_ids is None and not (text_known and picture_known):
            return Decision(self._route_of(inputs_embeds), adapter)
        text_query, questions = asked.text_query, asked.questions
        if text_query is None and settings.uses_text:
            if questions is None:
                questions = self._read_questions(input_ids, attention_mask, labels)
            text_query = adapter.encode_questions(questions)
        image_query = asked.image_query
        if image_query is None:
            model: Any = self
            image_query = model.image_query([[] for _ in range(rows)] if features is None else features, images)
        decision = Decision(self.route(text_query, image_query, asked.tasks), adapter)
        if input_ids is None and inputs_embeds is not None and not self._embedding_routes.know(inputs_embeds):
            if decision.action(rows, inputs_embeds.dtype).prefix is not None:
                raise ValueError(
                    "this stage puts embeddings in front of each prompt, which these inputs_embeds do not have: give "
                    "input_ids, or what prepare_inputs_labels_for_multimodal makes of them"
                )
        return decision

    def _starting(self, decision: Decision, inputs_embeds: Tensor | None, past: int = 0) -> Decision:
        """The decision with the positions that its offsets act on, behind ``past`` cached ones.

        Raises:
            ValueError: where the last picture of each row ends is not known.
        """
        if not decision.of_question:
            return decision
        if inputs_embeds is None:  # words alone
            return decision if past else decision.starting(None)
        try:
            return decision.starting([past + start for start in self._embedding_routes.starts(inputs_embeds)])
        except KeyError as error:
            if past or (decision.route is not None and decision.route.starts is not None):
                return decision
            raise ValueError(
                "this stage's offsets act behind the last picture, and where that ends in these inputs_embeds is not "
                "known: give what prepare_inputs_labels_for_multimodal makes, route=model.last_route after it, or a "
                "Route with starts=[the first position behind it] of each row"
            ) from error

    def _read_questions(self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None):
        if self.tokenizer is None or input_ids is None:
            raise ValueError(f"this model routes on the question's text and knows no tokenizer to read it with: {_HOW}")
        prompt = {"conv_mode": getattr(self.config, "conversation_version", None)}
        prompt |= getattr(self.config, "prompt", None) or {}
        pad = getattr(self.config, "pad_token_id", None)
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:  # who sees whom, not what is padding
            attention_mask = None
        if self._question_reader is None or self._question_reader.tokenizer is not self.tokenizer:
            self._question_reader = QuestionReader(self.tokenizer)
        return self._question_reader.read(input_ids, attention_mask, labels, prompt, pad)

    def _route_of(self, inputs_embeds: Tensor | None) -> Route | None:
        try:
            if inputs_embeds is None:
                raise KeyError("there are none")
            return self._embedding_routes.find(inputs_embeds)
        except KeyError as error:
            raise ValueError(
                "the route of these inputs_embeds is not known: they are not, row by row, what this model's "
                f"prepare_inputs_labels_for_multimodal gave; {_HOW}"
            ) from error
