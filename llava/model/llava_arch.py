"""LLaVA's architecture: image features spliced into the text, and the route that picks weight offsets.

Two mix-ins, shared by every language model back-end:

- ``LlavaMetaModel`` adds the vision tower and the projector to a decoder (``LlamaModel``, ``MistralModel``).
- ``LlavaMetaForCausalLM`` adds ``forward`` and ``generate`` that take images (``PicturedText``) and questions. The
  route (which slots, with which weights, for each question) is decided once, before the first token, and is reused by
  every decoding step. An adapter (``llava.slots.adapter``) decides it and acts on it: its offsets reach the projections
  as a keyword argument (``llava.slots.offsets``), its prefix embeddings stand in front of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector, load_projector
from llava.model.pictured_text import PicturedText
from llava.model.vision.hand_out import Images
from llava.model.vision.tiles import unpad_image
from llava.slots.adapter import Action, Adapter
from llava.slots.offsets import install_offset_hooks
from llava.slots.picture_query import image_queries
from llava.slots.queries import Query
from llava.slots.route import Route

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]


class LlavaMetaModel:
    """Adds ``vision_tower``, ``mm_projector`` and ``image_newline`` to a decoder."""

    def __init__(self, config):
        super().__init__(config)
        has_tower = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_config", None)
        if has_tower:
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
                self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Give a text-only decoder the tower and projector that ``model_args`` names (LLaVA's first training stage)."""
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_patch_merge_type = getattr(model_args, "mm_patch_merge_type", "flat")
        if self.get_vision_tower() is None:
            self.vision_tower = build_vision_tower(config, delay_load=True)
        self.vision_tower.load_model()
        config.mm_hidden_size = self.vision_tower.hidden_size
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(config)
        if getattr(model_args, "pretrain_mm_mlp_adapter", None):
            load_projector(self.mm_projector, model_args.pretrain_mm_mlp_adapter)


class LlavaMetaForCausalLM(PicturedText):
    """``forward`` and ``generate`` with images and per-question routes, for any decoder with LLaVA's mix-in."""

    def init_routing(self) -> None:
        """Called by the back-end's ``__init__``: no adapter yet."""
        self.retriever: Adapter | None = None
        self.last_route: Route | None = None
        self._action_cache: tuple[()] | tuple[Tensor, Action] | None = None  # None but in generate()
        self._offset_hooks: list = []

    # -- parts ---------------------------------------------------------------------------------------------------

    def get_model(self) -> LlavaMetaModel:
        return self.model

    def attach_adapter(self, adapter: Adapter) -> None:
        """Let ``adapter`` act from the next forward pass on, instead of the one before."""
        self.detach_adapter()
        adapter.to(self.device)
        self.retriever = adapter
        self.config.retriever = adapter.settings.to_dict()
        self._offset_hooks = install_offset_hooks(self.get_model().layers, adapter.settings.targets)

    def detach_adapter(self) -> None:
        """Be the base model again: no hook and no entry in the config is left."""
        for hook in self._offset_hooks:
            hook.remove()
        self._offset_hooks = []
        self.retriever = self.last_route = self._action_cache = None
        vars(self.config).pop("retriever", None)

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the picture tokens that early LLaVA prompts hold; their embeddings start as the mean of the others."""
        tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN] if model_args.mm_use_im_start_end else []
        added = tokenizer.add_tokens(tokens, special_tokens=True)
        if not added:
            return
        self.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in (self.get_input_embeddings().weight, self.get_output_embeddings().weight):
                table[-added:] = table[:-added].mean(0)

    # -- route ---------------------------------------------------------------------------------------------------

    def image_query(self, features: list[list[Tensor]], images: Images | None) -> Tensor | None:
        """Image queries ``[batch, image_dim]`` from tower features and pixels; ``None`` where no slot asks for them."""
        if self.retriever is None or not self.retriever.active or not self.retriever.settings.uses_images:
            return None
        settings = self.retriever.settings
        pixels = [[] for _ in features] if images is None else self.read_images(images)
        return image_queries(settings.image_query, features, pixels, settings.image_dim)

    def route(self, text_query: Tensor | None, image_query: Tensor | None, tasks=None) -> Route | None:
        """The route of each sample, or ``None`` when no slot may be selected (the base model answers)."""
        if self.retriever is None or not self.retriever.active:
            return None
        text_query = None if text_query is None else text_query.to(self.device)
        image_query = None if image_query is None else image_query.to(self.device)
        return self.retriever.decide(Query(text_query, image_query), tasks)

    def _action(self, route: Route | None, dtype: torch.dtype) -> Action:
        """What the route does; in ``generate`` later steps of the same questions find it ready."""
        if route is None:
            return Action()
        cached = self._action_cache
        if cached and cached[0] is route.slot_indices:
            return cached[1]
        action = self.retriever.act(route, dtype)
        if cached is not None:
            self._action_cache = (route.slot_indices, action)
        return action

    # -- forward and generate --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        modalities: Sequence[str] | None = None,
        image_features: list[list[Tensor]] | None = None,
        text_query: Tensor | None = None,
        image_query: Tensor | None = None,
        slot_indices: torch.LongTensor | None = None,
        slot_weights: Tensor | None = None,
        **kwargs,
    ):
        """Next-token logits, and the cross-entropy on ``labels`` where given.

        Args:
            images, image_sizes: the batch's pictures (see ``vision.hand_out``) and their original ``(width, height)``.
            modalities: LLaVA-NeXT's; pictures are known, videos are not.
            image_features: what ``vision_features(images)`` gives, computed before; then ``images`` is not needed.
            text_query: ``[batch, text_dim]`` encoded questions; with the pictures they decide the route.
            image_query: ``[batch, image_dim]`` computed before; by default it comes from the pictures.
            slot_indices, slot_weights: ``[batch, k]`` a route already decided (decoding steps pass it along).
        """
        if image_features is None or images is not None:
            images, image_sizes = self.hand_out(input_ids, attention_mask, images, image_sizes, modalities)
        if image_features is None and images is not None and self.get_vision_tower() is not None:
            image_features = self.vision_features(images)
        pictured = inputs_embeds is None and image_features is not None
        features = image_features if pictured else [[] for _ in _first_given(input_ids, inputs_embeds, text_query)]
        route = None if slot_indices is None else Route(slot_indices, slot_weights)
        if route is None and (pictured or (text_query is not None and past_key_values is None)):
            image_query = self.image_query(features, images) if image_query is None else image_query
            route = self.route(text_query, image_query)
        dtype = self.get_model().embed_tokens.weight.dtype if inputs_embeds is None else inputs_embeds.dtype
        action = self._action(route, dtype)
        prefixed = inputs_embeds is None and past_key_values is None and action.prefix is not None
        if pictured or prefixed:
            projected = self.project_features(features, image_sizes)
            inputs_embeds, attention_mask, position_ids, spliced = self._splice(
                input_ids, attention_mask, labels, projected, prefix=action.prefix
            )
            labels = None if labels is None else spliced
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            weight_offset=action.offset,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        modalities: Sequence[str] | None = None,
        image_features: list[list[Tensor]] | None = None,
        questions: Sequence[str] | None = None,
        text_query: Tensor | None = None,
        image_query: Tensor | None = None,
        tasks: Sequence[str | None] | None = None,
        **kwargs,
    ) -> Tensor:
        """Answer token ids ``[batch, new tokens]`` (only the new ones).

        Args:
            inputs: ``[batch, length]`` prompt ids with ``IMAGE_TOKEN_INDEX`` where the picture goes (also accepted as
                ``input_ids``), padded on either side and described by ``attention_mask``.
            images, image_sizes, modalities, image_features: as in ``forward``.
            questions: the plain questions; encoded into the text query when the model has slots that route on text.
            text_query: ``[batch, text_dim]`` the same, already encoded.
            image_query: ``[batch, image_dim]`` computed before; by default it comes from the pictures.
            tasks: the true task of each question; given, only that task's slots compete (oracle routing); ``None`` in a
                row: the router decides.

        The route used is kept as ``last_route`` (``None`` when the base model answered).
        """
        if "inputs_embeds" in kwargs:
            raise ValueError("generate() builds inputs_embeds itself; give input_ids and images")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        attention_mask = kwargs.pop("attention_mask", None)
        kwargs.pop("position_ids", None)
        if image_features is None or images is not None:
            images, image_sizes = self.hand_out(input_ids, attention_mask, images, image_sizes, modalities)
        features: list[list[Tensor]] = [[] for _ in input_ids] if image_features is None else image_features
        if image_features is None and images is not None and self.get_vision_tower() is not None:
            features = self.vision_features(images)
        self.last_route = self._question_route(features, images, questions, text_query, image_query, tasks)
        slot_indices, slot_weights = _as_pair(self.last_route)
        projected = self.project_features(features, image_sizes)
        self._action_cache = ()
        try:
            action = self._action(self.last_route, self.get_model().embed_tokens.weight.dtype)
            embeds, mask, _, _ = self._splice(input_ids, attention_mask, None, projected, "left", action.prefix)
            return super().generate(
                inputs_embeds=embeds,
                attention_mask=mask.long(),
                slot_indices=slot_indices,
                slot_weights=slot_weights,
                **kwargs,
            )
        finally:
            self._action_cache = None

    def _question_route(self, features, images, questions, text_query, image_query, tasks) -> Route | None:
        if self.retriever is None or not self.retriever.active:
            return None
        if text_query is None and self.retriever.settings.uses_text:
            if questions is None:
                raise ValueError("this model routes on the question's text: give questions=[...] (or text_query)")
            text_query = self.retriever.encode_questions(questions)
        image_query = self.image_query(features, images) if image_query is None else image_query
        return self.route(text_query, image_query, tasks)


def _first_given(*values: Tensor | None) -> Tensor:
    return next(value for value in values if value is not None)


def _as_pair(route: Route | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if route is None else (route.slot_indices, route.slot_weights)
